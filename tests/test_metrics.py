"""Metrics are sums over pairs, and a tie is not correct."""

from types import SimpleNamespace

import pytest
import torch

from open_rm.losses import loss_terms, ranking_loss
from open_rm.metrics import StepMetrics, pair_means, pair_sums, perf_metrics, training_flops

SHAPE = SimpleNamespace(body_parameters=10, read_parameters=3, layers=2, attention_width=4, passes=3)


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


def micro_batch(**changes):
    return SimpleNamespace(
        **({"tokens": 30, "computed": 24, "positions": 40, "area": 90, "read_index": torch.arange(7)} | changes)
    )


def test_uneven_micro_batches_average_over_pairs_not_over_batches():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 7, generator=generator)
    metrics = StepMetrics(torch.device("cpu"), SHAPE)
    for part in (slice(0, 5), slice(5, 7)):
        metrics.add(chosen[part], rejected[part], loss_terms(chosen[part], rejected[part]), micro_batch())
    result, counts = metrics.reduce(7)
    expected = means(chosen, rejected)
    assert result == pytest.approx(expected | {"loss_ranking": expected["loss"]})
    assert counts == {
        "tokens": 60,
        "computed": 48,
        "positions": 80,
        "flops": 2 * training_flops(tokens=24, area=90, shape=SHAPE, read=7),
    }


def test_a_micro_batch_that_only_keeps_ranks_in_step_adds_positions_but_nothing_else():
    metrics = StepMetrics(torch.device("cpu"), SHAPE)
    empty = torch.zeros(0)
    metrics.add(empty, empty, {"ranking": empty}, micro_batch())
    result, counts = metrics.reduce(1)
    assert set(result.values()) == {0.0}
    assert counts == {"tokens": 0, "computed": 0, "positions": 40, "flops": 0}


def test_flops_are_six_per_parameter_and_token_that_it_is_applied_to_plus_causal_attention():
    assert training_flops(tokens=5, area=13, shape=SHAPE, read=2) == 6 * 10 * 5 + 6 * 3 * 2 + 12 * 2 * 4 * 13


def test_perf_metrics_are_what_their_names_say():
    """60 tokens of which 48 are computed, in 80 positions, by 8 pairs in 2 seconds, on devices of 1,000 FLOPs a second."""
    counts = {"tokens": 60.0, "computed": 48.0, "positions": 80.0, "flops": 500.0}
    perf = perf_metrics(
        counts,
        pairs=8,
        step_seconds=2.0,
        data_seconds=0.1,
        imbalance=1.02,
        memory_gib=3.0,
        total_flops=900.0,
        peak_flops=1000.0,
    )
    assert perf == {
        "perf/pairs_per_second": 4.0,
        "perf/tokens_per_second": 30.0,
        "perf/step_seconds": 2.0,
        "perf/data_seconds": 0.1,
        "perf/memory_gib": 3.0,
        "perf/padding_fraction": pytest.approx(0.4),
        "perf/distinct_token_fraction": pytest.approx(0.8),
        "perf/rank_imbalance": 1.02,
        "perf/mfu": pytest.approx(0.25),
        "perf/total_flops": 900.0,
    }
