"""How rewards of held-out pairs are spread, and what their differences mean as probabilities: what a saved folder says of them.

Mean and standard deviation are for clients that normalise rewards (OpenRLHF reads them in config.json). The temperature makes
probabilities of their differences (measures.calibration); where none fits there is a reason instead. Shapes: N pairs.
"""

import math

import torch

from open_rm.measures.calibration import fit_temperature
from open_rm.model.contract import RewardStatistics

MEAN, STD, TEMPERATURE = "reward_mean", "reward_std", "temperature"


def reward_statistics(rewards: torch.Tensor, decided: torch.Tensor | None = None) -> dict[str, float]:
    """Mean and standard deviation (n - 1, as OpenRLHF's) of all rewards, and the fitted temperature where there is one.

    Args:
        rewards: [N, 2] float64, chosen and rejected.
        decided: [N] bool, those that are no ties; None: all. Of a tie no side is the right one, so the fit leaves it out.
    """
    found = {MEAN: rewards.mean().item(), STD: rewards.std().item()}
    margins = rewards[:, 0] - rewards[:, 1]
    temperature = fit_temperature((margins if decided is None else margins[decided]).numpy())
    return found if temperature is None else found | {TEMPERATURE: temperature}


def statistics_of(metrics: dict[str, float], *, pairs: int) -> RewardStatistics | None:
    """What the saved folder says, from the metrics of `held_out.evaluate` of the model that is saved; None where there was no
    evaluation, or its rewards do not vary, so that nothing can be divided by their deviation.

    pairs: held-out pairs that were scored.
    """
    mean, std = (metrics.get(f"eval/rm/{name}", math.nan) for name in (MEAN, STD))
    if not (math.isfinite(mean) and 0 < std < math.inf):
        return None
    temperature, reason = metrics.get(f"eval/rm/{TEMPERATURE}"), None
    if temperature is None:
        useful = metrics["eval/rm/reward_margin"] > 0
        reason = (
            "nearly every pair is ranked right"
            if useful
            else "chosen answers have no higher rewards than rejected ones"
        )
    return RewardStatistics(mean, std, temperature, pairs, reason)


def describe(statistics: RewardStatistics | None) -> str:
    """A line for the log."""
    if statistics is None:
        return "rewards: no mean, deviation and temperature are saved, since no held-out pairs were scored or all have equal ones"
    fitted = f"no temperature fits, since {statistics.no_temperature}"
    if statistics.temperature is not None:
        fitted = f"fitted temperature {statistics.temperature:.4g}"
    spread = f"mean {statistics.mean:.4g}, standard deviation {statistics.std:.4g}"
    return f"rewards: {spread}, {fitted} ({statistics.pairs} held-out pairs)"
