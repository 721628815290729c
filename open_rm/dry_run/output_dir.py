"""What a run would make of its folder as it is: looked at, and nothing touched.

As run_folder.claim, resuming.find and resuming.check_content decide, short of a checkpoint's damage, which takes reading it, and
of another process that has the folder now.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from open_rm.dry_run.target import Target
from open_rm.dry_run.told import Told
from open_rm.errors import UserError
from open_rm.flags import CheckpointFlags
from open_rm.publishing.pushing import MODELS
from open_rm.publishing.run_folder import FACTS, RECORD
from open_rm.reliability import checkpoints, comparing
from open_rm.reliability.resuming import OF_THE_RESULT
from open_rm.resolving import Resolved
from open_rm.training.tracking import read_metrics

FREE, BEGUN, FINISHED, OCCUPIED = "free", "begun", "finished", "occupied"
SAYS = {
    FREE: "is free",
    BEGUN: "holds a run that is not finished: the same command goes on with it",
    FINISHED: "holds a finished run: the same command would do nothing",
    OCCUPIED: "is not free for this run",
}


@dataclass(frozen=True)
class _Held:
    """begun: run.json of the run that the folder holds.  own: its checkpoints, the newest first.  trained: whether it made a
    step."""

    begun: dict | None
    own: list[Path]
    trained: bool


def told(
    flags: CheckpointFlags, folder: str, all_flags: dict, read: Resolved, target: Target, *, pairs_per_step: int
) -> Told:
    """The folder's state, and by what sentence the run would refuse it. all_flags: by name (comparing.plain)."""
    refused = ()
    try:
        held = _held(flags, folder)
        state = _state(flags, folder, all_flags, held)
        if state == BEGUN and held.own:
            _check_content(flags, all_flags, held.own[0], read, target, pairs_per_step=pairs_per_step)
    except UserError as error:
        state, refused = OCCUPIED, (str(error),)
    line = f"{folder} {SAYS[state]}"
    if all_flags["output_dir"] is None and all_flags["run_name"] is None:
        own = f"output/{all_flags['exp_name']}__{all_flags['seed']}__<time>"
        line = f"{folder} holds this plan; the run makes a folder of its own, {own}"
    return Told("output_dir", [line], {"folder": folder, "state": state}, refused)


def _held(flags: CheckpointFlags, folder: str) -> _Held:
    path, facts = Path(folder), None
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    ours = isinstance(facts, dict) and isinstance(facts.get("finished"), bool)
    goes_on, own = flags.resume_from_checkpoint != "never", checkpoints.committed(folder)
    for name in (*MODELS, RECORD):
        if (path / name).exists() and not (ours and goes_on):
            what = "the record of a run" if name == RECORD else "a model"
            raise UserError(f"--output_dir {folder} already holds {what}; choose another folder, or move that one away")
    if own and not goes_on:
        raise UserError(
            f"--output_dir {folder} already holds checkpoints of a run; choose another folder, or move that one away"
        )
    record = path / RECORD
    trained = bool(own) or (record.exists() and any(row["step"] > 0 for row in read_metrics(record)))
    return _Held(facts if ours else None, own, trained)


def _state(flags: CheckpointFlags, folder: str, all_flags: dict, held: _Held) -> str:
    begun = held.begun
    checkpoints.candidates(flags.resume_from_checkpoint, folder)  # one that is named has to be there
    if begun is None:
        return FREE if not held.own else BEGUN
    if held.trained:
        comparing.changed(begun, all_flags, where=f"the run in {folder}")
    if not begun["finished"] or not any((Path(folder) / name).exists() for name in MODELS):
        return BEGUN
    differ = [f"--{name}" for name in OF_THE_RESULT if begun.get(name) != all_flags[name]]
    if differ:
        raise UserError(f"the run in {folder} is finished, without {', '.join(differ)} as they are now")
    return FINISHED


def _check_content(
    flags: CheckpointFlags, all_flags: dict, newest: Path, read: Resolved, target: Target, *, pairs_per_step: int
) -> None:
    """The newest checkpoint is of these flags and data."""
    found = checkpoints.read(newest)
    state, where = found.state, str(found.path)
    comparing.changed(state["flags"], all_flags, where=where)
    marks = {
        "training data": comparing.data_mark(read.train_pairs, margins=all_flags["margin_loss"]),
        "held-out data": comparing.data_mark(read.held_out_pairs),
        "compute dtype": str(target.dtype),
    }
    decide = flags.metric_for_best_model is not None
    comparing.differing(state["marks"], marks, where=where, evaluations_decide=decide)
    if state["world_size"] == target.world_size and state["pairs_by_flags"] != pairs_per_step:
        raise UserError(
            f"{where} was trained in steps of {state['pairs_per_step']} pairs and the flags make {pairs_per_step}; give "
            "--per_device_train_batch_size and --gradient_accumulation_steps as before, or choose another --output_dir"
        )
