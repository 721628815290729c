"""Requests that arrive together are scored together, by one thread.

The first request waits a few milliseconds for others; while a batch is scored the next ones gather by themselves. Answers
to one prompt, which come as requests of their own (OpenRLHF, verl, slime), so share it in one forward. Everything here runs
in the event loop; the thread runs the scorer alone. What is scored together changes no reward beyond float rounding.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from open_rm.errors import UserError, quote_error
from open_rm.serving.counters import Counters
from open_rm.serving.limits import Places, Refusal

LOG = logging.getLogger("open_rm.serving")
# A batch ends where it has as many texts or tokens: answers go out while others are scored.
MOST_TEXTS, MOST_TOKENS = 256, 65536
SICK = 3  # batches in a row that fail, after which the server says of itself that it is not healthy


@dataclass(eq=False)
class _Waiting:
    """A request's sequences in the queue."""

    sequences: list[list[int]]
    arrived: float
    answer: asyncio.Future


class Collector:
    """See the module.

    Args:
        score: [N] rewards of N sequences of token ids; called by one thread at a time.
        executor: runs it; of one thread.
        wait: seconds that the first request waits for others.
    """

    def __init__(
        self,
        score: Callable[[list[list[int]]], np.ndarray],
        executor: Executor,
        *,
        wait: float,
        counters: Counters,
        places: Places,
    ):
        self._score, self._executor, self._wait = score, executor, wait
        self._counters, self._places = counters, places
        self._queue: deque[_Waiting] = deque()
        self._more = asyncio.Event()
        self._running = asyncio.get_running_loop().create_task(self._run())
        self.failures = 0  # batches in a row

    @property
    def healthy(self) -> bool:
        """Whether it scores, as far as the last batches tell."""
        return self.failures < SICK and not self._running.done()

    async def rewards(self, sequences: Sequence[list[int]]) -> list[float]:
        """Rewards of a request's sequences, in order. Cancelled, it leaves the queue.

        Raises:
            Refusal: 500, the model failed.
        """
        if not sequences:
            return []
        waiting = _Waiting(list(sequences), time.monotonic(), asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._more.set()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):  # it is being scored
                self._queue.remove(waiting)
            raise

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            if self._queue and (left := self._queue[0].arrived + self._wait - time.monotonic()) > 0:
                await asyncio.sleep(left)
            batch = self._taken()
            if not self._queue:
                self._more.clear()
            if batch:
                await self._scored(batch)
            del batch  # not held until the next one comes

    def _taken(self) -> list[_Waiting]:
        """The requests of the next batch, the oldest first; those whose client has left are dropped."""
        batch, texts, tokens = [], 0, 0
        while self._queue and texts < MOST_TEXTS and tokens < MOST_TOKENS:
            waiting = self._queue.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
                texts += len(waiting.sequences)
                tokens += sum(map(len, waiting.sequences))
        return batch

    async def _scored(self, batch: list[_Waiting]) -> None:
        """Answer a batch. Where it fails, each request is scored by itself once: the fault may be of one of them."""
        sequences = [ids for waiting in batch for ids in waiting.sequences]
        began = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            rewards = (await loop.run_in_executor(self._executor, self._score, sequences)).tolist()
            own = iter(rewards)
            answers = [[next(own) for _ in waiting.sequences] for waiting in batch]
        except Exception as error:
            answers = None
            self._failed(batch, error)
        if answers is None:  # outside of the handler: the error's frames may hold a GPU's memory
            for waiting in batch:
                if not waiting.answer.done():
                    await self._scored([waiting])
            return
        self.failures = 0
        self._note(sequences, time.monotonic() - began)
        for waiting, answer in zip(batch, answers, strict=True):
            if not all(map(math.isfinite, answer)):
                _tell(waiting, Refusal(500, "the model's reward of this text is not a finite number"))
            elif not waiting.answer.done():
                waiting.answer.set_result(answer)

    def _failed(self, batch: list[_Waiting], error: Exception) -> None:
        """Count and say it; a request that was scored by itself is answered."""
        self.failures += 1
        self._counters.failed.inc()
        texts = sum(len(waiting.sequences) for waiting in batch)
        first = self.failures == 1  # in a row; one traceback says enough
        LOG.error("a batch of %d texts failed: %s", texts, quote_error(error), exc_info=error if first else None)
        if len(batch) == 1:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}, see the server's log"
            _tell(batch[0], Refusal(500, f"the model could not score this: {said}"))

    def _note(self, sequences: list[list[int]], seconds: float) -> None:
        self._places.texts_per_second = len(sequences) / max(seconds, 1e-6)
        self._counters.texts.inc(len(sequences))
        self._counters.tokens.inc(sum(map(len, sequences)))
        self._counters.batch_texts.observe(len(sequences))
        self._counters.batch_seconds.observe(seconds)


def _tell(waiting: _Waiting, refusal: Refusal) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(refusal)
