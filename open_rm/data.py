"""Preference data: sources to rows, rows to token ids, once; then a memory-mapped cache.

Rows stream from their sources (sources.py) through in blocks: read -> check -> render -> encode -> filter -> Arrow file, so memory does not grow with the data. The cache is
content-addressed (data, tokenizer, template, lengths, this code's version) and appears by one atomic rename.
What is refused names file and row; what is filtered is counted and printed. Nothing is dropped silently.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_rm import tokenization
from open_rm.batching import Batch, common_prefix, lay_out
from open_rm.errors import UserError
from open_rm.rows import normalise_row
from open_rm.sources import BLOCK_ROWS, open_source, parse_mixer
from open_rm.steps import MicroBatch, PairTable
from open_rm.tokenization import PairIds

CACHE_VERSION = "4"  # raise when the meaning of a cached column changes
SCHEMA = pa.schema(
    {
        "chosen_input_ids": pa.list_(pa.int32()),
        "rejected_input_ids": pa.list_(pa.int32()),
        "chosen_length": pa.int32(),
        "rejected_length": pa.int32(),
        "prompt_length": pa.int32(),
        "shared_length": pa.int32(),
        "prompt_id": pa.int64(),
        "chosen_id": pa.int64(),
        "rejected_id": pa.int64(),
        "source": pa.int32(),
    }
)


@dataclass(frozen=True)
class PreferenceData:
    """Tokenized pairs.

    dataset: columns chosen_input_ids, rejected_input_ids, those of steps.PairTable, and source (index into labels).
    labels: one per source.  report: one line per source on what was read, filtered and kept.
    chat: whether rows were messages (rendered by the chat template) rather than plain text.
    """

    dataset: Dataset
    labels: list[str]
    report: list[str]
    chat: bool

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
            prompt_ids = self.table.prompt_id[part.indices]
            yield part, lay_out(layout, self.pairs(part.indices), pad_token_id=pad_token_id, prompt_ids=prompt_ids)

    @functools.cached_property
    def table(self) -> PairTable:
        """Lengths and ids of all pairs, for planning steps."""
        return PairTable(**{field.name: self._column(field.name) for field in dataclasses.fields(PairTable)})

    def source_ids(self) -> np.ndarray:
        """[pairs] index into labels."""
        return self._column("source")

    def _column(self, name: str) -> np.ndarray:
        return np.array(self.dataset.with_format("arrow", columns=[name])[:][name]).astype(np.int64)


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
    progress: bool = False,
) -> PreferenceData:
    """Tokenize every source of a mixer list, or find the result in the cache.

    Args:
        mixer, splits, flag: see `parse_mixer`; `flag` is the flag that errors name.
        max_token_length: in tokens; a pair with a longer side is filtered.
        max_prompt_token_length: in tokens; a pair with a longer prompt is filtered.
        cache_dir: folder of all caches.
        seed: which random rows a partial amount takes.
        progress: show a progress bar (one rank should).
    """
    opened = [(source, *open_source(source)) for source in parse_mixer(mixer, splits, flag)]
    identity = {
        "version": CACHE_VERSION,
        "sources": [(content, source.amount, source.label) for source, content, _, _ in opened],
        "tokenizer": tokenization.fingerprint(tokenizer),
        "lengths": (max_token_length, max_prompt_token_length),
        "seed": seed if any(source.amount != 1.0 for source, *_ in opened) else None,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(cache_dir).expanduser() / key
    if not (folder / "report.json").is_file():
        building = folder.with_name(f"{key}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            building.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--dataset_local_cache_dir {cache_dir}: cannot be written ({error.strerror})") from error
        try:
            report, chat = _write_pairs(
                building / "pairs.arrow", opened, tokenizer, max_token_length, max_prompt_token_length, seed, progress
            )
            (building / "report.json").write_text(json.dumps({"report": report, "chat": bool(chat)}))
            try:
                os.rename(building, folder)
            except OSError:  # another process finished the same cache first; the content is the same
                if not (folder / "report.json").is_file():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    facts = json.loads((folder / "report.json").read_text())
    dataset = Dataset.from_file(str(folder / "pairs.arrow"))
    if len(dataset) == 0 and all(" 0 taken" in line for line in facts["report"]):
        raise UserError(
            f"--{flag}: no rows at all ({'; '.join(facts['report'])}); name a file with rows, or a larger amount"
        )
    if len(dataset) == 0:
        raise UserError(
            f"--{flag}: no pairs are left after filtering ({'; '.join(facts['report'])}); "
            "raise --max_token_length or --max_prompt_token_length"
        )
    return PreferenceData(dataset, [source.label for source, *_ in opened], **facts)


def _write_pairs(path, opened, tokenizer, max_token_length, max_prompt_token_length, seed, progress):
    report, chat = [], None
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for index, (source, _, size, rows) in enumerate(opened):
            copies = _copies(size, source.amount, seed)
            counts = Counter()
            bar = tqdm(total=int(copies.sum()), unit=" pairs", desc=f"tokenize {source.label}", disable=not progress)
            for places, block in _blocks(rows(), copies):
                kept = []
                chat = _one_kind(chat, places, block)
                for place, pair in zip(places, _encode_block(tokenizer, places, block), strict=True):
                    if fault := _overlength(pair, max_token_length, max_prompt_token_length):
                        counts[fault] += 1
                    else:
                        _check_ids(pair, place, tokenizer)
                        kept.append(pair)
                counts["kept"] += len(kept)
                writer.write_batch(_record_batch(kept, index))
                bar.update(len(block))
            bar.close()
            report.append(
                _source_line(source, size, int(copies.sum()), counts, max_token_length, max_prompt_token_length)
            )
    return report, chat


def _one_kind(chat: bool | None, places: list[str], block: list[tuple]) -> bool:
    """Whether the rows are messages; they must all be of one kind, since special tokens are written differently."""
    for place, (_, chosen, _) in zip(places, block, strict=True):
        if chat is not None and chat == isinstance(chosen, str):
            kinds = ("messages", "text") if chat else ("text", "messages")
            raise UserError(
                f"{place}: the rows before are {kinds[0]} and this one is {kinds[1]}; train on one kind at a time"
            )
        chat = not isinstance(chosen, str)
    return chat


def _copies(size: int, amount: int | float, seed: int) -> np.ndarray:
    """[size] how often each row is taken: whole passes, then a seeded random subset for the remainder."""
    wanted = round(size * amount) if isinstance(amount, float) else amount
    if size == 0:
        return np.zeros(0, np.int64)
    passes, rest = divmod(wanted, size)
    copies = np.full(size, passes, np.int64)
    copies[np.random.default_rng(seed).permutation(size)[:rest]] += 1
    return copies


def _blocks(rows, copies: np.ndarray) -> Iterator[tuple[list[str], list[tuple]]]:
    places, block = [], []
    for (place, row), times in zip(rows, copies, strict=True):
        if times == 0:
            continue
        try:
            normal = normalise_row(row)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        places += [place] * times
        block += [normal] * times
        if len(block) >= BLOCK_ROWS:
            yield places, block
            places, block = [], []
    if block:
        yield places, block


def _encode_block(tokenizer, places: list[str], block: list[tuple]) -> list[PairIds]:
    texts = []
    for place, row in zip(places, block, strict=True):
        try:
            text = tokenization.render_pair(tokenizer, *row)
            (text.chosen + text.rejected).encode()
            texts.append(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: the text holds half a surrogate pair, which is no character; remove it"
            ) from error
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    return tokenization.encode_pairs(tokenizer, texts)


def _overlength(pair: PairIds, max_token_length: int, max_prompt_token_length: int) -> str | None:
    if len(pair.prompt) > max_prompt_token_length:
        return "prompt"
    if max(len(pair.chosen), len(pair.rejected)) > max_token_length:
        return "side"
    return None


def _check_ids(pair: PairIds, place: str, tokenizer) -> None:
    if pair.chosen == pair.rejected:
        raise UserError(
            f"{place}: chosen and rejected are identical as tokens, so the pair prefers nothing; remove the row"
        )
    if tokenizer.pad_token_id in pair.chosen or tokenizer.pad_token_id in pair.rejected:
        raise UserError(
            f"{place}: the text contains the pad token {tokenizer.pad_token!r}, which must never occur in text; "
            "remove it from the row"
        )


def _record_batch(pairs: list[PairIds], source: int) -> pa.RecordBatch:
    chosen = [np.array(pair.chosen, np.int32) for pair in pairs]
    rejected = [np.array(pair.rejected, np.int32) for pair in pairs]
    columns = {
        "chosen_input_ids": _id_column(chosen),
        "rejected_input_ids": _id_column(rejected),
        "chosen_length": [len(ids) for ids in chosen],
        "rejected_length": [len(ids) for ids in rejected],
        "prompt_length": [len(pair.prompt) for pair in pairs],
        "shared_length": [common_prefix(sides) for sides in zip(chosen, rejected, strict=True)],
        "prompt_id": [_content_id(np.array(pair.prompt, np.int32)) for pair in pairs],
        "chosen_id": [_content_id(ids) for ids in chosen],
        "rejected_id": [_content_id(ids) for ids in rejected],
        "source": [source] * len(pairs),
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def _content_id(ids: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)


def _id_column(sequences: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([len(ids) for ids in sequences], out=offsets[1:])
    values = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _source_line(source, size, taken, counts, max_token_length, max_prompt_token_length) -> str:
    filtered = [
        f"{counts[fault]} filtered ({what})"
        for fault, what in (
            ("prompt", f"prompt > {max_prompt_token_length} tokens"),
            ("side", f"a side > {max_token_length} tokens"),
        )
        if counts[fault]
    ]
    what = source.name if source.path else f"{source.name}[{source.split}]"
    return ", ".join([f"{what}: {size} rows, {taken} taken", *filtered, f"{counts['kept']} pairs kept"])
