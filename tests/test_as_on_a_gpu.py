"""The whole recipe takes the way of a GPU, on a CPU: each rank says that it has one, and tensors stay where they are.

What only a device can do (its kernels, its streams) is replaced by what the CPU has for it; the rest is as it will be there:
pinned batches made in the thread, memory measured and shared among ranks, recomputation by need, float8, the engine
freed before the proof, the proof in a process of its own.
"""

import re

import pytest
from conftest import read_metrics

AS_ON_A_GPU = """
import os, threading, torch
from open_rm import ranks, reward_modeling
from open_rm.model import float8, kernels
from open_rm.reliability import shards
from open_rm.training import footprint

def say(*words):
    print("GPU", *words, flush=True)

ranks.Ranks.on_gpu = property(lambda self: True)
reward_modeling.capability_of = kernels.capability_of = lambda device: (9, 0)
kernels.flash.activate = lambda *_: None
shards.Snapshot._pinned = property(lambda self: False, lambda self, given: say("snapshots pinned", given))
pinned, of_thread = set(), set()

def pin_memory(tensor):
    pinned.add(threading.current_thread().name)
    return tensor.clone()

torch.Tensor.pin_memory = pin_memory
torch.cuda.set_device = lambda device: of_thread.add(threading.current_thread().name)
torch.cuda.synchronize = lambda *_: None
torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
torch.cuda.max_memory_allocated = lambda *_: 2**30
torch.cuda.memory_allocated = lambda *_: 0
torch.cuda.empty_cache = lambda: say("empties its cache; pinned by", sorted(pinned), "set in", sorted(of_thread))
footprint.free_bytes = lambda device: int(os.environ["FREE"])
apply = float8.apply
float8.apply = lambda model: apply(model, worth=0)
"""
PLENTY = 2**33


@pytest.fixture
def as_on_a_gpu(nursery, flags_for, tmp_path):
    def run(*, processes: int = 1, of_rank_1: int = PLENTY, **flags) -> tuple[str, list[dict]]:
        own = {
            "total_episodes": 48,
            "dtype": "bfloat16",
            "num_evals": 0,
            "checkpointing_steps": None,
            "warm_up_steps": 0,
        }
        env = {"TEST_PATCH": AS_ON_A_GPU, "FREE": str(PLENTY)}
        flags = flags_for(tmp_path / "out", processes, **own | flags)
        run = nursery.start(flags, tmp_path / "log", processes=processes, env=env, own={1: {"FREE": str(of_rank_1)}})
        return run.finish(), read_metrics(tmp_path / "out")

    return run


@pytest.mark.parametrize("stage", [None, "configs/ds/zero2.json", "configs/ds/zero3.json"])
def test_batches_are_pinned_in_the_thread_memory_is_measured_and_the_engine_freed_before_the_proof(as_on_a_gpu, stage):
    output, metrics = as_on_a_gpu(deepspeed=stage)
    assert "memory: 8.0 GiB left" in output and "micro-batches have up to 32768 positions" in output
    assert "activations: none are recomputed" in output
    assert "pinned by ['batches'] set in ['batches']" in output
    assert output.index("saved in") < output.index("GPU empties its cache") < output.index("reload check: 8 rewards")
    assert "GPU snapshots pinned True" in output
    assert "bfloat16 on cpu" in output  # the proof's own process sees no GPU
    assert len(metrics) >= 3


def test_ranks_agree_on_what_fits_the_one_with_least(as_on_a_gpu):
    """Under ZeRO-3 ranks that recompute other layers would wait for each other for ever."""
    output, _ = as_on_a_gpu(processes=2, deepspeed="configs/ds/zero3.json", of_rank_1=60_000_000)
    [positions] = re.findall(r"micro-batches have up to (\d+) positions", output)
    assert 256 <= int(positions) < 8192


def test_float8_trains_and_its_difference_is_stated(as_on_a_gpu):
    output, metrics = as_on_a_gpu(float8=True)
    assert "float8 on" in output or "float8: " in output
    assert "float8: in training these rewards differ from bfloat16's, which clients compute, by up to" in output
    assert all(row["train/rm/loss"] < 2 for row in metrics if "train/rm/loss" in row)
