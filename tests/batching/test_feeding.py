"""A step's pairs as batches of this rank: all of them, once, in order, made ahead of their use."""

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import alone
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_of_ids import as_data

from open_rm.batching import feeding
from open_rm.batching.dealing import Part, attention_cost, deal_step
from open_rm.batching.prefetch import prefetch
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.batching.steps import draw_steps
from open_rm.batching.targets import PLAIN, TargetColumns
from open_rm.flags import BatchFlags
from open_rm.ranks import Ranks


def rules(layout: str = "shared_prefix", max_tokens: int = 150) -> BatchRules:
    return BatchRules(layout, pad_token_id=0, max_tokens=max_tokens, evaluation_tokens=max_tokens)


def rank_of(rank: int, world_size: int) -> Ranks:
    """Where a process of a group stands; nothing here talks to the others."""
    return Ranks(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data():
    """30 pairs of 12 prompts, of 20 to 140 tokens; a side of pair i ends with the token 1000 + i or 2000 + i."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 900, rng.integers(5, 60)).tolist() for _ in range(12)]
    pairs, lengths = [], []
    for i in range(30):
        prompt = prompts[i % 12]
        sides = (rng.integers(10, 900, rng.integers(3, 80)).tolist() for _ in range(2))
        pairs.append(tuple([*prompt, *side, end + i] for side, end in zip(sides, (1000, 2000), strict=True)))
        lengths.append(len(prompt))
    return as_data(pairs, lengths)


def draws(data, pairs_per_step: int = 8, epochs: int = 2) -> list[np.ndarray]:
    return list(draw_steps(len(data), pairs_per_step, epochs * len(data), seed=3))


def fed(data, how: BatchRules, world_size: int = 1, **options) -> list[list[feeding.Step]]:
    """The steps of each rank."""
    everyone = [rank_of(rank, world_size) for rank in range(world_size)]
    return [list(feeding.training_steps(draws(data), data, how, ranks, **options)) for ranks in everyone]


def last_tokens(micro: feeding.MicroBatch) -> torch.Tensor:
    """[2 B], as rewards come."""
    return micro.batch.input_ids.flatten()[micro.batch.reward_index]


# ---------------------------------------------------------------- steps of the ranks


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_is_fed_once_an_epoch_over_all_ranks_and_in_its_own_step(data, layout, world_size):
    everyone = fed(data, rules(layout), world_size)
    drawn = draws(data)
    assert [[step.number for step in steps] for steps in everyone] == [[*range(1, len(drawn) + 1)]] * world_size
    epoch: list[int] = []
    for indices, of_ranks in zip(drawn, zip(*everyone, strict=True), strict=True):
        found = [pair for step in of_ranks for micro in step.micro_batches for pair in micro.indices.tolist()]
        assert sorted(found) == sorted(indices.tolist())
        assert {step.pairs for step in of_ranks} == {len(indices)}
        assert len({len(step.micro_batches) for step in of_ranks}) == 1
        assert len({step.imbalance for step in of_ranks}) == 1 and of_ranks[0].imbalance >= 1
        epoch += found
        if len(epoch) == len(data):
            assert sorted(epoch) == list(range(len(data)))
            epoch = []
    assert not epoch and len(drawn) == 8


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_holds_the_pairs_that_it_names_chosen_first(data, layout, world_size):
    for steps in fed(data, rules(layout), world_size):
        for micro in (micro for step in steps for micro in step.micro_batches):
            chosen, rejected, _ = micro.sides(last_tokens(micro))
            assert chosen.tolist() == (1000 + micro.indices).tolist()
            assert rejected.tolist() == (2000 + micro.indices).tolist()
            assert micro.batch.positions <= 150 or len(last_tokens(micro)) == 2


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_margins_arrive_with_their_pairs(data, layout, world_size):
    margins = np.random.default_rng(1).normal(size=len(data)).astype(np.float32)
    for steps in fed(data, rules(layout), world_size, targets=TargetColumns(margins, 1 - margins)):
        for micro in (micro for step in steps for micro in step.micro_batches):
            assert micro.targets.margins.dtype == torch.float32 and micro.targets.lists is None
            assert micro.targets.margins.tolist() == margins[micro.indices].tolist()
            assert micro.targets.label_prob.tolist() == (1 - margins)[micro.indices].tolist()


def test_plain_pairs_come_without_targets(data):
    for columns in (None, TargetColumns()):
        [steps] = fed(data, rules(), targets=columns)
        assert all(micro.targets == PLAIN for step in steps for micro in step.micro_batches)


# ---------------------------------------------------------------- ranks that only keep in step


def test_last_is_said_once_where_filler_parts_are_one_object(data):
    filler = Part(np.array([4]), counted=0)
    parts = [Part(np.array([7, 8]), counted=2), filler, filler, filler]
    made = list(feeding.micro_batches(parts, data, rules()))
    assert [micro.last for micro in made] == [False, False, False, True]
    assert [micro.indices.tolist() for micro in made] == [[7, 8], [], [], []]
    assert [micro.last for micro in feeding.micro_batches([filler], data, rules())] == [True]


def test_last_is_said_once_a_step_on_each_rank_also_where_a_rank_has_less_to_do():
    """A pair that is longer than all others together: one rank has it alone and waits for the other's micro-batches."""
    pairs = [([7] * 399 + [i], [8] * 399 + [i]) if i == 0 else ([9] * 40 + [i], [10] * 40 + [i]) for i in range(8)]
    data = as_data(pairs, [0] * 8)
    how = rules("packed", max_tokens=100)
    deal = deal_step(np.arange(8), data.table, how, 2)
    assert max(sum(part.counted == 0 for part in rank) for rank in deal.ranks) > 2  # several fillers on a rank
    for rank in range(2):
        ranks = rank_of(rank, 2)
        [step] = feeding.training_steps([np.arange(8)], data, how, ranks)
        assert [micro.last for micro in step.micro_batches] == [False] * (len(step.micro_batches) - 1) + [True]
        assert len(step.micro_batches) == len(deal.ranks[rank])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    world_size=st.integers(1, 9),
    pairs_per_step=st.integers(1, 12),
    max_tokens=st.sampled_from([1, 150, 10**6]),
)
def test_last_is_said_once_a_step_on_any_number_of_ranks(data, layout, world_size, pairs_per_step, max_tokens):
    drawn = draws(data, pairs_per_step, epochs=1)[:2]
    for rank in range(world_size):
        for step in feeding.training_steps(drawn, data, rules(layout, max_tokens), rank_of(rank, world_size)):
            assert [micro.last for micro in step.micro_batches].count(True) == 1 and step.micro_batches[-1].last


def test_sides_leave_out_the_pairs_that_do_not_count(data):
    """Rewards come for all pairs of a batch, [2 B]; a filler's pair has two, and neither may enter loss or metrics."""
    counted, filler = feeding.micro_batches([Part(np.array([7, 8, 3]), 3), Part(np.array([4]), 0)], data, rules())
    chosen, rejected, predicted = counted.sides(torch.arange(6.0))
    assert (chosen.tolist(), rejected.tolist(), predicted) == ([0, 1, 2], [3, 4, 5], None)
    assert [len(side) for side in filler.sides(torch.arange(2.0))[:2]] == [0, 0]
    assert len(last_tokens(filler)) == 2  # the rank calls the model all the same
    rewards = torch.arange(2.0, requires_grad=True)
    sum(side.sum() for side in filler.sides(rewards)[:2]).backward()  # a loss of nothing has a gradient, of zeros
    assert rewards.grad.tolist() == [0, 0]


def test_predicted_attributes_stand_behind_the_rewards_of_their_sides(data):
    counted, filler = feeding.micro_batches([Part(np.array([7, 8, 3]), 3), Part(np.array([4]), 0)], data, rules())
    output = torch.arange(18.0).reshape(6, 3).requires_grad_()
    chosen, rejected, predicted = counted.sides(output)
    assert (chosen.tolist(), rejected.tolist()) == ([0, 3, 6], [9, 12, 15])
    assert predicted.tolist() == [[[1, 2], [10, 11]], [[4, 5], [13, 14]], [[7, 8], [16, 17]]]
    assert [len(part) for part in filler.sides(output[:2])] == [0, 0, 0]
    sum(part.sum() for part in filler.sides(output[:2])).backward()
    assert not output.grad.any()


def test_margins_of_pairs_that_do_not_count_are_left_out(data):
    parts = [Part(np.array([7, 8]), 2), Part(np.array([4]), 0)]
    margins = np.arange(len(data), dtype=np.float32)
    targets = TargetColumns(margins).of_step(np.array([7, 8]))
    found = [micro.targets.margins.tolist() for micro in feeding.micro_batches(parts, data, rules(), targets)]
    assert found == [[7, 8], []]


# ---------------------------------------------------------------- the same again


def described(step: feeding.Step):
    parts = [
        (micro.indices.tolist(), micro.batch.input_ids.tolist(), micro.targets.margins.tolist(), micro.last)
        for micro in step.micro_batches
    ]
    return step.number, step.pairs, step.imbalance, parts


def test_the_same_steps_are_fed_again_and_fewer_draws_leave_them_as_they_were(data):
    columns = TargetColumns(np.arange(len(data), dtype=np.float32))
    for rank in range(2):
        how = (data, rules(), rank_of(rank, 2))
        whole, again, fewer = (
            list(map(described, feeding.training_steps(draws(data)[:count], *how, targets=columns)))
            for count in (8, 8, 3)
        )
        assert whole == again and whole[:3] == fewer


# ---------------------------------------------------------------- the rules of the flags


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_budget_of_training_is_what_the_flag_says_else_what_the_batch_sizes_take(on_gpu):
    """2 x 8 x 100 = 1,600 positions, above the 1,536 that a CPU's caches hold well; 2 x 2 x 100 are below."""
    flags = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 8}
    how = {"max_token_length": 100, "on_gpu": on_gpu}
    found = feeding.rules_of(BatchFlags(**flags), "packed", 5, **how)
    assert (found.layout, found.pad_token_id, found.area_cost) == ("packed", 5, 0)
    assert (found.max_tokens, found.evaluation_tokens) == (400, 1600 if on_gpu else 1536)
    named = feeding.rules_of(BatchFlags(**flags, max_tokens_per_micro_batch=77), "packed", 5, **how)
    assert (named.max_tokens, named.evaluation_tokens) == (77, found.evaluation_tokens)
    assert [feeding.rules_of(BatchFlags(), "packed", 5, **how, whole_lists=w).whole_lists for w in (0, 1)] == [0, 1]


def test_attention_weighs_in_training_and_in_evaluation():
    """What a query-key product costs is known with the model."""
    shape = SimpleNamespace(body_parameters=1000, layers=2, attention_width=16)
    how = feeding.with_attention_cost(BatchRules("packed", 5, max_tokens=400, evaluation_tokens=800), shape)
    assert how == BatchRules("packed", 5, 400, 800, area_cost=attention_cost(1000, 2, 16))
    assert how.for_evaluation() == BatchRules("packed", 5, 800, 800, area_cost=how.area_cost)


# ---------------------------------------------------------------- made ahead


def no_thread_is_left() -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(thread.name == "batches" for thread in threading.enumerate()):
            return True
        time.sleep(0.02)
    return False


def test_prefetched_items_come_in_order_and_the_thread_ends():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))
    assert list(prefetch([None, None])) == [None, None]
    assert list(prefetch([])) == []
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

    ready = prefetch(items(), depth=4)
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
        for item in prefetch(items()):
            taken.append(item)
    assert taken == [0, 1]
    assert no_thread_is_left()


@pytest.mark.parametrize("depth", [1, 4])
def test_the_thread_ends_when_the_consumer_stops_early(depth):
    for item in prefetch(itertools.count(), depth=depth):
        if item == 3:
            break
    assert no_thread_is_left()


def test_steps_are_made_ahead_and_the_thread_ends_when_the_run_stops_early(data):
    taken = []

    def drawn():
        for indices in draws(data):
            taken.append(len(indices))
            yield indices

    steps = feeding.training_steps(drawn(), data, rules(), alone())
    assert next(steps).number == 1
    deadline = time.monotonic() + 5
    while len(taken) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert 3 <= len(taken) <= 1 + feeding.STEPS_AHEAD + 1  # taken, waiting, and the one in hand
    steps.close()
    assert no_thread_is_left()


def test_a_step_says_when_it_was_asked_for_and_how_long_the_loop_waited(data):
    def slowly():
        for indices in draws(data)[:2]:
            time.sleep(0.2)
            yield indices

    started = time.perf_counter()
    [first, second] = feeding.training_steps(slowly(), data, rules(), alone())
    assert started <= first.asked <= second.asked <= time.perf_counter()
    assert 0.2 <= first.waited <= second.asked - first.asked  # nothing was there yet


def test_an_error_while_a_step_is_made_is_raised_where_it_is_asked_for(data):
    def drawn():
        yield draws(data)[0]
        raise ValueError("no second step")

    steps = feeding.training_steps(drawn(), data, rules(), alone())
    assert next(steps).number == 1
    with pytest.raises(ValueError, match="no second step"):
        next(steps)
    assert no_thread_is_left()
