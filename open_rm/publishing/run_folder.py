"""Where a run's results go: its name, its folder, its repository; claimed before anything expensive, described in run.json."""

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from open_rm.errors import UserError, quote_error
from open_rm.flags import RunFlags
from open_rm.publishing import pushing
from open_rm.publishing.pushing import MODELS
from open_rm.reliability.checkpoints import free_bytes, gib

FACTS, RECORD = "run.json", "metrics.jsonl"


@dataclass(frozen=True)
class Place:
    """The run's name, the folder that its model lands in, and where it is pushed to (repo_id is None: nowhere).

    begun: what run.json says of the run that the folder holds and that was not finished; None for a new one.
    finished: the folder holds what this command would make.
    """

    name: str
    folder: str
    repo_id: str | None
    revision: str
    begun: dict | None = None
    finished: bool = False


def claim(flags: RunFlags, take: Callable[[str], None], *, trains: bool, goes_on: bool) -> Place:
    """Name the run, and make sure that its folder can be written and that the Hub lets us in (main rank only).

    take: claims a folder, so that no other run writes into it.  trains: whether a model will be saved at all.
    goes_on: whether a run that the folder holds may be gone on with.

    Raises:
        UserError: the folder is another run's, or holds what cannot be gone on with.
    """
    name = flags.run_name or f"{flags.exp_name}__{flags.seed}__{int(time.time())}"
    folder = str(Path(flags.output_dir or f"output/{name}").expanduser())
    begun, repo_id, finished = None, None, False
    if trains:
        take(folder)
        begun = held(Path(folder), goes_on)
        finished = begun is not None and is_finished(Path(folder), begun)
        name = flags.run_name or (begun["run_name"] if begun else name)
    revision = flags.hf_repo_revision or name
    if flags.push_to_hub and not finished:
        owner = {"entity": flags.hf_entity, "repo_id": flags.hf_repo_id}
        repo_id = pushing.check_access(**owner, revision=revision, private=flags.hf_repo_private)
    return Place(name, folder, repo_id, revision, begun, finished)


def held(folder: Path, goes_on: bool) -> dict | None:
    """run.json of a run in the folder; None where there is no run. goes_on: whether it may be gone on with.

    Raises:
        UserError: the folder holds what cannot be gone on with.
    """
    facts = None
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    ours = isinstance(facts, dict) and isinstance(facts.get("finished"), bool)
    for name in (*MODELS, RECORD):
        if (folder / name).exists() and not (ours and goes_on):
            what = "the record of a run" if name == RECORD else "a model"
            raise UserError(f"--output_dir {folder} already holds {what}; choose another folder, or move that one away")
    return facts if ours else None


def is_finished(folder: Path, begun: dict) -> bool:
    """Whether the folder holds the model of a run that has nothing left to do. begun: its run.json."""
    return begun["finished"] and any((folder / name).exists() for name in MODELS)


def write_facts(folder: str, facts: dict, *, finished: bool) -> None:
    """run.json: the run's flags, derived numbers, log lines and versions, to go on with it, repeat it, or find out why not.

    finished: the model is saved, proven and pushed, so that the same command has nothing more to do.
    """
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
    versions["python"] = platform.python_version()
    text = json.dumps(facts | {"finished": finished, "versions": versions}, indent=2, default=str)
    path = Path(folder) / FACTS
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{FACTS}.tmp")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)  # a run that is killed here leaves the old one, not half of a new one


def conclude(flags: RunFlags, place: Place, facts: Callable[[], dict], *, say: Callable[[str], None]) -> None:
    """Push the model where that was asked for; run.json says that the run is finished when nothing is left to do.

    facts: for run.json; asked again when the push has been told.
    """
    write_facts(place.folder, facts(), finished=not flags.push_to_hub)
    if flags.push_to_hub:
        where = {"revision": place.revision, "private": flags.hf_repo_private}
        say(f"pushed to {pushing.push_folder(place.folder, place.repo_id, **where)}")
        write_facts(place.folder, facts(), finished=True)


@contextlib.contextmanager
def disk_explained(folder: str, last_checkpoint: int | None) -> Iterator[None]:
    """The block writes the model; a disk that takes no more is a sentence, and nothing that was trained is lost."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and number not in (errno.EROFS, errno.EPERM, errno.EACCES, errno.EIO, errno.ESTALE):
            raise
        why = f"the disk is full, {gib(free_bytes(Path(folder)))} are free" if full else quote_error(error)
        kept = "no checkpoint was written, so that the same command trains anew"
        if last_checkpoint is not None:
            kept = f"the checkpoint of step {last_checkpoint} is whole: mend that and give the same command again"
        raise UserError(f"{folder}: the model cannot be saved ({why}); {kept}") from error
