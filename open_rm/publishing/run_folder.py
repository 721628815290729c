"""Where a run's results go: its name, its folder, its repository; claimed before anything expensive, described at the end."""

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from open_rm.errors import UserError
from open_rm.flags import RunFlags
from open_rm.publishing import pushing


@dataclass(frozen=True)
class Place:
    """The run's name, the folder that its model lands in, and where it is pushed to (repo_id is None: nowhere)."""

    name: str
    folder: str
    repo_id: str | None
    revision: str


def claim(flags: RunFlags, *, trains: bool) -> Place:
    """Name the run, and make sure that its folder can be written and that the Hub lets us in (main rank only).

    trains: whether a model will be saved at all.
    """
    name = flags.run_name or f"{flags.exp_name}__{flags.seed}__{int(time.time())}"
    folder = str(Path(flags.output_dir or f"output/{name}").expanduser())
    revision, repo_id = flags.hf_repo_revision or name, None
    if trains:
        claim_folder(folder)
    if flags.push_to_hub:
        owner = {"entity": flags.hf_entity, "repo_id": flags.hf_repo_id}
        repo_id = pushing.check_access(**owner, revision=revision, private=flags.hf_repo_private)
    return Place(name, folder, repo_id, revision)


def claim_folder(folder: str) -> None:
    """Make sure that a model can be written there when the training is over, and that no run is overwritten."""
    path = Path(folder)
    for name, what in (("config.json", "a model"), ("metrics.jsonl", "the record of a run")):
        if (path / name).exists():
            raise UserError(f"--output_dir {folder} already holds {what}; choose another folder, or move that one away")
    was_there = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
        if not was_there:
            path.rmdir()  # a run that is refused later leaves nothing behind
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error


def write_facts(folder: str, facts: dict) -> None:
    """run.json: the run's flags, derived numbers, log lines and versions, to repeat it or to find out why not."""
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
    text = json.dumps(facts | {"versions": versions | {"python": platform.python_version()}}, indent=2, default=str)
    (Path(folder) / "run.json").write_text(text + "\n", encoding="utf-8")
