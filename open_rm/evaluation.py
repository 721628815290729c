"""Held-out preference pairs: every pair scored exactly once, whatever the number of ranks.

Each rank scores its share; one all-reduce puts every reward into its place, so all ranks hold the same table and the
numbers do not depend on how it was computed.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from open_rm import steps
from open_rm.data import PreferenceData
from open_rm.engine import Engine
from open_rm.losses import ranking_loss
from open_rm.metrics import all_reduce_sum, pair_means, pair_sums


@dataclass(frozen=True)
class Evaluation:
    """metrics: eval/rm/... overall and eval/rm/<source>/...  rewards: [pairs, 2] float64, chosen and rejected."""

    metrics: dict[str, float]
    rewards: torch.Tensor


def score_pairs(
    engine: Engine, data: PreferenceData, indices: np.ndarray, *, layout: str, max_tokens: int, pad_token_id: int
) -> torch.Tensor:
    """Rewards of the pairs `indices`, [n, 2] float64 on every rank. A collective call.

    Args:
        layout, max_tokens: how they are computed (see steps.plan_step); it does not change the result.
    """
    ranks = engine.ranks
    rewards = torch.zeros(len(data), 2, dtype=torch.float64, device=ranks.device)
    plan = steps.plan_step(indices, data.table, layout=layout, world_size=ranks.world_size, max_tokens=max_tokens)
    with engine.evaluating():
        for part, batch in data.batches(plan.ranks[ranks.rank], layout, pad_token_id):
            scores = engine(**batch.inputs(ranks.device)).double().view(2, -1).T
            where = torch.from_numpy(part.indices[: part.counted]).to(ranks.device)
            rewards[where] = scores[: part.counted]
    return all_reduce_sum(rewards)[torch.from_numpy(indices).to(ranks.device)].cpu()


def evaluate(engine: Engine, data: PreferenceData, **how) -> Evaluation:
    """Score the whole set and average over its pairs; `how` as for `score_pairs`. A collective call."""
    started = time.perf_counter()
    rewards = score_pairs(engine, data, np.arange(len(data)), **how)
    seconds = time.perf_counter() - started
    metrics = {f"eval/rm/{name}": value for name, value in _means(rewards).items()}
    if len(data.labels) > 1:
        sources = torch.tensor(data.source_ids())
        for number, label in enumerate(data.labels):
            if (sources == number).any():
                means = _means(rewards[sources == number])
                metrics.update({f"eval/rm/{label}/{name}": value for name, value in means.items()})
    metrics["eval/samples_per_second"] = len(data) / seconds
    return Evaluation(metrics, rewards)


def _means(rewards: torch.Tensor) -> dict[str, float]:
    chosen, rejected = rewards.unbind(1)
    return pair_means(pair_sums(chosen, rejected, ranking_loss(chosen, rejected)), len(rewards))


def sample_table(evaluation: Evaluation, data: PreferenceData, tokenizer, *, count: int, seed: int) -> list[dict]:
    """A few pairs as a person reads them: prompt, both responses, both rewards, right or wrong.

    The same pairs at every evaluation of a run, so that one can watch a reward move.
    """
    chosen_ids = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    rows = []
    for index, (chosen, rejected) in zip(chosen_ids, data.pairs(chosen_ids), strict=True):
        prompt_length = min(data.dataset[int(index)]["prompt_length"], len(chosen), len(rejected))
        reward_chosen, reward_rejected = evaluation.rewards[index].tolist()
        rows.append(
            {
                "prompt": tokenizer.decode(chosen[:prompt_length]),
                "chosen": tokenizer.decode(chosen[prompt_length:]),
                "rejected": tokenizer.decode(rejected[prompt_length:]),
                "chosen_reward": round(reward_chosen, 4),
                "rejected_reward": round(reward_rejected, 4),
                "right": reward_chosen > reward_rejected,
            }
        )
    return rows
