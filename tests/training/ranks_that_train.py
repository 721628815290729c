"""Ranks that train a toy, for test_trying.py and test_stragglers.py: one process imports all that they need and forks them.

`python ranks_that_train.py CASES FOLDER`: FOLDER is the toy's model; prints what each case found, case -> the ranks' values, as JSON.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from forking import forked
from pairs_of_ids import as_data

from open_rm.batching import feeding
from open_rm.batching.dealing import Deal, Part
from open_rm.batching.rules import BatchRules
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import AdapterFlags, BatchFlags, ModelFlags, ObjectiveFlags, OptimizerFlags, ScaleFlags
from open_rm.model import sequence_parallel
from open_rm.model.loading import load_reward_model
from open_rm.model.recompute import recompute
from open_rm.model.reward_model import model_shape
from open_rm.ranks import Ranks, joined_ranks
from open_rm.training import memory, metrics, trying
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine
from open_rm.training.losses import loss_terms
from open_rm.training.metrics import Meter
from open_rm.training.stragglers import Stopwatch, Stragglers

STEP = 12  # pairs
FIND = ScaleFlags(find_batch_size=True)
DROPOUT = AdapterFlags(use_peft=True, lora_r=4, lora_dropout=0.2)


def tokens(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 90, n).tolist()


def pairs(count: int = 24, shortest: int = 40, longest: int = 120):
    """Of different lengths, each with a prompt of 20 tokens."""
    lengths = np.random.default_rng(0).integers(shortest, longest, (count, 2))
    prompts = [tokens(20, n) for n in range(count)]
    both = [
        (prompt + tokens(chosen, n), prompt + tokens(rejected, -n - 1 + 10_000))
        for n, (prompt, (chosen, rejected)) in enumerate(zip(prompts, lengths.tolist(), strict=True))
    ]
    return as_data(both, [20] * count)


def made(
    ranks: Ranks, folder: str, stage: int, layout: str = "packed", adapter: AdapterFlags | None = None, **other
) -> Engine:
    """other: bf16, offload; every: how many layers one is recomputed."""
    torch.manual_seed(1)
    every = other.pop("every", 0)
    config = config_of(stage, ranks, **other)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    how = {"layout": layout, "adapter": adapter or AdapterFlags(), "dtype": dtype}
    if stage == 3:
        how |= {"seed": 1, "deepspeed_config": config}
    model, _ = load_reward_model(ModelFlags(model_name_or_path=folder), load_tokenizer(folder), **how)
    sequence_parallel.use(model, ranks)
    recompute(model.classifier, every)
    return Engine(model, OptimizerFlags(learning_rate=1e-3), config, ranks, total_steps=4, warmup_steps=1)


def config_of(stage: int, ranks: Ranks, *, bf16: bool = False, offload: bool = False) -> dict:
    config = fill_config(BatchFlags(), width=128, bf16=bf16, max_grad_norm=1.0, world_size=ranks.world_size)
    zero = {"stage": stage, "reduce_bucket_size": 20_000}
    return config | {"zero_optimization": zero | ({"offload_optimizer": {"device": "cpu"}} if offload else {})}


def rules(budget: int, layout: str = "packed") -> BatchRules:
    return BatchRules(layout, pad_token_id=2, max_tokens=budget, evaluation_tokens=512)


def trained(engine: Engine, data, how: BatchRules, steps: int = 2, meter: Meter | None = None) -> list:
    """Losses, norms and the sum of all weights, step by step; or a meter's numbers."""
    found, draws = [], itertools.cycle([np.arange(STEP), np.arange(STEP, 2 * STEP)])
    for step in itertools.islice(feeding.training_steps(draws, data, how, engine.ranks), steps):
        total = 0.0
        for micro in step.micro_batches:
            chosen, rejected, predicted = micro.sides(engine(**micro.batch.inputs(engine.ranks.device)))
            terms = loss_terms(chosen, rejected, micro.targets, ObjectiveFlags(), predicted)
            loss = sum(terms.values()).sum() / step.pairs
            engine.backward(loss, last=micro.last)
            total += loss.item()
            if meter:
                meter.add(chosen, rejected, terms, micro.batch)
        if meter:
            # Waits are of the wall clock: with others on this machine's cores they are not what is tested.
            meter.reduce(step.pairs)
            found.append(meter.performance(step, flops_before=0.0))
        norm = engine.step()
        if not meter:
            found.append(
                (total, norm, engine.learning_rate, [flat.weights.double().sum().item() for flat in engine.flats()])
            )
    return found


def find(engine: Engine, data, layout: str = "packed", *, before: dict | None = None, each: int = STEP):
    return trying.find(FIND, ObjectiveFlags(), engine, rules(512, layout), data, pairs_per_step=each, before=before)


def limited(ranks: Ranks, mib: float) -> None:
    """As if this process might take so much more than now."""
    end = memory.CpuMemory(1).held() + mib * 2**20
    memory.CpuMemory.left = lambda self: int(end - self.held())


# ---------------------------------------------------------------- cases, each computed by every rank


def a_run_that_found_equals_one_that_was_given(
    ranks: Ranks, folder: str, *, layout: str = "packed", least: float = 250.0, devices: int = 1, **how
) -> dict:
    """The main rank has plenty, the last one `least` MiB. devices: of a sequence group."""
    ranks, how = sequence_parallel.grouped(ranks, devices), how | {"layout": layout}
    limited(ranks, least if ranks.rank == ranks.world_size - 1 else 4000.0)
    engine, data = made(ranks, folder, **how), pairs()
    before = torch.get_rng_state()
    found, lines = find(engine, data, layout)
    same_numbers = torch.equal(before, torch.get_rng_state())
    after = trained(engine, data, found)
    given = trained(made(ranks, folder, **how), data, rules(found.max_tokens, layout))
    return {
        "budget": found.max_tokens,
        "lines": lines,
        "numbers": same_numbers,
        "equal": after == given,
        "steps": given,
    }


def memory_runs_out(ranks: Ranks, folder: str, stage: int) -> dict:
    """No try is foreseen not to fit, and the process is held to 100 MiB more."""
    trying.expected_peak = lambda *_, **__: 0.0
    engine, data = made(ranks, folder, stage), pairs()
    status = memory._status("VmData") * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (status + 100 * 2**20, resource.RLIM_INFINITY))
    found, lines = find(engine, data, each=10_000)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = trained(engine, data, found)
    given = trained(made(ranks, folder, stage), data, found)
    return {"budget": found.max_tokens, "lines": lines, "equal": after == given}


def under_a_real_limit(ranks: Ranks, folder: str, mib: int) -> dict:
    """What is found is trained with; then twice as much is computed under the same limit."""
    engine, data = made(ranks, folder, 0), pairs()
    status = memory._status("VmData") * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (status + mib * 2**20, resource.RLIM_INFINITY))
    found, lines = find(engine, data, each=10_000)
    trained(engine, data, found, steps=1)
    fill = trying.Filling(found, data, 1)
    try:
        for micro in fill.micro_batches(2 * found.max_tokens):
            engine(**micro.batch.inputs(ranks.device)).sum().backward()
        next_one = "fits"
    except RuntimeError as error:
        next_one = str(error)
    return {"budget": found.max_tokens, "lines": lines, "next": next_one}


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2)])

    def forward(self, x, breaks_off: bool = False):
        for layer in self.layers:
            x = torch.tanh(layer(x))
            x = BreaksOff.apply(x) if breaks_off and layer is self.layers[0] else x
        return x.float().sum(-1)


class BreaksOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


def what_dropped_steps_leave(ranks: Ranks, _: str) -> dict:
    """Norms of two steps from the beginning; after one that was no number; and after gradients that were forgotten, of whole
    passes and of one that broke off between its layers."""
    torch.manual_seed(1)
    xs, found = torch.randn(2, 4, 32, dtype=torch.bfloat16), {}
    for stage, offload in itertools.product((1, 2, 3), (False, True)):

        def fresh(stage=stage, offload=offload) -> Engine:
            torch.manual_seed(2)
            flags = OptimizerFlags(learning_rate=1e-2, lr_scheduler_type="constant")
            return Engine(Small(), flags, config_of(stage, ranks, bf16=True, offload=offload), ranks)

        def step(engine: Engine, scale: float = 1.0) -> float:
            for number, x in enumerate(xs):
                engine.backward(engine(x=x).sum() * scale, last=number == 1)
            return engine.step()

        plain, after_nan, after_forgetting = fresh(), fresh(), fresh()
        dropped = step(after_nan, math.nan)
        for _ in range(2):
            after_forgetting.backward(after_forgetting(x=xs[0]).sum() * 10, last=False)
        with contextlib.suppress(MemoryError):
            after_forgetting.backward(after_forgetting(x=xs[0], breaks_off=True).sum() * 10, last=False)
        after_forgetting.forget_gradients(lambda engine=after_forgetting: engine(x=xs[1][:1]).sum())
        norms = [[step(engine), step(engine)] for engine in (plain, after_nan, after_forgetting)]
        found[f"ZeRO {stage}" + (", offload" if offload else "")] = [str(dropped), *norms]
    return found


TRYING = {
    1: {
        "dropout": (
            a_run_that_found_equals_one_that_was_given,
            {"stage": 0, "adapter": DROPOUT, "layout": "padded", "every": 1},
        ),
        "dropped": (what_dropped_steps_leave, {}),
        "runs out, 3": (memory_runs_out, {"stage": 3}),
        "real": (under_a_real_limit, {"mib": 110}),
    },
    2: {
        "2": (a_run_that_found_equals_one_that_was_given, {"stage": 2, "layout": "shared_prefix", "least": 130.0}),
        "3, a group": (a_run_that_found_equals_one_that_was_given, {"stage": 3, "devices": 2, "every": 1}),
    },
}


# ---------------------------------------------------------------- stragglers


def watched(ranks: Ranks, folder: str, stage: int, *, clock=time.perf_counter, slowed=False, steps=3, **how) -> dict:
    """What is said of some steps. clock: of the stopwatch.  slowed: the last rank computes each product six times."""
    Stopwatch.clock = clock
    engine, said = made(ranks, folder, stage, **how), []
    if slowed and ranks.rank == ranks.world_size - 1:
        for module in engine.module.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = several_times(module.forward)
    stragglers = Stragglers(engine.module, ranks, lambda *lines: said.extend(lines))
    meter = Meter(ranks, model_shape(engine.module), torch.float32, stragglers)
    rows = trained(engine, pairs(), rules(4096), steps, meter)
    with engine.evaluating():  # is no step's time
        engine(**trying.Filling(rules(512), pairs(), 1).least().batch.inputs(ranks.device))
    left = len(stragglers._stopwatch._spans)
    return {"rows": rows, "report": stragglers.report(), "said": said, "left": left}


def several_times(forward):
    def again(*inputs):
        for _ in range(5):
            forward(*inputs)
        return forward(*inputs)

    return again


def a_slow_rank(ranks: Ranks, folder: str) -> dict:
    grouped = sequence_parallel.grouped(ranks, 2)
    return {
        "ZeRO 2": watched(ranks, folder, 2, slowed=True),
        "ZeRO 3, recomputed, a group": watched(grouped, folder, 3, slowed=True, every=1),
    }


def even_ranks(ranks: Ranks, folder: str) -> dict:
    """By processor time, and over more steps: other processes that take this machine's cores are not what is tested."""
    return {0: watched(ranks, folder, 0, clock=time.thread_time, steps=11)}


def an_uneven_deal(ranks: Ranks, folder: str) -> dict:
    """The first rank has three quarters of each step's pairs."""

    def deal(indices, table, rules, count) -> Deal:
        first = len(indices) * 3 // 4
        shares = [Part(share, len(share)) for share in (indices[:first], indices[first:])]
        return Deal(indices, [[share] for share in shares], 1.5)

    feeding.deal_step = deal
    return {0: watched(ranks, folder, 0, clock=time.thread_time)}


STRAGGLERS = {2: {"slow": (a_slow_rank, {}), "even": (even_ranks, {}), "uneven": (an_uneven_deal, {})}}


# ---------------------------------------------------------------- processes


def main(cases: str, folder: str) -> None:
    importlib.import_module("deepspeed")
    metrics.matmul_flops = lambda *_: 1e9
    named, found = {"trying": TRYING, "stragglers": STRAGGLERS}[cases], {}
    for world, of_world in named.items():
        for name, (compute, how) in of_world.items():
            found[f"{world}: {name}"] = of_ranks(
                world, lambda ranks, compute=compute, how=how: compute(ranks, folder, **how)
            )
    print(json.dumps(found))


def of_ranks(world: int, compute) -> list:
    """What `compute` gives on each rank of a group of processes."""
    with tempfile.TemporaryDirectory() as folder:

        def become(group: dict) -> None:
            os.environ.update(group)
            os.dup2(2, 1)
            with joined_ranks() as ranks:
                Path(folder, group["RANK"]).write_text(json.dumps(compute(ranks)))

        forked(world, become)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]


if __name__ == "__main__":
    main(*sys.argv[1:])
