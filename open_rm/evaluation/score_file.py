"""scores.jsonl, and scores that were made elsewhere, to ScoredSets.

A line of scores.jsonl is a row of one set:

    {"set": "reward_bench", "benchmark": "reward_bench", "id": "hep-go/12", "subset": "hep-go", "scores": [1.5, -0.25],
     "gold": [1.0, 0.0], "characters": [812, 790], "tokens": null, "overlength": [false, false],
     "prompt": "...", "answers": ["...", "..."]}

scores, null where an answer has none, and gold (higher is better, null: not known) are in the benchmark's order, of pairs
chosen first. characters, tokens, overlength, prompt and answers may be missing. Numbers are kept in arrays; texts are read
again from the file when asked for (a file that is one JSON value is held whole). How scores made elsewhere are written:
score_forms.py.
"""

import functools
import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from open_rm.errors import UserError, quote, quote_error
from open_rm.evaluation import judgeable, score_forms
from open_rm.evaluation.rules.known import BENCHMARKS
from open_rm.evaluation.rules.rm_bench import domain_of
from open_rm.evaluation.score_forms import ScoreRow
from open_rm.evaluation.scored import META, SCORES, ScoredSet, pairs_of

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # gzip, zstd

MORE = ("characters", "tokens", "overlength", "prompt", "answers")


def row_of(
    *,
    set: str,
    benchmark: str | None,
    id: str,
    subset: str,
    scores: list[float | None],
    gold: list[float | None],
    **more: object,
) -> dict:
    """A row of scores.jsonl. more: any of MORE, each of them one value an answer but for the prompt.

    Raises:
        UserError: a score is no finite number.
    """
    if not all(score is None or math.isfinite(score) for score in scores):
        raise UserError(
            f"{set}: row {id}: the model's scores are {quote(scores)}, no finite numbers; its weights may be damaged, or too "
            "great for the type that they are computed in"
        )
    if not more.keys() <= {*MORE}:
        raise TypeError(f"no place in a row for {', '.join(more.keys() - {*MORE})}")
    needed = {"set": set, "benchmark": benchmark, "id": id, "subset": subset, "scores": scores, "gold": gold}
    return needed | {name: more.get(name) for name in MORE}


def read_scores(path: str | Path, *, benchmark: str | None = None) -> list[ScoredSet]:
    """The sets in a file of scores, or in a folder's scores.jsonl, in the order in which they begin.

    benchmark: whose rules judge rows that do not say it; None: what their form tells, else preference data.

    Raises:
        UserError: a file or a row that cannot be judged; one sentence with its line.
    """
    path = _file(path)
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise UserError(f"{benchmark} is no benchmark that is known here; they are {', '.join(BENCHMARKS)}")
    rows, text_at = _rows_of(path)
    read, sets = None, {}
    for where, place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: not an object with scores but {quote(row)}")
        if read is None:
            read = score_forms.reader_of(row, path.stem, benchmark, place)
        found = read(row, place)
        own = sets.setdefault(found.set, _Gathered(found.set, found.benchmark, read.own))
        own.take(found, where, place)
    if read is None:
        raise UserError(f"{path}: holds no scores; was it written to its end?")
    made = [own.made(functools.partial(_texts, text_at, read)) for own in sets.values()]
    for scored in made:
        if why := judgeable.why_not(scored):
            raise UserError(f"{path}: {scored.name}: {why}")
    return made


def is_named_by_its_file(path: Path, sets: list[ScoredSet]) -> bool:
    """Whether the set of a file that was read has no name of its own."""
    return len(sets) == 1 and sets[0].benchmark is None and sets[0].name == path.stem and not _first_of(path)[1].own


def likely_the_datas(path: Path, sets: list[ScoredSet]) -> list[str]:
    """The warning on scores of a file that was read and in which the data's own are often written, where they are never wrong."""
    row, read = _first_of(path)
    [names] = score_forms.sets_of_scores(row) if not read.own else [None]
    if names != score_forms.OF_DATA or any(isinstance(row[name], list) for name in names):
        return []
    margins = np.concatenate([pairs_of(scored).margin for scored in sets])
    if not len(margins) or margins.min() < 0 or not margins.any():
        return []
    return [
        f"{path}: the scores come from columns {' and '.join(names)}, which in most preference data are its own, those that chose "
        "the answers, and no pair is ranked wrong: these are hardly a model's scores."
    ]


def _first_of(path: Path) -> tuple[dict, score_forms.Reader]:
    _, place, row = next(_rows_of(path)[0])
    return row, score_forms.reader_of(row, path.stem, None, place)


def read_meta(path: str | Path) -> dict:
    """How the scores of a file (or a folder) were made; empty where nothing stands beside them."""
    meta = _file(path).parent / META
    if not meta.is_file() or _file(path).name != SCORES:
        return {}
    try:
        made = json.loads(meta.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{meta}: cannot be read ({quote_error(error)}); remove it, or score again") from error
    if not isinstance(made, dict):
        raise UserError(f"{meta}: holds no object of what the scores were made with; remove it, or score again")
    return made


def aligned(own: list[ScoredSet], other: list[ScoredSet]) -> list[ScoredSet]:
    """The other model's sets with the rows of `own` in its order; rows are matched by their ids, and may stand in any.

    Raises:
        UserError: the other has no such set, or rows that only one of them has, or rows of other answers: of another number, of
            which others are right, or, where both know the characters, of other lengths.
    """
    by_name = {scored.name: scored for scored in other}
    if len(own) == len(other) == 1:  # scores made elsewhere are named by their files
        by_name = {own[0].name: other[0]}
    matched = []
    for scored in own:
        if scored.name not in by_name:
            have = ", ".join(by_name)
            raise UserError(
                f"{scored.name}: the other model has no scores of it, but of {have}; score the same sets with both"
            )
        matched.append(_in_order_of(scored, by_name[scored.name]))
    return matched


def _in_order_of(own: ScoredSet, other: ScoredSet) -> ScoredSet:
    place = {name: row for row, name in enumerate(other.ids)}
    lacking = [name for name in own.ids if name not in place]
    if lacking or len(own) != len(other):
        more = next(iter(lacking or set(other.ids) - set(own.ids)))
        raise UserError(
            f"{own.name}: the two models were not scored on the same rows ({len(own):,} and {len(other):,}; only one has "
            f"{more}); score the same rows with both"
        )
    rows = np.asarray([place[name] for name in own.ids])
    sizes = np.diff(other.first)[rows]
    # Of each answer, where it stands at the other.
    answers = np.repeat(other.first[:-1][rows] - own.first[:-1], sizes) + np.arange(len(other.scores))
    same = sizes == np.diff(own.first)
    if same.all():
        same = np.add.reduceat(~np.isclose(own.gold, other.gold[answers], equal_nan=True), own.first[:-1]) == 0
    if not same.all():
        name = own.ids[int(np.flatnonzero(~same)[0])]
        raise UserError(
            f"{own.name}: row {name} has other answers, or other ones are right, at the two models; score the same rows"
        )
    _check_lengths(own, other.characters[answers])
    values = {name: getattr(other, name)[answers] for name in ("scores", "gold", "characters", "tokens", "overlength")}
    subsets = [other.subsets[row] for row in rows]
    texts = other.texts
    return ScoredSet(
        own.name, own.benchmark, own.ids, subsets, own.first, **values, texts=lambda row: texts(int(rows[row]))
    )


def _check_lengths(own: ScoredSet, others: np.ndarray) -> None:
    """Refuse answers that are not as long at the other model. others: [A] characters there, -1 where not known."""
    differ = (own.characters != others) & (own.characters >= 0) & (others >= 0)
    if differ.any():
        answer = int(np.flatnonzero(differ)[0])
        row = own.ids[int(own.row_of[answer])]
        without = " (the files give no ids, so rows were matched by their place)" if is_numbered(own) else ""
        raise UserError(
            f"{own.name}: row {row} has other answers at the two models, one of {own.characters[answer]:,} and of "
            f"{others[answer]:,} characters{without}; score the same rows with both, or give each row an id"
        )


def is_numbered(scored: ScoredSet) -> bool:
    """Whether its rows have no ids of their own, but are known by their places in the file."""
    return all(id == score_forms.numbered(count) for count, id in enumerate(scored.ids, 1))


def order_assumed(own: ScoredSet, other: ScoredSet) -> str | None:
    """What has to be said of two models whose rows were matched by nothing but their places in the files, else None.

    other: of `aligned`. Where both know how long all answers are, the same lengths tell that the rows are the same.
    """
    if not is_numbered(own) or ((own.characters >= 0) & (other.characters >= 0)).all():
        return None
    return (
        f"{own.name}: the files give no ids, so row n of one is taken to be row n of the other; if they are in different orders, "
        "the comparison means nothing"
    )


@dataclass
class _Gathered:
    """A set's rows so far, as numbers."""

    name: str
    benchmark: str | None
    own: bool  # lines of scores.jsonl
    rows: dict[str, int] = field(default_factory=dict)  # id -> which row of the set it is
    subsets: list[str] = field(default_factory=list)
    where: array = field(default_factory=lambda: array("q"))
    first: array = field(default_factory=lambda: array("q", [0]))
    scores: array = field(default_factory=lambda: array("d"))
    gold: array = field(default_factory=lambda: array("d"))
    characters: array = field(default_factory=lambda: array("q"))
    tokens: array = field(default_factory=lambda: array("q"))
    overlength: bytearray = field(default_factory=bytearray)
    names: dict[str, str] = field(default_factory=dict)  # each subset's name is kept once

    def take(self, row: ScoreRow, where: int, place: str) -> None:
        """where: what finds the row's text again."""
        if row.benchmark != self.benchmark:
            raise UserError(
                f"{place}: set {self.name} is of benchmark {row.benchmark} here, and of {self.benchmark} before; give each "
                "set one"
            )
        if row.id in self.rows:
            raise UserError(
                f"{place}: row {quote(row.id)} of {self.name} stands twice, first as row {self.rows[row.id]} of the set; {self._way_on(row)}"
            )
        self._check_rules(row, place)
        self.rows[row.id] = len(self.rows) + 1
        self.subsets.append(self.names.setdefault(row.subset, row.subset))
        self.where.append(where)
        self.scores.extend(row.scores)
        self.gold.extend(row.gold)
        self.characters.extend(row.characters)
        self.tokens.extend(row.tokens)
        self.overlength.extend(row.overlength)
        self.first.append(len(self.scores))

    def _way_on(self, row: ScoreRow) -> str:
        """From a row whose id is there already."""
        first = self.subsets[self.rows[row.id] - 1]
        if self.benchmark is None and first != row.subset:
            named = (
                ""
                if self.own
                else f"name the benchmark whose rows these are (--benchmark {', '.join(BENCHMARKS)}), or "
            )
            return (
                f"they are of the subsets {quote(first)} and {quote(row.subset)}: if ids are unique within a subset alone, {named}"
                "write the subset into each id"
            )
        if self.benchmark is None and not row.subset and not self.own:
            return (
                "keep one of them; if ids are unique within a subset alone, as RewardBench's, add the column subset and name the "
                "benchmark with --benchmark"
            )
        return "keep one of them"

    def _check_rules(self, row: ScoreRow, place: str) -> None:
        if self.benchmark is None:
            return
        known, size = BENCHMARKS[self.benchmark], len(row.scores)
        least, most = known.sizes
        if size < least or (most is not None and size > most):
            wanted = f"at least {least}" if most is None else str(least)
            raise UserError(
                f"{place}: {size} scores, and a row of {known.title} has {wanted}; correct or remove the row"
            )
        if self.benchmark == "rm_bench":
            try:
                domain_of(row.subset)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error

    def made(self, texts: Callable[[int], tuple[object, list] | None]) -> ScoredSet:
        """All of them."""
        where = np.asarray(self.where)
        return ScoredSet(
            self.name,
            self.benchmark,
            list(self.rows),
            self.subsets,
            np.asarray(self.first),
            np.asarray(self.scores),
            np.asarray(self.gold),
            np.asarray(self.characters),
            np.asarray(self.tokens),
            np.frombuffer(self.overlength, dtype=bool),
            lambda row: texts(int(where[row])),
        )


# ---- the file


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    path = path / SCORES if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; scores are a jsonl file, or a folder with {SCORES}")
    return path


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has; write null where there is no score")


DECODE = json.JSONDecoder(parse_constant=_refuse).decode
Found = Iterator[tuple[int, str, object]]


def _rows_of(path: Path) -> tuple[Found, Callable[[int], dict]]:
    """((where a row stands, its place for a message, the row) of each; from where it stands to the row)"""
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
    if first.startswith(PACKED):
        raise UserError(f"{path}: packed, and texts could not be read again at their places; unpack it")
    if first.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"[", b"{"):
        try:
            one = DECODE(first.removeprefix(BYTE_ORDER_MARK).decode())
        except (ValueError, RecursionError):
            one = None
        # A list of rows, or an object of columns, on one line or on several (as RewardBench and RM-Bench write them).
        if isinstance(one, list) or score_forms.is_columns(one) or (one is None and _is_one_value(path)):
            whole = functools.cache(lambda: _whole(path))
            return ((i, f"{path}: row {i + 1}", row) for i, row in enumerate(whole())), lambda where: whole()[where]
    return _lines(path), functools.partial(_line_at, path)


def _is_one_value(path: Path) -> bool:
    """Whether a file whose first line is not whole is one JSON value over several lines."""
    with path.open("rb") as file:
        head = file.readline().removeprefix(BYTE_ORDER_MARK).strip()
    return head in (b"[", b"{") or path.suffix == ".json"


def _whole(path: Path) -> list:
    try:
        value = DECODE(path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({quote_error(error)}); mend it, or write a row a line") from error
    if isinstance(value, list):
        return value
    return score_forms.rows_of_columns(value, str(path))


def _lines(path: Path) -> Found:
    where = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(BYTE_ORDER_MARK)
            if text.strip():
                place = f"{path}:{number}"
                yield where, place, _decoded(text, place)
            where += len(line)


def _decoded(line: bytes, place: str) -> object:
    try:
        return DECODE(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start}); convert the file, e.g. with iconv") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not valid JSON ({quote_error(error)}); every line must be one row's object"
        ) from error


def _line_at(path: Path, where: int) -> dict:
    with path.open("rb") as file:
        file.seek(where)
        return _decoded(file.readline().removeprefix(BYTE_ORDER_MARK), str(path))


def _texts(row_at: Callable[[int], dict], read: score_forms.Reader, where: int) -> tuple[object, list] | None:
    return score_forms.texts_of(row_at(where), own=read.own)
