"""How far a stream is: a bar on a terminal, else a line now and then."""

import sys
import time

from tqdm import tqdm

FIRST_SECONDS, EVERY_SECONDS = 10.0, 60.0


class Progress:
    """total: rows."""

    def __init__(self, total: int):
        self.total, self._bar = total, None
        self._begin(0)

    def begin(self, done: int) -> None:
        """The clock runs. done: rows that an earlier process did."""
        self._begin(done)
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=done, unit=" rows", desc="score", smoothing=0.05)

    def _begin(self, done: int) -> None:
        self.done = self.before = done
        self.started = self._said = time.monotonic()

    def moved(self, rows: int) -> None:
        """So many rows more are done."""
        self.done += rows
        if self._bar is not None:
            self._bar.update(rows)
            return
        now = time.monotonic()
        wait = FIRST_SECONDS if self._said == self.started else EVERY_SECONDS
        if now - self._said >= wait:
            self._said = now
            left = (self.total - self.done) / self.rate
            print(f"{self.done:,} of {self.total:,} rows, {self.rate:,.0f} rows/s, {_span(left)} left", flush=True)

    @property
    def rate(self) -> float:
        """Rows a second of this process."""
        return (self.done - self.before) / max(time.monotonic() - self.started, 1e-9)

    def say(self, line: str) -> None:
        """A line for the log, beside the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def close(self) -> str:
        """How long it took, and the rate."""
        if self._bar is not None:
            self._bar.close()
        return f"{_span(time.monotonic() - self.started)}, {self.rate:,.0f} rows/s"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
