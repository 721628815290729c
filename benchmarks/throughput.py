"""Training throughput: our three layouts and TRL's RewardTrainer, side by side on the same model and pairs.

    python -m benchmarks.throughput --profile cpu      # 6 layers x 384, float32, 8 pairs a step
    python -m benchmarks.throughput --profile gpu      # 1B and 8B shapes, bfloat16: gpu_profile.py

On the CPU every round runs each contestant once, in turn, in a process of its own; ratios are taken within a round, so a
machine whose speed drifts slows both sides alike. Prints medians with their spread, writes results.json and a picture.
See benchmarks/README.md for how to read it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
# read when deepspeed is imported
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import matplotlib.pyplot as plt

from benchmarks import gpu_profile, gpu_report, planning, workloads
from benchmarks.card import name as machine
from open_rm.batching.dealing import deal_step, pair_costs
from open_rm.batching.rules import BatchRules
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError

HERE = Path(__file__).parent
SHAPE = "6x384"  # of the CPU profile
CONTESTANTS = {
    "TRL": {"trainer": "trl", "sampling": "random"},
    "TRL group_by_length": {"trainer": "trl", "sampling": "group_by_length"},
    "padded": {"trainer": "ours", "layout": "padded"},
    "packed": {"trainer": "ours", "layout": "packed"},
    "shared_prefix": {"trainer": "ours", "layout": "shared_prefix"},
}


@dataclass(frozen=True)
class BenchmarkArgs:
    """Measure training throughput against TRL."""

    profile: Literal["cpu", "gpu"] = "cpu"
    """cpu: a 6 x 384 Llama in float32. gpu: 1B and 8B shapes in bfloat16, with and without recomputed activations."""
    data: str = "../shared/data"
    """Folder that holds hh_harmless/ and alpaca_eval/ with train.jsonl; workloads without data are left out."""
    rounds: int = 3
    """Times each contestant runs (cpu)."""
    hh_pairs: int = 160
    """Pairs of hh_harmless."""
    alpaca_pairs: int = 96
    """Pairs of alpaca_eval, whole prompts."""
    only: tuple[str, ...] = ()
    """Workloads to run. Empty: all of the profile."""
    output: str = "output/benchmark"
    """Folder for results.json and throughput.png; of the GPU profile also results.jsonl and logs/."""
    smoke: bool = False
    """With --profile gpu: every contestant and setting in small, on any device. No measurement."""
    trace: bool = False
    """With --profile gpu: one step of shared_prefix at 1B under torch.profiler instead."""
    minutes: float | None = None
    """Of the GPU profile: what it may take; the rest is left out by name. None: 8, in a smoke run an hour."""
    contestant_minutes: float | None = None
    """Of the GPU profile: what one contestant of one shape may take. None: 1.5, in a smoke run 20."""
    contestants: tuple[str, ...] = ()
    """Of the GPU profile: contestants to run, by their names in contestants.py. Empty: all."""
    report: str | None = None
    """Run nothing: draw again from the results.jsonl of this folder, e.g. after a kill."""


def main(args: BenchmarkArgs) -> int:
    """Run the profile, print and draw; returns the exit status."""
    if args.report is not None:
        gpu_report.report(Path(args.report))
        return 0
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.profile == "gpu":
        return gpu_profile.run(args, output)
    recorded(lambda scratch: run_profile(args, scratch), output, draw, "throughput.png")
    return 0


def recorded(measure: Callable[[Path], list[dict]], output: Path, draw: Callable, picture: str) -> list[dict]:
    """What measure(a folder that is deleted behind it) gives: in results.json, drawn, and returned."""
    output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="open_rm_benchmark_"))
    try:
        results = measure(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    (output / "results.json").write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    if results:
        draw(results, output / picture)
        print(f"results in {output}/results.json, picture in {output / picture}")
    return results


def run_profile(args: BenchmarkArgs, scratch: Path) -> list[dict]:
    print(f"machine: {machine()}", flush=True)
    loads = make_workloads(args)
    tokenizer = workloads.make_tokenizer(loads)
    print_planning(args, tokenizer, scratch)
    model = scratch / SHAPE
    workloads.write_model(model, workloads.SHAPES[SHAPE], tokenizer)
    results = []
    for load in loads:
        data = workloads.write_rows(scratch, load)
        common = {
            "model": str(model),
            "data": str(data),
            "dtype": "float32",
            "batch": 8,
            "accumulation": 1,
            "max_token_length": 1024,
            "group_by_prompt": load.by_prompt,
        }
        rounds = race(common, args.rounds, scratch, CONTESTANTS)
        results.append({"title": f"{load.name}, {SHAPE}, float32", "rounds": rounds})
        report(results[-1])
    return results


def make_workloads(args: BenchmarkArgs) -> list[workloads.Workload]:
    loads = [*real_workloads(args), workloads.equal_lengths(64, seed=1)]
    return [load for load in loads if not args.only or load.name in args.only]


def real_workloads(args) -> list[workloads.Workload]:
    """Of real data, as far as it is there. args: with data, hh_pairs and alpaca_pairs."""
    folder, loads = Path(args.data), []
    for name, pairs, by_prompt in (("hh_harmless", args.hh_pairs, False), ("alpaca_eval", args.alpaca_pairs, True)):
        if (folder / name / "train.jsonl").is_file():
            loads.append(workloads.real(folder / name, pairs, seed=1, by_prompt=by_prompt))
        else:
            print(f"{folder / name} is not there: left out")
    return loads


def race(common: dict, rounds: int, scratch: Path, contestants: dict[str, dict]) -> list[dict[str, dict]]:
    """Every contestant once a round, in turn; the order is reversed every other round."""
    results = []
    for number in range(rounds):
        names = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        times = {}
        for name in names:
            started = time.perf_counter()
            times[name] = run_contestant(common | contestants[name], scratch)
            figures = (
                f"{times[name]['pairs_per_second']:.2f} pairs/s" if "error" not in times[name] else times[name]["error"]
            )
            print(f"  round {number + 1}, {name}: {figures} ({time.perf_counter() - started:.0f} s)", flush=True)
        results.append(times)
    return results


def run_contestant(settings: dict, scratch: Path) -> dict:
    own = Path(tempfile.mkdtemp(dir=scratch))
    (own / "settings.json").write_text(json.dumps(settings | {"scratch": str(own)}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "contestant.py"), str(own / "settings.json")],
        env=environment,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(own, ignore_errors=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}


def figures(result: dict, name: str, key: str) -> list[float]:
    return [times[name][key] for times in result["rounds"] if key in times[name]]


def ratios(result: dict, name: str, peer: str) -> list[float]:
    """pairs/s of one over the other, within each round."""
    pairs = [(times[name], times[peer]) for times in result["rounds"]]
    return [a["pairs_per_second"] / b["pairs_per_second"] for a, b in pairs if "error" not in a and "error" not in b]


def report(result: dict) -> None:
    print(f"\n{result['title']}\n")
    print("| trainer | pairs/s | tokens/s | peak GiB | over TRL | over TRL group_by_length | over our padded |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in CONTESTANTS:
        speeds = figures(result, name, "pairs_per_second")
        if not speeds:
            print(f"| {name} | failed: {result['rounds'][0][name].get('error')} |")
            continue
        columns = [
            spread(speeds),
            f"{statistics.median(figures(result, name, 'tokens_per_second')):.0f}",
            f"{statistics.median(figures(result, name, 'peak_gib')):.2f}",
            *(spread(ratios(result, name, peer)) for peer in ("TRL", "TRL group_by_length", "padded")),
        ]
        print(f"| {name} | {' | '.join(columns)} |")
    shared = [times["shared_prefix"] for times in result["rounds"] if "mfu" in times["shared_prefix"]]
    if shared:
        parts = {key: statistics.median(row[key] for row in shared) for key in ("mfu", "data_share", "distinct")}
        print(
            f"\nshared_prefix: {parts['distinct']:.2f} of the tokens are distinct, mfu {parts['mfu']:.2f} of the measured "
            f"matrix-product rate, waiting for data {parts['data_share']:.2%}\n",
            flush=True,
        )


def spread(values: list[float]) -> str:
    """Median, and the range of the rounds."""
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def print_planning(args: BenchmarkArgs, tokenizer, scratch: Path) -> None:
    """How evenly the planner deals steps to 64 ranks, on the complete real sets, and what planning costs.

    No deal of whole pairs can be more even than the heaviest pair allows; that bound is printed beside it.
    """
    tokenizer.save_pretrained(scratch / "tokenizer")
    loaded = load_tokenizer(str(scratch / "tokenizer"))
    area_cost = planning.area_cost()
    print("planning for 64 ranks; imbalance = max over mean cost of the ranks, pairs drawn without grouping:")
    for name in ("hh_harmless", "alpaca_eval"):
        file = Path(args.data) / name / "train.jsonl"
        if not file.is_file():
            continue
        data = workloads.read_pairs(file, loaded, scratch / "cache", max_token_length=1024)
        for layout, pairs in (("packed", 256), ("shared_prefix", 256), ("shared_prefix", 64 * 256)):
            figures = [plan_once(data, layout, pairs, area_cost, seed) for seed in range(10 if pairs == 256 else 2)]
            planned, bound, at_random, seconds = zip(*figures, strict=True)
            print(
                f"  {name}, {layout}, {pairs} pairs a step: {spread(planned)}, the heaviest pair allows {spread(bound)}, "
                f"dealt at random {spread(at_random)}; {1e3 * statistics.median(seconds):.0f} ms a step",
                flush=True,
            )


def plan_once(data, layout: str, pairs: int, area_cost: float, seed: int) -> tuple[float, float, float, float]:
    """(imbalance planned, the least that whole pairs allow, imbalance at random, seconds) of one step for 64 ranks."""
    rng = np.random.default_rng(seed)
    indices = planning.draw(len(data), pairs, rng)
    rules = BatchRules(layout, 0, max_tokens=16384, evaluation_tokens=16384, area_cost=area_cost)
    started = time.perf_counter()
    deal = deal_step(indices, data.table, rules, world_size=64)
    seconds = time.perf_counter() - started
    costs = pair_costs(indices, data.table, layout, area_cost)
    at_random = [share.sum() for share in np.array_split(rng.permutation(costs), 64)]
    return deal.imbalance, max(1.0, costs.max() / costs.sum() * 64), max(at_random) / costs.sum() * 64, seconds


def draw(results: list[dict], path: Path) -> None:
    """Bars of pairs/s relative to TRL, one group per workload; the lines are the range of the rounds."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), constrained_layout=True, squeeze=False)
    colours = ("silver", "grey", "tab:blue", "tab:cyan", "tab:green")
    for axis, result in zip(axes[0], results, strict=True):
        for x, (name, colour) in enumerate(zip(CONTESTANTS, colours, strict=True)):
            values = ratios(result, name, "TRL")
            if not values:
                continue
            middle = statistics.median(values)
            axis.bar(x, middle, color=colour)
            axis.plot([x, x], [min(values), max(values)], color="black")
            axis.text(x, max(values), f"{middle:.2f}x", ha="center", va="bottom")
        axis.set_xticks(range(len(CONTESTANTS)), [name.replace(" ", "\n") for name in CONTESTANTS], fontsize=8)
        axis.set_title(result["title"], fontsize=9)
        axis.set_ylabel("pairs/s over TRL")
        axis.margins(y=0.15)
    figure.suptitle(machine())
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(BenchmarkArgs, use_underscores=True)))
    except UserError as error:
        sys.exit(f"error: {error}")
