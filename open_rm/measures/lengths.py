"""What the length of an answer explains: does a model prefer long ones, and how good is it where length does not help?

A rule of length alone prefers the longer answer, or the shorter one, and has half a pair right where both are equally long. What the
better of the two rules scores is the baseline that a model has to beat. Lengths are of answers without their prompt, in
one unit; -1 is a length that is not known. A pair is right where its margin is above 0; a tie is not. Shapes: P pairs.
"""

import numpy as np

from open_rm.measures import intervals

WITHIN = 0.1  # of the longer answer: lengths that differ by no more are matched
LONGER, SHORTER = "the longer answer is better", "the shorter answer is better"


def explained(
    margins: np.ndarray, lengths_better: np.ndarray, lengths_worse: np.ndarray, row: np.ndarray
) -> dict | None:
    """What the report says of a set's lengths; None where no pair has both.

    Args:
        margins: [P] reward of the better answer minus that of the worse.
        lengths_better, lengths_worse: [P].
        row: [P] which row a pair is from.

    Returns:
        longer, shorter, equal: accuracy where the better answer is so, None without such pairs; difference: longer minus shorter,
        None without one of them;
        reward_length_correlation (`correlation`); baseline: what the better rule of length scores, and rule, its name; matched:
        accuracy where lengths differ by at most `within` of the longer one, None without such pairs.
    """
    margins, better, worse = np.asarray(margins, np.float64), np.asarray(lengths_better), np.asarray(lengths_worse)
    if np.isnan(margins).any():
        raise ValueError("some margins are no numbers")
    known = (better >= 0) & (worse >= 0)
    if not known.any():
        return None
    margins, better, worse, row = margins[known], better[known], worse[known], np.asarray(row)[known]

    def accuracy(where: np.ndarray) -> dict | None:
        return intervals.of_pairs(margins[where] > 0, row[where]).as_dict() if where.any() else None

    matched = accuracy(are_matched(better, worse))
    rule, scored = best_rule(better, worse)
    longer, shorter = accuracy(better > worse), accuracy(better < worse)
    sides = [(sign, intervals.Estimate(**side)) for sign, side in ((1, longer), (-1, shorter)) if side]
    return {
        "longer": longer,
        "shorter": shorter,
        "difference": intervals.combined(sides).as_dict() if len(sides) == 2 else None,
        "equal": accuracy(better == worse),
        "reward_length_correlation": correlation(margins, better - worse),
        "baseline": {"rule": rule} | intervals.of_pairs(scored, row).as_dict(),
        "matched": matched and matched | {"within": WITHIN},
    }


def prefer_longer(lengths_better: np.ndarray, lengths_worse: np.ndarray) -> np.ndarray:
    """[P] what each pair counts for by the rule that the longer answer is better: 1, 0, or .5 where both are equally long. The
    opposite rule has the rest."""
    return (1 + np.sign(np.subtract(lengths_better, lengths_worse))) / 2


def best_rule(lengths_better: np.ndarray, lengths_worse: np.ndarray) -> tuple[str, np.ndarray]:
    """LONGER or SHORTER, whichever scores more, and what each pair [P] counts for by it."""
    longer = prefer_longer(lengths_better, lengths_worse)
    return (SHORTER, 1 - longer) if longer.sum() < len(longer) / 2 else (LONGER, longer)


def are_matched(lengths_better: np.ndarray, lengths_worse: np.ndarray) -> np.ndarray:
    """[P] whether the lengths differ by at most a tenth of the longer one."""
    longest = np.maximum(lengths_better, lengths_worse)
    return np.abs(np.subtract(lengths_better, lengths_worse)) <= WITHIN * longest


def correlation(margins: np.ndarray, differences: np.ndarray) -> float | None:
    """Spearman's correlation of reward and length within rows: of the margins with the differences in length, every pair in both
    directions, so that it does not depend on which answer is better. 1: the longer the higher. None where either is all 0.

    Args:
        margins, differences: [P] better minus worse.
    """
    ranks = [_signed_ranks(np.asarray(side, dtype=np.float64)) for side in (margins, differences)]
    norm = np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())
    return float(np.clip(ranks[0] @ ranks[1] / norm, -1, 1)) if norm > 0 else None


def _signed_ranks(values: np.ndarray) -> np.ndarray:
    """[P] ranks of the values among the values and their negatives, ties sharing theirs, less the mean rank. (By symmetry the
    negatives' are minus these.)"""
    order = np.argsort(values)
    rising = values[order]  # looked up one after the other: of millions, many times faster than in any order
    both = np.sort(np.concatenate([rising, -rising[::-1]]), kind="stable")
    below, upto = (np.searchsorted(both, rising, side=side) for side in ("left", "right"))
    ranks = np.empty(len(values))
    ranks[order] = (below + upto - len(both)) / 2
    return ranks
