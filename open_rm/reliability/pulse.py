"""What a rank says of itself: its sign, in time in which its process ran."""

import time
from dataclasses import replace

from open_rm import alive
from open_rm.alive import Kind, Sign

# A busy phase lives if it uses this share of one processor, or moves these bytes, within the timeout.
BUSY_SHARE = 0.02
BUSY_BYTES = 2**20


class AwakeClock:
    """Seconds in which this process ran. Between two looks pass two ticks at most: if it took longer, the process was
    suspended, and so perhaps were all, which is nobody's fault."""

    def __init__(self, tick: float):
        self.now, self._tick, self._last = 0.0, tick, time.monotonic()

    def advance(self) -> None:
        now = time.monotonic()
        self.now += min(now - self._last, 2 * self._tick)
        self._last = now


class Pulse:
    """This rank's own sign, with idle seconds of the awake clock, counted as its kind of phase wants it."""

    def __init__(self, clock: AwakeClock, timeout: float):
        self._clock, self._timeout = clock, timeout
        self._beats, self._moved = -1, 0.0
        self._work, self._looked = None, 0.0

    def sign(self) -> Sign:
        sign = alive.look()
        moved = sign.beats != self._beats or sign.kind == Kind.WAITS
        if moved or (sign.kind == Kind.BUSY and self._worked()):
            self._beats, self._moved = sign.beats, self._clock.now
        return replace(sign, idle=self._clock.now - self._moved)

    def _worked(self) -> bool:
        if self._clock.now - self._looked < self._timeout / 20:  # a look goes through all processes of the machine
            return False
        self._looked = self._clock.now
        done, before = alive.work_done(), self._work
        if done is None:
            return True
        # a child that came or went changes the sums in either direction
        if before is None or (
            abs(done[0] - before[0]) >= BUSY_SHARE * self._timeout or abs(done[1] - before[1]) >= BUSY_BYTES
        ):
            self._work = done
            return before is not None
        return False
