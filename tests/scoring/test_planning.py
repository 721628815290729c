"""Micro-batches: every sequence once, within the limit, prompts shared where that saves most."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from open_rm.batching import layouts
from open_rm.batching.layouts import lay_out_sequences
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import OpeningFlags
from open_rm.scoring.opening import open_scorer
from open_rm.scoring.planning import LEAST_SHARED, plan, shared_prompts


def answers(prompts: int, each: int, seed: int = 0) -> list[np.ndarray]:
    """Token ids: prompts of 10 to 30 tokens behind 4 that all have, with answers of 1 to 30."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(prompts):
        prompt = rng.integers(5, 500, rng.integers(10, 31))
        found += [np.r_[[1, 2, 3, 4], prompt, rng.integers(5, 500, rng.integers(1, 31))] for _ in range(each)]
    return [found[i] for i in rng.permutation(len(found))]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("max_tokens", [1, 40, 200, 10_000])
def test_every_sequence_is_computed_once_within_the_limit(layout, max_tokens):
    sequences = answers(7, 4)
    parts = plan(sequences, None, layout=layout, max_tokens=max_tokens)
    assert sorted(i for part in parts for i in part.members) == list(range(len(sequences)))
    for part in parts:
        members = [sequences[i] for i in part.members]
        batch = lay_out_sequences(layout, members, pad_token_id=0, prompt_of=part.prompt_of)
        assert batch.positions <= max_tokens or len(members) == 1
    assert max_tokens > 1 or len(parts) == len(sequences)


def test_the_same_call_has_the_same_plan():
    sequences = answers(7, 4)
    assert plan(sequences, None, layout="shared_prefix", max_tokens=99) == plan(
        sequences, None, layout="shared_prefix", max_tokens=99
    )


def test_sequences_on_either_side_of_a_bound_are_never_together():
    sequences = answers(5, 4)
    for part in plan(sequences, None, layout="padded", max_tokens=500, apart_at=40):
        assert len({len(sequences[i]) > 40 for i in part.members}) == 1


def saved(sequences: list[np.ndarray], groups: list[list[int]]) -> int:
    """Tokens that need not be computed again where each group shares what all of it begins with."""
    total = 0
    for group in groups:
        columns = zip(*(sequences[i].tolist() for i in group), strict=False)
        overlap = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        total += (len(group) - 1) * (overlap if overlap >= LEAST_SHARED else 0)
    return total


def partitions(members: list[int]):
    if not members:
        yield []
        return
    first, rest = members[0], members[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [i for i in rest if i not in others]
            for partition in partitions(left):
                yield [[first, *others], *partition]


def groups_of(prompt_of) -> list[list[int]]:
    return [np.flatnonzero(prompt_of == prompt).tolist() for prompt in np.unique(prompt_of)]


@pytest.mark.parametrize("seed", range(12))
def test_prompts_that_are_found_save_as_much_as_the_best_grouping(seed):
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 2, size) for size in (9, 12, 20)]
    sequences = [np.r_[stems[rng.integers(3)][: rng.integers(6, 21)], rng.integers(0, 2, 9)] for _ in range(7)]
    best = max(saved(sequences, groups) for groups in partitions(list(range(len(sequences)))))
    assert saved(sequences, groups_of(shared_prompts(sequences))) == best


def test_answers_of_a_prompt_are_found_behind_a_beginning_that_all_have():
    sequences = answers(6, 5)
    groups = groups_of(shared_prompts(sequences))
    assert sorted(map(len, groups)) == [5] * 6
    for group in groups:
        assert len({tuple(sequences[i][:14]) for i in group}) == 1


def test_of_nothing_there_is_no_plan():
    assert plan([], None, layout="shared_prefix", max_tokens=9) == []


def behind_a_header(sequences: list[np.ndarray], tokens: int = 200) -> list[np.ndarray]:
    """The same behind a system prompt of so many tokens."""
    header = np.random.default_rng(9).integers(5, 500, tokens)
    return [np.r_[header, sequence] for sequence in sequences]


def computed(sequences: list[np.ndarray], parts) -> list[int]:
    """Positions of each micro-batch, as it lies in memory."""
    return [
        lay_out_sequences(
            "shared_prefix", [sequences[i] for i in part.members], pad_token_id=0, prompt_of=part.prompt_of
        ).positions
        for part in parts
    ]


def without_headers(monkeypatch) -> None:
    monkeypatch.setattr(layouts, "LEAST_HEADER", 10**9)
    monkeypatch.setattr(layouts.lay_out_sequences, "__kwdefaults__", {"unit_of": None, "least_header": 10**9})


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 210, 500, 1500])
def test_prompts_behind_a_header_fill_the_budget_and_compute_it_once_a_micro_batch(max_tokens, found, monkeypatch):
    own = [sequence[4:] for sequence in answers(30, 3)]
    sequences = behind_a_header(own)
    prompt_of = None if found else [tuple(sequence[200:210]) for sequence in sequences]
    if not found:
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt_of))}
        prompt_of = [numbers[prompt] for prompt in prompt_of]
    parts = plan(sequences, prompt_of, layout="shared_prefix", max_tokens=max_tokens)
    assert sorted(i for part in parts for i in part.members) == list(range(len(sequences)))
    positions = computed(sequences, parts)
    assert all(n <= max_tokens or len(part.members) == 1 for n, part in zip(positions, parts, strict=True))
    if max_tokens >= 500:
        # What is behind the header takes what it takes without one, but for prompts that a micro-batch's end cuts in two.
        behind = sum(positions) - 200 * len(parts)
        alone = sum(computed(own, plan(own, prompt_of, layout="shared_prefix", max_tokens=10**6)))
        assert alone <= behind and behind <= alone + 40 * len(parts)
        assert len(parts) <= 1 + 1.2 * behind / (max_tokens - 200)
    without_headers(monkeypatch)
    before = plan(sequences, prompt_of, layout="shared_prefix", max_tokens=max_tokens)
    if max_tokens >= 500:
        assert len(parts) < 0.8 * len(before) and sum(positions) < 0.7 * sum(computed(sequences, before))


def test_prompts_are_found_behind_a_header_as_they_are_without_one():
    sequences = answers(20, 4)
    assert sorted(groups_of(shared_prompts(behind_a_header(sequences)))) == sorted(groups_of(shared_prompts(sequences)))


def test_where_there_is_no_header_the_plan_is_that_without_headers(monkeypatch):
    sequences = [sequence[4:] for sequence in answers(40, 3)]
    how = {"layout": "shared_prefix", "max_tokens": 300}
    found = plan(sequences, None, **how)
    without_headers(monkeypatch)
    assert found == plan(sequences, None, **how) and len(found) > 3


@pytest.mark.parametrize("seed", range(30))
def test_the_budget_holds_whatever_beginnings_are_shared(seed, monkeypatch):
    """Beginnings of many lengths in few symbols, so that headers overlap in all ways."""
    monkeypatch.setattr(layouts, "LEAST_HEADER", 2)
    monkeypatch.setattr(layouts.lay_out_sequences, "__kwdefaults__", {"unit_of": None, "least_header": 2})
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 2, size) for size in (12, 20, 30)]
    some = [
        np.r_[stems[rng.integers(3)][: rng.integers(1, 31)], rng.integers(0, 2, rng.integers(1, 12))] for _ in range(60)
    ]
    sequences = [np.array(ids) for ids in dict.fromkeys(map(tuple, some))]
    for prompt_of in (None, rng.integers(0, 9, len(sequences)), list(range(len(sequences)))):
        parts = plan(sequences, prompt_of, layout="shared_prefix", max_tokens=90)
        assert max(computed(sequences, parts)) <= 90
        assert sorted(i for part in parts for i in part.members) == list(range(len(sequences)))


def test_rewards_behind_a_header_are_those_of_padded_rows(toy, tmp_path):
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=3,
    )
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(toy / "model")).save_pretrained(tmp_path / "model")
    sequences = behind_a_header(answers(12, 3))
    with open_scorer(OpeningFlags(model=str(tmp_path / "model"), max_tokens_per_micro_batch=500)) as scorer:
        padded = scorer.rewards(sequences, padded=True)
        assert np.std(padded) > 0.01
        assert scorer.rewards(sequences) == pytest.approx(padded, abs=1e-5)
