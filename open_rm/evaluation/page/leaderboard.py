"""Many models in one table, computed anew from their scores: a row a model, a column a benchmark's headline and each section.

Every number has its 95 % interval. In each column the best model is told, and which others cannot be told apart from it on the
same rows (paired bootstrap). What a model has no scores of is a dash, never 0.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from open_rm.errors import UserError
from open_rm.evaluation import score_file
from open_rm.evaluation.page import contestants, document, figures, inert
from open_rm.evaluation.page.contestants import Key, Model
from open_rm.evaluation.rules.verdict import OVERALL, SECTION, Line, Verdict
from open_rm.evaluation.trust.report import judge, title_of
from open_rm.measures import paired
from open_rm.measures.intervals import Estimate

SEED = 1  # of the paired bootstrap
MISSING = "-"
INCOMPLETE = "‡"
# What a cell says of its model beside the best of the column, the sign for it, and what the sign means.
BEST, LIKE_BEST, LOWER, NOT_COMPARED = "best", "not told apart from the best", "lower", "rows differ, not compared"
ALONE = "no other model"
SIGNS = {BEST: "★", LIKE_BEST: "≈", LOWER: "", NOT_COMPARED: "†", ALONE: ""}
MEANING = {
    "★": "the best of a column",
    "≈": f"cannot be told apart from it on the same rows (the paired difference's 95 % interval holds 0; bootstrap, seed {SEED})",
    "†": "other rows than the others', not compared",
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
    """mean: of the headlines that all models have; None where there is none."""

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
    columns, notes = [], []
    cells: dict[str, list[Cell]] = {model.name: [] for model in models}
    comparable = {key: _comparable(key, models, notes) for key in keys}
    for key in keys:
        for column in _columns(key, models):
            columns.append(column)
            for model, cell in zip(models, _cells(column, models, comparable[key]), strict=True):
                cells[model.name].append(cell)
        notes += _notes(key, models)
    common = [
        place
        for place, column in enumerate(columns)
        if column.level == OVERALL
        and len(comparable[column.key]) == len(models)
        and all(cells[model.name][place].estimate for model in models)
    ]
    rows = [Row(model, _mean(cells[model.name], common), cells[model.name]) for model in models]
    if common:
        rows.sort(key=lambda row: -row.mean)
    return Table(columns, rows, _order([columns[place] for place in common], columns), notes)


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
            str(number),
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


def _columns(key: Key, models: list[Model]) -> list[Column]:
    title = inert.name(next(title_of(model.sets[key]) for model in models if key in model.sets))
    found = {}
    for model in models:
        for line in model.verdicts[key].lines if key in model.verdicts else []:
            if line.level in (OVERALL, SECTION):
                of_line = title if line.level == OVERALL else f"{title}: {inert.name(line.name)}"
                found.setdefault((line.level, line.name), Column(key, line.level, line.name, of_line))
    # the headline first, whatever a model is without
    return sorted(found.values(), key=lambda column: column.level != OVERALL)


def _comparable(key: Key, models: list[Model], notes: list[str]) -> dict[str, Verdict]:
    """Verdicts of the models that have the same rows of a set, in one order: the rows that most have, of several as often the
    first model's. What the others have goes to the notes."""
    sets = {model.name: model.sets[key] for model in models if key in model.sets}
    rows = {name: frozenset(scored.ids) for name, scored in sets.items()}
    [(most, _)] = Counter(rows.values()).most_common(1)
    first = next(sets[name] for name in sets if rows[name] == most)
    found = {}
    for name, scored in sets.items():
        said = f"{inert.name(title_of(scored))}, {name}: {NOT_COMPARED}"
        if rows[name] != most:
            shared = f"{len(rows[name] & most):,} of the {len(most):,} that the others have"
            notes.append(f"{said} ({len(rows[name]):,} rows, {shared})")
            continue
        try:  # a set may have another name elsewhere
            found[name] = judge(*score_file.aligned([first], [replace(scored, name=first.name)]))
        except UserError as error:
            notes.append(f"{said} ({error})")
    return found


def _cells(column: Column, models: list[Model], comparable: dict[str, Verdict]) -> list[Cell]:
    lines = {model.name: _line(model.verdicts.get(column.key), column) for model in models}
    present = [name for name, line in lines.items() if line]
    ranked = {name: _line(comparable[name], column) for name in present if name in comparable}
    best = max(ranked.values(), key=lambda line: line.estimate.value, default=None)
    said = {name: _beside(best, ranked[name]) if name in ranked else NOT_COMPARED for name in present}
    if len(present) == 1:
        said = {present[0]: ALONE}
    without = {
        model.name
        for model in models
        if column.level == OVERALL and model.name in present and model.verdicts[column.key].missing
    }
    return [Cell(line.estimate, said[name], name in without) if line else Cell() for name, line in lines.items()]


def _line(verdict: Verdict | None, column: Column) -> Line | None:
    lines = verdict.lines if verdict else []
    return next((line for line in lines if (line.level, line.name) == (column.level, column.name)), None)


def _beside(best: Line, own: Line) -> str:
    if own.estimate.value == best.estimate.value:
        return BEST
    try:
        difference = paired.difference(best.parts, own.parts, SEED)
    except ValueError:  # rows that one of them has no score of
        return NOT_COMPARED
    return LIKE_BEST if difference.low <= 0 <= difference.high else LOWER


def _notes(key: Key, models: list[Model]) -> list[str]:
    """What the rules say of each model's rows; the same sentence of all models once."""
    said: dict[str, list[str]] = {}
    for model in models:
        for note in model.verdicts[key].notes if key in model.verdicts else []:
            said.setdefault(note, []).append(model.name)
    title = next(title_of(model.sets[key]) for model in models if key in model.sets)
    return [
        inert.visible(f"{title}{'' if len(names) == len(models) else ', ' + ', '.join(names)}: {note}")
        for note, names in said.items()
    ]


def _mean(cells: list[Cell], common: list[int]) -> float | None:
    return sum(cells[place].estimate.value for place in common) / len(common) if common else None


def _order(common: list[Column], columns: list[Column]) -> str:
    headlines = [column for column in columns if column.level == OVERALL]
    if not common:
        return "In the order in which they were named: no benchmark's headline is there for all on the same rows."
    if len(headlines) == 1:
        return f"Ordered by {headlines[0].title}."
    if len(common) == len(headlines):
        return f"Ordered by the mean of the {len(common)} headlines."
    return f"Ordered by the mean of what all have on the same rows: {', '.join(column.title for column in common)}."


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
        header += [f"{column.title}{what}" for what in ("", ", low", ", high", ", rows", ", beside the best")]
    lines = [header]
    for number, row in enumerate(table.rows, 1):
        line = [number, row.model.name, inert.visible(str(row.model.path)), "" if row.mean is None else row.mean]
        for cell in row.cells:
            one = cell.estimate
            line += ["", "", "", "", ""] if one is None else [one.value, one.low, one.high, one.n, cell.beside_best]
        lines.append(line)
    return lines


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
