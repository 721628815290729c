"""Held-out preference pairs: every pair scored exactly once, whatever the number of ranks.

Each rank scores its share; one all-reduce puts every reward into its place, so all ranks hold the same table and the
numbers do not depend on how it was computed. The model is any callable from a batch's inputs to rewards: the engine while
it trains, a loaded model, a test's function.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.batching import feeding
from open_rm.batching.dealing import deal_step
from open_rm.batching.rules import BatchRules
from open_rm.data.labels import TIE
from open_rm.data.pairs import PairTable, PreferenceData
from open_rm.evaluation.calibration import reward_statistics
from open_rm.measures import calibration, lengths
from open_rm.ranks import Ranks, all_reduce_sum
from open_rm.training.losses import ranking_loss
from open_rm.training.metrics import pair_means, pair_sums

PROBES = 4  # pairs whose rewards are computed again by the clients of the saved folder
# Most tokens of a side of theirs, where there are such pairs: a client may have only a CPU to compute them.
PROBE_TOKENS = 1024
DEALT_AT_ONCE = 16_384  # pairs; more are dealt in pieces, so that planning a large set takes bounded memory


@dataclass(frozen=True)
class Evaluation:
    """metrics: eval/rm/... overall and eval/rm/<source>/..., and overall alone how rewards are spread (evaluation.calibration) and
    how far the accuracy can be believed (`trust`).
    rewards: [pairs, 2] float64, chosen and rejected."""

    metrics: dict[str, float]
    rewards: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """What the trainer computed for a few texts.

    sequences: token ids.  rewards: one each.  noise: by how much they differed, relative to 1 + |reward|, when it computed
    each pair alone in padded rows; the order of sums alone makes so much.
    """

    sequences: list[list[int]]
    rewards: list[float]
    noise: float = 0.0


@torch.no_grad()
def score_pairs(
    rewards_of: Callable[..., torch.Tensor], data: PreferenceData, indices: np.ndarray, rules: BatchRules, ranks: Ranks
) -> torch.Tensor:
    """Rewards of the pairs `indices`, [n, 2] float64 on every rank. A collective call.

    rewards_of: batch inputs (layouts.Batch.inputs) to rewards [2 B], in evaluation mode.
    """
    rewards = torch.zeros(len(data), 2, dtype=torch.float64, device=ranks.device)
    for start in range(0, len(indices), DEALT_AT_ONCE):
        how = rules.of_group(ranks.sequence_size)
        deal = deal_step(indices[start : start + DEALT_AT_ONCE], data.table, how, ranks.data_size)
        for micro in feeding.micro_batches(deal.ranks[ranks.data_rank], data, rules):
            *sides, _ = micro.sides(rewards_of(**micro.batch.inputs(ranks.device)).double())
            if ranks.counts:
                rewards[torch.from_numpy(micro.indices).to(ranks.device)] = torch.stack(sides, 1)
    return all_reduce_sum(rewards)[torch.from_numpy(indices).to(ranks.device)].cpu()


def evaluate(
    rewards_of: Callable[..., torch.Tensor], data: PreferenceData, rules: BatchRules, ranks: Ranks
) -> Evaluation:
    """Score the whole set and average over its pairs. A collective call; see `score_pairs`."""
    started = time.perf_counter()
    rewards = score_pairs(rewards_of, data, np.arange(len(data)), rules, ranks)
    seconds = time.perf_counter() - started
    label_prob = torch.tensor(data.label_probs())
    decided = label_prob != TIE
    overall = (
        _means(rewards, label_prob) | reward_statistics(rewards, decided) | trust(rewards, data.table, decided.numpy())
    )
    metrics = {f"eval/rm/{name}": value for name, value in overall.items()}
    if len(data.labels) > 1:
        sources = torch.tensor(data.source_ids())
        for number, label in enumerate(data.labels):
            if (sources == number).any():
                means = _means(rewards[sources == number], label_prob[sources == number])
                metrics.update({f"eval/rm/{label}/{name}": value for name, value in means.items()})
    metrics["eval/samples_per_second"] = len(data) / seconds
    return Evaluation(metrics, rewards)


def trust(rewards: torch.Tensor, table: PairTable, decided: np.ndarray | None = None) -> dict[str, float]:
    """How far the accuracy of the pairs can be believed.

    Args:
        rewards: [pairs, 2], chosen and rejected.
        decided: [pairs] bool, those that are no ties; None: all. Others are left out, and nothing is said where all are.

    Returns:
        ece: expected calibration error of sigmoid(margin); left out where a reward is not a number.
        length_accuracy: what the better of the rules "the longer response" and "the shorter response" scores on the same pairs.
        length_matched_accuracy: accuracy where the responses' tokens differ by at most a tenth; left out where none do.
    """
    which = np.arange(len(table)) if decided is None else np.flatnonzero(decided)
    if not len(which):
        return {}
    margins = (rewards[:, 0] - rewards[:, 1]).numpy()[which]
    chosen, rejected = table.chosen_length[which], table.rejected_length[which]
    prompt = np.minimum(table.prompt_length[which], np.minimum(chosen, rejected))
    responses = chosen - prompt, rejected - prompt
    _, by_length = lengths.best_rule(*responses)
    matched = lengths.are_matched(*responses)
    found = {} if np.isnan(margins).any() else {"ece": calibration.ece(margins)}
    found["length_accuracy"] = float(by_length.mean())
    return found | ({"length_matched_accuracy": float((margins[matched] > 0).mean())} if matched.any() else {})


def probe(
    rewards_of: Callable[..., torch.Tensor], data: PreferenceData, rules: BatchRules, ranks: Ranks, *, padded_rows
) -> Probe:
    """Rewards of a few pairs, spread evenly over the set. A collective call; see `score_pairs`.

    padded_rows: gives a context in which `rewards_of` takes padded rows (RewardModel.padded_rows).
    """
    indices = _probe_indices(data)
    rewards = score_pairs(rewards_of, data, indices, rules, ranks)
    alone = dataclasses.replace(rules, layout="padded", max_tokens=1)  # a pair with more is computed by itself
    with padded_rows():
        again = score_pairs(rewards_of, data, indices, alone, ranks)
    noise = ((again - rewards).abs() / (1 + rewards.abs())).max().item()
    return Probe(probed(data), rewards.flatten().tolist(), noise)


def probed(data: PreferenceData) -> list[list[int]]:
    """The token ids that `probe` computes rewards of: chosen, rejected, chosen, ..."""
    return [side.tolist() for pair in data.pairs(_probe_indices(data)) for side in pair]


def _probe_indices(data: PreferenceData) -> np.ndarray:
    longest = np.maximum(data.table.chosen_length, data.table.rejected_length)
    short = np.flatnonzero(longest <= PROBE_TOKENS)
    if not len(short):
        short = np.sort(np.argsort(longest, kind="stable")[:PROBES])
    return short[np.unique(np.linspace(0, len(short) - 1, PROBES).astype(int))]


def _means(rewards: torch.Tensor, label_prob: torch.Tensor) -> dict[str, float]:
    """The loss is Bradley-Terry's with the pairs' own labels, and nothing else of the objective."""
    chosen, rejected = rewards.unbind(1)
    losses = ranking_loss(chosen, rejected, label_prob=label_prob)
    return pair_means(pair_sums(chosen, rejected, losses, label_prob != TIE), len(rewards))


def sample_table(evaluation: Evaluation, data: PreferenceData, tokenizer, *, count: int, seed: int) -> list[dict]:
    """A few pairs as a person reads them: prompt, both responses, both rewards, right or wrong; of a tie neither (None).

    The same pairs at every evaluation of a run, so that one can watch a reward move.
    """
    chosen_ids = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    is_tie = data.label_probs() == TIE
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
                "right": None if is_tie[index] else reward_chosen > reward_rejected,
            }
        )
    return rows
