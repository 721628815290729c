"""Does torch.compile pay? The backbone as it is and compiled, forward and backward, side by side in each layout.

    python -m benchmarks.compiling                       # 6 layers x 384, float32, on a CPU; needs a C++ compiler
    python -m benchmarks.compiling --shape 1B            # a GPU, bfloat16

Decoder layers are compiled one by one with dynamic lengths (one compilation serves all of them), but for the last one,
whose hooks pick rows; attention stays as it is, since what it does differs from row to row. On a GPU both sides have
Liger's kernels; on a CPU the compiler gets transformers' own norms and rotary embeddings to fuse, the other side has ours.
A round takes every step once with each side, in turn; printed are medians with their range, what compiling took, and how
far rewards are apart.
"""

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro

from benchmarks import card, workloads
from benchmarks.throughput import spread
from open_rm.batching import attention, feeding
from open_rm.batching.dealing import deal_step, micro_batch_budget
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.batching.steps import draw_steps
from open_rm.data.pairs import PreferenceData
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import ModelFlags
from open_rm.model.kernels import apply_fused_kernels
from open_rm.model.loading import load_reward_model
from open_rm.model.reward_model import RewardModel
from open_rm.training.losses import ranking_loss

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
    print(
        f"machine: {card.name()}; {args.shape}, {Path(args.data).name}, {args.pairs_per_step} pairs a step", flush=True
    )
    scratch = Path(tempfile.mkdtemp(prefix="open_rm_compiling_"))
    try:
        load = workloads.real(Path(args.data), args.pairs, seed=1, by_prompt=False)
        workloads.write_model(scratch / "model", workloads.SHAPES[args.shape], workloads.make_tokenizer([load]))
        tokenizer = load_tokenizer(str(scratch / "model"))
        file = workloads.write_rows(scratch, load)
        data = workloads.read_pairs(file, tokenizer, scratch / "cache", max_token_length=MAX_TOKEN_LENGTH)
        for layout in LAYOUTS:
            compare(args, layout, data, scratch / "model", tokenizer, device)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compare(
    args: CompilingArgs, layout: str, data: PreferenceData, folder: Path, tokenizer, device: torch.device
) -> None:
    """One layout: compile, check, race."""
    plain = make(folder, tokenizer, layout, device, kernels=True)
    compiled = make(folder, tokenizer, layout, device, kernels=device.type == "cuda")
    budget = micro_batch_budget(args.pairs_per_step, MAX_TOKEN_LENGTH, on_gpu=device.type == "cuda")
    rules = BatchRules(layout, tokenizer.pad_token_id, max_tokens=budget, evaluation_tokens=budget)
    how = {"data": data, "rules": rules, "device": device}
    if layout != "padded":
        transformers.AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.segment_attention))
    for layer in compiled.classifier.model.layers[:-1]:
        layer.compile(dynamic=True)
    drawn = list(draw_steps(len(data), args.pairs_per_step, len(data), seed=1))
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


def make(folder: Path, tokenizer, layout: str, device: torch.device, *, kernels: bool) -> RewardModel:
    """The model as the recipe makes it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made, _ = load_reward_model(ModelFlags(model_name_or_path=str(folder)), tokenizer, layout=layout, dtype=dtype)
    if kernels:
        apply_fused_kernels(made, device)
    return made.to(device)


def run(
    reward_model: RewardModel, drawn: list[np.ndarray], *, data: PreferenceData, rules: BatchRules, device: torch.device
) -> tuple[float, torch.Tensor]:
    """(seconds, rewards) of forward and backward of the steps."""
    found, started = [], time.perf_counter()
    for indices in drawn:
        [parts] = deal_step(indices, data.table, rules, world_size=1).ranks
        for micro in feeding.micro_batches(parts, data, rules):
            rewards = reward_model(**micro.batch.inputs(device))
            chosen, rejected, _ = micro.sides(rewards)
            ranking_loss(chosen, rejected).sum().backward()
            found.append(rewards.detach())
        reward_model.zero_grad()
    return time.perf_counter() - started, torch.cat(found).cpu()  # to the CPU: waits for the GPU


if __name__ == "__main__":
    main(tyro.cli(CompilingArgs, use_underscores=True))
