"""Preference data: sources to rows, rows to token ids, once; then a memory-mapped cache.

A source is a Hub name, a json/jsonl/parquet file, or a folder that holds <split>.<extension>. Rows stream through in
blocks: read -> check -> render -> encode -> filter -> Arrow file, so memory does not grow with the data. The cache is
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

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_rm import tokenization
from open_rm.batching import Batch, common_prefix, lay_out
from open_rm.errors import UserError
from open_rm.steps import MicroBatch, PairTable
from open_rm.tokenization import PairIds, first_sentence

CACHE_VERSION = "2"  # raise when the meaning of a cached column changes
BLOCK_ROWS = 1000
FILE_EXTENSIONS = (".jsonl", ".json", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool")
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
class Source:
    """One entry of a mixer list.

    name: as the user wrote it.  label: short and unique, used in metric names.  split: e.g. "train".
    path: the local file, or None for the Hub.  amount: a count of rows, or a fraction (a float).
    """

    name: str
    label: str
    split: str
    path: Path | None
    amount: int | float


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


# ---------------------------------------------------------------- sources


def parse_mixer(mixer: list[str], splits: list[str], flag: str) -> list[Source]:
    """Alternating name and amount, e.g. ["a/b", "400", "c.jsonl", "0.5"], to sources.

    An amount is a count of rows, or a fraction when written with a point ("1.0" is everything). Counts beyond the
    source's size repeat rows. `splits` has one entry, for all, or one per source; a single file is itself the split.
    """
    if len(mixer) % 2:
        raise UserError(f"--{flag} alternates name and amount (e.g. my/data 1.0); got {len(mixer)} values: {mixer}")
    names, amounts = mixer[::2], mixer[1::2]
    if len(splits) not in (1, len(names)):
        raise UserError(
            f"--{flag}_splits has {len(splits)} values for {len(names)} sources; give one, or one per source"
        )
    splits = splits * len(names) if len(splits) == 1 else splits
    sources, used = [], Counter()
    for name, amount, split in zip(names, amounts, splits, strict=True):
        path = _local_file(name, split, flag)
        label = f"{path.parent.name}_{path.stem}" if path else name.split("/")[-1]
        used[label] += 1
        label = label if used[label] == 1 else f"{label}_{used[label]}"
        sources.append(Source(name, label, split, path, _parse_amount(amount, name, flag)))
    return sources


def _parse_amount(text: str, name: str, flag: str) -> int | float:
    try:
        amount = float(text) if "." in text else int(text)
    except ValueError:
        amount = 0
    if not amount > 0:
        raise UserError(
            f"--{flag}: the amount after {name} is {text!r}; write a count (400) or a fraction with a point (0.5, 1.0)"
        )
    return amount


def _local_file(name: str, split: str, flag: str) -> Path | None:
    """The file behind a local source; None when the name is one of the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        for extension in FILE_EXTENSIONS:
            if (path / f"{split}{extension}").is_file():
                return path / f"{split}{extension}"
        found = sorted(file.stem for file in path.iterdir() if file.suffix in FILE_EXTENSIONS)
        raise UserError(f"--{flag}: {name} has no split {split!r}; it has {', '.join(found) or 'no data file at all'}")
    if path.suffix in FILE_EXTENSIONS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        if not path.is_file():
            raise UserError(f"--{flag}: there is no file or folder {name}")
        if path.suffix not in FILE_EXTENSIONS:
            raise UserError(f"--{flag}: {name} is not a {', '.join(FILE_EXTENSIONS)} file")
        return path
    return None


def _open(source: Source) -> tuple[str, int, "Iterator"]:
    """(fingerprint of the content, number of rows, function that yields (place, row)) of a source."""
    if source.path is None:
        return _open_hub(source)
    digest = hashlib.sha256()
    with source.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if source.path.suffix == ".parquet":
        return digest.hexdigest(), *_open_parquet(source.path)
    if source.path.suffix == ".json" and (opened := _open_json_array(source.path)):
        return digest.hexdigest(), *opened
    with source.path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return digest.hexdigest(), rows, lambda: _json_lines(source.path)


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not UTF-8 (byte {error.start}); convert the file, e.g. with iconv"
                    ) from error
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno}); "
                        "every line must be one JSON object"
                    ) from error


def _open_json_array(path: Path):
    """A .json file that is one array of rows; None when it is JSON lines under another name."""
    with path.open("rb") as file:
        if not file.read(4096).lstrip().startswith(b"["):
            return None
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({first_sentence(error)}); mend the array, or use JSON lines"
        ) from error
    return len(rows), lambda: ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))


def _open_parquet(path: Path):
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_sentence(error)})") from error

    def rows():
        number = 0
        for batch in file.iter_batches(BLOCK_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row

    return file.metadata.num_rows, rows


def _open_hub(source: Source):
    try:
        dataset = datasets.load_dataset(source.name, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = first_sentence(error)
        advice = "check the name, the split and the network (a private dataset needs HF_TOKEN in the environment)"
        raise UserError(
            f"dataset {source.name}, split {source.split!r}: cannot be loaded ({what}); {advice}"
        ) from error

    def rows():
        number = 0
        for block in dataset.iter(BLOCK_ROWS):
            for values in zip(*block.values(), strict=True):
                number += 1
                yield f"{source.name}[{source.split}]: row {number}", dict(zip(block, values, strict=True))

    return dataset._fingerprint, len(dataset), rows


# ---------------------------------------------------------------- rows


def normalise_row(row: object) -> tuple:
    """One row of any accepted form to (prompt, chosen, rejected): all text, or all lists of messages.

    Accepted: chosen/rejected as text or as message lists, with `prompt` (text or messages) or without. A prompt that
    chosen and rejected already begin with is not repeated; without one, the messages both sides begin with are it.

    Raises:
        UserError: what is wrong with the row; the caller adds where it is.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with chosen and rejected, not {type(row).__name__}")
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise UserError(
            f"no value for {' and '.join(missing)}; the row has the columns {', '.join(sorted(row)) or 'none'}"
        )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise UserError(f"{name} is empty; remove the row or fill it in")
        if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        prompt = prompt or ""
    else:
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
        # A text prompt beside complete conversations (the common Hub form) only repeats one of their turns.
        if prompt is None or (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
            same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
            same = min(len(chosen), len(rejected)) - 1 if same is None else same
            prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        else:
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
            chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if not messages or messages[-1]["role"] != "assistant":
                last = messages[-1]["role"] if messages else "nothing"
                raise UserError(f"{name} must end with an assistant message (the response that is scored), not {last}")
            if not messages[-1]["content"].strip():
                raise UserError(f"{name} is empty; remove the row or fill it in")
    if chosen == rejected:
        raise UserError("chosen and rejected are identical, so the pair prefers nothing; remove the row")
    return prompt, chosen, rejected


def _messages(name: str, value: object) -> list[dict]:
    if isinstance(value, str):  # beside message lists, text is the assistant's answer
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{name} must be text or a list of messages, not {'empty' if value == [] else type(value).__name__}"
        )
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(
                f"{name} holds something that is not a message with role and content (text): {str(message)[:80]}"
            )
        if message["role"] not in ROLES:
            raise UserError(f"{name} has a message of role {message['role']!r}; the roles are {', '.join(ROLES)}")
    return value


def _without_prompt(prompt: list[dict], messages: list[dict]) -> list[dict]:
    if messages[: len(prompt)] == prompt and len(messages) > len(prompt):
        return messages[len(prompt) :]
    return messages


# ---------------------------------------------------------------- building and cache


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
    opened = [(source, *_open(source)) for source in parse_mixer(mixer, splits, flag)]
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
            (building / "report.json").write_text(json.dumps({"report": report, "chat": chat}))
            try:
                os.rename(building, folder)
            except OSError:  # another process finished the same cache first; the content is the same
                if not (folder / "report.json").is_file():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    facts = json.loads((folder / "report.json").read_text())
    dataset = Dataset.from_file(str(folder / "pairs.arrow"))
    if len(dataset) == 0:
        raise UserError(
            f"--{flag}: no pairs are left after filtering ({'; '.join(facts['report'])}); "
            "raise --max_token_length or --max_prompt_token_length"
        )
    return PreferenceData(dataset, [source.label for source, *_ in opened], **facts)


def _write_pairs(path, opened, tokenizer, max_token_length, max_prompt_token_length, seed, progress):
    report, chat = [], False
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for index, (source, _, size, rows) in enumerate(opened):
            copies = _copies(size, source.amount, seed)
            counts = Counter()
            bar = tqdm(total=int(copies.sum()), unit=" pairs", desc=f"tokenize {source.label}", disable=not progress)
            for places, block in _blocks(rows(), copies):
                kept = []
                chat |= not isinstance(block[0][1], str)
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
    if pair.prompt_length > max_prompt_token_length:
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
        "prompt_length": [pair.prompt_length for pair in pairs],
        "shared_length": [common_prefix(sides) for sides in zip(chosen, rejected, strict=True)],
        "prompt_id": [_content_id(ids[: pair.prompt_length]) for ids, pair in zip(chosen, pairs, strict=True)],
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
