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
import itertools
from dataclasses import dataclass

import numpy as np

from open_rm.batching.rules import BatchRules
from open_rm.data.pairs import PairTable

SWAPS = 400  # most improvements tried after the first deal
SWAPS_TIMES_UNITS = 8_000_000  # most of this product: fewer are tried where more than 20,000 units are dealt
EXCHANGES = 5_000  # between two ranks: up to so many are all looked at, of more only those that matter
NOTHING = -1  # in the place of a unit
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
    """A way to deal a step.

    units: one rank's after another's.  rank: [units] whose each is.  loads: [ranks] cost.
    """

    units: Units
    rank: np.ndarray
    loads: np.ndarray


def deal_step(indices: np.ndarray, table: PairTable, rules: BatchRules, world_size: int) -> Deal:
    """Deal a step's pairs to the ranks and cut each share into micro-batches of at most `rules.max_tokens` positions.

    indices: [pairs] of the step, into the table. Every rank finds the same.
    """
    best = _best_candidate(indices, table, rules, world_size)
    cheapest = indices[np.argmin(table.chosen_length[indices] + table.rejected_length[indices])]
    filler = Part(np.array([cheapest]), counted=0)
    ranks = _cut(best, table, rules.layout, rules.max_tokens)
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
    shares = _deal(costs, world_size)
    rank = np.repeat(np.arange(world_size), [len(share) for share in shares])
    loads = np.array([costs[share].sum() for share in shares])
    return Candidate(units.take(np.array(list(itertools.chain(*shares)))), rank, loads)


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
    costs = np.append(costs, 0.0)  # costs[NOTHING]
    for _ in range(min(SWAPS, SWAPS_TIMES_UNITS // len(order))):
        high = int(loads.argmax())
        if loads[high] <= BALANCED * loads.mean() or not _improve(costs, shares, loads, high):
            break
    return shares


@dataclass(frozen=True)
class Exchange:
    """Unit `given` of the most loaded rank's share goes to another, number `low` of those looked at, whose unit `taken`
    comes back.

    taken: len(share) where nothing comes back.  moved: by how much the loads change.  larger: the larger load after it.
    """

    low: int
    given: int
    taken: int
    moved: float
    larger: float


def _improve(costs: np.ndarray, shares: list[list[int]], loads: np.ndarray, high: int) -> bool:
    """Move or swap one unit of rank `high` so that the larger of two loads falls most; False if none does.

    costs: [units + 1], that of NOTHING last.
    """
    # stable: the order that numpy's fastest sort gives equal loads depends on the CPU, and every rank has to find the same deal
    lows = [rank for rank in np.argsort(loads, kind="stable")[:16].tolist() if rank != high]
    most = 1 + max(len(shares[low]) for low in lows)
    theirs = costs[[shares[low] + [NOTHING] * (most - len(shares[low])) for low in lows]]
    best = _best_exchange(costs[shares[high]], theirs, loads[high], loads[lows])
    if best.larger >= loads[high] * (1 - 1e-9):
        return False
    low = lows[best.low]
    given = shares[high].pop(best.given)
    if best.taken < len(shares[low]):
        shares[high].append(shares[low].pop(best.taken))
    shares[low].append(given)
    loads[high] -= best.moved
    loads[low] += best.moved
    return True


def _best_exchange(mine: np.ndarray, theirs: np.ndarray, load: float, loads: np.ndarray) -> Exchange:
    """The exchange that leaves the larger of two loads smallest; of equal ones the first rank, unit given, unit taken.

    mine: [units] costs of the most loaded rank's.  theirs: [ranks, most] those of others', 0 where nothing comes back.
    load, loads: [ranks] of these ranks.
    """
    back = theirs[:, None]
    if len(mine) * theirs.shape[1] > EXCHANGES:
        back = np.stack([_worth_taking(mine, row, load - low) for row, low in zip(theirs, loads, strict=True)])
    moved = mine[:, None] - back  # [ranks, mine, what comes back]
    larger = np.maximum(load - moved, loads[:, None, None] + moved).min(axis=2)
    low, given = divmod(int(larger.argmin()), len(mine))
    moved = mine[given] - theirs[low]
    larger = np.maximum(load - moved, loads[low] + moved)
    taken = int(larger.argmin())
    return Exchange(low, given, taken, moved[taken], larger[taken])


def _worth_taking(mine: np.ndarray, theirs: np.ndarray, ahead: float) -> np.ndarray:
    """[mine, 5] of the costs `theirs` those that can be best in return for each of `mine`. ahead: by how much loads differ.

    For a unit given the larger load falls and then rises with what comes back, so only what would make the loads equal
    matters, and the values beside it (two a side, since sums are rounded).
    """
    values = np.unique(theirs)
    equal = np.searchsorted(values, mine - ahead / 2)
    return values[np.clip(equal[:, None] + np.arange(-2, 3), 0, len(values) - 1)]


def _cut(dealt: Candidate, table: PairTable, layout: str, max_tokens: int) -> list[list[Part]]:
    """The share of each rank to micro-batches of at most `max_tokens` positions.

    All ranks' pieces are sorted, and become arrays of pairs, in one go: rank by rank this was most of a step's planning.
    """
    if layout == "padded":
        pieces, rank, sizes = dealt.units, dealt.rank, _work(dealt.units, table, layout).tokens
        order, fit = np.lexsort((sizes, rank)), _similar
    else:
        pieces, rank, sizes = _pieces(dealt.units, dealt.rank, table, layout, max_tokens)
        order, fit = np.lexsort((-sizes, rank)), _first_fit
    sizes = sizes[order].tolist()
    ends = np.cumsum(np.bincount(rank, minlength=len(dealt.loads))).tolist()
    bins: list[int] = []  # of each piece, numbered through all ranks
    first = [0]  # the first bin of each rank
    for start, end in itertools.pairwise([0, *ends]):
        of_rank = fit(sizes[start:end], max_tokens)
        bins += [first[-1] + number for number in of_rank]
        first.append(first[-1] + 1 + max(of_rank, default=-1))
    bin_of = np.array(bins)
    pairs = pieces.take(order[np.argsort(bin_of, kind="stable")]).members()
    pairs_of_bins = np.bincount(bin_of, weights=pieces.size[order]).astype(np.int64)
    parts = [
        Part(pairs[end - size : end], size)
        for end, size in zip(np.cumsum(pairs_of_bins).tolist(), pairs_of_bins.tolist(), strict=True)
    ]
    return [parts[start:end] for start, end in itertools.pairwise(first)]


def _pieces(
    units: Units, rank: np.ndarray, table: PairTable, layout: str, max_tokens: int
) -> tuple[Units, np.ndarray, np.ndarray]:
    """The units from last to first, halved until they fit or are single pairs, and the rank and the tokens of each.

    Their order decides between pieces of equal size, nothing else.
    """
    tokens = _work(units, table, layout).tokens
    while (large := (units.size > 1) & (tokens > max_tokens)).any():
        half = np.where(large, units.size // 2, 0)
        first = np.stack((units.first, units.first + half), axis=1).ravel()
        size = np.stack((half, units.size - half), axis=1).ravel()
        units = Units(units.pairs, first, size).take(size > 0)
        rank, tokens, halves = (np.repeat(column, 1 + large) for column in (rank, tokens, large))
        tokens[halves] = _work(units.take(halves), table, layout).tokens
    return units.take(slice(None, None, -1)), rank[::-1], tokens[::-1]


def _first_fit(sizes: list[int], capacity: int) -> list[int]:
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


def _similar(sizes: list[int], capacity: int) -> list[int]:
    """[n] the bin of each padded pair, given shortest first: a bin is filled before the next, so that it holds similar
    lengths and little padding. Each takes as much as the last of its bin."""
    bins: list[int] = []
    number, held = -1, 0  # of the last bin, pairs in it
    for size in sizes:
        if not bins or (held + 1) * size > capacity:
            number, held = number + 1, 0
        bins.append(number)
        held += 1
    return bins
