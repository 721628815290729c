"""The numbers of a run that follow from the flags and the data, in one frozen object."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from open_rm.batching.steps import draw_steps
from open_rm.data.pairs import PairTable
from open_rm.errors import UserError
from open_rm.flags import ScheduleFlags


@dataclass(frozen=True)
class Plan:
    """What the run will do; printed at the start and saved with the model.

    pairs_per_step   = per_device_train_batch_size * gradient_accumulation_steps * world_size
    total_episodes   = the flag, or round(num_train_epochs * pairs); an episode is one pair seen
    total_steps      = the number of steps that steps.draw_steps draws: ceil(pairs / pairs_per_step) an epoch, since a
                       step never crosses one; a few more where prompts or lists are kept whole, which do not always fill one
    warmup_steps     = warm_up_steps, or ceil(warmup_ratio * total_steps)
    evaluation_steps = {0, total_steps} and every eval_steps, or round(total_steps * i / (num_evals + 1)), i = 1..num_evals
    grouped          = the pairs of a prompt stay in one step (group_by_prompt)
    whole_lists      = the pairs of a ranked list stay in one step (list_loss)
    """

    pairs: int
    pairs_per_step: int
    total_episodes: int
    total_steps: int
    warmup_steps: int
    evaluation_steps: tuple[int, ...]
    seed: int
    grouped: bool
    whole_lists: bool = False

    def numbers(self) -> dict:
        """What follows from flags and data, without the flags that are kept beside it."""
        kept = ("seed", "grouped", "whole_lists")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in kept}

    def draw(self, table: PairTable) -> Iterator[np.ndarray]:
        """The pairs of each step. `make_plan` counts these, and the loop takes these."""
        prompt_ids = table.prompt_id if self.grouped else None
        together = {"prompt_ids": prompt_ids, "list_ids": table.list_id if self.whole_lists else None}
        return draw_steps(self.pairs, self.pairs_per_step, self.total_episodes, self.seed, **together)

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.total_steps} steps of {self.pairs_per_step} pairs, {self.total_episodes} episodes"


def make_plan(
    flags: ScheduleFlags,
    table: PairTable,
    pairs_per_step: int,
    *,
    seed: int,
    grouped: bool = False,
    whole_lists: bool = False,
) -> Plan:
    """Derive the plan; the formulas are in `Plan`. table: of the training pairs that are left."""
    pairs = len(table)
    episodes = flags.total_episodes
    if episodes is None:
        episodes = max(1, round(flags.num_train_epochs * pairs))
    uncounted = {"total_steps": 0, "warmup_steps": 0, "evaluation_steps": ()}
    drawn = Plan(pairs, pairs_per_step, episodes, **uncounted, seed=seed, grouped=grouped, whole_lists=whole_lists)
    steps = sum(1 for _ in drawn.draw(table))  # counted by drawing them, so that the loop makes as many
    warmup_steps = flags.warm_up_steps or math.ceil(flags.warmup_ratio * steps)
    if warmup_steps >= steps and flags.warm_up_steps:
        raise UserError(
            f"--warm_up_steps {flags.warm_up_steps}: the run has {steps} steps in all, so it would only warm up"
        )
    if flags.eval_steps is not None:
        during = range(flags.eval_steps, steps, flags.eval_steps)
    elif flags.num_evals >= steps:
        during = range(steps)
    else:
        during = (round(steps * i / (flags.num_evals + 1)) for i in range(1, flags.num_evals + 1))
    evaluation_steps = tuple(sorted({0, *during, steps}))
    return dataclasses.replace(drawn, total_steps=steps, warmup_steps=warmup_steps, evaluation_steps=evaluation_steps)
