"""Messages over a connection that never block, and the last words of a rank, which must not block either."""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 2**16  # of a message; more waits neither to be sent nor to be read
WRITING = 2.0  # a file system that hangs, or a pipe that nobody reads, must not keep a run from ending

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(connection: socket.socket) -> None:
    """A forked child does not hold this connection: it has to close when this process dies, whoever else lives."""
    _sockets.add(connection)


def _close_all() -> None:
    for connection in list(_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close_all)


class Line:
    """Messages over a connection, a line of JSON each. closed: the other side is gone, or no other side of ours."""

    def __init__(self, connection: socket.socket, timeout: float):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the system must not give up a silent connection before we do
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(min(2 * timeout, 10**6) * 1000))
        close_in_children(connection)
        self.socket, self.closed = connection, False
        self._out, self._in = b"", b""

    def send(self, message: dict[str, Any]) -> None:
        if len(self._out) < LONGEST:  # one who is stopped does not read; what it misses is of no use to it
            self._out += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # a connection that broke is found by receive
            self._out = self._out[self.socket.send(self._out) :]

    def receive(self) -> list[dict[str, Any]]:
        """What arrived since the last call."""
        try:
            while more := self.socket.recv(LONGEST):
                self._in += more
                if len(self._in) > 16 * LONGEST:
                    break
            self.closed = True
        except ConnectionError:
            self.closed = True
        except OSError:  # nothing more for now, or no way to there, which may come back
            pass
        *lines, self._in = self._in.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if len(self._in) > LONGEST or not all(isinstance(message, dict) for message in messages):
            self.closed = True
            return []
        return messages

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def within_bounds(write: Callable[[], object]) -> None:
    """Write in a thread of its own, and go on without it if it hangs."""
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(WRITING)


def say(words: str) -> None:
    """Tell the user, past Python's own buffers: the main thread may hang while it holds them."""
    within_bounds(lambda: os.write(2, f"{words}\n".encode(errors="backslashreplace")))


def record(path: Path | None, text: str, stacks: bool = False) -> None:
    """Append to a file what stays of a rank: a text and, with `stacks`, where its threads are. No path: to stderr."""

    def write() -> None:
        heading = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        try:
            if path is None:
                raise FileNotFoundError
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", errors="backslashreplace") as file:
                file.write(heading)
                file.flush()
                if stacks:
                    faulthandler.dump_traceback(file)
        except OSError:
            os.write(2, heading.encode(errors="backslashreplace"))
            if stacks:
                faulthandler.dump_traceback(2)

    within_bounds(write)
