"""Which sequences are computed together: prompts that are shared, and micro-batches of at most so many positions.

A plan depends on the sequences of a call alone, so that the same call gives the same bits whoever computes its parts.
Shapes: N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_rm.data import prefixes

LEAST_SHARED = 8  # tokens; what training takes for a prompt where none is named, too


@dataclass(frozen=True)
class Part:
    """Sequences that are computed together. members: indices.  prompt_of: equal where a prompt is shared."""

    members: list[int]
    prompt_of: list[int]


@dataclass(frozen=True)
class _Piece:
    """Sequences that stay together, the longest first. positions: what they take in a row.  longest: tokens of one."""

    members: list[int]
    prompt: int
    positions: int
    longest: int


def plan(
    sequences: Sequence[np.ndarray], prompt_of: Sequence[int] | None, *, layout: str, max_tokens: int, apart_at: int = 0
) -> list[Part]:
    """The micro-batches of a call, the longest sequences first.

    Args:
        sequences: token ids, all distinct.  prompt_of: [N] equal where a prompt is shared; None: it is looked for.
        layout: padded, packed or shared_prefix.
        max_tokens: most positions of a micro-batch, padding included; a single sequence may have more.
        apart_at: sequences up to so many tokens and longer ones are never together; 0: no such bound.
    """
    if layout == "shared_prefix":
        prompts = shared_prompts(sequences) if prompt_of is None else prompt_of
        pieces = [piece for prompt, group in _groups(prompts) for piece in _cut(prompt, group, sequences, max_tokens)]
    else:
        pieces = [_Piece([i], i, len(sequence), len(sequence)) for i, sequence in enumerate(sequences)]
    pieces.sort(key=lambda piece: (-piece.longest, piece.members[0]))
    parts: list[Part] = []
    room = longest = 0
    for piece in pieces:
        # the first of a padded batch is its longest, and every row takes as much
        needed = longest if layout == "padded" else piece.positions
        if not parts or needed > room or longest > apart_at >= piece.longest:
            parts.append(Part([], []))
            room, longest = max_tokens, piece.longest
            needed = longest if layout == "padded" else piece.positions
        parts[-1].members.extend(piece.members)
        parts[-1].prompt_of.extend([piece.prompt] * len(piece.members))
        room -= needed
    return parts


def _groups(prompts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(prompt, indices), in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(int(prompt), []).append(i)
    return list(groups.items())


def _cut(prompt: int, group: list[int], sequences: Sequence[np.ndarray], max_tokens: int) -> list[_Piece]:
    """A prompt's sequences, in as few pieces as fit."""
    group = sorted(group, key=lambda i: (-len(sequences[i]), i))
    shared = min((prefixes.overlap(sequences[group[0]], sequences[i]) for i in group[1:]), default=0)
    pieces: list[_Piece] = []
    members: list[int] = []
    positions = 0
    for i in group:
        length = len(sequences[i])
        if members and positions + length - shared > max_tokens:
            pieces.append(_Piece(members, prompt, positions, len(sequences[members[0]])))
            members, positions = [], 0
        positions += length - shared if members else length
        members.append(i)
    return [*pieces, _Piece(members, prompt, positions, len(sequences[members[0]]))]


def shared_prompts(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """[N] equal for sequences that are best computed behind one common prefix."""
    order, overlaps = prefixes.in_order(sequences)
    prompt_of = np.zeros(len(sequences), np.int64)
    for number, sharing in enumerate(prefixes.best_sharing(overlaps, least=LEAST_SHARED)):
        for place in sharing.places:
            prompt_of[order[place]] = number
    return prompt_of
