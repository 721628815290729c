"""How much a forward may hold and what is computed again in the backward pass, from the memory of the device.

Neither changes the mathematics: a step's pairs are the same, cut into other micro-batches. On a CPU the flags alone decide.
What a forward keeps is measured, by forwards of a single row before training, and not looked up: it depends on the family,
the kernels, the layout, adapters and float8.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.batching.layouts import lay_out_sequences
from open_rm.batching.rules import BatchRules
from open_rm.batching.work import units_of, work_of
from open_rm.data.pairs import PairTable
from open_rm.flags import BatchFlags
from open_rm.model import families, recompute
from open_rm.model.reward_model import RewardModel
from open_rm.ranks import Ranks
from open_rm.training import footprint
from open_rm.training.engine import Engine
from open_rm.training.gathered import most_keys

MOST_POSITIONS = 32_768  # more gain nothing: matrix products are as fast as they get, and gathers are hidden
SHARE = 0.9  # of the memory left that activations may take; fragments, and tensors for a moment, need the rest
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """left: bytes for activations, on the rank that has least.  kept: bytes that one position keeps over all layers of the
    device that computes it, in the longest sequence.  passed: bytes of a layer's input at one position."""

    left: float
    kept: float
    passed: float


@dataclass(frozen=True)
class Fit:
    """every: recompute every so many layers (0: none).  max_tokens: positions of a micro-batch.  fits: whether even so the
    largest pair or whole list, and a budget that was asked for, are expected to fit."""

    every: int
    max_tokens: int
    fits: bool


def fit(
    flags: BatchFlags,
    model: RewardModel,
    engine: Engine,
    rules: BatchRules,
    *,
    optim: str,
    table: PairTable,
    sought: bool = False,
) -> tuple[BatchRules, list[str]]:
    """Decide both, switch recomputation on, and return the rules and lines for the log. A collective call.

    optim: --optim.  table: of the training pairs.  sought: another max_tokens will be looked for (trying.py) and said then.
    """
    every, ranks = recompute.every_how_many(flags.gradient_checkpointing), engine.ranks
    if not ranks.on_gpu:
        recompute.recompute(model.classifier, every or 0)
        return rules, [recompute.describe(model.classifier, every)] if every else []
    state = sum(footprint.state_bytes(footprint.sizes_of(model), engine.config, optim, ranks.world_size).values())
    unit = largest_unit(table, rules)
    largest = -(-unit // ranks.sequence_size)  # positions of it on each device that computes it
    asked = flags.max_tokens_per_micro_batch
    memory = measure(model, engine, rules, table=table, state=state, budget=largest_budget(asked, largest))
    layers = len(recompute.layers_of(model.classifier))
    found = choose(memory, layers, every=every, asked=asked, at_least=rules.max_tokens, largest=largest)
    recompute.recompute(model.classifier, found.every)
    budget = "" if sought else f"; micro-batches have up to {found.max_tokens} positions"
    if not found.fits:
        what = f"a {'list' if unit > 2 * _longest(table) else 'pair'} of {unit}"
        budget += f"; {what} may not fit" if sought else f", which may not fit, nor {what}"
    return dataclasses.replace(rules, max_tokens=found.max_tokens), [
        f"memory: {max(memory.left, 0.0) / GIB:.1f} GiB left beside weights, gradients and optimizer; a position keeps "
        f"{memory.kept / 2**20:.2f} MiB of activations{budget}",
        recompute.describe(model.classifier, found.every),
    ]


def choose(memory: Memory, layers: int, *, every: int | None, asked: int | None, at_least: int, largest: int) -> Fit:
    """The least recomputation with which a micro-batch fits, and the largest micro-batch that fits then.

    Args:
        layers: that can be recomputed one by one; the last one never is.
        every: recompute every so many layers; None: as few as possible.  asked: --max_tokens_per_micro_batch.
        at_least: positions that --per_device_train_batch_size asks for.  largest: those of the largest pair or whole list.
    """
    wanted = max(asked or min(at_least, MOST_POSITIONS), largest)
    plain = bytes_of_position(memory, layers, 0)
    several = [0, *(every for every in range(layers - 1, 0, -1) if bytes_of_position(memory, layers, every) < plain)]
    for option in several if every is None else [every]:
        room = int(SHARE * memory.left / bytes_of_position(memory, layers, option))
        if room >= wanted:
            break
    # Multiples of 256: a run that goes on finds a little more or less memory free, and is to cut its steps alike.
    budget = asked or max(min(room, MOST_POSITIONS) // 256 * 256, 256)
    return Fit(option, budget, room >= max(largest, asked or 0))


def bytes_of_position(memory: Memory, layers: int, every: int) -> float:
    """What a position takes at the peak: what layers keep or, recomputed, were given; one recomputed layer as a whole; and
    the gradients inside the layer that is at work, as many as its activations."""
    layers = max(layers, 1)
    layer = memory.kept / layers
    again = -(-(layers - 1) // every) if every else 0
    return (layers - again) * layer + again * memory.passed + (layer if again else 0) + layer


def measure(
    model: RewardModel,
    engine: Engine,
    rules: BatchRules,
    *,
    table: PairTable,
    state: float,
    budget: int = MOST_POSITIONS,
) -> Memory:
    """Forwards of a single row, thrown away; the numbers of the rank with the least memory. A collective call.

    state: bytes between steps.  budget: most positions of a micro-batch on each device; with more of them behind one header
    more keys are gathered for each.

    Two lengths tell what a token keeps by itself and what it keeps for each token beside it: some attention keeps scores.
    """
    ranks, devices = engine.ranks, engine.ranks.sequence_size
    longest = -(-_longest(table) // devices)  # tokens of a sequence on each device of a sequence group
    tokens = recompute.measured_tokens(longest)
    kept = _kept(engine, rules, tokens)
    if (fewer := recompute.measured_tokens(tokens // 2)) < tokens:
        slope = max(0.0, (kept - _kept(engine, rules, fewer)) / (tokens - fewer))
        kept += slope * max(0, longest - tokens)
    itemsize, text = engine.dtype.itemsize, model.classifier.config.get_text_config()
    if rules.layout == "shared_prefix":  # keys and values of header and prompt are copied for each sequence behind them
        _, key_heads, width = families.attention_shape(text)
        most = most_keys(table, budget * devices)
        # In a sequence group a device has its share of the heads, one at least, at the positions of all.
        kept += text.num_hidden_layers * 2 * max(key_heads, devices) * width * itemsize * (most - 1)
    everywhere = ranks.gathered((_left(ranks, state), kept))
    passed = model.width * itemsize
    # A forward without gradients, of a frozen backbone, has a few tensors of its own at work.
    return Memory(min(left for left, _ in everywhere), max(8 * passed, *(kept for _, kept in everywhere)), passed)


def _kept(engine: Engine, rules: BatchRules, tokens: int) -> float:
    """Bytes that a position keeps. tokens: on each device; a sequence group has a row of so many times its size."""
    row = np.full(tokens * engine.ranks.sequence_size, rules.pad_token_id, np.int64)
    batch = lay_out_sequences(rules.layout, [row], pad_token_id=rules.pad_token_id, prompt_of=[0])
    with recompute.Saved(tokens) as saved:
        engine(**batch.inputs(engine.ranks.device))
    return saved.per_token


def _longest(table: PairTable) -> int:
    return int(max(table.chosen_length.max(), table.rejected_length.max()))


def largest_unit(table: PairTable, rules: BatchRules) -> int:
    """Positions of the largest pair at most, and where lists stay whole of the largest list: one micro-batch holds it."""
    pair = 2 * _longest(table)
    if not rules.whole_lists:
        return pair
    lists = units_of(np.arange(len(table)), table, rules.layout, 1, whole_lists=True)
    return max(pair, int(work_of(lists, table, rules.layout).tokens.max()))


def largest_budget(asked: int | None, largest: int) -> int:
    """Most positions of a micro-batch that `choose` can find. asked, largest: as there."""
    return max(asked or MOST_POSITIONS, largest)


def _left(ranks: Ranks, state: float) -> float:
    """Free memory without what is still to come: gradients and moments are made by the first step."""
    return footprint.free_bytes(ranks.device) - max(0.0, state - torch.cuda.memory_allocated(ranks.device))
