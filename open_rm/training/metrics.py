"""Metrics of a step as sums and counts on tensors, reduced over the ranks once, when they are read.

A mean of per-device means is wrong as soon as shares differ; a sum divided by a count is not.
Shapes: B pairs.
"""

import resource
import time

import torch

from open_rm.batching.feeding import Step
from open_rm.batching.targets import PLAIN, Targets
from open_rm.ranks import Ranks, all_reduce_sum
from open_rm.training.stragglers import Stragglers

PAIR_METRICS = ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")
COUNTS = (
    "tokens",  # tokens of all sequences
    "computed",  # tokens that were computed; fewer where a prefix is shared
    "per_prompt",  # tokens that would have been computed if each prompt were shared by its answers alone
    "positions",  # positions that were computed, padding included
    "flops",  # FLOPs that the model needs for the tokens computed
)
# The matrix-product rate is measured on products of this many rows, doubled until one takes long enough to be timed.
SMALLEST_PRODUCT, LARGEST_PRODUCT = 256, 8192
PRODUCT_SECONDS = 0.1  # most that the largest product should take


def pair_sums(
    chosen: torch.Tensor, rejected: torch.Tensor, losses: torch.Tensor, decided: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over pairs of the five metrics in the order of PAIR_METRICS, and how many pairs are decided.

    Args:
        chosen, rejected, losses: [B] rewards and losses.  decided: [B] bool, which pairs have a better side; None: all.

    Returns:
        [6] float64. Equal rewards are not a correct prediction, so accuracy counts chosen > rejected strictly; and pairs that are
        ties by their labels have none, so it leaves them out.
    """
    right = chosen > rejected
    decided = torch.ones_like(right) if decided is None else decided
    columns = (right & decided, losses, chosen, rejected, chosen - rejected, decided)
    return torch.stack([column.detach().double().sum() for column in columns])


def pair_means(sums: torch.Tensor, pairs: int) -> dict[str, float]:
    """Means from `pair_sums` totals: accuracy of the decided pairs, all else of all pairs.

    Where no pair is decided nothing can be right or wrong; accuracy is 0.5 then, what a guess gets, so that every step has it.

    pairs: the number of pairs summed over.
    """
    right, *others, decided = sums.tolist()
    accuracy = right / decided if decided else 0.5
    return dict(zip(PAIR_METRICS, (accuracy, *(total / pairs for total in others)), strict=True))


class Meter:
    """Sums over the pairs of one optimizer step on this rank; `reduce` makes one all-reduce for everything."""

    def __init__(self, ranks: Ranks, shape, dtype: torch.dtype, stragglers: Stragglers | None = None):
        """shape: the model's sizes, for counting FLOPs (reward_model.Shape).  dtype: that it computes in.
        stragglers: who hears of each rank's seconds; None where ranks are not compared."""
        self._ranks, self._shape, self._stragglers, self._slots = ranks, shape, stragglers, []
        self._peak_flops = matmul_flops(ranks, dtype)
        self._totals: dict[str, float] = {}
        self._start()

    def _start(self) -> None:
        self._pairs = torch.zeros(len(PAIR_METRICS) + 1, dtype=torch.float64, device=self._ranks.device)
        self._counts = [0.0] * len(COUNTS)  # plain numbers: copying each one to the device would wait for it
        self._terms: dict[str, torch.Tensor] = {}
        self._positions = 0  # of this rank alone

    def add(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        terms: dict[str, torch.Tensor],
        batch,
        targets: Targets = PLAIN,
    ) -> None:
        """Add one micro-batch: [B] rewards, losses.loss_terms and targets of its counted pairs, and the layouts.Batch of them.

        Of a sequence group, whose ranks all have the same pairs and rewards, the first one's are counted.
        """
        self._positions += batch.positions
        positions = batch.positions if self._ranks.counts else 0
        decided = targets.to(chosen.device).decided()
        if not self._ranks.counts:
            chosen, rejected, decided = chosen[:0], rejected[:0], None
            terms = {name: term[:0] for name, term in terms.items()}
        losses = sum(terms.values())
        # A micro-batch that only keeps this rank in step has no counted pair; its positions are computed all the same.
        counted = (batch.tokens, batch.computed, batch.per_prompt, batch.area, len(batch.read_index))
        tokens, computed, per_prompt, area, read = counted if len(losses) else (0,) * len(counted)
        counts = (tokens, computed, per_prompt, positions, training_flops(computed, area, self._shape, read=read))
        self._pairs += pair_sums(chosen, rejected, losses, decided)
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]
        for name, term in terms.items():  # the same names in the same order on every rank: the flags decide them
            self._terms[name] = self._terms.get(name, 0.0) + term.detach().double().sum()

    def reduce(self, pairs: int, *, waited: float = 0.0) -> dict[str, float]:
        """The step's means per pair over all ranks, those of the loss's terms as loss_<name> among them.

        pairs: of the step on all ranks. The next `add` begins another step.  waited: this rank, for its batches, in seconds.
        """
        own = self._stragglers.own(waited, self._positions) if self._stragglers else []
        counts = torch.tensor(self._counts + own, dtype=torch.float64, device=self._ranks.device)
        parts = (self._pairs, counts, torch.stack(list(self._terms.values())))
        sums, counts, terms = all_reduce_sum(torch.cat(parts)).split([len(part) for part in parts])
        counts = counts.tolist()
        self._totals, self._slots = dict(zip(COUNTS, counts, strict=False)), counts[len(COUNTS) :]
        means = dict(zip((f"loss_{name}" for name in self._terms), (terms / pairs).tolist(), strict=True))
        self._start()
        return pair_means(sums, pairs) | means

    def performance(self, step: Step, flops_before: float) -> dict[str, float]:
        """perf/...: what the step that was reduced last took, over all ranks.

        mfu = FLOPs of the model that the step needed (training_flops: nothing for padding, for what a shared prefix saves,
        or for recomputation) / (step_seconds * the matrix-product rate of all devices together).  data_seconds: this rank's
        wait for batches.  memory_gib: this rank's peak.  rank_seconds_max, slowest_rank: see stragglers.py.
        Of the tokens of all sequences, distinct_token_fraction is the share that was computed; prompt_saving is the share that was
        not because answers share their prompt (or, of a pair, more), header_saving because prompts share a header too: the three
        add up to 1. What layouts.py shares in a micro-batch counts, so that smaller ones save less.
        flops_before: of the run's earlier steps.
        """
        counts, seconds = self._totals, time.perf_counter() - step.asked
        of_ranks = self._stragglers.step(self._slots, seconds) if self._stragglers else {}
        return of_ranks | {
            "perf/pairs_per_second": step.pairs / seconds,
            "perf/tokens_per_second": counts["tokens"] / seconds,
            "perf/step_seconds": seconds,
            "perf/data_seconds": step.waited,
            "perf/memory_gib": peak_memory_gib(self._ranks),
            "perf/padding_fraction": 1 - counts["computed"] / counts["positions"],
            "perf/distinct_token_fraction": counts["computed"] / counts["tokens"],
            "perf/prompt_saving": 1 - counts["per_prompt"] / counts["tokens"],
            "perf/header_saving": (counts["per_prompt"] - counts["computed"]) / counts["tokens"],
            "perf/rank_imbalance": step.imbalance,
            "perf/mfu": counts["flops"] / (seconds * self._peak_flops),
            "perf/total_flops": flops_before + counts["flops"],
        }


def peak_memory_gib(ranks: Ranks) -> float:
    """Most memory this rank has held, in GiB: allocated on the GPU, resident on the CPU."""
    if ranks.on_gpu:
        return torch.cuda.max_memory_allocated(ranks.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def matmul_flops(ranks: Ranks, dtype: torch.dtype) -> float:
    """FLOPs a second of plain matrix products on all devices together: the peak that mfu is a share of.

    Measured, not looked up, in at most 0.3 s on any device: a CPU may be a million times slower than a GPU, and without
    AVX-512 it computes bfloat16 at a thirtieth of float32's rate. So sizes double from a small one, and the fastest product
    of the largest size that stays within PRODUCT_SECONDS counts.
    """

    def seconds_of(matrix: torch.Tensor) -> float:
        if ranks.on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        matrix @ matrix
        if ranks.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    # Numbers of its own: how many are drawn depends on the clock, and LoRA's dropout must not.
    generator = torch.Generator(ranks.device).manual_seed(0)
    n = SMALLEST_PRODUCT // 2
    seconds_of(torch.rand(n, n, device=ranks.device, generator=generator).to(dtype))  # the first product sets things up
    fastest = 0.0
    while n < LARGEST_PRODUCT and 8 * fastest < PRODUCT_SECONDS:  # twice the rows are eight times the work
        n *= 2
        matrix = torch.rand(n, n, device=ranks.device, generator=generator).to(dtype)
        fastest = min(seconds_of(matrix), seconds_of(matrix))
    rate = torch.tensor([2 * n**3 / fastest], dtype=torch.float64, device=ranks.device)
    return all_reduce_sum(rate).item()


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
