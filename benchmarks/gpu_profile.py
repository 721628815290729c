"""The GPU profile: 1B and 8B shapes, ours and TRL's, within a few minutes; with --smoke all of its lines on a CPU, in small.

    python -m benchmarks.throughput --profile gpu [--smoke | --trace | --minutes 8]
    python -m benchmarks.throughput --report OUTPUT       draws again from what is there, after a kill too

A process takes one contestant of one shape: it loads the model once, measures all settings and appends a line to
OUTPUT/results.jsonl after each. The most telling contestants come first; where the minutes are used up the rest is left out
by name. The next process imports its libraries while one measures.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks import agreement, card, gpu_report, workloads
from benchmarks.contestants import CONTESTANTS, flash_attention, why_not
from benchmarks.gpu_contestant import Book, Orders
from benchmarks.measuring import How, Setting
from open_rm.errors import UserError

REPOSITORY = Path(__file__).parent.parent
GRACE_SECONDS = 20.0  # beyond its time, after which a contestant is killed
LEAST_SECONDS = 15.0  # that a contestant is worth starting for

HH, ALPACA, LONG = "hh_harmless", "alpaca_eval", "long_prompts"


@dataclass(frozen=True)
class Profile:
    """shapes: settings by shape.  order: (shape, contestant), the most telling first.  minutes, contestant_minutes: what all of
    it, and one contestant of one shape, may take.  See measuring.How for the rest."""

    shapes: dict[str, tuple[Setting, ...]]
    order: tuple[tuple[str, str], ...]
    dtype: str
    max_token_length: int
    pairs_per_forward: int
    warm: int
    rounds: int
    minutes: float
    contestant_minutes: float


EVERYWHERE = (
    Setting(HH, 64, recompute=False, steps=3),
    Setting(HH, 16, recompute=False, steps=6),
    Setting(HH, 16, recompute=True, steps=4),
    Setting(LONG, 16, recompute=False, steps=3),
)
GPU = Profile(
    shapes={"1B": (*EVERYWHERE, Setting(ALPACA, 16, recompute=False, steps=4)), "8B/4": EVERYWHERE},
    order=(
        ("1B", "shared_prefix"),
        ("1B", "TRL bfloat16"),
        ("1B", "packed"),
        ("8B/4", "shared_prefix"),
        ("8B/4", "shared_prefix, float8"),
        ("8B/4", "packed"),
        ("8B/4", "TRL bfloat16"),
        ("1B", "TRL"),
        ("1B", "shared_prefix, float8"),
        ("1B", "TRL bfloat16, flash attention"),
        ("1B", "padded"),
        ("8B/4", "TRL"),
        ("8B/4", "TRL bfloat16, flash attention"),
        ("8B/4", "padded"),
    ),
    dtype="bfloat16",
    max_token_length=2048,
    pairs_per_forward=16,
    warm=3,
    rounds=2,
    minutes=8.0,
    contestant_minutes=1.5,
)
SMOKE = Profile(
    shapes={
        "tiny": (
            Setting("conversations", 8, recompute=False, steps=2),
            Setting("conversations", 4, recompute=True, steps=2),
            Setting("many_answers", 4, recompute=False, steps=2),
            Setting("long_prompts", 4, recompute=False, steps=2),
        )
    },
    order=tuple(("tiny", name) for name in CONTESTANTS),
    dtype="float32",
    max_token_length=512,
    pairs_per_forward=4,
    warm=1,
    rounds=2,
    minutes=60.0,
    contestant_minutes=20.0,  # it is to end however busy the CPU is
)


def run(args, output: Path) -> int:
    """Measure, as throughput.BenchmarkArgs say; returns the exit status: 0 where all that was tried was measured."""
    profile = SMOKE if args.smoke else GPU
    if not args.smoke and not torch.cuda.is_available():
        print("no GPU here: this profile needs one; --smoke runs all of its lines on a CPU, in small")
        return 1
    given = {name: getattr(args, name) for name in ("minutes", "contestant_minutes") if getattr(args, name) is not None}
    profile = dataclasses.replace(profile, **given)
    if args.trace:
        profile = dataclasses.replace(profile, order=profile.order[:1])
    if unknown := sorted(set(args.contestants) - set(CONTESTANTS)):
        raise UserError(f"--contestants {unknown[0]}: there is none of that name; there are {', '.join(CONTESTANTS)}")
    # so that `finally` below is reached
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    deadline = time.monotonic() + 60 * profile.minutes
    path = output / gpu_report.LINES
    path.unlink(missing_ok=True)
    book = Book(path)
    machine = card.facts()
    book.write(kind="machine", smoke=args.smoke, **machine)
    print(f"machine: {card.describe(machine)}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="open_rm_benchmark_") as scratch:
            agree = Tournament(args, profile, output, Path(scratch), book, deadline).run()
    finally:
        rows = gpu_report.report(output)
        signal.signal(signal.SIGTERM, before)
    failed = [row for row in rows if row["kind"] == "error"]
    return 0 if agree and not failed else 1


class Tournament:
    """The contestants of a profile, one after another."""

    def __init__(self, args, profile: Profile, output: Path, scratch: Path, book: Book, deadline: float):
        self.args, self.profile, self.output, self.scratch = args, profile, output, scratch
        self.book, self.deadline = book, deadline

    def run(self) -> bool:
        """Returns whether the layouts gave the same rewards."""
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        wanted = [
            (shape, name)
            for shape, name in self.profile.order
            if not self.args.contestants or name in self.args.contestants
        ]
        playing = [(shape, name) for shape, name in wanted if self._may_play(shape, name)]
        with contextlib.ExitStack() as started:
            ahead = self._start(playing[0], started) if playing else None
            loads = self._workloads()
            self.tokenizer = workloads.make_tokenizer(loads)
            self.files = {load.name: (str(workloads.write_rows(self.scratch, load)), load.by_prompt) for load in loads}
            agree = self.args.trace or self._agree(loads)
            for number, (shape, name) in enumerate(playing):
                child, following = ahead, playing[number + 1 : number + 2]
                ahead = self._start(following[0], started) if following else None
                self._play(shape, name, child)
        return agree

    def _may_play(self, shape: str, name: str) -> bool:
        why = why_not(name)
        if why is not None:
            self._left_out(shape, name, why)
        return why is None

    def _left_out(self, shape: str, name: str, why: str) -> None:
        self.book.write(kind="left out", shape=shape, contestant=name, what="all of it", why=why)
        print(f"{shape}, {name}: left out, {why}", flush=True)

    def _workloads(self) -> list[workloads.Workload]:
        args, folder = self.args, Path(self.args.data)
        if args.smoke:
            made = [workloads.conversations(48, seed=1), workloads.many_answers(24, seed=1)]
            return [*made, workloads.long_prompts(24, seed=1, words=80)]
        loads = []
        for name, pairs, by_prompt in ((HH, 4 * args.hh_pairs, False), (ALPACA, 4 * args.alpaca_pairs, True)):
            if (folder / name / "train.jsonl").is_file():
                loads.append(workloads.real(folder / name, pairs, seed=1, by_prompt=by_prompt))
            else:
                self.book.write(kind="left out", shape="all", contestant="all", what=name, why=f"not in {folder}")
                print(f"{folder / name} is not there: left out", flush=True)
        return [
            load for load in (*loads, workloads.long_prompts(192, seed=1)) if not args.only or load.name in args.only
        ]

    def _agree(self, loads: list[workloads.Workload]) -> bool:
        try:
            differences = agreement.check_layouts(loads, self.tokenizer, self.scratch)
            self.book.write(kind="agreement", differences=differences)
            return True
        except Exception as error:  # a kernel that fails here may fail alone; what can be measured is
            self.book.write(kind="error", shape="tiny", contestant="layouts", why=f"{type(error).__name__}: {error}")
            print(f"the layouts' agreement: {type(error).__name__}: {error}", flush=True)
            return False

    def _start(self, which: tuple[str, str], started: contextlib.ExitStack) -> subprocess.Popen:
        """A process that imports its libraries and waits for orders."""
        shape, name = which
        logs = self.output / "logs"
        logs.mkdir(exist_ok=True)
        log = (logs / f"{shape}_{name}.log".replace("/", "_").replace(" ", "_").replace(",", "")).open("w")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # one GPU: TRL would refuse several in one process
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_contestant", CONTESTANTS[name]["trainer"]],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
        )
        log.close()  # the child has its own
        started.callback(_end, child)
        return child

    def _play(self, shape: str, name: str, child: subprocess.Popen) -> None:
        """Give a process its orders and wait for it, at most as long as the time lasts."""
        left = self.deadline - time.monotonic() - GRACE_SECONDS
        if left < LEAST_SECONDS:
            _end(child)
            self._left_out(shape, name, f"the {self.profile.minutes:g} minutes were used up")
            return
        began, seconds = time.monotonic(), min(60 * self.profile.contestant_minutes, left)
        settings = self._settings(shape)
        traced = (
            settings[0] if (self.args.trace or self.args.smoke) and (shape, name) == self.profile.order[0] else None
        )
        measured = [] if self.args.trace else settings
        of = (name, self._contestant(name), self._how(shape), measured)
        orders = Orders(*of, str(self.book.path), seconds, trace=traced)
        why = None
        try:
            child.stdin.write(json.dumps(dataclasses.asdict(orders)) + "\n")
            child.stdin.flush()
            if child.wait(seconds + GRACE_SECONDS):
                why = f"ended with status {child.returncode}; see {self.output / 'logs'}"
        except subprocess.TimeoutExpired:
            why = f"killed after {seconds + GRACE_SECONDS:.0f} s"
        except BrokenPipeError:
            why = f"ended with status {child.wait()} before it began; see {self.output / 'logs'}"
        _end(child)
        if why:
            self.book.write(kind="error", shape=shape, contestant=name, why=why)
        print(f"{shape}, {name}: {why or 'measured'} ({time.monotonic() - began:.0f} s)", flush=True)

    def _contestant(self, name: str) -> dict:
        contestant = CONTESTANTS[name]
        return contestant | ({"attention": flash_attention()} if "attention" in contestant else {})

    def _settings(self, shape: str) -> list[Setting]:
        return [setting for setting in self.profile.shapes[shape] if setting.workload in self.files]

    def _how(self, shape: str) -> How:
        folder = self.scratch / shape.replace("/", "_")
        if not folder.exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            workloads.write_model(folder, workloads.SHAPES[shape], self.tokenizer, device=device)
            if device == "cuda":
                torch.cuda.empty_cache()  # the contestants need it
        of = self.profile
        return How(
            shape=shape,
            model=str(folder),
            rows=self.files,
            cache=str(self.scratch / "cache"),
            dtype=of.dtype,
            max_token_length=of.max_token_length,
            pairs_per_forward=of.pairs_per_forward,
            warm=of.warm,
            rounds=of.rounds,
        )


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
