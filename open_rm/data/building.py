"""Preference data: sources to token ids, once; then a memory-mapped cache.

Rows stream from their sources (readers.py) in blocks through preparation.py into one Arrow file of the cache (cache.py),
which is known by its content: data, tokenizer, template, limits, this code's version. What is refused names file and row;
what is dropped or skipped is counted and printed. Nothing is dropped silently.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_rm.data import cache, grouping, preparation
from open_rm.data.columns import columns_of
from open_rm.data.counts import Counts, attribute_lines, columns_line, source_line
from open_rm.data.lookup import parse_lookup
from open_rm.data.mixer import MOST_PASSES, Source, parse_mixer
from open_rm.data.pairs import PreferenceData
from open_rm.data.preparation import Policy, Taken
from open_rm.data.readers import BLOCK_ROWS, Opened, open_source
from open_rm.data.reading import Reading, reading_of_source
from open_rm.data.rows import most_pairs
from open_rm.data.schema import SCHEMA
from open_rm.data.tokenizer import fingerprint
from open_rm.errors import UserError
from open_rm.flags import DataFlags

CACHE_VERSION = "12"  # raise when the meaning of a cached column changes
COUNT_BAD_ROWS_SECONDS = 10.0


def read_both(
    flags: DataFlags, tokenizer: PreTrainedTokenizerBase, *, seed: int, show_progress: bool = False
) -> tuple[PreferenceData, PreferenceData | None]:
    """Training and held-out data (None where no source is named); see `load_preference_data`.

    Raises:
        UserError: one is text and the other messages.
    """
    train = load_preference_data(flags, tokenizer, seed=seed, show_progress=show_progress)
    if not flags.dataset_mixer_eval_list:
        return train, None
    held_out = load_preference_data(flags, tokenizer, held_out=True, seed=seed, show_progress=show_progress)
    kinds = {train.kind, held_out.kind}
    if kinds == {"text", "messages"}:
        text = "train" if train.kind == "text" else "eval"
        raise UserError(
            f"the training data is {train.kind} and the held-out data is {held_out.kind}, so evaluation would judge another "
            f"way of writing than was trained; pass --as_messages {text}::True, or name data of one kind"
        )
    if len(kinds) > 1:
        held_out.lines.append(
            f"eval: it is {held_out.kind} and the training data {train.kind}; that both are written alike is yours to see to"
        )
    return train, held_out


def load_preference_data(
    flags: DataFlags,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: bool = False,
    seed: int = 1,
    show_progress: bool = False,
) -> PreferenceData:
    """Tokenize every source of a mixer list, or find the result in the cache.

    Args:
        held_out: read --dataset_mixer_eval_list instead of --dataset_mixer_list.
        seed: which random rows a partial amount takes.
        show_progress: a progress bar where stderr is a terminal (one rank should).
    """
    if flags.num_proc > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        # a worker that imports the script which started it would wait here for its own parent
        raise UserError('with num_proc above 1 the call has to stand under `if __name__ == "__main__":` in a script')
    flag = "dataset_mixer_eval_list" if held_out else "dataset_mixer_list"
    sources = parse_mixer(getattr(flags, flag), getattr(flags, f"{flag}_splits"), flag)
    opened = [open_source(source) for source in sources]
    split = "eval" if held_out else "train"
    readings = [reading_of_source(flags, split, source.name, i) for i, source in enumerate(sources)]

    def build(folder: Path) -> None:
        writing = _Writing(flags, tokenizer, show_progress)
        with pa.OSFile(str(folder / "pairs.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            facts = [
                writing.source(i, *entry, seed, writer)
                for i, entry in enumerate(zip(sources, opened, readings, strict=True))
            ]
        (folder / "facts.json").write_text(json.dumps({"kind": writing.kind, "facts": facts}))

    key = _key(flags, tokenizer, sources, opened, readings, seed)
    folder = cache.find_or_build(flags.dataset_local_cache_dir, key, build, flag="dataset_local_cache_dir")
    dataset = Dataset.from_file(str(folder / "pairs.arrow"))
    found = json.loads((folder / "facts.json").read_text())
    facts = [fact | {"label": s.label, "name": _name(s)} for fact, s in zip(found["facts"], sources, strict=True)]
    _check_some_are_left(len(dataset), facts, flag)
    _check_attributes(readings, facts, opened)
    lines = [f"{split}: {line}" for fact in facts for line in _lines(fact)]
    return PreferenceData(dataset, [source.label for source in sources], lines, found["kind"], facts)


def _key(
    flags: DataFlags,
    tokenizer,
    sources: list[Source],
    opened: list[Opened],
    readings: list[Reading],
    seed: int,
) -> str:
    """Names a cache by all that decides its content."""
    entries = zip(sources, opened, strict=True)
    identity = {
        "version": CACHE_VERSION,
        # names, since places are kept: a copy elsewhere must not be told by the place of the first
        "sources": [(one.fingerprint, source.amount, source.label, _name(source)) for source, one in entries],
        "tokenizer": fingerprint(tokenizer),
        "lengths": (flags.max_token_length, flags.max_prompt_token_length, flags.overlength),
        "reading": [reading.identity() for reading in readings],
        "skip_bad_rows": flags.skip_bad_rows,
        "seed": None if all(str(source.amount) == "1.0" for source in sources) else seed,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def _check_some_are_left(pairs: int, facts: list[dict], flag: str) -> None:
    lines = "; ".join(map(source_line, facts))
    if not any(fact["taken"] for fact in facts):
        raise UserError(f"--{flag}: no rows at all ({lines}); name a file with rows, or a larger amount")
    if pairs == 0:
        advice = "the rows are ties, give no pair or were skipped; name others"
        if any(fact["dropped"] for fact in facts):
            advice = "raise --max_token_length or --max_prompt_token_length, or pass --overlength truncate"
        raise UserError(f"--{flag}: no pairs are left ({lines}); {advice}")


def _check_attributes(readings: list[Reading], facts: list[dict], opened: list[Opened]) -> None:
    """Of each attribute some answers must be known, else there would be nothing to learn, and each place that is named be there."""
    for name, places in readings[0].attributes:
        entries = [fact["attributes"][name] for fact in facts if name in fact["attributes"]]
        there = {place for entry in entries for place in entry["places"]}
        absent = [place for place in places if parse_lookup(place).written not in there]
        if any(entry["known"] for entry in entries) and (not absent or len(places) == 1):
            continue
        rows = (next((row for _, row in one.rows() if isinstance(row, dict)), {}) for one in opened)
        seen = [
            {column: row[column] for column in row if column not in reading.ignore}
            for row, reading in zip(rows, readings, strict=True)
        ]
        columns = "; ".join(f"{fact['name']}: {columns_of(row)}" for fact, row in zip(facts, seen, strict=True))
        if absent:
            raise UserError(
                f"--attributes {name}={','.join(places)}: no row of the training data has {absent[0]}; correct it, or leave the "
                f"attribute out; {columns}"
            )
        raise UserError(
            f"--attributes {name}: it is known of no answer of the training data; name one that is, or write {name}=PLACE, of "
            f"two sides {name}=PLACE,PLACE (docs/data.md); {columns}"
        )


class _Writing:
    """What goes on from source to source: the kind of the rows, and how many more bad ones may be skipped."""

    def __init__(self, flags: DataFlags, tokenizer: PreTrainedTokenizerBase, show_progress: bool):
        self.flags, self.tokenizer, self.show_progress = flags, tokenizer, show_progress
        self.left = flags.skip_bad_rows
        self.kind: str | None = None

    def source(self, index: int, source: Source, opened: Opened, reading: Reading, seed: int, writer) -> dict:
        """Write one source's pairs; returns its facts (see PreferenceData)."""
        rows_in_file = opened.size
        is_joined = grouping.is_answer_a_row(opened, reading)
        opened = grouping.joined(opened, reading) if is_joined else opened
        copies = _copies(opened.size, source, seed)
        counts, skipped, kept = Counts(), [], 0
        hidden = None if self.show_progress else True  # tqdm's None: hidden where stderr is no terminal
        bar = tqdm(total=int(copies.sum()), unit=" rows", desc=f"tokenize {source.label}", disable=hidden)
        policy = Policy.of(self.flags, self.tokenizer, reading)
        blocks = self._with_kind(_blocks(opened.rows(), copies, reading), reading)
        bad = _BadRows(self.left, self.flags.skip_bad_rows)
        for block, done in preparation.prepare_blocks(blocks, index, policy, self.flags.num_proc):
            skipped += bad.add(done.bad, len(block))
            if not bad.first_too_many:
                counts.add(done.counts)
                writer.write_batch(done.batch)
                kept += done.batch.num_rows
            elif bad.is_patience_over():
                break
            bar.update(sum(taken.times for taken in block))
        bar.close()
        bad.check(opened.size)
        self.left -= len(skipped)
        facts = {
            "rows": opened.size,
            "joined": rows_in_file if is_joined else 0,
            "taken": int(copies.sum()),
            "kept": kept,
        }
        return facts | dataclasses.asdict(counts) | {"skipped": skipped}

    def _with_kind(self, blocks, reading: Reading):
        for block in blocks:
            self.kind = self.kind or preparation.kind_of(block, reading)
            yield block, self.kind


class _BadRows:
    """The bad rows of a source: those that may be skipped, and how many there are where one is too many."""

    def __init__(self, left: int, allowed: int):
        self.left, self.allowed = left, allowed
        self.count = self.seen = 0
        self.first: tuple[str, str] | None = None
        self.first_too_many: tuple[str, str] | None = None
        self.found_at = 0.0

    def add(self, bad: list[tuple[str, str]], rows: int) -> list[dict]:
        """Take those of a block; returns what is skipped."""
        self.seen += rows
        skipped = []
        for place, what in bad:
            self.count += 1
            self.first = self.first or (place, what)
            if self.count <= self.left:
                skipped.append({"place": place, "what": what})
            elif self.first_too_many is None:
                self.first_too_many, self.found_at = (place, what), time.monotonic()
        return skipped

    def is_patience_over(self) -> bool:
        """Whether so much was read behind the first bad row that a person should not wait for the exact number."""
        return time.monotonic() - self.found_at > COUNT_BAD_ROWS_SECONDS

    def check(self, size: int) -> None:
        """Refuse the first row that was one too many."""
        if self.first_too_many is None:
            return
        place, what = self.first_too_many
        every = self.seen >= size
        number = (
            f"{'' if every else 'at least '}{self.count} of {f'all {size}' if every else f'the first {self.seen}'} rows"
        )
        if every and self.count >= size > 1:
            raise UserError(
                f"{': '.join(self.first)} (the first; none of the {size} rows of this source can be used, so name other columns, or leave "
                "the source out)"
            )
        needed = self.allowed - self.left + self.count
        before = f"; --skip_bad_rows {self.allowed} are used up" if self.allowed else ""
        raise UserError(
            f"{place}: {what} ({number} of this source cannot be used{before}; --skip_bad_rows {needed} would leave them out)"
        )


def _blocks(rows, copies: np.ndarray, reading: Reading) -> Iterator[preparation.Block]:
    """Blocks of about BLOCK_ROWS pairs, so that memory is bounded by pairs and not by rows."""
    block, pairs = [], 0
    for (place, row), times in zip(rows, copies, strict=True):
        for start in range(0, int(times), BLOCK_ROWS):
            taken = min(BLOCK_ROWS, int(times) - start)
            block.append(Taken(place, row, taken, start))
            pairs += taken * most_pairs(row, reading)
            if pairs >= BLOCK_ROWS:
                yield block
                block, pairs = [], 0
    if block:
        yield block


def _copies(size: int, source: Source, seed: int) -> np.ndarray:
    """[size] how often each row is taken: whole passes, then a seeded random subset for the remainder."""
    wanted = round(size * source.amount) if isinstance(source.amount, float) else source.amount
    if size == 0:
        return np.zeros(0, np.int64)
    if wanted > MOST_PASSES * size:
        raise UserError(
            f"the amount {source.amount} of {source.name} is {wanted / size:.0f} passes over its {size} rows; write a count "
            f"of rows, or 1.0 for all of them once"
        )
    passes, rest = divmod(wanted, size)
    copies = np.full(size, passes, np.int64)
    copies[np.random.default_rng(seed).permutation(size)[:rest]] += 1
    return copies


def _name(source: Source) -> str:
    return source.name if source.paths else f"{source.name}[{source.split}]"


def _lines(fact: dict) -> list[str]:
    """What became of a source: its rows, its columns, and all bad rows but the first, which stands in the first line."""
    columns = columns_line(fact)
    skipped = [f"  skipped {row['place']}: {row['what']}" for row in fact["skipped"][1:]]
    return [source_line(fact), *([columns] if columns else []), *attribute_lines(fact), *skipped]
