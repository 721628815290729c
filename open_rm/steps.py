"""Which pairs form a step, which rank takes which of them, and how a rank's share is cut into micro-batches.

A step is a fixed set of pairs decided by (seed, epoch, step), whatever the layout and the number of ranks. Dealing them
out follows cost (tokens and attention), so that no rank waits long for another; neither the deal nor the cutting changes
the sum over the step's pairs, and so not the mathematics. Every rank makes the same number of micro-batches, because
under ZeRO-3 each forward is a collective call; a rank that runs out computes a pair again that counts for nothing.

Each rank computes the whole deal: it takes milliseconds, and sending it around would take as long.
Only columns of numbers are looked at here, never token ids.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LAYOUTS = ("padded", "packed", "shared_prefix")
LOOKAHEAD_GROUPS = 64  # how far a grouped step looks for a group that still fits
SWAPS = 400  # most improvements tried after the first deal
CPU_POSITIONS = 1536  # positions of a forward that a CPU's caches hold well; with twice as many it was a tenth slower
BALANCED = 1.01  # max over mean cost at which it stops


@dataclass(frozen=True)
class PairTable:
    """What is known of each pair without its tokens. All [pairs].

    chosen_length, rejected_length: tokens.  shared_length: tokens that the two sides have in common from the start.
    prompt_length: tokens of the prompt.  chosen_id, rejected_id: equal where the tokens are equal.
    prompt_id: equal where the prompts were equal before they were cut; a pair without a prompt has one of its own.
    """

    chosen_length: np.ndarray
    rejected_length: np.ndarray
    shared_length: np.ndarray
    prompt_length: np.ndarray
    prompt_id: np.ndarray
    chosen_id: np.ndarray
    rejected_id: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen_length)

    def prompts(self, indices: np.ndarray) -> np.ndarray:
        """[n] equal where the prompts' tokens are, since answers of several lengths cut one prompt to several lengths.

        Of a prompt that was cut, the last token may still differ where the tokenizer merges it with an answer.
        """
        return self.prompt_id[indices] ^ (self.prompt_length[indices] << 40)  # ids are hashes, all their bits random


@dataclass(frozen=True)
class Work:
    """What computing some pairs together takes. tokens: positions in memory.  area: query-key products."""

    tokens: int
    area: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.area + other.area)


@dataclass(frozen=True)
class MicroBatch:
    """Pairs to compute together. The first `counted` of them enter loss and metrics (0: only keeps ranks in step)."""

    indices: np.ndarray
    counted: int


@dataclass(frozen=True)
class StepPlan:
    """indices: the step's pairs.  ranks: the micro-batches of each rank.  imbalance: max over mean cost of the ranks."""

    indices: np.ndarray
    ranks: list[list[MicroBatch]]
    imbalance: float


def draw_steps(
    pairs: int, pairs_per_step: int, total_episodes: int, seed: int, *, prompt_ids: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """The pair indices of each optimizer step, in order; stops after `total_episodes` pairs.

    Each epoch is a permutation from (seed, epoch), and no step crosses an epoch, so an epoch's last step may be smaller.

    Args:
        prompt_ids: [pairs], to keep the pairs of a prompt in one step (InstructGPT, https://arxiv.org/abs/2203.02155,
            section 3.5: one batch element per prompt). Prompts are drawn then; a step is filled as far as groups fit,
            and only a group larger than a step is cut.
    """
    epoch = 0
    while total_episodes > 0:
        rng = np.random.default_rng((seed, epoch))
        if prompt_ids is None:
            order = rng.permutation(pairs)
            drawn = (order[start : start + pairs_per_step] for start in range(0, pairs, pairs_per_step))
        else:
            drawn = _grouped(prompt_ids, pairs_per_step, rng)
        for step in drawn:
            step = step[:total_episodes]
            total_episodes -= len(step)
            if len(step):
                yield step
        epoch += 1


def _grouped(prompt_ids: np.ndarray, pairs_per_step: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    groups = groups_of(prompt_ids)
    pending = deque(groups[i] for i in rng.permutation(len(groups)))
    while pending:
        step, size, passed = [], 0, []
        while pending and size < pairs_per_step and len(passed) < LOOKAHEAD_GROUPS:
            group = pending.popleft()
            if len(group) > pairs_per_step:
                pending.appendleft(group[pairs_per_step - size :])
                group = group[: pairs_per_step - size]
            if size + len(group) <= pairs_per_step:
                step.append(group)
                size += len(group)
            else:
                passed.append(group)
        pending.extendleft(reversed(passed))
        yield np.concatenate(step)


def groups_of(ids: np.ndarray) -> list[np.ndarray]:
    """Positions of equal ids, as one array per id, in order of first appearance."""
    order = np.argsort(ids, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
    return sorted(parts, key=lambda part: part[0]) if len(ids) else []


def plan_step(
    indices: np.ndarray, table: PairTable, *, layout: str, world_size: int, max_tokens: int, area_cost: float = 0.0
) -> StepPlan:
    """Deal a step's pairs to the ranks and cut each share into micro-batches.

    Args:
        max_tokens: most positions of a micro-batch, padding included; a single pair may be longer.
        area_cost: cost of a query-key product in units of a token's cost (see `attention_cost`).
    """
    best = None
    # Pairs of one prompt belong together, since they share it; but few large groups cannot be dealt evenly.
    for most in (len(indices), 4, 2, 1) if layout == "shared_prefix" and world_size > 1 else (len(indices),):
        units = _units(indices, table, layout, most)
        costs = np.array([_cost(_work(unit, table, layout), area_cost) for unit in units])
        shares = _deal(costs, world_size)
        loads = np.array([costs[share].sum() for share in shares])
        if best is None or loads.max() < 0.99 * best[0]:
            best = loads.max(), loads.max() / loads.mean(), [[units[i] for i in share] for share in shares]
    _, imbalance, shares = best
    cheapest = indices[np.argmin(table.chosen_length[indices] + table.rejected_length[indices])]
    filler = MicroBatch(np.array([cheapest]), counted=0)
    ranks = [_cut(share, table, layout, max_tokens) for share in shares]
    most = max(len(parts) for parts in ranks)
    return StepPlan(indices, [parts + [filler] * (most - len(parts)) for parts in ranks], float(imbalance))


def micro_batch_budget(pairs: int, max_token_length: int, *, on_gpu: bool) -> int:
    """Positions of a micro-batch where the user did not say: `pairs` of the greatest length, on a CPU at most what its
    caches hold well."""
    budget = 2 * pairs * max_token_length
    return budget if on_gpu else min(budget, CPU_POSITIONS)


def pair_costs(indices: np.ndarray, table: PairTable, layout: str, area_cost: float) -> np.ndarray:
    """[n] what each pair costs on its own, in tokens."""
    return np.array([_cost(_work(indices[i : i + 1], table, layout), area_cost) for i in range(len(indices))])


def attention_cost(body_parameters: int, layers: int, attention_width: int) -> float:
    """FLOPs of a query-key product (12 * layers * width) over those of a token (6 * body_parameters)."""
    return 2.0 * layers * attention_width / body_parameters


def _units(indices: np.ndarray, table: PairTable, layout: str, most: int) -> list[np.ndarray]:
    """What is dealt: pairs, or up to `most` pairs of one prompt where the layout shares it."""
    if layout != "shared_prefix" or most == 1:
        return [indices[i : i + 1] for i in range(len(indices))]
    groups = [indices[group] for group in groups_of(table.prompts(indices))]
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]


def _work(unit: np.ndarray, table: PairTable, layout: str) -> Work:
    """Tokens and area of pairs of one prompt computed together (for `padded`: of a single pair on its own)."""
    chosen, rejected = table.chosen_length[unit], table.rejected_length[unit]
    if layout == "padded":
        longest = int(max(chosen.max(), rejected.max()))
        return Work(2 * len(unit) * longest, len(unit) * longest**2)
    if layout == "packed":
        return Work(int((chosen + rejected).sum()), int((chosen**2 + rejected**2).sum()) // 2)
    apart = [
        _tree_work(int(prefix), pair)
        for prefix, pair in zip(
            table.shared_length[unit], zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True
        )
    ]
    alone = sum(apart[1:], apart[0])
    if len(unit) == 1:
        return alone
    ids = np.concatenate((table.chosen_id[unit], table.rejected_id[unit]))
    _, first = np.unique(ids, return_index=True)
    prefix = int(min(table.prompt_length[unit].min(), table.shared_length[unit].min()))
    together = _tree_work(prefix, np.concatenate((chosen, rejected))[first].tolist())
    return min(together, alone, key=lambda work: work.tokens)  # batching.shared_prefix_batch decides the same way


def _tree_work(prefix: int, lengths: Sequence[int]) -> Work:
    """Sequences of the given lengths that share their first `prefix` tokens."""
    suffixes = [length - prefix for length in lengths]
    area = prefix * prefix // 2 + sum(suffix * prefix + suffix * suffix // 2 for suffix in suffixes)
    return Work(prefix + sum(suffixes), area)


def _cost(work: Work, area_cost: float) -> float:
    return work.tokens + area_cost * work.area


def _deal(costs: np.ndarray, world_size: int) -> list[list[int]]:
    """Longest first to the least loaded rank, then swaps between the most loaded rank and others."""
    heap = [(0.0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for i in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(heap)
        shares[rank].append(i)
        heapq.heappush(heap, (load + costs[i], rank))
    if world_size == 1:
        return shares
    loads = np.array([costs[share].sum() for share in shares])
    for _ in range(SWAPS):
        high = int(loads.argmax())
        if loads[high] <= BALANCED * loads.mean() or not _improve(costs, shares, loads, high):
            break
    return shares


def _improve(costs: np.ndarray, shares: list[list[int]], loads: np.ndarray, high: int) -> bool:
    """Move or swap one unit of rank `high` so that the larger of two loads falls most; False if none does."""
    best = (loads[high] * (1 - 1e-9), None)
    mine = costs[shares[high]]
    for low in np.argsort(loads)[:16].tolist():
        if low == high:
            continue
        theirs = np.append(costs[shares[low]], 0.0)  # the last: nothing comes back
        moved = mine[:, None] - theirs[None, :]
        worse = np.maximum(loads[high] - moved, loads[low] + moved)
        i, j = np.unravel_index(worse.argmin(), worse.shape)
        if worse[i, j] < best[0]:
            best = (worse[i, j], (low, int(i), int(j), moved[i, j]))
    if best[1] is None:
        return False
    low, i, j, moved = best[1]
    given = shares[high].pop(i)
    if j < len(shares[low]):
        shares[high].append(shares[low].pop(j))
    shares[low].append(given)
    loads[high] -= moved
    loads[low] += moved
    return True


def _cut(units: list[np.ndarray], table: PairTable, layout: str, max_tokens: int) -> list[MicroBatch]:
    """A share to micro-batches of at most `max_tokens` positions."""
    if layout == "padded":
        return _cut_padded(units, table, max_tokens)
    pieces, waiting = [], list(units)
    while waiting:
        unit = waiting.pop()
        if len(unit) > 1 and _work(unit, table, layout).tokens > max_tokens:
            waiting += [unit[: len(unit) // 2], unit[len(unit) // 2 :]]
        else:
            pieces.append(unit)
    sizes = [_work(piece, table, layout).tokens for piece in pieces]
    bins: list[list[np.ndarray]] = []
    room: list[int] = []
    for i in np.argsort(-np.array(sizes), kind="stable").tolist():  # first fit, largest first
        place = next((b for b, left in enumerate(room) if left >= sizes[i]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[place].append(pieces[i])
        room[place] -= sizes[i]
    return [MicroBatch(np.concatenate(pieces), sum(map(len, pieces))) for pieces in bins]


def _cut_padded(units: list[np.ndarray], table: PairTable, max_tokens: int) -> list[MicroBatch]:
    """Pairs sorted by length, so that a micro-batch holds similar lengths and little padding."""
    indices = np.concatenate(units) if units else np.zeros(0, np.int64)
    longest = np.maximum(table.chosen_length, table.rejected_length)[indices]
    parts, current = [], []
    for i in np.argsort(longest, kind="stable").tolist():
        if current and 2 * (len(current) + 1) * longest[i] > max_tokens:
            parts.append(indices[current])
            current = []
        current.append(i)
    if current:
        parts.append(indices[current])
    return [MicroBatch(part, len(part)) for part in parts]
