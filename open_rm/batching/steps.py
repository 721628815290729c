"""Which pairs form a step: decided by (seed, epoch, step) alone, whatever the layout and the number of ranks.

Everything that is computed of a step, by whom and in which order (dealing.py), leaves the sum over its pairs as it is.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

LOOKAHEAD_GROUPS = 64  # how far a grouped step looks for a group that still fits


def draw_steps(
    pairs: int,
    pairs_per_step: int,
    total_episodes: int,
    seed: int,
    *,
    prompt_ids: np.ndarray | None = None,
    list_ids: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The pair indices of each optimizer step, in order; stops after `total_episodes` pairs.

    Each epoch is a permutation from (seed, epoch), and no step crosses an epoch, so an epoch's last step may be smaller.

    Args:
        prompt_ids: [pairs], to keep the pairs of a prompt in one step (InstructGPT, https://arxiv.org/abs/2203.02155,
            section 3.5: one batch element per prompt). Prompts are drawn then; a step is filled as far as groups fit,
            and only a group larger than a step is cut.
        list_ids: [pairs], to keep the pairs of a ranked list in one step, as losses of lists ask: lists are drawn then as
            prompts are, or where there are prompts too, one that is larger than a step is cut between its lists. Of a list that
            the last step begins, what `total_episodes` leaves of it is taken.
    """
    epoch = 0
    while total_episodes > 0:
        rng = np.random.default_rng((seed, epoch))
        if prompt_ids is None and list_ids is None:
            order = rng.permutation(pairs)
            drawn = (order[start : start + pairs_per_step] for start in range(0, pairs, pairs_per_step))
        else:
            drawn = _grouped(prompt_ids, list_ids, pairs_per_step, rng)
        for step in drawn:
            step = step[:total_episodes]
            total_episodes -= len(step)
            if len(step):
                yield step
        epoch += 1


def _grouped(
    prompt_ids: np.ndarray | None, list_ids: np.ndarray | None, pairs_per_step: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """One epoch. At least one of both is given."""
    groups = groups_of(list_ids if prompt_ids is None else prompt_ids)
    pending = deque(groups[i] for i in rng.permutation(len(groups)))
    if list_ids is not None:
        pending = deque(part for group in pending for part in _in_lists(group, list_ids, pairs_per_step))
    while pending:
        step, size, passed = [], 0, []
        while pending and size < pairs_per_step and len(passed) < LOOKAHEAD_GROUPS:
            group = pending.popleft()
            if len(group) > pairs_per_step:
                pending.appendleft(group[pairs_per_step - size :])
                group = group[: pairs_per_step - size]
            if size + len(group) <= pairs_per_step:
                step.append(group)
                size += len(group)
            else:
                passed.append(group)
        pending.extendleft(reversed(passed))
        yield np.concatenate(step)


def _in_lists(group: np.ndarray, list_ids: np.ndarray, pairs_per_step: int) -> list[np.ndarray]:
    """The group where it fits into a step, else its lists."""
    if len(group) <= pairs_per_step:
        return [group]
    return [group[part] for part in groups_of(list_ids[group])]


def groups_of(ids: np.ndarray) -> list[np.ndarray]:
    """Positions of equal ids, as one array per id, in order of first appearance."""
    order = np.argsort(ids, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
    return sorted(parts, key=lambda part: part[0]) if len(ids) else []
