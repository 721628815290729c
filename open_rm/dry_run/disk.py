"""What a run writes: checkpoints, by the count of reliability/keeper.py, and the final model."""

from pathlib import Path

from open_rm.dry_run.sizes import Planned
from open_rm.dry_run.told import Told, counted
from open_rm.flags import CheckpointFlags
from open_rm.reliability import checkpoints
from open_rm.reliability.checkpoints import gib
from open_rm.reliability.keeper import minutes_between
from open_rm.training.footprint import SAVED_MOMENT_BYTES

WEIGHT_BYTES = 4  # float32, as the optimizer steps them


def told(flags: CheckpointFlags, model: Planned, optim: str, folder: str) -> Told:
    """folder: of the run."""
    size = model.sizes.trained * (WEIGHT_BYTES + SAVED_MOMENT_BYTES[optim])
    minutes = minutes_between(flags)
    often = [f"every {counted(flags.checkpointing_steps, 'step')}"] if flags.checkpointing_steps else []
    often += [f"every {minutes:g} minutes"] if minutes else []
    at_once = flags.keep_last_n_checkpoints + 1 + (flags.metric_for_best_model is not None) if often else 0
    held = sum(map(checkpoints.size_of, checkpoints.committed(folder)))
    for_checkpoints, free = max(at_once * size - held, 0), checkpoints.free_bytes(Path(folder))
    needed = for_checkpoints + model.saved
    enough, room = free >= needed, f"{gib(free)} are free on this machine where {folder} will be"
    if often:
        best = " and the best" if flags.metric_for_best_model else ""
        kept = f"{flags.keep_last_n_checkpoints}{best} kept while one is written"
        line = f"checkpoints of {gib(size)} {' and '.join(often)}, {kept}: {gib(at_once * size)}"
    else:
        line = "checkpoints: off; a run that is killed begins anew"
    lines = [
        f"{line}; the final model {gib(model.saved)}",
        f"{room}: {'enough' if enough else f'{gib(needed - free)} TOO LITTLE'}",
    ]
    # As Keeper.check_room counts, which leaves the final model out: that one fails at the end, with a sentence.
    missing = for_checkpoints - free if often else 0
    refused = [f"--output_dir {folder}: {gib(missing)} too little for the checkpoints are free"] if missing > 0 else []

    numbers = {"checkpoint_bytes": size if often else 0, "checkpoints_at_once": at_once, "model_bytes": model.saved}
    numbers |= {"needed_bytes": needed, "free_bytes": free, "enough": enough, "output_dir": folder}
    return Told("disk", lines, numbers, tuple(refused))
