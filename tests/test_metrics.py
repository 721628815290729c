"""Metrics are sums over pairs, and a tie is not correct."""

from types import SimpleNamespace

import pytest
import torch

from open_rm.losses import ranking_loss
from open_rm.metrics import StepMetrics, pair_means, pair_sums, training_flops

SHAPE = SimpleNamespace(body_parameters=10, layers=2, attention_width=4)


def means(chosen, rejected):
    return pair_means(pair_sums(chosen, rejected, ranking_loss(chosen, rejected)), len(chosen))


def test_a_tie_is_not_a_correct_prediction():
    assert means(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))["accuracy"] == 0.5


def test_swapping_chosen_and_rejected_gives_one_minus_accuracy_and_negates_the_margin():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, generator=generator)
    straight, swapped = means(chosen, rejected), means(rejected, chosen)
    assert swapped["accuracy"] == pytest.approx(1 - straight["accuracy"])
    assert swapped["reward_margin"] == pytest.approx(-straight["reward_margin"])


def test_uneven_micro_batches_average_over_pairs_not_over_batches():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 7, generator=generator)
    metrics = StepMetrics(torch.device("cpu"), SHAPE)
    batch = SimpleNamespace(tokens=30, positions=40, squared_lengths=90)
    for part in (slice(0, 5), slice(5, 7)):
        metrics.add(chosen[part], rejected[part], ranking_loss(chosen[part], rejected[part]), batch)
    result, counts = metrics.reduce(7)
    assert result == pytest.approx(means(chosen, rejected))
    assert (counts["tokens"], counts["positions"]) == (60, 80)


def test_a_micro_batch_that_only_keeps_ranks_in_step_adds_positions_but_nothing_else():
    metrics = StepMetrics(torch.device("cpu"), SHAPE)
    empty = torch.zeros(0)
    metrics.add(empty, empty, empty, SimpleNamespace(tokens=30, positions=40, squared_lengths=90))
    result, counts = metrics.reduce(1)
    assert set(result.values()) == {0.0}
    assert counts == {"tokens": 0, "positions": 40, "flops": 0}


def test_flops_are_six_per_parameter_and_token_plus_causal_attention():
    assert training_flops(tokens=5, squared_lengths=13, shape=SHAPE) == 6 * 10 * 5 + 6 * 2 * 4 * 13
