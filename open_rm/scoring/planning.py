"""Which sequences are computed together: prompts and headers that are shared, and micro-batches of at most so many positions.

A plan depends on the sequences of a call alone, so that the same call gives the same bits whoever computes its parts.
Shapes: N sequences.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_rm.batching import layouts
from open_rm.data import prefixes
from open_rm.data.pairs import common_prefix

LEAST_SHARED = 8  # tokens; what training takes for a prompt where none is named, too


@dataclass(frozen=True)
class Part:
    """Sequences that are computed together. members: indices.  prompt_of: equal where a prompt is shared."""

    members: list[int]
    prompt_of: list[int]


@dataclass(frozen=True)
class _Piece:
    """Sequences of one prompt that stay together, the longest first. positions: what they take in a row.  longest: tokens of
    one.  prefix: tokens that all begin with, their last ones left out."""

    members: list[int]
    prompt: int
    positions: int
    longest: int
    prefix: int = 0


@dataclass(frozen=True)
class _Block:
    """Pieces that stay together. positions: what they take in a row.  header: tokens of it that they share; 0: none."""

    pieces: list[_Piece]
    positions: int
    header: int = 0

    @property
    def longest(self) -> int:
        return max(piece.longest for piece in self.pieces)

    @property
    def first(self) -> int:
        return min(piece.members[0] for piece in self.pieces)


def plan(
    sequences: Sequence[np.ndarray], prompt_of: Sequence[int] | None, *, layout: str, max_tokens: int, apart_at: int = 0
) -> list[Part]:
    """The micro-batches of a call, the longest sequences first.

    Args:
        sequences: token ids, all distinct.  prompt_of: [N] equal where a prompt is shared; None: it is looked for.
        layout: padded, packed or shared_prefix.
        max_tokens: most positions of a micro-batch, padding included; a single sequence may have more.
        apart_at: sequences up to so many tokens and longer ones are never together; 0: no such bound. Not of shared_prefix.
    """
    if not len(sequences):
        return []
    if layout == "shared_prefix":
        prompts = shared_prompts(sequences) if prompt_of is None else prompt_of
        pieces = [piece for prompt, group in _groups(prompts) for piece in _cut(prompt, group, sequences, max_tokens)]
        blocks = _blocks(pieces, sequences, max_tokens)
    else:
        lengths = map(len, sequences)
        blocks = [_Block([_Piece([i], i, length, length)], length) for i, length in enumerate(lengths)]
    blocks.sort(key=lambda block: (-block.longest, block.first))
    parts: list[list[_Block]] = []
    room = longest = 0
    for block in blocks:
        # the first of a padded batch is its longest, and every row takes as much
        needed = longest if layout == "padded" else block.positions
        if not parts or needed > room or longest > apart_at >= block.longest:
            parts.append([])
            room, longest = max_tokens, block.longest
            needed = longest if layout == "padded" else block.positions
        parts[-1].append(block)
        room -= needed
    return [_part(pieces) for blocks in parts for pieces in _within(blocks, sequences, max_tokens)]


def _part(pieces: list[_Piece]) -> Part:
    prompt_of = [piece.prompt for piece in pieces for _ in piece.members]
    return Part([i for piece in pieces for i in piece.members], prompt_of)


def _groups(prompts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(prompt, indices), in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(int(prompt), []).append(i)
    return list(groups.items())


def _cut(prompt: int, group: list[int], sequences: Sequence[np.ndarray], max_tokens: int) -> list[_Piece]:
    """A prompt's sequences, in as few pieces as fit."""
    group = sorted(group, key=lambda i: (-len(sequences[i]), i))
    shared = common_prefix([sequences[i] for i in group])
    pieces: list[_Piece] = []
    members: list[int] = []
    positions = 0

    def end_piece() -> None:
        own = [sequences[i] for i in members]
        pieces.append(_Piece(members, prompt, positions, len(own[0]), common_prefix(own)))

    for i in group:
        length = len(sequences[i])
        if members and positions + length - shared > max_tokens:
            end_piece()
            members, positions = [], 0
        positions += length - shared if members else length
        members.append(i)
    end_piece()
    return pieces


# ---- headers


def _headers(pieces: Sequence[_Piece], sequences: Sequence[np.ndarray]) -> list[tuple[int, list[_Piece]]]:
    """(tokens of the header, the pieces that share it), as layouts.py finds them in a micro-batch."""
    order, overlaps = prefixes.in_order([sequences[piece.members[0]][: piece.prefix] for piece in pieces])
    found = prefixes.best_sharing(overlaps, least=layouts.LEAST_HEADER)
    return [(one.shared, [pieces[order[place]] for place in one.places]) for one in found]


def _blocks(pieces: list[_Piece], sequences: Sequence[np.ndarray], max_tokens: int) -> list[_Block]:
    """Pieces that share a header, together as far as they fit; a header counts once a block."""
    blocks = []
    for header, sharing in _headers(pieces, sequences):
        for filled in _filled(sharing, header, max_tokens) if header else [sharing]:
            blocks.append(_Block(filled, header + sum(piece.positions - header for piece in filled), header))
    return blocks


def _filled(pieces: list[_Piece], header: int, max_tokens: int) -> list[list[_Piece]]:
    """Each list begins with the largest piece that is left and goes on with the largest that still fits."""
    left = sorted(pieces, key=lambda piece: (piece.positions, -piece.members[0]))
    own = [piece.positions - header for piece in left]
    filled = []
    while left:
        filled.append([left.pop()])
        room = max_tokens - header - own.pop()
        while fit := bisect.bisect_right(own, room):
            filled[-1].append(left.pop(fit - 1))
            room -= own.pop(fit - 1)
    return filled


def _within(blocks: list[_Block], sequences: Sequence[np.ndarray], max_tokens: int) -> list[list[_Piece]]:
    """The pieces of the blocks, block by block where together they take more than was counted: layouts.py looks for headers
    in each micro-batch anew, and what it finds there can save a few tokens less."""
    pieces = [piece for block in blocks for piece in block.pieces]
    if len(pieces) == 1 or not any(block.header for block in blocks):
        return [pieces]
    saved = sum(header * (len(sharing) - 1) for header, sharing in _headers(pieces, sequences))
    if sum(piece.positions for piece in pieces) - saved <= max_tokens:
        return [pieces]
    if len(blocks) > 1:
        return [some for block in blocks for some in _within([block], sequences, max_tokens)]
    return [[piece] for piece in pieces]


# ---- prompts


def shared_prompts(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """[N] equal for sequences that are best computed behind one common prefix, their prompt.

    Where all of many prompts begin alike, the sequences are first found to share that beginning alone; what some of them
    share behind it is their prompt then, and the beginning is a header.
    """
    prompt_of = np.zeros(len(sequences), np.int64)
    if not len(sequences):
        return prompt_of
    order, overlaps = prefixes.in_order(sequences)
    number = 0
    for sharing in prefixes.best_sharing(overlaps, least=LEAST_SHARED):
        for places in _behind(sharing, overlaps):
            for place in places:
                prompt_of[order[place]] = number
            number += 1
    return prompt_of


def _behind(sharing: prefixes.Sharing, overlaps: Sequence[int]) -> list[list[int]]:
    """The places of a sharing, apart where what some share behind it saves more than the sharing, whole, could have in
    common with the sequences before and after it."""
    places = sharing.places
    if sharing.shared < layouts.LEAST_HEADER or len(places) < 3:
        return [places]
    between = [min(overlaps[a:b]) - sharing.shared for a, b in zip(places, places[1:], strict=False)]
    found = prefixes.best_sharing(between, least=LEAST_SHARED)
    outside = [overlaps[place] for place in (places[0] - 1, places[-1]) if 0 <= place < len(overlaps)]
    given_up = max((overlap for overlap in outside if overlap >= layouts.LEAST_HEADER), default=0)
    if sum(one.saved for one in found) <= given_up:
        return [places]
    return [[places[place] for place in one.places] for one in found]
