"""The best evaluation so far, and when to stop because none is better any more."""

import math

from open_rm.errors import UserError
from open_rm.flags import CheckpointFlags
from open_rm.training.metrics import PAIR_METRICS
from open_rm.training.progress import Progress

GROUP = "eval/rm/"


def judge(flags: CheckpointFlags, progress: Progress) -> bool:
    """Note in `progress` whether the evaluation that was just made is the best so far; returns it.

    The one before the first step is not counted: nothing was trained yet. An equal one is not better. A loss is better
    where it is lower, all else where it is higher.

    Raises:
        UserError: evaluations have no such metric.
    """
    if flags.metric_for_best_model is None:
        return False
    name = GROUP + flags.metric_for_best_model.removeprefix(GROUP)
    # what is said of the rewards' spread besides is no measure of how good they are
    compared = [metric for metric in progress.last_evaluation if metric.rpartition("/")[2] in PAIR_METRICS]
    if name not in compared:
        there = sorted(metric.removeprefix(GROUP) for metric in compared)
        raise UserError(
            f"--metric_for_best_model {flags.metric_for_best_model}: the evaluations have no such metric, but "
            f"{', '.join(there)}; name one of these"
        )
    value = progress.last_evaluation[name]
    if progress.step == 0:
        return False
    lower = name.rpartition("/")[2] == "loss"
    better = progress.best_value is None or (value < progress.best_value if lower else value > progress.best_value)
    if math.isfinite(value) and better:
        progress.best_step, progress.best_value, progress.worse = progress.step, value, 0
        progress.best_evaluation = progress.last_evaluation
        return True
    progress.worse += 1
    return False


def out_of_patience(flags: CheckpointFlags, progress: Progress) -> bool:
    """Whether so many evaluations in a row were no better that the run ends."""
    return flags.early_stopping_patience is not None and progress.worse >= flags.early_stopping_patience
