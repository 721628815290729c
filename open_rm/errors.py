"""The one exception that is shown to a user as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one clear sentence or two: where (file, row or flag), what is wrong, what to do.
    The recipe prints it and exits with status 1; anything else that is raised is our bug and keeps its traceback.
    """
