"""Dealing many units at once is dealing them one by one, and takes time that grows with their number."""

import dataclasses
import itertools
import json
import os
import sys

import numpy as np
import pytest
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dealing import check_plan, preferences, real_batch, table_of

from open_rm.batching import assigning, cutting, dealing, headers, work
from open_rm.batching.headers import NONE
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.batching.work import units_of, work_of
from open_rm.data import prefixes
from open_rm.data.pairs import PairTable
from open_rm.data.prefix_order import PromptOrder
from open_rm.flags import ScheduleFlags
from open_rm.training.plan import make_plan

repeatable = settings(max_examples=100, deadline=None, derandomize=True)
amounts = st.integers(1, 30).map(float) | st.floats(0.01, 30)


def rules(layout: str, max_tokens: int, area_cost: float = 0.0) -> BatchRules:
    return BatchRules(layout, pad_token_id=0, max_tokens=max_tokens, evaluation_tokens=max_tokens, area_cost=area_cost)


def units_one_by_one(table: PairTable, layout: str, most: int) -> list[list[int]]:
    """All pairs of the table; those of one prompt, `most` at most, together where the layout shares it."""
    if layout != "shared_prefix" or most == 1:
        return [[i] for i in range(len(table))]
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(table.cut_prompt_ids(np.arange(len(table))).tolist()):
        groups.setdefault(prompt, []).append(i)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def work_of_unit(unit: list[int], table: PairTable, layout: str) -> tuple[int, int]:
    """Tokens and area of one unit in plain numbers."""
    sides = [(int(table.chosen_length[i]), int(table.rejected_length[i])) for i in unit]
    if layout == "padded":
        return 2 * len(unit) * max(map(max, sides)), len(unit) * max(map(max, sides)) ** 2
    if layout == "packed":
        return sum(map(sum, sides)), sum(x**2 + y**2 for x, y in sides) // 2

    def tree(prefix: int, lengths) -> tuple[int, int]:
        own = [length - prefix for length in lengths]
        return prefix + sum(own), prefix**2 // 2 + sum(n * prefix + n**2 // 2 for n in own)

    alone = [tree(int(table.shared_length[i]), pair) for i, pair in zip(unit, sides, strict=True)]
    apart = sum(tokens for tokens, _ in alone), sum(area for _, area in alone)
    distinct = {}
    for ids, side in ((table.chosen_id, 0), (table.rejected_id, 1)):
        distinct |= {int(ids[i]): pair[side] for i, pair in zip(unit, sides, strict=True)}
    together = tree(int(min(table.prompt_length[unit].min(), table.shared_length[unit].min())), distinct.values())
    return together if len(unit) > 1 and together[0] <= apart[0] else apart


@repeatable
@given(
    data=preferences() | preferences(own_beginnings=False),
    layout=st.sampled_from(LAYOUTS),
    most=st.sampled_from([1, 2, 4, 1000]),
)
def test_the_work_of_all_units_at_once_is_that_of_each(data, layout, most):
    _, table = data
    units = units_of(np.arange(len(table)), table, layout, most)
    expected = units_one_by_one(table, layout, most)
    assert [units.take([u]).members().tolist() for u in range(len(units.size))] == expected
    assert units.members().tolist() == sum(expected, [])
    work = work_of(units, table, layout)
    assert list(zip(work.tokens.tolist(), work.area.tolist(), strict=True)) == [
        work_of_unit(unit, table, layout) for unit in expected
    ]
    costs = [tokens + 0.01 * area for tokens, area in ([work_of_unit([i], table, layout) for i in range(len(table))])]
    assert dealing.pair_costs(np.arange(len(table)), table, layout, 0.01).tolist() == costs


def test_pairs_that_take_as_many_tokens_together_as_apart_are_computed_together():
    pairs = [([1, 1, 2, 9], [1, 1, 3]), ([1, 1, 4, 4, 5], [1, 1, 4, 4, 6, 6])]
    table = table_of(pairs, [2, 2])
    apart = [work_of_unit([i], table, "shared_prefix") for i in (0, 1)]
    work = work_of(units_of(np.arange(2), table, "shared_prefix", 2), table, "shared_prefix")
    batch = real_batch("shared_prefix", pairs, table, [0, 1])
    assert work.tokens.tolist() == [batch.positions] == [sum(tokens for tokens, _ in apart)]
    assert work.area.tolist() == [work_of_unit([0, 1], table, "shared_prefix")[1]] != [sum(area for _, area in apart)]


@repeatable
@given(data=preferences(), max_tokens=st.integers(1, 400))
def test_units_are_halved_until_they_fit(data, max_tokens):
    _, table = data

    def halved(unit: list[int]) -> list[list[int]]:
        if len(unit) == 1 or work_of_unit(unit, table, "shared_prefix")[0] <= max_tokens:
            return [unit]
        return halved(unit[: len(unit) // 2]) + halved(unit[len(unit) // 2 :])

    units = units_of(np.arange(len(table)), table, "shared_prefix", len(table))
    ranks = np.arange(len(units.size)) // 2  # two units a rank
    pieces, rank, tokens = cutting.halved(units, ranks, table, rules("shared_prefix", max_tokens))
    by_unit = list(map(halved, units_one_by_one(table, "shared_prefix", len(table))))
    expected = sum(by_unit, [])[::-1]
    assert [pieces.take([u]).members().tolist() for u in range(len(pieces.size))] == expected
    assert rank.tolist() == [number // 2 for number, halves in enumerate(by_unit) for _ in halves][::-1]
    assert tokens.tolist() == [work_of_unit(unit, table, "shared_prefix")[0] for unit in expected]


def first_fit(sizes: list[int], capacity: int) -> list[int]:
    """The first bin with enough room, looking through all."""
    room, bins = [], []
    for size in sizes:
        place = next((number for number, left in enumerate(room) if left >= size), len(room))
        if place == len(room):
            room.append(capacity)
        room[place] -= size
        bins.append(place)
    return bins


@repeatable
@given(sizes=st.lists(st.integers(1, 60), max_size=120), capacity=st.integers(1, 70))
def test_every_size_goes_to_the_first_bin_with_enough_room(sizes, capacity):
    sizes = sorted(sizes, reverse=True)
    assert cutting.first_fit(sizes, capacity) == first_fit(sizes, capacity)


def exchange_one_by_one(mine: list[float], theirs: list[list[float]], load: float, loads: list[float]) -> tuple:
    """(larger load, rank, unit given, unit taken, by how much loads change): the first of the best among all exchanges."""
    tried = []
    for low, costs in enumerate(theirs):
        for (given_unit, cost), (taken, back) in itertools.product(enumerate(mine), enumerate([*costs, 0.0])):
            moved = cost - back
            tried.append((max(load - moved, loads[low] + moved), low, given_unit, taken, moved))
    return min(tried)


@repeatable
@given(
    mine=st.lists(amounts, min_size=1, max_size=20),
    theirs=st.lists(st.lists(amounts, max_size=20), min_size=1, max_size=4),
    behind=st.lists(amounts, min_size=4, max_size=4),
)
def test_the_best_exchange_is_that_of_a_search_through_all(mine, theirs, behind):
    """The first of the best, whether the search looks at all exchanges or only at those that matter."""
    load = sum(mine) + sum(map(sum, theirs))
    loads = [max(0.0, load - less) for less in behind[: len(theirs)]]
    larger, low, given_unit, taken, moved = exchange_one_by_one(mine, theirs, load, loads)
    most = 1 + max(map(len, theirs))
    padded = np.array([costs + [0.0] * (most - len(costs)) for costs in theirs])
    for looked_at in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assigning, "EXCHANGES", looked_at)
            exchange = assigning._best_exchange(np.array(mine), padded, load, np.array(loads))
        assert (exchange.low, exchange.given, exchange.taken) == (low, given_unit, taken)
        assert (exchange.moved, exchange.larger) == (moved, larger)


@repeatable
@given(data=preferences(), world_size=st.integers(2, 7), area_cost=st.sampled_from([0.0, 0.01]))
def test_a_candidate_that_is_not_dealt_would_not_have_been_chosen(data, world_size, area_cost):
    _, table = data
    indices, how = np.arange(len(table)), rules("shared_prefix", 100, area_cost)
    best = None
    units = units_of(indices, table, "shared_prefix", len(table))
    units, *_ = cutting.halved(units, np.zeros_like(units.size), table, how)
    whole = work_of(units, table, "shared_prefix").tokens.sum()
    for most, limit in ((len(table), 100), (4, 100), (2, 100), (1, 100), (len(table), min(100, whole // world_size))):
        if limit < 100 and best.loads.max() <= 1.05 * best.loads.mean():
            continue
        units = units_of(indices, table, "shared_prefix", most)
        units, *_ = cutting.halved(units, np.zeros_like(units.size), table, rules("shared_prefix", limit, area_cost))
        units = units.take(slice(None, None, -1))
        candidate = dealing.ToDeal.of(units, table, NONE, how).candidate(world_size)
        if best is None or candidate.loads.max() < 0.99 * best.loads.max():
            best = candidate
    found = dealing._best_candidate(indices, table, NONE, how, world_size)
    assert found.loads.tolist() == best.loads.tolist()
    assert found.units.members().tolist() == best.units.members().tolist()
    assert found.rank.tolist() == best.rank.tolist()


def random_table(pairs: int, most_of_a_prompt: int) -> PairTable:
    """Lengths and ids as real data has them, without tokens; the responses of a prompt come back in several pairs."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(pairs), rng.integers(1, most_of_a_prompt + 1, pairs))[:pairs]
    lengths = np.clip(rng.lognormal(5, 0.9, (pairs, 5)).astype(np.int64), 1, 2000)[
        prompt
    ]  # the prompt's, four responses'
    first = rng.integers(0, 4, pairs)
    second = (first + rng.integers(1, 4, pairs)) % 4
    every = np.arange(pairs)
    return PairTable(
        chosen_length=lengths[:, 4] + lengths[every, first],
        rejected_length=lengths[:, 4] + lengths[every, second],
        shared_length=lengths[:, 4] - 1,
        prompt_length=lengths[:, 4],
        prompt_id=prompt,
        chosen_id=4 * prompt + first,
        rejected_id=4 * prompt + second,
        list_id=every,
    )


def behind_headers(table: PairTable, prompts_of_a_header: int) -> PairTable:
    """The table where about so many prompts at a time begin with 500 tokens more, the same for them."""
    lengths = {
        field.name: getattr(table, field.name) + 500 for field in dataclasses.fields(table) if "length" in field.name
    }
    table = dataclasses.replace(table, **lengths)
    ids = np.unique(table.cut_prompt_ids(np.arange(len(table))))
    overlaps = np.where(np.arange(1, len(ids) + 1) % prompts_of_a_header, 500, 0)
    order = PromptOrder(ids, np.arange(len(ids)), overlaps)
    return dataclasses.replace(table, prompt_order=lambda: order)


def shares_one_by_one(costs: np.ndarray, world_size: int) -> tuple[list[list[int]], np.ndarray]:
    """Units and cost of each rank: longest first, then the best exchange of the most loaded rank, rank by rank."""
    shares, loads = [[] for _ in range(world_size)], [0.0] * world_size
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        rank = loads.index(min(loads))
        shares[rank].append(unit)
        loads[rank] += costs[unit]
    loads = np.array([costs[share].sum() for share in shares])
    for _ in range(assigning.SWAPS if world_size > 1 else 0):
        high = int(loads.argmax())
        lows = [rank for rank in np.argsort(loads, kind="stable")[:16].tolist() if rank != high]
        theirs = [costs[shares[low]].tolist() for low in lows]
        found = exchange_one_by_one(costs[shares[high]].tolist(), theirs, loads[high], loads[lows].tolist())
        larger, number, given_unit, taken, moved = found
        if loads[high] <= assigning.BALANCED * loads.mean() or larger >= loads[high] * (1 - 1e-9):
            break
        low = lows[number]
        unit = shares[high].pop(given_unit)
        shares[high] += [shares[low].pop(taken)] if taken < len(shares[low]) else []
        shares[low].append(unit)
        loads[high] -= moved
        loads[low] += moved
    return shares, np.array([costs[share].sum() for share in shares])


def micro_batches_one_by_one(share: list[list[int]], table: PairTable, layout: str, max_tokens: int) -> list[list[int]]:
    """The units of one rank in micro-batches."""

    def tokens(unit: list[int]) -> int:
        return work_of_unit(unit, table, layout)[0]

    made: list[list[int]] = []
    if layout == "padded":
        for [pair] in sorted(share, key=tokens):
            if not made or tokens([*made[-1], pair]) > max_tokens:
                made.append([])
            made[-1].append(pair)
        return made
    pieces, waiting = [], list(share)
    while waiting:
        unit = waiting.pop()
        if len(unit) > 1 and tokens(unit) > max_tokens:
            waiting += [unit[: len(unit) // 2], unit[len(unit) // 2 :]]
        else:
            pieces.append(unit)
    pieces.sort(key=tokens, reverse=True)
    bins = first_fit([tokens(piece) for piece in pieces], max_tokens)
    return [sum((piece for piece, b in zip(pieces, bins, strict=True) if b == n), []) for n in sorted(set(bins))]


def halved_one_by_one(unit: list[int], table: PairTable, layout: str, max_tokens: int) -> list[list[int]]:
    """A unit in parts that a micro-batch holds, or that are single pairs."""
    if len(unit) == 1 or work_of_unit(unit, table, layout)[0] <= max_tokens:
        return [unit]
    halves = unit[: len(unit) // 2], unit[len(unit) // 2 :]
    return [part for half in halves for part in halved_one_by_one(half, table, layout, max_tokens)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 8, 64, 200])
@pytest.mark.parametrize(("most_of_a_prompt", "max_tokens"), [(1, 8192), (4, 1536), (40, 4096)])
@pytest.mark.parametrize("area_cost", [0.0, 6e-5])
def test_a_step_is_dealt_as_rank_by_rank_and_unit_by_unit(layout, world_size, most_of_a_prompt, max_tokens, area_cost):
    """To the last pair of the last micro-batch, and the imbalance to the last bit. 128 pairs: some ranks of 200 have none."""
    table = random_table(128, most_of_a_prompt)
    best = None
    units = units_one_by_one(table, layout, len(table))
    units = [part for unit in units for part in halved_one_by_one(unit, table, layout, max_tokens)]
    whole = sum(work_of_unit(unit, table, layout)[0] for unit in units)
    smaller = [*((most, max_tokens) for most in (4, 2, 1)), (len(table), min(max_tokens, whole // world_size))]
    cuts = layout == "shared_prefix" and world_size > 1
    for most, limit in [(len(table), max_tokens), *(smaller if cuts else ())]:
        if limit < max_tokens and best[1].max() <= 1.05 * best[1].mean():
            continue
        units = units_one_by_one(table, layout, most)
        if cuts:
            units = [part for unit in units for part in halved_one_by_one(unit, table, layout, limit)]
        work = [work_of_unit(unit, table, layout) for unit in units]
        shares, loads = shares_one_by_one(np.array([tokens + area_cost * area for tokens, area in work]), world_size)
        if best is None or loads.max() < 0.99 * best[1].max():
            best = [[units[i] for i in share] for share in shares], loads
    shares, loads = best
    deal = dealing.deal_step(np.arange(len(table)), table, rules(layout, max_tokens, area_cost), world_size)
    assert deal.imbalance == loads.max() / loads.mean()
    assert [[part.indices.tolist() for part in rank if part.counted] for rank in deal.ranks] == [
        micro_batches_one_by_one(share, table, layout, max_tokens) for share in shares
    ]
    check_plan(deal, np.arange(len(table)))


def calls_made(pairs: int, layout: str, world_size: int) -> int:
    """Calls of functions, Python's and C's, that dealing so many pairs makes."""
    table, how = random_table(pairs, 6), rules(layout, 8192, 6e-5)
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        dealing.deal_step(np.arange(pairs), table, how, world_size)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planning_for_many_ranks_makes_few_calls(layout):
    """They are what planning costs, and Python's lock is held meanwhile. Cutting rank by rank made up to 16,000."""
    assert calls_made(256, layout, 64) < 7500


def lines_run(pairs: int, layout: str, world_size: int, max_tokens: int, most_of_a_prompt: int, behind: int = 0) -> int:
    """Lines of the planner that dealing so many pairs runs."""
    planner = {module.__file__ for module in (dealing, assigning, cutting, headers, prefixes, work)}
    table, how = random_table(pairs, most_of_a_prompt), rules(layout, max_tokens, 6e-5)
    table = behind_headers(table, behind) if behind else table
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in planner:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        dealing.deal_step(np.arange(pairs), table, how, world_size)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("max_tokens", [1536, 16384])
@pytest.mark.parametrize("most_of_a_prompt", [1, 6])
def test_the_lines_run_grow_about_as_the_number_of_pairs(layout, world_size, max_tokens, most_of_a_prompt):
    """Four times the pairs: four times the lines, and a fourth of that for trees that have two levels more."""
    few, many = (lines_run(pairs, layout, world_size, max_tokens, most_of_a_prompt) for pairs in (1000, 4000))
    assert many < 5 * few
    assert many < 100 * 4000


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("max_tokens", [1536, 16384])
@pytest.mark.parametrize("behind", [3, 100, 10**6])
def test_the_lines_run_grow_about_as_the_number_of_pairs_behind_headers(world_size, max_tokens, behind):
    few, many = (lines_run(pairs, "shared_prefix", world_size, max_tokens, 6, behind) for pairs in (1000, 4000))
    assert many < 5 * few
    assert many < 200 * 4000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_held_out_set_of_many_pairs_is_dealt_in_one_call(layout):
    """50,000 pairs: less than a second, where looking through all bins took seven."""
    table = random_table(50_000, 6)
    deal = dealing.deal_step(np.arange(50_000), table, rules(layout, 1536), 8)
    check_plan(deal, np.arange(50_000))
    assert deal.imbalance < 1.01


# ---------------------------------------------------------------- many ranks


@pytest.fixture(scope="module", params=["hh_harmless", "alpaca_eval"])
def real_table(request) -> PairTable:
    """Lengths of real pairs, a token for every four letters, up to 1,024; the pairs of a prompt know each other."""
    sides = []
    for line in (shared_data(request.param) / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, *answers = (
            "".join(m["content"] for m in part) if isinstance(part, list) else part
            for part in (row.get("prompt", ""), row["chosen"], row["rejected"])
        )
        chosen, rejected = (prompt + answer for answer in answers)
        shared = len(os.path.commonprefix([chosen, rejected]))
        if max(map(len, (chosen, rejected))) <= 4096:
            sides.append((chosen, rejected, shared, prompt or chosen[:shared]))
    chosen, rejected, shared, prompts = zip(*sides, strict=True)
    ids: dict[str, int] = {}
    known = [np.array([ids.setdefault(text, len(ids)) for text in column]) for column in (prompts, chosen, rejected)]
    lengths = [np.maximum(2, [len(text) // 4 for text in column]) for column in (chosen, rejected)]
    return PairTable(
        chosen_length=lengths[0],
        rejected_length=lengths[1],
        shared_length=np.minimum(np.array(shared) // 4, np.minimum(*lengths) - 1),
        prompt_length=np.minimum(np.array(list(map(len, prompts))) // 4, np.minimum(*lengths) - 1),
        prompt_id=known[0],
        chosen_id=known[1],
        rejected_id=known[2],
        list_id=np.arange(len(sides)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixty_four_ranks_are_loaded_as_evenly_as_the_longest_pair_allows(real_table, layout):
    """Of 256 pairs a rank has four, and the longest of a step may be more than the mean of all ranks: no deal is below that.
    Of 512 a rank has eight."""
    how, rng = rules(layout, 8192, 6e-5), np.random.default_rng(0)
    for pairs in (256, 512):
        draws = [rng.permutation(len(real_table))[:pairs] for _ in range(9)]
        deals = [dealing.deal_step(indices, real_table, how, 64) for indices in draws]
        costs = [dealing.pair_costs(indices, real_table, layout, 6e-5) for indices in draws]
        least = [max(1.0, 64 * cost.max() / cost.sum()) for cost in costs]
        over = [deal.imbalance / bound for deal, bound in zip(deals, least, strict=True)]
        assert np.median(over) <= 1.05
        if pairs == 512:
            assert np.median([deal.imbalance for deal in deals]) <= 1.05


def test_one_seed_gives_the_same_steps_to_any_number_of_ranks(real_table):
    """Each pair of a step is dealt once, and the step is not asked how many ranks there are."""
    listed = []
    for world_size in (1, 2, 8, 64):
        plan = make_plan(ScheduleFlags(num_train_epochs=1.3), real_table, 256, seed=5)
        steps = []
        for indices in plan.draw(real_table):
            deal = dealing.deal_step(indices, real_table, rules("shared_prefix", 8192, 6e-5), world_size)
            dealt = [part.indices for rank in deal.ranks for part in rank if part.counted]
            assert sorted(np.concatenate(dealt).tolist()) == sorted(indices.tolist())
            steps.append(indices.tolist())
        listed.append(steps)
    assert len(listed[0]) > 8 and all(steps == listed[0] for steps in listed)
