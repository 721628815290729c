"""Preference data: sources to token ids, once; then a memory-mapped cache.

Rows stream from their sources (readers.py) in blocks through preparation.py into one Arrow file of the cache (cache.py),
which is known by its content: data, tokenizer, template, limits, this code's version. What is refused names file and row;
what is dropped or skipped is counted and printed. Nothing is dropped silently.
"""

import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_rm.data import cache, preparation
from open_rm.data.mixer import Source, parse_mixer
from open_rm.data.pairs import PreferenceData
from open_rm.data.preparation import SCHEMA, Policy, Prepared
from open_rm.data.readers import BLOCK_ROWS, Opened, open_source
from open_rm.data.rows import make_reading
from open_rm.data.tokenizer import fingerprint
from open_rm.errors import UserError
from open_rm.flags import DataFlags

CACHE_VERSION = "7"  # raise when the meaning of a cached column changes


def read_both(
    flags: DataFlags, tokenizer: PreTrainedTokenizerBase, *, seed: int, show_progress: bool = False
) -> tuple[PreferenceData, PreferenceData | None]:
    """Training and held-out data (None where no source is named); see `load_preference_data`."""
    train = load_preference_data(flags, tokenizer, seed=seed, show_progress=show_progress)
    if not flags.dataset_mixer_eval_list:
        return train, None
    return train, load_preference_data(flags, tokenizer, held_out=True, seed=seed, show_progress=show_progress)


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
    policy = Policy.of(flags, tokenizer)

    def build(folder: Path) -> None:
        writing = _Writing(policy, flags, show_progress)
        with pa.OSFile(str(folder / "pairs.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            facts = [
                writing.source(i, *entry, seed, writer) for i, entry in enumerate(zip(sources, opened, strict=True))
            ]
        (folder / "facts.json").write_text(json.dumps({"chat": writing.kind == "messages", "facts": facts}))

    key = _key(flags, tokenizer, sources, opened, seed)
    folder = cache.find_or_build(flags.dataset_local_cache_dir, key, build, flag="dataset_local_cache_dir")
    dataset = Dataset.from_file(str(folder / "pairs.arrow"))
    found = json.loads((folder / "facts.json").read_text())
    facts = [fact | {"label": s.label, "name": _name(s)} for fact, s in zip(found["facts"], sources, strict=True)]
    _check_some_are_left(len(dataset), facts, flag)
    split = "eval" if held_out else "train"
    lines = [f"{split}: {line}" for fact in facts for line in (_line(fact), *_skipped_lines(fact))]
    return PreferenceData(dataset, [source.label for source in sources], lines, found["chat"], facts)


def _key(flags: DataFlags, tokenizer, sources: list[Source], opened: list[Opened], seed: int) -> str:
    """Names a cache by all that decides its content."""
    entries = zip(sources, opened, strict=True)
    identity = {
        "version": CACHE_VERSION,
        # names, since places are kept: a copy elsewhere must not be told by the place of the first
        "sources": [(one.fingerprint, source.amount, source.label, _name(source)) for source, one in entries],
        "tokenizer": fingerprint(tokenizer),
        "lengths": (flags.max_token_length, flags.max_prompt_token_length, flags.overlength),
        "reading": dataclasses.asdict(make_reading(flags)),
        "skip_bad_rows": flags.skip_bad_rows,
        "seed": None if all(str(source.amount) == "1.0" for source in sources) else seed,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def _check_some_are_left(pairs: int, facts: list[dict], flag: str) -> None:
    lines = "; ".join(map(_line, facts))
    if not any(fact["taken"] for fact in facts):
        raise UserError(f"--{flag}: no rows at all ({lines}); name a file with rows, or a larger amount")
    if pairs == 0:
        advice = "the rows are ties or were skipped; name others"
        if any(fact["dropped"] for fact in facts):
            advice = "raise --max_token_length or --max_prompt_token_length, or pass --overlength truncate"
        raise UserError(f"--{flag}: no pairs are left ({lines}); {advice}")


@dataclass
class _SourceFacts:
    """What happened to the rows of one source, counted while it is written."""

    rows: int
    taken: int
    kept: int = 0
    ties: int = 0
    truncated: int = 0
    promptless: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict] = field(default_factory=dict)  # reason -> count and first place
    skipped: list[dict] = field(default_factory=list)  # place, and what is wrong

    def add(self, done: Prepared) -> None:
        for reason, (count, first) in done.dropped.items():
            before = self.dropped.setdefault(reason, {"count": 0, "first": first})
            before["count"] += count
        for form, count in done.forms.items():
            self.forms[form] = self.forms.get(form, 0) + count
        self.ties += done.ties
        self.truncated += done.truncated
        self.promptless += done.promptless
        self.kept += done.batch.num_rows


class _Writing:
    """What goes on from source to source: the kind of the rows, and how many more bad ones may be skipped."""

    def __init__(self, policy: Policy, flags: DataFlags, show_progress: bool):
        self.policy, self.num_proc, self.show_progress = policy, flags.num_proc, show_progress
        self.skip_bad_rows = self.left = flags.skip_bad_rows
        self.kind: str | None = None

    def source(self, index: int, source: Source, opened: Opened, seed: int, writer) -> dict:
        """Write one source's pairs; returns its facts."""
        copies = _copies(opened.size, source.amount, seed)
        facts = _SourceFacts(rows=opened.size, taken=int(copies.sum()))
        hidden = None if self.show_progress else True  # tqdm's None: hidden where stderr is no terminal
        bar = tqdm(total=facts.taken, unit=" rows", desc=f"tokenize {source.label}", disable=hidden)
        blocks = self._with_kind(_blocks(opened.rows(), copies))
        for block, done in preparation.prepare_blocks(blocks, index, self.policy, self.num_proc):
            for place, what in done.bad:
                self._skip(place, what)
                facts.skipped.append({"place": place, "what": what})
            facts.add(done)
            writer.write_batch(done.batch)
            bar.update(sum(times for *_, times in block))
        bar.close()
        return dataclasses.asdict(facts)

    def _with_kind(self, blocks):
        for block in blocks:
            self.kind = self.kind or preparation.kind_of(block, self.policy.reading)
            yield block, self.kind

    def _skip(self, place: str, what: str) -> None:
        if self.left == 0:
            allowed = f" (--skip_bad_rows {self.skip_bad_rows} were skipped before it)" if self.skip_bad_rows else ""
            raise UserError(f"{place}: {what}{allowed}")
        self.left -= 1


def _blocks(rows, copies: np.ndarray) -> Iterator[preparation.Block]:
    """Blocks of about BLOCK_ROWS pairs, so that memory is bounded by pairs and not by rows."""
    block, pairs = [], 0
    for (place, row), times in zip(rows, copies, strict=True):
        for start in range(0, int(times), BLOCK_ROWS):
            taken = min(BLOCK_ROWS, int(times) - start)
            block.append((place, row, taken))
            pairs += taken * preparation.pairs_of(row)
            if pairs >= BLOCK_ROWS:
                yield block
                block, pairs = [], 0
    if block:
        yield block


def _copies(size: int, amount: int | float, seed: int) -> np.ndarray:
    """[size] how often each row is taken: whole passes, then a seeded random subset for the remainder."""
    wanted = round(size * amount) if isinstance(amount, float) else amount
    if size == 0:
        return np.zeros(0, np.int64)
    passes, rest = divmod(wanted, size)
    copies = np.full(size, passes, np.int64)
    copies[np.random.default_rng(seed).permutation(size)[:rest]] += 1
    return copies


def _name(source: Source) -> str:
    return source.name if source.paths else f"{source.name}[{source.split}]"


def _skipped_lines(fact: dict) -> list[str]:
    """All bad rows; the first stands in the source's own line."""
    return [f"  skipped {row['place']}: {row['what']}" for row in fact["skipped"][1:]]


def _line(fact: dict) -> str:
    forms = "; ".join(form if len(fact["forms"]) == 1 else f"{n} {form}" for form, n in fact["forms"].items())
    parts = [f"{fact['name']}: {fact['rows']} rows" + (f" ({forms})" if forms else ""), f"{fact['taken']} taken"]
    parts += [f"{fact['ties']} ties"] if fact["ties"] else []
    for reason, drop in fact["dropped"].items():
        parts.append(f"{drop['count']} filtered ({reason}; first {drop['first']})")
    if fact["skipped"]:
        first = fact["skipped"][0]
        parts.append(f"{len(fact['skipped'])} bad rows skipped (first {first['place']}: {first['what']})")
    promptless = f" ({fact['promptless']} lost their whole prompt)" if fact["promptless"] else ""
    parts += [f"{fact['truncated']} truncated{promptless}"] if fact["truncated"] else []
    return ", ".join([*parts, f"{fact['kept']} pairs kept"])
