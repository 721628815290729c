"""The trust report: how good is it, can it be believed, where does it fail; from scores alone.

make_report gives plain dictionaries, lists, texts and numbers that report.json holds as they are (null where a number does not
exist); page/ and the model card draw them. docs/evaluation.md says what each number is.
"""

import datetime
import math
from dataclasses import dataclass, replace

import numpy as np

from open_rm.evaluation import score_file
from open_rm.evaluation.rules import known
from open_rm.evaluation.rules.verdict import Line, Verdict
from open_rm.evaluation.scored import ScoredSet, pairs_of
from open_rm.evaluation.trust import against, sections, words
from open_rm.evaluation.trust.examples import confident_mistakes, least_sure
from open_rm.measures.intervals import Estimate

FACTS = "facts"  # of a meta file: for programs
NOT_KNOWN = ["how these scores were made", "not known: no scores.meta.json beside the scores says it"]


@dataclass(frozen=True)
class Besides:
    """What a report may hold besides the model's own numbers.

    invariance: what was found about swapping and batch size; None: not looked at.
    other: another model's name and scores, of the same rows in any order.
    examples: how many mistakes and least sure pairs of each set.
    """

    invariance: dict | None = None
    other: tuple[str, list[ScoredSet]] | None = None
    examples: int = 10


def make_report(sets: list[ScoredSet], *, model: str, meta: dict, command: str, seed: int, **besides) -> dict:
    """The report of one model, or of two on the same rows.

    Args:
        meta: how the scores were made, label to value (score_file.read_meta); empty: not known.
        command: by which it can be made again.  seed: of every draw.
        besides: of Besides.

    Raises:
        UserError: a set that its rules cannot judge; the other model's scores are not of the same rows.
    """
    asked = Besides(**besides)
    made = [[label, value] for label, value in meta.items() if label != FACTS]
    report = {
        "model": model,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "made": made or [NOT_KNOWN],
        "made_known": bool(made),
        "sets": [_set(scored, asked.examples) for scored in sets],
        "invariance": asked.invariance,
        "against": None if asked.other is None else _against(sets, model, asked.other, seed),
    }
    report = strict(report)
    return report | {"answers": words.answers(report), "warnings": words.warnings(report)}


def judge(scored: ScoredSet) -> Verdict:
    """A set by its benchmark's rules."""
    rules = known.BENCHMARKS[scored.benchmark].judge if scored.benchmark else known.plain
    return rules(scored)


def title_of(scored: ScoredSet) -> str:
    """What people call it."""
    return known.BENCHMARKS[scored.benchmark].title if scored.benchmark else scored.name


def _set(scored: ScoredSet, count: int) -> dict:
    """count: of examples."""
    verdict, pairs = judge(scored), pairs_of(scored)
    headline, *_ = verdict.lines
    return {
        "name": scored.name,
        "benchmark": scored.benchmark,
        "title": title_of(scored),
        "rows": len(scored),
        "answers": len(scored.scores),
        "rows_with_pairs": len(np.unique(pairs.row)),
        "pairs": len(pairs),
        "tied": int((pairs.margin == 0).sum()),
        "unscored": int(np.isnan(scored.scores).sum()),
        "overlength": int(scored.overlength.sum()),
        "headline": {"name": headline.name, **headline.estimate.as_dict()},
        "lines": [_line(line) for line in verdict.lines],
        "missing": verdict.missing,
        "notes": verdict.notes,
        "accuracy": sections.accuracy_of(pairs),
        "accuracy_without_ties": sections.accuracy_without_ties(pairs),
        "extremes": sections.extremes_of(scored, verdict),
        "calibration": sections.calibration_of(pairs),
        "confident": sections.confident_of(pairs),
        "length": sections.length_of(scored, pairs),
        "margins": sections.margins_of(pairs),
        "sources": sections.sources_of(scored, pairs),
        "style": sections.style_of(scored),
        "ranking": sections.ranking_of(scored),
        "mistakes": confident_mistakes(scored, pairs, count),
        "least_sure": least_sure(scored, pairs, count),
    }


def _line(line: Line) -> dict:
    return {"name": line.name, "level": line.level, **line.estimate.as_dict(), "authors_rows": line.authors_rows}


def _against(sets: list[ScoredSet], model: str, other: tuple[str, list[ScoredSet]], seed: int) -> dict:
    name, other_sets = other
    judged = []
    for scored, other_scored in zip(sets, score_file.aligned(sets, other_sets), strict=True):
        own, others = _both_scored(scored, other_scored)
        left_out = len(np.unique(own.row_of[np.isnan(own.scores)]))
        judged.append(against.Judged(scored.name, title_of(scored), judge(own), judge(others), left_out))
    return against.compare(model, name, judged, seed)


def _both_scored(own: ScoredSet, other: ScoredSet) -> tuple[ScoredSet, ScoredSet]:
    """The same two, without the scores of answers that either gave none: so both are judged on the same answers."""
    without = np.isnan(own.scores) | np.isnan(other.scores)
    return tuple(replace(side, scores=np.where(without, np.nan, side.scores)) for side in (own, other))


def strict(value):
    """The same as strict JSON holds it: estimates as dictionaries, no arrays, null for what is no finite number, no halves of
    characters (which UTF-8 cannot hold)."""
    if isinstance(value, Estimate):
        value = value.as_dict()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {strict(str(name)): strict(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
