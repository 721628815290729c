"""Files that a run's numbers go to: rows of JSON, and TensorBoard. A file that fails never ends the training.

A row file is a record: a row that cannot be written waits in memory for the next write. TensorBoard is a view of it: it is
switched off. Whoever resumes finds a row file as it was at the checkpoint, to the byte.
"""

import contextlib
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text

from open_rm.manifest import sync_folder

COPIED_AT_ONCE = 1 << 20


class RowFile:
    """A JSON object per line, on the disk as soon as it is written."""

    def __init__(self, path: Path, say: Callable[[str], None], *, position: int | None = None, lazy: bool = False):
        """Open the file.

        Args:
            position: bytes that a checkpoint counted; the file goes on from there. None: a new file.
            lazy: there is no file before there is a row.
        """
        self.path, self.whole = path, True
        self._say, self._said = say, False
        self._pending: deque[bytes] = deque()  # rows not on the disk yet, the oldest first
        self._good = 0  # bytes of whole rows; behind them may lie a part of a row that failed
        self._file = None
        if position:
            self._good = whole_lines_before(path, position)
            self.whole = self._good == position
        if lazy and not self._good:
            path.unlink(missing_ok=True)
        else:
            self._open()

    def write(self, *rows: dict) -> None:
        """Append rows, behind those that are waiting."""
        self._pending += [encoded(row) for row in rows]
        self._flush()

    def position(self) -> int:
        """Bytes that a crash of the machine cannot take any more."""
        self._flush()
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
                sync_folder(self.path.parent)  # the name of a file that is new
            except OSError as error:
                self._failed(error)
        return self._good

    @property
    def waiting(self) -> int:
        """Rows that could not be written so far."""
        return len(self._pending)

    def rows(self) -> list[dict]:
        """All that is on the disk."""
        return read_rows(self.path, self._good) if self._good else []

    def close(self) -> None:
        """With a last try; what cannot be written now is lost, and how much that is is said."""
        self._flush()
        if self._pending:
            self._say(f"{len(self._pending)} rows of {self.path} could not be written and are lost")
        self._shut()

    def _flush(self) -> None:
        try:
            while self._pending:
                if self._file is None:
                    self._open()
                left = memoryview(self._pending[0])
                while left:  # a disk that is almost full takes a part and refuses the rest
                    left = left[self._file.write(left) :]
                self._good += len(self._pending.popleft())
        except OSError as error:
            self._failed(error)

    def _open(self) -> None:
        """At the last whole row. Also after a failure: a handle may be dead where the path works again."""
        file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
        try:
            self._good = min(self._good, os.fstat(file.fileno()).st_size)
            file.truncate(self._good)
            file.seek(self._good)
        except OSError:
            file.close()
            raise
        self._file = file

    def _failed(self, error: OSError) -> None:
        """Take the row that failed off the file again, as far as that is possible now, and say once what is wrong."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._good)
        self._shut()
        if not self._said:
            self._said = True
            reason = error.strerror or error
            self._say(
                f"{self.path} cannot be written ({reason}); its rows wait in memory and are tried again each time"
            )

    def _shut(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def encoded(row: dict) -> bytes:
    """A line of JSON, which has no word for a float that is not finite: null."""
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    return (line + "\n").encode(
        "utf-8", "backslashreplace"
    )  # half a surrogate pair becomes its escape, which is JSON too


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path, end: int | None = None) -> list[dict]:
    """The rows in the first `end` bytes; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_bytes()[:end].splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def whole_lines_before(path: Path, position: int) -> int:
    """Bytes of the whole lines among a file's first `position` bytes; 0 where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(position).rfind(b"\n") + 1
    except OSError:
        return 0


def copy_start(source: Path, target: Path, position: int) -> None:
    """Write the first `position` bytes of `source` to `target`; a source that cannot be read leaves fewer, or none."""
    with target.open("wb") as copy, contextlib.ExitStack() as opened:
        try:
            original = opened.enter_context(source.open("rb"))
        except OSError:
            return
        while position > 0 and (piece := original.read(min(position, COPIED_AT_ONCE))):
            copy.write(piece)
            position -= len(piece)


class Board:
    """TensorBoard's event file. Written where it is called: torch's writer does it in a thread, which fails out of sight
    and two minutes late, with a traceback, and keeps what a kill then takes."""

    def __init__(self, folder: Path, say: Callable[[str], None], *, purge_from: int | None = None):
        """Open a file behind those in `folder`.

        Args:
            purge_from: what older files show from this episode on is not shown any more. None: a new run.
        """
        self._say = say
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / _next_name(folder)).open("wb")
        self._records = RecordWriter(self._file)
        step = purge_from or 0
        self._event(Event(step=step, file_version="brain.Event:2"), time.time())
        if purge_from is not None:
            self._event(Event(step=step, session_log=SessionLog(status=SessionLog.START)), time.time())

    def note(self, name: str, lines: list[str], episode: int) -> None:
        """A text; indented lines are shown as they are."""
        self._add(text(name, "\n".join(f"    {line}" for line in lines)), episode)

    def scalars(self, row: dict[str, float | None], episode: int, *, seconds_ago: float = 0.0) -> None:
        """The numbers of a row; None is a number that the row file could not hold."""
        values = [Summary.Value(tag=name, simple_value=as_float(value)) for name, value in row.items()]
        self._add(Summary(value=values), episode, seconds_ago)

    def close(self) -> None:
        """Everything is on the disk already, or was refused."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _add(self, summary: Summary, episode: int, seconds_ago: float = 0.0) -> None:
        if self._file is None:
            return
        try:
            self._event(Event(step=episode, summary=summary), time.time() - seconds_ago)
        except OSError as error:
            self.close()
            reason = error.strerror or error
            self._say(f"TensorBoard is off from episode {episode} on ({reason}); metrics.jsonl has the same numbers")

    def _event(self, event: Event, wall_time: float) -> None:
        event.wall_time = wall_time
        self._records.write(event.SerializeToString())
        self._records.flush()


def as_float(value: float | None) -> float:
    """Of a value read back from a row file."""
    return math.nan if value is None else value


def _next_name(folder: Path) -> str:
    """Names are read in order, and start with a second; a clock that went back must not put this file before the others."""
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    latest = max((int(second) for second in seconds if second.isdigit()), default=0)
    return f"events.out.tfevents.{max(int(time.time()), latest + 1):010d}.{socket.gethostname()}.{os.getpid()}"
