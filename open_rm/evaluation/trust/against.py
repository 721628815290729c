"""Two models on the same rows: the difference of every line of the rules, and whether it could be chance.

A difference is own minus other, with the 95 % interval of a bootstrap that draws the same rows for both (measures.paired), and its p.
Of rows that are right or wrong p is no smaller than that of the exact sign test of those won and lost, which is McNemar's. It is
also given corrected for the number of lines of the same level, since among many subsets one always looks better (Sidak). One model is
called better where p of the overall line is below .05.
"""

from dataclasses import dataclass

import numpy as np

from open_rm.evaluation.rules.verdict import OVERALL, Line, Verdict
from open_rm.measures import paired
from open_rm.measures.intervals import sidak, sign_test

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Judged:
    """A set by its rules, of two models on the same rows in the same order.

    left_out: rows with an answer that either model gave no score; it counts for neither.
    """

    name: str
    title: str
    own: Verdict
    other: Verdict
    left_out: int


def compare(model: str, other: str, sets: list[Judged], seed: int) -> dict:
    """The report's "against".

    model, other: names of the models.  seed: of the bootstrap.
    """
    found = [{"name": one.name, "lines": _lines(one, seed), **_rows(one), "left_out": one.left_out} for one in sets]
    says = [_says(one.title, of_set, model, other) for one, of_set in zip(sets, found, strict=True)]
    return {"model": other, "sets": found, "says": " ".join(says)}


def _lines(one: Judged, seed: int) -> list[dict]:
    others = {(line.level, line.name): line for line in one.other.lines}
    both = [(line, others[line.level, line.name]) for line in one.own.lines if (line.level, line.name) in others]
    of_level = {level: sum(line.level == level for line, _ in both) for level in {line.level for line, _ in both}}
    return [_difference(line, other_line, of_level[line.level], seed) for line, other_line in both]


def _difference(line: Line, other: Line, tests: int, seed: int) -> dict:
    difference, p = paired.compare(line.parts, other.parts, seed)
    return {
        "name": line.name,
        "level": line.level,
        "own": line.estimate.value,
        "other": other.estimate.value,
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p": p,
        "p_sidak": sidak(p, tests),
        "tests": tests,
    }


def _rows(one: Judged) -> dict:
    """won, lost, same: rows in which the model does better, worse, alike by the rules.  p_sign_test: of won against lost."""
    own, others = one.own.wins, one.other.wins
    won, lost = int(np.sum(own > others)), int(np.sum(own < others))
    return {"won": won, "lost": lost, "same": int(np.sum(own == others)), "p_sign_test": sign_test(won, lost)}


def _says(title: str, found: dict, model: str, other: str) -> str:
    """One sentence, by the overall line."""
    [line] = [line for line in found["lines"] if line["level"] == OVERALL]
    rows = found["won"] + found["lost"] + found["same"]
    if line["p"] >= SIGNIFICANT:
        return f"On {title}, {model} and {other} cannot be told apart on these {rows:,} rows."
    better, sign = (model, 1) if line["difference"] > 0 else (other, -1)
    low, high = sorted((sign * line["low"], sign * line["high"]))
    return (
        f"{better} is better on {title} by {100 * abs(line['difference']):.1f} points ({100 * low:.1f} to {100 * high:.1f}), "
        f"on {rows:,} rows."
    )
