"""Preparing data: rows/s and peak memory from a file of messages to token ids, ours and TRL's own, side by side.

    python -m benchmarks.preparation --pairs 1000000 --peer_pairs 100000 --num_proc 1 --rounds 3

Both read the same jsonl file with the same tokenizer and chat template and drop sides beyond the same length: ours with
`load_preference_data`, TRL with `datasets.load_dataset("json")` and what RewardTrainer's constructor does with the result
(`_prepare_dataset`). Every run is a process of its own with empty caches. How to read the table:

- rows/s counts from the file to a data set that can be indexed, without imports and without loading the tokenizer; the
  median over the rounds, with the slowest and fastest in brackets. TRL's second line leaves load_dataset out, as if the
  file had been converted to Arrow before.
- ratio: ours over TRL within a round, so that a machine whose speed drifts slows both alike; the order turns each round.
- peak MiB is the resident memory of the process; of the largest of its children after the plus. Pages of memory-mapped
  Arrow files that happen to be in memory count as resident, on both sides, though the system may drop them at any time.
  The last line, with more rows and no peer, shows whether memory grows with the data; what importing alone takes is above
  the table.
- num_proc is the number of processes that tokenize, the same for both; 1 is in-process for both (TRL's default).
  TOKENIZERS_PARALLELISM is false, so that the tokenizer has one thread; ours with num_proc 1 overlaps it with reading and
  rendering in a second. With --tokenizer_threads ours, which encodes many texts in a call, spreads them over the cores, and
  TRL's, one text at a time, cannot.
- Whether both gave the same token ids is checked by a hash over all of them, outside the clock.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

# Nothing heavy is imported here: a child's peak memory begins with what its parent held when it was started.
REPOSITORY = Path(__file__).parent.parent
MAX_TOKEN_LENGTH = 512
TOKENIZER_ROWS = 2000


@dataclass(frozen=True)
class PreparationArgs:
    """Measure how fast preference data becomes token ids, and in how much memory, against TRL."""

    pairs: int = 1_000_000
    """Rows of the large file, which only we prepare, once."""
    peer_pairs: int = 100_000
    """Rows of the file that both prepare, once a round."""
    num_proc: int = 1
    """Processes that tokenize, on both sides."""
    rounds: int = 3
    """Times each side runs."""
    tokenizer_threads: bool = False
    """Let the tokenizer use threads inside a process."""
    folder: str | None = None
    """Where files and caches are written and removed again. None: the system's folder for temporary files."""
    output: str = "output/benchmark"
    """Folder for preparation.json."""


def main(args: PreparationArgs) -> None:
    """Make the files, run both in turn, print the table."""
    scratch = Path(tempfile.mkdtemp(prefix="open_rm_preparation_", dir=args.folder))
    try:
        files = {count: write_pairs(scratch / f"pairs_{count}.jsonl", count) for count in {args.peer_pairs, args.pairs}}
        settings = {"num_proc": args.num_proc, "threads": args.tokenizer_threads, "tokenizer": str(scratch / "model")}
        run_apart("write_tokenizer", settings | {"data": str(files[args.peer_pairs])}, scratch)
        rounds = []
        for number in range(args.rounds):
            names = ["ours", "trl"] if number % 2 == 0 else ["trl", "ours"]
            results = {}
            for name in names:
                results[name] = run_apart(name, settings | {"data": str(files[args.peer_pairs])}, scratch)
                print(f"  round {number + 1}, {name}: {describe(results[name], args.peer_pairs)}", flush=True)
            rounds.append(results)
        large = run_apart("ours", settings | {"data": str(files[args.pairs])}, scratch)
        print(f"  {args.pairs} rows, ours: {describe(large, args.pairs)}\n", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(args, rounds, large)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    written = {"num_proc": args.num_proc, "cores": os.cpu_count(), "rounds": rounds, "large": large}
    (output / "preparation.json").write_text(json.dumps(written, indent=2) + "\n")
    print(f"\nresults in {output}/preparation.json")


def write_pairs(path: Path, count: int, seed: int = 1) -> Path:
    """Rows of messages, of random words, 30 to 250 of them a pair; written one by one."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(3000)]

    def message(role: str, most: int) -> list[dict]:
        return [{"role": role, "content": " ".join(rng.choices(vocabulary, k=rng.randint(10, most)))}]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "prompt": message("user", 40),
                "chosen": message("assistant", 80),
                "rejected": message("assistant", 80),
            }
            file.write(json.dumps(row) + "\n")
    return path


def run_apart(name: str, settings: dict, scratch: Path) -> dict:
    """Run one of the functions below in a process of its own, with caches of its own; returns what it returned."""
    own = Path(tempfile.mkdtemp(dir=scratch))
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(own / "hub"),
        "HF_DATASETS_CACHE": str(own / "datasets"),
        "TOKENIZERS_PARALLELISM": "true" if settings["threads"] else "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TMPDIR": str(own),
    }
    script = "import sys; from benchmarks import preparation; preparation.answer(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, name, json.dumps(settings | {"cache": str(own / "cache")})],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(own, ignore_errors=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")


# ---- in a process of its own


def answer(name: str, settings: str) -> None:
    """Print what the function `name` returns for the settings."""
    function = {"ours": prepare_ours, "trl": prepare_trl, "write_tokenizer": write_tokenizer}[name]
    print("RESULT " + json.dumps(function(json.loads(settings))), flush=True)


def write_tokenizer(settings: dict) -> dict:
    """A tokenizer that is trained on the first rows."""
    from benchmarks.workloads import Workload, make_tokenizer

    rows = []
    with open(settings["data"], encoding="utf-8") as file:
        for line, _ in zip(file, range(TOKENIZER_ROWS), strict=False):
            row = json.loads(line)
            rows.append({name: messages[0]["content"] for name, messages in row.items()})
    make_tokenizer([Workload("words", rows, False)]).save_pretrained(settings["tokenizer"])
    return {}


def prepare_ours(settings: dict) -> dict:
    from open_rm.data.building import load_preference_data
    from open_rm.data.tokenizer import load_tokenizer
    from open_rm.flags import DataFlags

    tokenizer = load_tokenizer(settings["tokenizer"])
    flags = DataFlags(
        dataset_mixer_list=[settings["data"], "1.0"],
        max_token_length=MAX_TOKEN_LENGTH,
        max_prompt_token_length=MAX_TOKEN_LENGTH,
        dataset_local_cache_dir=settings["cache"],
        num_proc=settings["num_proc"],
    )
    before = peak_mib()
    started = time.perf_counter()
    data = load_preference_data(flags, tokenizer)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "preparing_seconds": seconds,
        **peaks(before),
        "kept": len(data),
        **content(data.dataset, "chosen_input_ids", "rejected_input_ids"),
    }


def prepare_trl(settings: dict) -> dict:
    """What a user of RewardTrainer waits for: loading the file, and `_prepare_dataset`, which uses nothing of the trainer."""
    import datasets
    from trl import RewardConfig, RewardTrainer

    from open_rm.data.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(settings["tokenizer"])
    processes = settings["num_proc"] if settings["num_proc"] > 1 else None
    config = RewardConfig(
        output_dir=settings["cache"],
        max_length=MAX_TOKEN_LENGTH,
        dataset_num_proc=processes,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    before = peak_mib()
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=settings["data"], split="train", num_proc=processes)
    loaded = time.perf_counter()
    prepared = RewardTrainer._prepare_dataset(None, rows, tokenizer, config, "train")
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "preparing_seconds": ended - loaded,
        **peaks(before),
        "kept": len(prepared),
        **content(prepared, "chosen_ids", "rejected_ids"),
    }


def peak_mib() -> tuple[float, float]:
    """(this process, the largest of its children that have ended); Linux counts KiB."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_maxrss / 2**10, children.ru_maxrss / 2**10


def peaks(before: tuple[float, float]) -> dict[str, float]:
    """Peak memory after the clock has stopped; before: from `peak_mib`, with what imports started and ended."""
    for child in multiprocessing.active_children():  # one that has not been waited for does not count yet
        child.join()
    own, child = peak_mib()
    return {"imports_mib": before[0], "peak_mib": own, "child_mib": child if child > before[1] else 0.0}


def content(dataset, *names: str) -> dict:
    """Number of tokens, and a hash over the token ids of all pairs in their order."""
    import hashlib

    import numpy as np
    import pyarrow as pa

    digest, tokens = hashlib.sha256(), 0
    for block in dataset.with_format("arrow", columns=list(names)).iter(1000):
        for name in names:
            column = block[name].combine_chunks()  # how rows lie in chunks differs
            ids, lengths = (np.asarray(part.cast(pa.int64())) for part in (column.flatten(), column.value_lengths()))
            tokens += len(ids)
            digest.update(ids.tobytes() + lengths.tobytes())
    return {"tokens": tokens, "content": digest.hexdigest()}


# ---- the table


def describe(result: dict, rows: int) -> str:
    return f"{rows / result['seconds']:.0f} rows/s, {memory([result])} MiB"


def memory(results: list[dict]) -> str:
    own, child = (statistics.median(result[name] for result in results) for name in ("peak_mib", "child_mib"))
    return f"{own:.0f} + {child:.0f}" if child else f"{own:.0f}"


def spread(values: list[float], digits: int = 0) -> str:
    """Median, and the range of the rounds."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(args: PreparationArgs, rounds: list[dict], large: dict) -> None:
    ours, trl = ([results[name] for results in rounds] for name in ("ours", "trl"))
    tokens = large["tokens"] / large["kept"]
    same = {(result["kept"], result["content"]) for result in ours + trl}
    print(f"num_proc {args.num_proc}, {os.cpu_count()} cores, tokenizer threads: {args.tokenizer_threads}")
    print(f"{tokens:.0f} tokens a pair; both give the same token ids: {'yes' if len(same) == 1 else 'NO'}")
    imports = {name: statistics.median(r["imports_mib"] for r in runs) for name, runs in (("ours", ours), ("TRL", trl))}
    print(f"peak before the first row, MiB: ours {imports['ours']:.0f}, TRL {imports['TRL']:.0f}\n")
    print("| preparation | rows | rows/s | ratio, ours over it | peak MiB |")
    print("| --- | --- | --- | --- | --- |")
    lines = (
        ("ours", ours, "seconds"),
        ("TRL", trl, "seconds"),
        ("TRL without load_dataset", trl, "preparing_seconds"),
    )
    for name, results, key in lines:
        speeds = [args.peer_pairs / result[key] for result in results]
        ratios = [theirs[key] / own["seconds"] for own, theirs in zip(ours, results, strict=True)]
        print(f"| {name} | {args.peer_pairs} | {spread(speeds)} | {spread(ratios, 2)} | {memory(results)} |")
    print(f"| ours | {args.pairs} | {args.pairs / large['seconds']:.0f} | - | {memory([large])} |")


if __name__ == "__main__":
    main(tyro.cli(PreparationArgs, use_underscores=True))
