"""How much a forward may hold and what is computed again in the backward pass, from the memory of the device.

Neither changes the mathematics: a step's pairs are the same, cut into other micro-batches. On a CPU the flags alone decide.
What a forward keeps is measured, by one forward of a single row before training, and not looked up: it depends on the
family, the kernels, the layout, adapters and float8.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.batching.layouts import lay_out_sequences
from open_rm.batching.rules import BatchRules
from open_rm.data.pairs import PairTable
from open_rm.flags import BatchFlags
from open_rm.model import recompute
from open_rm.model.reward_model import RewardModel
from open_rm.ranks import Ranks
from open_rm.training import footprint
from open_rm.training.engine import Engine

MOST_POSITIONS = 32_768  # more gain nothing: matrix products are as fast as they get, and gathers are hidden
SHARE = 0.9  # of the memory left that activations may take; fragments, and tensors for a moment, need the rest
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """left: bytes for activations, on the rank that has least.  kept: bytes that one position keeps over all layers.
    passed: bytes of a layer's input at one position."""

    left: float
    kept: float
    passed: float


@dataclass(frozen=True)
class Fit:
    """every: recompute every so many layers (0: none).  max_tokens: positions of a micro-batch.  fits: whether even so the
    largest pair is expected to fit."""

    every: int
    max_tokens: int
    fits: bool


def fit(
    flags: BatchFlags,
    model: RewardModel,
    engine: Engine,
    rules: BatchRules,
    *,
    config: dict,
    optim: str,
    table: PairTable,
) -> tuple[BatchRules, list[str]]:
    """Decide both, switch recomputation on, and return the rules and lines for the log. A collective call.

    config: of DeepSpeed, from ds_config.fill_config.  optim: --optim.  table: of the training pairs.
    """
    every, ranks = recompute.every_how_many(flags.gradient_checkpointing), engine.ranks
    if not ranks.on_gpu:
        recompute.recompute(model.classifier, every or 0)
        return rules, [recompute.describe(model.classifier, every)] if every else []
    state = sum(footprint.state_bytes(footprint.sizes_of(model), config, optim, ranks.world_size).values())
    longest = int(max(table.chosen_length.max(), table.rejected_length.max()))
    memory = measure(model, engine, rules, longest=longest, state=state)
    layers = len(recompute.layers_of(model.classifier))
    asked = flags.max_tokens_per_micro_batch
    found = choose(memory, layers, every=every, asked=asked, at_least=rules.max_tokens, largest=2 * longest)
    recompute.recompute(model.classifier, found.every)
    return dataclasses.replace(rules, max_tokens=found.max_tokens), [
        f"memory: {memory.left / GIB:.1f} GiB left beside weights, gradients and optimizer; a position keeps "
        f"{memory.kept / 2**20:.2f} MiB of activations, so micro-batches have up to {found.max_tokens} positions"
        + ("" if found.fits else f", and a pair of {2 * longest} may not fit"),
        recompute.describe(model.classifier, found.every),
    ]


def choose(memory: Memory, layers: int, *, every: int | None, asked: int | None, at_least: int, largest: int) -> Fit:
    """The least recomputation with which a micro-batch fits, and the largest micro-batch that fits then.

    Args:
        layers: that can be recomputed one by one; the last one never is.
        every: recompute every so many layers; None: as few as possible.  asked: --max_tokens_per_micro_batch.
        at_least: positions that --per_device_train_batch_size asks for.  largest: those of the largest pair.
    """
    wanted = max(asked or at_least, largest)
    several = [0, *range(max(layers - 1, 1), 0, -1)] if layers > 1 else [0]
    for option in several if every is None else [every]:
        room = int(SHARE * memory.left / bytes_of_position(memory, layers, option))
        if room >= wanted:
            break
    # Multiples of 256: a run that goes on finds a little more or less memory free, and is to cut its steps alike.
    budget = asked or max(min(room, MOST_POSITIONS) // 256 * 256, 256)
    return Fit(option, budget, room >= largest)


def bytes_of_position(memory: Memory, layers: int, every: int) -> float:
    """What a position takes at the peak: what layers keep or, recomputed, were given; one recomputed layer as a whole; and
    the gradients inside the layer that is at work, as many as its activations."""
    layer = memory.kept / max(layers, 1)
    again = -(-(layers - 1) // every) if every and layers > 1 else 0
    return (layers - again) * layer + again * memory.passed + (layer if again else 0) + layer


def measure(model: RewardModel, engine: Engine, rules: BatchRules, *, longest: int, state: float) -> Memory:
    """One forward of one row, thrown away; the numbers of the rank with the least memory. A collective call."""
    ranks = engine.ranks
    tokens = recompute.measured_tokens(longest)
    row = np.full(tokens, rules.pad_token_id, np.int64)
    batch = lay_out_sequences(rules.layout, [row], pad_token_id=rules.pad_token_id, prompt_of=[0])
    with recompute.Saved(tokens) as saved:
        engine(**batch.inputs(ranks.device))
    left = _left(ranks, state)
    everywhere = ranks.gathered((left, saved.per_token))
    passed = model.width * torch.finfo(engine.dtype).bits / 8
    return Memory(min(left for left, _ in everywhere), max(kept for _, kept in everywhere), passed)


def _left(ranks: Ranks, state: float) -> float:
    """Free memory without what is still to come: gradients and moments are made by the first step."""
    return footprint.free_bytes(ranks.device) - max(0.0, state - torch.cuda.memory_allocated(ranks.device))
