"""A push to the Hugging Face Hub that cannot lose a model.

Token and repository are checked before training; the push retries; when the Hub stays away the folder is still there
and the message holds the command that pushes it later: `python -m open_rm.hub push --folder ... --repo_id ...`.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token

from open_rm.errors import UserError
from open_rm.publishing.hub_calls import HUB_ERRORS, persistently, reason, status

# Only what belongs to a model; tracking folders and texts of the data (samples, the report's examples) stay at home.
PUSHED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "*.py",
    "README.md",
    "*.png",
    "metrics.jsonl",
]
MODELS = ("config.json", "adapter_config.json")  # a folder that holds one of these holds a model or an adapter
NOT_PUSHED = ["wandb/*", "tensorboard/*", "checkpoints/*", "stalled/*", ".claim*"]
# Nothing of a model lies in a folder below; reports of open_rm.evaluation hold texts, wherever they were written.
NOT_PUSHED += ["*/*", "report.json", "scores.meta.json", "plan.json"]


DEFAULT_REPO = "open_rm_dev"


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
    api, repo = HfApi(), repo_id or DEFAULT_REPO
    try:
        user = persistently(api.whoami)["name"]
        repo = repo if "/" in repo else f"{entity or user}/{repo}"
        _create(lambda: api.create_repo(repo, private=private))
        if revision != "main":
            _create(lambda: api.create_branch(repo, branch=revision))
    except HUB_ERRORS as error:
        raise UserError(
            f"--push_to_hub: {reason(error)}, so {repo} (branch {revision}) cannot be pushed to; training was not started"
        ) from error
    except ValueError as error:  # the client's own check of names
        raise UserError(f"--hf_repo_id {repo}: not a name that the Hub accepts; write name or entity/name") from error
    return repo


def _create(call: Callable) -> None:
    """Create something that may exist. Not the client's exist_ok: it takes 403 for "exists" where reading is allowed."""
    try:
        persistently(call)
    except HUB_ERRORS as error:
        if status(error) != 409:
            raise


def push_folder(folder: str, repo_id: str, *, revision: str, private: bool = True) -> str:
    """Upload a saved model to a branch, with retries; returns the address.

    Raises:
        UserError: given up; the message holds the command that tries again. The folder is untouched.
    """
    api = HfApi()
    later = ["python", "-m", "open_rm.hub", "push", "--folder", folder, "--repo_id", repo_id, "--revision", revision]
    later += [] if private else ["--no_private"]
    check_folder(folder)
    try:
        _create(lambda: api.create_repo(repo_id, private=private))
        if revision != "main":
            _create(lambda: api.create_branch(repo_id, branch=revision))
        persistently(
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
            f"push to {repo_id} failed: {reason(error)}. The model is safe in {folder}; "
            f"push it later with: {shlex.join(later)}"
        ) from error
    return f"{api.endpoint}/{repo_id}/tree/{revision}"


def check_folder(folder: str) -> None:
    """Refuse a folder that holds neither a model nor an adapter."""
    if not any((Path(folder) / name).is_file() for name in MODELS):
        raise UserError(f"there is no model in {folder}; name a folder that holds config.json or adapter_config.json")
