"""What an engine holds between two steps, as flat tensors on each rank, and back: float32 weights and optimizer moments.

One view of it whatever divides it: ZeRO 0 has a flat tensor for each parameter, the same on all ranks; ZeRO 1 and 2 one for
each group of parameters, of which a rank holds its part; ZeRO 3 one for each sub-group of the parts of parameters. Nothing
is gathered to read or to write it. Frozen weights are not in it: they are those that the run starts from.
"""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from open_rm.errors import UserError

HOLDERS = ("deepspeed.", "torch.optim", "bitsandbytes.")  # whose objects hold weights, gradients and moments


@dataclass(frozen=True)
class Slice:
    """Elements start..stop of the flattened parameter `name`, which lie from `at` on in a flat tensor."""

    name: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Flat:
    """What the optimizer steps as one tensor on this rank.

    key: equal where the same elements lie in the same order, so that all of it can be copied as it is.
    weights: float32, one-dimensional, a view.  state: the optimizer's own, to be changed in place.
    shape: of moments that have an element for each weight.
    written: by this rank; one rank writes what several hold.
    """

    key: str
    slices: tuple[Slice, ...]
    weights: torch.Tensor
    state: dict
    written: bool
    shape: tuple[int, ...]


def flats_of(deepspeed_engine, optimizer: torch.optim.Optimizer, stage: int) -> list[Flat]:
    """The flat tensors of this rank. optimizer: the one inside ZeRO's."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = {id(p): name for name, p in deepspeed_engine.module.named_parameters() if p.requires_grad}
    if stage == 0:
        return _replicated(deepspeed_engine.module, optimizer, rank, size)
    zero = deepspeed_engine.optimizer
    flats = []
    if stage < 3:
        for number, (weights, laid_out) in enumerate(_groups(zero)):
            own = rank * len(weights)  # where this rank's part begins
            slices = []
            for p, offset in laid_out:
                start, stop = max(own, offset), min(own + len(weights), offset + p.numel())
                if start < stop:
                    slices.append(Slice(names[id(p)], start - offset, stop - offset, start - own))
            flats.append((number, slices, weights))
    elif zero.swap_optimizer:
        raise UserError(
            "a DeepSpeed file that keeps optimizer states on NVMe allows no checkpoints; pass --checkpointing_minutes 0, or "
            "offload to the CPU's memory (configs/ds/zero3_offload.json)"
        )
    else:
        for number, weights in enumerate(zero.fp32_partitioned_groups_flat):
            slices = []
            for p in zero.fp16_groups[number]:
                _, at, length = zero.grad_position[zero.get_param_id(p)]
                start = length * zero._get_param_partition_rank(p)
                stop = min(start + length, p.ds_numel)
                if start < stop:  # the last ranks' parts of a small parameter are padding
                    slices.append(Slice(names[id(p)], start, stop, at))
            flats.append((number, slices, weights))
    return [
        Flat(
            f"zero{stage}/{number}/{rank} of {size}",
            tuple(slices),
            weights.data,
            optimizer.state[weights],
            written=True,
            shape=weights.shape,
        )
        for number, slices, weights in flats
    ]


def _groups(zero) -> list[tuple[torch.Tensor, list]]:
    """For each group of parameters under ZeRO 1 and 2: this rank's part, and each parameter with where it begins in the
    whole. bfloat16 under stage 1 has an optimizer of its own in DeepSpeed."""
    if hasattr(zero, "fp32_groups_flat_partition"):
        groups, offsets = zero.bf16_groups, []
        for group in groups:
            ends = itertools.accumulate((p.numel() for p in group), initial=0)
            offsets.append(list(ends)[:-1])
        parts = zero.fp32_groups_flat_partition
    else:
        groups, offsets = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
        parts = zero.single_partition_of_fp32_groups
    both = [list(zip(*laid_out, strict=True)) for laid_out in zip(groups, offsets, strict=True)]
    return list(zip(parts, both, strict=True))


def _replicated(module: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int) -> list[Flat]:
    """All ranks hold the same; each parameter is written by the rank that has the least to write so far."""
    flats, written = [], [0] * size
    for name, p in module.named_parameters():
        if p.requires_grad:
            writer = written.index(min(written))
            written[writer] += p.numel()
            slice_ = Slice(name, 0, p.numel(), 0)
            flats.append(Flat(name, (slice_,), p.data.view(-1), optimizer.state[p], writer == rank, p.shape))
    return flats


def weights_changed(deepspeed_engine, stage: int) -> None:
    """After the float32 weights were changed from outside: those that the model computes with follow. A collective call."""
    zero = deepspeed_engine.optimizer
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()  # zero_hpz_partition_size: a node's copies are made anew by the next forward


def trained_sizes(module: torch.nn.Module) -> dict[str, int]:
    """Elements of each parameter that is trained."""
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in module.named_parameters() if p.requires_grad}


def frozen_mark(module: torch.nn.Module) -> str:
    """One value of each frozen weight in a hash, to tell another base model; under ZeRO-3 the main rank's."""
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            values = getattr(p, "ds_tensor", p).detach().flatten()[:1].float().tolist()
            digest.update(json.dumps([name, values]).encode())
    return digest.hexdigest()


def tensors_of(roots: list) -> list[torch.Tensor]:
    """Every tensor that an engine's parts hold, in containers, in attributes, and in those of parameters."""
    found, seen, left = [], set(), list(roots)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
            left += vars(thing).values()
        elif isinstance(thing, Mapping):
            left += thing.values()
        elif isinstance(thing, (list, tuple, set, deque)):
            left += thing
        elif type(thing).__module__.startswith(HOLDERS):
            left += getattr(thing, "__dict__", {}).values()
    return found


def make_state(optimizer: torch.optim.Optimizer, weights: torch.Tensor) -> None:
    """Give bitsandbytes' optimizers the moments of a tensor that they make with its first step, zeros, to be filled."""
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            if p.data_ptr() == weights.data_ptr() and not optimizer.state[p]:
                optimizer.init_state(group, p, number, place)
