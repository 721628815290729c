"""Paths, token, bodies, errors: one handler for every dialect, from the bytes of a request to those of its answer.

    body -> dialects -> texts (a thread of its own) -> collector (a thread of its own) -> dialects -> JSON

Every request gets a status: rewards, or one sentence in the shape that the path's clients read. A traceback stays in the log.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from open_rm.errors import quote_error
from open_rm.scoring.scorer import Scorer
from open_rm.serving import dialects
from open_rm.serving.collector import Collector
from open_rm.serving.counters import Counters
from open_rm.serving.limits import Places, Refusal, ServingFlags
from open_rm.serving.texts import Item, Reader, characters

LOG = logging.getLogger("open_rm.serving")
THROWN_AWAY = 4  # times the limit: so much of a refused body is read, that its sender may hear why
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """The application's state, and its handlers. Made in the event loop that serves it.

    Args:
        token: bearer token that every path but /health asks for; None: none.
    """

    def __init__(self, scorer: Scorer, reader: Reader, flags: ServingFlags, token: str | None):
        self.scorer, self.reader, self.flags, self.token = scorer, reader, flags, token
        self.places = Places(flags)
        self.counters = Counters(lambda: self.places.texts)
        reader.count = self.counters.count_mended
        self.most_bytes = int(flags.max_body_mib * 2**20)
        self.encoder = ThreadPoolExecutor(1, "encoding")
        self.worker = ThreadPoolExecutor(1, "scoring")
        self.collector = Collector(
            scorer.rewards, self.worker, wait=flags.collect_ms / 1000, counters=self.counters, places=self.places
        )
        self.began, self.draining = int(time.time()), False
        self._stopped = asyncio.get_running_loop().create_future()

    def application(self) -> Starlette:
        """The paths."""
        routes = [Route(path, self._answering(path, self.ask), methods=["POST"]) for path in dialects.READERS]
        routes += [
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self._answering("/metrics", self.metrics), methods=["GET"]),
            Route("/v1/models", self._answering("/v1/models", self.models), methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self.no_such_path})

    def stop(self) -> None:
        """Whoever still waits is told 503."""
        self._stopped.set_result(None)

    # ---------------------------------------------------------------- handlers

    async def ask(self, request: Request) -> Response:
        """A question in any dialect."""
        began = time.monotonic()
        body, held = await self._body(request)
        try:
            question = dialects.READERS[request.url.path](body, self.scorer.name)
            del body
            count = len(question.items)
            if count > self.flags.max_texts_per_request:
                raise Refusal(400, f"{count} texts in one request, and it may have {self.flags.max_texts_per_request}")
            held += self._hold_written_out(question.items, held)
            with self.places.for_texts(count):
                scored = await self._unless_gone(request, self._scored(question, began))
            return JSONResponse(question.write(scored))
        finally:
            self.places.release(held)

    async def _scored(self, question: dialects.Question, began: float) -> dialects.Scored:
        loop = asyncio.get_running_loop()
        sequences = await loop.run_in_executor(self.encoder, self.reader.sequences, question.items, question.keep)
        rewards = await self.collector.rewards(sequences)
        return dialects.Scored(rewards, [len(ids) for ids in sequences], time.monotonic() - began)

    def _hold_written_out(self, items: Sequence[Item], held: int) -> int:
        """Room for the items' text beyond the body's bytes: a prompt may stand there once for many answers."""
        known: dict[int, int] = {}
        size = sum(characters(item, known) for item in items)
        if size > self.places.most_bytes:
            raise Refusal(
                400,
                f"the prompts and answers have {size} characters together, and --max_waiting_mib "
                f"{self.flags.max_waiting_mib:g} allows {self.places.most_bytes}; send fewer texts a request",
            )
        more = max(0, size - held)
        self.places.hold(more)
        return more

    async def health(self, request: Request) -> Response:
        """Open to all: 200 while it scores, 503 while it drains or the model fails."""
        state = "draining" if self.draining else "ok" if self.collector.healthy else "the last batches failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text form."""
        return Response(self.counters.page(), media_type=METRICS_TYPE)

    async def models(self, request: Request) -> Response:
        """As vLLM and SGLang list theirs."""
        model = {"id": self.scorer.name, "object": "model", "created": self.began, "owned_by": "open_rm"}
        model |= {"root": self.scorer.name, "parent": None, "max_model_len": self.scorer.max_token_length}
        return JSONResponse({"object": "list", "data": [model]})

    async def no_such_path(self, request: Request, error: HTTPException) -> Response:
        """404 and 405."""
        paths = ", ".join(dialects.READERS)
        said = f"there is no {request.method} {request.url.path}; rewards are asked for by POST to {paths}"
        return await self._refused(
            request, Refusal(error.status_code, said, close=request.method not in ("GET", "HEAD"))
        )

    # ---------------------------------------------------------------- around them

    def _answering(self, path: str, handler: Callable[[Request], Awaitable[Response]]):
        """The handler, behind the token; whatever happens becomes a status, and is counted."""

        async def answer(request: Request) -> Response:
            began = time.monotonic()
            try:
                self._authorise(request)
                response = await self._unless_stopped(handler(request))
            except Refusal as refusal:
                response = await self._refused(request, refusal)
            except ClientDisconnect:
                self.counters.gone.inc()
                return Response(status_code=499)  # nobody reads it
            except Exception:
                LOG.exception("a request to %s failed", path)
                response = await self._refused(request, Refusal(500, "the server failed; its log says how"))
            self.counters.requests.labels(path, response.status_code).inc()
            self.counters.seconds.labels(path).observe(time.monotonic() - began)
            return response

        return answer

    async def _refused(self, request: Request, refusal: Refusal) -> Response:
        if refusal.close and refusal.status != 408 and not self._stopped.done():  # 408: it had its time
            await self._throw_away(request)
        headers = {}
        if refusal.retry_after is not None:
            headers["Retry-After"] = str(refusal.retry_after)
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.close:
            headers["Connection"] = "close"
        return JSONResponse(dialects.error(request.url.path, refusal), refusal.status, headers=headers)

    def _authorise(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        sent, token = given.encode("latin-1").strip(), self.token.encode(errors="surrogateescape")
        # Beyond ASCII, aiohttp sends UTF-8 and requests Latin-1.
        right = any(hmac.compare_digest(form, token) for form in (sent, sent.decode("latin-1").encode()))
        if scheme.lower() != "bearer" or not right:
            raise Refusal(401, "this server asks for a token: send Authorization: Bearer TOKEN", close=True)

    async def _body(self, request: Request) -> tuple[dict, int]:
        """The body's JSON object, and the bytes that are held for it until they are released.

        Raises:
            Refusal: too large, too slow, no room, or no JSON object.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "send the body as it is, without Content-Encoding", close=True)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.most_bytes:
            raise self._too_large()
        pieces: list[bytes] = []
        held = 0
        try:
            async with asyncio.timeout(self.flags.receive_timeout):
                async for piece in request.stream():
                    if held + len(piece) > self.most_bytes:
                        raise self._too_large()
                    self.places.hold(len(piece))
                    held += len(piece)
                    pieces.append(piece)
            return _parsed(b"".join(pieces)), held
        except TimeoutError:
            self.places.release(held)
            seconds = f"{self.flags.receive_timeout:g} seconds"
            raise Refusal(408, f"the body did not arrive within {seconds}", close=True) from None
        except BaseException:
            self.places.release(held)
            raise

    def _too_large(self) -> Refusal:
        said = f"the body has more than {self.flags.max_body_mib:g} MiB; send fewer texts a request"
        return Refusal(413, said, close=True)

    async def _throw_away(self, request: Request) -> None:
        """What a refused request still sends: its sender would not hear the answer before. Not without an end."""
        if request.headers.get("expect") is not None:  # it asks before it sends
            return
        left = THROWN_AWAY * self.most_bytes
        try:
            async with asyncio.timeout(self.flags.receive_timeout):
                async for piece in request.stream():
                    left -= len(piece)
                    if left < 0:
                        break
        except ClientDisconnect:
            self.counters.gone.inc()
        except (TimeoutError, RuntimeError):  # RuntimeError: all of it was read
            pass

    async def _unless_stopped(self, work: Awaitable[Response]) -> Response:
        """What the work gives; 503 where `stop` is called before."""
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Refusal(503, "the server was stopped", retry_after=5, close=True)
            return working.result()
        finally:
            working.cancel()

    async def _unless_gone(self, request: Request, work: Awaitable[dialects.Scored]) -> dialects.Scored:
        """What the work gives; where the client leaves before, it is cancelled and its place is free."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parsed(body: bytes) -> dict:
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {quote_error(error)}") from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(value).__name__}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
