"""Many models in one table, computed anew from their scores: a row a model, a column a benchmark's headline and each section.

Every number has its 95 % interval. In each column the best model is told, and which others cannot be told apart from it on the
same rows (paired bootstrap; p corrected for how many others there are, Sidak). Only models whose same answers have scores are
compared: another one's number is shown, but is no part of the best, the order or the mean. What a model has no scores of is a
dash, never 0. In the csv file a text that begins with = + - or @ gets an apostrophe before it, lest a spreadsheet takes it as a
formula.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from open_rm.errors import UserError
from open_rm.evaluation import score_file
from open_rm.evaluation.page import contestants, document, figures, inert
from open_rm.evaluation.page.contestants import Key, Model
from open_rm.evaluation.rules.verdict import OVERALL, SECTION, Line, Verdict
from open_rm.evaluation.scored import ScoredSet
from open_rm.evaluation.trust.report import judge, title_of
from open_rm.measures import paired
from open_rm.measures.intervals import Estimate, sidak

SEED = 1  # of the paired bootstrap
CLEAR = 0.05  # a p below it, corrected for the number of comparisons
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet's formulas begin with
MISSING = "-"
INCOMPLETE = "‡"
# What a cell says of its model beside the best of the column, the sign for it, and what the sign means.
BEST, LIKE_BEST, LOWER, NOT_COMPARED = "best", "not told apart from the best", "lower", "rows differ, not compared"
ALONE = "no other model to compare it with"
SIGNS = {BEST: "★", LIKE_BEST: "≈", LOWER: "", NOT_COMPARED: "†", ALONE: ""}
MEANING = {
    "★": "the best of a column",
    "≈": (
        f"cannot be told apart from it on the same rows (p as of --against, by paired bootstrap, seed {SEED}, and sign test, corrected "
        f"for the number of other models by Šidák, is {CLEAR:g} or more; the best was picked by the same rows, so the others look a "
        "little worse than they are)"
    ),
    "†": "scores of other rows than the others': not compared, and no part of the best, the order or the mean",
    INCOMPLETE: "not the whole benchmark, see the notes",
    MISSING: "no scores",
}


@dataclass(frozen=True)
class Cell:
    """beside_best: one of SIGNS; None where a model has no such line.  incomplete: a headline without some of its subsets."""

    estimate: Estimate | None = None
    beside_best: str | None = None
    incomplete: bool = False

    @property
    def text(self) -> str:
        """'62.3 % (57.6 to 66.8)'"""
        if self.estimate is None:
            return MISSING
        return figures.estimate(self.estimate.as_dict()) + (f" {INCOMPLETE}" if self.incomplete else "")

    @property
    def sign(self) -> str:
        return SIGNS[self.beside_best] if self.beside_best else ""


@dataclass(frozen=True)
class Row:
    """mean: of the headlines that all models with a rank have; None: no rank, for nothing of it can be compared."""

    model: Model
    mean: float | None
    cells: list[Cell]


@dataclass(frozen=True)
class Column:
    """A line of a benchmark. title: of the column, unique."""

    key: Key
    level: str
    name: str
    title: str


@dataclass(frozen=True)
class Table:
    """rows: the best first.  order: by what, for people.  notes: what belongs beside the numbers."""

    columns: list[Column]
    rows: list[Row]
    order: str
    notes: list[str] = field(default_factory=list)


def compare(paths: Sequence[str | Path]) -> Table:
    """Judge scores of several models and put them side by side.

    Args:
        paths: folders with scores.jsonl in them, or scores files of any form that score_file reads.

    Raises:
        UserError: no paths, a folder without scores, one input twice, or what score_file says of a file.
    """
    models = contestants.read(paths)
    keys = list(dict.fromkeys(key for model in models for key in model.sets))
    titles = _titles(keys, models)
    columns, notes = [], []
    cells: dict[str, list[Cell]] = {model.name: [] for model in models}
    comparable = {key: _comparable(key, titles[key], models, notes) for key in keys}
    for key in keys:
        for column in _columns(key, titles[key], models):
            columns.append(column)
            for model, cell in zip(models, _cells(column, models, comparable[key]), strict=True):
                cells[model.name].append(cell)
        notes += _notes(key, titles[key], models)
    for model in models:
        notes += map(inert.visible, score_file.likely_the_datas(model.path, list(model.sets.values())))
    headlines = {place: column for place, column in enumerate(columns) if column.level == OVERALL}
    # who is compared by some headline has a rank, by the headlines that all of these have
    groups = {place: comparable[column.key].keys() for place, column in headlines.items()}
    groups = {place: group for place, group in groups.items() if len(group) > 1 or len(models) == 1}
    ranked = set().union(*groups.values())
    common = [place for place, group in groups.items() if ranked == group]
    rows = [
        Row(model, _mean(cells[model.name], common) if model.name in ranked else None, cells[model.name])
        for model in models
    ]
    rows.sort(key=lambda row: (row.mean is None, -(row.mean or 0)))
    without = [row.model.name for row in rows if row.mean is None]
    order = _order([columns[place] for place in common], list(headlines.values()), without)
    return Table(columns, rows, order, notes)


def write(table: Table, folder: str | Path) -> list[Path]:
    """leaderboard.md, leaderboard.html and leaderboard.csv."""
    folder = Path(folder)
    paths = [folder / f"leaderboard.{ending}" for ending in ("md", "html", "csv")]
    paths[0].write_text(markdown(table), encoding="utf-8")
    document.write_page("leaderboard.html.jinja", paths[1], table=_for_page(table))
    with paths[2].open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_csv(table))
    return paths


def markdown(table: Table) -> str:
    """The table, how the scores were made, and what is said of both."""
    header = ["", "model", *(["mean"] if _has_mean(table) else []), *(column.title for column in table.columns)]
    lines = [
        [
            str(number) if row.mean is not None else MISSING,
            row.model.name,
            *([figures.percent(row.mean)] if _has_mean(table) else []),
            *(f"{cell.text} {cell.sign}".strip() for cell in row.cells),
        ]
        for number, row in enumerate(table.rows, 1)
    ]
    parts = ["# Reward models compared", _pipes(header, lines), table.order, legend(table)]
    if table.notes:
        parts.append("\n".join(f"- {_escaped(note)}" for note in table.notes))
    labels = made_labels(table)
    made = [[row.model.name, *(str(row.model.made.get(label, "not known")) for label in labels)] for row in table.rows]
    if labels:
        parts += ["## How the scores were made", _pipes(["model", *labels], made)]
    else:
        parts.append("How the scores were made is not known: no scores.meta.json stands beside them.")
    return "\n\n".join(parts) + "\n"


def legend(table: Table) -> str:
    """What the signs in a table mean."""
    cells = [cell for row in table.rows for cell in row.cells]
    used = {cell.sign for cell in cells} | {cell.text.split()[-1] for cell in cells}
    return "; ".join(f"{sign} {meaning}" for sign, meaning in MEANING.items() if sign in used)


def made_labels(table: Table) -> list[str]:
    """Labels of how scores were made, of all models."""
    return list(dict.fromkeys(label for row in table.rows for label in row.model.made))


# ---- comparing


def _titles(keys: list[Key], models: list[Model]) -> dict[Key, str]:
    """What each set is called, no two alike: where several are of one benchmark, with their own names."""
    first = {key: next(model.sets[key] for model in models if key in model.sets) for key in keys}
    often = Counter(title_of(scored) for scored in first.values())
    found: dict[Key, str] = {}
    for key, scored in first.items():
        title = inert.name(title_of(scored))
        title += f" ({inert.name(scored.name)})" if often[title_of(scored)] > 1 else ""
        while title in found.values():
            title += "'"
        found[key] = title
    return found


def _columns(key: Key, title: str, models: list[Model]) -> list[Column]:
    found = {}
    for model in models:
        for line in model.verdicts[key].lines if key in model.verdicts else []:
            if line.level == OVERALL:  # one a set, whose name may say what is missing from one model's
                found.setdefault(OVERALL, Column(key, OVERALL, line.name, title))
            elif line.level == SECTION:
                found.setdefault(line.name, Column(key, SECTION, line.name, f"{title}: {inert.name(line.name)}"))
    # the headline first, whatever a model is without
    return sorted(found.values(), key=lambda column: column.level != OVERALL)


def _comparable(key: Key, title: str, models: list[Model], notes: list[str]) -> dict[str, Verdict]:
    """Verdicts of the models that have the same rows of a set, in one order, and scores of the same of their answers: what most
    have, of several as often the most rows. What the others have goes to the notes."""
    sets = {model.name: model.sets[key] for model in models if key in model.sets}
    rows = {name: frozenset(scored.ids) for name, scored in sets.items()}
    most = _most(rows.values(), len)
    first = next(sets[name] for name in sets if rows[name] == most)
    found: dict[str, Verdict] = {}
    counted: dict[str, tuple[bytes, bytes]] = {}
    for name, scored in sets.items():
        if rows[name] != most:
            shared = f"{len(rows[name] & most):,} of the {len(most):,} that the others have"
            notes.append(f"{title}, {name}: {NOT_COMPARED} ({len(rows[name]):,} rows, {shared})")
            continue
        try:  # a set may have another name elsewhere
            [same] = score_file.aligned([first], [replace(scored, name=first.name)])
            found[name] = judge(same)
            counted[name] = _counted(same, found[name])
        except UserError as error:
            notes.append(f"{title}, {name}: {NOT_COMPARED} ({error})")
            continue
        if scored is not first and (said := score_file.order_assumed(first, same)):
            notes.append(f"{title}, {name}: {said.removeprefix(f'{first.name}: ')}")
    most = _most(counted.values(), lambda of: of[0].count(1))
    for name, own in counted.items():
        if own != most:
            del found[name]
            notes.append(
                f"{title}, {name}: {NOT_COMPARED} (rows with scores to judge: {own[0].count(1):,}, the others' "
                f"{most[0].count(1):,} or other answers; --against compares two models on the rows that both scored)"
            )
    return found


def _most(values: Iterable, size: Callable) -> object:
    """The most frequent; of several the largest, of several the first."""
    often = Counter(values)
    return max(often, key=lambda value: (often[value], size(value)))


def _counted(scored: ScoredSet, verdict: Verdict) -> tuple[bytes, bytes]:
    """Which rows count, and which answers of them are without a score."""
    rows = ~np.isnan(verdict.wins)
    return rows.tobytes(), (np.isnan(scored.scores) & rows[scored.row_of]).tobytes()


def _cells(column: Column, models: list[Model], comparable: dict[str, Verdict]) -> list[Cell]:
    lines = {model.name: _line(model.verdicts.get(column.key), column) for model in models}
    present = [name for name, line in lines.items() if line]
    ranked = {name: _line(comparable[name], column) for name in present if name in comparable}
    best = max(ranked.values(), key=lambda line: line.estimate.value, default=None)
    others = len(ranked) - 1
    said = {name: _beside(best, ranked[name], others) if name in ranked else NOT_COMPARED for name in present}
    if len(ranked) == 1:
        said |= dict.fromkeys(ranked, ALONE)
    without = {
        model.name
        for model in models
        if column.level == OVERALL and model.name in present and model.verdicts[column.key].missing
    }
    return [Cell(line.estimate, said[name], name in without) if line else Cell() for name, line in lines.items()]


def _line(verdict: Verdict | None, column: Column) -> Line | None:
    lines = verdict.lines if verdict else []
    of_level = (line for line in lines if line.level == column.level)
    return next((line for line in of_level if column.level == OVERALL or line.name == column.name), None)


def _beside(best: Line, own: Line, others: int) -> str:
    """others: how many models are compared with the best."""
    if own.estimate.value == best.estimate.value:
        return BEST
    return LOWER if sidak(paired.p_value(best.parts, own.parts, SEED), others) < CLEAR else LIKE_BEST


def _notes(key: Key, title: str, models: list[Model]) -> list[str]:
    """What the rules say of each model's rows; the same sentence of all models once."""
    said: dict[str, list[str]] = {}
    for model in models:
        for note in model.verdicts[key].notes if key in model.verdicts else []:
            said.setdefault(note, []).append(model.name)
    return [
        inert.visible(f"{title}{'' if len(names) == len(models) else ', ' + ', '.join(names)}: {note}")
        for note, names in said.items()
    ]


def _mean(cells: list[Cell], common: list[int]) -> float | None:
    return sum(cells[place].estimate.value for place in common) / len(common) if common else None


def _order(common: list[Column], headlines: list[Column], without: list[str]) -> str:
    """without: models without a rank."""
    if not common:
        return "In the order in which they were named: no benchmark's headline is there for all on the same rows."
    last = f" Last, without a rank: {', '.join(without)}; no headline of theirs can be compared." if without else ""
    if len(headlines) == 1:
        return f"Ordered by {headlines[0].title}.{last}"
    if len(common) == len(headlines):
        return f"Ordered by the mean of the {len(common)} headlines.{last}"
    return f"Ordered by the mean of what all have on the same rows: {', '.join(one.title for one in common)}.{last}"


# ---- writing


def _has_mean(table: Table) -> bool:
    """Whether the mean says more than the one headline."""
    return sum(column.level == OVERALL for column in table.columns) > 1 and table.rows[0].mean is not None


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(text: str) -> str:
    """A cell on one line that is no markup."""
    text = inert.visible(" ".join(text.split()))
    for sign, written in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("[", "\\["),
    ):
        text = text.replace(sign, written)
    return text


def _csv(table: Table) -> list[list]:
    """Shares as numbers with all their digits; what is missing is empty."""
    header = ["rank", "model", "scores", "mean"]
    for column in table.columns:
        header += [
            f"{_no_formula(column.title)}{what}" for what in ("", ", low", ", high", ", rows", ", beside the best")
        ]
    lines = [header]
    for number, row in enumerate(table.rows, 1):
        rank, mean = (number, row.mean) if row.mean is not None else ("", "")
        line = [rank, *map(_no_formula, (row.model.name, inert.visible(str(row.model.path)))), mean]
        for cell in row.cells:
            one = cell.estimate
            line += ["", "", "", "", ""] if one is None else [one.value, one.low, one.high, one.n, cell.beside_best]
        lines.append(line)
    return lines


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def _for_page(table: Table) -> dict:
    """What the template draws."""
    return {
        "columns": [{"title": column.title, "level": column.level} for column in table.columns],
        "rows": [
            {
                "name": row.model.name,
                "mean": row.mean,
                "made": row.model.made,
                "cells": [
                    {
                        "value": cell.estimate.value if cell.estimate else None,
                        "text": cell.text,
                        "sign": cell.sign,
                        "said": cell.beside_best,
                    }
                    for cell in row.cells
                ],
            }
            for row in table.rows
        ],
        "has_mean": _has_mean(table),
        "order": table.order,
        "signs": legend(table),
        "notes": table.notes,
        "labels": made_labels(table),
    }
