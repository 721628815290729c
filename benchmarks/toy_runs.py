"""The recipe end to end on the toy: every layout under every ZeRO stage, against one run on the CPU in float32.

    python -m benchmarks.toy_runs --output output/toy_runs          # some on a GPU at a time; without one, all on the CPU

Each run is a process as a user starts it: data, training, evaluation, saving, reload check. A run is right if it ends with
status 0, if its losses are those of the reference step by step within TOLERANCE, and if its log has the line of the reload check.
Prints a line a run and writes them to toy_runs.json; the status is 0 where all are right.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from open_rm import toy
from open_rm.batching.rules import LAYOUTS

REPOSITORY = Path(__file__).parent.parent
TOLERANCE = 3e-2  # of a loss: bfloat16 against float32 over a few steps
STAGES = (0, 2, 3)


@dataclass(frozen=True)
class ToyRunsArgs:
    """Run the recipe on the toy in all layouts and ZeRO stages."""

    output: str = "output/toy_runs"
    """Folder for the runs, their logs and toy_runs.json."""
    at_once: int = 3
    """Runs side by side."""
    pairs: int = 80
    """Pairs of a run, 8 a step."""
    seconds: float = 100.0
    """After which a run is ended."""


def main(args: ToyRunsArgs) -> int:
    """All runs; returns the exit status."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "toy" / "data").is_dir():
        toy.main(toy.ToyArgs(folder=str(folder / "toy"), train_pairs=2 * args.pairs, test_pairs=40, seed=3))
    reference = run(args, folder, "padded", 0, on_cpu=True)
    report(reference, folder)
    wanted = [(layout, stage) for stage in STAGES for layout in LAYOUTS]
    results = [reference]
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        futures = [pool.submit(run, args, folder, layout, stage) for layout, stage in wanted]
        for future in concurrent.futures.as_completed(futures):
            results.append(judged(future.result(), reference))
            report(results[-1], folder)
            (folder / "toy_runs.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    wrong = [result["name"] for result in results if result["why"]]
    print(f"{len(results) - len(wrong)} of {len(results)} runs are right{': not ' * bool(wrong)}{', '.join(wrong)}")
    return 1 if wrong else 0


def run(args: ToyRunsArgs, folder: Path, layout: str, stage: int, *, on_cpu: bool = False) -> dict:
    """One run: its name, why it failed (None), seconds, losses of its steps, its line of the reload check."""
    name = "cpu_float32" if on_cpu else f"{layout}_zero{stage}"
    flags = {
        "model_name_or_path": folder / "toy" / "model",
        "dataset_mixer_list": [folder / "toy" / "data", "1.0"],
        "dataset_mixer_eval_list": [folder / "toy" / "data", "1.0"],
        "dataset_local_cache_dir": folder / "cache",
        "output_dir": folder / name,
        "resume_from_checkpoint": "never",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": "1e-4",
        "total_episodes": args.pairs,
        "num_sample_pairs": 0,
        "batching": layout,
        "deepspeed": REPOSITORY / "configs" / "ds" / f"zero{stage}.json",
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", *_words(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.pop("DS_ACCELERATOR", None)  # the recipe asks torch
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log, began = folder / f"{name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "open_rm.reward_modeling", *words]
        try:
            status = subprocess.run(
                command, env=environment, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, timeout=args.seconds
            ).returncode
            why = f"ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            why = f"ended after {args.seconds:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reload = next((line for line in lines if "reload check" in line), None)
    if why is None and reload is None:
        why = "its log has no line of the reload check"
    seconds = time.monotonic() - began
    return {"name": name, "why": why, "seconds": seconds, "losses": losses_of(folder / name), "reload": reload}


def _words(value) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def losses_of(run_folder: Path) -> list[float]:
    """Of each step that a run has recorded."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["train/rm/loss"] for row in rows if "train/rm/loss" in row]


def judged(result: dict, reference: dict) -> dict:
    """With how far its losses are from the reference's, and whether that is too far."""
    ours, theirs = result["losses"], reference["losses"]
    if result["why"]:
        return result | {"apart": None}
    if not theirs or len(ours) != len(theirs):
        return result | {"apart": None, "why": f"{len(ours)} losses, and the reference has {len(theirs)}"}
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    if all(difference <= TOLERANCE for difference in differences):  # a NaN is not
        return result | {"apart": max(differences)}
    return result | {"apart": None, "why": f"its losses are {ours}, and in float32 on the CPU {theirs}"}


def report(result: dict, folder: Path) -> None:
    """One line."""
    apart = f", losses within {result['apart']:.1e}" if result.get("apart") is not None else ""
    what = f"WRONG: {result['why']}, see {folder / result['name']}.log" if result["why"] else "right"
    print(
        f"{result['name']}: {what}{apart} ({result['seconds']:.0f} s); {result['reload'] or 'no reload check'}",
        flush=True,
    )


if __name__ == "__main__":
    print("on a GPU" if torch.cuda.is_available() else "on the CPU: there is no GPU", flush=True)
    sys.exit(main(tyro.cli(ToyRunsArgs, use_underscores=True)))
