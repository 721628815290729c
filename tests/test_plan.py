"""Derived numbers: they count optimizer steps that really happen."""

import numpy as np
import pytest

from open_rm import steps
from open_rm.errors import UserError
from open_rm.plan import make_plan

DEFAULTS = dict(
    pairs=100,
    world_size=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=1.0,
    total_episodes=None,
    warm_up_steps=0,
    warmup_ratio=0.0,
    num_evals=1,
    eval_steps=None,
    seed=1,
)


def plan(**changes):
    return make_plan(**(DEFAULTS | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"num_train_epochs": 2.5}, {"total_episodes": 30}, {"total_episodes": 250}, {"world_size": 3}]
)
def test_total_steps_are_the_steps_that_the_loop_makes(changes):
    p = plan(**changes)
    made = list(steps.draw_steps(p.pairs, p.pairs_per_step, p.total_episodes, seed=1))
    assert len(made) == p.total_steps
    assert sum(map(len, made)) == p.total_episodes


@pytest.mark.parametrize("seed", [1, 2])
def test_total_steps_count_the_steps_that_groups_do_not_fill(seed):
    prompt_ids = np.repeat(np.arange(20), 5)  # one group of five fits into a step of eight, two do not
    p = plan(prompt_ids=prompt_ids, seed=seed, num_train_epochs=1.5)
    made = list(steps.draw_steps(p.pairs, p.pairs_per_step, p.total_episodes, seed, prompt_ids=prompt_ids))
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


def test_global_batch_multiplies_devices_micro_batch_and_accumulation():
    assert plan(world_size=8).pairs_per_step == 64


def test_a_run_that_would_only_warm_up_is_refused():
    with pytest.raises(UserError, match="--warm_up_steps 13: the run has 13 steps"):
        plan(warm_up_steps=13)
