"""Held-out pairs: each is scored once, in its place, by whatever gives rewards, dealt by what it costs."""

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import alone
from pairs_of_ids import as_data

from open_rm.batching import feeding
from open_rm.batching.dealing import deal_step
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.evaluation import held_out
from open_rm.model.reward_model import Shape
from open_rm.training.metrics import PAIR_METRICS


@pytest.fixture
def data():
    """23 pairs over a few prompts, lengths from 3 to 60, each side ending in a number of its own."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(23):
        prompt = [5, 6 + i % 4, *[7] * (i % 4)]
        sides = [[*prompt, *rng.integers(10, 20, rng.integers(1, 55)).tolist(), 100 + 2 * i + side] for side in (0, 1)]
        pairs.append((np.array(sides[0]), np.array(sides[1])))
    return as_data(pairs, [2 + i % 4 for i in range(23)])


def last_token(input_ids, reward_index, **_) -> torch.Tensor:
    """A model whose reward is the token that it is read at."""
    return input_ids.flatten()[reward_index].float()


def rules(layout: str, max_tokens: int = 150) -> BatchRules:
    return BatchRules(layout, pad_token_id=0, max_tokens=1, evaluation_tokens=max_tokens).for_evaluation()


EXPECTED = torch.arange(100, 146, dtype=torch.float64).view(23, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_once", [4, 10**6])
def test_every_reward_lands_in_its_place_in_one_deal_or_in_pieces(data, layout, at_once, monkeypatch):
    monkeypatch.setattr(held_out, "DEALT_AT_ONCE", at_once)
    assert torch.equal(held_out.score_pairs(last_token, data, np.arange(23), rules(layout), alone()), EXPECTED)
    some = np.array([20, 3, 11])
    assert torch.equal(held_out.score_pairs(last_token, data, some, rules(layout), alone()), EXPECTED[some])


def test_no_gradient_is_kept(data):
    weight = torch.ones(1, requires_grad=True)
    rewards = held_out.score_pairs(
        lambda **inputs: weight * last_token(**inputs), data, np.arange(5), rules("packed"), alone()
    )
    assert not rewards.requires_grad


def test_metrics_are_means_over_the_pairs(data):
    found = held_out.evaluate(last_token, data, rules("shared_prefix"), alone())
    assert torch.equal(found.rewards, EXPECTED)
    assert found.metrics["eval/rm/accuracy"] == 0.0  # a rejected side's token is the larger by one
    assert found.metrics["eval/rm/reward_margin"] == -1.0
    assert found.metrics["eval/rm/chosen_rewards"] == pytest.approx(122.0)


def test_how_rewards_are_spread_is_said_overall_alone(data):
    columns = data.dataset.to_dict() | {"source": [i % 2 for i in range(23)]}
    data = dataclasses.replace(data, dataset=datasets.Dataset.from_dict(columns), labels=["first", "second"])
    names = set(held_out.evaluate(last_token, data, rules("packed"), alone()).metrics)
    # every pair is ranked wrong, so that no temperature fits
    spread = {"reward_mean", "reward_std", "ece", "length_accuracy", "length_matched_accuracy"}
    groups = {f"eval/rm/{group}{name}" for group in ("", "first/", "second/") for name in PAIR_METRICS}
    assert names == groups | {f"eval/rm/{name}" for name in spread} | {"eval/samples_per_second"}
    found = held_out.evaluate(lambda **inputs: -last_token(**inputs), data, rules("packed"), alone()).metrics
    assert found["eval/rm/reward_mean"] == pytest.approx(-122.5)
    assert found["eval/rm/reward_std"] == pytest.approx(np.std(np.arange(100, 146), ddof=1))


def with_labels(data, label_prob: list[float], source: list[int]):
    columns = data.dataset.to_dict() | {"label_prob": np.float32(label_prob), "source": source}
    return dataclasses.replace(data, dataset=datasets.Dataset.from_dict(columns), labels=["first", "second", "ties"])


def test_ties_are_left_out_of_what_is_said_of_right_and_wrong_and_of_nothing_else(data):
    """Overall as if the ties were not there, and by source; one source has nothing but ties."""
    probs = [0.5 if i % 3 == 0 else 0.8 if i % 5 == 0 else 1.0 for i in range(23)]
    source = [2 if i in (3, 9) else i % 2 for i in range(23)]
    labelled = with_labels(data, probs, source)
    rewards = 2 * torch.randn(46, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def rewards_of(input_ids, reward_index, **_):
        return rewards[input_ids.flatten()[reward_index] - 100]

    found = held_out.evaluate(rewards_of, labelled, rules("packed"), alone()).metrics
    pairs = rewards.view(23, 2).tolist()
    for name, members in {
        "": range(23),
        **{f"{one}/": [i for i in range(23) if source[i] == number] for number, one in enumerate(labelled.labels)},
    }.items():
        decided = [pairs[i][0] > pairs[i][1] for i in members if probs[i] != 0.5]
        losses = [
            -probs[i] * math.log(sigmoid(pairs[i][0] - pairs[i][1]))
            - (1 - probs[i]) * math.log(sigmoid(pairs[i][1] - pairs[i][0]))
            for i in members
        ]
        assert found[f"eval/rm/{name}accuracy"] == pytest.approx(sum(decided) / len(decided) if decided else 0.5)
        assert found[f"eval/rm/{name}loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found[f"eval/rm/{name}chosen_rewards"] == pytest.approx(np.mean([pairs[i][0] for i in members]))
    assert found["eval/rm/reward_std"] == pytest.approx(rewards.std().item())
    # of the decided pairs alone
    kept = np.flatnonzero(np.array(probs) != 0.5)
    alone_there = dataclasses.replace(labelled, dataset=labelled.dataset.select(kept), labels=["one"])
    only = held_out.evaluate(rewards_of, alone_there, rules("packed"), alone()).metrics
    for name in ("ece", "length_accuracy", "length_matched_accuracy", "accuracy"):
        assert found[f"eval/rm/{name}"] == pytest.approx(only[f"eval/rm/{name}"]), name
    assert found.get("eval/rm/temperature") == only.get("eval/rm/temperature")


def test_where_all_pairs_are_ties_nothing_is_said_of_how_far_accuracy_can_be_believed(data):
    found = held_out.evaluate(last_token, with_labels(data, [0.5] * 23, [0] * 23), rules("packed"), alone()).metrics
    assert found["eval/rm/accuracy"] == 0.5
    assert {name for name in found if "length" in name or "ece" in name or "temperature" in name} == set()
    assert all(map(math.isfinite, found.values()))


def test_a_sample_that_is_a_tie_is_neither_right_nor_wrong(data):
    """By its label alone: a pair whose rewards are equal is wrong, and a tie's are never anything."""
    probs = [0.5 if i % 2 else 0.8 if i % 3 else 1.0 for i in range(23)]
    labelled = with_labels(data, probs, [0] * 23)
    rewards = torch.tensor([[i % 5, 2] for i in range(23)], dtype=torch.float64)
    texts = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    rows = held_out.sample_table(held_out.Evaluation({}, rewards), labelled, texts, count=99, seed=3)
    assert [row["right"] for row in rows] == [None if i % 2 else i % 5 > 2 for i in range(23)]
    assert json.loads(json.dumps(rows)) == rows  # None, True and False, and nothing of numpy
    some = held_out.sample_table(held_out.Evaluation({}, rewards), labelled, texts, count=7, seed=3)
    where = [rows.index(row) for row in some]  # answers are all different
    assert len(some) == 7 and where == sorted(where) and {row["right"] for row in some} >= {None}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_how_far_the_accuracy_can_be_believed_is_what_counting_pair_by_pair_finds(data):
    rewards = torch.randn(23, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    table = data.table
    lengths = [
        [n - prompt for n in pair]
        for *pair, prompt in zip(table.chosen_length, table.rejected_length, table.prompt_length, strict=True)
    ]
    right = [chosen > rejected for chosen, rejected in rewards.tolist()]
    longer = sum(chosen > rejected for chosen, rejected in lengths) + sum(a == b for a, b in lengths) / 2
    like = [i for i, pair in enumerate(lengths) if max(pair) - min(pair) <= 0.1 * max(pair)]
    bins = {}
    for i, margin in enumerate((rewards[:, 0] - rewards[:, 1]).tolist()):
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins.setdefault(int((confidence - 0.5) * 20), []).append(right[i] - confidence)
    assert held_out.trust(rewards, table) == pytest.approx(
        {
            "ece": sum(abs(sum(one)) for one in bins.values()) / 23,
            "length_accuracy": max(longer, 23 - longer) / 23,
            "length_matched_accuracy": sum(right[i] for i in like) / len(like),
        }
    )
    assert len(bins) > 3 and 0 < len(like) < 23 and 2 * sum(right[i] for i in like) != len(like)


def test_where_no_lengths_match_or_a_reward_is_no_number_nothing_is_said_of_it():
    """Sequences of 95 and 100 tokens are alike, but not their responses of 5 and 10 behind the prompt."""
    data = as_data([(np.arange(100), np.arange(95)), (np.arange(4), np.arange(14))], [90, 1])
    rewards = torch.tensor([[1.0, 0.0], [math.nan, 0.0]], dtype=torch.float64)
    assert held_out.trust(rewards, data.table) == {"length_accuracy": 0.5}


def test_probes_are_spread_over_the_set_and_hold_whole_sequences(data):
    probe = held_out.probe(last_token, data, rules("padded"), alone(), padded_rows=contextlib.nullcontext)
    assert probe.noise == 0.0
    assert probe.rewards == [100.0, 101.0, 114.0, 115.0, 128.0, 129.0, 144.0, 145.0]
    assert [sequence[-1] for sequence in probe.sequences] == probe.rewards


def test_a_probes_noise_is_what_padded_rows_make_of_its_rewards(data):
    off = []

    @contextlib.contextmanager
    def padded_rows():
        off.append(0.5)
        yield
        off.clear()

    def rewards_of(input_ids, **layout):
        assert not off or (len(input_ids) == 2 and "segments" not in layout)  # a pair by itself, in padded rows
        return last_token(input_ids, **layout) + sum(off)

    probe = held_out.probe(rewards_of, data, rules("shared_prefix"), alone(), padded_rows=padded_rows)
    assert probe.rewards[0] == 100.0 and probe.noise == pytest.approx(0.5 / 101)


def test_probes_are_short_where_there_are_short_pairs():
    """A client may have only a CPU for an 8B."""

    def probed(chosen, rejected):
        table = SimpleNamespace(chosen_length=np.array(chosen), rejected_length=np.array(rejected))
        return held_out._probe_indices(Sized(len(chosen), table)).tolist()

    assert probed([10] * 9, [20] * 9) == [0, 2, 5, 8]
    assert probed([4000, 10, 10, 10, 1025, 10, 10, 10], [10, 10, 1024, 10, 10, 10, 4000, 10]) == [1, 2, 3, 7]
    assert probed([9000, 3000, 8000, 2000, 7000, 6000], [10] * 6) == [1, 3, 4, 5]  # none is short: the shortest


class Sized:
    """As much of a data set as is looked at."""

    def __init__(self, length, table):
        self.length, self.table = length, table

    def __len__(self):
        return self.length


def test_evaluation_deals_to_ranks_with_the_cost_of_attention_as_training_does():
    """A long pair and twelve short ones, two ranks: by tokens the long one gets three others beside it, by cost none."""
    lengths = [300] + [50] * 12
    data = as_data([(np.arange(1, n + 1), np.arange(n + 1, 2 * n + 1)) for n in lengths], [1] * 13)
    by_tokens = BatchRules("packed", pad_token_id=0, max_tokens=1000, evaluation_tokens=10_000)
    shape = Shape(body_parameters=1000, read_parameters=0, layers=4, attention_width=100, passes=3)
    by_cost = feeding.with_attention_cost(by_tokens, shape)
    beside = {}
    for name, how in (("tokens", by_tokens), ("cost", by_cost)):
        deal = deal_step(np.arange(13), data.table, how.for_evaluation(), world_size=2)
        shares = [[i for part in rank for i in part.indices[: part.counted].tolist()] for rank in deal.ranks]
        beside[name] = next(len(share) - 1 for share in shares if 0 in share)
    assert beside == {"tokens": 3, "cost": 0}
    assert by_cost.for_evaluation().max_tokens == 10_000
