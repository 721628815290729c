"""The dry run's memory beside what a run really takes: three models, ZeRO 0, 2 and 3, one rank and two, in float32 on the CPU.

    python -m benchmarks.memory_estimate               # about ten minutes on 2 quiet cores, 10 GiB of memory
    python -m benchmarks.memory_estimate --models llama --stages 0 2 --ranks 1

Each case is a run's model, engine and two steps of two micro-batches, in processes forked for it. How to read the table, in bytes
of a trained weight:

- tensors: most that torch's allocator had handed out at a time, by its own record (torch.profiler), as
  torch.cuda.max_memory_allocated tells on a GPU. The estimate is state + the larger of activations and what passes.
- resident: VmHWM of the process, less what it had before the model (Python and imports). The estimate is the dry run's peak of a
  process on a CPU, less the same. It is more than the tensors: freed memory is kept (process_group.py) and has holes.
- ratio: estimate over measured. The dry run is to be within 15 %.
"""

import contextlib
import json
import os
import socket
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
import transformers
import tyro

from open_rm import toy
from open_rm.batching.layouts import lay_out_sequences
from open_rm.data.tokenizer import load_tokenizer
from open_rm.dry_run import memory, sizes
from open_rm.dry_run.target import Target
from open_rm.flags import AdapterFlags, BatchFlags, ModelFlags, OptimizerFlags
from open_rm.model.kernels import use_fastest
from open_rm.model.loading import load_reward_model
from open_rm.ranks import joined_ranks
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine

REPOSITORY = Path(__file__).parent.parent
STEPS, MICRO_BATCHES = 2, 2
LAYOUT = "packed"
MODELS = {
    "llama": transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=1024, hidden_size=768, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=12
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=3584,
        num_hidden_layers=11,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
}


@dataclass(frozen=True)
class EstimateArgs:
    """Compare the dry run's memory with a run's."""

    models: tuple[str, ...] = tuple(MODELS)
    """Of llama, gpt_neox, qwen2."""
    stages: tuple[int, ...] = (0, 2, 3)
    """ZeRO stages."""
    ranks: tuple[int, ...] = (1, 2)
    """Processes of a run."""
    tokens: int = 32
    """Positions of a micro-batch."""
    output: str | None = None
    """A file for the rows, one JSON object a line."""


def main(args: EstimateArgs) -> None:
    """Print a row a case."""
    print(
        f"{'model':10s}{'ZeRO':>5s}{'ranks':>6s}{'weights':>9s} |{'tensors':>9s}{'estimate':>9s}{'ratio':>7s} |", end=""
    )
    print(f"{'resident':>9s}{'estimate':>9s}{'ratio':>7s}   bytes a weight", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model = Path(folder) / name
            _write(name, model)
            for stage in args.stages:
                for ranks in args.ranks:
                    _show(_case(str(model), name, stage, ranks, args.tokens), args.output)


def _write(name: str, folder: Path) -> None:
    tokenizer = toy.make_tokenizer(["a model of random weights"] * 10)
    config = MODELS[name]
    config.pad_token_id = tokenizer.pad_token_id
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _show(row: dict, output: str | None) -> None:
    w = row["weights"]
    cells = [f"{row['model']:10s}{row['stage']:5d}{row['ranks']:6d}{w / 1e6:8.0f}M |"]
    for kind in ("tensors", "resident"):
        measured, estimate = row[kind] / w, row[f"{kind}_estimate"] / w
        cells.append(f"{measured:9.2f}{estimate:9.2f}{estimate / measured:7.2f} |")
    print("".join(cells), flush=True)
    if output is not None:
        with Path(output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _case(folder: str, name: str, stage: int, ranks: int, tokens: int) -> dict:
    """Measure it, once for each of the two measures, since the record of the allocator takes memory itself."""
    row = {"model": name, "stage": stage, "ranks": ranks}
    for recorded in (False, True):
        row |= _measured(folder, stage, ranks, tokens, recorded=recorded)
    return row


def _measured(folder: str, stage: int, ranks: int, tokens: int, *, recorded: bool) -> dict:
    """In processes of its own; the first rank's numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = Path(folder) / "measured.json"
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({key: str(value) for key, value in (group | {"MASTER_PORT": port}).items()})
            try:
                _measure(folder, stage, tokens, result, recorded=recorded)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert not any([os.waitpid(child, 0)[1] for child in children]), "a rank failed"
    return json.loads(result.read_text())


def _measure(folder: str, stage: int, tokens: int, result: Path, *, recorded: bool) -> None:
    torch.set_num_threads(1)
    flags = BatchFlags(deepspeed=str(REPOSITORY / f"configs/ds/zero{stage}.json"), max_tokens_per_micro_batch=tokens)
    named, tokenizer = ModelFlags(model_name_or_path=folder), load_tokenizer(folder)
    with joined_ranks() as ranks:
        torch.rand(256, 256) @ torch.rand(256, 256)
        Path("/proc/self/clear_refs").write_text("5")
        base = _status("VmRSS")
        width = transformers.AutoConfig.from_pretrained(folder).hidden_size
        config = fill_config(flags, width=width, bf16=False, max_grad_norm=1.0, world_size=ranks.world_size)
        activities = [torch.profiler.ProfilerActivity.CPU]
        record = torch.profiler.profile(activities=activities, profile_memory=True) if recorded else None
        with record or contextlib.nullcontext():
            model, _ = load_reward_model(named, tokenizer, layout=LAYOUT, deepspeed_config=config)
            if recorded and stage != 3:  # weights are a mapped file until the first step, unknown to the allocator
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
            use_fastest(model, ranks.device, LAYOUT, float8=False)
            _steps(Engine(model, OptimizerFlags(), config, ranks, STEPS), tokens, ranks)
        row = {"tensors": _most_handed_out(record)} if recorded else {"resident": _status("VmHWM") - base, "base": base}
        if not recorded:
            row |= _estimated(named, tokenizer, flags, config, ranks.world_size, tokens, base)
        if ranks.is_main:
            result.write_text(json.dumps(row))


def _steps(engine: Engine, tokens: int, ranks) -> None:
    random = np.random.default_rng(ranks.rank)
    for _ in range(STEPS):
        for number in range(1, MICRO_BATCHES + 1):
            sequences = [random.integers(5, 200, tokens // 2) for _ in range(2)]
            batch = lay_out_sequences(LAYOUT, sequences, pad_token_id=0, prompt_of=[0, 1])
            chosen, rejected = engine(**batch.inputs(ranks.device))
            engine.backward(-torch.nn.functional.logsigmoid(chosen - rejected), last=number == MICRO_BATCHES)
        engine.step()


def _estimated(named, tokenizer, flags: BatchFlags, config: dict, ranks: int, tokens: int, base: int) -> dict:
    """What the dry run says: of tensors, and of a process on a CPU."""
    planned = sizes.planned(named, tokenizer, adapter=AdapterFlags(), dtype=torch.float32, on_gpu=False)
    target = Target(ranks, 1, False, torch.float32, 2**40, None, [])
    needs = memory.needs(flags, planned, LAYOUT, target, keys=1.0, budget=tokens, largest=tokens)
    found = memory.fitted(needs, planned, config, "adamw", target, share=tokens)
    row = {"weights": planned.sizes.trained, "tensors_estimate": found.tensors}
    return row | {
        "resident_estimate": found.peak - base,
        "parts": found.state | found.passing | {"activations": found.activations},
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _most_handed_out(record: torch.profiler.profile) -> int:
    """Most bytes that torch's allocator had handed out at a time while it was recorded.

    Told by address: what a thread of gloo gives back is not in the record, and shows where its address is handed out again.
    """
    events, open_ones = [], list(record.profiler.kineto_results.experimental_event_tree())
    while open_ones:
        event = open_ones.pop()
        open_ones += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    held, most, handed_out = 0, 0, {}
    for _, address, size in sorted(events):
        held += max(size, 0) - handed_out.pop(address, 0)
        if size > 0:
            handed_out[address] = size
        most = max(most, held)
    return most


if __name__ == "__main__":
    main(tyro.cli(EstimateArgs, use_underscores=True))
