"""Does torch.compile pay? The backbone as it is and compiled, forward and backward, side by side in each layout.

    python -m benchmarks.compiling                       # 6 layers x 384, float32, on a CPU; needs a C++ compiler
    python -m benchmarks.compiling --shape 1B            # a GPU, bfloat16

Decoder layers are compiled one by one with dynamic lengths (one compilation serves all of them), but for the last one,
whose hooks pick rows; attention stays as it is, since what it does differs from row to row. On a GPU both sides have
Liger's kernels; on a CPU the compiler gets transformers' own norms and rotary embeddings to fuse, the other side has ours.
A round takes every step once with each side, in turn; printed are medians with their range, what compiling took, and how
far rewards are apart.
"""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

os.environ.setdefault("DS_ACCELERATOR", "cuda" if shutil.which("nvidia-smi") else "cpu")

import torch
import transformers

from benchmarks import workloads
from benchmarks.throughput import machine, spread
from open_rm import attention, losses, model, steps, tokenization
from open_rm.data import PreferenceData, load_preference_data

MAX_TOKEN_LENGTH = 1024


@dataclass(frozen=True)
class CompilingArgs:
    """Measure torch.compile of the backbone."""

    shape: str = "6x384"
    """A name of workloads.SHAPES."""
    data: str = "../shared/data/hh_harmless"
    """Folder with train.jsonl."""
    pairs: int = 160
    """Pairs of it."""
    pairs_per_step: int = 8
    """Pairs of a step."""
    rounds: int = 3
    """Times each side takes every step."""


def main(args: CompilingArgs) -> None:
    """Print a line for each layout."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"machine: {machine()}; {args.shape}, {Path(args.data).name}, {args.pairs_per_step} pairs a step", flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="open_rm_compiling_"))
    try:
        load = workloads.real(Path(args.data), args.pairs, seed=1, by_prompt=False)
        workloads.write_model(scratch / "model", workloads.SHAPES[args.shape], workloads.make_tokenizer([load]))
        tokenizer = tokenization.load_tokenizer(str(scratch / "model"))
        data = load_preference_data(
            [str(workloads.write_rows(scratch, load)), "1.0"],
            ["train"],
            flag="dataset_mixer_list",
            tokenizer=tokenizer,
            max_token_length=MAX_TOKEN_LENGTH,
            max_prompt_token_length=MAX_TOKEN_LENGTH,
            cache_dir=str(scratch / "cache"),
            seed=1,
        )
        for layout in steps.LAYOUTS:
            compare(args, layout, data, scratch / "model", tokenizer, device)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compare(
    args: CompilingArgs, layout: str, data: PreferenceData, folder: Path, tokenizer, device: torch.device
) -> None:
    """One layout: compile, check, race."""
    plain = make(folder, tokenizer, layout, device, kernels=True)
    compiled = make(folder, tokenizer, layout, device, kernels=device.type == "cuda")
    how = {"layout": layout, "data": data, "pad_token_id": tokenizer.pad_token_id, "device": device}
    if layout != "padded":
        transformers.AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.segment_attention))
    for layer in compiled.classifier.model.layers[:-1]:
        layer.compile(dynamic=True)
    drawn = list(steps.draw_steps(len(data), args.pairs_per_step, len(data), seed=1))
    run(plain, drawn[:2], **how)
    compiling, _ = run(compiled, drawn[:2], **how)
    times, apart = {"plain": [], "compiled": []}, 0.0
    for _ in range(args.rounds):
        seconds, rewards = run(plain, drawn[2:], **how)
        times["plain"].append(seconds)
        seconds, others = run(compiled, drawn[2:], **how)
        times["compiled"].append(seconds)
        apart = max(apart, (rewards - others).abs().max().item())
    ratios = [a / b for a, b in zip(times["plain"], times["compiled"], strict=True)]
    each = {name: statistics.median(values) / (len(drawn) - 2) for name, values in times.items()}
    print(
        f"{layout}: {each['plain']:.3f} s a step plain, {each['compiled']:.3f} compiled: {spread(ratios)}x; the first two "
        f"steps took {compiling:.0f} s; rewards apart by at most {apart:.1e}",
        flush=True,
    )


def make(folder: Path, tokenizer, layout: str, device: torch.device, *, kernels: bool) -> model.RewardModel:
    """The model as the recipe makes it."""
    made, _ = model.load_reward_model(
        str(folder),
        revision=None,
        tokenizer=tokenizer,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        attn_implementation=None,
        layout=layout,
        gradient_checkpointing=False,
        seed=1,
        deepspeed_config={"zero_optimization": {"stage": 0}},
    )
    if kernels:
        model.apply_fused_kernels(made, device)
    return made.to(device)


def run(
    reward_model, drawn: list[np.ndarray], *, layout: str, data: PreferenceData, pad_token_id: int, device: torch.device
) -> tuple[float, torch.Tensor]:
    """(seconds, rewards) of forward and backward of the steps."""
    budget = steps.micro_batch_budget(len(drawn[0]), MAX_TOKEN_LENGTH, on_gpu=device.type == "cuda")
    found, started = [], time.perf_counter()
    for indices in drawn:
        plan = steps.plan_step(indices, data.table, layout=layout, world_size=1, max_tokens=budget)
        for _, batch in data.batches(plan.ranks[0], layout, pad_token_id):
            rewards = reward_model(**batch.inputs(device))
            losses.ranking_loss(*rewards.chunk(2)).sum().backward()
            found.append(rewards.detach())
        reward_model.zero_grad()
    return time.perf_counter() - started, torch.cat(found).cpu()  # to the CPU: waits for the GPU


if __name__ == "__main__":
    main(tyro.cli(CompilingArgs, use_underscores=True))
