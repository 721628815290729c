"""Whose pairs are whose: how ranks share a step, and how shares are cut into micro-batches."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import alone, read_pairs, shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm import toy
from open_rm.batching.dealing import Deal, attention_cost, deal_step, pair_costs
from open_rm.batching.feeding import Step
from open_rm.batching.layouts import Batch, lay_out
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.batching.steps import draw_steps
from open_rm.batching.work import units_of, work_of
from open_rm.data.pairs import PairTable
from open_rm.data.tokenizer import load_tokenizer
from open_rm.training.metrics import Meter, training_flops

repeatable = settings(max_examples=150, deadline=None, derandomize=True)


def table_of(pairs, prompt_lengths) -> PairTable:
    """The table that the data room writes, from the tokens of each pair; ids are numbers of distinct token sequences."""
    numbers: dict[tuple, int] = {}

    def number(tokens) -> int:
        return numbers.setdefault(tuple(tokens), len(numbers))

    def shared(a, b) -> int:
        return next(
            (i for i, (x, y) in enumerate(zip(a[:-1], b[:-1], strict=False)) if x != y), min(len(a), len(b)) - 1
        )

    columns = [
        (len(a), len(b), shared(a, b), length, number(a[:length]), number(a), number(b))
        for (a, b), length in zip(pairs, prompt_lengths, strict=True)
    ]
    return PairTable(*np.array(columns, np.int64).T, list_id=np.arange(len(columns)))


@st.composite
def preferences(draw, own_beginnings: bool = True):
    """Pairs over a few prompts, each with a few responses that come back in several pairs: (pairs, table).

    own_beginnings: responses of a prompt differ from their first token on.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs, lengths = [], []
    for number in range(rng.integers(1, 7)):
        prompt = [1000 + number, *rng.integers(0, 3, rng.integers(30)).tolist()]
        responses = []
        for i in range(rng.integers(2, 5)):
            beginning = [10 + i] if own_beginnings else rng.integers(2) * [5] * 20
            responses.append([*prompt, *beginning, *rng.integers(0, 2, rng.integers(60)).tolist(), 20 + i])
        for _ in range(rng.integers(1, 7)):
            x, y = rng.permutation(len(responses))[:2]
            pairs.append((responses[x], responses[y]))
            lengths.append(len(prompt))
    return pairs, table_of(pairs, lengths)


def real_batch(layout, pairs, table, indices) -> Batch:
    prompt_ids = table.cut_prompt_ids(indices)
    return lay_out(layout, [pairs[i] for i in indices], pad_token_id=0, prompt_ids=prompt_ids)


def dealt(indices, table, *, layout, world_size, max_tokens, area_cost=0.0) -> Deal:
    rules = BatchRules(layout, 0, max_tokens, evaluation_tokens=max_tokens, area_cost=area_cost)
    return deal_step(indices, table, rules, world_size)


def check_plan(plan, indices):
    """What holds of every deal: all pairs once over all ranks, and ranks that call the model equally often."""
    counted = [i for rank in plan.ranks for part in rank for i in part.indices[: part.counted].tolist()]
    assert sorted(counted) == sorted(indices.tolist())
    assert len({len(rank) for rank in plan.ranks}) == 1
    for part in itertools.chain(*plan.ranks):
        assert part.counted == len(part.indices) or (part.counted, len(part.indices)) == (0, 1)


@repeatable
@given(
    data=preferences(own_beginnings=False),
    layout=st.sampled_from(LAYOUTS),
    world_size=st.integers(1, 7),
    max_tokens=st.integers(20, 400),
    area_cost=st.sampled_from([0.0, 0.01]),
    seed=st.integers(0, 9),
)
def test_every_pair_is_counted_once_and_ranks_make_equally_many_micro_batches(
    data, layout, world_size, max_tokens, area_cost, seed
):
    _, table = data
    rng = np.random.default_rng(seed)
    indices = rng.permutation(len(table))[: rng.integers(1, len(table) + 1)]
    how = dict(layout=layout, world_size=world_size, max_tokens=max_tokens, area_cost=area_cost)
    plan = dealt(indices, table, **how)
    assert len(plan.ranks) == world_size
    assert plan.indices.tolist() == indices.tolist()
    check_plan(plan, indices)
    again = dealt(indices, table, **how)  # every rank plans for itself and must find the same
    assert [[part.indices.tolist() for part in rank] for rank in plan.ranks] == [
        [part.indices.tolist() for part in rank] for rank in again.ranks
    ]


def check_budget(data, layout, world_size, max_tokens):
    pairs, table = data
    plan = dealt(np.arange(len(table)), table, layout=layout, world_size=world_size, max_tokens=max_tokens)
    for part in itertools.chain(*plan.ranks):
        batch = real_batch(layout, pairs, table, part.indices)
        assert batch.positions <= max_tokens or len(part.indices) == 1
    return plan


@repeatable
@given(
    data=preferences(),
    layout=st.sampled_from(LAYOUTS),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(20, 400),
)
def test_a_micro_batch_takes_no_more_positions_than_its_budget(data, layout, world_size, max_tokens):
    check_budget(data, layout, world_size, max_tokens)


@repeatable
@given(data=preferences(own_beginnings=False), max_tokens=st.integers(20, 400))
def test_the_budget_holds_where_responses_begin_alike(data, max_tokens):
    check_budget(data, "shared_prefix", 1, max_tokens)


def test_the_budget_holds_where_a_later_part_of_a_prompts_pairs_is_longer():
    """Four pairs of one prompt: the first two are short, so that half of them says nothing about the other half."""
    responses = [[1, 10 + i, *[2] * length] for i, length in enumerate([5, 5, 5, 5, 100, 100, 100, 100])]
    pairs = list(zip(responses[::2], responses[1::2], strict=True))
    check_budget((pairs, table_of(pairs, [1] * 4)), "shared_prefix", 1, 250)


def test_the_budget_holds_where_the_sides_of_a_pair_share_more_than_the_prompt():
    """Two pairs of one prompt, each of which goes on alike for 40 tokens: together they share the prompt alone."""
    pairs = [([1, *[own] * 40, 5], [1, *[own] * 40, 6]) for own in (2, 3)]
    check_budget((pairs, table_of(pairs, [1, 1])), "shared_prefix", 1, 100)


@repeatable
@given(data=preferences(own_beginnings=False), layout=st.sampled_from(LAYOUTS))
def test_planned_tokens_and_area_are_those_of_the_real_batch(data, layout):
    """Tokens exactly; the area up to half a product a token, since the planner halves squares."""
    pairs, table = data
    for i in range(len(pairs)):
        planned = work_of(units_of(np.array([i]), table, layout, 1), table, layout)
        batch = real_batch(layout, pairs, table, [i])
        assert planned.tokens == batch.positions
        if layout != "padded":  # padded rows are computed whole, so their planned area is that of the padding too
            assert 0 <= batch.area - planned.area <= batch.positions / 2 + 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_larger_budget_makes_fewer_micro_batches_and_a_tiny_one_a_pair_each(layout):
    rng = np.random.default_rng(0)
    pairs = [([p, 1, *[2] * rng.integers(60)], [p, 3, *[4] * rng.integers(60)]) for p in range(100, 140)]
    table = table_of(pairs, [1] * 40)
    made = [
        sum(part.counted > 0 for part in check_budget((pairs, table), layout, 1, max_tokens).ranks[0])
        for max_tokens in (1, 300, 1000, 10**6)
    ]
    assert made[0] == 40 and made[-1] == 1 and made == sorted(made, reverse=True) and len(set(made)) == 4


def test_padded_micro_batches_hold_similar_lengths():
    lengths = [9, 1, 8, 2, 7, 3]
    table = table_of([([1] * n, [2] * n) for n in lengths], [0] * 6)
    plan = dealt(np.arange(6), table, layout="padded", world_size=1, max_tokens=36)
    assert [[lengths[i] for i in part.indices] for part in plan.ranks[0]] == [[1, 2, 3], [7, 8], [9]]


def test_a_ranks_pairs_of_one_prompt_are_computed_together():
    """Two prompts with the three pairs of three responses, two ranks: each takes a prompt, in one micro-batch."""
    pairs = []
    for prompt in (100, 200):
        responses = [[prompt, *[1] * 30, 10 + i, *[2] * 20] for i in range(3)]
        pairs += [(responses[x], responses[y]) for x, y in ((0, 1), (0, 2), (1, 2))]
    table = table_of(pairs, [31] * 6)
    plan = dealt(np.arange(6), table, layout="shared_prefix", world_size=2, max_tokens=1000)
    assert sorted(sorted(part.indices.tolist()) for rank in plan.ranks for part in rank) == [[0, 1, 2], [3, 4, 5]]
    assert plan.imbalance == 1.0


@repeatable
@given(
    data=preferences(),
    layout=st.sampled_from(LAYOUTS),
    world_size=st.integers(1, 6),
    area_cost=st.sampled_from([0.0, 0.02]),
)
def test_imbalance_is_the_largest_cost_of_a_rank_over_the_mean(data, layout, world_size, area_cost):
    """Recomputed from real batches of single pairs; with prompts of their own, so that pairs are what is dealt."""
    pairs, table = data
    table = dataclasses.replace(table, prompt_id=np.arange(len(table)))
    how = dict(layout=layout, world_size=world_size, max_tokens=100)
    plan = dealt(np.arange(len(table)), table, **how, area_cost=area_cost)

    def cost(index):
        batch = real_batch(layout, pairs, table, [index])
        longest = max(map(len, pairs[index]))
        return batch.positions + area_cost * (longest**2 if layout == "padded" else batch.area)

    loads = [sum(cost(i) for part in rank for i in part.indices[: part.counted]) for rank in plan.ranks]
    # the planner's area leaves out half a product a token: area_cost / 2 = 1 % of the cost at most
    assert plan.imbalance == pytest.approx(max(loads) / (sum(loads) / world_size), rel=area_cost / 2 + 1e-12)


def test_a_step_of_fewer_pairs_than_ranks_still_gives_each_rank_a_forward():
    pairs = [([1] * 9, [2] * 9), ([3] * 5, [4] * 5)]
    plan = dealt(np.arange(2), table_of(pairs, [0, 0]), layout="packed", world_size=4, max_tokens=100)
    parts = [part for [part] in plan.ranks]
    assert sorted((part.counted, part.indices.tolist()) for part in parts) == [(0, [1]), (0, [1]), (1, [0]), (1, [1])]


def test_attention_cost_is_the_flops_of_a_product_over_those_of_a_token():
    shape = SimpleNamespace(body_parameters=1000, read_parameters=0, layers=2, attention_width=16, passes=3)
    of_token, of_product = (training_flops(*work, shape, read=0) for work in ((1, 0), (0, 1)))
    assert attention_cost(1000, 2, 16) == pytest.approx(of_product / of_token)


# ---------------------------------------------------------------- real lengths


@pytest.fixture(scope="module")
def real_table(tmp_path_factory):
    """Lengths and ids of a shared set's training pairs, up to 1,024 tokens of a vocabulary made from the set itself."""
    folder = tmp_path_factory.mktemp("real")
    tables = {}

    def table(name: str) -> PairTable:
        source = shared_data(name)
        if name not in tables:
            rows = [json.loads(line) for line in (source / "train.jsonl").open(encoding="utf-8")]
            sides = [row[side] for row in rows[::3] for side in ("chosen", "rejected")]
            texts = [side if isinstance(side, str) else side[-1]["content"] for side in sides]
            toy.make_tokenizer([*texts, "<|user|>\n<|assistant|>\n"]).save_pretrained(folder / name)
            tokenizer = load_tokenizer(str(folder / name))
            flags = {"max_token_length": 1024, "max_prompt_token_length": 1024}
            flags["dataset_local_cache_dir"] = str(folder / "cache")
            tables[name] = read_pairs([source, "1.0"], tokenizer, **flags).table
        return tables[name]

    return table


@pytest.mark.parametrize("name", ["hh_harmless", "alpaca_eval"])
def test_256_pairs_are_dealt_evenly_to_64_ranks(real_table, name):
    """Four pairs a rank, the attention of a model of a billion parameters, five steps; the figures are printed (-s)."""
    table = real_table(name)
    table = dataclasses.replace(table, prompt_id=np.arange(len(table)), prompt_order=None)  # pairs are the units
    area_cost = attention_cost(10**9, 16, 2048)
    rng = np.random.default_rng(0)
    found = list(itertools.islice(draw_steps(len(table), 256, 10**6, seed=1), 5))
    for layout in LAYOUTS:
        planned, at_random = [], []
        for indices in found:
            plan = dealt(indices, table, layout=layout, world_size=64, max_tokens=16384, area_cost=area_cost)
            check_plan(plan, indices)
            planned.append(plan.imbalance)
            loads = pair_costs(rng.permutation(indices), table, layout, area_cost).reshape(64, -1).sum(1)
            at_random.append(loads.max() / loads.mean())
        print(f"{name} {layout}: imbalance {np.median(planned):.3f}, dealt at random {np.median(at_random):.3f}")
        assert np.median(planned) <= 1.05
        assert min(at_random) > max(planned)


@pytest.mark.parametrize(("name", "least", "most"), [("hh_harmless", 0.5, 0.75), ("alpaca_eval", 0.85, 1.0)])
def test_pairs_of_real_data_share_a_good_part_of_their_tokens(real_table, name, least, most):
    """HH: long prompts and short answers; alpaca_eval: the other way round, and its answers come back in several pairs."""
    table = real_table(name)
    tokens = (table.chosen_length + table.rejected_length).sum()
    distinct = (tokens - table.shared_length.sum()) / tokens
    print(f"{name}: {distinct:.3f} of the tokens are distinct within pairs")
    assert least < distinct < most


def test_distinct_token_fraction_is_counted_token_by_token():
    """HH-shaped pairs: a conversation of several turns, and two answers much shorter than it."""
    rng = np.random.default_rng(0)
    pairs, prompt_lengths = [], []
    for i in range(30):
        prompt = [i, *rng.integers(100, 900, rng.integers(60, 400))]
        answers = [[side, *rng.integers(100, 900, rng.integers(5, 90)), 2] for side in (40, 41)]
        pairs.append(tuple([int(token) for token in prompt + answer] for answer in answers))
        prompt_lengths.append(len(prompt))
    table = table_of(pairs, prompt_lengths)
    distinct = sum(len({tuple(side[:n]) for side in pair for n in range(1, len(side) + 1)}) for pair in pairs)
    tokens = sum(len(side) for pair in pairs for side in pair)
    shape = SimpleNamespace(body_parameters=10, read_parameters=0, layers=2, attention_width=4, passes=3)
    fractions = {}
    for layout in LAYOUTS:
        meter = Meter(alone(), shape, torch.float32)
        plan = dealt(np.arange(30), table, layout=layout, world_size=3, max_tokens=2000)
        for part in itertools.chain(*plan.ranks):
            some = torch.zeros(part.counted)
            meter.add(some, some, {"ranking": some}, real_batch(layout, pairs, table, part.indices))
        meter.reduce(30)
        step = Step(number=1, pairs=30, micro_batches=[], imbalance=plan.imbalance, indices=np.arange(30))
        fractions[layout] = meter.performance(step, flops_before=0)["perf/distinct_token_fraction"]
    assert fractions == {"padded": 1.0, "packed": 1.0, "shared_prefix": pytest.approx(distinct / tokens)}
    assert 0.5 < fractions["shared_prefix"] < 0.75
