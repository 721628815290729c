"""Connections, signals, draining: uvicorn, with time limits where it has none and an end at which nothing is lost.

uvicorn waits for ever for a connection's first request and for the rest of a half-sent head, and takes heads of any size;
here both are bounded. Bodies are bounded where they are read (application.py).

On SIGTERM or SIGINT: no further connection is taken but for those that wait in the system's queue, every request is answered
and its connection closed; the status is 0. A second signal ends the process at once.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from open_rm.errors import UserError, quote_error
from open_rm.serving.application import Service

LOG = logging.getLogger("open_rm.serving")
LARGEST_HEAD = 64 * 2**10
LINGER = (
    1.0  # seconds in which idle connections may still ask, after the signal; they are told to close with the answer
)
BACKLOG = 2048


class Connection(HttpToolsProtocol):
    """A connection, with a limit on the time and size of a request's head, and on how many there are."""

    def __init__(self, *args, service: Service, **more):
        super().__init__(*args, **more)
        self.service, self.timer, self.head = service, None, 0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.service.flags.max_connections:
            refusal = self.service.places.full(f"{len(self.connections) - 1} connections are open")
            self.refuse(refusal.status, refusal.sentence, f"retry-after: {refusal.retry_after}\r\n")
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.head += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._is_asking():
            return
        if self.head > LARGEST_HEAD:
            self.refuse(431, f"a request's head has more than {LARGEST_HEAD} bytes")
        elif self.timer is None and self.timeout_keep_alive_task is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()
        if self.service.draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        self.head = 0
        super().on_response_complete()

    def connection_lost(self, exc) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """In uvicorn's place, as JSON."""
        self.refuse(400, "this is not HTTP")

    def refuse(self, status: int, sentence: str, header: str = "") -> None:
        """An answer before there is a request."""
        body = json.dumps({"error": sentence}).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{header}\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _is_asking(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self.timer = self.loop.call_later(self.service.flags.receive_timeout, self._too_slow)

    def _stop_waiting(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _too_slow(self) -> None:
        self.timer = None
        if self.head:
            self.refuse(408, f"the request did not arrive within {self.service.flags.receive_timeout:g} seconds")
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which drains as the module says. `drained`: whether all that was accepted got its answer."""

    def __init__(self, service: Service, listener: socket.socket, ready: Callable[[], None]):
        config = uvicorn.Config(
            service.application(),
            http=functools.partial(Connection, service=service),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=service.flags.idle_timeout,
        )
        super().__init__(config)
        self.service, self.listener, self.ready, self.drained = service, listener, ready, True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so. Raises UserError where somebody else listens there by now."""
        try:
            await super().startup(sockets)
        except OSError as error:
            port = self.service.flags.port
            raise UserError(f"--port {port}: was taken while the model was loaded ({error.strerror})") from error
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See the module."""
        self.service.draining = True
        LOG.info("draining: %d texts wait", self.service.places.texts)
        await self._take_those_in_the_queue()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if connection.cycle is not None:
                connection.cycle.keep_alive = False
        until = time.monotonic() + LINGER
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.02)
        try:
            async with asyncio.timeout(self.service.flags.drain_timeout):
                await super().shutdown(sockets)
        except TimeoutError:
            self.drained = False
            LOG.warning("what still waits after %g seconds is told 503", self.service.flags.drain_timeout)
            self.service.stop()
            await asyncio.sleep(LINGER)

    async def _take_those_in_the_queue(self) -> None:
        """Who has connected already is answered, too."""
        make = functools.partial(
            self.config.http_protocol_class, config=self.config, server_state=self.server_state, app_state={}
        )
        while True:
            try:
                accepted, _ = self.listener.accept()
            except BlockingIOError:  # nobody waits any more
                return
            except ConnectionError:  # it has left
                continue
            except OSError as error:  # too many open files
                LOG.warning("who waits in the system's queue is not taken: %s", quote_error(error))
                return
            await asyncio.get_running_loop().connect_accepted_socket(make, accepted)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In uvicorn's place, which raises the signal again at the end: the status would not be 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame) -> None:
        """The first signal drains, the second ends."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
