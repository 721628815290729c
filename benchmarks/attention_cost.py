"""What attention over packed rows costs, FLOP for FLOP, beside matrix products: the number that the cost model has to know.

    python -m benchmarks.attention_cost                 # on a GPU in bfloat16, heads of 1B and 8B
    python -m benchmarks.attention_cost --smoke         # anywhere, small

A step is dealt to ranks by cost = tokens + area_cost * query-key products (batching/dealing.py), where attention_cost() is the
ratio of their FLOPs. Attention runs at a lower rate than the linear layers, so that ratio has to be multiplied by how many times
as long a FLOP of attention takes. Here both run forward and backward over rows of one number of tokens: attention over
segments of several lengths, and an MLP of the shape. Printed is the factor by length beside the recipe's, feeding.GPU_ATTENTION.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import nn

from benchmarks import workloads
from benchmarks.card import name as machine
from benchmarks.measuring import wait_for_device
from open_rm.batching.attention import make_segments, segment_attention
from open_rm.batching.feeding import GPU_ATTENTION


@dataclass(frozen=True)
class AttentionCostArgs:
    """Measure the time per FLOP of packed attention over that of linear layers."""

    shapes: tuple[str, ...] = ("1B", "8B/4")
    """Names of workloads.SHAPES."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    """Tokens of a segment."""
    tokens: int = 16384
    """Tokens of a row."""
    repeats: int = 5
    """Times that each is measured; the median counts."""
    smoke: bool = False
    """A tiny shape and short rows, to see that it runs."""


def main(args: AttentionCostArgs) -> dict[str, dict[int, float]]:
    """Print a line for each shape; returns the factors by shape and length."""
    if args.smoke:
        args = AttentionCostArgs(shapes=("tiny",), lengths=(16, 64, 256), tokens=512, repeats=2, smoke=True)
    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    print(f"machine: {machine()}; rows of {args.tokens} tokens, {dtype}, forward and backward")
    found = {}
    for name in args.shapes:
        shape = workloads.SHAPES[name]
        linear = linear_seconds_per_flop(shape, args.tokens, args.repeats, device, dtype)
        found[name] = {
            length: attention_seconds_per_flop(shape, length, args.tokens, args.repeats, device, dtype) / linear
            for length in args.lengths
        }
        each = ", ".join(f"{length}: {factor:.2f}" for length, factor in found[name].items())
        middle = statistics.median(found[name].values())
        print(f"{name}, linear layers {1e-12 / linear:.3g} TFLOP/s; a FLOP of attention takes, by length, {each}")
        print(
            f"{name}: multiply area_cost by {middle:.2f} (the median; the recipe takes {GPU_ATTENTION} on a GPU)",
            flush=True,
        )
    return found


def attention_seconds_per_flop(
    shape: workloads.Shape, length: int, tokens: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Of segment_attention over a row of segments of one length."""
    head = shape.width // shape.heads
    bounds = [(start, min(start + length, tokens), ()) for start in range(0, tokens, length)]
    segments = make_segments(bounds)
    area = segments.score_area()
    segments = segments.to(device)
    of = {"device": device, "dtype": dtype, "requires_grad": True}
    # as a layer gives them: [1, tokens, heads * head] seen as [1, heads, tokens, head]
    query, key, value = (
        torch.randn(1, tokens, heads, head, **of).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    gradient = torch.randn(1, tokens, shape.heads, head, device=device, dtype=dtype)

    def once() -> None:
        output, _ = segment_attention(None, query, key, value, None, segments=segments)
        torch.autograd.grad(output, (query, key, value), gradient)

    # two products of an area times the width each way: 3 passes of 2 * 2 * area * width
    return seconds(once, repeats) / (12.0 * area * shape.width)


def linear_seconds_per_flop(
    shape: workloads.Shape, tokens: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Of an MLP's two products without what stands between them."""
    with torch.device(device):
        up = nn.Linear(shape.width, shape.mlp, bias=False, dtype=dtype)
        down = nn.Linear(shape.mlp, shape.width, bias=False, dtype=dtype)
    hidden = torch.randn(tokens, shape.width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, shape.width, device=device, dtype=dtype)

    def once() -> None:
        torch.autograd.grad(down(up(hidden)), (hidden, up.weight, down.weight), gradient)

    return seconds(once, repeats) / (6.0 * tokens * 2 * shape.width * shape.mlp)


def seconds(once: Callable[[], None], repeats: int) -> float:
    """Median over `repeats` measurements, after one that sets things up; each of as many calls as take 20 ms."""
    once()
    calls, times = 1, []
    while True:
        wait_for_device()
        started = time.perf_counter()
        for _ in range(calls):
            once()
        wait_for_device()
        taken = time.perf_counter() - started
        if taken < 0.02 and not times:
            calls *= 2
            continue
        times.append(taken / calls)
        if len(times) == repeats:
            return statistics.median(times)


if __name__ == "__main__":
    main(tyro.cli(AttentionCostArgs, use_underscores=True))
