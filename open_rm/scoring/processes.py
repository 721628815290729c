"""Worker processes, each with the model of its own: micro-batches go to whoever is free.

Which micro-batches there are is decided before, so that it changes nothing in the rewards who computes which.
"""

import atexit
import contextlib
import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import connection

import numpy as np
import torch

from open_rm.errors import UserError, quote_error
from open_rm.scoring.computing import Computer, Facts, MicroBatch
from open_rm.scoring.open_model import Recipe

AHEAD = 2  # micro-batches that a worker has at once: it begins the next while its rewards travel


class Workers:
    """As many processes as devices; `rewards` is Computer's. One that is lost ends a call; the next call starts all again."""

    def __init__(self, recipe: Recipe, devices: Sequence[torch.device], max_tokens: int | None):
        """Start them and wait until each has opened the model. Raises UserError where one cannot."""
        self._recipe, self._devices, self._max_tokens = recipe, devices, max_tokens
        self._processes, self._pipes, self._closed = [], [], False
        atexit.register(self.close)  # before multiprocessing would wait for them, since they pass over SIGTERM
        self.facts = self._started()

    def _started(self) -> Facts:
        threads = max(1, torch.get_num_threads() // len(self._devices))
        context = multiprocessing.get_context("spawn")
        try:
            for device in self._devices:
                ours, theirs = context.Pipe()
                arguments = (theirs, self._recipe, str(device), self._max_tokens, threads)
                process = context.Process(target=_work, args=arguments, daemon=True, name=f"scoring on {device}")
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            facts: list[Facts] = [self._received(number) for number in range(len(self._devices))]
        except BaseException:
            self._end()
            raise
        return min(facts, key=lambda of_one: of_one.max_tokens)

    def rewards(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """[n] float32 of each micro-batch, in their order.

        Raises:
            UserError: a worker ended, or could not compute one.
        """
        if self._closed:
            raise UserError("the worker processes have ended; open the model again")
        if not self._processes:
            self._started()
        try:
            return self._computed(batches)
        except _Mistake:
            raise
        except BaseException:
            self._end()  # what was given and not taken back would be taken for the next call's
            raise

    def _computed(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        results: list[np.ndarray | None] = [None] * len(batches)
        todo, mistake = iter(enumerate(batches)), None
        at_work: list[list[int]] = [[] for _ in self._pipes]
        for _ in range(AHEAD):
            for number in range(len(self._pipes)):
                self._give(number, todo, at_work)
        while any(at_work):
            busy = {self._pipes[number]: number for number, given in enumerate(at_work) if given}
            for pipe in connection.wait(list(busy)):
                number = busy[pipe]
                batch = at_work[number].pop(0)
                try:
                    results[batch] = self._received(number)
                except _Mistake as error:
                    mistake = mistake or error
                if mistake is None:  # else only what is at work is taken back
                    self._give(number, todo, at_work)
        if mistake is not None:
            raise mistake
        return results

    def _give(self, number: int, todo, at_work: list[list[int]]) -> None:
        if (following := next(todo, None)) is None:
            return
        try:
            self._pipes[number].send(following[1])
        except (BrokenPipeError, ConnectionError):
            self._lost(number)
        at_work[number].append(following[0])

    def _received(self, number: int):
        try:
            kind, value = self._pipes[number].recv()
        except (EOFError, ConnectionError):
            self._lost(number)
        if kind == "mistake":
            raise _Mistake(value)
        if kind == "failed":
            raise UserError(value)
        return value

    def _lost(self, number: int):
        process = self._processes[number]
        process.join(timeout=10)
        status = process.exitcode
        how = f"was ended by {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"
        raise UserError(
            f"worker process {number + 1} of {len(self._processes)} {how}; if memory ran out, pass a smaller "
            "--num_processes or --max_tokens_per_micro_batch"
        )

    def close(self) -> None:
        """End the workers for good."""
        self._closed = True
        atexit.unregister(self.close)
        self._end()

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a worker that waits for work leaves
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []


class _Mistake(UserError):
    """Of one micro-batch; its worker goes on."""


def _work(pipe, recipe: Recipe, device: str, max_tokens: int | None, threads: int) -> None:
    """A worker: open the model, then micro-batches in, rewards out, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of a whole group: the main process ends its workers itself
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            computer = Computer(recipe, torch.device(device), max_tokens)
            pipe.send(("ready", computer.facts))
            while True:
                pipe.send(_answer(computer, pipe.recv()))
        except UserError as mistake:
            pipe.send(("failed", str(mistake)))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            pipe.send(("failed", f"a worker process failed: {type(error).__name__}: {quote_error(error)}"))
            raise


def _answer(computer: Computer, batch: MicroBatch) -> tuple[str, object]:
    """Anything but a UserError may have harmed the device's state, and ends the worker."""
    try:
        return "rewards", computer.rewards([batch])[0]
    except UserError as mistake:
        return "mistake", str(mistake)
