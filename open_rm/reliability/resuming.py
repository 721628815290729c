"""From the same command to the checkpoint it goes on from: found, whole, and of a run that this command would repeat."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from open_rm import alive, node_cache
from open_rm.data.pairs import PreferenceData
from open_rm.errors import UserError
from open_rm.flags import CheckpointFlags, ModelFlags
from open_rm.ranks import Ranks
from open_rm.reliability import checkpoints, comparing
from open_rm.reliability.checkpoints import Checkpoint
from open_rm.training.engine import Engine
from open_rm.training.engine_state import frozen_mark
from open_rm.training.sinks import read_rows

# What a finished run may lack although the same model was trained. hf_repo_id and the like say where it was pushed.
OF_THE_RESULT = ("push_to_hub", "hf_entity", "hf_repo_revision", "merge_adapter")


def find(
    flags: CheckpointFlags,
    folder: str,
    begun: dict | None,
    all_flags: dict,
    *,
    finished: bool,
    ranks: Ranks,
    say: Callable,
) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run. A collective call.

    Args:
        folder: the run's.  begun, finished: what it holds (publishing/run_folder.Place).
        all_flags: by name, those given now.

    Raises:
        UserError: what is there was begun by flags that would train another model, or is damaged.
    """
    wanted = flags.resume_from_checkpoint
    named = wanted not in ("auto", "never")

    def look() -> tuple[list, bool]:
        own = check_begun(flags, folder, begun, all_flags, finished=finished)
        if finished:
            return [], False
        checkpoints.remove_unfinished(folder)
        # A run that was begun from a named checkpoint and has its own by now goes on from those.
        if named and own and begun is not None and begun["resume_from_checkpoint"] == wanted:
            return own, False
        paths = checkpoints.candidates(wanted, folder)
        if begun is not None and not paths:
            say(f"the run in {folder} ended before its first checkpoint; it begins anew")
            _forget(folder)
        inside = paths and paths[0].resolve().parent == checkpoints.folder_of(folder).resolve()
        if named and not inside and begun is not None and begun["resume_from_checkpoint"] != wanted:
            raise UserError(
                f"--output_dir {folder} holds a run, and --resume_from_checkpoint {wanted} is another one's; choose "
                "another folder, or leave one of the flags out"
            )
        return paths, named

    paths, by_name = ranks.from_main(look)
    with alive.phase("reading checkpoints", alive.Kind.BUSY):
        found, damaged = checkpoints.first_whole(paths, ranks, named=by_name and len(paths) == 1)
    if found is None:
        return None

    def take() -> None:
        changed = comparing.changed(found.state["flags"], all_flags, where=str(found.path))
        if changed:
            say(f"changed since {found.path.name}, and not the mathematics: {', '.join(changed)}")
        for path, damage in damaged:
            named_now = ""
            if path.parent == checkpoints.folder_of(folder):
                named_now = f" and now called {checkpoints.set_aside(path, 'damaged').name}"
            say(f"checkpoint {path} is damaged ({damage}){named_now}; the one before it is taken")
        for path in checkpoints.committed(folder):  # or they would count as the newest, once this run writes its own
            if by_name and path.name > found.path.name:
                say(f"checkpoint {path} is later and now called {checkpoints.set_aside(path, 'later').name}")

    ranks.from_main(take)
    return found


def check_begun(
    flags: CheckpointFlags, folder: str, begun: dict | None, all_flags: dict, *, finished: bool
) -> list[Path]:
    """The folder's own checkpoints, the newest first, of a run that this command would repeat. Arguments and errors as `find`."""
    own = checkpoints.committed(folder)
    if flags.resume_from_checkpoint == "never" and own:
        raise UserError(
            f"--output_dir {folder} already holds checkpoints of a run; choose another folder, or move that one away"
        )
    if begun is not None and (own or _made_steps(folder)):
        comparing.changed(begun, all_flags, where=f"the run in {folder}")
    if finished:
        _check_finished(folder, begun, all_flags)
    return own


def _check_finished(folder: str, begun: dict, all_flags: dict) -> None:
    """Refuse a command that wants something else of a finished run than it gave."""
    differ = [f"--{name}" for name in OF_THE_RESULT if begun.get(name) != all_flags[name]]
    if differ:
        raise UserError(
            f"the run in {folder} is finished, without {', '.join(differ)} as they are now; push its model with python -m "
            "open_rm.hub push, make another folder of its checkpoint with python -m open_rm.export, or choose another --output_dir"
        )


def _forget(folder: str) -> None:
    """Take away what views show of a run that begins anew: its steps would stand there twice."""
    shutil.rmtree(Path(folder) / "tensorboard", ignore_errors=True)
    for offline in Path(folder).glob("wandb/offline-run-*"):
        shutil.rmtree(offline, ignore_errors=True)


def _made_steps(folder: str) -> bool:
    """Whether the record in a folder has a step, which another run would write over."""
    record = Path(folder) / "metrics.jsonl"
    return record.exists() and any(row["step"] > 0 for row in read_rows(record))


def commits(flags: ModelFlags, found: Checkpoint | None, begun: dict | None) -> dict[str, str]:
    """The flags of revisions, with the commits to read (node_cache.commits_of): those that the run was begun with, where it goes
    on from a checkpoint or begins anew in its folder. begun: its run.json."""
    before = (begun or {}).get("commits", {}) | (found.state.get("commits", {}) if found else {})
    return node_cache.commits_of(flags, before)


def pairs_per_step(found: Checkpoint | None, own: int, ranks: Ranks, say: Callable) -> int:
    """Pairs of a step: `own`, by the flags and the ranks; or those of the checkpoint, where another number of ranks goes on.

    Raises:
        UserError: the flags ask for another step on as many ranks.
    """
    if found is None or found.state["pairs_per_step"] == own:
        return own
    before = found.state["pairs_per_step"]
    if why := why_other_steps(found, own, ranks.world_size):
        ranks.fail(why)
    say(f"steps of {before} pairs as before: the flags would make {own} on {ranks.world_size} ranks, and others began")
    return before


def why_other_steps(found: Checkpoint, own: int, world_size: int) -> str | None:
    """The sentence for flags that ask for another step on as many ranks; None where they do not."""
    if found.state["world_size"] != world_size or own in (found.state["pairs_by_flags"], found.state["pairs_per_step"]):
        return None
    return (
        f"{found.path} was trained in steps of {found.state['pairs_per_step']} pairs and the flags make {own}; give "
        "--per_device_train_batch_size and --gradient_accumulation_steps as before, or choose another --output_dir"
    )


def records(found: Checkpoint | None) -> dict:
    """Where the records of the run stood and stand, for Tracker."""
    return {} if found is None else {"resumed": found.state["sinks"], "positions_from": str(found.path.parent.parent)}


def marks_of(
    train: PreferenceData, held_out: PreferenceData | None, engine: Engine, dtype: torch.dtype, *, margins: bool
) -> dict:
    """What a run is known by besides its flags. margins: they enter the loss."""
    return {
        "training data": comparing.data_mark(train, margins=margins),
        "held-out data": comparing.data_mark(held_out),
        "frozen weights": frozen_mark(engine.module),
        "compute dtype": str(dtype),
    }


def check_content(
    found: Checkpoint | None, marks: dict, flags: CheckpointFlags, *, ranks: Ranks, say: Callable
) -> None:
    """Whether the run that goes on is known by the same marks (of the main rank).

    Raises:
        UserError: it is another one.
    """
    if found is None:
        return
    decide = flags.metric_for_best_model is not None
    where = str(found.path)
    lines = ranks.from_main(
        lambda: comparing.differing(found.state["marks"], marks, where=where, evaluations_decide=decide)
    )
    say(*lines)
