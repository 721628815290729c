"""The numbers of a run that follow from the flags and the data, in one frozen object."""

import math
from dataclasses import dataclass

import numpy as np

from open_rm.errors import UserError
from open_rm.steps import draw_steps


@dataclass(frozen=True)
class Plan:
    """What the run will do; printed at the start and saved with the model.

    pairs_per_step   = per_device_train_batch_size * gradient_accumulation_steps * world_size
    total_episodes   = the flag, or round(num_train_epochs * pairs); an episode is one pair seen
    total_steps      = the number of steps that steps.draw_steps draws: ceil(pairs / pairs_per_step) an epoch, since a
                       step never crosses one; a few more with group_by_prompt, where groups do not always fill a step
    warmup_steps     = warm_up_steps, or ceil(warmup_ratio * total_steps)
    evaluation_steps = {0, total_steps} and every eval_steps, or round(total_steps * i / (num_evals + 1)), i = 1..num_evals
    """

    pairs: int
    pairs_per_step: int
    total_episodes: int
    total_steps: int
    warmup_steps: int
    evaluation_steps: tuple[int, ...]


def make_plan(
    *,
    pairs: int,
    world_size: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    num_train_epochs: float,
    total_episodes: int | None,
    warm_up_steps: int,
    warmup_ratio: float,
    num_evals: int,
    eval_steps: int | None,
    seed: int,
    prompt_ids: np.ndarray | None = None,
) -> Plan:
    """Derive the plan; the formulas are in `Plan`.

    Args:
        pairs: training pairs after filtering.
        prompt_ids: [pairs], with group_by_prompt (see steps.draw_steps).
    """
    pairs_per_step = per_device_train_batch_size * gradient_accumulation_steps * world_size
    episodes = total_episodes if total_episodes is not None else max(1, round(num_train_epochs * pairs))
    steps = sum(1 for _ in draw_steps(pairs, pairs_per_step, episodes, seed, prompt_ids=prompt_ids))
    warmup_steps = warm_up_steps or math.ceil(warmup_ratio * steps)
    if warmup_steps >= steps and warm_up_steps:
        raise UserError(f"--warm_up_steps {warm_up_steps}: the run has {steps} steps in all, so it would only warm up")
    if eval_steps is not None:
        during = range(eval_steps, steps, eval_steps)
    else:
        during = (round(steps * i / (num_evals + 1)) for i in range(1, num_evals + 1))
    return Plan(
        pairs=pairs,
        pairs_per_step=pairs_per_step,
        total_episodes=episodes,
        total_steps=steps,
        warmup_steps=warmup_steps,
        evaluation_steps=tuple(sorted({0, *during, steps})),
    )
