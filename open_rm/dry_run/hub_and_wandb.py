"""What the Hub and wandb will say, asked without making anything there."""

import threading
from collections.abc import Callable

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError

from open_rm.dry_run.told import Told
from open_rm.errors import quote_error
from open_rm.flags import RunFlags, TrackingFlags
from open_rm.publishing.hub_calls import HUB_ERRORS, reason
from open_rm.publishing.pushing import DEFAULT_REPO
from open_rm.training.wandb_run import has_wandb_key, wanted_mode

SECONDS = 8.0  # most that the Hub is waited for


def hub(flags: RunFlags, name: str) -> Told:
    """name: of the run."""
    token, offline = get_token() is not None, bool(constants.HF_HUB_OFFLINE)
    branch, repo = flags.hf_repo_revision or name, flags.hf_repo_id or DEFAULT_REPO
    numbers = {"push": flags.push_to_hub, "token_found": token, "offline": offline}
    numbers |= dict.fromkeys(("repo", "branch", "user", "repo_exists"))
    if not flags.push_to_hub:
        return Told("hub", [f"nothing is pushed ({'a' if token else 'no'} token is found)"], numbers)
    numbers |= {"repo": repo, "branch": branch}
    if offline or not token:
        why = (
            "HF_HUB_OFFLINE is set; unset it"
            if offline
            else "there is no Hub token; set HF_TOKEN or run `hf auth login`"
        )
        return Told("hub", [f"cannot push to {repo}: {why}"], numbers, (f"--push_to_hub: {why}",))
    said, found, refused = _asked(repo, flags.hf_entity)
    where = f"{found['repo']}, branch {branch}"
    refused = (f"--push_to_hub: {said}",) if refused else ()
    return Told("hub", [f"pushes to {where}: {said}"], numbers | found, refused)


def _asked(repo: str, entity: str | None) -> tuple[str, dict, bool]:
    """Who the token is and whether the repository is there: a clause, numbers, and whether the run would be refused."""
    api, found = HfApi(), {"repo": repo, "user": None, "repo_exists": None}

    def ask() -> tuple[str, bool]:
        try:
            found["user"] = api.whoami()["name"]
            found["repo"] = repo if "/" in repo else f"{entity or found['user']}/{repo}"
            found["repo_exists"] = api.repo_exists(found["repo"])
        except HUB_ERRORS as error:
            return reason(error), True
        except HFValidationError:
            return "not a name that the Hub accepts; write name or entity/name", True
        except Exception as error:  # what no Hub answers, but a proxy before it may
            return f"its answer is not understood ({type(error).__name__}: {quote_error(error)})", False
        # The Hub answers alike for what is not there and for what a token may not see.
        there = "which exists" if found["repo_exists"] else "which will be made, unless it is another's private one"
        return f"the token is {found['user']}'s, {there}; whether it may write shows when the run starts", False

    said, refused = _within(SECONDS, ask) or (f"the Hub did not answer within {SECONDS:.0f} s", False)
    return said, found, refused


def _within(seconds: float, work: Callable[[], tuple]) -> tuple | None:
    """Its value; None where it takes longer, in a thread that does not keep the process."""
    values: list[tuple] = []
    thread = threading.Thread(target=lambda: values.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return values[0] if values else None


def wandb(flags: TrackingFlags) -> Told:
    numbers = {"tracked": flags.with_tracking, "key_found": has_wandb_key(), "mode": None}
    if not flags.with_tracking:
        return Told("wandb", ["not used (--with_tracking); metrics.jsonl and TensorBoard are written anyway"], numbers)
    mode, why = wanted_mode()
    why = why or "a key is found; offline if the server does not answer"
    owner = f"{flags.wandb_entity}/" if flags.wandb_entity else ""
    return Told("wandb", [f"{mode}, project {owner}{flags.wandb_project_name}: {why}"], numbers | {"mode": mode})
