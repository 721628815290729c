"""Bodies, tokens, statuses: the application by itself, without a network and with a model that adds numbers."""

import asyncio
import errno
import json
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from open_rm.data.rows import OWN_KEYWORDS
from open_rm.errors import UserError
from open_rm.serving import dialects
from open_rm.serving.application import Service
from open_rm.serving.connections import Server
from open_rm.serving.limits import Refusal, ServingFlags

WHOLE = {"type": "http.request", "more_body": False}


class Client:
    """Asks the application as a server would hand it a request: ASGI messages in, (status, body) out."""

    def __init__(self, *, token: str | None = None, sequences=None, **flags):
        reader = SimpleNamespace(sequences=sequences or (lambda items, keep: [[1]] * len(items)))
        scorer = SimpleNamespace(name="a model", rewards=lambda sequences: np.ones(len(sequences)))
        self.service = Service(scorer, reader, ServingFlags(**flags), token)
        self.application = self.service.application()
        self.received = 0

    async def ask(self, path: str, *messages: dict, headers: dict | None = None) -> tuple[int, bytes]:
        """The answer to messages, after which the client says nothing more."""
        messages, sent = list(messages), []

        async def receive():
            self.received += 1
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        raw = [(name.encode(), value) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b"", "root_path": ""}
        await self.application(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]


def body(value: object) -> dict:
    return WHOLE | {"body": json.dumps(value).encode()}


def test_a_body_that_does_not_come_is_told_408_and_not_waited_for_again():
    async def test():
        client = Client(receive_timeout=0.02)
        status, _ = await client.ask("/classify", headers={"content-length": b"100"})
        assert (status, client.received) == (408, 1)

    asyncio.run(test())


def test_who_leaves_while_a_refused_body_is_read_is_counted_without_a_traceback(caplog):
    async def test():
        client = Client()
        gone = {"type": "http.disconnect"}
        status, _ = await client.ask("/classify", gone, headers={"content-length": b"999999999"})
        page = client.service.counters.page().decode()
        assert status == 413 and 'open_rm_requests_total{path="/classify",status="413"} 1.0' in page
        assert "open_rm_clients_gone_total 1.0" in page and not caplog.records
        assert (await client.ask("/nothing", gone))[0] == 404

    asyncio.run(test())


def test_a_token_beyond_ascii_is_known_in_utf8_and_in_latin1():
    async def test():
        client = Client(token="clé à")
        for code in ("utf-8", "latin-1"):
            header = {"authorization": b"Bearer " + "clé à".encode(code)}
            assert (await client.ask("/classify", body({"input": "a"}), headers=header))[0] == 200
        for wrong in ("clé", "cl\xe9 \xe0x", "", "?"):
            header = {"authorization": b"Bearer " + wrong.encode()}
            assert (await client.ask("/classify", body({"input": "a"}), headers=header))[0] == 401

    asyncio.run(test())


def test_a_prompt_that_stands_before_many_answers_counts_for_each():
    async def test():
        client = Client(max_body_mib=0.5, max_waiting_mib=1)
        prompt = "word " * 5000
        asked = body({"query": prompt, "documents": ["a"] * 100})
        status, said = await client.ask("/rerank", asked)
        assert status == 400 and b"2500100 characters together" in said
        assert (await client.ask("/rerank", body({"query": prompt, "documents": ["a"] * 40})))[0] == 200
        held = [client.service.places.bytes]
        client.service.places.hold(600_000)  # of others
        status, _ = await client.ask("/rerank", body({"query": prompt, "documents": ["a"] * 40}))
        assert status == 503
        assert held == [0] and client.service.places.bytes == 600_000

    asyncio.run(test())


def test_what_is_still_encoded_when_the_server_stops_is_told_503():
    async def test():
        begun, going_on = threading.Event(), threading.Event()

        def sequences(items, keep):
            begun.set()
            going_on.wait(60)
            return [[1]]

        client = Client(sequences=sequences)
        asking = asyncio.create_task(client.ask("/classify", body({"input": "a"})))
        half = asyncio.create_task(client.ask("/classify", WHOLE | {"body": b"{", "more_body": True}))
        while not begun.is_set():
            await asyncio.sleep(0)
        client.service.stop()
        for status, said in await asyncio.gather(asking, half):
            assert status == 503 and json.loads(said)["error"]["message"] == "the server was stopped"
        going_on.set()
        assert client.service.places.bytes == client.service.places.texts == 0

    asyncio.run(test())


@pytest.mark.parametrize("key", OWN_KEYWORDS)
def test_the_template_is_the_servers_and_its_variables_the_clients(key):
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(Refusal, match=f"sets {key}, which the server decides") as caught:
        dialects.classify(messages | {"chat_template_kwargs": {key: True}}, "m")
    assert caught.value.status == 400
    given = {"tools": [], "documents": [], "enable_thinking": False}
    [item] = dialects.classify(messages | {"chat_template_kwargs": given}, "m").items
    assert item.template == given


def test_a_name_of_the_request_that_is_no_text_is_refused():
    for path, asked in (
        ("/classify", {"input": "a", "request_id": "\ud800"}),
        ("/rerank", {"query": "a", "documents": ["b"], "request_id": "\ud800"}),
        ("/classify", {"text": "a", "rid": "\ud800"}),
    ):
        with pytest.raises(Refusal, match="surrogate") as caught:
            dialects.READERS[path](asked, "m")
        assert caught.value.status == 400


def test_draining_goes_on_where_a_waiting_connection_cannot_be_taken(caplog):
    """A client that left, then no file left."""
    faults = [ConnectionAbortedError(), OSError(errno.EMFILE, "Too many open files")]

    def accept():
        raise faults.pop(0)

    config = SimpleNamespace(http_protocol_class=object)
    server = SimpleNamespace(listener=SimpleNamespace(accept=accept), config=config, server_state=None)
    asyncio.run(Server._take_those_in_the_queue(server))
    assert faults == [] and "Too many open files" in caplog.text


def test_a_port_that_was_taken_meanwhile_is_one_sentence():
    async def test():
        with socket.socket() as mine, socket.socket() as other:
            for one in (mine, other):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(mine.getsockname() if one is other else ("127.0.0.1", 0))
            other.listen()
            with pytest.raises(UserError, match="was taken while the model was loaded"):
                await Server(Client().service, mine, lambda: None).serve(sockets=[mine])

    asyncio.run(test())
