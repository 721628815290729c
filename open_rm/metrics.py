"""Metrics of a step as sums and counts on tensors, reduced over the ranks once, when they are read.

A mean of per-device means is wrong as soon as shares differ; a sum divided by a count is not.
Shapes: B pairs.
"""

import torch
import torch.distributed as dist

PAIR_METRICS = ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")
# Tokens of all sequences; those of them that were computed; positions computed, padding included; model FLOPs.
COUNTS = ("tokens", "computed", "positions", "flops")


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, as a new tensor; the input itself is untouched."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def pair_sums(chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Sums over pairs of the five metrics in the order of PAIR_METRICS.

    Args:
        chosen, rejected, losses: [B] rewards and losses.

    Returns:
        [5] float64. A tie is not a correct prediction, so accuracy counts chosen > rejected strictly.
    """
    columns = ((chosen > rejected), losses, chosen, rejected, chosen - rejected)
    return torch.stack([column.detach().double().sum() for column in columns])


def pair_means(sums: torch.Tensor, pairs: int) -> dict[str, float]:
    """Means per pair from `pair_sums` totals; `pairs` is the number of pairs summed over."""
    return dict(zip(PAIR_METRICS, (sums / pairs).tolist(), strict=True))


class StepMetrics:
    """Accumulates one optimizer step on this rank; `reduce` makes one all-reduce for everything."""

    def __init__(self, device: torch.device, shape):
        """`shape`: the model's sizes, for counting FLOPs (model.Shape)."""
        self._pairs = torch.zeros(len(PAIR_METRICS), dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(COUNTS), dtype=torch.float64, device=device)
        self._terms: dict[str, torch.Tensor] = {}
        self._shape = shape

    def add(self, chosen: torch.Tensor, rejected: torch.Tensor, terms: dict[str, torch.Tensor], batch) -> None:
        """Add one micro-batch: [B] rewards and losses.loss_terms of its counted pairs, and the batching.Batch of them."""
        losses = sum(terms.values())
        # A micro-batch that only keeps this rank in step has no counted pair; its positions are computed all the same.
        counted = (batch.tokens, batch.computed, batch.area, len(batch.read_index)) if len(losses) else (0, 0, 0, 0)
        tokens, computed, area, read = counted
        counts = (tokens, computed, batch.positions, training_flops(computed, area, self._shape, read=read))
        self._pairs += pair_sums(chosen, rejected, losses)
        self._counts += torch.tensor(counts, dtype=torch.float64, device=self._counts.device)
        for name, term in terms.items():  # the same names in the same order on every rank: the flags decide them
            self._terms[name] = self._terms.get(name, 0.0) + term.detach().double().sum()

    def reduce(self, pairs: int) -> tuple[dict[str, float], dict[str, float]]:
        """Over all ranks: (means per pair, those of the loss's terms as loss_<name> among them; totals of COUNTS)."""
        parts = (self._pairs, self._counts, torch.stack(list(self._terms.values())))
        sums, counts, terms = all_reduce_sum(torch.cat(parts)).split([len(part) for part in parts])
        means = dict(zip((f"loss_{name}" for name in self._terms), (terms / pairs).tolist(), strict=True))
        return pair_means(sums, pairs) | means, dict(zip(COUNTS, counts.tolist(), strict=True))


def perf_metrics(
    counts: dict[str, float],
    *,
    pairs: int,
    step_seconds: float,
    data_seconds: float,
    imbalance: float,
    memory_gib: float,
    total_flops: float,
    peak_flops: float,
) -> dict[str, float]:
    """perf/...: what a step took, over all ranks.

    mfu = FLOPs of the model that the step needed (training_flops: nothing for padding, for what a shared prefix saves, or
    for recomputation) / (step_seconds * peak_flops); peak_flops is the matrix-product rate of all devices together,
    measured at the start of the run.  data_seconds: this rank's wait for batches.  memory_gib: this rank's peak.
    """
    return {
        "perf/pairs_per_second": pairs / step_seconds,
        "perf/tokens_per_second": counts["tokens"] / step_seconds,
        "perf/step_seconds": step_seconds,
        "perf/data_seconds": data_seconds,
        "perf/memory_gib": memory_gib,
        "perf/padding_fraction": 1 - counts["computed"] / counts["positions"],
        "perf/distinct_token_fraction": counts["computed"] / counts["tokens"],
        "perf/rank_imbalance": imbalance,
        "perf/mfu": counts["flops"] / (step_seconds * peak_flops),
        "perf/total_flops": total_flops,
    }


def training_flops(tokens: int, area: int, shape, *, read: int) -> float:
    """Model FLOPs of forward + backward, without recomputation.

    2 p (body_parameters * tokens + read_parameters * read + 2 * layers * attention_width * area) with p = 3 passes (PaLM,
    https://arxiv.org/abs/2204.02311, appendix B, with the query-key products that causal attention needs instead of all
    length^2, and the last layer's parameters that only the read tokens need counted for those).

    Args:
        tokens: tokens computed.  area: query-key products, summed over sequences: length * (length + 1) / 2 for each.
        shape: body_parameters (those that multiply every token: the embedding table is a look-up and left out),
            read_parameters, layers, attention_width (heads * head dimension), passes.
        read: tokens at which a reward is read.
    """
    products = shape.body_parameters * tokens + shape.read_parameters * read
    return 2.0 * shape.passes * (products + 2.0 * shape.layers * shape.attention_width * area)
