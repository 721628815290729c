"""Signals that ask a run to stop: all ranks agree on a step, save, and leave with STOPPED.

The first of SIGTERM, SIGINT and SIGUSR1 is a request, to whichever rank it comes. Before and after training there is no step
to agree on, and the process leaves at once. A second one more than a moment later ends it at once in any case; launchers send
the same signal several times, so what comes within the moment is one request.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch

from open_rm.errors import STOPPED, LeftAlone
from open_rm.ranks import Ranks, all_reduce_sum

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOMENT = 1.0  # seconds in which several signals are one request
PATIENCE = 5.0  # seconds that a process outside training has to leave by itself
FORWARDS_BETWEEN = 8  # forwards of an evaluation after which ranks ask each other


class Interrupted(Exception):
    """An evaluation was left on all ranks, because a stop was asked for."""


class Stop:
    """Whether this rank was asked to stop, and the ranks' agreement on it."""

    def __init__(self):
        self.asked: str | None = None  # the signal's name
        self.again = ""  # what the same command needs besides to go on; survival.py knows
        self._at = 0.0
        self._training = False
        self._leaves = False  # the main thread has taken notice, and may finish what it writes

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take the signals of this process; its own handlers come back afterwards. Elsewhere than in the main thread,
        where Python allows no handlers, signals keep their meaning."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # Python runs handlers in the main thread, which may wait in a collective for ever. So a thread reads the numbers of
        # signals from a socket, where the system's own handler writes them at once.
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        earlier_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        earlier = {number: signal.signal(number, self._leave_outside_training) for number in SIGNALS}
        over = threading.Event()
        listener = threading.Thread(target=self._listen, args=(ours, over), name="signals", daemon=True)
        listener.start()
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier_fd)
            over.set()
            listener.join()
            ours.close()
            theirs.close()

    @contextlib.contextmanager
    def at_a_step(self) -> Iterator[None]:
        """The block is a loop of steps, which looks at `agreed` after each."""
        self._training = True
        try:
            yield
        except BaseException:
            # By a stop that was agreed on, or an error: either closes what is open, in its own time.
            self._leaves = True
            raise
        finally:
            self._training = False
        if self.asked:
            self._leave_outside_training(None, None)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop. A collective call, so that all ranks stop at the same place."""
        return all_reduce_sum(torch.tensor([float(self.asked is not None)], device=ranks.device)).item() > 0

    def interruptible(self, call: Callable, ranks: Ranks) -> Callable:
        """`call`, which all ranks call equally often, and which raises Interrupted on all of them where a stop is asked for.

        An evaluation may take longer than the time between a signal and the end.
        """
        made = 0

        def asking(**inputs):
            nonlocal made
            made += 1
            if self._training and made % FORWARDS_BETWEEN == 0 and self.agreed(ranks):
                raise Interrupted
            return call(**inputs)

        return asking

    def _leave_outside_training(self, number, frame) -> None:
        if not self._training:
            self._leaves = True
            raise LeftAlone(STOPPED)

    def _listen(self, ours: socket.socket, over: threading.Event) -> None:
        while not over.wait(0.05):
            try:
                numbers = ours.recv(64)
            except BlockingIOError:
                if self.asked and not (self._training or self._leaves) and time.monotonic() - self._at > PATIENCE:
                    os._exit(STOPPED)  # the main thread waits somewhere; nothing is lost
                continue
            for number in numbers:
                if number in SIGNALS:
                    self._heard(signal.Signals(number))

    def _heard(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.asked and now - self._at > MOMENT:
            os.write(sys.stderr.fileno(), f"{number.name} again: leaving at once\n".encode())
            os._exit(128 + number)
        if not self.asked:
            self._at, self.asked = now, number.name
            what = "stopping after this step" if self._training else "stopping"
            os.write(sys.stderr.fileno(), f"{number.name}: {what}; once more to leave at once\n".encode())
