"""What this process is in, and when its main thread last moved on. `reliability/watchdog.py` looks at it from its thread.

Whoever works for long says so: `with phase("training step 3", Kind.STEPS)` around the work, and `beat()` in it. Nothing here
takes a lock, because a signal's handler may beat while the main thread does.
"""

import contextlib
import enum
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROCESSES = Path("/proc")
PAGE = 4096  # what one page that was read for a mapped file counts for


class Kind(enum.StrEnum):
    """How a phase shows that it moves on.

    STEPS  by beats.
    BUSY   by processor time, or bytes, of this process and those it started: one long call into a library cannot beat.
    WAITS  not at all: it waits for the main rank, which is watched itself.
    """

    STEPS = "steps"
    BUSY = "busy"
    WAITS = "waits"


@dataclass(frozen=True)
class Sign:
    """One look at the main thread. beats: all so far.  here: those in this phase.  idle, inside: seconds since the last
    beat, and since the phase was entered."""

    phase: str
    kind: Kind
    beats: int
    here: int
    idle: float
    inside: float


@dataclass(eq=False)
class _Phase:
    name: str
    kind: Kind
    entered: float
    beats: int = 0


_phases = [_Phase("the start", Kind.BUSY, time.monotonic())]  # the innermost last; the first one is never left
_beats = 0
_moved = time.monotonic()


def beat() -> None:
    """The main thread moved on."""
    global _beats, _moved
    _phases[-1].beats += 1
    _beats += 1
    _moved = time.monotonic()


@contextlib.contextmanager
def phase(name: str, kind: Kind) -> Iterator[None]:
    """The main thread is in `name`; phases may lie in each other, and entering and leaving one beats.

    name: what a user reads behind "last in", such as "training step 3"; ranks that do the same give the same name.
    """
    entered = _Phase(name, kind, time.monotonic())
    _phases.append(entered)
    beat()
    try:
        yield
    finally:
        _phases.remove(entered)
        if len(_phases) == 1:
            _phases[0].name = f"what follows {name}"
        beat()


def look() -> Sign:
    """What the main thread is in right now; any thread may ask."""
    inner, moved, now = _phases[-1], _moved, time.monotonic()
    return Sign(inner.name, inner.kind, _beats, inner.beats, now - moved, now - inner.entered)


def work_done() -> tuple[float, int] | None:
    """Seconds of processor time and bytes moved so far by this process and all that it started; None where /proc does not
    tell.

    Without what the calling thread itself used: whoever looks must not see itself. What a process used that has ended and
    was waited for is in its parent's numbers.
    """
    parents, seconds, faults = {}, {}, {}
    tick = os.sysconf("SC_CLK_TCK")
    for entry in PROCESSES.glob("[0-9]*/stat"):
        try:
            # the name before the last bracket may hold anything
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            process = int(entry.parent.name)
            parents[process] = int(fields[1])
            faults[process] = int(fields[9])
            seconds[process] = sum(map(int, fields[11:15])) / tick
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            continue
    own = os.getpid()
    if own not in seconds:
        return None
    family, grown = set(), {own}
    while grown:
        family |= grown
        grown = {process for process, parent in parents.items() if parent in grown} - family
    family &= seconds.keys()
    moved = sum(_bytes_moved(str(process)) + PAGE * faults[process] for process in family)
    return (
        sum(seconds[process] for process in family) - time.thread_time(),
        moved - _bytes_moved("thread-self"),
    )


def _bytes_moved(process: str) -> int:
    """Read and written, from a disk or from memory; 0 where the system does not say."""
    try:
        lines = (PROCESSES / process / "io").read_text().splitlines()
        return sum(int(value) for name, _, value in (line.partition(": ") for line in lines) if name in _MOVED)
    except (OSError, ValueError):
        return 0


_MOVED = ("rchar", "wchar", "read_bytes", "write_bytes")
