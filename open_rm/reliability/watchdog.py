"""A rank that is dead, stopped or cut off ends the run, instead of leaving the others in a collective for hours.

Collectives cannot tell who is missing, so this goes beside them: each rank tells the main one over a connection of its own what
it is in (`open_rm/alive.py`), and the main rank judges. Who moves on is seen by beats, who lives by being heard. With a
verdict every rank writes the stacks of its threads and leaves with status STALLED; the main rank says why, in one sentence.
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from open_rm import alive
from open_rm.alive import Kind, Sign
from open_rm.errors import STOPPED, LeftAlone, OneRanksError, UserError
from open_rm.reliability.judging import KILLED, UNHEARD, Seen, has_not_moved, judge
from open_rm.reliability.lines import WRITING, Line, close_in_children, record, say
from open_rm.reliability.pulse import AwakeClock, Pulse

STALLED = 76
KNOWN_TO_ALL = (UserError, SystemExit)  # every rank raises these together, so nobody is left waiting
OF_ONE = (OneRanksError, LeftAlone)  # but these
STOP = "a request to stop"  # in the place of a failure: the others leave too, with STOPPED and without stacks
LEAVING = 2.0  # seconds that a rank's main thread has to leave by itself when another one was asked to stop
ADDRESS = "watchdog"  # where the store keeps the main rank's
TELLING = 2.0  # how long the main rank stays for the others to hear a verdict
PARTING = (
    0.5  # how long a leave may take, and a rank stays for the others' stacks: a launcher kills all when the first ends
)
MEETING = 5.0  # how long a rank waits for its first word with the main one before it goes on
STRANGER = 10.0  # how long a connection may stay open without the token

_folder: Path | None = None
_again = ""


def keep_stacks_in(folder: Path | str, again: str = "") -> None:
    """Write stacks to <folder>/stalled/ from now on; before, they go to stderr.

    again: what the same command needs besides to go on, for the sentence.
    """
    global _folder, _again
    _folder, _again = Path(folder) / "stalled", again


@contextlib.contextmanager
def watched(rank: int, world_size: int, store: Any, timeout: float) -> Iterator[None]:
    """All ranks watch each other in here: one that does not move on for `timeout` seconds ends the run. 0: nobody does.

    store: a torch store under names of this group alone; it hands out the main rank's address and nothing else.
    """
    if not 0 < timeout < float("inf"):
        yield
        return
    if world_size == 1:
        watch = _Watch(rank, timeout)
    elif rank == 0:
        watch = _Main(world_size, timeout, store)
    else:
        watch = _Other(rank, timeout, store)
    watch.start()
    failure = None
    try:
        yield
    except BaseException as error:
        if isinstance(error, KNOWN_TO_ALL) and not isinstance(error, OF_ONE):
            raise
        failure = "an error of its own" if isinstance(error, OneRanksError) else type(error).__name__
        if isinstance(error, LeftAlone):
            failure = STOP
        elif world_size > 1 and _folder is not None:
            # The others leave as soon as they hear of it, and a launcher then kills this rank, perhaps before Python
            # has shown the traceback.
            record(_stacks_of(rank), "".join(traceback.format_exception(error)))
        raise
    finally:
        watch.leave(failure)


def _stacks_of(rank: int) -> Path | None:
    return _folder and _folder / f"rank_{rank:05d}.txt"


def _sentence(what: str, who_ends: str) -> str:
    where = f"are in {_folder}/" if _folder else "are above, in each rank's output"
    return (
        f"error: {what}; {who_ends}. Stacks of each rank that could still write {where}; "
        f"give the same command again{_again} to go on from the last checkpoint"
    )


class _Watch:
    """The thread of a rank that looks, each tick. Alone, a rank looks at itself."""

    def __init__(self, rank: int, timeout: float):
        self.rank, self.timeout, self.host = rank, timeout, socket.gethostname()
        self.tick = min(1.0, timeout / 10)
        self.clock = AwakeClock(self.tick)
        self.pulse = Pulse(self.clock, timeout)
        self.failure: str | None = None
        self.selector = selectors.DefaultSelector()
        self._wake, woken = socket.socketpair()
        self.selector.register(woken, selectors.EVENT_READ, lambda: woken.recv(1))
        self._leaving, self._complained = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def leave(self, failure: str | None, patience: float = 2 * PARTING) -> None:
        """The main thread is done. failure: the name of an error that the other ranks do not know of."""
        self.failure = failure
        self._leaving.set()
        self._wake.send(b"!")
        self._thread.join(patience)

    def look(self) -> None:
        sign = self.pulse.sign()
        if sign.idle >= self.timeout:
            who = "this process" if self.rank == 0 else f"rank {self.rank} on {self.host}"
            self.end(_sentence(f"{who} {has_not_moved(sign.idle, sign)}", "it ends"))

    def farewell(self) -> None:
        """What the thread does when the main thread is done."""

    def listen(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            key.data()
        self.clock.advance()

    def leave_soon(self) -> None:
        """Another rank was asked to stop where there was no step to agree on: this one leaves too."""
        if not self._leaving.wait(LEAVING):
            if self.rank == 0:
                say("another rank was asked to stop; all ranks leave")
            os._exit(STOPPED)

    def end(self, sentence: str, aloud: bool = True) -> NoReturn:
        self.last_words(sentence, aloud)
        os._exit(STALLED)

    def last_words(self, sentence: str, aloud: bool) -> None:
        heading = f"rank {self.rank} on {self.host}, last in {alive.look().phase}. {sentence}"
        record(_stacks_of(self.rank), heading if _folder else f"stacks of rank {self.rank}:", stacks=True)
        if aloud:
            say(sentence)

    def complain(self, words: str) -> None:
        """Once: whatever is wrong with the watching is no reason to end a run, nor to fill its log."""
        if not self._complained:
            self._complained = True
            say(f"warning: the watchdog of rank {self.rank} {words}")

    def _run(self) -> None:
        next_look = 0.0
        while not self._leaving.is_set():
            try:
                self.listen(self.tick)
                if self.clock.now >= next_look:
                    next_look = self.clock.now + self.tick / 2  # many messages make no more looks
                    self.look()
            except Exception as error:
                self.complain(f"met an error and goes on: {error!r}")
                self._leaving.wait(self.tick)
        try:
            self.farewell()
        except Exception as error:
            self.complain(f"could not take its leave: {error!r}")


class _Main(_Watch):
    """The rank that hears all others, judges, and tells them."""

    def __init__(self, world_size: int, timeout: float, store: Any):
        super().__init__(0, timeout)
        self._ranks = [Seen(rank) for rank in range(world_size)]
        self._ranks[0].host = self.host
        self._lines: dict[Line, Seen | float] = {}  # a stranger: when it came
        self._stopping = False  # one of the others was asked to
        self._answer: dict[str, Any] = {}  # to every sign: nothing, or how this run ended
        self._token = secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._door = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        self._door.setblocking(False)
        close_in_children(self._door)
        self.selector.register(self._door, selectors.EVENT_READ, self._accept)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store.set(ADDRESS, json.dumps([host, self._door.getsockname()[1], self._token]))

    def leave(self, failure: str | None, patience: float = 2 * PARTING) -> None:
        super().leave(failure, TELLING + 3 * WRITING if failure else patience)

    def look(self) -> None:
        for line, came in list(self._lines.items()):
            if isinstance(came, float) and self.clock.now - came > STRANGER:
                self._drop(line)
        self._ranks[0].sign, self._ranks[0].heard = self.pulse.sign(), self.clock.now
        if self._stopping:
            self._send_all({"stop": True})
            self.leave_soon()
        elif verdict := judge(self._ranks, self.clock.now, self.timeout):
            self._tell(verdict)
            os._exit(STALLED)

    def farewell(self) -> None:
        """Tell the others that this rank leaves. After a failure they end too, and its own traceback follows."""
        if self.failure == STOP:
            self._send_all({"stop": True})
            self._listen_while(lambda: self._lines, LEAVING + PARTING)
        elif self.failure:
            own = self._ranks[0]
            own.sign, own.gone, own.manner = alive.look(), self.clock.now, _failed(self.failure)
            while not (verdict := judge(self._ranks, self.clock.now, self.timeout)):
                self.listen(self.tick)
            self._tell(verdict)
        else:
            self._send_all({"goodbye": True})
            others = self._ranks[1:]  # one that comes late has to hear it too
            self._listen_while(lambda: self._lines or any(seen.heard is None for seen in others), PARTING)
        for line in list(self._lines):
            self._drop(line)
        self._door.close()

    def _tell(self, verdict: str) -> None:
        """Say the verdict to all, then to the user; stay until all who can hear it have left."""
        sentence = _sentence(verdict, "all ranks end")
        self._send_all({"ended": sentence})
        self.last_words(sentence, aloud=True)
        soon = [
            seen for seen in self._ranks[1:] if seen.heard is None or self.clock.now - seen.heard < self.timeout / 2
        ]
        others = [seen for seen in soon if not seen.left]
        self._listen_while(lambda: any(seen.gone is None for seen in others), TELLING)

    def _send_all(self, message: dict[str, Any]) -> None:
        self._answer = message
        for line in self._lines:
            line.send(message)

    def _listen_while(self, awaited: Callable[[], Any], seconds: float) -> None:
        """A connection that is closed while something unread lies in it may lose what was sent: so listen, a while."""
        until = time.monotonic() + seconds
        while awaited() and time.monotonic() < until:
            self.listen(0.05)

    def _accept(self) -> None:
        connection, _ = self._door.accept()
        line = Line(connection, self.timeout)
        self._lines[line] = self.clock.now
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._hear(line))

    def _hear(self, line: Line) -> None:
        for message in line.receive():
            if not isinstance(self._lines[line], Seen):
                self._admit(line, message)
            if isinstance(self._lines[line], Seen):
                self._take(line, self._lines[line], message)
        if line.closed:
            self._drop(line)

    def _admit(self, line: Line, message: dict[str, Any]) -> None:
        """Only who knows the token is one of us."""
        if hmac.compare_digest(str(message.get("token")).encode(errors="replace"), self._token.encode()):
            seen = self._lines[line] = self._ranks[message["rank"]]
            seen.host = message["host"]
        else:
            line.closed = True

    def _take(self, line: Line, seen: Seen, message: dict[str, Any]) -> None:
        sign = message["sign"]
        seen.sign, seen.heard = Sign(**(sign | {"kind": Kind(sign["kind"])})), self.clock.now
        if message.get("goodbye"):
            seen.left = line.closed = True
        elif message.get("stop"):
            seen.left = line.closed = self._stopping = True
        elif "failed" in message:
            seen.gone, seen.manner, line.closed = self.clock.now, message["failed"], True
        else:
            line.send(self._answer)

    def _drop(self, line: Line) -> None:
        seen = self._lines.pop(line)
        self.selector.unregister(line.socket)
        line.close()
        if isinstance(seen, Seen) and not seen.left and seen.gone is None:
            seen.gone = self.clock.now


def _failed(error: str) -> str:
    return f"failed with {error} in {alive.look().phase}; its own output says why"


class _Other(_Watch):
    """A rank that tells the main one what it is in. It judges alone what the main rank cannot tell."""

    def __init__(self, rank: int, timeout: float, store: Any):
        super().__init__(rank, timeout)
        self._line: Line | None = None
        self._heard, self._met, self._main_left = 0.0, threading.Event(), False
        self._main = f"the main rank (rank 0 on {os.environ.get('MASTER_ADDR', '127.0.0.1')})"
        try:
            store.wait([ADDRESS], timedelta(seconds=timeout))
            self._host, self._port, self._token = json.loads(store.get(ADDRESS))
        except RuntimeError:  # torch's errors of a store that does not answer, or has nothing
            self._end_without_main(f"does not let itself be found {UNHEARD}")

    def start(self) -> None:
        super().start()
        self._met.wait(min(self.timeout, MEETING))

    def look(self) -> None:
        if self._line is None and not self._main_left:
            self._connect()
        if self._line is None:
            super().look()
            if self.clock.now >= self.timeout and not self._main_left:
                self.complain(
                    f"cannot reach {self._main} on port {self._port}, so nobody but itself watches it. If a firewall closes "
                    "that port, open the ports between the machines of a run"
                )
            return
        self._line.send({"sign": asdict(self.pulse.sign())})
        if self.clock.now - self._heard >= self.timeout:
            self._line.send({"sign": asdict(alive.look()), "failed": f"did not hear the main rank any more {UNHEARD}"})
            self._end_without_main(f"was not heard for {self.clock.now - self._heard:.0f} s {UNHEARD}")

    def farewell(self) -> None:
        if self._line is None:
            return
        word = {"failed": _failed(self.failure)} if self.failure else {"goodbye": True}
        if self.failure == STOP:
            word = {"stop": True}
        self._line.send({"sign": asdict(alive.look())} | word)
        until = time.monotonic() + PARTING
        while not self._line.closed and time.monotonic() < until:  # it closes when it has read that
            self._line.receive()
            time.sleep(0.002)
        self._line.close()

    def _connect(self) -> None:
        try:
            connection = socket.create_connection((self._host, self._port), timeout=1.0)
        except OSError:
            return
        if connection.getsockname() == connection.getpeername():  # of a port that is closed on this machine, by chance
            connection.close()
            return
        self._line, self._heard = Line(connection, self.timeout), self.clock.now
        self._line.send({"token": self._token, "rank": self.rank, "host": self.host, "sign": asdict(self.pulse.sign())})
        self.selector.register(connection, selectors.EVENT_READ, self._hear)

    def _hear(self) -> None:
        for message in self._line.receive():
            self._heard = self.clock.now
            self._met.set()
            if "ended" in message:
                self.last_words(message["ended"], aloud=False)
                self._line.close()  # tells the main rank that this one is done
                time.sleep(PARTING)
                os._exit(STALLED)
            self._main_left = self._main_left or "goodbye" in message
            if "stop" in message:
                self.leave_soon()
        if self._line.closed and self._met.is_set() and not self._main_left:
            self._end_without_main(f"ended without a word {KILLED}")
        if self._line.closed or self._main_left:
            self.selector.unregister(self._line.socket)
            self._line.close()
            self._line = None

    def _end_without_main(self, what: str) -> NoReturn:
        end = f"rank {self.rank} on {self.host} ends too, last in {alive.look().phase}"
        self.end(_sentence(f"{self._main} {what}", end))
