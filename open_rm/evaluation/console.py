"""What the command says at its end: the report in a few lines."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from open_rm.errors import UserError, quote_error
from open_rm.evaluation.page import inert

SHOWN_LINES = 8  # of a set's sections, and of what is missing; all are in the report


def summary(report: dict) -> list[str]:
    """The lines: each set with its headline, sections, what is odd in it and what a rule without a model gets; warnings."""
    lines = []
    for one in report["sets"]:
        lines += ["", *_of_set(one)]
    if report["against"]:
        lines += ["", report["against"]["says"]]
    if report["invariance"]:
        lines += ["", report["invariance"]["says"]]
    return [visible(line) for line in [*lines, *(f"warning: {sentence}" for sentence in report["warnings"])]]


def visible(line: str) -> str:
    """A line in which names of others do nothing to a terminal: what is not seen is [U+001B], as in the page."""
    return inert.visible(line, inert.MOST_OF_A_SENTENCE).replace("\n", " ")


def _of_set(one: dict) -> Iterator[str]:
    headline = one["headline"]
    yield f"{one['title']}: {headline['name']} {_estimate(headline)}"
    sections = [line for line in one["lines"] if line["level"] == "section"]
    for line in (sections or [line for line in one["lines"] if line["level"] == "subset"])[:SHOWN_LINES]:
        yield f"  {line['name']}: {_estimate(line)}"
    if one["missing"]:
        more = f" and {len(one['missing']) - SHOWN_LINES} more" if len(one["missing"]) > SHOWN_LINES else ""
        yield f"  missing: {', '.join(one['missing'][:SHOWN_LINES])}{more}"
    yield (
        f"  {one['rows']:,} rows, {one['pairs']:,} pairs, {one['tied']:,} tied, {one['overlength']:,} answers over-length, "
        f"{one['unscored']:,} without a score"
    )
    if one["length"] and (baseline := one["length"]["baseline"]):
        yield f"  without a model, by length alone ({baseline['rule']}): {_estimate(baseline)}"
    if calibration := one["calibration"]:
        temperature = calibration["temperature"]
        how = (
            f"temperature {temperature:.3g}" if temperature else f"no temperature: {calibration['why_no_temperature']}"
        )
        yield f"  calibration: ECE {calibration['ece']:.4f}, {how}"


def _estimate(found: dict) -> str:
    """Value, 95 % interval, rows behind it."""
    if found["value"] is None:
        return "not known"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.4f}"
    return f"{found['value']:.4f} (95 % interval {found['low']:.4f} to {found['high']:.4f}, n = {found['n']:,})"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The folder is there; what the disk says against it is a sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({quote_error(error)})") from error
