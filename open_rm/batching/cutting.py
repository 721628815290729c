"""A rank's share of a step to micro-batches of at most so many positions.

Pairs behind the same header are cut together, so that few micro-batches compute it; micro-batches that stay half empty are
then put together, each with its header.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from open_rm.batching.headers import Headers
from open_rm.batching.rules import BatchRules
from open_rm.batching.work import Units, joining, work_of
from open_rm.data.pairs import PairTable


@dataclass(frozen=True)
class Part:
    """Pairs to compute together. The first `counted` of them enter loss and metrics (0: only keeps ranks in step)."""

    indices: np.ndarray
    counted: int


@dataclass(frozen=True)
class Shares:
    """ranks: the micro-batches of each rank.  tokens: of each, one rank's after another's, the most positions it takes.

    header_loads: [ranks] cost of the headers that each computes, in tokens.
    """

    ranks: list[list[Part]]
    tokens: np.ndarray
    header_loads: np.ndarray


@dataclass(frozen=True)
class Pieces:
    """What is put into micro-batches, sorted by rank.

    rank, header: [pieces] whose, and the number of its header.  own: [pieces] positions without the header.
    """

    units: Units
    rank: np.ndarray
    header: np.ndarray
    own: np.ndarray

    def take(self, which: np.ndarray) -> "Pieces":
        return Pieces(self.units.take(which), self.rank[which], self.header[which], self.own[which])


def cut(
    units: Units, rank: np.ndarray, headers: Headers, table: PairTable, rules: BatchRules, world_size: int
) -> Shares:
    """The units of each rank to micro-batches of at most `rules.max_tokens` positions.

    All ranks' pieces are sorted, and become arrays of pairs, in one go: rank by rank this was most of a step's planning.
    """
    pieces = _sorted_pieces(units, rank, headers, table, rules)
    lengths = headers.tokens.tolist()
    own, header, pairs = pieces.own.tolist(), pieces.header.tolist(), pieces.units.size.tolist()
    ends = np.cumsum(np.bincount(pieces.rank, minlength=world_size)).tolist()
    bins: list[int] = []  # of each piece, numbered through all ranks
    first = [0]  # the first bin of each rank
    for start, end in itertools.pairwise([0, *ends]):
        here = slice(start, end)
        if rules.layout == "padded":
            widths = [size // n for size, n in zip(own[here], pairs[here], strict=True)]
            of_rank = similar(widths, pairs[here], rules.max_tokens)
        else:
            of_rank = _with_headers(own[here], header[here], lengths, rules.max_tokens)
        bins += [first[-1] + number for number in of_rank]
        first.append(first[-1] + 1 + max(of_rank, default=-1))
    return _shares(pieces, np.array(bins), np.array(first), headers, rules.area_cost)


def _shares(pieces: Pieces, bin_of: np.ndarray, first: np.ndarray, headers: Headers, area_cost: float) -> Shares:
    """bin_of: [pieces] micro-batch of each, numbered through all ranks.  first: [ranks + 1] the first of each rank."""
    pairs = pieces.units.take(np.argsort(bin_of, kind="stable")).members()
    pairs_of_bins = np.bincount(bin_of, weights=pieces.units.size).astype(np.int64)
    parts = [
        Part(pairs[end - size : end], size)
        for end, size in zip(np.cumsum(pairs_of_bins).tolist(), pairs_of_bins.tolist(), strict=True)
    ]
    tokens, loads = np.bincount(bin_of, weights=pieces.own).astype(np.int64), np.zeros(len(first) - 1)
    if headers:
        computed = np.unique(bin_of * len(headers.tokens) + pieces.header)  # each header once in a micro-batch
        where, header = np.divmod(computed, len(headers.tokens))
        np.add.at(tokens, where, headers.tokens[header])
        np.add.at(loads, np.searchsorted(first, where, side="right") - 1, headers.cost(area_cost)[header])
    return Shares([parts[start:end] for start, end in itertools.pairwise(first.tolist())], tokens, loads)


def _sorted_pieces(units: Units, rank: np.ndarray, headers: Headers, table: PairTable, rules: BatchRules) -> Pieces:
    """Rank by rank, header by header, the largest first; of padded ones the narrowest first."""
    if rules.layout == "padded":
        tokens = work_of(units, table, rules.layout).tokens
        order = np.lexsort((tokens // units.size, rank))
        return Pieces(units, rank, np.zeros_like(rank), tokens).take(order)
    units, rank, tokens = halved(units, rank, table, rules)
    header = headers.of(units, table)
    own = tokens - headers.tokens[header]
    if rules.layout == "shared_prefix":
        own += joining(units, headers.tokens[header], table)
    return Pieces(units, rank, header, own).take(np.lexsort((-own, header, rank)))


def halved(units: Units, rank: np.ndarray, table: PairTable, rules: BatchRules) -> tuple[Units, np.ndarray, np.ndarray]:
    """The units from last to first, halved until they fit or are single pairs, and the rank and the tokens of each. Whole
    lists stay whole.

    Their order decides between pieces of equal size, nothing else.
    """
    tokens = work_of(units, table, rules.layout).tokens
    while not rules.whole_lists and (large := (units.size > 1) & (tokens > rules.max_tokens)).any():
        half = np.where(large, units.size // 2, 0)
        first = np.stack((units.first, units.first + half), axis=1).ravel()
        size = np.stack((half, units.size - half), axis=1).ravel()
        units = Units(units.pairs, first, size).take(size > 0)
        rank, tokens, halves = (np.repeat(column, 1 + large) for column in (rank, tokens, large))
        tokens[halves] = work_of(units.take(halves), table, rules.layout).tokens
    return units.take(slice(None, None, -1)), rank[::-1], tokens[::-1]


def _with_headers(own: list[int], header: list[int], lengths: list[int], capacity: int) -> list[int]:
    """[n] the bin of each piece of a rank, given header by header, the largest first; bins of several headers that fit
    together are one.

    own: positions of each without its header.  lengths: of the headers.
    """
    if not header or header[0] == header[-1]:
        return first_fit(own, capacity - lengths[header[0]] if header else capacity)
    bins: list[int] = []
    held: list[int] = []  # positions of each bin
    for number, group in itertools.groupby(range(len(own)), key=header.__getitem__):
        sizes, before = [own[i] for i in group], len(held)
        of_group = first_fit(sizes, capacity - lengths[number])
        held += [lengths[number]] * (1 + max(of_group))
        for size, place in zip(sizes, of_group, strict=True):
            held[before + place] += size
        bins += [before + place for place in of_group]
    # No two bins of one header fit together, or its first fit would have found that.
    order = sorted(range(len(held)), key=lambda place: -held[place])
    together = dict(zip(order, first_fit([held[place] for place in order], capacity), strict=True))
    return [together[place] for place in bins]


def first_fit(sizes: list[int], capacity: int) -> list[int]:
    """[n] the bin of each size, given largest first: the first with enough room; too large a size has a bin of its own.

    Bins are the leaves of a binary tree, untouched ones to the right, and a node knows the most room below it. So the
    first bin with enough room is found from the root down, in as many looks as the tree has levels.
    """
    leaves = 1 << max(0, len(sizes) - 1).bit_length()  # node 1 is the root, 2 k and 2 k + 1 are below k
    room = [capacity] * (2 * leaves)
    bins: list[int] = []
    for size in sizes:
        node = leaves + len(bins) if size > capacity else 1  # too large: every bin so far holds one that was, too
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        bins.append(node - leaves)
        room[node] -= size
        while (node := node // 2) and room[node] != (below := max(room[2 * node], room[2 * node + 1])):
            room[node] = below
    return bins


def similar(widths: list[int], pairs: list[int], capacity: int) -> list[int]:
    """[n] the bin of each padded unit, given narrowest first: a bin is filled before the next, so that it holds similar
    lengths and little padding. Each pair takes as much as those of the last unit of its bin.

    widths: positions of a pair of each unit.  pairs: of each unit.
    """
    bins: list[int] = []
    number, held = -1, 0  # of the last bin, pairs in it
    for width, size in zip(widths, pairs, strict=True):
        if not bins or (held + size) * width > capacity:
            number, held = number + 1, 0
        bins.append(number)
        held += size
    return bins
