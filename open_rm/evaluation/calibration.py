"""How rewards of held-out pairs are spread, and what their differences mean as probabilities.

Mean and standard deviation are for clients that normalise rewards (OpenRLHF reads them in config.json). The temperature T makes
sigmoid((chosen - rejected) / T) the probabilities that fit the held-out pairs best: it minimises the mean of
-log sigmoid((chosen - rejected) / T), which is temperature scaling (Guo et al. 2017, arXiv:1706.04599) of the Bradley-Terry model.
The loss is convex in 1 / T, so there is one minimum. Where every pair is ranked right it lies at T = 0, and where the mean margin
is not above 0 at an infinite T; then there is no temperature, and a reason instead. Shapes: N pairs.
"""

import math

import torch

from open_rm.model.contract import RewardStatistics

MEAN, STD, TEMPERATURE = "reward_mean", "reward_std", "temperature"
# Of 1 / T times the mean absolute margin, and of its inverse: beyond it lies rounding.
LARGEST = 2.0**20
STEPS = 200  # far above the ten or so that a fit takes; halving alone would need 80


def reward_statistics(rewards: torch.Tensor) -> dict[str, float]:
    """Mean and standard deviation (n - 1, as OpenRLHF's) of all rewards, and the fitted temperature where there is one.

    Args:
        rewards: [N, 2] float64, chosen and rejected.
    """
    found = {MEAN: rewards.mean().item(), STD: rewards.std().item()}
    temperature = fit_temperature(rewards[:, 0] - rewards[:, 1])
    return found if temperature is None else found | {TEMPERATURE: temperature}


def fit_temperature(margins: torch.Tensor) -> float | None:
    """The T that minimises the mean of -log sigmoid(margins / T); None where no finite T above 0 does.

    Args:
        margins: [N] float64, reward of the chosen minus that of the rejected.
    """
    scale = margins.abs().mean().item()  # so that the search is the same whatever the rewards' unit
    if not 0 < scale < math.inf:
        return None
    margins = margins / scale

    def slopes(beta: float) -> tuple[float, float]:
        """First and second derivative of the mean loss at scale / T = beta."""
        wrong = torch.sigmoid(-beta * margins)
        return -(margins * wrong).mean().item(), (margins.square() * wrong * (1 - wrong)).mean().item()

    low, high = 1 / LARGEST, LARGEST
    if slopes(low)[0] >= 0 or slopes(high)[0] <= 0:
        return None
    beta = 1.0
    for _ in range(STEPS):
        slope, curvature = slopes(beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        newton = beta - slope / curvature if curvature > 0 else math.inf
        before, beta = beta, newton if low < newton < high else math.sqrt(low * high)
        if abs(beta - before) <= 1e-12 * beta:
            break
    return scale / beta


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
