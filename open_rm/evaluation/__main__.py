"""Judge a reward model: how good is it, can it be believed, where does it fail.

    python -m open_rm.evaluation --model DIR --benchmark reward_bench rm_bench=PATH --output_dir OUT
    python -m open_rm.evaluation --scores FILE --output_dir OUT
    python -m open_rm.evaluation --model DIR --dataset pairs.jsonl --against OTHER --output_dir OUT
    python -m open_rm.evaluation --compare OUT1 OUT2 --output_dir TABLE

docs/evaluation.md says what the numbers mean; `--help` has all flags.
"""

from open_rm import command_line
from open_rm.checks import check_values
from open_rm.evaluation import arguments
from open_rm.evaluation.arguments import EvaluationArgs


def check_args(args: EvaluationArgs) -> None:
    """Refuse every value and combination that cannot work."""
    check_values(args)
    arguments.check(args)


if __name__ == "__main__":  # a wrong command line is answered before the imports below
    ARGUMENTS = command_line.read(EvaluationArgs, check_args, prog="python -m open_rm.evaluation")

import json
import time
from dataclasses import dataclass
from pathlib import Path

from open_rm.evaluation import console
from open_rm.evaluation.arguments import REPORT, command_of, scores_path
from open_rm.evaluation.page import document, leaderboard
from open_rm.evaluation.score_file import read_meta, read_scores
from open_rm.evaluation.scored import ScoredSet
from open_rm.evaluation.trust.report import make_report

DECIDING = ("truncation length", "dtype")  # what two models' scores should have in common


@dataclass(frozen=True)
class Scores:
    """A model's scores, and how they were made (scores.meta.json; empty where nobody says)."""

    model: str
    sets: list[ScoredSet]
    meta: dict


def main(args: EvaluationArgs) -> dict | None:
    """Judge, and write the report; returns it. With --compare: the table, and None."""
    check_args(args)
    folder = Path(args.output_dir).expanduser()
    if args.compare:
        _compare(args.compare, folder)
        return None
    own, other = _scores(args)
    started = time.perf_counter()
    report = make_report(
        own.sets,
        model=own.model,
        meta=own.meta,
        command=command_of(args),
        seed=args.seed,
        invariance=own.meta.get("facts", {}).get("invariance"),
        other=(other.model, other.sets) if other else None,
        examples=args.examples,
    )
    if other:
        _say_how_the_other_was_made(report, own, other)
    took = time.perf_counter() - started
    with console.writing(folder):
        (folder / REPORT).write_text(
            json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        document.write_html(report, folder / "report.html")
    for line in console.summary(report):
        print(line)
    rows = sum(len(scored) for scored in own.sets)
    print(f"judged {rows:,} rows in {took:.1f} s; the report: {folder / 'report.html'} ({REPORT} has every number)")
    return report


def _scores(args: EvaluationArgs) -> tuple[Scores, Scores | None]:
    """The model's scores and the other's, what is cheap to find wrong first: read, or computed."""
    other = None
    if args.against is not None and scores_path(args.against).is_file():
        other = _read(args.against)
    if args.scores is not None:
        return _read(args.scores, *args.benchmark), other
    # these import torch and transformers, which judging alone does without
    from open_rm.evaluation.keeping import check_model, keep_scores, of_other
    from open_rm.evaluation.sets import open_sets

    sets = open_sets(args.benchmark, args.dataset, args.dataset_splits, args)
    for named in sets:
        print(named.says())
    check_model(args, sets)
    beside = of_other(args) if args.against is not None and other is None else None
    if beside is not None:
        check_model(beside, sets, "--against")
    own = _read(str(keep_scores(args, sets)))
    if beside is not None:
        print(f"against {args.against}:")
        other = _read(str(keep_scores(beside, sets)))
    return own, other


def _say_how_the_other_was_made(report: dict, own: Scores, other: Scores) -> None:
    """What decides scores besides the models stands beside the comparison, and is warned of where it differs."""
    made = {label: value for label, value in other.meta.items() if label != "facts"}
    report["against"]["made"] = [[label, value] for label, value in made.items()]
    for label in DECIDING:
        if label in own.meta and label in made and own.meta[label] != made[label]:
            report["warnings"].append(
                f"{own.model} and {other.model} were not scored alike, {label}: {own.meta[label]} and {made[label]}."
            )


def _read(name: str, benchmark: str | None = None) -> Scores:
    path = scores_path(name)
    meta = read_meta(path)
    return Scores(str(meta.get("model") or Path(name).stem), read_scores(path, benchmark=benchmark), meta)


def _compare(named: list[str], folder: Path) -> None:
    table = leaderboard.compare(named)
    with console.writing(folder):
        leaderboard.write(table, folder)
    print(leaderboard.markdown(table))
    print(f"{folder / 'leaderboard.html'} is the same as a page; also leaderboard.md, leaderboard.csv")


if __name__ == "__main__":
    command_line.run(main, ARGUMENTS)
