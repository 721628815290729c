"""The flags of the server, and how much it takes at a time. Imports nothing heavy: a wrong command line is answered at once.

Memory is bounded by three of them: texts that wait, bytes that wait, connections. What goes beyond is refused with a status
and a sentence, before it is held.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from open_rm.bounds import Amount, Count, Must, Positive

TOKEN_VARIABLE = "OPEN_RM_SERVE_TOKEN"
Port = Annotated[int, Must("from 0 to 65535", lambda n: 0 <= n <= 65535)]
LONGEST_RETRY = 60  # seconds


@dataclass(frozen=True, kw_only=True)
class ServingFlags:
    """How the server listens, and how much it takes."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 or ::: every interface; set the environment variable OPEN_RM_SERVE_TOKEN then."""
    port: Port = 8000
    """Port to listen on. 0: a free one, which the first line names."""
    collect_ms: Amount = 5.0
    """Milliseconds that the first request waits for others, which are scored with it and share its prompt."""
    unfinished: Literal["end", "refuse"] = "end"
    """Texts without the token that is scored, as of an answer that was cut off: end them as training ends an answer (counted),
    or refuse them (400)."""
    max_texts_per_request: Count = 1024
    """Most texts of a request; more are refused (400)."""
    max_waiting_texts: Count = 8192
    """Most texts that wait or are scored; a request beyond is refused (503 with Retry-After)."""
    max_body_mib: Positive = 16.0
    """Most MiB of a request's body; a larger one is refused (413)."""
    max_waiting_mib: Positive = 128.0
    """Most MiB of all bodies that are being read, wait or are scored; beyond, 503. Memory is about ten times as much."""
    max_connections: Count = 4096
    """Most open connections; the next one is told 503 and closed."""
    receive_timeout: Positive = 30.0
    """Seconds in which a request, head and body, has to arrive (408)."""
    idle_timeout: Positive = 75.0
    """Seconds after which an idle connection is closed; longer than clients keep theirs (aiohttp: 15)."""
    drain_timeout: Positive = 300.0
    """Seconds after SIGTERM in which what was accepted is answered; the rest is told 503."""


class Refusal(Exception):
    """A request that is not answered with rewards: the status and one sentence for the client."""

    def __init__(self, status: int, sentence: str, *, retry_after: int | None = None, close: bool = False):
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after
        self.close = close  # the connection, because part of the request may not have been read


class Places:
    """Texts and bytes that the server holds: taken as they arrive, given back when the request is answered or gone."""

    def __init__(self, flags: ServingFlags):
        self.most_texts = flags.max_waiting_texts
        self.most_bytes = int(flags.max_waiting_mib * 2**20)
        self.texts = self.bytes = 0
        self.texts_per_second = math.inf  # as of late; the collector writes it

    @contextmanager
    def for_texts(self, count: int) -> Iterator[None]:
        """Places for so many texts.

        Raises:
            Refusal: 503, there are not as many left.
        """
        if self.texts + count > self.most_texts:
            raise self.full(f"{self.texts} texts wait, and the queue takes {self.most_texts}", close=False)
        self.texts += count
        try:
            yield
        finally:
            self.texts -= count

    def hold(self, count: int) -> None:
        """Room for so many bytes more; `release` gives it back.

        Raises:
            Refusal: 503, there is not as much left.
        """
        if self.bytes + count > self.most_bytes:
            raise self.full(f"bodies of {self.bytes >> 20} MiB wait, and the queue takes {self.most_bytes >> 20}")
        self.bytes += count

    def release(self, count: int) -> None:
        self.bytes -= count

    def full(self, why: str, *, close: bool = True) -> Refusal:
        """503, and when to come again: when half of what waits has been scored."""
        seconds = math.ceil(min(LONGEST_RETRY, max(1.0, self.texts / 2 / self.texts_per_second)))
        return Refusal(503, f"the server is full: {why}; try again", retry_after=seconds, close=close)
