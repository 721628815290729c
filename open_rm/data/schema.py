"""The columns of the cache, and a record batch of them from pairs that are kept."""

import hashlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from open_rm.data.encoding import PairIds
from open_rm.data.pairs import common_prefix

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
        "margin": pa.float32(),
        "label_prob": pa.float32(),
        "list_id": pa.int64(),
        "chosen_level": pa.int32(),
        "rejected_level": pa.int32(),
        "chosen_attributes": pa.list_(pa.float32()),
        "rejected_attributes": pa.list_(pa.float32()),
        "source": pa.int32(),
        "place": pa.string(),
    }
)


class Kept(NamedTuple):
    """A pair as the cache takes it.

    prompt_id: equal where prompts are.  margin: by how much chosen is better, where the row says so.
    label_prob: how probable it is that chosen is the better one, 0.5 (a tie) to 1.
    list_id: equal for the pairs of one list.  levels: the places of chosen and rejected in it, 0 the best.
    attributes: those of chosen and of rejected, NaN where the row has none; empty where none are asked.
    """

    ids: PairIds
    prompt_id: int
    margin: float | None
    place: str
    label_prob: float
    list_id: int
    levels: tuple[int, int]
    attributes: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


def record_batch(pairs: list[Kept], source: int) -> pa.RecordBatch:
    """Kept pairs of a source, with the columns that follow from their token ids."""
    chosen = [np.array(pair.ids.chosen, np.int32) for pair in pairs]
    rejected = [np.array(pair.ids.rejected, np.int32) for pair in pairs]
    columns = {
        "chosen_input_ids": _id_column(chosen),
        "rejected_input_ids": _id_column(rejected),
        "chosen_length": [len(ids) for ids in chosen],
        "rejected_length": [len(ids) for ids in rejected],
        "prompt_length": [len(pair.ids.prompt) for pair in pairs],
        "shared_length": [common_prefix(sides) for sides in zip(chosen, rejected, strict=True)],
        "prompt_id": [pair.prompt_id for pair in pairs],
        "chosen_id": [content_id(ids) for ids in chosen],
        "rejected_id": [content_id(ids) for ids in rejected],
        "margin": [float("nan") if pair.margin is None else pair.margin for pair in pairs],
        "label_prob": [pair.label_prob for pair in pairs],
        "list_id": [pair.list_id for pair in pairs],
        "chosen_level": [pair.levels[0] for pair in pairs],
        "rejected_level": [pair.levels[1] for pair in pairs],
        "chosen_attributes": [pair.attributes[0] for pair in pairs],
        "rejected_attributes": [pair.attributes[1] for pair in pairs],
        "source": [source] * len(pairs),
        "place": [pair.place for pair in pairs],
    }
    return pa.record_batch([pa.array(columns[name.name], name.type) for name in SCHEMA], schema=SCHEMA)


def content_id(ids: np.ndarray) -> int:
    """Equal where token ids are."""
    return _hash(ids.tobytes())


def list_id(source: int, place: str, copy: int) -> int:
    """Of all pairs of one row, each time that it is taken; the same in every process."""
    return _hash(f"{source} {copy} {place}".encode(errors="surrogatepass"))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _id_column(sequences: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([len(ids) for ids in sequences], out=offsets[1:])
    values = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
