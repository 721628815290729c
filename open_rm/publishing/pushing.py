"""A push to the Hugging Face Hub that cannot lose a model.

Token and repository are checked before training; the push retries; when the Hub stays away the folder is still there
and the message holds the command that pushes it later: `python -m open_rm.hub --folder ... --repo_id ...`.
Tokens come from the environment (HF_TOKEN) or `hf auth login` only.
"""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError

from open_rm import alive
from open_rm.errors import UserError

# Only what belongs to a model; tracking folders and sample texts of the training data stay at home.
PUSHED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.py",
    "README.md",
    "*.png",
    "metrics.jsonl",
]
MODELS = ("config.json", "adapter_config.json")  # a folder that holds one of these holds a model or an adapter
NOT_PUSHED = ["wandb/*", "tensorboard/*", "checkpoints/*", "stalled/*", ".claim*"]
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 2.0
SILENCE_SECONDS = 300.0  # the client alone would wait for ever for a server that has stopped answering
# The client lets its HTTP library's own errors through when a connection breaks; their common base is an ancestor here.
HUB_ERRORS = (next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"), OSError)


def check_access(*, entity: str | None, repo_id: str | None, revision: str, private: bool) -> str:
    """Before training: the token may write, which creating repository and branch proves (both may exist).

    Args:
        entity: user or organisation; None is the token's user.
        repo_id: "name" or "entity/name"; None is "open_rm_dev".
        revision: the branch that will be pushed to.

    Returns:
        the complete repository id.
    """
    if get_token() is None:
        raise UserError("--push_to_hub: there is no Hub token; set HF_TOKEN in the environment or run `hf auth login`")
    api, repo = HfApi(), repo_id or "open_rm_dev"
    try:
        user = _persistently(api.whoami)["name"]
        repo = repo if "/" in repo else f"{entity or user}/{repo}"
        _create(lambda: api.create_repo(repo, private=private))
        if revision != "main":
            _create(lambda: api.create_branch(repo, branch=revision))
    except HUB_ERRORS as error:
        raise UserError(
            f"--push_to_hub: {_reason(error)}, so {repo} (branch {revision}) cannot be pushed to; training was not started"
        ) from error
    except ValueError as error:  # the client's own check of names
        raise UserError(f"--hf_repo_id {repo}: not a name that the Hub accepts; write name or entity/name") from error
    return repo


def _create(call: Callable) -> None:
    """Create something that may exist. Not the client's exist_ok: it takes 403 for "exists" where reading is allowed."""
    try:
        _persistently(call)
    except HUB_ERRORS as error:
        if _status(error) != 409:
            raise


def push_folder(folder: str, repo_id: str, *, revision: str, private: bool = True) -> str:
    """Upload a saved model to a branch, with retries; returns the address.

    Raises:
        UserError: given up; the message holds the command that tries again. The folder is untouched.
    """
    api = HfApi()
    later = ["python", "-m", "open_rm.hub", "--folder", folder, "--repo_id", repo_id, "--revision", revision]
    later += [] if private else ["--no_private"]
    check_folder(folder)
    try:
        _create(lambda: api.create_repo(repo_id, private=private))
        if revision != "main":
            _create(lambda: api.create_branch(repo_id, branch=revision))
        _persistently(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message="Upload reward model",
                allow_patterns=PUSHED,
                ignore_patterns=NOT_PUSHED,
            )
        )
    except (*HUB_ERRORS, ValueError) as error:
        raise UserError(
            f"push to {repo_id} failed: {_reason(error)}. The model is safe in {folder}; "
            f"push it later with: {shlex.join(later)}"
        ) from error
    return f"{api.endpoint}/{repo_id}/tree/{revision}"


def _persistently(call: Callable):
    """Repeat a Hub call that failed for a reason that may pass (5xx, 429, no connection), pausing 2, 4, 8, 16 s."""
    get_session().timeout = SILENCE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # The Hub has patience of its own here, and a server that is slow is no rank that hangs.
            with alive.phase("talking to the Hub", alive.Kind.WAITS):
                return call()
        except HUB_ERRORS as error:
            status = _status(error)
            passing = status is None or status >= 500 or status == 429
            if not passing or attempt == ATTEMPTS:
                raise
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)
            print(
                f"Hub: {_reason(error)}; trying again in {pause:.0f} s ({attempt}/{ATTEMPTS})",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(pause)


def check_folder(folder: str) -> None:
    """Refuse a folder that holds neither a model nor an adapter."""
    if not any((Path(folder) / name).is_file() for name in MODELS):
        raise UserError(f"there is no model in {folder}; name a folder that holds config.json or adapter_config.json")


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer; None where there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    status = _status(error)
    if status == 401:
        return "the Hub refuses the token (401); check HF_TOKEN"
    if status == 403:
        return "the token may not write there (403); use one with write access"
    if status is not None:
        return f"the Hub answered {status}"
    if isinstance(error, ValueError):
        return str(error).strip().splitlines()[0]
    return f"the Hub cannot be reached ({type(error).__name__})"
