"""The server as its clients meet it: real processes, the calls of RL trainers, and everything that goes wrong on a network."""

import asyncio
import base64
import contextlib
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys

import aiohttp
import numpy as np
import pytest
import requests
import servers
import torch
from conftest import REPOSITORY, environment_of_a_process
from folders import Trained, turns
from transformers import AutoModelForSequenceClassification

TOLERANCE = 1e-5  # float32: what is scored together changes the order of sums
QUESTION, GOOD, BAD = "Write a happy line about the lake.", "Today the lake looks golden.", "The lake seems broken."
TOKEN = "a secret of this test"


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> Trained:
    """A folder whose template writes BOS and whose end token is not eos: what clients get wrong most easily."""
    return Trained(toy, tmp_path_factory.mktemp("served") / "model", template="llama3")


@pytest.fixture(scope="module")
def plain_transformers(trained):
    """ids -> reward, one by one, by plain transformers from the folder."""
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()

    @torch.no_grad()
    def reward(ids: list[int]) -> float:
        return model(input_ids=torch.tensor([ids])).logits.item()

    return reward


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """As users start it."""
    running = servers.start(tmp_path_factory.mktemp("server"), trained.folder)
    yield running
    running.process.kill()


@pytest.fixture(scope="module")
def strict(trained, tmp_path_factory):
    """Small limits, a token, and a scorer that can be held."""
    flags = {"max_waiting_texts": 4, "max_texts_per_request": 3, "max_body_mib": 0.25, "max_waiting_mib": 0.5}
    flags |= {"receive_timeout": 0.3, "idle_timeout": 0.5, "max_token_length": 200, "max_connections": 64}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    running = servers.fork(tmp_path_factory.mktemp("strict"), trained.folder, *words, token=TOKEN)
    yield running
    running.process.kill()


@pytest.fixture
def fresh(trained, tmp_path):
    """A server of the test's own, which it may end."""
    started = []

    def start(*flags: object) -> servers.Server:
        started.append(servers.fork(tmp_path, trained.folder, *flags))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()


@pytest.fixture(scope="module")
def answers(trained, plain_transformers):
    """(prompt, answer, reward of training's ids by plain transformers) of some of the toy's rows."""
    from open_rm.toy import make_pairs

    found = []
    for row in make_pairs(24, seed=5):
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt"][0]["content"], row[side][0]["content"]
            found.append((prompt, answer, plain_transformers(trained.conversation(prompt, answer))))
    assert statistics.stdev(reward for *_, reward in found) > 100 * TOLERANCE
    return found


def ask(server, path: str, body: object = None, **how) -> requests.Response:
    """A request with the token of the strict server."""
    headers = {"Authorization": f"Bearer {TOKEN}"} | how.pop("headers", {})
    method = "GET" if body is None else "POST"
    data = body if isinstance(body, bytes) or body is None else json.dumps(body)
    return requests.request(method, server.url + path, data=data, headers=headers, timeout=60, **how)


# ---------------------------------------------------------------- what the clients read


def test_every_dialect_answers_in_its_clients_form_with_trainings_reward(server, trained, plain_transformers):
    good, bad = (plain_transformers(trained.conversation(QUESTION, answer)) for answer in (GOOD, BAD))
    assert abs(good - bad) > 100 * TOLERANCE
    text, other = (trained.rendered(turns(QUESTION, answer)) for answer in (GOOD, BAD))
    prompt = trained.rendered(turns(QUESTION), add_generation_prompt=True)
    ids = trained.conversation(QUESTION, GOOD)
    close = {"rel": 0, "abs": TOLERANCE}

    def got(path: str, body: dict):
        response = ask(server, path, body)
        assert response.status_code == 200, response.text
        return response.json()

    # OpenRLHF
    answer = got("/get_reward", {"query": [text, other], "prompts": ["", ""], "labels": [None, "4"]})
    assert set(answer) == {"rewards", "scores", "extra_logs"}
    assert answer["rewards"] == answer["scores"] == pytest.approx([good, bad], **close)
    nothing = {"rewards": [], "scores": [], "extra_logs": {}}  # what it asks of its second server
    assert got("/get_reward", {"query": [], "prompts": [], "labels": []}) == nothing
    # vLLM
    for given, rewards in (
        ({"model": "x", "input": text, "use_activation": False}, [good]),
        ({"input": [text, other], "use_activation": True, "add_special_tokens": False}, [good, bad]),
        ({"input": ids, "truncate_prompt_tokens": -1}, [good]),
        ({"input": [ids, ids], "user": "me"}, [good, good]),
        ({"messages": turns(QUESTION, GOOD), "add_special_tokens": False}, [good]),
    ):
        answer = got("/classify", given | {"request_id": "mine"})
        assert answer.keys() >= {"id", "object", "created", "model", "data", "usage"}
        assert answer["id"] == "classify-mine" and answer["object"] == "list"
        assert [set(entry) for entry in answer["data"]] == [{"index", "label", "probs", "num_classes"}] * len(rewards)
        assert [entry["probs"] for entry in answer["data"]] == [pytest.approx([reward], **close) for reward in rewards]
        assert [entry["index"] for entry in answer["data"]] == list(range(len(rewards)))
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] >= len(ids) * len(rewards) - 10
        answer = got("/pooling", given)
        assert [entry["data"] for entry in answer["data"]] == [pytest.approx([reward], **close) for reward in rewards]
        assert {entry["object"] for entry in answer["data"]} == {"pooling"}
    for query in (QUESTION, [QUESTION], turns(QUESTION), prompt):
        for first, second in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items")):
            answer = got("/v1/score", {first: query, second: [GOOD, BAD]})
            assert [entry["score"] for entry in answer["data"]] == pytest.approx([good, bad], **close)
            assert {entry["object"] for entry in answer["data"]} == {"score"}
    answer = got("/score", {"text_1": [QUESTION, QUESTION], "text_2": [BAD, GOOD]})
    assert [entry["score"] for entry in answer["data"]] == pytest.approx([bad, good], **close)
    both = sorted([(good, 0, GOOD), (bad, 1, BAD)], reverse=True)
    for top in (0, 1, 5):
        answer = got("/v1/rerank", {"query": QUESTION, "documents": [GOOD, BAD], "top_n": top})
        found = [(entry["relevance_score"], entry["index"], entry["document"]["text"]) for entry in answer["results"]]
        assert [entry[1:] for entry in found] == [entry[1:] for entry in both[: top or None]]
        assert [entry[0] for entry in found] == pytest.approx([entry[0] for entry in both[: top or None]], **close)
    # SGLang
    answer = got("/v1/embeddings", {"model": "x", "input": text})
    assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": pytest.approx([good], **close)}]
    answer = got("/v1/embeddings", {"input": [text, other], "encoding_format": "base64"})
    raw = [np.frombuffer(base64.b64decode(entry["embedding"]), np.float32) for entry in answer["data"]]
    assert [float(vector[0]) for vector in raw] == pytest.approx([good, bad], **close)
    answer = got("/classify", {"model": "x", "text": [text, other]})
    assert [entry["embedding"] for entry in answer] == [pytest.approx([r], **close) for r in (good, bad)]
    assert answer[0]["meta_info"]["prompt_tokens"] == len(ids)
    assert got("/classify", {"text": text})["embedding"] == pytest.approx([good], **close)
    assert got("/classify", {"input_ids": ids})["embedding"] == pytest.approx([good], **close)
    # slime
    for path in ("/", "/remote_rm"):
        for given in (prompt, turns(QUESTION), QUESTION):
            answer = got(path, {"prompt": given, "response": GOOD + "<|eot_id|>", "label": None})
            assert answer == pytest.approx(good, **close) and isinstance(answer, float)
    # what stands beside
    [model] = ask(server, "/v1/models").json()["data"]
    assert model["id"] == str(trained.folder) and model["max_model_len"] == 2048
    assert ask(server, "/health").json() == {"status": "ok"}


async def openrlhf(session, url: str, trained, prompt: str, answer: str) -> float:
    """SingleTurnExecutor: what the policy read and wrote, decoded; one sample a request."""
    read = trained.rendered(turns(prompt), add_generation_prompt=True)
    tokens = trained.tokenizer(read + answer + "<|eot_id|>", add_special_tokens=False)["input_ids"]
    payload = {"query": [trained.tokenizer.decode(tokens)], "prompts": [read], "labels": [None]}
    async with session.post(f"{url}/get_reward", json=payload) as response:
        response.raise_for_status()
        info = await response.json()
    scores = info.get("scores")
    assert scores == info["rewards"] and isinstance(info.get("extra_logs") or {}, dict)
    return scores[0]


async def verl(session, url: str, trained, prompt: str, answer: str, *, engine: str = "vllm") -> float:
    """RewardLoopWorker: the reward model's template over messages; BOS taken away for vLLM to add."""
    text = trained.rendered([*turns(prompt), {"role": "assistant", "content": answer}]).removeprefix("<|bos|>")
    payload, endpoint = {"model": "/some/path", "input": text}, "v1/embeddings"
    if engine == "vllm":
        payload, endpoint = payload | {"use_activation": False}, "classify"
    async with session.post(f"{url}/{endpoint}", json=payload) as response:
        response.raise_for_status()
        [*_, last] = (await response.json())["data"]
    return last["probs" if engine == "vllm" else "embedding"][-1]


async def verl_on_sglang(session, url: str, trained, prompt: str, answer: str) -> float:
    return await verl(session, url, trained, prompt, answer, engine="sglang")


async def slime(session, url: str, trained, prompt: str, answer: str) -> float:
    """rm_hub.remote_rm: the body is the reward."""
    read = trained.rendered(turns(prompt), add_generation_prompt=True)
    payload = {"prompt": read, "response": answer + "<|eot_id|>", "label": "42"}
    async with session.post(url, json=payload) as response:
        response.raise_for_status()
        return await response.json()


TRAINERS = (openrlhf, verl, verl_on_sglang, slime)


@pytest.mark.parametrize("clients", [1, 300])
def test_trainers_get_trainings_rewards_alone_and_300_at_once(server, trained, answers, clients):
    """Each client has a connection of its own, as OpenRLHF and verl open one for every request."""

    async def one(number: int) -> None:
        trainer = TRAINERS[number % len(TRAINERS)]
        async with aiohttp.ClientSession() as session:
            for prompt, answer, reward in (answers[number % len(answers)], answers[-1 - number % len(answers)]):
                got = await trainer(session, server.url, trained, prompt, answer)
                assert got == pytest.approx(reward, rel=0, abs=TOLERANCE), trainer.__name__

    async def all_of_them() -> None:
        numbers = range(clients) if clients > 1 else range(len(TRAINERS))
        if clients == 1:
            for number in numbers:
                await one(number)
        await asyncio.gather(*map(one, numbers))

    asyncio.run(all_of_them())
    assert "Traceback" not in server.log


# ---------------------------------------------------------------- what goes wrong


WRONG = [
    ("/classify", b"", "not JSON"),
    ("/classify", b"{", "not JSON"),
    ("/classify", b"\xff\xfe{}", "not JSON"),
    ("/classify", b"[" * 10**5, "not JSON"),
    ("/classify", b'{"input": ' + b"1" * 10**4 + b"}", "not JSON"),
    ("/classify", b'{"input": [NaN]}', "NaN is no number"),
    ("/classify", [1], "must be a JSON object"),
    ("/classify", {}, "input must be a text"),
    ("/classify", {"input": ""}, "is empty"),
    ("/classify", {"input": []}, "input must be a text"),
    ("/classify", {"input": ["a", 1]}, "input must be a text"),
    ("/classify", {"input": [True]}, "input must be a text"),
    ("/classify", {"input": [[]]}, "input must be a text"),
    ("/classify", {"input": [10**9]}, "outside the vocabulary"),
    ("/classify", {"input": "\ud800"}, "surrogate"),
    ("/classify", {"input": "a " * 300}, "tokens, and the model takes at most 200"),
    ("/classify", {"input": ["a"] * 4}, "4 texts in one request, and it may have 3"),
    ("/classify", {"input": "a", "normalize": True}, "normalize"),
    ("/classify", {"input": "a", "priority": 3}, "priority"),
    ("/classify", {"input": "a", "truncation_side": "right"}, "truncation_side"),
    ("/classify", {"input": "a", "truncate_prompt_tokens": 201}, "more than the 200 tokens"),
    ("/classify", {"input": "a", "truncate_prompt_tokens": "5"}, "truncate_prompt_tokens must be"),
    ("/classify", {"messages": [{"role": "user", "content": "a"}]}, "ends with a message of user"),
    ("/classify", {"messages": turns("a", "b"), "add_generation_prompt": True}, "add_generation_prompt"),
    ("/classify", {"messages": turns("a", "b"), "chat_template_kwargs": 3}, "chat_template_kwargs"),
    ("/classify", {"text": 5}, "text must be"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "gif"}, "encoding_format"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1 must be one prompt or as many"),
    ("/score", {"queries": "a"}, "text_2 must be a list of texts"),
    ("/rerank", {"query": "a", "documents": [], "top_n": 1}, "documents must be"),
    ("/rerank", {"query": "a", "documents": ["b"], "top_n": "many"}, "top_n"),
    ("/get_reward", {"query": [1]}, "query must be a list of texts"),
    ("/get_reward", {"prompts": ["a"]}, "query must be a list of texts"),
    ("/", {"prompt": "a"}, "response must be text"),
    ("/remote_rm", {"prompt": 5, "response": "a"}, "prompt must be"),
    ("/nothing", {}, "there is no POST /nothing"),
]


def sentence_of(path: str, response: requests.Response) -> str:
    """The error as the path's clients read it."""
    error = response.json()["error"]
    if path in ("/", "/get_reward", "/remote_rm"):
        return error
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == response.status_code
    return error["message"]


def test_a_wrong_request_gets_one_sentence_in_its_dialect(strict):
    for path, body, sentence in WRONG:
        response = ask(strict, path, body)
        said = sentence_of(path, response)
        assert response.status_code == (404 if path == "/nothing" else 400), (path, body, response.text)
        assert sentence in said and "\n" not in said and len(said) < 400, said
    for path in ("/classify", "/get_reward"):
        assert ask(strict, path).status_code == 405
    assert ask(strict, "/classify", {"input": "a"}, headers={"Content-Encoding": "gzip"}).status_code == 415
    assert ask(strict, "/classify", {"input": "a"}).status_code == 200
    assert "Traceback" not in strict.log


def test_a_token_is_asked_for_everywhere_but_at_health(strict):
    for path, body in (("/classify", {"input": "a"}), ("/v1/models", None), ("/metrics", None), ("/get_reward", {})):
        for wrong in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer ä"):
            response = ask(strict, path, body, headers={"Authorization": wrong.encode()})
            assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer", (path, wrong)
        assert ask(strict, path, body).status_code in (200, 400)
    assert ask(strict, "/health", headers={"Authorization": ""}).status_code == 200
    assert TOKEN not in strict.log


def raw(server, sent: bytes) -> bytes:
    """All that the server says to these bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        said = b""
        while piece := connection.recv(65536):
            said += piece
        return said


HEAD = f"POST /classify HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n".encode()


def test_what_is_sent_by_halves_is_told_408_and_closed(strict):
    for half in (
        HEAD,
        b"POS",
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ):
        said = raw(strict, half)
        assert said.startswith(b"HTTP/1.1 408 ") and b"within 0.3 seconds" in said, (half, said)
    assert raw(strict, b"") == b""  # closed: no request, no answer
    assert raw(strict, b"\r\n") in (b"",) or raw(strict, b"\r\n").startswith(b"HTTP/1.1 408 ")
    whole = HEAD + b"Content-Length: 14\r\n\r\n" + b'{"input": "a"}'
    assert raw(strict, whole).startswith(b"HTTP/1.1 200 ")  # and closed after a while, because nothing follows
    with post_without_reading(strict, ["a"]) as connection:
        assert answer_on(connection)[0] == 200
        connection.sendall(b"POST /cla")
        assert answer_on(connection)[0] == 408


def test_what_is_not_http_or_has_an_endless_head_is_refused(strict):
    assert raw(strict, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    said = raw(strict, b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"a" * 70_000)
    assert said.startswith(b"HTTP/1.1 431 ") and b"Traceback" not in said


def test_a_large_body_is_refused_while_it_is_read(strict):
    too_much = json.dumps({"input": "a" * 2**19}).encode()
    response = ask(strict, "/classify", too_much)
    assert response.status_code == 413 and "0.25 MiB" in sentence_of("/classify", response)
    response = requests.post(
        strict.url + "/classify", data=iter([too_much]), headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
    )
    assert response.status_code == 413  # in chunks, without a length
    # who asks before sending is told at once
    said = raw(strict, HEAD + b"Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413 ")
    before = strict.memory
    with socket.create_connection(("127.0.0.1", strict.port)) as endless, contextlib.suppress(OSError):
        endless.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(2000):  # 128 MiB, if it were read
            endless.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")
        pytest.fail("an endless body was read to its end")
    assert strict.memory - before < 32 * 2**20
    assert ask(strict, "/classify", {"input": "a"}).status_code == 200


def waiting_texts(server) -> int:
    page = ask(server, "/metrics").text
    [line] = [line for line in page.splitlines() if line.startswith("open_rm_waiting_texts ")]
    return int(float(line.split()[1]))


def post_without_reading(server, texts: list[str]) -> socket.socket:
    """A request whose answer nobody has read yet."""
    body = json.dumps({"input": texts}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


def answer_on(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def test_a_full_queue_says_503_and_a_client_that_leaves_frees_its_place(strict, trained, plain_transformers):
    texts = [trained.rendered(turns(QUESTION, answer)) for answer in (GOOD, BAD)]
    rewards = [plain_transformers(trained.conversation(QUESTION, answer)) for answer in (GOOD, BAD)]
    with strict.held():
        first = post_without_reading(strict, texts)
        strict.wait_until_held()
        second = post_without_reading(strict, texts)
        servers.wait_until(lambda: waiting_texts(strict) == 4)
        full = ask(strict, "/classify", {"input": texts[0]})
        assert full.status_code == 503 and int(full.headers["Retry-After"]) >= 1
        assert "the queue takes 4" in sentence_of("/classify", full)
        assert ask(strict, "/health").status_code == 200
        second.close()
        servers.wait_until(lambda: waiting_texts(strict) == 2)
        third = post_without_reading(strict, texts[::-1])
        servers.wait_until(lambda: waiting_texts(strict) == 4)
    for connection, expected in ((first, rewards), (third, rewards[::-1])):
        status, answer = answer_on(connection)
        assert status == 200
        assert [entry["probs"][0] for entry in answer["data"]] == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert waiting_texts(strict) == 0
    assert "open_rm_clients_gone_total 1.0" in ask(strict, "/metrics").text


def test_bodies_that_wait_are_bounded_together(strict):
    """0.5 MiB of them; three of 0.2 MiB do not fit."""
    body = json.dumps({"input": "a", "user": "a" * 2 * 10**5}).encode()
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    with strict.held(), contextlib.ExitStack() as open_ones:
        for _ in range(2):
            connection = open_ones.enter_context(socket.create_connection(("127.0.0.1", strict.port)))
            connection.sendall(head + body)
        servers.wait_until(lambda: waiting_texts(strict) == 2)
        response = ask(strict, "/classify", body)
        assert response.status_code == 503 and "MiB" in sentence_of("/classify", response)
        assert ask(strict, "/classify", {"input": ""}).status_code == 400  # a small one has room
    assert ask(strict, "/classify", body).status_code == 200


def test_connections_are_bounded(strict):
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(("127.0.0.1", strict.port), timeout=60)) for _ in range(80)
        ]
        said = opened[-1].recv(1000)
        assert said.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in said
    servers.wait_until(lambda: ask(strict, "/health").status_code == 200)


def test_a_batch_that_fails_is_told_500_and_the_server_lives(strict):
    with strict.failing():
        for number in range(3):
            response = ask(strict, "/classify", {"input": "a"})
            assert response.status_code == 500
            assert sentence_of("/classify", response) == (
                "the model could not score this: RuntimeError, see the server's log"
            )
            assert ask(strict, "/health").status_code == (503 if number == 2 else 200)
        assert "out of memory, says a test" in strict.log
    assert ask(strict, "/classify", {"input": "a"}).status_code == 200
    assert ask(strict, "/health").status_code == 200


# ---------------------------------------------------------------- how it ends


def test_sigterm_under_load_answers_all_that_was_accepted(fresh, trained, answers):
    server = fresh()
    texts = [trained.rendered(turns(prompt, answer)) for prompt, answer, _ in answers]
    answered: list[int] = []

    async def client(number: int, session) -> None:
        while True:
            number = (number + 7) % len(texts)
            try:
                async with session.post(server.url + "/classify", json={"input": texts[number]}) as response:
                    body = await response.json()
            except aiohttp.ClientConnectorError:
                return  # was not accepted
            assert response.status == 200
            assert body["data"][0]["probs"][0] == pytest.approx(answers[number][2], rel=0, abs=TOLERANCE)
            answered.append(number)

    async def load() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            clients = [asyncio.create_task(client(number, session)) for number in range(64)]
            while len(answered) < 200:
                await asyncio.sleep(0.01)
            server.signal()
            await asyncio.gather(*clients)

    asyncio.run(load())
    assert len(answered) >= 200 + 63
    assert server.wait_for_status() == 0
    assert "Traceback" not in server.log


def test_connections_that_wait_in_the_systems_queue_are_answered_too(fresh, trained):
    """They have connected and sent, and the server has not looked: it is stopped while they do, and SIGTERM comes first."""
    server = fresh()
    server.signal(signal.SIGSTOP)
    waiting = [post_without_reading(server, ["a"]) for _ in range(20)]
    server.signal(signal.SIGTERM)
    server.signal(signal.SIGCONT)
    assert [answer_on(connection)[0] for connection in waiting] == [200] * 20
    assert server.wait_for_status() == 0


def test_a_second_signal_ends_at_once(fresh):
    server = fresh()
    with server.held(), post_without_reading(server, ["a"]):
        server.wait_until_held()
        server.signal(signal.SIGINT)
        server.wait_for("draining: 1 texts wait")
        server.signal(signal.SIGTERM)
        assert server.wait_for_status() == 128 + signal.SIGTERM


def test_what_is_not_answered_in_time_is_told_503(fresh):
    server = fresh("--drain_timeout", 0.1)
    with server.held():
        scored = post_without_reading(server, ["a"])
        server.wait_until_held()
        queued = post_without_reading(server, ["a"])
        servers.wait_until(lambda: waiting_texts(server) == 2)
        server.signal()
        for connection in (scored, queued):
            status, answer = answer_on(connection)
            assert status == 503 and answer["error"]["message"] == "the server was stopped"
        assert server.wait_for_status() == 1


# ---------------------------------------------------------------- how it does not begin


def run(*flags: object, before: list[str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *(before or []), "-m", "open_rm.serve", *map(str, flags)]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment_of_a_process(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--model"),
        (["--model", "x", "--pord", "1"], "did you mean port"),
        (["--model", "x", "--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--model", "x", "--max_waiting_texts", "5"], "--max_texts_per_request 1024 is more than"),
        (["--model", "x", "--max_body_mib", "500"], "--max_body_mib 500 is more than"),
    ],
)
def test_a_wrong_command_line_is_answered_before_torch_is_imported(flags, sentence):
    done = run(*flags, before=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode != 0 and sentence in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert "open_rm.serving.limits" in imported and not {"torch", "transformers", "starlette", "uvicorn"} & imported


def test_a_port_in_use_an_unknown_host_and_a_folder_without_a_model_are_one_sentence(server, tmp_path):
    for flags, sentence in (
        (["--model", "x", "--port", server.port], f"--port {server.port}: cannot be listened on"),
        (["--model", "x", "--host", "no.such.host.invalid"], "no such address"),
    ):
        done = run(*flags)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert sentence in done.stderr
    status, said = servers.fork_and_wait(tmp_path, tmp_path / "nothing")
    assert status == 1 and said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path / "nothing") in said
