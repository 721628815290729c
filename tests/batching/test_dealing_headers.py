"""Prompts that begin alike: what is planned behind a header is what the layout makes, and ranks share headers well."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_of_ids import as_data
from test_dealing import check_plan, dealt, real_batch, table_of

from open_rm.batching import dealing
from open_rm.batching.cutting import cut
from open_rm.batching.dealing import deal_step, micro_batch_budget
from open_rm.batching.headers import find_headers
from open_rm.batching.rules import BatchRules
from open_rm.batching.work import units_of, work_of

repeatable = settings(max_examples=150, deadline=None, derandomize=True)


def rules(max_tokens: int, area_cost: float = 0.0, **others) -> BatchRules:
    return BatchRules("shared_prefix", 0, max_tokens, evaluation_tokens=max_tokens, area_cost=area_cost, **others)


def planned(table, how: BatchRules, world_size: int):
    """(Shares, cost of each rank without headers) of all pairs of a table."""
    indices = np.arange(len(table))
    headers = find_headers(indices, table, "shared_prefix")
    best = dealing._best_candidate(indices, table, headers, how, world_size)
    return cut(best.units, best.rank, headers, table, how, world_size), best.own


@st.composite
def conversations(draw, plain: bool):
    """Pairs of a few prompts behind a few headers, some of which begin with another: (pairs, table).

    plain: each prompt has one pair, nothing but headers is shared by two prompts, and answers differ at once.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    headers = [[]]
    for number in range(draw(st.integers(1, 3))):
        before = [] if plain else headers[rng.integers(len(headers))]
        headers.append([*before, *[500 + number] * rng.integers(16, 60)])
    pairs, lengths = [], []
    for number in range(rng.integers(2, 14)):
        prompt = [*headers[rng.integers(len(headers))], 1000 + number, *rng.integers(0, 3, rng.integers(30)).tolist()]
        for _ in range(1 if plain else rng.integers(1, 4)):
            alike = [] if plain else rng.integers(2) * rng.integers(9, size=1).tolist() * rng.integers(90)
            pairs.append(
                tuple([*prompt, *alike, 10 + side, *rng.integers(0, 2, rng.integers(40)).tolist()] for side in (0, 1))
            )
            lengths.append(len(prompt))
    return pairs, as_data(pairs, lengths).table


@repeatable
@given(
    data=conversations(plain=False),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(20, 600),
    area_cost=st.sampled_from([0.0, 0.01]),
    whole_lists=st.booleans(),
)
def test_no_micro_batch_takes_more_than_was_planned_or_than_its_budget(
    data, world_size, max_tokens, area_cost, whole_lists
):
    pairs, table = data
    table.list_id[:] = np.arange(len(table)) // 2  # of one prompt or of two
    how = rules(max_tokens, area_cost, whole_lists=whole_lists)
    shares, _ = planned(table, how, world_size)
    for part, tokens in zip(itertools.chain(*shares.ranks), shares.tokens.tolist(), strict=True):
        positions = real_batch("shared_prefix", pairs, table, part.indices).positions
        assert positions <= tokens
        units = table.list_id[part.indices] if whole_lists else part.indices
        assert positions <= max_tokens or len(set(units.tolist())) == 1
    check_plan(deal_step(np.arange(len(table)), table, how, world_size), np.arange(len(table)))


@repeatable
@given(data=conversations(plain=True), world_size=st.integers(1, 3), max_tokens=st.integers(100, 600))
def test_tokens_and_cost_are_those_of_the_real_batches_where_headers_are_plain(data, world_size, max_tokens):
    """The area up to half a product a token, since the planner halves squares."""
    pairs, table = data
    shares, own = planned(table, rules(max_tokens, 0.02), world_size)
    batches = [[real_batch("shared_prefix", pairs, table, part.indices) for part in rank] for rank in shares.ranks]
    assert shares.tokens.tolist() == [batch.positions for batch in itertools.chain(*batches)]
    real = [sum(batch.positions + 0.02 * batch.area for batch in rank) for rank in batches]
    assert own + shares.header_loads == pytest.approx(real, rel=0.02)
    deal = deal_step(np.arange(len(table)), table, rules(max_tokens, 0.02), world_size)
    assert deal.imbalance == pytest.approx(max(real) / np.mean(real), rel=0.02)


def behind(headers: list[int], *, tokens: int = 500, own: int = 40):
    """A pair for each number of a header of so many tokens: prompts of one token, answers of `own`."""
    pairs = []
    for number, header in enumerate(headers):
        prompt = [*[100 + header] * tokens, 1000 + number]
        pairs.append(tuple([*prompt, *[side] * own] for side in (10, 11)))
    return pairs, as_data(pairs, [tokens + 1] * len(pairs)).table


def test_a_header_is_paid_once_in_a_micro_batch():
    """30 pairs of 500 + 1 + 2 * 40 tokens: 20 fit into 2,120 positions behind one header, where 3 do with a header each."""
    pairs, table = behind([0] * 30)
    plan = dealt(np.arange(30), table, layout="shared_prefix", world_size=1, max_tokens=500 + 20 * 81)
    batches = [real_batch("shared_prefix", pairs, table, part.indices) for part in plan.ranks[0]]
    assert sorted(batch.positions for batch in batches) == [500 + 10 * 81, 500 + 20 * 81]


def test_each_of_two_ranks_takes_a_header_and_its_pairs():
    """Apart 500 + 8 * 81 tokens a rank; mixed it would be 1,000 and as many."""
    pairs, table = behind([0, 0, 1, 1] * 4)
    plan = dealt(np.arange(16), table, layout="shared_prefix", world_size=2, max_tokens=4000)
    taken = sorted(sorted(i for part in rank for i in part.indices.tolist()) for rank in plan.ranks)
    assert taken == [[i for i in range(16) if i // 2 % 2 == header] for header in (0, 1)]
    assert [
        [real_batch("shared_prefix", pairs, table, part.indices).positions for part in rank] for rank in plan.ranks
    ] == [[500 + 8 * 81]] * 2
    assert plan.imbalance == 1.0


def test_ranks_share_a_header_that_few_of_them_would_wait_for():
    """24 pairs of 0 and 8 of 1 with headers of 20 tokens: three ranks for the one, one for the other, even to a twentieth."""
    _, table = behind([0] * 24 + [1] * 8, tokens=20)
    plan = dealt(np.arange(32), table, layout="shared_prefix", world_size=4, max_tokens=4000)
    assert plan.imbalance <= 1.05
    assert sum(len({int(i >= 24) for part in rank for i in part.indices}) for rank in plan.ranks) == 4


def test_pairs_of_one_header_are_cut_together_and_what_is_left_of_several_is_one_micro_batch():
    """Headers of 500 tokens with 12 and 3 pairs of 81 behind them."""

    def held(max_tokens: int) -> list[list[int]]:
        shares, _ = planned(table, rules(max_tokens), 1)
        return sorted(sorted(int(i >= 12) for i in part.indices) for part in shares.ranks[0])

    _, table = behind([0] * 12 + [1] * 3)
    assert held(500 + 10 * 81) == [[0] * 2, [0] * 10, [1] * 3]  # two headers and 5 pairs would be 1,405 positions
    assert held(500 + 11 * 81) == [[0] * 11, [0] * 1 + [1] * 3]
    assert held(1000 + 15 * 81) == [[0] * 12 + [1] * 3]


def test_a_budget_below_a_header_and_a_pair_makes_a_micro_batch_of_each_pair():
    _, table = behind([0] * 6)
    for max_tokens in (1, 499, 500, 580):
        plan = dealt(np.arange(6), table, layout="shared_prefix", world_size=1, max_tokens=max_tokens)
        assert [len(part.indices) for part in plan.ranks[0]] == [1] * 6


@pytest.mark.parametrize("headers", [1, 2, 4])
def test_512_pairs_behind_headers_are_dealt_evenly_to_64_ranks(headers):
    """Answers of lengths as real ones have them."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(512):
        prompt = [*[100 + int(rng.integers(headers))] * 300, 1000 + number, *[7] * rng.integers(60)]
        pairs.append(tuple([*prompt, *[side] * int(rng.lognormal(5, 0.7))] for side in (10, 11)))
    table = as_data(pairs, [301] * 512).table
    plan = dealt(np.arange(512), table, layout="shared_prefix", world_size=64, max_tokens=8192, area_cost=6e-5)
    check_plan(plan, np.arange(512))
    assert plan.imbalance <= 1.05
    parts = [part.indices for rank in plan.ranks for part in rank if part.counted]
    positions = sum(real_batch("shared_prefix", pairs, table, part).positions for part in parts)
    own = (table.chosen_length + table.rejected_length - table.shared_length - 300).sum()
    computed = sum(len({pairs[i][0][0] for i in part}) for part in parts)
    assert positions == own + 300 * computed
    assert computed <= 64 + 2 * headers  # 64 * headers if every rank had every one


# ---------------------------------------------------------------- lists


def ranked(list_ids: list[int], lengths: list[int]):
    """A pair for each list id; all prompts differ, as if answers of several lengths had cut them."""
    pairs = [([1, 100 + i, *[2] * n], [1, 100 + i, *[3] * n]) for i, n in enumerate(lengths)]
    table = table_of(pairs, [2] * len(pairs))
    table.list_id[:] = list_ids
    return pairs, table


@repeatable
@given(data=st.data(), layout=st.sampled_from(["padded", "packed", "shared_prefix"]), world_size=st.integers(1, 4))
def test_the_pairs_of_a_list_are_in_one_micro_batch_however_large(data, layout, world_size):
    list_ids = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=20))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=len(list_ids), max_size=len(list_ids)))
    max_tokens = data.draw(st.integers(1, 300))
    pairs, table = ranked(list_ids, lengths)
    how = BatchRules(layout, 0, max_tokens, evaluation_tokens=max_tokens, whole_lists=True)
    deal = deal_step(np.arange(len(pairs)), table, how, world_size)
    check_plan(deal, np.arange(len(pairs)))
    parts = [part.indices[: part.counted] for rank in deal.ranks for part in rank if part.counted]
    of_parts = [set(table.list_id[indices].tolist()) for indices in parts]
    assert sum(map(len, of_parts)) == len(set(list_ids))  # none is in two
    for indices, lists in zip(parts, of_parts, strict=True):
        assert real_batch(layout, pairs, table, indices).positions <= max_tokens or len(lists) == 1


@repeatable
@given(data=st.data())
def test_the_work_of_a_list_is_that_of_its_prompts(data):
    list_ids = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    pairs, table = ranked(list_ids, data.draw(st.lists(st.integers(1, 9), min_size=12, max_size=12))[: len(list_ids)])
    table.prompt_id[:] = np.arange(len(list_ids)) % 3  # of a list several pairs of a prompt, and several prompts
    table.shared_length[:] = 1
    units = units_of(np.arange(len(pairs)), table, "shared_prefix", 1, whole_lists=True)
    work = work_of(units, table, "shared_prefix")
    for u in range(len(units.size)):
        members = units.take([u]).members()
        assert len(set(table.list_id[members].tolist())) == 1
        parts = [members[table.prompt_id[members] == prompt] for prompt in np.unique(table.prompt_id[members])]
        alone = [work_of(units_of(part, table, "shared_prefix", 99), table, "shared_prefix") for part in parts]
        assert (work.tokens[u], work.area[u]) == (sum(w.tokens[0] for w in alone), sum(w.area[0] for w in alone))


# ---------------------------------------------------------------- the budget of a CPU


def test_a_micro_batch_of_a_cpu_holds_several_times_a_long_header():
    assert micro_batch_budget(8, 1024, on_gpu=False) == 1536
    assert micro_batch_budget(8, 1024, on_gpu=False, header=90) == 1536
    assert micro_batch_budget(8, 1024, on_gpu=False, header=500) == 8000
    assert micro_batch_budget(1, 1024, on_gpu=False, header=500) == 2048
    assert micro_batch_budget(8, 1024, on_gpu=True, header=500) == 2 * 8 * 1024
