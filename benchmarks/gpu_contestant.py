"""One contestant of the GPU profile in a process of its own, so that its peak memory is its own. Started by gpu_profile.py.

    python -m benchmarks.gpu_contestant ours|trl

It imports what it needs, touches no device, and waits for its orders: one JSON line on stdin (see `Orders`). So the next
contestant imports while this one measures. It takes all settings, round by round, and appends a line to the results after each;
it ends early, and says what it left out, where its time would not suffice. When its stdin closes, whoever started it is gone,
and it ends.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.measuring import (
    How,
    Setting,
    counted,
    peak_memory,
    shape_of,
    start_of_memory,
    steps_of,
    wait_for_device,
)
from benchmarks.workloads import read_pairs
from open_rm import ranks
from open_rm.data.tokenizer import load_tokenizer
from open_rm.training.metrics import matmul_flops


@dataclass(frozen=True)
class Orders:
    """name: of the contestant.  contestant: its entry in contestants.CONTESTANTS.  results: file to append lines to.
    settings: in the order in which they are to be measured.  seconds: that it may take.
    trace: a setting of which one step is profiled in the end (step_trace.py), or None.
    """

    name: str
    contestant: dict
    how: How
    settings: list[Setting]
    results: str
    seconds: float
    trace: Setting | None

    @staticmethod
    def read(line: str) -> "Orders":
        values = json.loads(line)
        values["how"], values["settings"] = How(**values["how"]), [Setting(**each) for each in values["settings"]]
        values["trace"] = values["trace"] and Setting(**values["trace"])
        return Orders(**values)


class Book:
    """Lines of the results, each on the disk when `write` returns."""

    def __init__(self, path: str | Path, **common):
        self.path, self.common = Path(path), common

    def write(self, **row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.common | row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def main(side: str) -> None:
    if side == "trl":
        from benchmarks.trl_loop import TheirTraining as Training
    else:
        from benchmarks.recipe_loop import OurTraining as Training
    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    orders = Orders.read(line)
    started = time.perf_counter()
    book = Book(orders.results, shape=orders.how.shape, contestant=orders.name)
    quiet()
    joined = ranks.joined_ranks() if side == "ours" else contextlib.nullcontext(alone())
    with joined as here:
        run(orders, Training, here, book, started)


def run(orders: Orders, Training, here: ranks.Ranks, book: Book, started: float) -> None:
    """All settings, round by round, as long as the time lasts."""
    how = orders.how
    tokenizer = load_tokenizer(how.model)
    data = {
        workload: read_pairs(Path(file), tokenizer, Path(how.cache), max_token_length=how.max_token_length)
        for workload, (file, _) in how.rows.items()
    }
    training = Training(how, orders.contestant, tokenizer, here)
    shape, rate = shape_of(how.model), matmul_flops(here, getattr(torch, how.dtype))
    taken: dict[Setting, float] = {}
    for number in range(1, how.rounds + 1):
        order = orders.settings if number % 2 else orders.settings[::-1]
        for place, setting in enumerate(order):
            left = orders.seconds - (time.perf_counter() - started)
            if left < taken.get(setting, 0.0):
                for skipped in order[place:]:
                    book.write(
                        kind="left out", what=f"round {number}, {skipped.describe()}", why="its time was used up"
                    )
                break
            begun = time.perf_counter()
            measure(training, setting, data[setting.workload], how, number, shape=shape, rate=rate, book=book)
            taken[setting] = time.perf_counter() - begun
    if orders.trace is not None:
        from benchmarks.step_trace import trace

        loaded, by_prompt = data[orders.trace.workload], how.rows[orders.trace.workload][1]
        steps = steps_of(loaded, orders.trace, how.warm, by_prompt=by_prompt)
        try:
            trace(training, steps, loaded, book, recomputes=orders.trace.recompute)
        except Exception as error:  # what was measured is measured
            traceback.print_exc()
            book.write(kind="error", why=f"the profile of a step: {in_short(error)}")


def measure(training, setting: Setting, data, how: How, number: int, *, shape, rate: float, book: Book) -> None:
    """One setting once; its figures, or why there are none, go into the book."""
    warm = how.warm if number == 1 else 1
    layout = training.contestant.get("layout", "padded")
    steps = steps_of(data, setting, warm, by_prompt=how.rows[setting.workload][1])
    row = {
        "workload": setting.workload,
        "pairs_per_step": setting.pairs_per_step,
        "recompute": setting.recompute,
        "round": number,
    }
    start_of_memory()
    failed = None
    try:
        timed = training.measure(setting, steps, data, warm=warm)
    except torch.OutOfMemoryError:
        failed = "out of memory"
    except Exception as error:
        traceback.print_exc()
        failed = in_short(error)
    if failed:  # outside of except, whose traceback holds the tensors of the forward
        book.write(kind="error", **row, why=failed, **peak_memory())
        training.build()
        return
    found = counted(steps[warm:], data, how, layout, shape)
    book.write(
        kind="measured",
        **row,
        steps=setting.steps,
        seconds=timed.seconds,
        step_seconds=timed.seconds / setting.steps,
        pairs_per_second=setting.steps * setting.pairs_per_step / timed.seconds,
        tokens_per_second=found["tokens"] / timed.seconds,
        distinct_tokens_per_second=found["distinct"] / timed.seconds,
        tokens=found["tokens"],
        distinct=found["distinct"],
        computed=timed.computed,
        padding=1 - timed.computed / timed.positions,
        mfu=found["flops"] / timed.seconds / rate,
        flops_per_second=found["flops"] / timed.seconds,
        matmul_flops=rate,
        losses=timed.losses,
        **peak_memory(),
    )
    wait_for_device()


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def alone() -> ranks.Ranks:
    """The ranks of a process that forms no group (TRL forms its own)."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return ranks.Ranks(rank=0, local_rank=0, world_size=1, device=device)


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
