"""Calls to the Hugging Face Hub: repeated where the fault may pass, and what went wrong as a clause of a sentence.

Tokens come from the environment (HF_TOKEN) or `hf auth login` only.
"""

import errno
import sys
import time
from collections.abc import Callable

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from open_rm import alive
from open_rm.errors import quote_error

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 2.0
SILENCE_SECONDS = 300.0  # the client alone would wait for ever for a server that has stopped answering
# The client lets its HTTP library's own errors through when a connection breaks; their common base is an ancestor here.
HUB_ERRORS = (next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"), OSError)
FULL = (errno.ENOSPC, errno.EDQUOT)
# Faults of the disk here, which asking the Hub again does not mend.
OF_THE_DISK = (*FULL, errno.EROFS, errno.EPERM, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def persistently(call: Callable):
    """Repeat a Hub call that failed for a reason that may pass (5xx, 429, no connection), pausing 2, 4, 8, 16 s."""
    get_session().timeout = SILENCE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # The Hub has patience of its own here, and a server that is slow is no rank that hangs.
            with alive.phase("talking to the Hub", alive.Kind.WAITS):
                return call()
        except HUB_ERRORS as error:
            if not _may_pass(error) or attempt == ATTEMPTS:
                raise
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)
            print(
                f"Hub: {reason(error)}; trying again in {pause:.0f} s ({attempt}/{ATTEMPTS})",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(pause)


def cause(error: Exception) -> Exception:
    """What really went wrong: a download that fails says "not in the cache", raised from the Hub's answer."""
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HUB_ERRORS):
        error = error.__cause__
    return error


def status(error: Exception) -> int | None:
    """The HTTP status of an answer; None where there was none."""
    return getattr(getattr(cause(error), "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    error, number = cause(error), status(error)
    if isinstance(error, OfflineModeIsEnabled) or getattr(error, "errno", None) in OF_THE_DISK:
        return False
    return number is None or number >= 500 or number == 429


def reason(error: Exception, *, repo_id: str | None = None) -> str:
    """A clause that says what went wrong and, where there is one, the way on. repo_id: what was to be read."""
    error, number = cause(error), status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}" if repo_id else "its page"
        return f"it is gated; accept its conditions on {page} with the account that HF_TOKEN belongs to"
    if repo_id and isinstance(error, RepositoryNotFoundError):
        # Without a token the Hub answers 401 for what is private and for what does not exist alike.
        if get_token() is None:
            return "there is no public model of this name; if it is private, set HF_TOKEN or run `hf auth login`"
        return "there is no model of this name that the token may read; check the name, and whose token HF_TOKEN is"
    if number == 401:
        return "the Hub refuses the token (401); check HF_TOKEN"
    if number == 403 and repo_id:
        return "the Hub refuses access (403)"
    if number == 403:
        return "the token may not write there (403); use one with write access"
    if number is not None:
        return f"the Hub answered {number}"
    if getattr(error, "errno", None) in OF_THE_DISK:
        return "the disk is full" if error.errno in FULL else quote_error(error)
    if isinstance(error, ValueError):
        return str(error).strip().splitlines()[0]
    return f"the Hub cannot be reached ({type(error).__name__})"
