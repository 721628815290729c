"""--find_batch_size: the largest micro-batch that fits, found by computing larger and larger ones on the device.

Budgets double from the largest pair upwards. Each is computed for real, forward and backward through the engine with the run's
loss, on the worst that the data can fill it with; the peak of memory is measured. The next one is tried only where a line
through the peaks so far, and the moments that the first step will make, leave it room ON ALL RANKS: one that ran out of memory
in a collective would leave the others waiting.

Afterwards all is as before: gradients are dropped, and learning rate and random numbers stand where they stood, so a run that
found a budget equals one that was given it with --max_tokens_per_micro_batch.
"""

import dataclasses
import gc
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from open_rm import alive
from open_rm.batching.feeding import MicroBatch
from open_rm.batching.rules import BatchRules
from open_rm.batching.targets import columns_of
from open_rm.data.pairs import PreferenceData
from open_rm.errors import OneRanksError, UserError
from open_rm.flags import ObjectiveFlags, ScaleFlags
from open_rm.training import fitting, footprint, memory
from open_rm.training.engine import Engine
from open_rm.training.filling import Filling
from open_rm.training.losses import loss_terms

SHARE = fitting.SHARE
GIB = fitting.GIB
FASTER = 1.1  # by so much a smaller micro-batch has to be faster a position to be mentioned
T = TypeVar("T")
MOMENTS = {"AdamW": "adamw", "AdamW8bit": "adamw_8bit", "Adafactor": "adafactor"}  # optimizers by --optim


@dataclass(frozen=True)
class Try:
    """budget: positions a device.  pairs, positions: of the micro-batch, of a sequence group's devices together.
    peak: bytes that this rank held at most.  seconds: forward and backward."""

    budget: int
    pairs: int
    positions: int
    peak: float
    seconds: float

    @property
    def rate(self) -> float:
        """Positions a second."""
        return self.positions / self.seconds


def kept(flags: ScaleFlags, rules: BatchRules, engine: Engine) -> dict | None:
    """What a checkpoint keeps, so that a run which goes on cuts its steps as before where all that decides what fits is the same."""
    if not flags.find_batch_size:
        return None
    ranks = engine.ranks
    return {
        "max_tokens": rules.max_tokens,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.on_gpu else "cpu",
        "world_size": ranks.world_size,
        "sequence_size": ranks.sequence_size,
        "layout": rules.layout,
        "recomputed": sum(getattr(module, "gradient_checkpointing", False) for module in engine.module.modules()),
        "optimizer": type(engine.optimizer).__name__,
        "deepspeed": json.dumps(engine.config, sort_keys=True),
    }


def find(
    flags: ScaleFlags,
    objective: ObjectiveFlags,
    engine: Engine,
    rules: BatchRules,
    data: PreferenceData,
    *,
    pairs_per_step: int,
    before: dict | None,
) -> tuple[BatchRules, list[str]]:
    """The rules with the largest budget that fits, and lines for the log. A collective call, before the first step.

    pairs_per_step: of all ranks.  before: what the checkpoint that is gone on from has of `kept`.

    Raises:
        OneRanksError: memory ran out where that cannot be taken back.
    """
    if not flags.find_batch_size:
        return rules, []
    ranks = engine.ranks
    if before is not None:
        same = dataclasses.replace(rules, max_tokens=before["max_tokens"])
        if all(ranks.gathered(kept(flags, same, engine) == before)):  # a rank may have another device
            return same, [f"micro-batches of up to {same.max_tokens} positions, as --find_batch_size found them before"]
    # The losses of lists differ in a few numbers a pair, which are nothing beside a forward.
    objective = dataclasses.replace(objective, list_loss="pairs")
    fill = Filling(rules, data, ranks.sequence_size, columns_of(data, objective))
    climb = _Climb(engine, objective, fill, most_pairs=-(-pairs_per_step // ranks.data_size))
    schedule, started = engine.schedule_state(), time.perf_counter()
    devices = [ranks.device] if ranks.on_gpu else []
    with alive.phase("trying micro-batches", alive.Kind.BUSY), torch.random.fork_rng(devices):
        tries, why = climb.to_the_top()
        climb.forget()
    engine.set_schedule(schedule)
    best = tries[-1]
    lines = [_line(tried) for tried in tries]
    lines.append(
        f"micro-batches of up to {best.budget} positions (--find_batch_size, {time.perf_counter() - started:.1f} s): {why}"
    )
    # the slowest rank's: the others wait for it
    rates = np.min(ranks.gathered([tried.rate for tried in tries]), axis=0)
    fastest = int(rates.argmax())
    if rates[fastest] > FASTER * rates[-1]:
        lines.append(
            f"--max_tokens_per_micro_batch {tries[fastest].budget} was {rates[fastest] / rates[-1]:.1f} times as fast a position "
            f"as {best.budget}"
        )
    return dataclasses.replace(rules, max_tokens=best.budget), lines


def _line(tried: Try) -> str:
    return f"tried {tried.budget} positions: {_size(tried.peak)} at most, {tried.seconds:.2f} s, {tried.rate:.0f} positions/s"


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 10 * GIB else f"{count / 2**20:.0f} MiB"


class _Climb:
    """Tries, one after another, on all ranks together."""

    def __init__(self, engine: Engine, objective: ObjectiveFlags, fill: Filling, *, most_pairs: int):
        """most_pairs: that a rank, or a sequence group, has of a step."""
        self._engine, self._fill, self._most_pairs = engine, fill, most_pairs
        self._objective = objective
        self._ranks = engine.ranks
        hosts = self._ranks.gathered(socket.gethostname())
        sharing = hosts.count(hosts[self._ranks.rank])
        self._memory = memory.GpuMemory(self._ranks.device) if self._ranks.on_gpu else memory.CpuMemory(sharing)
        self._moments = coming_moments(engine)

    def to_the_top(self) -> tuple[list[Try], str]:
        """Those that fitted, smallest first, and why there is no larger one."""
        tries: list[Try] = []
        budget = self._fill.smallest
        # The first pass makes gradients, which the later ones find there, and what else is made once.
        base = self._memory.held() + _gradients(self._engine)
        first = self._pass(self._fill.longest(budget), "")
        if self._ranks.on_gpu:
            base = self._memory.held()
        while first and (tried := self._try(budget, tries)) is not None:
            tries.append(tried)
            if tried.pairs >= self._most_pairs:
                return tries, "it holds all pairs of a step that a device has"
            budget *= 2
            if why := self._no_room(expected_peak(tries, budget, base, careful=not self._ranks.on_gpu), budget):
                return tries, why
        if not tries:
            self._ranks.fail(_shortage(self._fill.longest(budget), ""))
        return tries, f"{budget} ran out of memory"

    def _try(self, budget: int, before: list[Try]) -> Try | None:
        """Compute the micro-batches of a budget; None where memory ran out on some rank."""
        instead = f"--max_tokens_per_micro_batch {before[-1].budget} in place of --find_batch_size, " if before else ""
        micro_batches = self._fill.micro_batches(budget)
        self._memory.reset()
        for micro in micro_batches:
            self._wait()
            started = time.perf_counter()
            if not self._pass(micro, instead):
                return None
            self._wait()
            seconds = time.perf_counter() - started
        return Try(budget, len(micro.indices), micro.batch.positions, self._memory.peak(), seconds)

    def _wait(self) -> None:
        if self._ranks.on_gpu:
            torch.cuda.synchronize(self._ranks.device)

    def _pass(self, micro: MicroBatch, instead: str) -> bool:
        """Forward and backward; False where memory ran out on some rank while no other waits for it. instead: of `_shortage`."""
        stage, together = self._engine.stage, self._ranks.sequence_size > 1

        def backward(rewards: torch.Tensor) -> bool:
            self._engine.backward(self._loss(micro, rewards), last=False)
            return True

        what = _shortage(micro, instead)
        rewards = self._unless_short(lambda: self._forward(micro), what, others_wait=stage == 3 or together)
        done = self._on_all(rewards is not None) and self._on_all(
            self._unless_short(lambda: backward(rewards), what, others_wait=stage > 0 or together) is not None
        )
        if not done:
            del rewards
            gc.collect()
            self._memory.give_back()
        return done

    def _forward(self, micro: MicroBatch) -> torch.Tensor:
        return self._engine(**micro.batch.inputs(self._ranks.device))

    def _loss(self, micro: MicroBatch, rewards: torch.Tensor) -> torch.Tensor:
        chosen, rejected, predicted = micro.sides(rewards)
        terms = loss_terms(chosen, rejected, micro.targets, self._objective, predicted)
        return sum(terms.values()).sum() / max(1, len(micro.indices))

    def _unless_short(self, work: Callable[[], T], what: str, *, others_wait: bool) -> T | None:
        """What `work` gives; None where memory ran out, and the end with the sentence `what` where others wait for it."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_shortage(error):
                raise
            if others_wait and self._ranks.world_size > 1:
                raise OneRanksError(what) from error
        return None

    def _on_all(self, here: bool) -> bool:
        return all(self._ranks.gathered(here))

    def _no_room(self, expected: float, budget: int) -> str | None:
        """Why the next budget is not tried; None where it is expected to fit on all ranks."""
        most = self._memory.held() + SHARE * max(0.0, self._memory.left() - self._moments)
        for rank, (needed, there) in enumerate(self._ranks.gathered((expected, most))):
            if needed > there:
                return f"{budget} would take {_size(needed)}, and rank {rank} has {_size(there)} beside the moments to come"
        return None

    def forget(self) -> None:
        """Leave the engine as it was before."""
        least = self._fill.least()
        self._engine.forget_gradients(lambda: self._loss(least, self._forward(least)))
        self._memory.give_back()
        self._memory.reset()


def expected_peak(tries: list[Try], budget: int, base: float, *, careful: bool) -> float:
    """Bytes at the peak of a larger budget: on the line through the last two tries; after the first one in proportion to what it
    took beside `base`, which is held between tries.

    careful: for a process on a CPU, whose heap keeps some of what was freed: on the steepest of these lines.
    """
    last = tries[-1]
    slopes = [(last.peak - base) / last.budget]
    if len(tries) > 1:
        slopes.append((last.peak - tries[-2].peak) / (last.budget - tries[-2].budget))
    return last.peak + max(0.0, max(slopes) if careful else slopes[-1]) * (budget - last.budget)


def _shortage(micro: MicroBatch, instead: str) -> str:
    """The sentence for memory that ran out. instead: a flag that would have avoided it, if there is one."""
    return (
        f"--find_batch_size: out of memory in a micro-batch of {len(micro.indices)} pairs and {micro.batch.positions} positions; "
        f"pass {instead}--gradient_checkpointing on, --deepspeed configs/ds/zero3.json, a smaller --max_token_length, or, where "
        "there are several devices, --sequence_parallel_size 2 or more"
    )


def _gradients(engine: Engine) -> float:
    """Bytes of gradients, in float32, on this rank: at least so many, for a base that is rather too small."""
    try:
        return 4.0 * sum(flat.weights.numel() for flat in engine.flats())
    except UserError:  # of states on a disk
        return 0.0


def coming_moments(engine: Engine) -> float:
    """Bytes on this rank's device that the first step will make for the optimizer's moments."""
    kind = footprint.MOMENT_BYTES[MOMENTS[type(engine.optimizer).__name__]]
    try:
        flats = engine.flats()
    except UserError:  # they are on a disk
        return 0.0
    here = engine.ranks.device.type
    return sum(kind * flat.weights.numel() for flat in flats if not flat.state and flat.weights.device.type == here)
