"""Micro-batches: every sequence once, within the limit, prompts shared where that saves most."""

import itertools

import numpy as np
import pytest

from open_rm.batching.layouts import lay_out_sequences
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
