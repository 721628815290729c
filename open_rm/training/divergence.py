"""A step whose loss or gradient is no number: left out and shown where some may be, else the end of the run."""

from open_rm.batching.feeding import Step
from open_rm.data.pairs import PreferenceData
from open_rm.flags import CheckpointFlags
from open_rm.ranks import Ranks
from open_rm.training.progress import Progress
from open_rm.training.tracking import Tracker


def skip_or_end(
    flags: CheckpointFlags,
    step: Step,
    means: dict[str, float],
    progress: Progress,
    tracker: Tracker,
    *,
    data: PreferenceData,
    ranks: Ranks,
) -> None:
    """Count the step, which was not applied, and write the places of its pairs into skipped.jsonl. means: its metrics.

    Raises:
        UserError: more steps than --max_skipped_steps were no numbers.
    """
    what = f"loss {means['loss']}, gradient norm {means['grad_norm']}"
    progress.skipped += 1
    if progress.skipped > flags.max_skipped_steps:
        advice = "lower --learning_rate or add warm-up"
        if progress.episode == 0:  # no weight has moved yet
            advice = "check the model's weights, and the factors of the objective; else " + advice
        after = f" ({flags.max_skipped_steps} such steps were left out before)" if flags.max_skipped_steps else ""
        ranks.fail(
            f"training diverged at step {step.number}, after episode {progress.episode}: {what}{after}; the step was not "
            f"applied. {advice[0].upper()}{advice[1:]}, and see the last lines of {tracker.record}; other flags need another --output_dir"
        )
    if ranks.is_main:
        row = {"step": step.number, "loss": means["loss"], "grad_norm": means["grad_norm"]}
        tracker.skipped(progress, row | {"pairs": data.places(step.indices)})
