"""Derived numbers: they count optimizer steps that really happen."""

import dataclasses

import numpy as np
import pytest

from open_rm.batching.steps import draw_steps
from open_rm.data.pairs import PairTable
from open_rm.errors import UserError
from open_rm.flags import ScheduleFlags
from open_rm.training.plan import make_plan


def table(prompt_ids: np.ndarray) -> PairTable:
    """Of pairs of which nothing but the prompts matters here."""
    zeros = np.zeros(len(prompt_ids), np.int64)
    columns = dict.fromkeys(PairTable.__dataclass_fields__, zeros)
    return PairTable(**columns | {"prompt_id": prompt_ids})


def test_lists_are_kept_whole_with_and_without_prompts_and_the_steps_are_counted():
    """Six lists of five pairs, of two prompts: one fits into a step of eight, a prompt does not."""
    lists = np.repeat(np.arange(6), 5)
    of_lists = dataclasses.replace(table(np.repeat(np.arange(2), 15)), list_id=lists)
    for grouped in (False, True):
        made = make_plan(ScheduleFlags(), of_lists, 8, seed=3, grouped=grouped, whole_lists=True)
        drawn = list(made.draw(of_lists))
        assert made.total_steps == len(drawn) == 6
        assert all(len(step) == 5 and len(set(lists[step])) == 1 for step in drawn)
    assert "whole_lists" not in made.numbers()


def plan(*, prompt_ids=None, pairs_per_step=8, seed=1, **flags):
    """Of 100 pairs; grouped where prompts are given."""
    prompts = np.arange(100) if prompt_ids is None else prompt_ids
    grouped = prompt_ids is not None
    return make_plan(ScheduleFlags(**flags), table(prompts), pairs_per_step, seed=seed, grouped=grouped)


@pytest.mark.parametrize(
    "changes", [{}, {"num_train_epochs": 2.5}, {"total_episodes": 30}, {"total_episodes": 250}, {"pairs_per_step": 24}]
)
def test_total_steps_are_the_steps_that_the_loop_makes(changes):
    p = plan(**changes)
    made = list(draw_steps(p.pairs, p.pairs_per_step, p.total_episodes, seed=1))
    assert len(made) == p.total_steps
    assert sum(map(len, made)) == p.total_episodes


@pytest.mark.parametrize("seed", [1, 2])
def test_total_steps_count_the_steps_that_groups_do_not_fill(seed):
    prompt_ids = np.repeat(np.arange(20), 5)  # one group of five fits into a step of eight, two do not
    p = plan(prompt_ids=prompt_ids, seed=seed, num_train_epochs=1.5)
    made = list(draw_steps(p.pairs, p.pairs_per_step, p.total_episodes, seed, prompt_ids=prompt_ids))
    assert (p.total_steps, p.total_episodes) == (len(made), 150) == (30, sum(map(len, made)))


def test_trailing_partial_step_is_counted():
    assert plan().total_steps == 13  # 12 steps of 8 pairs and one of 4


def test_warmup_ratio_is_a_share_of_optimizer_steps():
    assert plan(warmup_ratio=0.1).warmup_steps == 2
    assert plan(warm_up_steps=5).warmup_steps == 5


def test_evaluations_stand_at_the_start_the_end_and_evenly_between():
    assert plan(num_evals=0).evaluation_steps == (0, 13)
    assert plan(num_evals=3).evaluation_steps == (0, 3, 6, 10, 13)
    assert plan(eval_steps=5).evaluation_steps == (0, 5, 10, 13)


def test_a_run_that_would_only_warm_up_is_refused():
    with pytest.raises(UserError, match="--warm_up_steps 13: the run has 13 steps"):
        plan(warm_up_steps=13)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_loop_draws_the_steps_that_the_plan_counted(grouped):
    prompts = np.repeat(np.arange(20), 5)
    made = make_plan(ScheduleFlags(num_train_epochs=1.5), table(prompts), 8, seed=3, grouped=grouped)
    drawn = list(made.draw(table(prompts)))
    assert (len(drawn), sum(map(len, drawn))) == (made.total_steps, made.total_episodes)
    assert all(len(set(prompts[step])) == 1 for step in drawn) is grouped  # five pairs of one prompt fit, ten do not


def test_more_evaluations_than_steps_are_one_after_every_step():
    assert plan(num_evals=10**9).evaluation_steps == tuple(range(14))
