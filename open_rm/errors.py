"""The exception that is shown to a user as a sentence instead of a traceback, and how it quotes a library."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one clear sentence or two: where (file, row or flag), what is wrong, what to do.
    The recipe prints it and exits with status 1; anything else that is raised is our bug and keeps its traceback.
    """


class OneRanksError(UserError):
    """A UserError that one rank alone runs into; the others learn of it from the watchdog."""


STOPPED = 75  # a run's status where it was asked to stop: "try again later", as in sysexits.h


class LeftAlone(SystemExit):
    """One rank alone leaves with STOPPED, because it was asked to; the others learn of it from the watchdog."""


def quote_error(error: Exception) -> str:
    """The first line of a library's error, shortened, for quoting inside one sentence of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")[:200].encode(errors="backslashreplace").decode()


def quote(value: object, length: int = 60) -> str:
    """A value of a user's data on one line, shortened."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits, something nested as deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[:length] + "..."
