"""Two models on the same rows: how far apart a line of a table is, with a 95 % interval and a p.

Rows are resampled with replacement within each part of the line, the same ones for both models (paired bootstrap: Efron 1979;
Koehn 2004 for comparing systems), and the percentile interval of the differences is given. Parts with the same rows (a row's easy and
hard pairs) are resampled together, since they are not independent.

Means are linear: what a resample makes of them follows from how often each distinct row was drawn. So these counts are drawn, from
one multinomial distribution, instead of rows; 50,000 rows take as long as 50. Of more than MOST_DISTINCT distinct rows, and so of at
least as many, means are drawn from the normal distribution that they have: skewness 1 would move a limit by .02 standard deviations,
where drawing moves it by .03. The same goes for any function of means (`OfMeans`); other statistics are computed of resampled rows.

A few rows that differ do not know how they would vary. So two more rows are drawn from, one won and one lost, in the part whose rows
weigh most: then 4 rows won and none lost are no proof, as by the exact sign test, and of many rows that differ it is not seen.

Shapes: n rows of a part, k numbers a row, D draws.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from open_rm.measures.intervals import Estimate, interval_of_draws, resampled, sign_test

DRAWS = 10_000
MOST_DISTINCT = 500  # rows of which counts are drawn; means of more are normally distributed
ROUNDING = 1e-12  # of a difference


@dataclass(frozen=True)
class OfMeans:
    """A statistic of rows that is a function of their numbers' means, as a ratio of sums is.

    function: [..., k] means to [...].
    """

    function: Callable[[np.ndarray], np.ndarray]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """values: [..., n, k]"""
        return self.function(values.mean(-2))


def compare(parts: Sequence, other_parts: Sequence, seed: int, draws: int = DRAWS) -> tuple[Estimate, float]:
    """A line of one model minus that of the other, and the two-sided p that there is no difference.

    Args:
        parts, other_parts: the line's parts of both models, in the same order and on the same rows. A part has .weight,
            .rows [n], .values [n] or [n, k] and .statistic ([..., n, k] to [...], None: the mean); rules.verdict.Part.

    Returns:
        The estimate, with n distinct rows; where the models do not differ on any row the interval has no width. p is twice the share
        of resamples on the rarer side of 0, or at it: below .05 where the interval is without 0, and at least 2 / (draws + 1). Of a
        mean of rows that are right or wrong it is also at least that of the exact sign test of those won and lost (McNemar).

    Raises:
        ValueError: parts that do not match, have no rows, or share only some of their rows.
    """
    groups = _groups(parts, other_parts)
    value = sum(part.weight * (_of(part, part.values) - _of(other, other.values)) for part, other in _flat(groups))
    found = _drawn(groups, seed, draws)
    rarer = min(int((found <= 0).sum()), int((found >= 0).sum()))
    estimate = interval_of_draws(float(value), found, sum(len(group[0][0].rows) for group in groups))
    return estimate, max(_p_exact(groups), min(1.0, 2 * (1 + rarer) / (draws + 1)))


def difference(parts: Sequence, other_parts: Sequence, seed: int, draws: int = DRAWS) -> Estimate:
    """The estimate of `compare`."""
    return compare(parts, other_parts, seed, draws)[0]


def p_value(parts: Sequence, other_parts: Sequence, seed: int, draws: int = DRAWS) -> float:
    """The p of `compare`."""
    return compare(parts, other_parts, seed, draws)[1]


def _groups(parts: Sequence, other_parts: Sequence) -> list[list[tuple]]:
    """Pairs of a part and the other model's, those of the same rows together."""
    if not parts or len(parts) != len(other_parts):
        raise ValueError(f"a line of {len(parts)} parts and one of {len(other_parts)}")
    groups: dict[bytes, list[tuple]] = {}
    for part, other in zip(parts, other_parts, strict=True):
        rows = np.asarray(part.rows, dtype=np.int64)
        same = part.weight == other.weight and np.array_equal(rows, other.rows)
        if not same or np.shape(part.values) != np.shape(other.values) or len(part.values) != len(rows):
            raise ValueError("parts of two models that are not of the same rows and weight")
        if not len(rows):
            raise ValueError("a part without rows")
        groups.setdefault(rows.tobytes(), []).append((part, other))
    rows = np.concatenate([group[0][0].rows for group in groups.values()])
    if len(np.unique(rows)) < len(rows):
        raise ValueError("parts that share only some of their rows, or a row twice")
    return list(groups.values())


def _flat(groups: list[list[tuple]]) -> list[tuple]:
    return [pair for group in groups for pair in group]


def _of(part, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values.mean(-1) if part.statistic is None else part.statistic(values)


def _p_exact(groups: list[list[tuple]]) -> float:
    """p of the sign test where a line is the mean of rows that are right or wrong; 0: it is another number."""
    if len(groups) > 1 or len(groups[0]) > 1 or groups[0][0][0].statistic is not None:
        return 0.0
    own, others = (np.asarray(side.values) for side in groups[0][0])
    if not (np.isin(own, (0, 1)).all() and np.isin(others, (0, 1)).all()):
        return 0.0
    return sign_test(int((own > others).sum()), int((own < others).sum()))


def _drawn(groups: list[list[tuple]], seed: int, draws: int) -> np.ndarray:
    """[D] differences of resampled rows; what rounding makes of 0 is 0."""
    rng = np.random.default_rng(seed)
    drawn = [_drawn_of_group(rng, group, draws) for group in groups]
    # A row of each group, and what it counts for at most.
    weighs = [sum(abs(part.weight) for part, _ in group) / len(group[0][0].rows) for group in groups]
    differing = [i for i, of_group in enumerate(drawn) if np.abs(of_group).max() >= ROUNDING]
    if differing:
        most = max(differing, key=lambda i: weighs[i])
        n = len(groups[most][0][0].rows)
        won, lost, rest = rng.multinomial(n, [1 / (n + 2), 1 / (n + 2), n / (n + 2)], draws).T
        drawn[most] = drawn[most] * (rest / n) + weighs[most] * (won - lost)
    found = np.sum(drawn, axis=0)
    found[np.abs(found) < ROUNDING] = 0
    return found


def _drawn_of_group(rng: np.random.Generator, group: list[tuple], draws: int) -> np.ndarray:
    if all(part.statistic is None for part, _ in group):
        differences = sum(part.weight * np.subtract(part.values, other.values) for part, other in group)
        return _drawn_means(rng, differences[:, None], draws)[:, 0]
    if all(isinstance(part.statistic, OfMeans | None) for part, _ in group):
        return _drawn_of_means(rng, group, draws)
    return _drawn_statistics(rng, group, draws)


def _drawn_means(rng: np.random.Generator, values: np.ndarray, draws: int) -> np.ndarray:
    """[D, k] means of resampled rows [n, k]."""
    n, k = values.shape
    values = np.round(values, -round(math.log10(ROUNDING)))
    # A single column is sorted faster as plain numbers.
    distinct, counts = np.unique(values if k > 1 else values[:, 0], axis=0, return_counts=True)
    if len(distinct) <= MOST_DISTINCT:
        return rng.multinomial(n, counts / n, draws) @ distinct.reshape(-1, k) / n
    covariance = np.cov(values, rowvar=False, bias=True).reshape(k, k)
    return rng.multivariate_normal(values.mean(0), covariance / n, draws)


def _drawn_of_means(rng: np.random.Generator, group: list[tuple], draws: int) -> np.ndarray:
    """`_drawn_statistics` where every part is a function of means."""
    sides = [side for pair in group for side in pair]
    columns = [np.reshape(side.values, (len(side.rows), -1)) for side in sides]
    means = _drawn_means(rng, np.concatenate(columns, 1), draws)
    of_sides = np.split(means, np.cumsum([side.shape[1] for side in columns])[:-1], 1)
    values = [
        of_side[:, 0] if side.statistic is None else side.statistic.function(of_side)
        for side, of_side in zip(sides, of_sides, strict=True)
    ]
    return sum(
        part.weight * (own - other) for (part, _), own, other in zip(group, values[::2], values[1::2], strict=True)
    )


def _drawn_statistics(rng: np.random.Generator, group: list[tuple], draws: int) -> np.ndarray:
    """[D] differences of the weighted sums of a group's parts, of which at least one is no mean."""
    found, size = [], max(np.asarray(part.values)[0].size for part, _ in group)
    for chosen in resampled(rng, len(group[0][0].rows), draws, size):
        sums = 0.0
        for part, other in group:
            own, others = (_of(side, np.asarray(side.values)[chosen]) for side in (part, other))
            sums = sums + part.weight * (own - others)
        found.append(sums)
    return np.concatenate(found)
