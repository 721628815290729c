"""Out of memory, in a sentence that says at which pair and which flag to turn."""

import contextlib
from collections.abc import Iterator

import torch

from open_rm.batching.feeding import MicroBatch
from open_rm.batching.rules import BatchRules
from open_rm.data.pairs import PreferenceData
from open_rm.errors import OneRanksError

# Allocators of devices have a class of their own; the CPU's says it in words.
IN_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


@contextlib.contextmanager
def explained(micro: MicroBatch, data: PreferenceData, rules: BatchRules) -> Iterator[None]:
    """The block computes `micro`; what does not fit into memory ends it with a OneRanksError that names its longest pair."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            words in str(error).lower() for words in IN_WORDS
        ):
            raise
        positions = micro.batch.positions
        names = "--gradient_checkpointing on, or --deepspeed configs/ds/zero3.json"
        budget = f"--max_tokens_per_micro_batch {max(1, rules.max_tokens // 2)} (it is {rules.max_tokens}), "
        raise OneRanksError(
            f"out of memory in a micro-batch of {len(micro.indices)} pairs and {positions} positions, {_longest(micro, data)}"
            f"; pass {budget if len(micro.indices) > 1 else ''}{names}"
        ) from error


def _longest(micro: MicroBatch, data: PreferenceData) -> str:
    if not len(micro.indices):
        return "which only keeps this rank in step"
    lengths = data.table.chosen_length[micro.indices] + data.table.rejected_length[micro.indices]
    index = micro.indices[lengths.argmax()]
    return f"the longest pair being {data.places([index])[0]} with {lengths.max()} tokens"
