"""Rows of several answers with a gold score each: does the model rank them alike, and how good is the best it would choose?

Shapes: R rows of K answers each.
"""

import math
from collections.abc import Sequence

import numpy as np

from open_rm.measures.intervals import Estimate, of_rows


def kendall_tau_b(scores: np.ndarray, gold: np.ndarray) -> float | None:
    """Kendall's tau-b of two rankings [K] (Kendall 1945; a pair that is tied in either counts for neither). None where either
    ranks nothing: fewer than two answers, or all alike."""
    found = _taus(_finite(scores)[None], _finite(gold)[None])[0]
    return None if math.isnan(found) else float(found)


def mean_tau(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate | None:
    """Kendall's tau-b of the rows' (scores, gold), on average over those that have one; None where none has."""
    found = np.concatenate([_taus(scores, gold) for scores, gold in _by_size(rows).values()] or [np.zeros(0)])
    found = found[~np.isnan(found)]
    if not len(found):
        return None
    share = of_rows((found + 1) / 2)  # tau is from -1 to 1
    return Estimate(float(found.mean()), 2 * share.low - 1, 2 * share.high - 1, share.n)


def best_of_n(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """Expected gold score of the answer that the model would choose among n of a row's, drawn without replacement.

    Exact, by counting subsets; of answers that score alike each is chosen as often. The same rows count for every n: those with at
    least N answers, where N is the largest number that at least half of the rows have.

    Args:
        rows: (scores [K], gold [K]) of each row; K may differ.

    Returns:
        For n from 1 to N: n, rows (that count), expected (of the answer that the model scores best), oracle (of that with the best
        gold score), random (of any), each on average over rows. Empty without rows.
    """
    sizes = sorted((len(scores) for scores, _ in rows), reverse=True)
    most = sizes[(len(sizes) - 1) // 2] if sizes else 0
    counted = {size: group for size, group in _by_size(rows).items() if size >= most > 0}
    total = sum(len(scores) for scores, _ in counted.values())
    expected, oracle, mean = np.zeros(most), np.zeros(most), 0.0
    for size, (scores, gold) in counted.items():
        chances = _chances(most, size)
        expected += (_shared(*_falling(scores, gold)) @ chances.T).sum(0)
        oracle += (_falling(gold, gold)[1] @ chances.T).sum(0)
        mean += float(gold.mean(1).sum())
    return [
        {
            "n": n + 1,
            "rows": total,
            "expected": float(expected[n] / total),
            "oracle": float(oracle[n] / total),
            "random": mean / total,
        }
        for n in range(most)
    ]


def _by_size(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Scores and gold [R, K] of the rows with K answers, by K."""
    sizes: dict[int, list] = {}
    for scores, gold in rows:
        if len(scores) != len(gold):
            raise ValueError(f"{len(scores)} scores of {len(gold)} answers")
        sizes.setdefault(len(scores), []).append((scores, gold))
    return {
        size: tuple(_finite(np.stack([row[side] for row in group])) for side in (0, 1))
        for size, group in sizes.items()
        if size
    }


def _taus(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """[R] tau-b of rows [R, K]; nan where a row has none."""
    one, other = np.triu_indices(scores.shape[1], 1)
    signs = [1.0 * (side[:, one] > side[:, other]) - (side[:, one] < side[:, other]) for side in (scores, gold)]
    norm = np.sqrt(np.prod([np.abs(side).sum(1) for side in signs], 0))
    return np.divide((signs[0] * signs[1]).sum(1), norm, out=np.full(len(norm), np.nan), where=norm > 0)


def _falling(scores: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [R, K] sorted by the scores, the highest first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(gold, order, 1)


def _shared(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """[R, K] gold of sorted answers, those of equal scores in a row sharing theirs."""
    starts = np.ones(scores.shape, dtype=bool)
    starts[:, 1:] = scores[:, 1:] != scores[:, :-1]
    group = np.cumsum(starts) - 1
    return (np.bincount(group, weights=gold.ravel()) / np.bincount(group))[group].reshape(gold.shape)


def _chances(most: int, size: int) -> np.ndarray:
    """[most, size] how probable it is that the i-th best of `size` answers is the best of n of them: C(size - 1 - i, n - 1) /
    C(size, n), by the ratio of each to the one before, since binomials of many answers overflow."""
    n, i = np.arange(1, most + 1)[:, None], np.arange(size - 1)[None]
    ratios = np.maximum(size - i - n, 0) / (size - 1 - i)
    return np.cumprod(np.concatenate([n / size, ratios], 1), 1)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some scores are not finite numbers")
    return values
