"""Estimates with a 95 % interval, and tests of whether two of them differ.

A share of independent rows has Wilson's interval (Wilson 1927, without continuity correction). Rows that count for a fraction, and
pairs of which several come from one row, have Wilson's too, over as many independent draws as would vary as much (effective
sample size: Kish 1965; Cochran 1977, Sampling Techniques, 6.4). A weighted sum of shares has the interval that follows from the
shares' own (MOVER: Zou and Donner 2008, Statistics in Medicine 27), which keeps their skewness and is Wilson's for a single one.
Anything else is bootstrapped.

How much rows or pairs vary is estimated with two more rows, of the largest variance there can be. So a few rows that happen to be
alike do not make a point of the interval (from four rows on it covers the truth); of many rows it is not seen, and of plain right
and wrong never: there it changes nothing.

Functions that get nothing to measure raise ValueError, and so do values that are no numbers. Shapes: n rows, P pairs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

Z = 1.959963984540054  # two-sided 95 % of a normal distribution
MORE_ROWS = 2
PERMUTATIONS = 10_000
FEW_ENOUGH = 200  # rows whose mean is drawn and not taken for normally distributed
NUMBERS_AT_ONCE = 2**22  # of resampled rows: 32 MiB


@dataclass(frozen=True)
class Estimate:
    """value: with a 95 % interval from low to high.  n: rows (or pairs) behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n independent draws; n > 0 may be a fraction."""
    if not (0 <= share <= 1 and 0 < n < math.inf):
        raise ValueError(f"a share of {share} of {n} draws has no interval")
    middle, width = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # Rounding may leave the share itself outside by its last digit.
    return max(0.0, min(share, (middle - width) / scale)), min(1.0, max(share, (middle + width) / scale))


def of_rows(values: np.ndarray) -> Estimate:
    """The mean of what independent rows count for.

    Args:
        values: [n] between 0 and 1.

    Returns:
        Wilson's interval of the mean over mean (1 - mean) / variance of the mean draws: n where every row is 0 or 1, more where
        rows vary less.
    """
    values = _shares(values)
    n, mean = len(values), min(1.0, float(values.mean()))
    largest = mean * (1 - mean)
    if largest == 0:
        return Estimate(mean, *wilson(mean, n), n)
    variance = (float(np.square(values - mean).sum()) + MORE_ROWS * largest) / (n + MORE_ROWS)
    return Estimate(mean, *wilson(mean, n * largest / variance), n)


def of_pairs(right: np.ndarray, row: np.ndarray) -> Estimate:
    """The share of pairs that are right, where pairs of one row depend on each other.

    Args:
        right: [P] 0 or 1, or a fraction for a pair that counts in part.
        row: [P] which row a pair is from, any numbers.

    Returns:
        Wilson's interval over `independent_pairs`; n is P.
    """
    right = _shares(right)
    if len(right) != len(row):
        raise ValueError(f"{len(right)} pairs of {len(row)} rows")
    share = min(1.0, float(right.mean()))
    number = _numbered(row)
    pairs = np.bincount(number)
    spread = float(np.square(np.bincount(number, weights=right) - share * pairs).sum())
    squares = float(np.square(pairs, dtype=np.float64).sum())
    return Estimate(
        share, *wilson(share, independent_pairs(share, len(right), len(pairs), squares, spread)), len(right)
    )


def independent_pairs(share: float, pairs: int, rows: int, squares: float, spread: float) -> float:
    """As how many independent pairs these count, of which those of one row share answers.

    share (1 - share) over the variance of the share between rows: with one pair a row it is their number. Where the share is 0 or
    1 nothing varies, and each row counts once. No sample counts for more pairs than it has.

    Args:
        share: of `pairs`, from `rows` rows, that are right.
        squares: sum over rows of their pairs^2.
        spread: sum over rows of (right pairs - share * pairs)^2.
    """
    largest = share * (1 - share)
    if largest <= 0:
        return float(rows)
    spread = (spread + MORE_ROWS * largest * squares / rows) * rows / (rows + MORE_ROWS)
    return min(float(pairs), largest * pairs * pairs / spread)


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The sum of weight * estimate of independent parts, with MOVER's interval; n is the sum of theirs.

    Parts that are measured on the same rows are not independent: use `of_rows` of the rows' own sums, or `by_bootstrap`.
    """
    if not parts:
        raise ValueError("nothing to add up")
    value = sum(weight * part.value for weight, part in parts)
    below = [weight * (part.value - (part.low if weight >= 0 else part.high)) for weight, part in parts]
    above = [weight * ((part.high if weight >= 0 else part.low) - part.value) for weight, part in parts]
    return Estimate(value, value - math.hypot(*below), value + math.hypot(*above), sum(part.n for _, part in parts))


def of_differences(values: np.ndarray, row: np.ndarray) -> Estimate:
    """The mean of differences of two shares, where those of one row are one observation (Cochran 1977, 6.4).

    Args:
        values: [P] between -1 and 1.
        row: [P] which row each is from.

    Returns:
        A normal interval; how much rows vary is estimated with one more row, of the largest variance there can be.
    """
    values = _numbers(values)
    value = float(values.mean())
    number = _numbered(row)
    off, pairs = np.bincount(number, values - value), np.bincount(number)
    spread = (np.square(off).sum() + np.square(pairs).mean()) * len(pairs) / (len(pairs) + 1)
    width = Z * math.sqrt(float(spread)) / len(values)
    return Estimate(value, max(value - width, -1.0), min(value + width, 1.0), len(values))


def by_bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    seed: int,
    draws: int = 10_000,
    more: np.ndarray | None = None,
) -> Estimate:
    """Any statistic of independent rows, with the percentile interval of resampled rows (Efron 1979).

    Args:
        values: [n] or [n, k], k numbers a row.
        statistic: [..., n] to [...], or [..., n, k] to [...].
        more: rows that are drawn from besides, the best and the worst there can be. Without them rows that are all alike have an
            interval of no width, which says more than a few rows know.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no rows")
    value = float(statistic(values))
    rng = np.random.default_rng(seed)
    pool = values if more is None else np.concatenate([values, more])
    blocks = resampled(rng, len(values), draws, values[0].size, len(pool))
    return interval_of_draws(value, np.concatenate([statistic(pool[chosen]) for chosen in blocks]), len(values))


def resampled(rng: np.random.Generator, n: int, draws: int, size: int = 1, pool: int | None = None):
    """Blocks [d, n] of numbers of rows drawn with replacement, `draws` in all.

    size: numbers that a row holds.  pool: of how many rows the n are drawn; None: of n.
    """
    block = max(1, NUMBERS_AT_ONCE // (n * size))
    for start in range(0, draws, block):
        yield rng.integers(0, pool or n, (min(block, draws - start), n), dtype=np.int32)


def interval_of_draws(value: float, draws: np.ndarray, n: int) -> Estimate:
    """The percentile interval of resampled statistics [draws], at least as wide as to hold the value itself."""
    if not (math.isfinite(value) and np.isfinite(draws).all()):
        raise ValueError("the statistic of some resampled rows is no number")
    # The (draws + 1) * 2.5 %th from either end, as paired.p_value counts: so p < .05 and 0 outside are the same.
    last = len(draws) - 1
    rank = min(max(math.floor(0.025 * (len(draws) + 1)) - 1, 0), last)
    low, high = np.partition(draws, sorted({rank, last - rank}))[[rank, last - rank]]
    return Estimate(value, min(value, float(low)), max(value, float(high)), n)


def sidak(p: float, tests: int) -> float:
    """p of the best of several independent tests (Sidak 1967): 1 - (1 - p)^tests."""
    if not (0 <= p <= 1 and tests >= 1):
        raise ValueError(f"p of {p} in {tests} tests")
    return 1.0 if p == 1 else -math.expm1(tests * math.log1p(-p))


def sign_test(more: int, less: int) -> float:
    """Two-sided exact p that `more` rows went one way and `less` the other by chance: McNemar's exact test. 1 without any."""
    n, k = more + less, min(more, less)
    if k < 0:
        raise ValueError(f"{more} and {less} rows")
    if 2 * k >= n:
        return 1.0
    ratios = np.arange(k, 0, -1) / (n - np.arange(k, 0, -1) + 1)  # of a term to the next one
    at_k = math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
    return min(1.0, 2 * at_k * (1 + float(np.cumprod(ratios).sum())))


def fisher(k1: int, n1: int, k2: int, n2: int) -> float:
    """Two-sided p of Fisher's exact test that k1 of n1 and k2 of n2 are of the same share. 1 where either is of none.

    All tables with these margins that are no more probable than this one count, as in R and scipy.
    """
    if not (0 <= k1 <= n1 and 0 <= k2 <= n2):
        raise ValueError(f"{k1} of {n1} and {k2} of {n2}")
    right = k1 + k2
    first, last = max(0, right - n2), min(n1, right)
    k = np.arange(first, last)  # the table with k + 1 is ratio times as probable as that with k
    ratio = (n1 - k) / (k + 1) * ((right - k) / (n2 - right + k + 1))
    logarithms = np.concatenate([[0.0], np.cumsum(np.log(ratio))])
    logarithms -= logarithms.max()
    weights = np.exp(logarithms)
    # Tables that are equally probable differ by rounding.
    rarer = logarithms <= logarithms[k1 - first] + 1e-7
    return min(1.0, float(weights[rarer].sum() / weights.sum()))


def permutation(values: np.ndarray, sizes: np.ndarray, means: np.ndarray, seed: int = 0) -> np.ndarray:
    """[S] two-sided p of subsets' means, if which rows a subset has were chance (permutation test, Fisher 1935).

    p is the share of draws of as many rows, without replacement, whose mean is as far from that of all; it is at least
    1 / (PERMUTATIONS + 1). Means of more than FEW_ENOUGH rows (or of all but so many) are about normal, with the variance that such
    draws have. The variance is that of all rows, so that a small subset whose rows happen to be alike is not taken for a sure one.

    Args:
        values: [N] of all rows, those of the subsets among them.
        sizes, means: [S] of each subset, of 1 to N - 1 rows.
    """
    values, sizes = _numbers(values), np.asarray(sizes)
    n, centre = len(values), float(values.mean())
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() < n:
        raise ValueError(f"subsets of {sizes.min()} to {sizes.max()} of {n} rows")
    # The rest of the rows is as far off, in sum: so it is the smaller side that is drawn.
    drawn = np.minimum(sizes, n - sizes)
    off = np.abs(np.asarray(means, dtype=np.float64) - centre) * sizes / drawn
    rng, found = np.random.default_rng(seed), np.empty(len(sizes))
    for size in np.unique(drawn):
        of_size = drawn == size
        if size > FEW_ENOUGH:
            deviation = math.sqrt(float(values.var()) * (n - size) / (size * (n - 1)))
            found[of_size] = [math.erfc(one / (deviation * math.sqrt(2))) if deviation else 1.0 for one in off[of_size]]
            continue
        by_chance = np.sort(np.abs(_means_of_draws(rng, values, int(size)) - centre))
        as_far = len(by_chance) - np.searchsorted(by_chance, off[of_size] - 1e-9)
        found[of_size] = (1 + as_far) / (len(by_chance) + 1)
    return found


def _means_of_draws(rng: np.random.Generator, values: np.ndarray, size: int) -> np.ndarray:
    """[PERMUTATIONS] means of `size` rows without replacement: neighbours in shuffled rows."""
    each = len(values) // size
    shuffles = -(-PERMUTATIONS // each)
    found, block = [], max(1, NUMBERS_AT_ONCE // len(values))
    for start in range(0, shuffles, block):
        shuffled = rng.permuted(np.tile(values, (min(block, shuffles - start), 1)), axis=1)
        found.append(shuffled[:, : each * size].reshape(-1, size).mean(1))
    return np.concatenate(found)[:PERMUTATIONS]


def _numbered(row: np.ndarray) -> np.ndarray:
    """[P] rows by numbers from 0 on, without gaps."""
    row = np.asarray(row)
    if (row[1:] >= row[:-1]).all():  # as pairs come: no need to sort
        return np.concatenate([[0], np.cumsum(row[1:] != row[:-1])])
    return np.unique(row, return_inverse=True)[1]


def _numbers(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no rows")
    if not np.isfinite(values).all():
        raise ValueError("some values are no numbers")
    return values


def _shares(values: np.ndarray) -> np.ndarray:
    values = _numbers(values)
    if values.ndim != 1 or values.min() < 0 or values.max() > 1:
        raise ValueError("what rows count for has to be one number between 0 and 1 each")
    return values
