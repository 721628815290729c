"""Which rank takes which units of work: by their cost, and by the header that each needs.

The slowest rank decides how long a step takes, so its load is what is made small.
"""

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

SWAPS = 400  # most improvements tried after the first deal
SWAPS_TIMES_UNITS = 8_000_000  # most of this product: fewer are tried where more than 20,000 units are dealt
EXCHANGES = 5_000  # between two ranks: up to so many are all looked at, of more only those that matter
NOTHING = -1  # in the place of a unit
BALANCED = 1.01  # max over mean cost at which it stops
# A rank takes no second header while others that have the unit's stay below the mean load times this; the best is kept.
ROOM = (1.0, 1.03, 1.1, 1.25)


def deal_by_cost(costs: np.ndarray, world_size: int) -> list[list[int]]:
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
        # stable: the order that numpy's fastest sort gives equal loads depends on the CPU, and every rank has to find the
        # same deal
        lows = [rank for rank in np.argsort(loads, kind="stable")[:16].tolist() if rank != high]
        if loads[high] <= BALANCED * loads.mean() or not _improve(costs, shares, loads, high, lows):
            break
    return shares


def deal_by_header(costs: np.ndarray, number: np.ndarray, headers: np.ndarray, world_size: int) -> list[list[int]]:
    """So that few ranks need the same header: a rank that has the header of a unit takes it while it has room.

    costs: [units] without headers.  number: [units] header of each, 0: none.  headers: [1 + headers] costs; none costs 0.
    """
    order = np.argsort(-costs, kind="stable")
    order = order[np.argsort(number[order], kind="stable")]  # header by header, the costliest unit first
    groups = [group.tolist() for group in np.split(order, np.flatnonzero(np.diff(number[order])) + 1)]
    of_group = [int(number[group[0]]) for group in groups]
    sums = [costs[group].sum() + headers[i] for group, i in zip(groups, of_group, strict=True)]
    # What has a header first, the largest sum first: what has none fits everywhere.
    by_sum = sorted(range(len(groups)), key=lambda g: (of_group[g] == 0, -sums[g]))
    groups = [(groups[g], float(headers[of_group[g]])) for g in by_sum]
    tried = [_filled(costs, groups, world_size, room * sum(sums) / world_size) for room in ROOM]
    loads, shares = min(tried, key=lambda one: max(one[0]))
    _swap_behind_headers(costs, shares, np.array(loads))
    return [list(itertools.chain(*of_rank)) for of_rank in zip(*shares, strict=True)]


def _filled(
    costs: np.ndarray, groups: list[tuple[list[int], float]], world_size: int, room: float
) -> tuple[list[float], list[list[list[int]]]]:
    """([ranks] loads, [groups][ranks] units). groups: units with the same header, and its cost.  room: load of a rank up to
    which it is filled before another one takes the header, too."""
    costs = costs.tolist()
    without = [(0.0, rank) for rank in range(world_size)]  # ranks that lack the header, a heap by load
    shares: list[list[list[int]]] = []
    for units, header in groups:
        shares.append([[] for _ in range(world_size)])
        behind: list[tuple[float, int]] = []  # those that have it
        for i in units:
            there = behind[0][0] + costs[i] if behind else float("inf")
            new = without[0][0] + header + costs[i] if without else float("inf")
            if there <= max(room if header else 0.0, new):
                rank = behind[0][1]
                heapq.heapreplace(behind, (there, rank))
            else:
                rank = heapq.heappop(without)[1]
                heapq.heappush(behind, (new, rank))
            shares[-1][rank].append(i)
        for one in behind:
            heapq.heappush(without, one)
    return [load for load, _ in sorted(without, key=lambda one: one[1])], shares


def _swap_behind_headers(costs: np.ndarray, shares: list[list[list[int]]], loads: np.ndarray) -> None:
    """Swaps between the most loaded rank and others that have the same header. shares: [groups][ranks], changed."""
    tries = min(SWAPS, SWAPS_TIMES_UNITS // len(costs))
    costs = np.append(costs, 0.0)  # costs[NOTHING]
    for _ in range(tries):
        high = int(loads.argmax())
        order = np.argsort(loads, kind="stable").tolist()
        if loads[high] <= BALANCED * loads.mean():
            return
        for of_group in (group for group in shares if group[high]):
            lows = [rank for rank in order if rank != high and of_group[rank]][:16]
            if lows and _improve(costs, of_group, loads, high, lows):
                break
        else:
            return


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


def _improve(costs: np.ndarray, shares: list[list[int]], loads: np.ndarray, high: int, lows: list[int]) -> bool:
    """Move or swap one unit between rank `high` and one of `lows` so that the larger of two loads falls most; False if none
    does.

    costs: [units + 1], that of NOTHING last.
    """
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
