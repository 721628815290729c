"""Which pairs form a step: decided by seed, epoch and step alone."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm.batching import steps

repeatable = settings(max_examples=150, deadline=None, derandomize=True)


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


@repeatable
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=25),
    pairs_per_step=st.integers(5, 12),
    prompts=st.none() | st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_every_list_is_in_one_step_whether_prompts_are_kept_together_or_not(sizes, pairs_per_step, prompts, seed):
    """A prompt that fits into a step stays whole too; one that does not is cut between its lists."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(sum(sizes))
    list_ids = np.repeat(np.arange(len(sizes)), sizes)
    prompt_ids = None if prompts is None else rng.integers(0, prompts, len(sizes))[list_ids][order]
    list_ids = list_ids[order]
    how = {"prompt_ids": prompt_ids, "list_ids": list_ids}
    epoch = drawn(len(list_ids), pairs_per_step, len(list_ids), seed, **how)
    assert sorted(sum(epoch, [])) == list(range(len(list_ids)))
    assert max(map(len, epoch)) <= pairs_per_step
    steps_of = Counter(one for step in epoch for one in set(list_ids[step].tolist()))
    assert set(steps_of.values()) == {1}
    if prompts is not None:
        steps_of = Counter(prompt for step in epoch for prompt in set(prompt_ids[step].tolist()))
        fitting = [prompt for prompt, size in Counter(prompt_ids.tolist()).items() if size <= pairs_per_step]
        assert all(steps_of[prompt] == 1 for prompt in fitting)


def test_lists_are_drawn_anew_each_epoch_and_lists_of_one_pair_as_pairs_of_a_prompt_are():
    list_ids = np.repeat(np.arange(10), 2)
    found = drawn(20, 4, 40, seed=1, list_ids=list_ids)
    assert len(found) == 10 and found[:5] != found[5:]
    assert found == drawn(20, 4, 40, seed=1, prompt_ids=list_ids)
