"""Which rank takes which pairs of a step, and how a rank's share is cut into micro-batches.

Dealing the pairs out follows cost (tokens and attention), so that no rank waits long for another; neither the deal nor
the cutting changes the sum over the step's pairs, and so not the mathematics. Every rank makes the same number of
micro-batches, because under ZeRO-3 each forward is a collective call; a rank that runs out computes a pair again that
counts for nothing.

Each rank computes the whole deal: for the pairs of a step it takes milliseconds, and sending it around would take as
long. It takes time that grows about as the number of pairs, so that a whole held-out set can be dealt in one call.
Only columns of numbers are looked at here, never token ids.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from open_rm.batching.rules import BatchRules
from open_rm.data.pairs import PairTable

SWAPS = 400  # most improvements tried after the first deal
SWAPS_TIMES_UNITS = 8_000_000  # most of this product: fewer are tried where more than 20,000 units are dealt
EXCHANGES = 5_000  # between two ranks: up to so many are all looked at, of more only those that matter
BALANCED = 1.01  # max over mean cost at which it stops
CPU_POSITIONS = 1536  # positions of a forward that a CPU's caches hold well; with twice as many it was a tenth slower


@dataclass(frozen=True)
class Part:
    """Pairs to compute together. The first `counted` of them enter loss and metrics (0: only keeps ranks in step)."""

    indices: np.ndarray
    counted: int


@dataclass(frozen=True)
class Deal:
    """indices: the step's pairs.  ranks: the micro-batches of each rank.  imbalance: max over mean cost of the ranks."""

    indices: np.ndarray
    ranks: list[list[Part]]
    imbalance: float


@dataclass(frozen=True)
class Work:
    """What computing units takes, both [units]. tokens: positions in memory.  area: query-key products.  cost: in tokens."""

    tokens: np.ndarray
    area: np.ndarray

    def cost(self, area_cost: float) -> np.ndarray:
        return self.tokens + area_cost * self.area


@dataclass(frozen=True)
class Units:
    """Pairs that stay together: unit u holds pairs[first[u] : first[u] + size[u]], one at least. first, size: [units]."""

    pairs: np.ndarray
    first: np.ndarray
    size: np.ndarray

    def take(self, which: np.ndarray | slice) -> "Units":
        return Units(self.pairs, self.first[which], self.size[which])

    def starts(self) -> np.ndarray:
        """[units] where each unit starts in `members`."""
        return np.cumsum(self.size) - self.size

    def members(self) -> np.ndarray:
        """The pairs of all units, one unit after another."""
        return self.pairs[np.arange(self.size.sum()) + np.repeat(self.first - self.starts(), self.size)]


@dataclass(frozen=True)
class Candidate:
    """A way to deal a step: the units and the cost of each rank."""

    shares: list[Units]
    loads: np.ndarray


def deal_step(indices: np.ndarray, table: PairTable, rules: BatchRules, world_size: int) -> Deal:
    """Deal a step's pairs to the ranks and cut each share into micro-batches of at most `rules.max_tokens` positions.

    indices: [pairs] of the step, into the table. Every rank finds the same.
    """
    best = _best_candidate(indices, table, rules, world_size)
    cheapest = indices[np.argmin(table.chosen_length[indices] + table.rejected_length[indices])]
    filler = Part(np.array([cheapest]), counted=0)
    ranks = [_cut(share, table, rules.layout, rules.max_tokens) for share in best.shares]
    forwards = max(len(parts) for parts in ranks)
    ranks = [parts + [filler] * (forwards - len(parts)) for parts in ranks]
    return Deal(indices, ranks, float(best.loads.max() / best.loads.mean()))


def micro_batch_budget(pairs: int, max_token_length: int, *, on_gpu: bool) -> int:
    """Positions of a micro-batch where the user did not say: `pairs` of the greatest length, on a CPU at most what its
    caches hold well."""
    budget = 2 * pairs * max_token_length
    return budget if on_gpu else min(budget, CPU_POSITIONS)


def pair_costs(indices: np.ndarray, table: PairTable, layout: str, area_cost: float) -> np.ndarray:
    """[n] what each pair costs on its own, in tokens."""
    return _work(_units(indices, table, layout, 1), table, layout).cost(area_cost)


def attention_cost(body_parameters: int, layers: int, attention_width: int) -> float:
    """FLOPs of a query-key product (12 * layers * width) over those of a token (6 * body_parameters)."""
    return 2.0 * layers * attention_width / body_parameters


def _units(indices: np.ndarray, table: PairTable, layout: str, most: int) -> Units:
    """What is dealt: pairs, or up to `most` pairs of one prompt where the layout shares it, in order of appearance."""
    here = np.arange(len(indices))
    if layout != "shared_prefix" or most == 1:
        return Units(indices, here, np.ones_like(here))
    _, first, prompt = np.unique(table.cut_prompt_ids(indices), return_index=True, return_inverse=True)
    appeared = first[prompt]  # where the prompt of each pair is first
    order = np.argsort(appeared, kind="stable")
    place = here - np.searchsorted(appeared[order], appeared[order])  # of a pair among those of its prompt
    starts = np.flatnonzero(place % most == 0)
    return Units(indices[order], starts, np.diff(starts, append=len(indices)))


def _work(units: Units, table: PairTable, layout: str) -> Work:
    """Tokens and area of each unit, its pairs computed together (for `padded`: of a single pair on its own)."""
    members, starts = units.members(), units.starts()
    chosen, rejected = table.chosen_length[members], table.rejected_length[members]
    if layout == "padded":
        longest = np.maximum.reduceat(np.maximum(chosen, rejected), starts)
        return Work(2 * units.size * longest, units.size * longest**2)
    if layout == "packed":
        area = np.add.reduceat(chosen**2 + rejected**2, starts) // 2
        return Work(np.add.reduceat(chosen + rejected, starts), area)
    shared = table.shared_length[members]
    area = shared**2 // 2 + _suffix_area(shared, chosen - shared) + _suffix_area(shared, rejected - shared)
    tokens, area = np.add.reduceat(chosen + rejected - shared, starts), np.add.reduceat(area, starts)
    several = np.flatnonzero(units.size > 1)
    together = _work_together(units.take(several), table)
    fewer = together.tokens <= tokens[several]  # layouts.py decides the same way
    tokens[several[fewer]], area[several[fewer]] = together.tokens[fewer], together.area[fewer]
    return Work(tokens, area)


def _work_together(units: Units, table: PairTable) -> Work:
    """Tokens and area where all sequences of a unit share one prefix and equal ones are computed once."""
    members, starts = units.members(), units.starts()
    prefix = np.minimum.reduceat(np.minimum(table.prompt_length[members], table.shared_length[members]), starts)
    unit = np.tile(np.repeat(np.arange(len(units.size)), units.size), 2)
    ids = np.concatenate((table.chosen_id[members], table.rejected_id[members]))
    lengths = np.concatenate((table.chosen_length[members], table.rejected_length[members]))
    order = np.lexsort((ids, unit))  # equal sequences of a unit stand side by side
    unit, ids, lengths = unit[order], ids[order], lengths[order]
    distinct = (np.diff(unit, prepend=-1) != 0) | (np.diff(ids, prepend=0) != 0)
    unit = unit[distinct]
    suffix = lengths[distinct] - prefix[unit]
    starts = np.searchsorted(unit, np.arange(len(units.size)))
    area = prefix**2 // 2 + np.add.reduceat(_suffix_area(prefix[unit], suffix), starts)
    return Work(prefix + np.add.reduceat(suffix, starts), area)


def _suffix_area(prefix: np.ndarray, suffix: np.ndarray) -> np.ndarray:
    """Query-key products of `suffix` tokens that continue `prefix` tokens."""
    return suffix * prefix + suffix**2 // 2


def _best_candidate(indices: np.ndarray, table: PairTable, rules: BatchRules, world_size: int) -> Candidate:
    """Pairs of one prompt belong together, since they share it; but few large groups cannot be dealt evenly. So groups
    are cut smaller as long as that takes more than a hundredth off the largest load."""
    smaller = (4, 2, 1) if rules.layout == "shared_prefix" and world_size > 1 else ()
    best, dealt = None, 0
    for most in (len(indices), *smaller):
        units = _units(indices, table, rules.layout, most)
        if len(units.size) == dealt:
            continue  # the same units as before
        dealt = len(units.size)
        costs = _work(units, table, rules.layout).cost(rules.area_cost)
        # However they are dealt, a rank has at least the mean and one has the largest unit. 0.991: sums are rounded.
        if best is not None and max(costs.sum() / world_size, costs.max()) > 0.991 * best.loads.max():
            continue
        candidate = _candidate(units, costs, world_size)
        if best is None or candidate.loads.max() < 0.99 * best.loads.max():
            best = candidate
    return best


def _candidate(units: Units, costs: np.ndarray, world_size: int) -> Candidate:
    shares = [np.array(share, np.int64) for share in _deal(costs, world_size)]
    return Candidate([units.take(share) for share in shares], np.array([costs[share].sum() for share in shares]))


def _deal(costs: np.ndarray, world_size: int) -> list[list[int]]:
    """Longest first to the least loaded rank, then swaps between the most loaded rank and others."""
    order = np.argsort(-costs, kind="stable").tolist()
    if world_size == 1:
        return [order]
    heap = [(0.0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for i, cost in zip(order, costs[order].tolist(), strict=True):
        load, rank = heap[0]
        shares[rank].append(i)
        heapq.heapreplace(heap, (load + cost, rank))
    loads = np.array([costs[share].sum() for share in shares])
    for _ in range(min(SWAPS, SWAPS_TIMES_UNITS // len(costs))):
        high = int(loads.argmax())
        if loads[high] <= BALANCED * loads.mean() or not _improve(costs, shares, loads, high):
            break
    return shares


@dataclass(frozen=True)
class Exchange:
    """Unit `given` of the most loaded rank's share goes to rank `low`, whose unit `taken` comes back.

    taken: len(share) where nothing comes back.  moved: by how much the loads change.  larger: the larger load after it.
    """

    low: int
    given: int
    taken: int
    moved: float
    larger: float


def _improve(costs: np.ndarray, shares: list[list[int]], loads: np.ndarray, high: int) -> bool:
    """Move or swap one unit of rank `high` so that the larger of two loads falls most; False if none does."""
    best, larger, mine = None, loads[high] * (1 - 1e-9), costs[shares[high]]
    for low in [rank for rank in np.argsort(loads)[:16].tolist() if rank != high]:
        exchange = _best_exchange(mine, costs[shares[low]], loads, high, low)
        if exchange.larger < larger:
            best, larger = exchange, exchange.larger
    if best is None:
        return False
    given = shares[high].pop(best.given)
    if best.taken < len(shares[best.low]):
        shares[high].append(shares[best.low].pop(best.taken))
    shares[best.low].append(given)
    loads[high] -= best.moved
    loads[best.low] += best.moved
    return True


def _best_exchange(mine: np.ndarray, theirs: np.ndarray, loads: np.ndarray, high: int, low: int) -> Exchange:
    """The exchange that leaves the larger load smallest; of equal ones the first unit given, then the first taken.

    Not every pair of units is looked at. For a unit given the larger load falls and then rises with what comes back, so
    only what would make the loads equal matters, and the values beside it (two a side, since sums are rounded).
    """
    theirs = np.append(theirs, 0.0)  # the last: nothing comes back
    back = theirs
    if len(mine) * len(theirs) > EXCHANGES:
        values = np.unique(theirs)
        equal = np.searchsorted(values, mine - (loads[high] - loads[low]) / 2)
        back = values[np.clip(equal[:, None] + np.arange(-2, 3), 0, len(values) - 1)]
    moved = mine[:, None] - back
    given = int(np.maximum(loads[high] - moved, loads[low] + moved).min(axis=1).argmin())
    moved = mine[given] - theirs
    larger = np.maximum(loads[high] - moved, loads[low] + moved)
    taken = int(larger.argmin())
    return Exchange(low, given, taken, moved[taken], larger[taken])


def _cut(share: Units, table: PairTable, layout: str, max_tokens: int) -> list[Part]:
    """A share to micro-batches of at most `max_tokens` positions."""
    if layout == "padded":
        return _cut_padded(share.members(), table, max_tokens)
    pieces, sizes = _pieces(share, table, layout, max_tokens)
    order = np.argsort(-sizes, kind="stable")  # first fit, largest first
    bins = _first_fit(sizes[order].tolist(), max_tokens)
    pairs_of_bins = np.bincount(bins, weights=pieces.size[order]).astype(np.int64)
    return _parts(pieces.take(order[np.argsort(bins, kind="stable")]).members(), pairs_of_bins)


def _pieces(share: Units, table: PairTable, layout: str, max_tokens: int) -> tuple[Units, np.ndarray]:
    """The share's units from last to first, halved until they fit or are single pairs, and the tokens of each.

    Their order decides between pieces of equal size, nothing else.
    """
    tokens = _work(share, table, layout).tokens
    while (large := (share.size > 1) & (tokens > max_tokens)).any():
        half = np.where(large, share.size // 2, 0)
        first = np.stack((share.first, share.first + half), axis=1).ravel()
        size = np.stack((half, share.size - half), axis=1).ravel()
        share = Units(share.pairs, first, size).take(size > 0)
        tokens, halves = np.repeat(tokens, 1 + large), np.repeat(large, 1 + large)
        tokens[halves] = _work(share.take(halves), table, layout).tokens
    return share.take(slice(None, None, -1)), tokens[::-1]


def _first_fit(sizes: list[int], capacity: int) -> np.ndarray:
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
    return np.array(bins, np.int64)


def _cut_padded(pairs: np.ndarray, table: PairTable, max_tokens: int) -> list[Part]:
    """Pairs sorted by length, so that a micro-batch holds similar lengths and little padding."""
    longest = np.maximum(table.chosen_length[pairs], table.rejected_length[pairs])
    order = np.argsort(longest, kind="stable")
    sizes: list[int] = []
    for length in longest[order].tolist():
        if sizes and 2 * (sizes[-1] + 1) * length <= max_tokens:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return _parts(pairs[order], np.array(sizes, np.int64))


def _parts(pairs: np.ndarray, sizes: np.ndarray) -> list[Part]:
    """Consecutive parts of the given sizes."""
    ends = np.cumsum(sizes)
    return [Part(pairs[end - size : end], size) for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]
