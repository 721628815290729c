"""What training keeps in a device's memory between steps: bytes by part, from numbers alone, so for any device.

W trained weights, F bytes of frozen ones, n ranks, e bytes of a weight (2 in bfloat16, 4 in float32):

    part        ZeRO 0     ZeRO 1     ZeRO 2     ZeRO 3
    weights     e W + F    e W + F    e W + F    (e W + F) / n
    masters     -          4 W / n    4 W / n    4 W / n        float32, which the optimizer steps
    gradients   e W        4 W        4 W / n    4 W / n
    moments     m W        m W / n    m W / n    m W / n        m: 8 for AdamW, 2 with 8 bits, 0 for Adafactor
    buckets     -          e b        2 e b      2 e b + live   b: reduce_bucket_size; live: whole parameters under ZeRO-3; on
                                                              one rank 0, 2 e b and e b
    hpz         -          -          -        (e W + F) / h    h: zero_hpz_partition_size (ZeRO++), a second copy in each node

The first four are section 3 of the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054), 16 bytes a weight in bfloat16 and
2 more because gradients are kept in float32; the buckets are DeepSpeed's own (runtime/zero/stage_1_and_2.py, stage3.py,
parameter_offload.py), the second copy is ZeRO++'s (Wang et al. 2023, arXiv 2306.10209). `passing_bytes`: what a step holds
besides for a moment. Measured on DeepSpeed 0.19 by tests/training/test_fitting.py and benchmarks/memory_estimate.py.
Activations are not in it: fitting.py measures them, activations.py has formulas.
"""

from dataclasses import dataclass

import torch
from torch import nn

MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "adafactor": 0.05}
SAVED_MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 1}  # at most, in a checkpoint
BUCKET = 500_000_000  # DeepSpeed's default of reduce_bucket_size, in elements
LIVE = 1_000_000_000  # and of stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # and of sub_group_size: weights that ZeRO-3 steps at a time
ALL_REDUCE = 500_000_000  # elements that stage 0 sums over the ranks at a time


@dataclass(frozen=True)
class Sizes:
    """trained: weights.  frozen: bytes of those that are not.  itemsize: bytes of a trained weight as it computes."""

    trained: int
    frozen: int
    itemsize: int


def sizes_of(module: nn.Module) -> Sizes:
    """Of a model, also of one that ZeRO-3 has partitioned or bitsandbytes has packed."""
    trained = frozen = itemsize = 0
    for p in module.parameters():
        count = getattr(p, "ds_numel", p.numel())
        if p.requires_grad:
            trained, itemsize = trained + count, p.element_size()
        else:
            frozen += count * p.element_size()
    return Sizes(trained, frozen, itemsize)


def state_bytes(sizes: Sizes, config: dict, optim: str, world_size: int) -> dict[str, float]:
    """Bytes on each device by part; what a DeepSpeed file moves to the CPU counts as nothing.

    config: from ds_config.fill_config.  optim: --optim.
    """
    zero = config["zero_optimization"]
    stage, n = zero.get("stage", 0), world_size
    w, e, part = sizes.trained, sizes.itemsize, world_size if stage else 1
    parts = {
        "weights": (e * w + sizes.frozen) / (n if stage == 3 else 1),
        "masters": 4 * w / part if stage else 0.0,
        "gradients": {0: e * w, 1: 4 * w}.get(stage, 4 * w / n),
        "moments": MOMENT_BYTES[optim] * w / part,
        "buckets": 0.0,
    }
    bucket = min(float(zero.get("reduce_bucket_size", BUCKET)), w) * e
    if stage and n > 1:
        parts["buckets"] = bucket * (1 if stage == 1 else 2)
    elif stage in (2, 3):
        parts["buckets"] = bucket * (2 if stage == 2 else 1)
    if stage == 3:
        gathers = n > 1 or _offloaded(zero, "offload_param")
        parts["buckets"] += min(float(zero.get("stage3_max_live_parameters", LIVE)), w + sizes.frozen / 2) * e * gathers
        if (hpz := zero.get("zero_hpz_partition_size", 1)) > 1:
            parts["hpz"] = (e * w + sizes.frozen) / min(hpz, n)
    if _offloaded(zero, "offload_optimizer"):
        parts |= {"masters": 0.0, "moments": 0.0, "gradients": 0.0}
    if _offloaded(zero, "offload_param"):
        parts["weights"] = 0.0
    return parts


def passing_bytes(sizes: Sizes, config: dict, world_size: int, *, gloo: bool) -> dict[str, float]:
    """Bytes on each device that a step holds for a moment beside `state_bytes`; the first beside activations, each other part by
    itself, when they are gone.

    gloo: ranks talk by gloo, which gathers into a tensor of its own; NCCL gathers in place.

    Returns:
        new gradients: of a micro-batch, beside those that are accumulated, under ZeRO 1 and 2 in float32, where DeepSpeed adds
            them up at the end of the backward pass; flat: gradients put into one tensor for the optimizer; sums: what stage 0
            sums over the ranks; gathered: gloo's weights.
    """
    zero, n = config["zero_optimization"], world_size
    stage, w, e = zero.get("stage", 0), sizes.trained, sizes.itemsize
    parts = dict.fromkeys(("new gradients", "flat", "sums", "gathered"), 0.0)
    if stage == 0 and n > 1:
        parts["sums"] = e * min(w, ALL_REDUCE)
    elif stage in (1, 2) and e == 4:  # in bfloat16 they are added to one flat tensor as they come
        parts |= {"new gradients": 4 * w / n, "flat": 4 * w / n}
    elif stage == 3:
        parts["flat"] = 4 * min(float(zero.get("sub_group_size", SUB_GROUP)), w / n)
    if stage in (1, 2) and n > 1 and gloo:
        parts["gathered"] = e * w
    if _offloaded(zero, "offload_optimizer"):
        parts |= {"new gradients": 0.0, "flat": 0.0}
    return parts


def _offloaded(zero: dict, key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def free_bytes(device: torch.device) -> int:
    """What a GPU still has for tensors: free memory, and what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
