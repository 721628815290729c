"""What a benchmark's rules make of scores: lines of a table, each with the rows behind it, so that intervals and comparisons
of two models follow from the lines alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from open_rm.errors import UserError
from open_rm.evaluation.scored import ScoredSet
from open_rm.measures.intervals import Estimate, combined, of_rows

# Levels of a line. The overall line is one; sections are what the authors report beside it; subsets are the parts of the data,
# no two of which share a row. A line of level view looks at rows of other lines from another side (RM-Bench: hard, easy).
OVERALL, SECTION, SUBSET, VIEW = "overall", "section", "subset", "view"


@dataclass(frozen=True)
class Part:
    """One summand of a line: weight * statistic(values).

    rows: [n] numbers of the rows (for RewardBench 2's Ties, of the first row of each prompt).
    values: [n], or [n, k] where a statistic needs several numbers a row; between 0 and 1 where they are shares.
    statistic: [..., n, k] -> [...]; None: the mean of [n].
    """

    weight: float
    rows: np.ndarray
    values: np.ndarray
    statistic: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Line:
    """A number of the benchmark.

    level: overall (one of a verdict), section, subset or view.  parts: it is the sum of theirs.
    estimate: its value, by the authors' rule to the last digit, with a 95 % interval; n rows behind it.
    authors_rows: how many rows the authors have behind it, where that is known.
    """

    name: str
    level: str
    parts: tuple[Part, ...]
    estimate: Estimate
    authors_rows: int | None = None


@dataclass(frozen=True)
class Verdict:
    """lines: the overall one first, then sections and subsets in the authors' order, of those that have rows.
    missing: names of the authors' subsets (or sections) that the scores have no row of.
    notes: sentences that belong beside the numbers (a subset that is not the whole, weights, what a missing section does).
    wins: [N] what each row counts for, from 0 to 1 (strictly right: 1); nan: a row that the rules pass over.
    forms: [N] text, where rows of different forms have different chances (pairs, and the best of several): subsets are compared
        within a form alone; None: all rows are of one."""

    lines: list[Line]
    wins: np.ndarray
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forms: list[str] | None = None


def mean_line(name: str, level: str, rows: np.ndarray, wins: np.ndarray, authors_rows: int | None = None) -> Line:
    """The mean of what rows count for. rows: [n].  wins: [N] of the whole set."""
    values = wins[rows]
    return Line(name, level, (Part(1.0, rows, values),), of_rows(values), authors_rows)


def sum_line(
    name: str, level: str, terms: Sequence[tuple[float, Line]], value: float, authors_rows: int | None = None
) -> Line:
    """Lines added up with weights. value: the sum as the authors compute it, to the last digit."""
    parts = tuple(replace(part, weight=weight * part.weight) for weight, line in terms for part in line.parts)
    estimate = combined([(weight, line.estimate) for weight, line in terms])
    return Line(name, level, parts, replace(estimate, value=float(value)), authors_rows)


def answers_of(scored: ScoredSet, count: int | None = None) -> np.ndarray:
    """[N] how many answers each row has.

    Raises:
        UserError: not count, or less than two.
    """
    sizes = np.diff(scored.first)
    wrong = sizes != count if count else sizes < 2
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        wanted = f"{count}" if count else "at least 2"
        raise UserError(
            f"{scored.name}: row {scored.ids[row]} has {sizes[row]} answers with scores, and the rules of {scored.benchmark} "
            f"are for {wanted}; score the benchmark's own rows, or name another benchmark"
        )
    return sizes


def check_first_is_best(scored: ScoredSet, rows: np.ndarray | None = None) -> None:
    """Rules that go by position take a row's first answer for the right one. rows: [N] bool, of which that is so; None: of all.

    Raises:
        UserError: gold says of another answer that it is as good or better.
    """
    best = scored.gold[scored.first[:-1]][scored.row_of]
    wrong = scored.gold >= best
    wrong[scored.first[:-1]] = False
    if rows is not None:
        wrong &= rows[scored.row_of]
    if wrong.any():
        row = scored.ids[int(scored.row_of[np.flatnonzero(wrong)[0]])]
        raise UserError(
            f"{scored.name}: the first answer of row {row} is not the best one by gold, and the rules of {scored.benchmark} take the "
            "first one for right; put it first, with its score"
        )


def is_scored(scored: ScoredSet) -> np.ndarray:
    """[N] bool, whether all answers of a row have scores."""
    return np.bincount(scored.row_of[np.isnan(scored.scores)], minlength=len(scored)) == 0


def rows_that_count(scored: ScoredSet, wins: np.ndarray) -> np.ndarray:
    """Numbers of the rows that the rules do not pass over.

    Raises:
        UserError: they pass over all of them.
    """
    rows = np.flatnonzero(~np.isnan(wins))
    if not len(rows):
        raise UserError(
            f"{scored.name}: no row has all that is judged, scores of every answer and which of them is better; score it again "
            "with --overlength truncate, or look at its columns"
        )
    return rows


def by_subset(scored: ScoredSet, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Subset -> those of these rows that are of it, in the order of their names."""
    return by_name([scored.subsets[row] for row in rows], rows)


def by_name(names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> its rows, in the order of the names. names: [n], one for each of rows."""
    found: dict[str, list[int]] = {}
    for name, row in zip(names, rows.tolist(), strict=True):
        found.setdefault(name, []).append(row)
    return {name: np.asarray(found[name], dtype=np.int64) for name in sorted(found)}


def without_scores(scored: ScoredSet) -> list[str]:
    """The note on rows that the rules pass over because an answer has no score."""
    lost = int((~is_scored(scored)).sum())
    if not lost:
        return []
    return [
        f"{lost:,} of {len(scored):,} rows have an answer without a score and are passed over; the authors cut such answers to "
        "their length instead"
    ]


def not_the_whole(missing: list[str], rest: str) -> list[str]:
    """The note on what is missing; rest says what that does to the overall line."""
    return [f"not the whole benchmark: no rows of {', '.join(missing)}; {rest}"] if missing else []


def fewer_rows(lines: Sequence[Line]) -> list[str]:
    """The note on subsets that have other numbers of rows than the authors'."""
    other = [
        f"{line.name} {line.estimate.n:,} of {line.authors_rows:,}"
        for line in lines
        if line.level != OVERALL and line.authors_rows not in (None, line.estimate.n)
    ]
    return [f"not as many rows as the authors have: {', '.join(other)}"] if other else []
