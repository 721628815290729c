"""One slow rank holds up all of them, and no metric of the whole shows which.

What is timed is what a rank computes by itself: the forward of each module that multiplies by weights, from where its weights are
there (ZeRO-3 has gathered them) to its output, in every micro-batch and again where it is recomputed; and this rank's wait for
its batches. Waits for other ranks are not in it under any ZeRO stage, nor attention's exchanges in a sequence group, nor the
backward pass, in which gradients are summed. These products take time as the number of positions, whatever the lengths. So slow
is a rank that takes longer than the others in all and also for a position: not one that was only dealt more.

On a GPU the device's own clock is read (CUDA events), when the step's metrics are: within a micro-batch nothing waits.
"""

import socket
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from open_rm.ranks import Ranks

SLOW = 1.2  # times as slow as the median of the others that is called slow
MUCH, SOON = 1.5, 50  # so much slower over so many steps that it is said while the run goes on
KEPT = 4096  # steps of which medians are taken; of a longer run every second, fourth, ... is kept


class Stopwatch:
    """Seconds that a model's matrix products take in forwards with gradients; those of evaluations are not counted."""

    clock = time.perf_counter

    def __init__(self, model: nn.Module, device: torch.device):
        """Hooks go around those of DeepSpeed that are there, so the engine is made before."""
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple] = []
        self._begun: dict[nn.Module, object] = {}
        self._events: list[torch.cuda.Event] = []  # to be used again
        self._hooks = []
        for module in _with_weights(model):
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, prepend=True))

    def _mark(self):
        if not self._on_gpu:
            return self.clock()
        event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, module: nn.Module, _) -> None:
        if torch.is_grad_enabled():
            self._begun[module] = self._mark()

    def _end(self, module: nn.Module, *_) -> None:
        if (begun := self._begun.pop(module, None)) is not None:
            self._spans.append((begun, self._mark()))

    def take(self) -> float:
        """Seconds since it was taken last. On a GPU this waits for the last of these forwards."""
        spans, self._spans = self._spans, []
        self._begun.clear()  # recomputation may leave a module before its end
        if not self._on_gpu:
            return sum(end - begun for begun, end in spans)
        if spans:
            spans[-1][1].synchronize()
        self._events += [event for span in spans for event in span]
        return sum(begun.elapsed_time(end) for begun, end in spans) / 1000

    def remove(self) -> None:
        """Time nothing any more."""
        for hook in self._hooks:
            hook.remove()


def _with_weights(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that have matrices of their own."""

    def has_matrix(module: nn.Module) -> bool:
        return any(len(getattr(p, "ds_shape", p.shape)) > 1 for p in module.parameters(recurse=False))

    holders = [module for module in model.modules() if has_matrix(module)]
    return [
        module for module in holders if not any(part is not module and has_matrix(part) for part in module.modules())
    ]


class Stragglers:
    """Every rank's seconds, step by step; who is slow, soon and at the end. n: number of ranks."""

    def __init__(self, model: nn.Module, ranks: Ranks, say: Callable):
        """A collective call: ranks tell each other where they are. say: of the log, which is the main rank's."""
        self._ranks, self._say, self._stopwatch = ranks, say, Stopwatch(model, ranks.device)
        self._places = ranks.gathered((socket.gethostname(), ranks.local_rank))
        self._ratios: list[np.ndarray] = []  # [n] of every `_every`th step
        self._every, self._steps, self._seconds = 1, 0, 0.0
        self._recent: deque[np.ndarray] = deque(maxlen=SOON)
        self._slow_steps, self._lost = np.zeros(ranks.world_size, int), np.zeros(ranks.world_size)
        self._said: set[int] = set()

    def own(self, waited: float, positions: float) -> list[float]:
        """[2 n] this rank's seconds and positions of a step in its places, zeros in the others': to be summed over ranks.

        waited: seconds for its batches.
        """
        slots = [0.0] * (2 * self._ranks.world_size)
        slots[self._ranks.rank] = waited + self._stopwatch.take()
        slots[self._ranks.world_size + self._ranks.rank] = positions
        return slots

    def step(self, slots: list[float], step_seconds: float) -> dict[str, float]:
        """Take in a step's sums of `own`; returns its metrics: the most seconds that a rank computed, and which one it was."""
        seconds, positions = np.array(slots).reshape(2, -1)
        slowest = int(seconds.argmax())
        if len(seconds) > 1:
            self._compare(seconds, seconds / np.maximum(positions, 1), step_seconds)
        return {"perf/rank_seconds_max": float(seconds[slowest]), "perf/slowest_rank": float(slowest)}

    def _compare(self, seconds: np.ndarray, pace: np.ndarray, step_seconds: float) -> None:
        """seconds: [n] of each rank.  pace: [n] those a position."""
        # Of a rank with much less to do, the cost of a call by itself looks like slowness; nobody waits for it.
        ratios = np.minimum(*(values / np.maximum(median_of_others(values), 1e-12) for values in (pace, seconds)))
        if self._steps % self._every == 0:
            self._ratios.append(ratios)
            if len(self._ratios) == KEPT:
                del self._ratios[1::2]
                self._every *= 2
        self._steps, self._seconds = self._steps + 1, self._seconds + step_seconds
        self._slow_steps += ratios >= SLOW
        worst = int(ratios.argmax())
        if ratios[worst] >= SLOW:  # the step would have been so much shorter, were all of it such products
            self._lost[worst] += step_seconds * (1 - 1 / ratios[worst])
        self._recent.append(ratios)
        if self._steps % SOON == 0:
            slowness = np.median(self._recent, axis=0)
            for rank in np.flatnonzero(slowness >= MUCH).tolist():
                if rank not in self._said:
                    self._said.add(rank)
                    self._say(f"slow: {self._name(rank)} {_times(slowness[rank])} for the last {SOON} steps")

    def report(self) -> list[str]:
        """Lines for the log about the steps so far; nothing is timed any more."""
        self._stopwatch.remove()
        if not self._steps:
            return []
        slowness = np.median(self._ratios, axis=0)
        slow = [rank for rank in np.argsort(-slowness, kind="stable").tolist() if slowness[rank] >= SLOW]
        if not slow:
            worst = int(slowness.argmax())
            return [f"ranks: even over {self._steps} steps; rank {worst}, the slowest, {_times(slowness[worst])}"]
        return [
            f"slow: {self._name(rank)} {_times(slowness[rank])}, and {SLOW} times or more in {self._slow_steps[rank]} of "
            f"{self._steps} steps; that cost up to {self._lost[rank] / 3600:.2g} of the {self._seconds / 3600:.2g} hours of steps"
            for rank in slow
        ]

    def _name(self, rank: int) -> str:
        host, local = self._places[rank]
        return f"rank {rank} (host {host}, local device {local})"


def _times(ratio: float) -> str:
    return f"took {ratio:.2f} times as long for a position as the median of the others"


def median_of_others(values: np.ndarray) -> np.ndarray:
    """[n] for each value the median of the n - 1 others, n at least 2."""
    n = len(values)
    order = np.argsort(values, kind="stable")
    place = np.empty(n, int)
    place[order] = np.arange(n)
    ordered = values[order]
    middle = [np.where(at < place, ordered[at], ordered[at + 1]) for at in ((n - 2) // 2, (n - 1) // 2)]
    return (middle[0] + middle[1]) / 2
