"""What differences of rewards mean as probabilities, and how far these can be believed.

A margin d is the reward of the better answer minus that of the worse; the Bradley-Terry model takes sigmoid(d) for the probability that
the better one is preferred. It is right where d > 0: a tie is not right, in accuracy as in every benchmark. Its confidence is
sigmoid(|d|), from .5 (a tie) to 1. The temperature T makes sigmoid(d / T) the probabilities that fit best: it minimises the mean of
-log sigmoid(d / T), which is temperature scaling (Guo et al. 2017, arXiv:1706.04599) of the Bradley-Terry model. The loss is convex
in 1 / T, so there is one minimum. Where every pair is ranked right it lies at T = 0, and where the mean margin is not above 0 at
an infinite T; then there is no temperature, and a reason instead.

Nothing overflows: margins may have any size, and be infinite. One that is not a number raises ValueError, but for the
temperature, which has none. Shapes: P pairs.
"""

import math

import numpy as np

from open_rm.measures.intervals import of_pairs

BINS = 10
# Of 1 / T times the mean absolute margin, and of its inverse: beyond it lies rounding.
LARGEST = 2.0**20
STEPS = 200  # far above the ten or so that a fit takes; halving alone would need 80


def reliability(margins: np.ndarray, bins: int = BINS, row: np.ndarray | None = None) -> list[dict]:
    """Pairs by confidence, in equal bins on [.5, 1]: a reliability diagram.

    Args:
        margins: [P] float64.
        row: [P] which row a pair is from; None: each from its own. For the interval alone.

    Returns:
        Of each bin that has pairs: low and high (its edges; low itself belongs to it, and 1 to the last), confidence (mean), accuracy
        (share with margin > 0), n, and interval ([low, high], 95 %, of the accuracy).
    """
    margins = _checked(margins)
    confidence, edges, number = _binned(margins, bins)
    row = np.arange(len(margins)) if row is None else np.asarray(row)
    found = []
    for i in np.unique(number):
        inside = number == i
        right = of_pairs(margins[inside] > 0, row[inside])
        found.append(
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "confidence": float(confidence[inside].mean()),
                "accuracy": right.value,
                "n": right.n,
                "interval": [right.low, right.high],
            }
        )
    return found


def ece(margins: np.ndarray, bins: int = BINS) -> float | None:
    """Expected calibration error (Guo et al. 2017): the mean over pairs of |accuracy - confidence| of their bin, as in
    `reliability`. None without pairs."""
    margins = _checked(margins)
    if not len(margins):
        return None
    confidence, _, number = _binned(margins, bins)
    excess = np.bincount(number, weights=(margins > 0) - confidence)
    return float(np.abs(excess).sum() / len(margins))


def ece_of_chance(
    margins: np.ndarray, row: np.ndarray, bins: int = BINS, seed: int = 0, draws: int = 2_000
) -> float | None:
    """What `ece` a model with these probabilities has in 95 % of cases at most if they are right: of few pairs it is far from 0.

    How many pairs of a bin are right is drawn from the normal distribution of that number; pairs of one row that fall into a bin
    are taken to be right or wrong together, so that the quantile is rather too high. None without pairs.

    Args:
        margins: [P] float64.
        row: [P] which row a pair is from.
    """
    margins = _checked(margins)
    if not len(margins):
        return None
    confidence, _, number = _binned(margins, bins)
    _, cluster = np.unique(np.asarray(row, dtype=np.int64) * bins + number, return_inverse=True)
    together = np.bincount(cluster, np.sqrt(confidence * (1 - confidence)))
    bin_of = np.zeros(len(together), dtype=np.int64)
    bin_of[cluster] = number
    deviations = np.sqrt(np.bincount(bin_of, np.square(together), minlength=bins))
    drawn = np.abs(np.random.default_rng(seed).normal(size=(draws, bins)) * deviations).sum(1)
    return float(np.quantile(drawn, 0.95) / len(margins))


def brier(margins: np.ndarray) -> float | None:
    """Brier score of sigmoid(margin): the mean of (1 - sigmoid(margin))^2; .25 if nothing is known. None without pairs."""
    margins = _checked(margins)
    return float(np.square(_sigmoid(-margins)).mean()) if len(margins) else None


def loss(margins: np.ndarray, temperature: float = 1.0) -> float | None:
    """Bradley-Terry loss: the mean of -log sigmoid(margin / temperature), in nats. None without pairs."""
    margins = _checked(margins)
    with np.errstate(over="ignore"):
        return float(np.logaddexp(0, -margins / temperature).mean()) if len(margins) else None


def fit_temperature(margins: np.ndarray) -> float | None:
    """The T that minimises the mean of -log sigmoid(margins / T); None where no finite T above 0 does.

    Args:
        margins: [P] float64.
    """
    margins = np.asarray(margins, dtype=np.float64)
    largest = float(np.abs(margins).max(initial=0))
    if not 0 < largest < math.inf:
        return None
    # So that the search is the same whatever the rewards' unit; in two divisions, since a sum could overflow.
    margins = margins / largest
    mean = float(np.abs(margins).mean())
    margins /= mean

    def slopes(beta: float) -> tuple[float, float]:
        """First and second derivative of the mean loss at largest * mean / T = beta."""
        wrong = _sigmoid(-beta * margins)
        terms = margins * wrong
        return -float(terms.mean()), float((terms * margins * (1 - wrong)).mean())

    low, high = 1 / LARGEST, LARGEST
    if slopes(low)[0] >= 0 or slopes(high)[0] <= 0:
        return None
    beta = 1.0
    for _ in range(STEPS):
        slope, curvature = slopes(beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        newton = beta - slope / curvature if curvature > 0 else math.inf
        if abs(newton - beta) <= 1e-12 * beta:  # there, and maybe on the bracket's edge
            break
        beta = newton if low < newton < high else math.sqrt(low * high)
    found = largest * (mean / beta)
    return found if 0 < found < math.inf else None


def temperature_p(margins: np.ndarray, row: np.ndarray, temperature: float) -> float:
    """p that the true temperature is 1: the likelihood ratio test of the one that fits best (Wilks 1938), with one degree of freedom.

    Pairs of a row count as one observation together: P^2 / sum of the rows' pairs^2 are independent.

    Args:
        margins: [P] float64.
        row: [P] which row a pair is from.
    """
    pairs = np.unique(np.asarray(row), return_counts=True)[1]
    independent = len(margins) ** 2 / float(np.square(pairs, dtype=np.float64).sum())
    return math.erfc(math.sqrt(independent * max(0.0, loss(margins) - loss(margins, temperature))))


def why_no_temperature(margins: np.ndarray) -> str | None:
    """Half a sentence on why `fit_temperature` finds none; None where it finds one."""
    margins = np.asarray(margins, dtype=np.float64)
    if not len(margins):
        return "there are no pairs"
    if not np.isfinite(margins).all():
        return "some rewards are not finite numbers"
    if not margins.any():
        return "all pairs are tied"
    if fit_temperature(margins) is not None:
        return None
    if not (margins < 0).any():
        return "every pair is ranked right" if (margins > 0).all() else "no pair is ranked wrong"
    # Beyond LARGEST on either side: there the mean margin is nearly the mean absolute one, here nearly 0 or below.
    size = np.abs(margins).max()
    nearly = float((margins / size).mean()) > float((np.abs(margins) / size).mean()) / 2
    return (
        "nearly every pair is ranked right"
        if nearly
        else "better answers have no higher rewards than worse ones on average"
    )


def _binned(margins: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[P] confidence, [bins + 1] edges, [P] number of the bin."""
    confidence, edges = _sigmoid(np.abs(margins)), np.linspace(0.5, 1, bins + 1)
    return confidence, edges, np.searchsorted(edges[1:-1], confidence, side="right")


def _sigmoid(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and 1 over it the 0 that is meant
        return 1 / (1 + np.exp(-values))


def _checked(margins: np.ndarray) -> np.ndarray:
    margins = np.asarray(margins, dtype=np.float64)
    if np.isnan(margins).any():
        raise ValueError("some margins are no numbers")
    return margins
