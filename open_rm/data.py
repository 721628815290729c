"""Preference data: sources to token ids, once; then a memory-mapped cache.

Rows stream from their sources (sources.py) in blocks through preparation.py into one Arrow file of the cache (cache.py),
which is known by its content: data, tokenizer, template, limits, this code's version. What is refused names file and row;
what is dropped or skipped is counted and printed. Nothing is dropped silently.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_rm import cache, preparation, tokenization
from open_rm.batching import Batch, lay_out
from open_rm.errors import UserError
from open_rm.preparation import SCHEMA, Policy
from open_rm.rows import AS_IS, Reading
from open_rm.sources import BLOCK_ROWS, Source, open_source, parse_mixer
from open_rm.steps import MicroBatch, PairTable

CACHE_VERSION = "7"  # raise when the meaning of a cached column changes


@dataclass(frozen=True)
class PreferenceData:
    """Tokenized pairs.

    dataset: columns chosen_input_ids, rejected_input_ids, those of steps.PairTable, margin (NaN where there is none),
        source (index into labels) and place (file and row).
    labels: one per source.  report: one line per source on what was read, dropped and kept.
    chat: whether rows were messages (rendered by the chat template) rather than plain text or token ids.
    facts: one dict per source, what its line of the report says: label, name, rows, taken, forms, ties, kept, dropped
        (reason -> count and first place), skipped (place and what is wrong), truncated, promptless (truncated pairs of
        whose prompt nothing is left).
    """

    dataset: Dataset
    labels: list[str]
    report: list[str]
    chat: bool
    facts: list[dict]

    def __len__(self) -> int:
        return len(self.dataset)

    def pairs(self, indices) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids (chosen, rejected) of the given rows, in their order."""
        rows = self.dataset.with_format("numpy", columns=["chosen_input_ids", "rejected_input_ids"])[list(indices)]
        return list(zip(rows["chosen_input_ids"], rows["rejected_input_ids"], strict=True))

    def batches(
        self, parts: Iterable[MicroBatch], layout: str, pad_token_id: int
    ) -> Iterator[tuple[MicroBatch, Batch]]:
        """Micro-batches as they lie in memory, one after another."""
        for part in parts:
            prompt_ids = self.table.prompts(part.indices)
            yield part, lay_out(layout, self.pairs(part.indices), pad_token_id=pad_token_id, prompt_ids=prompt_ids)

    @functools.cached_property
    def table(self) -> PairTable:
        """Lengths and ids of all pairs, for planning steps."""
        return PairTable(**{field.name: self._column(field.name) for field in dataclasses.fields(PairTable)})

    def source_ids(self) -> np.ndarray:
        """[pairs] index into labels."""
        return self._column("source")

    def places(self, indices) -> list[str]:
        """File and row of the given pairs."""
        return self.dataset.with_format(None, columns=["place"])[list(indices)]["place"]

    def margins(self) -> np.ndarray:
        """[pairs] float32, NaN where a row has none."""
        return np.array(self.dataset.with_format("arrow", columns=["margin"])[:]["margin"])

    def _column(self, name: str) -> np.ndarray:
        return np.array(self.dataset.with_format("arrow", columns=[name])[:][name]).astype(np.int64)


def read_both(
    mixer: list[str], splits: list[str], eval_mixer: list[str], eval_splits: list[str], **how
) -> tuple[PreferenceData, PreferenceData | None]:
    """Training and held-out data (None where no source is named) as the recipe's flags name them; `how` as below."""
    train = load_preference_data(mixer, splits, flag="dataset_mixer_list", **how)
    if not eval_mixer:
        return train, None
    return train, load_preference_data(eval_mixer, eval_splits, flag="dataset_mixer_eval_list", **how)


def load_preference_data(
    mixer: list[str],
    splits: list[str],
    *,
    flag: str,
    tokenizer: PreTrainedTokenizerBase,
    max_token_length: int,
    max_prompt_token_length: int,
    cache_dir: str,
    seed: int,
    reading: Reading = AS_IS,
    overlength: str = "filter",
    skip_bad_rows: int = 0,
    num_proc: int = 1,
    progress: bool = False,
) -> PreferenceData:
    """Tokenize every source of a mixer list, or find the result in the cache.

    Args:
        mixer, splits, flag: see `parse_mixer`; `flag` is the flag that errors name.
        max_token_length: of a side (prompt and response), in tokens.
        max_prompt_token_length: of a prompt, in tokens.
        overlength: "filter" drops pairs beyond these, "truncate" cuts them (tokenization.truncate); both are counted.
        cache_dir: folder of all caches.
        seed: which random rows a partial amount takes.
        reading: which columns are read, and how.
        skip_bad_rows: so many malformed rows are skipped and listed; the next one stops the run.
        num_proc: processes that tokenize; the result is the same.
        progress: show a progress bar (one rank should).
    """
    if num_proc > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        # a worker that imports the script which started it would wait here for its own parent
        raise UserError('with num_proc above 1 the call has to stand under `if __name__ == "__main__":` in a script')
    opened = [(source, *open_source(source)) for source in parse_mixer(mixer, splits, flag)]
    identity = {
        "version": CACHE_VERSION,
        # names, since places are kept: a copy elsewhere must not be told by the place of the first
        "sources": [(content, source.amount, source.label, _name(source)) for source, content, _, _ in opened],
        "tokenizer": tokenization.fingerprint(tokenizer),
        "lengths": (max_token_length, max_prompt_token_length, overlength),
        "reading": dataclasses.asdict(reading),
        "skip_bad_rows": skip_bad_rows,
        "seed": None if all(str(source.amount) == "1.0" for source, *_ in opened) else seed,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    policy = Policy(tokenizer, reading, max_token_length, max_prompt_token_length, overlength)

    def build(folder: Path) -> None:
        writing = _Writing(policy, skip_bad_rows, num_proc, progress)
        with pa.OSFile(str(folder / "pairs.arrow"), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            facts = [writing.source(i, *entry, seed, writer) for i, entry in enumerate(opened)]
        (folder / "facts.json").write_text(json.dumps({"chat": writing.kind == "messages", "facts": facts}))

    folder = cache.find_or_build(cache_dir, key, build, flag="dataset_local_cache_dir")
    dataset = Dataset.from_file(str(folder / "pairs.arrow"))
    found = json.loads((folder / "facts.json").read_text())
    facts = [fact | {"label": s.label, "name": _name(s)} for fact, (s, *_) in zip(found["facts"], opened, strict=True)]
    lines = "; ".join(map(_line, facts))
    if not any(fact["taken"] for fact in facts):
        raise UserError(f"--{flag}: no rows at all ({lines}); name a file with rows, or a larger amount")
    if len(dataset) == 0:
        advice = "the rows are ties or were skipped; name others"
        if any(fact["dropped"] for fact in facts):
            advice = "raise --max_token_length or --max_prompt_token_length, or pass --overlength truncate"
        raise UserError(f"--{flag}: no pairs are left ({lines}); {advice}")
    report = [line for fact in facts for line in (_line(fact), *_skipped_lines(fact))]
    return PreferenceData(dataset, [source.label for source, *_ in opened], report, found["chat"], facts)


class _Writing:
    """What goes on from source to source: the kind of the rows, and how many more bad ones may be skipped."""

    def __init__(self, policy: Policy, skip_bad_rows: int, num_proc: int, progress: bool):
        self.policy, self.num_proc, self.progress = policy, num_proc, progress
        self.skip_bad_rows = self.left = skip_bad_rows
        self.kind: str | None = None

    def source(self, index: int, source: Source, _: str, size: int, rows, seed: int, writer) -> dict:
        """Write one source's pairs; returns its facts."""
        copies = _copies(size, source.amount, seed)
        forms, dropped, skipped = Counter(), {}, []
        facts = {"rows": size, "taken": int(copies.sum()), "kept": 0, "ties": 0, "truncated": 0, "promptless": 0}
        bar = tqdm(total=facts["taken"], unit=" rows", desc=f"tokenize {source.label}", disable=not self.progress)
        blocks = self._with_kind(_blocks(rows(), copies))
        for block, done in preparation.prepare_blocks(blocks, index, self.policy, self.num_proc):
            for place, what in done.bad:
                self._skip(place, what)
                skipped.append({"place": place, "what": what})
            for reason, (count, first) in done.dropped.items():
                before = dropped.get(reason, {"count": 0, "first": first})
                dropped[reason] = before | {"count": before["count"] + count}
            forms += done.forms
            facts["ties"] += done.ties
            facts["truncated"] += done.truncated
            facts["promptless"] += done.promptless
            facts["kept"] += done.batch.num_rows
            writer.write_batch(done.batch)
            bar.update(sum(times for *_, times in block))
        bar.close()
        return facts | {"forms": dict(forms), "dropped": dropped, "skipped": skipped}

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
