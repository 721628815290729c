"""What a run would make of its folder as it is: looked at, and nothing touched.

By the checks of run_folder.claim and resuming.find, and as resuming.check_content decides, short of a checkpoint's damage, which
takes reading it, and of another process that has the folder now.
"""

from pathlib import Path

from open_rm.dry_run.target import Target
from open_rm.dry_run.told import Told
from open_rm.errors import UserError
from open_rm.flags import CheckpointFlags
from open_rm.publishing import run_folder
from open_rm.reliability import checkpoints, comparing, resuming
from open_rm.resolving import Resolved

FREE, BEGUN, FINISHED, OCCUPIED = "free", "begun", "finished", "occupied"
SAYS = {
    FREE: "is free",
    BEGUN: "holds a run that is not finished: the same command goes on with it",
    FINISHED: "holds a finished run: the same command would do nothing",
    OCCUPIED: "is not free for this run",
}


def told(
    flags: CheckpointFlags, folder: str, all_flags: dict, read: Resolved, target: Target, *, pairs_per_step: int
) -> Told:
    """The folder's state, and by what sentence the run would refuse it. all_flags: by name (comparing.plain)."""
    refused = ()
    try:
        begun = run_folder.held(Path(folder), flags.resume_from_checkpoint != "never")
        finished = begun is not None and run_folder.is_finished(Path(folder), begun)
        own = resuming.check_begun(flags, folder, begun, all_flags, finished=finished)
        checkpoints.candidates(flags.resume_from_checkpoint, folder)  # one that is named has to be there
        state = FINISHED if finished else BEGUN if begun is not None or own else FREE
        if state == BEGUN and own:
            _check_content(flags, all_flags, own[0], read, target, pairs_per_step=pairs_per_step)
    except UserError as error:
        state, refused = OCCUPIED, (str(error),)
    line = f"{folder} {SAYS[state]}"
    if all_flags["output_dir"] is None and all_flags["run_name"] is None:
        own = f"output/{all_flags['exp_name']}__{all_flags['seed']}__<time>"
        line = f"{folder} holds this plan; the run makes a folder of its own, {own}"
    return Told("output_dir", [line], {"folder": folder, "state": state}, refused)


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
    if why := resuming.why_other_steps(found, pairs_per_step, target.world_size):
        raise UserError(why)
