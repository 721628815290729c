"""The flags of `python -m open_rm.evaluation`, and what they cannot be. Imports nothing heavy."""

import dataclasses
import difflib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from open_rm.data.mixer import Source, parse_mixer
from open_rm.data.reading import make_reading
from open_rm.errors import UserError
from open_rm.evaluation.rules.known import BENCHMARKS, Benchmark
from open_rm.evaluation.score_folders import is_report_alone, scores_path, why_none
from open_rm.evaluation.scored import SCORES
from open_rm.flags import Number, OpeningFlags, ReadingFlags, Seed

OUTPUT = "output/evaluation"  # where nothing is named
# Flags that have an effect beside --compare, and beside --scores.
OF_COMPARE = ("output_dir",)
OF_SCORES = ("benchmark", "output_dir", "against", "seed", "examples")


@dataclass(frozen=True, kw_only=True)
class JudgingFlags:
    """What is judged, and where the report goes."""

    model: str | None = None
    """The reward model: a folder or a Hub name; one of ours, an adapter of ours, or any classifier with one label."""
    scores: str | None = None
    """Instead of --model: scores that are there already, of this command or made elsewhere (docs/evaluation.md). No model is
    opened."""
    benchmark: list[str] = field(default_factory=list)
    """Benchmarks: reward_bench, reward_bench_2, rm_bench, judge_bench, rmb, fetched from the Hub, or NAME=PLACE for a file, a
    folder or another Hub data set. With --scores one name: whose rules judge a file that does not say so itself."""
    dataset: list[str] = field(default_factory=list)
    """Preference data of any form of docs/data.md, ranked lists included: files, folders, globs, Hub data sets."""
    dataset_splits: list[str] = field(default_factory=lambda: ["test"])
    """Split of each --dataset, or one for all. A single file is itself the split."""
    output_dir: str = OUTPUT
    """Folder for report.html, report.json, and scores.jsonl with every score. A command that was killed goes on where it was."""
    against: str | None = None
    """Another model, compared on the same rows: a folder of this command, a scores file, or a reward model, which is scored
    too."""
    compare: list[str] = field(default_factory=list)
    """Instead of all that: folders of this command, or scores files, as one table (leaderboard.md, .html, .csv)."""
    overlength: Literal["truncate", "null"] = "truncate"
    """Answers with which there are more than max_token_length tokens: cut (the prompt's start, then the answer's end), or no
    score (null). Counted."""
    seed: Seed = 1
    """Decides the draws of bootstrap intervals, and the rows on which invariance is checked."""
    examples: Number = 10
    """How many of the most confident mistakes, and of the least sure pairs, the report shows of each set."""
    overwrite: bool = False
    """Score anew where the folder holds scores of another model, other sets or other flags."""


# The bases stand from last to first: a dataclass lists the fields of its last base first, and so does --help.
@dataclass(frozen=True, kw_only=True)
class EvaluationArgs(ReadingFlags, OpeningFlags, JudgingFlags):
    """Judge a reward model: public benchmarks by their own rules, and how far the numbers can be believed.

    The numbers, and the files, are explained in docs/evaluation.md.
    """

    model: str | None = None
    """The reward model: a folder or a Hub name; one of ours, an adapter of ours, or any classifier with one label."""


@dataclass(frozen=True)
class Wanted:
    """One of --benchmark, or of --dataset, as it was written and not yet opened.

    name: of the set, unique in a run.  benchmark: None of preference data.  place: a local path or a Hub name; None: the
    benchmark's own on the Hub.  source: of preference data.
    """

    name: str
    benchmark: Benchmark | None
    place: str | None = None
    source: Source | None = None


def check(args: EvaluationArgs) -> None:
    """Refuse what cannot work, before anything is loaded; the bounds of single flags are for checks.check_values.

    Raises:
        UserError: one sentence.
    """
    output = Path(args.output_dir).expanduser()
    if not (place := next(path for path in (output, *output.absolute().parents) if path.exists())).is_dir():
        raise UserError(f"--output_dir {output}: {place} is a file and not a folder; name a folder")
    if args.compare:
        _check_alone(args, "compare", OF_COMPARE, "opens no model and judges whole scores files, as they are")
        if absent := [name for name in args.compare if not Path(name).expanduser().exists()]:
            raise UserError(f"--compare {absent[0]}: there is no such folder or file")
        return
    if (args.model is None) == (args.scores is None):
        both = "--model and --scores: pass one" if args.model is not None else "pass --model, or --scores"
        raise UserError(f"{both}: a reward model, or a file with scores that are there already")
    wanted = wanted_sets(args.benchmark, args.dataset, args.dataset_splits)
    if args.scores is not None:
        _check_scores(args)
    elif not wanted:
        raise UserError(
            f"nothing to judge: name a benchmark (--benchmark {' '.join(BENCHMARKS)}, each also as NAME=PATH), or preference "
            "data (--dataset)"
        )
    _check_reading(args)
    _check_against(args)


def _check_scores(args: EvaluationArgs) -> None:
    _check_alone(args, "scores", OF_SCORES, "opens no model and reads no other rows")
    if not (path := Path(args.scores).expanduser()).exists():
        raise UserError(f"--scores {args.scores}: there is no such file")
    if path.is_dir() and not scores_path(path).is_file():
        raise UserError(f"--scores {args.scores}: {why_none(path)}")
    kept = Path(args.output_dir).expanduser() / SCORES
    if kept.exists() and kept.resolve() != scores_path(args.scores).resolve():
        raise UserError(
            f"--output_dir {args.output_dir}: holds {SCORES} of its own, beside which a report of {args.scores} would be "
            "misread; name another folder"
        )
    if len(args.benchmark) > 1 or any("=" in name for name in args.benchmark):
        raise UserError(
            f"--scores and --benchmark {' '.join(args.benchmark)}: with scores, --benchmark is one name, whose rules judge a "
            "file that does not say so itself"
        )


def _check_against(args: EvaluationArgs) -> None:
    if args.against is None:
        return
    output = Path(args.output_dir).expanduser()
    own = [args.model or args.scores, str(output), str(output / SCORES)]
    if args.scores is not None:
        own.append(str(scores_path(args.scores)))
    other = Path(args.against).expanduser()
    if args.against in own or (
        other.exists()
        and {other.resolve(), scores_path(other).resolve()} & {Path(name).expanduser().resolve() for name in own}
    ):
        raise UserError(f"--against {args.against} is the model itself; name another one")
    if scores_path(args.against, of_runs=args.scores is not None).is_file():
        return
    if other.is_dir() and is_report_alone(other):
        raise UserError(f"--against {args.against}: {why_none(other)}")
    if other.suffix in (".json", ".jsonl"):
        raise UserError(f"--against {args.against}: there is no such file")
    if args.scores is not None:
        raise UserError(
            f"--against {args.against}: neither a scores file nor a folder with {SCORES}, and beside --scores no model is "
            "opened; score it first (--model), then name its folder here"
        )


def _check_alone(args: EvaluationArgs, flag: str, also: tuple[str, ...], why: str) -> None:
    """Refuse flags that would be silently without effect."""
    if idle := [name for name in given(args) if name not in (flag, *also)]:
        raise UserError(f"--{flag} and --{idle[0]}: --{flag} {why}; leave --{idle[0]} out")


def _check_reading(args: EvaluationArgs) -> None:
    """The reading flags, for every source that they may be written for."""
    for position, name in enumerate(args.dataset):
        make_reading(args, "eval", name, position, named=([], args.dataset))
    if not args.dataset:
        make_reading(args, "eval")


def wanted_sets(benchmark: list[str], dataset: list[str] = (), splits: list[str] = ("test",)) -> list[Wanted]:
    """What the flags name, in their order, benchmarks first.

    Raises:
        UserError: a benchmark that is not known, a place that is not there, a name that stands twice.
    """
    found: dict[str, Wanted] = {}
    for entry in benchmark:
        name, equals, place = entry.partition("=")
        if name not in BENCHMARKS:
            raise UserError(_unknown(entry, name))
        if name in found:
            raise UserError(f"--benchmark {entry}: {name} stands twice; a run judges it once")
        if equals and not place:
            raise UserError(f"--benchmark {entry}: write {name}=PATH, a file or folder of its rows, or {name} alone")
        if place and is_local(place) and not Path(place).expanduser().exists():
            raise UserError(f"--benchmark {entry}: there is no file or folder {place}")
        found[name] = Wanted(name, BENCHMARKS[name], place or None)
    for source in _sources(list(dataset), list(splits)):
        name = source.label
        while name in found:
            name += "_data"
        found[name] = Wanted(name, None, source=source)
    return list(found.values())


def _unknown(entry: str, name: str) -> str:
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), BENCHMARKS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return (
        f"--benchmark {entry}: no benchmark is called {name}; {hint}they are {', '.join(BENCHMARKS)}; other preference data is "
        "named with --dataset in open_rm.evaluation, and with --dataset_mixer_eval_list in training"
    )


def _sources(names: list[str], splits: list[str]) -> list[Source]:
    if twice := next((name for name in names if names.count(name) > 1 and len(splits) == 1), None):
        raise UserError(f"--dataset {twice} stands twice; a run judges it once")
    return parse_mixer([part for name in names for part in (name, "1.0")], splits, "dataset") if names else []


def is_local(place: str) -> bool:
    """Whether a place is one of this machine, there or not; else it is a name of the Hub (org/name)."""
    path = Path(place)
    if path.expanduser().exists() or path.is_absolute() or place.startswith((".", "~")) or place.endswith("/"):
        return True
    return bool(path.suffix in (".json", ".jsonl", ".csv", ".parquet")) or place.count("/") != 1


def given(args: EvaluationArgs) -> dict[str, object]:
    """Flags that have another value than they have by themselves."""
    defaults = {
        flag.name: flag.default if flag.default is not dataclasses.MISSING else flag.default_factory()
        for flag in dataclasses.fields(args)
    }
    return {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}


def command_of(args: EvaluationArgs) -> str:
    """The command line that gives these arguments again, however they were given."""
    words = ["python", "-m", "open_rm.evaluation"]
    for name, value in given(args).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
