"""Scores of a set's rows as arrays, and the pairs in them: all that rules and the trust report are computed from.

Shapes: N rows, A answers of all rows together, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SCORES = "scores.jsonl"  # the file of scores (score_file.py)
META = "scores.meta.json"  # beside it: how the scores were made, label -> value
Texts = Callable[[int], tuple[object, list] | None]


@dataclass(frozen=True)
class ScoredSet:
    """One benchmark, or one set of preference data, as one model scored it.

    name: by which the user knows it, unique in a run.  benchmark: whose rules judge it (rules.known.BENCHMARKS); None: preference data.
    ids, subsets: [N] text; what tells rows apart, and what they are counted by.
    first: [N + 1] where a row's answers begin in the arrays of [A]; they stand in the benchmark's order, of pairs chosen first.
    scores: [A] float64; nan: none (too long, empty).
    gold: [A] float64, higher is better: 1 and 0 of right and wrong, else a gold score; nan: not known.
    characters, tokens: [A] int64, of the answer without its prompt; -1: not known.
    overlength: [A] bool, whether an answer had more tokens than were scored.
    texts: (prompt, answers) of row i as the file has them, read when asked for; None where it has none.
    """

    name: str
    benchmark: str | None
    ids: list[str]
    subsets: list[str]
    first: np.ndarray
    scores: np.ndarray
    gold: np.ndarray
    characters: np.ndarray
    tokens: np.ndarray
    overlength: np.ndarray
    texts: Texts = lambda row: None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def row_of(self) -> np.ndarray:
        """[A] the row of each answer."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))


@dataclass(frozen=True)
class Pairs:
    """Every two answers of a row of which one is known to be better, and both have scores.

    row: [P] rising.  better, worse: [P] into the arrays of [A].  margin: [P] score of the better minus that of the worse.
    """

    row: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    margin: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def pairs_of(scored: ScoredSet) -> Pairs:
    """The pairs of all rows, in their order."""
    better, worse = [], []
    sizes = np.diff(scored.first)
    usable = ~(np.isnan(scored.scores) | np.isnan(scored.gold))
    for size in np.unique(sizes):  # rows of as many answers at once
        starts = scored.first[:-1][sizes == size]
        one, other = np.triu_indices(size, 1)
        one, other = (starts[:, None] + side for side in (one, other))
        keep = usable[one] & usable[other] & (scored.gold[one] != scored.gold[other])
        one, other = one[keep], other[keep]
        swap = scored.gold[one] < scored.gold[other]
        better.append(np.where(swap, other, one))
        worse.append(np.where(swap, one, other))
    better, worse = (np.concatenate(side) if side else np.zeros(0, np.int64) for side in (better, worse))
    order = np.lexsort((worse, better, scored.row_of[better]))
    better, worse = better[order], worse[order]
    return Pairs(scored.row_of[better], better, worse, scored.scores[better] - scored.scores[worse])
