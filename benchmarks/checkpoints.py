"""Checkpoints: how long training waits for one, and what they cost a run; ours beside blocking ones, side by side.

    python -m benchmarks.checkpoints                       # 51M parameters: about 600 MB of weights and moments

Two measurements on one process and one random Llama. How to read the tables:

- The first one saves the same engine in turn as we do (reliability/keeper.py: a copy in host memory, which a thread writes,
  syncs, hashes and commits), with torch.save and fsync of the same tensors, and with DeepSpeed's own save_checkpoint, which
  does not sync. "waits": seconds until the training loop goes on. "on the disk": until nothing can be lost any more; for
  DeepSpeed, until it returns. MB are those of all files.
- "held up": the longest that the main thread could not run while our thread wrote, as it would where a library kept Python's
  lock. A wait that no figure of the recipe shows, so it is counted with ours in the ratio.
- ratio: theirs over ours within a round, so that a machine whose speed drifts slows both alike; the order turns each round.
  A round before the first warms up all of them; our wait in it, which takes the memory, is printed above the table.
- The second one runs the recipe as a process with --checkpointing_steps and without checkpoints. The clock runs from the
  step after the first checkpoint to the step after the last, whole periods, and takes `hours` of metrics.jsonl, so that
  waits count; "all steps" begins with the end of the first step, and with it the first checkpoint. "a step" is the mean of
  what the record says of it, without waits: where its ratio is above 1, the thread that writes slows the steps down.
  Checkpoints follow each other within seconds here: what a run loses goes down as they become rarer. The runs of a round
  are half a minute apart, so on a machine that others use the ratio needs many rounds; the share of waits does not.
- Files land in --folder: name one on the disk that is meant, since a file system in memory syncs for nothing.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import tyro

from benchmarks import workloads
from benchmarks.preparation import spread
from benchmarks.throughput import machine
from open_rm import toy
from open_rm.batching.layouts import lay_out
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import BatchFlags, CheckpointFlags, ModelFlags, OptimizerFlags
from open_rm.model.loading import compute_dtype, load_reward_model
from open_rm.ranks import Ranks, joined_ranks
from open_rm.reliability import checkpoints
from open_rm.reliability.keeper import Keeper
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine
from open_rm.training.engine_state import trained_sizes
from open_rm.training.progress import Progress

REPOSITORY = Path(__file__).parent.parent
TICK = 0.001  # seconds that the main thread sleeps between two looks at the clock
NAMES = {"ours": "ours", "torch": "torch.save, fsync", "deepspeed": "DeepSpeed save_checkpoint, no fsync"}


@dataclass(frozen=True)
class CheckpointsArgs:
    """Measure what checkpoints cost."""

    layers: int = 9
    """Layers of the model."""
    width: int = 640
    """Its width; heads are of 64, the MLP is 2.8 times as wide, the vocabulary has 8192 tokens."""
    rounds: int = 5
    """Times that each side saves."""
    recipe_rounds: int = 5
    """Times that the recipe runs with checkpoints, and without. 0: leave it out."""
    checkpointing_steps: int = 5
    """Steps from one checkpoint to the next."""
    checkpoints_per_run: int = 4
    """Checkpoints before the last step."""
    pairs_per_step: int = 4
    """Pairs of a step, of the embedded preference set."""
    deepspeed: str | None = None
    """DeepSpeed file, as the recipe takes it. None: ZeRO stage 0."""
    folder: str | None = None
    """Where checkpoints are written and removed again. None: the system's folder for temporary files."""
    output: str = "output/benchmark"
    """Folder for checkpoints.json."""

    @property
    def steps(self) -> int:
        """Of a run of the recipe: the last one follows the last checkpoint."""
        return self.checkpointing_steps * self.checkpoints_per_run + 1


def main(args: CheckpointsArgs) -> None:
    """Make model and data, measure, print, write."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    scratch = Path(tempfile.mkdtemp(prefix="open_rm_checkpoints_", dir=args.folder))
    print(f"machine: {machine()}, {torch.get_num_threads()} threads; files in {scratch.parent}", flush=True)
    try:
        load = workloads.Workload("toy", toy.make_pairs(args.pairs_per_step * args.steps, seed=1), False)
        shape = workloads.Shape(args.layers, args.width, args.width // 64, args.width // 64, args.width * 14 // 5)
        workloads.write_model(scratch / "model", shape, workloads.make_tokenizer([load]))
        data = workloads.write_rows(scratch, load)
        saves = measure_saves(args, scratch)
        report_saves(saves)
        runs = race(args, scratch, data)
        if runs:
            report_runs(args, runs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    written = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "args": asdict(args),
        "saves": saves,
        "runs": runs,
    }
    (output / "checkpoints.json").write_text(json.dumps(written, indent=2) + "\n")
    print(f"\nresults in {output}/checkpoints.json")


# ---- the wait


def measure_saves(args: CheckpointsArgs, scratch: Path) -> list[dict]:
    """Every side saves once a round, in turn; the first round, which warms up, is in it."""
    with joined_ranks() as ranks:
        engine = make_engine(args, scratch / "model", ranks)
        size = sum(trained_sizes(engine.module).values())
        print(f"{size / 1e6:.1f}M parameters, ZeRO stage {engine.stage}, {ranks.device.type}\n", flush=True)
        ours = Ours(engine, ranks, scratch / "ours")
        sides = {
            "ours": ours.save,
            "torch": lambda: save_with_torch(engine, scratch / "torch"),
            "deepspeed": lambda: save_with_deepspeed(engine, scratch / "deepspeed"),
        }
        rounds = []
        for number in range(args.rounds + 1):
            names = list(sides) if number % 2 == 0 else list(reversed(sides))
            results = {}
            for name in names:
                results[name] = sides[name]()
                if name != "ours":
                    shutil.rmtree(scratch / name)
            print(f"  round {number}: " + ", ".join(f"{n} {results[n]['waits']:.2f} s" for n in sides), flush=True)
            rounds.append(results)
    return rounds


def make_engine(args: CheckpointsArgs, model: Path, ranks: Ranks) -> Engine:
    """An engine as the recipe makes it, after one step, which makes the moments."""
    dtype = compute_dtype("auto", ranks.device)
    flags = BatchFlags(deepspeed=args.deepspeed)
    config = fill_config(flags, width=args.width, bf16=dtype == torch.bfloat16, max_grad_norm=1.0)
    tokenizer = load_tokenizer(str(model))
    how = {"dtype": dtype, "deepspeed_config": config}
    reward_model, _ = load_reward_model(ModelFlags(model_name_or_path=str(model)), tokenizer, **how)
    engine = Engine(reward_model, OptimizerFlags(), config, ranks)
    batch = lay_out("padded", [(range(8), range(9))], pad_token_id=tokenizer.pad_token_id, prompt_ids=[0])
    engine.backward(engine(**batch.inputs(ranks.device)).sum(), last=True)
    engine.step()
    return engine


class Ours:
    """A keeper as the recipe has it, of a run that is nothing but checkpoints; the last one is kept."""

    def __init__(self, engine: Engine, ranks: Ranks, folder: Path):
        flags = CheckpointFlags(checkpointing_steps=1, keep_last_n_checkpoints=1)
        self._said: list[str] = []  # a keeper speaks where a checkpoint could not be written
        self._keeper = Keeper(flags, ranks, str(folder), {}, say=self._said.append, holds=lambda: True)
        self._engine, self._folder, self._progress = engine, folder, Progress(pairs=1, total_steps=1)

    def save(self) -> dict[str, float]:
        """Save, wait until it is committed."""
        keeper, self._progress.step = self._keeper, self._progress.step + 1
        step, held = self._progress.step, 0.0
        started = time.perf_counter()
        keeper.save(self._engine, self._progress, dict)
        waits = time.perf_counter() - started
        last = time.perf_counter()
        while keeper.committed_step != step and not self._said:
            time.sleep(TICK)
            now = time.perf_counter()
            held, last = max(held, now - last - TICK), now
        ends = time.perf_counter()
        if self._said:
            sys.exit(self._said[0])
        keeper.save(self._engine, self._progress, dict, wait=True)  # for the thread, which removes the one before
        written = checkpoints.size_of(checkpoints.folder_of(str(self._folder)) / checkpoints.name_of(step))
        return {"waits": waits, "held": held, "on_disk": ends - started, "bytes": written}


def save_with_torch(engine: Engine, folder: Path) -> dict[str, float]:
    """What a loop without a thread would do with the same tensors."""
    folder.mkdir()
    started = time.perf_counter()
    state = {flat.key: {"weights": flat.weights, **flat.state} for flat in engine.flats()}
    torch.save(state, folder / "state.pt")
    with (folder / "state.pt").open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    return {"waits": seconds, "on_disk": seconds, "bytes": checkpoints.size_of(folder)}


def save_with_deepspeed(engine: Engine, folder: Path) -> dict[str, float]:
    """DeepSpeed's own, as it comes."""
    started = time.perf_counter()
    engine._engine.save_checkpoint(str(folder), tag="step")
    seconds = time.perf_counter() - started
    return {"waits": seconds, "on_disk": seconds, "bytes": checkpoints.size_of(folder / "step")}


def report_saves(rounds: list[dict]) -> None:
    first, rounds = rounds[0], rounds[1:]
    print(f"\nour first wait, which takes the memory of the copy: {first['ours']['waits']:.2f} s\n")
    print("| checkpoint | waits, s | held up, s | on the disk, s | ratio of waits, over ours | MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, title in NAMES.items():
        results = [results[name] for results in rounds]
        held = spread([result["held"] for result in results], 3) if name == "ours" else "-"
        ratios = [own[name]["waits"] / (own["ours"]["waits"] + own["ours"]["held"]) for own in rounds]
        columns = [
            spread([result["waits"] for result in results], 3),
            held,
            spread([result["on_disk"] for result in results], 2),
            spread(ratios, 1) if name != "ours" else "-",
            f"{results[0]['bytes'] / 1e6:.0f}",
        ]
        print(f"| {title} | {' | '.join(columns)} |", flush=True)


# ---- the run


def race(args: CheckpointsArgs, scratch: Path, data: Path) -> list[dict]:
    """The recipe with and without checkpoints, once a round, in turn."""
    rounds = []
    sides = {
        "with": ["--checkpointing_steps", str(args.checkpointing_steps)],
        "without": ["--checkpointing_minutes", "0"],
    }
    for number in range(args.recipe_rounds):
        results = {}
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            started = time.perf_counter()
            results[name] = run_recipe(args, scratch, data, sides[name])
            took = time.perf_counter() - started
            print(f"  round {number + 1}, {name}: {results[name]['speed']:.3f} steps/s ({took:.0f} s)", flush=True)
        rounds.append(results)
    return rounds


def run_recipe(args: CheckpointsArgs, scratch: Path, data: Path, flags: list[str]) -> dict[str, float]:
    """One run in a process of its own: steps a second, and what its record says of steps and waits."""
    output = scratch / "out"
    flags = flags + ["--model_name_or_path", str(scratch / "model"), "--dataset_mixer_list", str(data), "1.0"]
    flags += ["--dataset_local_cache_dir", str(scratch / "cache"), "--output_dir", str(output)]
    flags += ["--per_device_train_batch_size", str(args.pairs_per_step), "--gradient_accumulation_steps", "1"]
    flags += ["--total_episodes", str(args.pairs_per_step * args.steps), "--num_evals", "0"]
    flags += ["--deepspeed", args.deepspeed] if args.deepspeed else []
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "open_rm.reward_modeling", *flags]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the recipe failed:\n{done.stderr[-3000:]}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "perf/step_seconds" in row]
    saved = [line for line in done.stdout.splitlines() if line.startswith("no checkpoint at step")]
    shutil.rmtree(output)
    if saved or len(rows) != args.steps:
        sys.exit(f"{len(rows)} steps of {args.steps}: {saved}")
    begins = args.checkpointing_steps  # row of the step after the first checkpoint

    def speed(start: int) -> float:
        return (len(rows) - 1 - start) / (3600 * (rows[-1]["hours"] - rows[start]["hours"]))

    timed = rows[begins + 1 :]
    waits = [row.get("perf/checkpoint_stall_seconds", 0.0) for row in timed]  # of a checkpoint: in the next step's row
    return {
        "speed": speed(begins),
        "speed_all": speed(0),
        "step_seconds": statistics.mean(row["perf/step_seconds"] for row in timed),
        "waits": sum(waits) / (args.checkpoints_per_run - 1),
        "share": 100 * sum(waits) / (3600 * (rows[-1]["hours"] - rows[begins]["hours"])),
        "write_seconds": max(row.get("perf/checkpoint_write_seconds", 0.0) for row in timed),
    }


def report_runs(args: CheckpointsArgs, rounds: list[dict]) -> None:
    sides = {name: [results[name] for results in rounds] for name in ("with", "without")}
    titles = {"with": f"a checkpoint every {args.checkpointing_steps} steps", "without": "no checkpoints"}
    print(
        "\n| run | steps/s | all steps, steps/s | a step, s | waits, s a checkpoint | waits, % of the time | longest write, s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, results in sides.items():
        columns = [spread([result[key] for result in results], 3) for key in results[0]]
        print(f"| {titles[name]} | {' | '.join(columns)} |")
    for key, title in (("speed", "steps/s"), ("speed_all", "all steps"), ("step_seconds", "seconds of a step")):
        ratios = [own[key] / other[key] for own, other in zip(sides["with"], sides["without"], strict=True)]
        print(f"ratio, with over without, {title}: {spread(ratios, 3)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(CheckpointsArgs, use_underscores=True))
