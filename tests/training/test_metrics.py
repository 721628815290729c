"""Metrics are sums over pairs, and a tie is not correct."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import alone

from open_rm.batching.feeding import Step
from open_rm.batching.layouts import lay_out
from open_rm.batching.targets import PLAIN, Targets
from open_rm.flags import ObjectiveFlags
from open_rm.training import metrics
from open_rm.training.losses import loss_terms, ranking_loss
from open_rm.training.metrics import Meter, matmul_flops, pair_means, pair_sums, training_flops

SHAPE = SimpleNamespace(body_parameters=10, read_parameters=3, layers=2, attention_width=4, passes=3)


def means(chosen, rejected):
    return pair_means(pair_sums(chosen, rejected, ranking_loss(chosen, rejected)), len(chosen))


def test_equal_rewards_are_not_a_correct_prediction():
    assert means(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))["accuracy"] == 0.5


def test_swapping_chosen_and_rejected_gives_one_minus_accuracy_and_negates_the_margin():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, generator=generator)
    straight, swapped = means(chosen, rejected), means(rejected, chosen)
    assert swapped["accuracy"] == pytest.approx(1 - straight["accuracy"])
    assert swapped["reward_margin"] == pytest.approx(-straight["reward_margin"])


def test_accuracy_leaves_ties_out_and_nothing_else_does():
    chosen, rejected = torch.tensor([1.0, 2.0, 9.0, 4.0]), torch.tensor([0.0, 3.0, 0.0, 4.5])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = pair_means(pair_sums(chosen, rejected, losses, torch.tensor([True, True, False, True])), 4)
    assert found == {
        "accuracy": pytest.approx(1 / 3),  # the third is a tie, whatever its rewards
        "loss": 2.5,
        "chosen_rewards": 4.0,
        "rejected_rewards": 1.875,
        "reward_margin": 2.125,
    }


def test_pairs_that_are_all_ties_have_the_accuracy_of_a_guess():
    ties = torch.zeros(2, dtype=torch.bool)
    assert pair_means(pair_sums(torch.ones(2), torch.zeros(2), torch.ones(2), ties), 2)["accuracy"] == 0.5


# ---- the meter


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


@pytest.fixture
def meter(monkeypatch) -> Meter:
    """On a device of 1,000 FLOPs a second that holds 3 GiB."""
    monkeypatch.setattr(metrics, "matmul_flops", lambda ranks, dtype: 1000.0)
    monkeypatch.setattr(metrics, "peak_memory_gib", lambda ranks: 3.0)
    return Meter(alone(), SHAPE, torch.float32)


def micro_batch(**changes):
    return SimpleNamespace(
        **(
            {"tokens": 30, "computed": 24, "per_prompt": 27, "positions": 40, "area": 90, "read_index": torch.arange(7)}
            | changes
        )
    )


def add(meter, chosen, rejected, **changes):
    meter.add(chosen, rejected, loss_terms(chosen, rejected, PLAIN, ObjectiveFlags()), micro_batch(**changes))


def counts_of(meter, clock) -> dict[str, float]:
    """What the meter counted in the step that was reduced last, from what it says of a step of two seconds."""
    step = Step(number=1, pairs=7, micro_batches=[], imbalance=1.0, indices=np.arange(7), asked=clock.now - 2.0)
    perf = meter.performance(step, flops_before=0.0)
    tokens = perf["perf/tokens_per_second"] * 2.0
    computed = perf["perf/distinct_token_fraction"] * tokens
    positions = computed / (1 - perf["perf/padding_fraction"])
    return {"tokens": tokens, "computed": computed, "positions": positions, "flops": perf["perf/total_flops"]}


ONE_BATCH_FLOPS = training_flops(tokens=24, area=90, shape=SHAPE, read=7)


def test_uneven_micro_batches_average_over_pairs_not_over_batches(meter, clock):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 7, generator=generator)
    for part in (slice(0, 5), slice(5, 7)):
        add(meter, chosen[part], rejected[part])
    result = meter.reduce(7)
    expected = means(chosen, rejected)
    assert result == pytest.approx(expected | {"loss_ranking": expected["loss"]})
    assert counts_of(meter, clock) == pytest.approx(
        {"tokens": 60, "computed": 48, "positions": 80, "flops": 2 * ONE_BATCH_FLOPS}
    )


def test_accuracy_is_over_the_decided_pairs_of_the_step_not_of_each_micro_batch(meter):
    """Two of three decided pairs are right, in micro-batches of one and two decided pairs, and one without any."""
    for rewards, label_prob in (([1.0, -1.0], [1.0, 0.5]), ([-2.0, 2.0, 5.0], [0.7, 1.0, 0.5]), ([-3.0], [0.5])):
        chosen, targets = torch.tensor(rewards), Targets(label_prob=torch.tensor(label_prob))
        terms = loss_terms(chosen, torch.zeros_like(chosen), targets, ObjectiveFlags())
        meter.add(chosen, torch.zeros_like(chosen), terms, micro_batch(), targets)
    found = meter.reduce(6)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["reward_margin"] == pytest.approx(2 / 6)


def test_a_micro_batch_that_only_keeps_ranks_in_step_adds_positions_but_nothing_else(meter, clock):
    empty = torch.zeros(0)
    meter.add(empty, empty, {"ranking": empty}, micro_batch())
    assert meter.reduce(1) == {"accuracy": 0.5} | dict.fromkeys([*metrics.PAIR_METRICS[1:], "loss_ranking"], 0.0)
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.5])
    add(meter, chosen, rejected)
    meter.add(empty, empty, {"ranking": empty}, micro_batch())
    expected = means(chosen, rejected)
    assert meter.reduce(1) == pytest.approx(expected | {"loss_ranking": expected["loss"]})
    assert counts_of(meter, clock) == pytest.approx(
        {"tokens": 30, "computed": 24, "positions": 80, "flops": ONE_BATCH_FLOPS}
    )


def test_a_step_begins_at_zero_again(meter, clock):
    chosen, rejected = torch.randn(2, 7, generator=torch.Generator().manual_seed(2))
    steps = []
    for _ in range(2):
        add(meter, chosen, rejected)
        steps.append((meter.reduce(7), counts_of(meter, clock)))
    assert steps[0] == steps[1]


def test_flops_are_six_per_parameter_and_token_that_it_is_applied_to_plus_causal_attention():
    assert training_flops(tokens=5, area=13, shape=SHAPE, read=2) == 6 * 10 * 5 + 6 * 3 * 2 + 12 * 2 * 4 * 13


def test_perf_metrics_are_what_their_names_say(meter, clock):
    """60 tokens of which 48 are computed, in 80 positions, by 8 pairs in 2 seconds, on devices of 1,000 FLOPs a second."""
    for tokens, computed, per_prompt, positions in ((40, 30, 36, 50), (20, 18, 18, 30)):
        counts = {"tokens": tokens, "computed": computed, "per_prompt": per_prompt, "positions": positions}
        add(meter, torch.zeros(4), torch.zeros(4), **counts)
    meter.reduce(8)
    step = Step(number=3, pairs=8, micro_batches=[], imbalance=1.02, indices=np.arange(8), asked=clock.now, waited=0.1)
    clock.now += 2.0
    flops = sum(training_flops(tokens=tokens, area=90, shape=SHAPE, read=7) for tokens in (30, 18))
    assert meter.performance(step, flops_before=400.0) == {
        "perf/pairs_per_second": 4.0,
        "perf/tokens_per_second": 30.0,
        "perf/step_seconds": 2.0,
        "perf/data_seconds": 0.1,
        "perf/memory_gib": 3.0,
        "perf/padding_fraction": pytest.approx(0.4),
        "perf/distinct_token_fraction": pytest.approx(0.8),
        "perf/prompt_saving": pytest.approx(0.1),
        "perf/header_saving": pytest.approx(0.1),
        "perf/rank_imbalance": 1.02,
        "perf/mfu": pytest.approx(flops / 2000),
        "perf/total_flops": 400.0 + flops,
    }


def test_what_prompts_and_what_headers_save_are_counted_token_by_token(meter, clock):
    """Two prompts behind a header of 20 tokens, one with two pairs that share an answer; and a prompt of its own."""
    header = list(range(100, 120))
    first, second, alone_ = [*header, 1, 2, 3], [*header, 4, 5], [6] * 10
    pairs = [
        ([*first, 7, 8], [*first, 9]),
        ([*first, 7, 8], [*first, 10, 11, 12]),
        ([*second, 13], [*second, 14, 15]),
        ([*alone_, 16], [*alone_, 17]),
    ]
    prompt_ids = [0, 0, 1, 2]
    sides = [(prompt, side) for prompt, pair in zip(prompt_ids, pairs, strict=True) for side in pair]
    tokens = sum(len(side) for _, side in sides)
    # A token is known by all before it: once for each prompt, or where headers are shared too once for all.
    of_prompts = len({(prompt, tuple(side[: n + 1])) for prompt, side in sides for n in range(len(side))})
    distinct = len({tuple(side[: n + 1]) for _, side in sides for n in range(len(side))})
    assert (tokens, of_prompts, distinct) == (169, 66, 46)
    expected = {
        "padded": (1, 0, 0),
        "packed": (1, 0, 0),
        "shared_prefix": (distinct / tokens, 1 - of_prompts / tokens, (of_prompts - distinct) / tokens),
    }
    for layout, shares in expected.items():
        batch = lay_out(layout, pairs, pad_token_id=0, prompt_ids=prompt_ids)
        rewards, empty = torch.zeros(4), torch.zeros(0)
        meter.add(rewards, rewards, {"ranking": rewards}, batch)
        meter.add(empty, empty, {"ranking": empty}, batch)  # computed to keep ranks in step; of no pairs of the step
        meter.reduce(4)
        step = Step(number=1, pairs=4, micro_batches=[], imbalance=1.0, indices=np.arange(4), asked=clock.now - 2.0)
        perf = meter.performance(step, flops_before=0.0)
        names = ("distinct_token_fraction", "prompt_saving", "header_saving")
        assert tuple(perf[f"perf/{name}"] for name in names) == pytest.approx(shares), layout


# ---- the rate of matrix products


class Product:
    """A square matrix whose product takes, by the clock, what it takes at `rate` FLOPs a second after a start of 20 us."""

    def __init__(self, n: int, rate: float, clock: Clock):
        self.n, self.rate, self.clock = n, rate, clock

    def to(self, dtype) -> "Product":
        return self

    def __matmul__(self, other: "Product") -> "Product":
        self.clock.now += 2e-5 + 2 * self.n**3 / self.rate
        return self


@pytest.mark.parametrize("rate", [1.5e9, 3e10, 1e12, 1e15])
def test_the_matrix_product_rate_is_right_and_costs_at_most_three_tenths_of_a_second(monkeypatch, clock, rate):
    """On any device: a CPU in bfloat16 without AVX-512, one in float32, GPUs. Small products would show the start alone."""
    monkeypatch.setattr(torch, "rand", lambda n, *_, **how: Product(n, rate, clock))
    before = clock.now
    assert matmul_flops(alone(), torch.bfloat16) == pytest.approx(rate, rel=0.1)
    assert 0 < clock.now - before <= 0.3


def test_the_matrix_product_rate_of_this_machine_is_found_and_no_random_number_of_the_run_is_used_up():
    """How many products it takes depends on the clock."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert 1e7 < matmul_flops(alone(), torch.float32) < 1e16
    assert torch.equal(torch.get_rng_state(), before)
