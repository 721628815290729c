"""Judge a reward model: how good is it, can it be believed, where does it fail.

    python -m open_rm.evaluation --model DIR --benchmark reward_bench rm_bench=PATH --output_dir OUT
    python -m open_rm.evaluation --scores FILE --output_dir OUT
    python -m open_rm.evaluation --model DIR --dataset pairs.jsonl --against OTHER --output_dir OUT
    python -m open_rm.evaluation --compare OUT1 OUT2 --output_dir TABLE

docs/evaluation.md says what the numbers mean; `--help` has all flags.
"""

from open_rm import command_line
from open_rm.checks import check_values
from open_rm.errors import UserError
from open_rm.evaluation import arguments
from open_rm.evaluation.arguments import EvaluationArgs


def check_args(args: EvaluationArgs) -> None:
    """Refuse every value and combination that cannot work."""
    check_values(args)
    arguments.check(args)


if __name__ == "__main__":  # a wrong command line is answered before the imports below
    ARGUMENTS = command_line.read(EvaluationArgs, check_args, prog="python -m open_rm.evaluation")

import time
from dataclasses import dataclass
from pathlib import Path

from open_rm.evaluation import console
from open_rm.evaluation.arguments import command_of
from open_rm.evaluation.page import contestants, document, leaderboard
from open_rm.evaluation.score_file import aligned, likely_the_datas, order_assumed, read_meta, read_scores
from open_rm.evaluation.score_folders import REPORT, says_which, scores_path
from open_rm.evaluation.scored import ScoredSet
from open_rm.evaluation.trust.report import FACTS, make_report

DECIDING = ("truncation length", "dtype")  # what two models' scores should have in common


@dataclass(frozen=True)
class Scores:
    """A model's scores, their file, and how they were made (scores.meta.json; empty where nobody says)."""

    model: str
    path: Path
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
    report = _report(args, own, other)
    for scores in (own, other) if other else (own,):
        report["warnings"] += likely_the_datas(scores.path, scores.sets)
    if other:
        _say_how_the_other_was_made(report, own, other)
    took = time.perf_counter() - started
    with console.writing(folder):
        document.write_report(report, folder)
    for line in console.summary(report):
        print(line)
    rows = sum(len(scored) for scored in own.sets)
    print(f"judged {rows:,} rows in {took:.1f} s; the report: {folder / document.PAGE} ({REPORT} has every number)")
    return report


def _report(args: EvaluationArgs, own: Scores, other: Scores | None) -> dict:
    try:
        return make_report(
            own.sets,
            model=own.model,
            meta=own.meta,
            command=command_of(args),
            seed=args.seed,
            invariance=own.meta.get(FACTS, {}).get("invariance"),
            other=(other.model, other.sets) if other else None,
            examples=args.examples,
        )
    except UserError:
        for scores in (own, other) if other else (own,):  # which file it is that its rules cannot judge
            contestants.judged(scores.path, scores.sets)
        raise


def _scores(args: EvaluationArgs) -> tuple[Scores, Scores | None]:
    """The model's scores and the other's, what is cheap to find wrong first: read, or computed."""
    other = None
    if args.against is not None and scores_path(args.against, of_runs=args.scores is not None).is_file():
        other = _read(args.against, _benchmark_of_other(args))
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


def _benchmark_of_other(args: EvaluationArgs) -> str | None:
    """Whose rules judge the other's rows where they do not say so themselves: with --scores the ones of --benchmark, as of its
    file; with --model the one benchmark that is judged. A folder of this command says it, and may hold other sets too."""
    if args.scores is None and (args.dataset or Path(args.against).expanduser().is_dir()):
        return None
    return args.benchmark[0].partition("=")[0] if len(args.benchmark) == 1 else None


def _say_how_the_other_was_made(report: dict, own: Scores, other: Scores) -> None:
    """What decides scores besides the models stands beside the comparison, and is warned of where it differs; so is an order
    of rows that nothing shows to be the same."""
    made = {label: value for label, value in other.meta.items() if label != FACTS}
    report["against"]["made"] = [[label, value] for label, value in made.items()]
    for scored, same in zip(own.sets, aligned(own.sets, other.sets), strict=True):
        if said := order_assumed(scored, same):
            report["warnings"].append(f"{said}.")
    for label in DECIDING:
        if label in own.meta and label in made and own.meta[label] != made[label]:
            report["warnings"].append(
                f"{own.model} and {other.model} were not scored alike, {label}: {own.meta[label]} and {made[label]}."
            )


def _read(name: str, benchmark: str | None = None) -> Scores:
    path = scores_path(name)
    _say_which(name)
    meta = read_meta(path)
    return Scores(str(meta.get("model") or Path(name).stem), path, read_scores(path, benchmark=benchmark), meta)


def _say_which(name: str) -> None:
    if said := says_which(name):
        print(console.visible(said))


def _compare(named: list[str], folder: Path) -> None:
    for name in named:
        _say_which(name)
    table = leaderboard.compare(named)
    with console.writing(folder):
        leaderboard.write(table, folder)
    print(leaderboard.markdown(table))
    print(f"{folder / 'leaderboard.html'} is the same as a page; also leaderboard.md, leaderboard.csv")


if __name__ == "__main__":
    command_line.run(main, ARGUMENTS)
