"""How pairs lie in memory, and where each reward is read.

Three layouts of the pairs (abc|de , abc|f) and (gh|i , gh|jk), all with the same rewards and gradients:

    padded         a b c d e     S = 4 rows of T = 5 positions, chosen first; 16 tokens in 20 positions
                   g h i . .     rewards read at (0, 4), (1, 2), (2, 3), (3, 3)
                   a b c f .
                   g h j k .
    packed         a b c d e g h i a b c f g h j k       one row, 16 positions, each sequence blind to the others
    shared_prefix  a b c d e f g h j k i                 one row, 11 positions: abc and gh are computed once; f sees abc
                                                         and itself, i sees gh and itself

In shared_prefix all pairs of one prompt share it, and a response that stands in several pairs is computed once. The first,
longest sequence of a prompt is plain causal attention; the others continue their common prefix (see attention.py).

Only this module knows lengths: the reward is read at the last token by length, never by comparing ids with the pad id.
Shapes: B pairs, S rows, T positions.
"""

import functools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.attention import Segments, make_segments

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of chosen and rejected, prompt included


@dataclass(frozen=True)
class Batch:
    """A micro-batch in memory.

    input_ids: [S, T] int64; one row where sequences are packed.
    reward_index: [2 B] int64 into the flattened S * T positions: B chosen, then B rejected.
    attention_mask: [S, T] int64, 1 where there is a token; None where `segments` says who sees whom.
    position_ids: [S, T] int64, position of each token in its sequence; None where rows are sequences.
    tokens: tokens of all sequences.  computed: tokens that are computed, padding aside.
    area: query-key products that are needed.
    """

    input_ids: torch.Tensor
    reward_index: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    segments: Segments | None
    tokens: int
    computed: int
    area: int

    @property
    def positions(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel()

    @functools.cached_property
    def read_index(self) -> torch.Tensor:
        """[<= 2 B] int64: the distinct positions of `reward_index`; equal sequences share theirs."""
        return self.reward_index.unique()

    def inputs(self, device: torch.device) -> dict:
        """What the reward model's forward takes, on its device."""
        names = ("input_ids", "reward_index", "read_index", "attention_mask", "position_ids", "segments")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value.to(device)
            for name, value in values.items()
        }


def lay_out(layout: str, pairs: Sequence[Pair], *, pad_token_id: int, prompt_ids: Sequence[int]) -> Batch:
    """Pairs to a batch in the named layout. prompt_ids: [B], equal for pairs of the same prompt (shared_prefix only)."""
    if layout == "padded":
        return padded_batch(pairs, pad_token_id)
    return packed_batch(pairs) if layout == "packed" else shared_prefix_batch(pairs, prompt_ids)


def padded_batch(pairs: Sequence[Pair], pad_token_id: int) -> Batch:
    """Right-padded rows, chosen first."""
    sequences = _sequences(pairs)
    lengths = np.array([len(sequence) for sequence in sequences])
    input_ids = np.full((len(sequences), lengths.max()), pad_token_id, np.int64)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    tokens = int(lengths.sum())
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        reward_index=torch.from_numpy(np.arange(len(sequences)) * lengths.max() + lengths - 1),
        attention_mask=torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)),
        position_ids=None,
        segments=None,
        tokens=tokens,
        computed=tokens,
        area=int((lengths * (lengths + 1) // 2).sum()),
    )


def packed_batch(pairs: Sequence[Pair]) -> Batch:
    """All sequences one after another in a single row, chosen first."""
    sequences = _sequences(pairs)
    ends = np.cumsum([len(sequence) for sequence in sequences])
    bounds = [(int(end) - len(sequence), int(end), 0, 0) for sequence, end in zip(sequences, ends, strict=True)]
    positions = [np.arange(len(sequence)) for sequence in sequences]
    return _row(sequences, positions, bounds, ends - 1, tokens=int(ends[-1]))


def shared_prefix_batch(pairs: Sequence[Pair], prompt_ids: Sequence[int]) -> Batch:
    """A single row in which the sequences of one prompt share their common prefix, and equal sequences are one."""
    sequences = _sequences(pairs)
    groups = [group for members in _by_prompt(prompt_ids) for group in _worth_sharing(members, sequences, len(pairs))]
    pieces, positions, bounds = [], [], []
    reward_index = np.zeros(len(sequences), np.int64)
    used = 0
    for group in groups:
        members = sorted(group.values(), key=lambda same: -len(sequences[same[0]]))
        distinct = [sequences[same[0]] for same in members]
        prefix = common_prefix(distinct)
        start_of_group = used
        for number, (sequence, same) in enumerate(zip(distinct, members, strict=True)):
            own = sequence[prefix:] if number else sequence
            pieces.append(own)
            positions.append(np.arange(len(sequence) - len(own), len(sequence)))
            shared = (start_of_group, start_of_group + prefix) if number and prefix else (0, 0)
            bounds.append((used, used + len(own), *shared))
            used += len(own)
            reward_index[same] = used - 1
    return _row(pieces, positions, bounds, reward_index, tokens=sum(map(len, sequences)))


def _by_prompt(prompt_ids: Sequence[int]) -> list[list[int]]:
    """Pairs of the same prompt, in order of first appearance."""
    members: dict[int, list[int]] = {}
    for pair, prompt in enumerate(prompt_ids):
        members.setdefault(int(prompt), []).append(pair)
    return list(members.values())


def _worth_sharing(pairs: list[int], sequences: list[np.ndarray], count: int) -> list[dict[bytes, list[int]]]:
    """The pairs of a prompt as one group of equal sequences, or as one group each where that leaves fewer tokens: two
    sides may have more in common with each other than with the prompt's other pairs."""

    def group(members: list[int]) -> dict[bytes, list[int]]:
        equal: dict[bytes, list[int]] = {}
        for i in [*members, *(pair + count for pair in members)]:
            equal.setdefault(sequences[i].tobytes(), []).append(i)
        return equal

    def tokens(equal: dict[bytes, list[int]]) -> int:
        distinct = [sequences[same[0]] for same in equal.values()]
        return sum(map(len, distinct)) - common_prefix(distinct) * (len(distinct) - 1)

    together, apart = group(pairs), [group([pair]) for pair in pairs]
    return [together] if tokens(together) <= sum(map(tokens, apart)) else apart


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all sequences start with, leaving each at least one of its own: its last, where its reward is read."""
    length = min(len(sequence) for sequence in sequences) - 1
    for sequence in sequences[1:]:
        differs = np.flatnonzero(sequence[:length] != sequences[0][:length])
        length = int(differs[0]) if len(differs) else length
    return length


def _sequences(pairs: Sequence[Pair]) -> list[np.ndarray]:
    return [np.asarray(pair[side], np.int64) for side in (0, 1) for pair in pairs]


def _row(pieces, positions, bounds, reward_index, tokens: int) -> Batch:
    segments = make_segments(bounds)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(pieces)).unsqueeze(0),
        reward_index=torch.from_numpy(np.asarray(reward_index, np.int64)),
        attention_mask=None,
        position_ids=torch.from_numpy(np.concatenate(positions)).unsqueeze(0),
        segments=segments,
        tokens=tokens,
        computed=sum(map(len, pieces)),
        area=segments.score_area(),
    )


def prefetch(items: Iterable, depth: int = 4) -> Iterator:
    """Yield the items, made ahead by a background thread, so that the device does not wait for the next batch.

    An exception while making an item is raised where the item is asked for. Leaving the loop early ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=work, name="batches", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
