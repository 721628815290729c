"""Which pairs form a step, how ranks share them, how shares are cut; and batches made ahead."""

import dataclasses
import itertools
import json
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm import batching, metrics, steps, tokenization, toy
from open_rm.data import load_preference_data

LAYOUTS = steps.LAYOUTS
repeatable = settings(max_examples=150, deadline=None, derandomize=True)

# ---------------------------------------------------------------- drawing


def drawn(*args, **kwargs):
    return [step.tolist() for step in steps.draw_steps(*args, **kwargs)]


def test_steps_are_decided_by_seed_and_epoch_alone():
    first = drawn(20, 6, 50, seed=4)
    assert first == drawn(20, 6, 50, seed=4)
    assert first != drawn(20, 6, 50, seed=5)
    assert [len(step) for step in first] == [6, 6, 6, 2, 6, 6, 6, 2, 6, 4]
    longer = drawn(20, 6, 500, seed=4)  # the number of episodes cuts steps off and changes none
    assert first == [*longer[:9], longer[9][:4]]
    assert first[:4] != first[4:8]


def one_epoch(found: list[list[int]], pairs: int) -> list[list[int]]:
    """The first steps that together hold `pairs` pairs; fails where a step crosses the end of the epoch."""
    ends = list(itertools.accumulate(map(len, found)))
    return found[: ends.index(pairs) + 1]


@repeatable
@given(
    pairs=st.integers(1, 40),
    pairs_per_step=st.integers(1, 12),
    episodes=st.integers(1, 130),
    seed=st.integers(0, 9),
    prompts=st.none() | st.integers(1, 20),
)
def test_every_epoch_sees_every_pair_once_and_episodes_are_exact(pairs, pairs_per_step, episodes, seed, prompts):
    prompt_ids = None if prompts is None else np.random.default_rng(seed).integers(0, prompts, pairs)
    found = drawn(pairs, pairs_per_step, episodes, seed, prompt_ids=prompt_ids)
    assert all(1 <= len(step) <= pairs_per_step for step in found)
    assert sum(map(len, found)) == episodes
    whole, rest = divmod(episodes, pairs)
    for _ in range(whole):
        epoch = one_epoch(found, pairs)
        assert sorted(sum(epoch, [])) == list(range(pairs))
        found = found[len(epoch) :]
    assert len(set(sum(found, []))) == rest


@repeatable
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=25),
    pairs_per_step=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_grouped_steps_keep_the_pairs_of_a_prompt_together(sizes, pairs_per_step, seed):
    """Only a group larger than a step is cut, and then into no more steps than its size demands, one more at most."""
    rng = np.random.default_rng(seed)
    prompt_ids = rng.permutation(np.repeat(rng.permutation(1000)[: len(sizes)], sizes))
    epoch = drawn(len(prompt_ids), pairs_per_step, len(prompt_ids), seed, prompt_ids=prompt_ids)
    assert sorted(sum(epoch, [])) == list(range(len(prompt_ids)))
    assert max(map(len, epoch)) <= pairs_per_step
    steps_of = Counter(prompt for step in epoch for prompt in set(prompt_ids[step].tolist()))
    for prompt, size in Counter(prompt_ids.tolist()).items():
        assert steps_of[prompt] <= (1 if size <= pairs_per_step else 1 + -(-size // pairs_per_step))


def test_grouped_steps_are_nearly_full():
    """Groups of 1 to 6, as alpaca_eval has: at least 99 % of what steps could hold."""
    sizes = np.random.default_rng(0).integers(1, 7, 600)
    prompt_ids = np.repeat(np.arange(600), sizes)
    epoch = drawn(len(prompt_ids), 32, len(prompt_ids), 1, prompt_ids=prompt_ids)
    assert len(prompt_ids) >= 0.99 * 32 * (len(epoch) - 1)


# ---------------------------------------------------------------- planning


def table_of(pairs, prompt_lengths) -> steps.PairTable:
    """The table that data.py writes, from the tokens of each pair; ids are numbers of distinct token sequences."""
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
    return steps.PairTable(*np.array(columns, np.int64).T)


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


def real_batch(layout, pairs, table, indices) -> batching.Batch:
    prompt_ids = table.prompt_id[indices]
    return batching.lay_out(layout, [pairs[i] for i in indices], pad_token_id=0, prompt_ids=prompt_ids)


def check_plan(plan, indices):
    """What holds of every plan: all pairs once over all ranks, and ranks that call the model equally often."""
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
    plan = steps.plan_step(indices, table, **how)
    assert len(plan.ranks) == world_size
    assert plan.indices.tolist() == indices.tolist()
    check_plan(plan, indices)
    again = steps.plan_step(indices, table, **how)  # every rank plans for itself and must find the same
    assert [[part.indices.tolist() for part in rank] for rank in plan.ranks] == [
        [part.indices.tolist() for part in rank] for rank in again.ranks
    ]


def check_budget(data, layout, world_size, max_tokens):
    pairs, table = data
    plan = steps.plan_step(np.arange(len(table)), table, layout=layout, world_size=world_size, max_tokens=max_tokens)
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
        planned, batch = steps._work(np.array([i]), table, layout), real_batch(layout, pairs, table, [i])
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
    plan = steps.plan_step(np.arange(6), table, layout="padded", world_size=1, max_tokens=36)
    assert [[lengths[i] for i in part.indices] for part in plan.ranks[0]] == [[1, 2, 3], [7, 8], [9]]


def test_a_ranks_pairs_of_one_prompt_are_computed_together():
    """Two prompts with the three pairs of three responses, two ranks: each takes a prompt, in one micro-batch."""
    pairs = []
    for prompt in (100, 200):
        responses = [[prompt, *[1] * 30, 10 + i, *[2] * 20] for i in range(3)]
        pairs += [(responses[x], responses[y]) for x, y in ((0, 1), (0, 2), (1, 2))]
    table = table_of(pairs, [31] * 6)
    plan = steps.plan_step(np.arange(6), table, layout="shared_prefix", world_size=2, max_tokens=1000)
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
    plan = steps.plan_step(np.arange(len(table)), table, **how, area_cost=area_cost)

    def cost(index):
        batch = real_batch(layout, pairs, table, [index])
        longest = max(map(len, pairs[index]))
        return batch.positions + area_cost * (longest**2 if layout == "padded" else batch.area)

    loads = [sum(cost(i) for part in rank for i in part.indices[: part.counted]) for rank in plan.ranks]
    # the planner's area leaves out half a product a token: area_cost / 2 = 1 % of the cost at most
    assert plan.imbalance == pytest.approx(max(loads) / (sum(loads) / world_size), rel=area_cost / 2 + 1e-12)


def test_a_step_of_fewer_pairs_than_ranks_still_gives_each_rank_a_forward():
    pairs = [([1] * 9, [2] * 9), ([3] * 5, [4] * 5)]
    plan = steps.plan_step(np.arange(2), table_of(pairs, [0, 0]), layout="packed", world_size=4, max_tokens=100)
    parts = [part for [part] in plan.ranks]
    assert sorted((part.counted, part.indices.tolist()) for part in parts) == [(0, [1]), (0, [1]), (1, [0]), (1, [1])]


def test_attention_cost_is_the_flops_of_a_product_over_those_of_a_token():
    shape = SimpleNamespace(body_parameters=1000, read_parameters=0, layers=2, attention_width=16, passes=3)
    of_token, of_product = (metrics.training_flops(*work, shape, read=0) for work in ((1, 0), (0, 1)))
    assert steps.attention_cost(1000, 2, 16) == pytest.approx(of_product / of_token)


# ---------------------------------------------------------------- real lengths


@pytest.fixture(scope="module")
def real_table(tmp_path_factory):
    """Lengths and ids of a shared set's training pairs, up to 1,024 tokens of a vocabulary made from the set itself."""
    folder = tmp_path_factory.mktemp("real")
    tables = {}

    def table(name: str) -> steps.PairTable:
        source = shared_data(name)
        if name not in tables:
            rows = [json.loads(line) for line in (source / "train.jsonl").open(encoding="utf-8")]
            sides = [row[side] for row in rows[::3] for side in ("chosen", "rejected")]
            texts = [side if isinstance(side, str) else side[-1]["content"] for side in sides]
            toy.make_tokenizer([*texts, "<|user|>\n<|assistant|>\n"]).save_pretrained(folder / name)
            data = load_preference_data(
                [str(source), "1.0"],
                ["train"],
                flag="dataset_mixer_list",
                tokenizer=tokenization.load_tokenizer(str(folder / name)),
                max_token_length=1024,
                max_prompt_token_length=1024,
                cache_dir=str(folder / "cache"),
                seed=1,
            )
            tables[name] = data.table
        return tables[name]

    return table


@pytest.mark.parametrize("name", ["hh_harmless", "alpaca_eval"])
def test_256_pairs_are_dealt_evenly_to_64_ranks(real_table, name):
    """Four pairs a rank, the attention of a model of a billion parameters, five steps; the figures are printed (-s)."""
    table = real_table(name)
    table = dataclasses.replace(table, prompt_id=np.arange(len(table)))  # pairs are the units
    area_cost = steps.attention_cost(10**9, 16, 2048)
    rng = np.random.default_rng(0)
    found = list(itertools.islice(steps.draw_steps(len(table), 256, 10**6, seed=1), 5))
    for layout in LAYOUTS:
        planned, dealt = [], []
        for indices in found:
            plan = steps.plan_step(indices, table, layout=layout, world_size=64, max_tokens=16384, area_cost=area_cost)
            check_plan(plan, indices)
            planned.append(plan.imbalance)
            costs = [steps._work(np.array([i]), table, layout) for i in rng.permutation(indices)]
            loads = np.array([work.tokens + area_cost * work.area for work in costs]).reshape(64, -1).sum(1)
            dealt.append(loads.max() / loads.mean())
        print(f"{name} {layout}: imbalance {np.median(planned):.3f}, dealt at random {np.median(dealt):.3f}")
        assert np.median(planned) <= 1.05
        assert min(dealt) > max(planned)


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
    fractions = {}
    for layout in LAYOUTS:
        sums = metrics.StepMetrics(
            torch.device("cpu"),
            SimpleNamespace(body_parameters=10, read_parameters=0, layers=2, attention_width=4, passes=3),
        )
        plan = steps.plan_step(np.arange(30), table, layout=layout, world_size=3, max_tokens=2000)
        for part in itertools.chain(*plan.ranks):
            some = torch.zeros(part.counted)
            sums.add(some, some, {"ranking": some}, real_batch(layout, pairs, table, part.indices))
        _, counts = sums.reduce(30)
        perf = metrics.perf_metrics(
            counts, pairs=30, step_seconds=1, data_seconds=0, imbalance=1, memory_gib=1, total_flops=1, peak_flops=1
        )
        fractions[layout] = perf["perf/distinct_token_fraction"]
    assert fractions == {"padded": 1.0, "packed": 1.0, "shared_prefix": pytest.approx(distinct / tokens)}
    assert 0.5 < fractions["shared_prefix"] < 0.75


# ---------------------------------------------------------------- batches made ahead


def no_thread_is_left() -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(thread.name == "batches" for thread in threading.enumerate()):
            return True
        time.sleep(0.02)
    return False


def test_prefetched_items_come_in_order_and_the_thread_ends():
    assert list(batching.prefetch(iter(range(50)), depth=3)) == list(range(50))
    assert list(batching.prefetch([None, None])) == [None, None]
    assert list(batching.prefetch([])) == []
    assert no_thread_is_left()


def test_items_are_made_while_the_consumer_is_busy_but_not_far_ahead():
    made = []
    third_is_made = threading.Event()

    def items():
        for i in range(100):
            made.append(i)
            if i == 2:
                third_is_made.set()
            yield i

    ready = batching.prefetch(items(), depth=4)
    assert next(ready) == 0
    assert third_is_made.wait(5)  # nobody has asked for it
    time.sleep(0.2)
    assert len(made) <= 1 + 4 + 1  # taken, waiting, and the one in hand
    ready.close()
    assert no_thread_is_left()


def test_an_exception_while_making_an_item_is_raised_where_the_item_is_asked_for():
    def items():
        yield 0
        yield 1
        raise ValueError("no third item")

    taken = []
    with pytest.raises(ValueError, match="no third item"):
        for item in batching.prefetch(items()):
            taken.append(item)
    assert taken == [0, 1]
    assert no_thread_is_left()


@pytest.mark.parametrize("depth", [1, 4])
def test_the_thread_ends_when_the_consumer_stops_early(depth):
    for item in batching.prefetch(itertools.count(), depth=depth):
        if item == 3:
            break
    assert no_thread_is_left()
