"""From the pairs of a step to this rank's batches in memory, made ahead of their use.

    which pairs (steps.draw_steps) -> whose, and in which micro-batch (dealing.deal_step) -> where in memory (layouts.lay_out)

A background thread works whole steps ahead, so that the device does not wait for Python. Two steps of 256 pairs of 2 x 4096
tokens are 64 MiB on one rank, less on many.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from open_rm import alive
from open_rm.batching.dealing import Part, attention_cost, deal_step, micro_batch_budget
from open_rm.batching.headers import typical_header
from open_rm.batching.layouts import Batch, lay_out
from open_rm.batching.prefetch import prefetch
from open_rm.batching.rules import BatchRules
from open_rm.batching.targets import PLAIN, TargetColumns, Targets
from open_rm.data.pairs import PairTable, PreferenceData
from open_rm.flags import BatchFlags
from open_rm.ranks import Ranks

STEPS_AHEAD = 2
# Time of a FLOP of flash attention over one of a matrix product; benchmarks.attention_cost measures it.
GPU_ATTENTION = 2.0


def rules_of(
    flags: BatchFlags,
    layout: str,
    pad_token_id: int,
    *,
    max_token_length: int,
    on_gpu: bool,
    whole_lists: bool = False,
    table: PairTable | None = None,
) -> BatchRules:
    """The rules that the flags ask for, attention's cost aside: that is known when the model is.

    table: of the training pairs, whose header may ask for larger micro-batches on a CPU.
    """
    header = typical_header(table, layout) if table is not None and not on_gpu else 0
    train, evaluation = (
        micro_batch_budget(pairs, max_token_length, on_gpu=on_gpu, header=header)
        for pairs in (flags.per_device_train_batch_size, flags.per_device_eval_batch_size)
    )
    train = flags.max_tokens_per_micro_batch or train
    return BatchRules(layout, pad_token_id, train, evaluation, whole_lists=whole_lists)


def with_attention_cost(rules: BatchRules, shape, *, on_gpu: bool = False) -> BatchRules:
    """The rules for a model of the given sizes (reward_model.Shape)."""
    cost = attention_cost(shape.body_parameters, shape.layers, shape.attention_width)
    return dataclasses.replace(rules, area_cost=cost * (GPU_ATTENTION if on_gpu else 1.0))


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that are computed together.

    indices: [B] into the data, of those pairs that enter loss and metrics; none where this rank only keeps in step.
    targets: what the loss is told of them.  last: of its step on this rank.
    """

    indices: np.ndarray
    batch: Batch
    targets: Targets
    last: bool

    def sides(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rewards and predicted attributes of the pairs that count, from what the model gives for all that were computed.

        Args:
            output: [N] rewards, all chosen and then all rejected; [N, 1 + K] with the predicted attributes behind them.

        Returns:
            rewards of chosen [B] and of rejected [B], and the predicted attributes of both [B, 2, K]; None of [N].
        """
        chosen, rejected = (side[: len(self.indices)] for side in output.chunk(2))
        if output.dim() == 1:
            return chosen, rejected, None
        return chosen[:, 0], rejected[:, 0], torch.stack((chosen[:, 1:], rejected[:, 1:]), 1)

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory; see layouts.Batch.pinned."""
        return dataclasses.replace(self, batch=self.batch.pinned(), targets=self.targets.pinned())


@dataclass(frozen=True)
class Step:
    """One optimizer step on this rank.

    number: from 1.  pairs: of all ranks together, what the loss is divided by.  imbalance: max over mean cost of the ranks.
    indices: [pairs] into the data, of all ranks.
    asked: time.perf_counter() when the loop asked for it.  waited: seconds until it was there.
    """

    number: int
    pairs: int
    micro_batches: list[MicroBatch]
    imbalance: float
    indices: np.ndarray
    asked: float = 0.0
    waited: float = 0.0


def training_steps(
    draws: Iterable[np.ndarray],
    data: PreferenceData,
    rules: BatchRules,
    ranks: Ranks,
    *,
    targets: TargetColumns | None = None,
    after: int = 0,
) -> Iterator[Step]:
    """The steps whose pairs are drawn (steps.draw_steps).

    targets: of all pairs of the data; None of plain ones.  after: steps that were made before; their draws are passed over.
    """
    columns = targets or TargetColumns()

    def made() -> Iterator[Step]:
        if ranks.on_gpu:
            torch.cuda.set_device(ranks.device)  # a thread begins with the first one, and pinning would start that
        for number, indices in enumerate(itertools.islice(draws, after, None), start=after + 1):
            deal = deal_step(indices, data.table, rules.of_group(ranks.sequence_size), ranks.data_size)
            own = list(micro_batches(deal.ranks[ranks.data_rank], data, rules, columns.of_step(indices)))
            if ranks.on_gpu:
                own = [micro.pinned() for micro in own]
            yield Step(number, len(indices), own, deal.imbalance, indices)

    with contextlib.closing(prefetch(made(), depth=STEPS_AHEAD)) as ready:
        while True:
            asked = time.perf_counter()
            step = next(ready, None)
            if step is None:
                return
            with alive.phase(f"training step {step.number}", alive.Kind.STEPS):
                yield dataclasses.replace(step, asked=asked, waited=time.perf_counter() - asked)


def micro_batches(
    parts: list[Part],
    data: PreferenceData,
    rules: BatchRules,
    targets_of: Callable[[np.ndarray], Targets] = lambda pairs: PLAIN,
) -> Iterator[MicroBatch]:
    """A rank's parts of a deal as they lie in memory, one after another. targets_of: of pairs; see TargetColumns.of_step."""
    for number, part in enumerate(parts, start=1):
        counted, prompt_ids = part.indices[: part.counted], data.table.cut_prompt_ids(part.indices)
        batch = lay_out(rules.layout, data.pairs(part.indices), pad_token_id=rules.pad_token_id, prompt_ids=prompt_ids)
        # by number: filler parts of a rank are one object, so `part is parts[-1]` would be true of several
        yield MicroBatch(counted, batch, targets_of(counted), last=number == len(parts))
