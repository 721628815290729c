"""What --benchmark and --dataset name, opened: rows in their order, how they are read, what tells them apart.

A benchmark's rows are all looked at before a model is loaded (they are few): each must have what its rules count by. Of
preference data the first rows are.
"""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from open_rm.data.answers import Answers, read_answers
from open_rm.data.grouping import Joined, is_answer_a_row, joined
from open_rm.data.mixer import Source, extension_of, parse_mixer, stem_of
from open_rm.data.readers import Opened, open_source
from open_rm.data.reading import Reading, make_reading
from open_rm.errors import UserError
from open_rm.evaluation import console
from open_rm.evaluation.arguments import Wanted, is_local, wanted_sets
from open_rm.evaluation.rules import rm_bench
from open_rm.evaluation.rules.known import Benchmark
from open_rm.evaluation.scored import ScoredSet
from open_rm.flags import ReadingFlags

MOST_NAMED = 8  # subsets in the log
MOST_UNREADABLE = 0.01  # of a benchmark's rows
LOOKED_AT = 200  # rows of preference data that are read before a model is loaded
SUBSET_COLUMNS = ("subset", "source", "category", "domain")  # of preference data; the first that a row has
FORM_OF = dict.fromkeys(
    ("reward_bench", "reward_bench_2", "rm_bench"), "pairs"
)  # of docs/data.md; else told by columns
IDS_WITHIN = {"rm_bench": rm_bench.domain_of}  # subset to what ids are unique within; of other benchmarks the subset
ABOUT_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "README", "package")  # files that hold no rows


@dataclass(frozen=True)
class NamedSet:
    """One set of a run.

    name: unique in the run.  benchmark: whose rules judge it; None: preference data.
    reading: how its rows are read, but for whether texts become messages, which the model decides (`reading_for`).
    subsets: name -> rows, of a benchmark.
    left_out: (place, what is wrong) of a benchmark's few rows that cannot be read; `opened` is without them.
    """

    name: str
    benchmark: Benchmark | None
    opened: Opened
    reading: Reading
    subsets: dict[str, int]
    left_out: tuple[tuple[str, str], ...] = ()

    def reading_for(self, *, chat: bool) -> Reading:
        """For a model that scores conversations, or plain text."""
        reading, as_messages = self.reading, self.reading.as_messages
        if as_messages is None and (chat or not reading.parse_hh):
            as_messages = chat
        return reading.to_be_scored(as_messages)

    def id_of(self, row: object, place: str) -> str:
        """What tells a row from the others, for every model that scores the set."""
        if self.benchmark is not None:
            return self.benchmark.id_of(row, place)
        content = row.first if isinstance(row, Joined) else row
        file = Path(place).absolute()  # of several files of one name, the folder tells
        return f"{file.parent.name}/{file.name} {_digest(content)[:8]}"

    def subset_of(self, row: object, place: str) -> str:
        """What a row is counted by; of preference data empty where it has none."""
        if self.benchmark is not None:
            return self.benchmark.subset_of(row, place)
        row = row.first if isinstance(row, Joined) else row
        found = (row.get(name) for name in SUBSET_COLUMNS)
        return next((value.strip() for value in found if isinstance(value, str) and value.strip()), "")

    def says(self) -> str:
        """One line for the log."""
        rows = f"{self.name}: {self.opened.size:,} rows"
        if self.benchmark is None:
            return console.visible(f"{rows} of preference data")
        named = [f"{name} {count:,}" for name, count in self.subsets.items()]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        if self.left_out:
            place, what = self.left_out[0]
            more += f"; left out, since they cannot be read: {len(self.left_out):,} (first {place}: {what})"
        return console.visible(f"{rows}: {', '.join(named[:MOST_NAMED])}{more}")


def open_sets(
    benchmark: list[str],
    dataset: list[str] = (),
    splits: list[str] = ("test",),
    reading: ReadingFlags | None = None,
) -> list[NamedSet]:
    """What the flags name, ready to be scored.

    Args:
        benchmark: NAME, of the Hub, or NAME=PLACE, a local file or folder or another data set of the Hub.
        dataset, splits: preference data, each all of it.  reading: how its rows are read.

    Raises:
        UserError: one sentence: what is not there, not reached, or no data of that benchmark.
    """
    opened = []
    position = itertools.count()
    for wanted in wanted_sets(benchmark, dataset, splits):
        if wanted.benchmark is not None:
            opened.append(_open_benchmark(wanted))
        else:
            flags = reading or ReadingFlags()
            how = make_reading(flags, "eval", wanted.source.name, next(position), named=([], list(dataset)))
            opened.append(_open_data(wanted, how))
    return opened


def marks(opened: list[NamedSet]) -> dict[str, str]:
    """What all ranks have to have opened alike (alike.py): the content of each set in a hash, by its flag."""
    return {f"--benchmark {named.name}": named.opened.fingerprint for named in opened}


# ---- benchmarks


def _open_benchmark(wanted: Wanted) -> NamedSet:
    benchmark, place = wanted.benchmark, wanted.place
    flag = f"--benchmark {wanted.name}={place}" if place else f"--benchmark {wanted.name}"
    if place is None and benchmark.hub is None:
        raise UserError(
            f"{flag}: {benchmark.title} is not on the Hub; fetch {benchmark.data}, and name it with {flag}=PATH"
        )
    try:
        of_hub = place is None or not is_local(place)
        sources = _of_hub(place or benchmark.hub, benchmark) if of_hub else _local(place, benchmark.splits)
        parts = [open_source(source) for source in sources]
    except UserError as error:
        local = "" if place else f"; a copy on the disk ({benchmark.data}) is named with {flag}=PATH"
        raise UserError(f"{flag}: {str(error).removeprefix('--benchmark: ')}{local}") from error
    opened = _together(parts)
    # by its own columns: what stands beside them (subset, domain, error) might look like another form's
    form = [FORM_OF[benchmark.name]] if benchmark.name in FORM_OF else []
    reading = make_reading(ReadingFlags(dataset_format=form), "eval")
    return _checked(NamedSet(wanted.name, benchmark, opened, reading, {}), flag)


def _together(parts: list[Opened]) -> Opened:
    if len(parts) == 1:
        return parts[0]
    return Opened(
        hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest(),
        sum(part.size for part in parts),
        lambda: itertools.chain.from_iterable(part.rows() for part in parts),
    )


def _of_hub(name: str, benchmark: Benchmark) -> list[Source]:
    return [Source(name, name, split, (), 1.0) for split in benchmark.splits]


def _local(place: str, splits: tuple[str, ...]) -> list[Source]:
    """The files of a benchmark: those of its splits where the folder has any, else all that hold rows."""
    path = Path(place).expanduser()
    if (path / "dataset_dict.json").is_file():
        there = [split for split in splits if (path / split / "state.json").is_file()] or list(splits[:1])
        return [source for split in there for source in parse_mixer([place, "1.0"], [split], "benchmark")]
    if path.is_file() or (path / "state.json").is_file():
        return parse_mixer([place, "1.0"], ["all"], "benchmark")
    files = sorted(file for file in path.rglob("*") if extension_of(file) and stem_of(file) not in ABOUT_DATA)
    inside = {file: file.relative_to(path).parts for file in files}
    files = [file for file in files if file.is_file() and not any(part.startswith(".") for part in inside[file])]
    if not files:
        raise UserError(f"the folder {place} holds no file with rows; name the folder or file that does")
    of_splits = [file for file in files if any(stem_of(file) in (s, *_shards(s, file)) for s in splits)]
    return [Source(place, path.name, "all", tuple(of_splits or files), 1.0)]


def _shards(split: str, file: Path) -> tuple[str, ...]:
    return (stem_of(file),) if stem_of(file).startswith(f"{split}-0") else ()


def _checked(named: NamedSet, flag: str) -> NamedSet:
    """The set with its subsets counted and every row checked: its id is its own, its columns are the benchmark's.

    Answers of one row in a hundred may be unreadable (RMB has pairs with an empty one); such a row is left out, which is said.
    """
    seen: dict[str, str] = {}
    ids: list[str] = []
    subsets: list[str] = []
    gold: list[list[float]] = []
    unreadable: dict[int, tuple[str, str]] = {}
    reading = named.reading_for(chat=True)
    for number, (place, row) in enumerate(named.opened.rows()):
        try:
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, dict):
                raise UserError(f"a row is an object with columns, not {type(row).__name__}")
            identity, subset = named.id_of(row, place), named.subset_of(row, place)
        except UserError as error:
            raise UserError(_no_row(named, flag, place, error)) from error
        try:
            answers = read_answers(row, reading)
            _check_answers(answers, named.benchmark.sizes)
        except UserError as error:
            unreadable[number] = place, str(error).removeprefix(f"{place}: ")
            continue
        for mark, what in _marks(named, row, identity, subset):
            if (first := seen.setdefault(mark, place)) != place:
                raise UserError(f"{flag}: {place} has the {what} of {first}; name a place that holds each row once")
        ids.append(identity)
        subsets.append(subset)
        gold.append(answers.given)
    if len(unreadable) > len(ids) * MOST_UNREADABLE:
        raise UserError(_no_row(named, flag, *next(iter(unreadable.values()))))
    if not ids:
        raise UserError(f"{flag}: holds no rows")
    _try_rules(named, flag, ids, subsets, gold)
    opened = named.opened
    if unreadable:
        opened = Opened(opened.fingerprint, len(ids), lambda: _without(unreadable, named.opened))
    counted, left_out = dict(Counter(subsets)), tuple(unreadable.values())
    return dataclasses.replace(named, opened=opened, subsets=counted, left_out=left_out)


def _marks(named: NamedSet, row: dict, identity: str, subset: str) -> Iterator[tuple[str, str]]:
    """(mark, what it is in a message) of a row: what no other row may have. Its id alone does not tell rows without one, which
    are known by their places, nor the copy of a file that is read as a subset of its own."""
    yield f"id {identity}", f"id {identity}"
    if within := IDS_WITHIN.get(named.benchmark.name):
        number = identity.removeprefix(f"{subset}/")
        yield f"within {within(subset)}/{number}", f"id {within(subset)}/{number}"
    yield _digest(row), "content"


def _digest(row: object) -> str:
    """sha256, in hex, of a row's content."""
    return hashlib.sha256(json.dumps(row, default=repr, sort_keys=True).encode(errors="replace")).hexdigest()


def _no_row(named: NamedSet, flag: str, place: str, what: object) -> str:
    return f"{flag}: {place} is no row of {named.benchmark.title}: {str(what).removeprefix(f'{place}: ')}"


def _try_rules(named: NamedSet, flag: str, ids: list[str], subsets: list[str], gold: list[list[float]]) -> None:
    """Judge the rows with their gold in the place of scores: what the rules refuse is found before anything is scored."""
    flat = np.array([value for of_row in gold for value in of_row], np.float64)
    first, no = np.cumsum([0, *map(len, gold)]), np.full(len(flat), -1)
    short = np.zeros(len(flat), bool)
    try:
        named.benchmark.judge(
            ScoredSet(named.name, named.benchmark.name, ids, subsets, first, flat, flat, no, no, short)
        )
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def _without(numbers: Container[int], opened: Opened) -> Iterator[tuple[str, object]]:
    return (row for number, row in enumerate(opened.rows()) if number not in numbers)


def _check_answers(answers: Answers, sizes: tuple[int, int | None]) -> None:
    least, most = sizes
    if answers.given is None:
        raise UserError("nothing in the row says which answer is better")
    if not least <= len(answers.answers) <= (most or len(answers.answers)):
        wanted = str(least) if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"it has {len(answers.answers)} answers, and a row of it has {wanted}")


# ---- preference data


def _open_data(wanted: Wanted, reading: Reading) -> NamedSet:
    opened = open_source(wanted.source)
    if not opened.size:
        raise UserError(f"--dataset {wanted.source.name}: holds no rows")
    if is_answer_a_row(opened, reading.to_be_scored(None)):
        opened = joined(opened, reading.to_be_scored(None))
    named = NamedSet(wanted.name, None, opened, reading, {})
    _check_something_to_judge(named, wanted.source.name)
    return named


def _check_something_to_judge(named: NamedSet, source: str) -> None:
    """Refuse data in which nothing says which of two answers is better; what is wrong with single rows is said later."""
    reading, looked, fault = named.reading_for(chat=True), 0, None
    for place, row in itertools.islice(named.opened.rows(), LOOKED_AT):
        looked += 1
        try:
            if isinstance(row, UserError):
                raise row
            if _is_decided(read_answers(row, reading)):
                return
        except UserError as error:
            fault = fault or f"{place}: {error}"
    why = fault or f"in none of the first {looked:,} rows is one answer said to be better than another"
    raise UserError(f"--dataset {source}: nothing to judge: {why}")


def _is_decided(answers: Answers) -> bool:
    given = [score for score in answers.given or [] if score is not None]
    return len(set(given)) > 1


def only(rows: list[int] | None, opened: Opened) -> Callable[[], itertools.chain]:
    """What yields (place, row) of the rows of these numbers, rising; None: of all."""
    if rows is None:
        return opened.rows
    wanted = frozenset(rows)
    last = max(wanted, default=-1)
    return lambda: (pair for number, pair in enumerate(itertools.islice(opened.rows(), last + 1)) if number in wanted)
