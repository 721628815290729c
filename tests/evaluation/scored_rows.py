"""A ScoredSet written by hand, for tests of rules."""

import numpy as np

from open_rm.evaluation.scored import ScoredSet


def scored_set(benchmark: str | None, rows: list[tuple[str, list, list]], ids: list[str] | None = None) -> ScoredSet:
    """rows: (subset, scores, gold) of each, None for an answer without a score."""
    sizes = [len(scores) for _, scores, _ in rows]
    answers = sum(sizes)
    return ScoredSet(
        name=benchmark or "data",
        benchmark=benchmark,
        ids=ids or [f"row {i}" for i in range(len(rows))],
        subsets=[subset for subset, _, _ in rows],
        first=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        scores=np.asarray([score for _, scores, _ in rows for score in scores], dtype=float),
        gold=np.asarray([value for _, _, gold in rows for value in gold], dtype=float),
        characters=np.full(answers, -1),
        tokens=np.full(answers, -1),
        overlength=np.zeros(answers, bool),
    )


def values_of(verdict) -> dict[str, float]:
    """Line -> value."""
    return {line.name: line.estimate.value for line in verdict.lines}
