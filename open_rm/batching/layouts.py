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

Prompts that begin alike share that too: a system prompt, a rubric, tools. Of (abc|de , abc|f) and (abg|hi , abg|j), where
two tokens are enough to be a header, with LEAST_HEADER in its place:

    shared_prefix  a b c d e f g h i j                   one row, 10 positions of 18 tokens: ab is computed once; g sees ab
                                                         and itself, j sees ab, g and itself

Only this module knows lengths: the reward is read at the last token by length, never by comparing ids with the pad id.
Shapes: B pairs, N sequences, S rows, T positions.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.batching.attention import Segments, make_segments
from open_rm.data.pairs import common_prefix
from open_rm.data.prefixes import best_sharing, in_order

# Tokens that prompts have to have in common at their start to share them: below, a split costs more calls than it saves.
LEAST_HEADER = 16
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of chosen and rejected, prompt included


@dataclass(frozen=True)
class Batch:
    """A micro-batch in memory.

    input_ids: [S, T] int64; one row where sequences are packed.
    reward_index: [N] int64 into the flattened S * T positions, where the reward of each sequence is read; of pairs
        N = 2 B: B chosen, then B rejected.
    read_index: [<= N] int64, the distinct positions of `reward_index`; equal sequences share theirs.
    attention_mask: [S, T] int64, 1 where there is a token; None where `segments` says who sees whom.
    position_ids: [S, T] int64, position of each token in its sequence; None where rows are sequences.
    tokens: tokens of all sequences.  computed: tokens that are computed, padding aside.  per_prompt: tokens that would be
        computed if each prompt were shared by its answers alone; more than `computed` where prompts share a header.
    area: query-key products that are needed.
    """

    input_ids: torch.Tensor
    reward_index: torch.Tensor
    read_index: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    segments: Segments | None
    tokens: int
    computed: int
    per_prompt: int
    area: int

    @property
    def positions(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel()

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while it computes; other memory it would wait for."""
        segments = self.segments
        return _pinned(self) if segments is None else dataclasses.replace(_pinned(self), segments=_pinned(segments))

    def inputs(self, device: torch.device) -> dict:
        """What the reward model's forward takes, on its device."""
        names = ("input_ids", "reward_index", "read_index", "attention_mask", "position_ids", "segments")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value.to(device)
            for name, value in values.items()
        }


def _pinned(of):
    """A dataclass with its tensors in page-locked memory."""
    values = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    tensors = {name: value.pin_memory() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(of, **tensors)


def lay_out(
    layout: str,
    pairs: Sequence[Pair],
    *,
    pad_token_id: int,
    prompt_ids: Sequence[int],
    least_header: int = LEAST_HEADER,
) -> Batch:
    """Pairs to a batch in the named layout. prompt_ids: [B], equal for pairs of the same prompt (shared_prefix only)."""
    sequences = [pair[side] for side in (0, 1) for pair in pairs]
    unit_of = [*range(len(pairs))] * 2
    how = {"pad_token_id": pad_token_id, "least_header": least_header}
    return lay_out_sequences(layout, sequences, prompt_of=[*prompt_ids] * 2, unit_of=unit_of, **how)


def lay_out_sequences(
    layout: str,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    prompt_of: Sequence[int],
    unit_of: Sequence[int] | None = None,
    least_header: int = LEAST_HEADER,
) -> Batch:
    """Any number of answers to each prompt to a batch in the named layout.

    Args:
        sequences: token ids, prompt included.
        prompt_of: [N] equal for sequences of the same prompt (shared_prefix only).
        unit_of: [N] the parts of a prompt's sequences that may share less than all of them and more with each other,
            such as pairs; None: each prompt is one part.
        least_header: tokens; prompts that have fewer in common at their start share none (shared_prefix only).
    """
    arrays = [np.asarray(sequence, np.int64) for sequence in sequences]
    if layout == "padded":
        return _padded(arrays, pad_token_id)
    if layout == "packed":
        return _packed(arrays)
    return _shared_prefix(arrays, prompt_of, prompt_of if unit_of is None else unit_of, least_header)


def _padded(sequences: list[np.ndarray], pad_token_id: int) -> Batch:
    """Right-padded rows."""
    lengths = np.array([len(sequence) for sequence in sequences])
    input_ids = np.full((len(sequences), lengths.max()), pad_token_id, np.int64)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    tokens = int(lengths.sum())
    reward_index = torch.from_numpy(np.arange(len(sequences)) * lengths.max() + lengths - 1)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        reward_index=reward_index,
        read_index=reward_index,
        attention_mask=torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)),
        position_ids=None,
        segments=None,
        tokens=tokens,
        computed=tokens,
        per_prompt=tokens,
        area=int((lengths * (lengths + 1) // 2).sum()),
    )


def _packed(sequences: list[np.ndarray]) -> Batch:
    """All sequences one after another in a single row."""
    ends = np.cumsum([len(sequence) for sequence in sequences])
    bounds = [(int(end) - len(sequence), int(end), ()) for sequence, end in zip(sequences, ends, strict=True)]
    positions = [np.arange(len(sequence)) for sequence in sequences]
    return _row(sequences, positions, bounds, ends - 1, tokens=int(ends[-1]))


def _shared_prefix(
    sequences: list[np.ndarray], prompt_of: Sequence[int], unit_of: Sequence[int], least_header: int
) -> Batch:
    """A single row in which the sequences of one prompt share their common prefix, prompts share a header, and equal
    sequences are one."""
    everything = range(len(sequences))
    groups = [
        _Group.of(equal, sequences)
        for members in _grouped(everything, prompt_of)
        for equal in _share_groups(members, sequences, unit_of)
    ]
    pieces, positions, bounds = [], [], []
    reward_index = np.zeros(len(sequences), np.int64)
    used = saved = 0
    for header, sharing in _with_headers(groups, least_header):
        saved += header * (len(sharing) - 1)
        start_of_header = used
        for place, group in enumerate(sharing):
            # What the group's first sequence continues: the header, or nothing, where it holds it itself.
            behind, start_of_group = header if place else 0, used
            root = ((start_of_header, start_of_header + behind),)
            for number, (sequence, same) in enumerate(zip(group.distinct, group.members, strict=True)):
                shared = group.prefix if number else behind
                prefix = (*root, (start_of_group, start_of_group + shared - behind))
                own = sequence[shared:]
                pieces.append(own)
                positions.append(np.arange(shared, len(sequence)))
                bounds.append((used, used + len(own), tuple((a, b) for a, b in prefix if b > a)))
                used += len(own)
                reward_index[same] = used - 1
    return _row(pieces, positions, bounds, reward_index, tokens=sum(map(len, sequences)), saved=saved)


@dataclass(frozen=True)
class _Group:
    """Sequences of one prompt that share a prefix.

    distinct: the longest first.  members: for each, the numbers of the sequences that are equal to it.
    prefix: tokens that all begin with; of one sequence all but its last.
    """

    distinct: list[np.ndarray]
    members: list[list[int]]
    prefix: int

    @staticmethod
    def of(equal: dict[bytes, list[int]], sequences: list[np.ndarray]) -> "_Group":
        members = sorted(equal.values(), key=lambda same: -len(sequences[same[0]]))
        distinct = [sequences[same[0]] for same in members]
        return _Group(distinct, members, common_prefix(distinct))


def _with_headers(groups: list[_Group], least: int) -> list[tuple[int, list[_Group]]]:
    """(tokens of the header, the groups that share it) so that fewest tokens are left, in order of first appearance."""
    order, overlaps = in_order([group.distinct[0][: group.prefix] for group in groups])
    sharing = [
        (one.shared, sorted(order[place] for place in one.places)) for one in best_sharing(overlaps, least=least)
    ]
    return [(header, [groups[i] for i in some]) for header, some in sorted(sharing, key=lambda one: one[1])]


def _grouped(members: Sequence[int], key_of: Sequence[int]) -> list[list[int]]:
    """Sequences of the same key, in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(int(key_of[i]), []).append(i)
    return list(groups.values())


def _share_groups(
    members: list[int], sequences: list[np.ndarray], unit_of: Sequence[int]
) -> list[dict[bytes, list[int]]]:
    """A prompt's sequences as one group of equal ones, or as one group a unit where that leaves fewer tokens: the two sides
    of a pair may have more in common with each other than with the prompt's other pairs."""

    def equal_ones(some: list[int]) -> dict[bytes, list[int]]:
        equal: dict[bytes, list[int]] = {}
        for i in some:
            equal.setdefault(sequences[i].tobytes(), []).append(i)
        return equal

    def tokens(equal: dict[bytes, list[int]]) -> int:
        distinct = [sequences[same[0]] for same in equal.values()]
        return sum(map(len, distinct)) - common_prefix(distinct) * (len(distinct) - 1)

    together, apart = equal_ones(members), [equal_ones(unit) for unit in _grouped(members, unit_of)]
    return [together] if tokens(together) <= sum(map(tokens, apart)) else apart


def _row(pieces, positions, bounds, reward_index, *, tokens: int, saved: int = 0) -> Batch:
    """saved: tokens that are not computed because prompts share a header."""
    segments, reward_index = make_segments(bounds), np.asarray(reward_index, np.int64)
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(pieces)).unsqueeze(0),
        reward_index=torch.from_numpy(reward_index),
        read_index=torch.from_numpy(np.unique(reward_index)),
        attention_mask=None,
        position_ids=torch.from_numpy(np.concatenate(positions)).unsqueeze(0),
        segments=segments,
        tokens=tokens,
        computed=sum(map(len, pieces)),
        per_prompt=sum(map(len, pieces)) + saved,
        area=segments.score_area(),
    )
