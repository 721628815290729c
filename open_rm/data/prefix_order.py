"""The order in which prompts that begin alike stand side by side, for all prompts of a data set at once.

It is found from token ids alone. All prompts begin as one class, and classes are refined: of each the next tokens are read, a
block at a time; where they are equal in the whole class, nothing is sorted; where they differ, the class is split by the first
two tokens that do; a prompt alone in its class drops out. So no more is read of a prompt than what it shares with another,
and a block.
Shapes: M prompts.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

BLOCK = 16  # tokens read of each prompt at first; twice as many in each round, up to LARGEST_BLOCK
LARGEST_BLOCK = 64
READ_AT_ONCE = 8_000_000  # tokens of all prompts together, 32 MB; 16 of each prompt are read in any case
ENDED = -1  # in the place of tokens that may not be shared


@dataclass(frozen=True)
class PromptOrder:
    """Prompts side by side with those that begin alike; the overlap of two is the least of neighbours between them.

    ids: [M] of cut prompts (PairTable.cut_prompt_ids), rising.  place: [M] of each in the order.
    overlap_with_next: [M] by place: tokens that the prompt has in common with the one after it; 0 for the last.
    """

    ids: np.ndarray
    place: np.ndarray
    overlap_with_next: np.ndarray

    def overlaps(self, cut_prompt_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] the order of these prompts, [n - 1] overlaps of neighbours in it). Each prompt once."""
        number = np.minimum(np.searchsorted(self.ids, cut_prompt_ids), len(self.ids) - 1)
        if (self.ids[number] != cut_prompt_ids).any():
            raise KeyError("prompts that are not in the order")
        place = self.place[number]
        order = np.argsort(place, kind="stable")
        if len(order) < 2:
            return order, np.zeros(0, np.int64)
        first, last = place[order[0]], place[order[-1]]
        between = np.minimum.reduceat(self.overlap_with_next[first:last], place[order[:-1]] - first)
        return order, between


def find_order(ids: np.ndarray, sequences: pa.ChunkedArray, rows: np.ndarray, limits: np.ndarray) -> PromptOrder:
    """The order of prompts by their tokens.

    ids: [M] rising.  sequences: lists of token ids.  rows: [M] which of them begins with each prompt.
    limits: [M] tokens of each prompt that may be shared, at most those of its sequence.
    """
    reader = _Reader(sequences, rows, limits)
    order, overlap = np.arange(len(ids)), np.zeros(len(ids), np.int64)
    classes = _Classes(at=np.arange(len(ids)), size=np.array([len(ids)]), depth=np.array([0])).shared()
    most = BLOCK
    while len(classes.at):
        block = max(BLOCK, min(most, READ_AT_ONCE // len(classes.at)))
        classes = _refined(classes, reader, order, overlap, block)
        most = min(2 * most, LARGEST_BLOCK)
    place = np.empty_like(order)
    place[order] = np.arange(len(ids))
    return PromptOrder(ids, place, overlap)


@dataclass(frozen=True)
class _Classes:
    """Prompts that begin alike as far as they were read, one class after another.

    at: [rows] places in the order.  size: [classes] rows of each.  depth: [classes] tokens read.
    """

    at: np.ndarray
    size: np.ndarray
    depth: np.ndarray

    def starts(self) -> np.ndarray:
        return np.cumsum(self.size) - self.size

    def of_rows(self, column: np.ndarray) -> np.ndarray:
        """[classes] to [rows]"""
        return np.repeat(column, self.size)

    def take(self, which: np.ndarray) -> "_Classes":
        """which: [classes] bool."""
        return _Classes(self.at[self.of_rows(which)], self.size[which], self.depth[which])

    def shared(self) -> "_Classes":
        """Those of several prompts."""
        return self.take(self.size > 1)

    def __add__(self, other: "_Classes") -> "_Classes":
        return _Classes(*map(np.concatenate, zip(self._columns(), other._columns(), strict=True)))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.at, self.size, self.depth


def _refined(classes: _Classes, reader: "_Reader", order: np.ndarray, overlap: np.ndarray, block: int) -> _Classes:
    """The classes that are left after the next tokens of each; order and overlap are written where they become known."""
    which, starts = order[classes.at], classes.starts()
    tokens = reader.read(which, classes.of_rows(classes.depth), block)
    alike = _first_difference(tokens)
    alike[starts] = block  # a class is not compared with the one before it
    alike = np.minimum.reduceat(alike, starts)  # [classes] tokens of the block that a class has in common
    equal = alike == block
    further = _Classes(classes.at, classes.size, classes.depth + block).take(equal)
    if not equal.all():
        apart = tokens[classes.of_rows(~equal)]
        further += _split(classes.take(~equal), apart, alike[~equal], order, overlap)
    return _going_on(further, reader.limits, order, overlap)


def _going_on(classes: _Classes, limits: np.ndarray, order: np.ndarray, overlap: np.ndarray) -> _Classes:
    """The classes of several prompts that do not end in what was read. Prompts that end there share all they may."""
    classes = classes.shared()
    limit = limits[order[classes.at[classes.starts()]]]
    ended = limit < classes.depth
    inner = np.ones(len(classes.at), bool)
    inner[np.cumsum(classes.size) - 1] = False  # what the last of a class shares with the next class is known
    inner &= classes.of_rows(ended)
    overlap[classes.at[inner]] = classes.of_rows(limit)[inner]
    return classes.take(~ended)


def _split(
    classes: _Classes, tokens: np.ndarray, alike: np.ndarray, order: np.ndarray, overlap: np.ndarray
) -> _Classes:
    """The classes sorted and split by the first two tokens that differ in them, or by the last token of the block.

    tokens: [rows, block].  alike: [classes] tokens of the block that each class has in common.
    """
    rows, block = np.arange(len(tokens)), tokens.shape[1]
    column, number = classes.of_rows(alike), classes.of_rows(np.arange(len(alike)))
    two = column + 1 < block
    first, second = tokens[rows, column], np.where(two, tokens[rows, column + two], 0)
    key = (first.astype(np.int64) << 32) | second.astype(np.uint32)
    by_key = np.lexsort((key, number))
    order[classes.at] = order[classes.at[by_key]]
    key = key[by_key]
    inside, differs = np.diff(number) == 0, np.diff(key) != 0
    border = np.flatnonzero(inside & differs)
    depth = classes.of_rows(classes.depth) + column
    overlap[classes.at[border]] = depth[border] + (key[border] >> 32 == key[border + 1] >> 32)
    starts = np.append(0, np.flatnonzero(differs | ~inside) + 1)
    return _Classes(classes.at, np.diff(starts, append=len(rows)), (depth + 1 + two)[starts])


def _first_difference(tokens: np.ndarray) -> np.ndarray:
    """[rows] where each row first differs from the one before it; the length of a row where it does not."""
    differs = tokens[1:] != tokens[:-1]
    found = np.full(len(tokens), tokens.shape[1])
    some = np.flatnonzero(differs.any(1))
    found[some + 1] = differs[some].argmax(1)
    return found


class _Reader:
    """Blocks of tokens from Arrow's own memory; see find_order."""

    def __init__(self, sequences: pa.ChunkedArray, rows: np.ndarray, limits: np.ndarray):
        self.limits = limits
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in sequences.chunks]
        ends = np.cumsum([len(chunk) for chunk in sequences.chunks])
        self._chunk = np.searchsorted(ends, rows, side="right").astype(np.int32)
        starts = [chunk.offsets.to_numpy()[:-1] for chunk in sequences.chunks]
        self._start = np.concatenate(starts or [np.zeros(0)]).astype(np.int64)[rows]

    def read(self, which: np.ndarray, depth: np.ndarray, size: int) -> np.ndarray:
        """[rows, size] int32: `size` tokens of each of these prompts from `depth` on, ENDED from its limit on."""
        tokens = np.empty((len(which), size), np.int32)
        chunk, start = self._chunk[which], self._start[which] + depth
        by_chunk = np.argsort(chunk, kind="stable")
        numbers, first = np.unique(chunk[by_chunk], return_index=True)
        for number, some in zip(numbers.tolist(), np.split(by_chunk, first[1:]), strict=True):
            tokens[some] = _windows(self._values[number], start[some], size)
        left = self.limits[which] - depth
        short = np.flatnonzero(left < size)
        tokens[short] = np.where(np.arange(size) < left[short, None], tokens[short], ENDED)
        return tokens


def _windows(values: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """[n, size] of the values from each start on; behind the last value it is repeated."""
    if len(values) and starts.max() + size <= len(values):
        return np.lib.stride_tricks.sliding_window_view(values, size)[starts]
    padded = np.append(values[starts.min() :], np.full(size, ENDED))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[starts - starts.min()]
