"""One training step under torch.profiler: where its time goes.

    python -m benchmarks.throughput --profile gpu --trace

Work is told apart by the names of kernels (on a CPU of operators), that of the optimizer by when it runs: everything between the
last backward and the end of the step, clearing and converting gradients included. On a GPU the rest of the step's time is gaps, in
which the device had nothing to do; a profiled step is slower on the host than another one, so its gaps are an upper bound.
"""

import time
from collections.abc import Iterable

import numpy as np
import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import wait_for_device
from benchmarks.recipe_loop import OurTraining
from open_rm.batching import feeding
from open_rm.data.pairs import PreferenceData

STEP, UPDATE = "open_rm: step", "open_rm: update"
KINDS = ("matrix products", "attention", "optimizer", "elementwise and the rest")
# parts of kernels' names, in lower case; cuBLAS calls its kernels by architecture (sm90_xmma_gemm..., nvjet_hsh_...)
ATTENTION = ("flash", "fmha", "attention", "fwd_splitkv", "varlen")
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "matmul", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear")


def trace(training: OurTraining, steps: list[np.ndarray], data: PreferenceData, book, *, recomputes: bool) -> None:
    """Profile the last of `steps`; prints the shares and writes them into the book. recomputes: activations."""
    training.fit(data, recomputes=recomputes)
    *before, last = feeding.training_steps(steps, data, training.rules, training.ranks)
    for step in before:
        training.step(step)
    wait_for_device()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if training.ranks.on_gpu else [])
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        with record_function(STEP):
            training.forward_backward(last)
            wait_for_device()  # so that what runs in UPDATE was asked for in it
            with record_function(UPDATE):
                training.update(last)
                wait_for_device()
        seconds = time.perf_counter() - started
    on_gpu = training.ranks.on_gpu
    work = work_in(profiler.events(), on_gpu=on_gpu)
    if not work:
        raise RuntimeError("torch.profiler recorded no work of the device; may this process look at its counters?")
    shares = shares_of(work, seconds, on_gpu=on_gpu)
    book.write(kind="trace", seconds=seconds, shares=shares)
    print(
        f"one step, {seconds:.3f} s: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}", flush=True
    )


def work_in(events: Iterable, *, on_gpu: bool) -> list[tuple[str, float, float, float]]:
    """(kind, start, end, own microseconds) of all work in the profiled step: kernels of the GPU, or operators of the CPU."""
    events = list(events)
    cpu = torch.autograd.DeviceType.CPU
    [step], [update] = ([e for e in events if e.name == name and e.device_type == cpu] for name in (STEP, UPDATE))
    found = []
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        if (event.device_type == cpu) == on_gpu or event.name in (STEP, UPDATE) or _is_range(event):
            continue
        if end <= step.time_range.start or start >= step.time_range.end:
            continue
        in_update = update.time_range.start <= start < update.time_range.end
        own = end - start if on_gpu else event.self_cpu_time_total
        found.append((kind_of(event.name, in_update=in_update), start, end, own))
    return found


def _is_range(event) -> bool:
    """A named stretch of time (of torch's optimizers, of DeepSpeed), which is drawn over the device's kernels too."""
    return bool(getattr(event, "is_user_annotation", False))


def kind_of(name: str, *, in_update: bool) -> str:
    """One of KINDS."""
    name = name.lower()
    if in_update:
        return "optimizer"
    if any(part in name for part in ATTENTION):  # before products: flash attention's kernels may name cutlass
        return "attention"
    return "matrix products" if any(part in name for part in PRODUCTS) else "elementwise and the rest"


def shares_of(work: list[tuple[str, float, float, float]], seconds: float, *, on_gpu: bool) -> dict[str, float]:
    """Share of each kind in the step's time; on a GPU also that of gaps, when no kernel ran. On a CPU shares sum to one."""
    own = {kind: 1e-6 * sum(each for of, _, _, each in work if of == kind) for kind in KINDS}
    if not on_gpu:
        return {kind: value / sum(own.values()) for kind, value in own.items()}
    busy, reached = 0.0, -np.inf
    for _, start, end, _ in sorted(work, key=lambda each: each[1]):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {kind: value / seconds for kind, value in own.items()} | {"gaps": 1 - 1e-6 * busy / seconds}
