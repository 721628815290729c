"""Which rank takes which pairs of a step, and how a rank's share is cut into micro-batches.

Dealing the pairs out follows cost (tokens and attention), so that no rank waits long for another; neither the deal nor
the cutting changes the sum over the step's pairs, and so not the mathematics. Every rank makes the same number of
micro-batches, because under ZeRO-3 each forward is a collective call; a rank that runs out computes a pair again that
counts for nothing.

Prompts that begin alike share that beginning, a header, which costs once in each micro-batch (headers.py). Pairs with the
same header are dealt together where that makes the slowest rank faster.

Each rank computes the whole deal: for the pairs of a step it takes milliseconds, and sending it around would take as
long. It takes time that grows about as the number of pairs, so that a whole held-out set can be dealt in one call.
Only columns of numbers are looked at here, never token ids.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from open_rm.batching.assigning import deal_by_cost, deal_by_header
from open_rm.batching.cutting import Part, cut, halved
from open_rm.batching.headers import Headers, find_headers
from open_rm.batching.rules import BatchRules
from open_rm.batching.work import Units, units_of, work_of
from open_rm.data.pairs import PairTable

CPU_POSITIONS = 1536  # positions of a forward that a CPU's caches hold well; with twice as many it was a tenth slower
# Times the length of a header that all prompts begin with, in positions of a micro-batch on a CPU. Behind 500 tokens, 2048 to 9216
# positions were equally fast within the noise; a sixteenth of what is computed is then the header.
HEADERS_HELD = 16
UNEVEN = 1.05  # most of the largest load over the mean, above which large groups are cut once more


@dataclass(frozen=True)
class Deal:
    """indices: the step's pairs.  ranks: the micro-batches of each rank.  imbalance: max over mean cost of the ranks."""

    indices: np.ndarray
    ranks: list[list[Part]]
    imbalance: float


@dataclass(frozen=True)
class Candidate:
    """A way to deal a step.

    units: one rank's after another's.  rank: [units] whose each is.  own: [ranks] cost without headers.
    loads: [ranks] cost with as many headers as filled micro-batches would compute.
    """

    units: Units
    rank: np.ndarray
    own: np.ndarray
    loads: np.ndarray


def deal_step(indices: np.ndarray, table: PairTable, rules: BatchRules, world_size: int) -> Deal:
    """Deal a step's pairs to the ranks and cut each share into micro-batches of at most `rules.max_tokens` positions.

    indices: [pairs] of the step, into the table. Every rank finds the same.
    """
    headers = find_headers(indices, table, rules.layout)
    best = _best_candidate(indices, table, headers, rules, world_size)
    cheapest = indices[np.argmin(table.chosen_length[indices] + table.rejected_length[indices])]
    filler = Part(np.array([cheapest]), counted=0)
    shares = cut(best.units, best.rank, headers, table, rules, world_size)
    forwards = max(len(parts) for parts in shares.ranks)
    ranks = [parts + [filler] * (forwards - len(parts)) for parts in shares.ranks]
    loads = best.own + shares.header_loads
    return Deal(indices, ranks, float(loads.max() / loads.mean()))


def micro_batch_budget(pairs: int, max_token_length: int, *, on_gpu: bool, header: int = 0) -> int:
    """Positions of a micro-batch where the user did not say: `pairs` of the greatest length, on a CPU at most what its
    caches hold well.

    header: tokens that most prompts begin with. It is computed once in each micro-batch, and a position of one that is
    twice as large costs a tenth more, so behind a long header on a CPU a micro-batch holds many times its length.
    """
    budget = 2 * pairs * max_token_length
    return budget if on_gpu else min(budget, max(CPU_POSITIONS, HEADERS_HELD * header))


def pair_costs(indices: np.ndarray, table: PairTable, layout: str, area_cost: float) -> np.ndarray:
    """[n] what each pair costs on its own, in tokens."""
    return work_of(units_of(indices, table, layout, 1), table, layout).cost(area_cost)


def attention_cost(body_parameters: int, layers: int, attention_width: int) -> float:
    """FLOPs of a query-key product (12 * layers * width) over those of a token (6 * body_parameters)."""
    return 2.0 * layers * attention_width / body_parameters


def _best_candidate(
    indices: np.ndarray, table: PairTable, headers: Headers, rules: BatchRules, world_size: int
) -> Candidate:
    """Pairs of one prompt belong together, since they share it; but few large groups cannot be dealt evenly. So groups are
    cut to what a micro-batch holds, and smaller as long as that takes more than a hundredth off the largest load: all of them,
    and where a rank would still be waited for, those above the mean load."""
    cuts = world_size > 1 and rules.layout == "shared_prefix" and not rules.whole_lists

    def to_deal(most: int, limit: int) -> ToDeal:
        units = units_of(indices, table, rules.layout, most, whole_lists=rules.whole_lists)
        tried = ToDeal.of(units, table, headers, rules)
        if not cuts or not tried.is_too_large(limit).any():
            return tried
        # What no micro-batch holds is cut in any case, and its halves together cost more.
        units, *_ = halved(units, np.zeros_like(units.size), table, dataclasses.replace(rules, max_tokens=limit))
        return ToDeal.of(units.take(slice(None, None, -1)), table, headers, rules)

    whole = to_deal(len(indices), rules.max_tokens)
    best, dealt = whole.candidate(world_size), {len(whole.units.size)}
    for most in (4, 2, 1) if cuts else ():
        tried = to_deal(most, rules.max_tokens)
        if len(tried.units.size) not in dealt:  # else the same units as before
            best = tried.better(best, world_size)
        dealt.add(len(tried.units.size))
    if cuts and best.loads.max() > UNEVEN * best.loads.mean():
        mean = int(whole.own.sum()) // world_size
        best = to_deal(len(indices), min(rules.max_tokens, mean)).better(best, world_size)
    return best


@dataclass(frozen=True)
class ToDeal:
    """Units to deal.

    costs, own: [units] cost and tokens without headers.  header: [units] number of each one's, 0: none.
    header_costs, header_tokens: [1 + headers].  room: [1 + headers] tokens that a micro-batch holds behind each.
    """

    units: Units
    costs: np.ndarray
    own: np.ndarray
    header: np.ndarray
    header_costs: np.ndarray
    header_tokens: np.ndarray
    room: np.ndarray

    @staticmethod
    def of(units: Units, table: PairTable, headers: Headers, rules: BatchRules) -> "ToDeal":
        header = headers.of(units, table)
        work = work_of(units, table, rules.layout).behind(headers.tokens[header])
        room = np.maximum(1, rules.max_tokens - headers.tokens)
        header_costs = headers.cost(rules.area_cost)
        return ToDeal(units, work.cost(rules.area_cost), work.tokens, header, header_costs, headers.tokens, room)

    def least(self, world_size: int) -> float:
        """Load that a rank has however they are dealt: the mean without headers, or the largest unit's."""
        return max(self.costs.sum() / world_size, (self.costs + self.header_costs[self.header]).max())

    def is_too_large(self, limit: int) -> np.ndarray:
        """[units] bool, of those of several pairs: whether one takes more than `limit` tokens, its header's among them."""
        return (self.units.size > 1) & (self.own + self.header_tokens[self.header] > limit)

    def better(self, best: Candidate, world_size: int) -> Candidate:
        """These units dealt, where that takes more than a hundredth off the largest load of `best`; else `best`."""
        # However they are dealt, a rank has at least the mean and one has the largest unit. 0.991: sums are rounded.
        if self.least(world_size) > 0.991 * best.loads.max():
            return best
        candidate = self.candidate(world_size)
        return candidate if candidate.loads.max() < 0.99 * best.loads.max() else best

    def candidate(self, world_size: int) -> Candidate:
        """Dealt as if each unit paid its part of the headers of filled micro-batches; and, where there are several headers,
        so that few ranks need the same one."""
        paid = self.costs
        if self.header.any():
            computed = np.minimum(self.own / self.room[self.header], self.units.size)
            paid = paid + computed * self.header_costs[self.header]
        ways = [deal_by_cost(paid, world_size)]
        if world_size > 1 and (self.header != self.header[0]).any():
            ways.append(deal_by_header(paid, self.header, self.header_costs, world_size))
        return min(map(self._candidate, ways), key=lambda candidate: candidate.loads.max())

    def _candidate(self, shares: list[list[int]]) -> Candidate:
        rank = np.repeat(np.arange(len(shares)), [len(share) for share in shares])
        own = np.array([self.costs[share].sum() for share in shares])
        order = np.array(list(itertools.chain(*shares)))
        return Candidate(self.units.take(order), rank, own, own + self._header_loads(order, rank, len(shares)))

    def _header_loads(self, order: np.ndarray, rank: np.ndarray, world_size: int) -> np.ndarray:
        """[ranks] cost of the headers of each: each as often as it takes micro-batches for the tokens behind it, at most
        once a pair."""
        if not self.header.any():
            return np.zeros(world_size)
        keys, which = np.unique(rank * len(self.room) + self.header[order], return_inverse=True)
        where, header = np.divmod(keys, len(self.room))
        filled = np.ceil(np.bincount(which, weights=self.own[order]) / self.room[header])
        computed = np.minimum(filled, np.bincount(which, weights=self.units.size[order]))
        return np.bincount(where, weights=computed * self.header_costs[header], minlength=world_size)
