"""The look at the data: short lines before each training; tables, pictures and files from `python -m open_rm.inspection`."""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from open_rm.data.pairs import PreferenceData
from open_rm.errors import UserError
from open_rm.flags import DataFlags
from open_rm.inspection import sharing, views
from open_rm.inspection.findings import check_strict, plural, token_name
from open_rm.inspection.report import inspect_data

LOG_COLUMNS = 170  # in a log file there is no terminal to ask for a width


def before_training(
    train: PreferenceData,
    held_out: PreferenceData | None,
    tokenizer: PreTrainedTokenizerBase,
    flags: DataFlags,
    *,
    margin_loss: bool,
) -> list[str]:
    """Lines for the log: numbers, findings, and what becomes of margins.

    Raises:
        UserError: with --strict, where there are findings; with --margin_loss, where a pair has no margin.
    """
    report = inspect_data(train, held_out, tokenizer)
    if flags.strict:
        check_strict(report)
    return short_lines(report) + _on_labels(train, held_out) + _on_margins(train, margin_loss)


def _on_labels(train: PreferenceData, held_out: PreferenceData | None) -> list[str]:
    """A line for ties that are trained and one for soft labels, of each split that has them."""
    lines = []
    for split, data in (("train", train), ("eval", held_out)):
        facts = data.facts if data is not None else []
        ties, soft = (sum(fact.get(name, 0) for fact in facts) for name in ("ties_trained", "soft_labels"))
        if ties:
            what = "trained towards equal rewards" if split == "train" else "left out of accuracy"
            lines.append(f"{split}: {plural(ties, 'tie')} {what}")
        if soft:
            lines.append(f"{split}: {plural(soft, 'pair')} with a label_prob between 0.5 and 1")
    return lines


def _on_margins(train: PreferenceData, margin_loss: bool) -> list[str]:
    without = np.flatnonzero(np.isnan(train.margins()))
    if margin_loss and without.size:
        raise UserError(
            f"{train.places(without[:1])[0]}: no margin, and --margin_loss needs one for every pair; see --margin_from, "
            "or remove the flag"
        )
    if margin_loss or without.size == len(train):
        return []
    return ["the data has margins; the loss takes them with --margin_loss"]


def short_lines(report: dict) -> list[str]:
    """A line per split and source, and a line per finding: what the recipe prints before training."""
    lines = []
    for split, found in report["splits"].items():
        for source in found["sources"]:
            if not source["pairs"]:
                lines.append(f"{split} {source['label']}: no pairs of {plural(source['taken'], 'row')}")
                continue
            lengths, shared, baseline = source["lengths"], source["shared"], source["length_baseline"]
            lines.append(
                f"{split} {source['label']}: {plural(source['pairs'], 'pair')} of {plural(source['taken'], 'row')} "
                f"({', '.join(source['forms'])}); tokens at the median: prompt {lengths['prompt']['p50']}, chosen "
                f"{lengths['chosen']['p50']}, rejected {lengths['rejected']['p50']}; chosen longer in "
                f'{source["chosen_longer"]:.1%}, "{baseline["rule"]}" is right in {baseline["accuracy"]:.1%}; shared '
                f"prefixes leave {shared['by_pair']['ratio']:.2f}x fewer tokens, "
                f"{shared['by_prompt']['ratio']:.2f}x by prompt; "
                f"scored token {token_name(source['scored']['tokens'][0])}"
            )
            if headers := sharing.sentence(shared["step"]):
                lines.append(f"{split} {source['label']}: {headers}")
    return lines + [f"finding: {sentence}" for sentence in report["findings"]]


def write_report(
    report: dict, folder: str, train: PreferenceData, held_out: PreferenceData | None, tokenizer
) -> list[str]:
    """Write report.json, lengths.png, pairs.html and pairs.png into the folder; returns their paths."""
    splits = {"train": train} | ({"eval": held_out} if held_out is not None else {})
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (path / "report.json").write_text(text + "\n", encoding="utf-8")
        written = [path / "report.json", views.draw_lengths(splits, path)]
        written += views.draw_pairs(splits, tokenizer, path)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    return [str(file) for file in written]


def console(
    report: dict, train: PreferenceData, tokenizer, *, paths: list[str] | None = None, out: Console | None = None
) -> None:
    """Print tables, sample pairs in colours, findings, and where the pictures are."""
    out = out or Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else LOG_COLUMNS)
    for split, found in report["splits"].items():
        for table in views.fact_tables(split, found):
            out.print(table)
    out.print(views.pairs_as_text(train, tokenizer, width=min(out.width, 140)))
    for sentence in report["findings"]:
        out.print(Text(f"finding: {sentence}", style="bold red"), soft_wrap=True)
    if not report["findings"]:
        out.print(Text("no findings", style="bold green"))
    if paths:
        out.print(Text(f"see {', '.join(paths)}"), soft_wrap=True)
