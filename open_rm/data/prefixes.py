"""Which sequences are best computed behind one common beginning, of many in an order in which those that begin alike stand
side by side.

The overlap of two of them is then the shortest overlap of neighbours between them (a trie's leaves, left to right), so the
order and one number for each two neighbours say all.
Shapes: N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sharing:
    """Sequences that share a beginning. places: theirs in the order.  shared: tokens; 0, and one place: nothing is shared."""

    places: list[int]
    shared: int

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return (len(self.places) - 1) * self.shared


def overlap(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size


def in_order(sequences: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """([N] the order, [N - 1] overlaps of neighbours in it). The time is that of sorting."""
    keys = [np.asarray(sequence).astype(">u4").tobytes() for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    return order, [overlap(sequences[a], sequences[b]) for a, b in zip(order, order[1:], strict=False)]


def best_sharing(overlaps: Sequence[int], *, least: int) -> list[Sharing]:
    """What leaves fewest tokens; each of the N sequences is in one of them.

    n sequences that all begin with p tokens save (n - 1) p. From the longest overlap to the shortest, what was found to share
    more is joined by what shares less where that saves more. The time grows about as N.

    overlaps: [N - 1] of neighbours.  least: tokens; a shorter beginning is not shared.
    """
    found: list[list[Sharing]] = []  # of each branch of the trie that is open to the right
    open_at: list[tuple[int, int]] = []  # (overlap, branches before those that have it), overlaps rising
    for place in range(len(overlaps) + 1):
        found.append([Sharing([place], 0)])
        following = overlaps[place] if place < len(overlaps) else -1
        while open_at and open_at[-1][0] > following:
            shared, start = open_at.pop()
            found[start:] = [_joined([one for branch in found[start:] for one in branch], shared, least)]
        if following >= 0 and not (open_at and open_at[-1][0] == following):
            open_at.append((following, len(found) - 1))
    return [one for branch in found for one in branch]


def _joined(parts: list[Sharing], shared: int, least: int) -> list[Sharing]:
    """Those of them as one that all save more with `shared` tokens in common than they do now, where that saves anything."""
    if shared < max(least, 1):
        return parts
    gains = [len(one.places) * shared - one.saved for one in parts]
    if sum(gain for gain in gains if gain > 0) <= shared:
        return parts
    joined = [place for one, gain in zip(parts, gains, strict=True) if gain > 0 for place in one.places]
    return [Sharing(sorted(joined), shared), *(one for one, gain in zip(parts, gains, strict=True) if gain <= 0)]
