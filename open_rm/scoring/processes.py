"""Worker processes, each with the model of its own: micro-batches go to whoever is free.

Which micro-batches there are is decided before, so that it changes nothing in the rewards who computes which.
"""

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
    """As many processes as devices; `rewards` is Computer's."""

    def __init__(self, recipe: Recipe, devices: Sequence[torch.device], max_tokens: int | None):
        """Start them and wait until each has opened the model. Raises UserError where one cannot."""
        threads = max(1, torch.get_num_threads() // len(devices))
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for device in devices:
            ours, theirs = context.Pipe()
            arguments = (theirs, recipe, str(device), max_tokens, threads)
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"scoring on {device}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            facts: list[Facts] = [self._received(number) for number in range(len(devices))]
        except BaseException:
            self.close()
            raise
        self.facts = min(facts, key=lambda of_one: of_one.max_tokens)

    def rewards(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """[n] float32 of each micro-batch, in their order.

        Raises:
            UserError: a worker ended, or could not compute one. No worker is left then.
        """
        if not self._processes:
            raise UserError("the worker processes have ended; open the model again")
        results: list[np.ndarray | None] = [None] * len(batches)
        todo = iter(enumerate(batches))
        at_work: list[list[int]] = [[] for _ in self._pipes]
        try:
            for _ in range(AHEAD):
                for number in range(len(self._pipes)):
                    self._give(number, todo, at_work)
            while any(at_work):
                busy = {self._pipes[number]: number for number, given in enumerate(at_work) if given}
                for pipe in connection.wait(list(busy)):
                    number = busy[pipe]
                    results[at_work[number].pop(0)] = self._received(number)
                    self._give(number, todo, at_work)
        except BaseException:
            self.close()  # what was given and not taken back would be taken for the next call's
            raise
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
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()  # a worker that waits for work leaves
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []


def _work(pipe, recipe: Recipe, device: str, max_tokens: int | None, threads: int) -> None:
    """A worker: open the model, then micro-batches in, rewards out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole terminal: the main process ends its workers itself
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            computer = Computer(recipe, torch.device(device), max_tokens)
            pipe.send(("ready", computer.facts))
            while True:
                batch = pipe.recv()
                pipe.send(("rewards", computer.rewards([batch])[0]))
        except UserError as mistake:
            pipe.send(("mistake", str(mistake)))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            pipe.send(("mistake", f"a worker process failed: {type(error).__name__}: {quote_error(error)}"))
            raise
