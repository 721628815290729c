"""Serving: requests/s and latency of `python -m open_rm.serve` beside a naive server, in one run.

    python -m benchmarks.serving --requests 400 --clients 64 --rounds 3

Both serve the same folder (a Llama of the shape, with random weights) and answer OpenRLHF's POST /get_reward with one text a
request, from as many clients at once, each of which asks again when it has its answer. How to read the table:

- alpaca_eval: the four answers to a prompt one after the other, as an RL trainer samples them; prompts are short.
  single: one answer to each prompt, so that nothing is shared but the wait for the forward.
  long prompts: eight short answers to a text of some 600 words, as in summarizing; made up.
- naive: transformers in a plain FastAPI handler, one request after the other (benchmarks/naive_server.py).
- ratio: ours over naive within a round, in which both run; the order turns. Quoted is the median, with the lowest and highest
  round in brackets. p50 and p99 are the median round's, in milliseconds, and mean little without `clients`: every client waits
  for the others.
- Before the clock each server answers a tenth of the requests. Rewards of both are compared; they have to agree (1e-4).
- On a CPU both have the same threads (OMP_NUM_THREADS, or all cores); the clients' own work is on the same cores.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch
import tyro
from transformers import LlamaForSequenceClassification

from benchmarks.workloads import SHAPES, Workload, config_of, long_prompts, make_tokenizer, many_answers

REPOSITORY = Path(__file__).parent.parent
AGREE = 1e-4
MOST_CHARACTERS = 4000  # of an answer, so that all fit the model


@dataclass(frozen=True)
class ServingArgs:
    """Measure the server beside a naive one."""

    requests: int = 400
    """Requests of a workload, each with one text."""
    clients: int = 64
    """Clients that ask at the same time."""
    rounds: int = 3
    """Times each server runs each workload."""
    shape: str = "6x384"
    """Shape of the model (benchmarks/workloads.py)."""
    data: str = "../shared/data"
    """Folder that holds alpaca_eval/ranked.jsonl; without it answers are made up."""
    output: str = "output/benchmark"
    """Folder for serving.json."""
    smoke: bool = False
    """Everything in small, to see that it runs: no measurement."""


def main(args: ServingArgs) -> None:
    """Make the model, start both servers, measure them in turn, print the table."""
    if args.smoke:
        args = ServingArgs(24, 8, 2, "tiny", args.data, args.output, smoke=True)
    scratch = Path(tempfile.mkdtemp(prefix="open_rm_serving_"))
    try:
        rows = _rows(args)
        folder, tokenizer = _write_model(scratch / "model", args, rows)
        texts = {
            "alpaca_eval": _texts(tokenizer, rows, args.requests),
            "single": _texts(tokenizer, [(prompt, answers[:1]) for prompt, answers in rows], args.requests),
            "long prompts": _texts(tokenizer, _long_prompts(args), args.requests),
        }
        with _server("ours", folder) as ours, _server("naive", folder) as naive:
            results = _rounds(args, {"ours": ours, "naive": naive}, texts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _report(args, results)


def _rows(args: ServingArgs) -> list[tuple[str, list[str]]]:
    """Prompts and their answers."""
    file = Path(args.data) / "alpaca_eval" / "ranked.jsonl"
    if not args.smoke and file.is_file():
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [(row["prompt"][0]["content"], [text[:MOST_CHARACTERS] for text in row["responses"]]) for row in rows]
    found: dict[str, list[str]] = {}
    for row in many_answers(3 * args.requests, seed=1).rows:
        found.setdefault(row["prompt"], [])
        found[row["prompt"]] += [text for text in (row["chosen"], row["rejected"]) if text not in found[row["prompt"]]]
    return list(found.items())


def _write_model(folder: Path, args: ServingArgs, rows: list[tuple[str, list[str]]]):
    """A classifier with one label as any trainer saves it."""
    words = [{"text": text} for prompt, answers in rows for text in (prompt, *answers)]
    tokenizer = make_tokenizer([Workload("words", words, False)])
    config = config_of(SHAPES[args.shape], tokenizer)
    config.num_labels, config.problem_type = 1, "regression"
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).to(config.dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def _long_prompts(args: ServingArgs) -> list[tuple[str, list[str]]]:
    """Prompts of 400 to 800 words, each with eight answers."""
    documents = long_prompts(-(-args.requests // 8), seed=1, words=40 if args.smoke else 800).rows
    answers = [row["chosen"][:200] for row in long_prompts(8 * len(documents), seed=2, words=40).rows]
    return [(row["prompt"], answers[8 * number : 8 * number + 8]) for number, row in enumerate(documents)]


def _texts(tokenizer, rows: list[tuple[str, list[str]]], count: int) -> list[str]:
    """Rendered conversations, in the order in which they are asked about."""
    pairs = [(prompt, answer) for prompt, answers in rows for answer in answers]
    if len(pairs) < count:
        sys.exit(f"{len(pairs)} texts are there; pass --requests {len(pairs)} or less")
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in pairs[:count]
    ]
    return tokenizer.apply_chat_template(chats, tokenize=False)


@contextlib.contextmanager
def _server(name: str, folder: Path) -> Iterator[str]:
    """A server in a process of its own; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.naive_server", str(folder), str(port)]
    if name == "ours":
        command = [sys.executable, "-m", "open_rm.serve", "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            if process.poll() is not None:
                sys.exit(f"{name}: its server ended with status {process.returncode}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    return False


def _rounds(args: ServingArgs, urls: dict[str, str], texts: dict[str, list[str]]) -> dict:
    """What each server did in each round of each workload."""
    results: dict = {name: {server: [] for server in urls} for name in texts}
    for name, asked in texts.items():
        for url in urls.values():
            asyncio.run(_ask(url, asked[: max(1, len(asked) // 10)], args.clients))
        for number in range(args.rounds):
            rewards = {}
            for server in list(urls) if number % 2 == 0 else list(urls)[::-1]:
                seconds, latencies, rewards[server] = asyncio.run(_ask(urls[server], asked, args.clients))
                quantiles = statistics.quantiles(latencies, n=100)
                measured = {"requests_s": len(asked) / seconds, "p50": quantiles[49], "p99": quantiles[98]}
                results[name][server].append(measured)
                print(f"  {name}, round {number + 1}, {server}: {measured['requests_s']:.1f} requests/s", flush=True)
            worst = max(abs(a - b) for a, b in zip(rewards["ours"], rewards["naive"], strict=True))
            if not (worst <= AGREE or SHAPES[args.shape].width >= 2048):  # bfloat16 rounds more
                sys.exit(f"{name}: the servers' rewards differ by {worst:.1e}")
    return results


async def _ask(url: str, texts: list[str], clients: int) -> tuple[float, list[float], list[float]]:
    """Seconds, the seconds of each request, and the rewards, in order."""
    todo = iter(enumerate(texts))
    latencies, rewards = [0.0] * len(texts), [0.0] * len(texts)
    timeout = aiohttp.ClientTimeout(total=None)

    async def client() -> None:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for number, text in todo:
                began = time.perf_counter()
                body = {"query": [text], "prompts": [""], "labels": [None]}
                async with session.post(f"{url}/get_reward", json=body) as response:
                    response.raise_for_status()
                    [rewards[number]] = (await response.json())["rewards"]
                latencies[number] = time.perf_counter() - began

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, latencies, rewards


def _report(args: ServingArgs, results: dict) -> None:
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"\n{args.shape}, {args.requests} requests, {args.clients} clients, {machine}")
    print(
        "| workload | server | requests/s | p50 ms | p99 ms | ours over naive |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, servers in results.items():
        ratios = [a["requests_s"] / b["requests_s"] for a, b in zip(servers["ours"], servers["naive"], strict=True)]
        said = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        for server, rounds in servers.items():
            middle = sorted(rounds, key=lambda one: one["requests_s"])[len(rounds) // 2]
            times = f"{1000 * middle['p50']:.0f} | {1000 * middle['p99']:.0f}"
            print(f"| {name} | {server} | {middle['requests_s']:.1f} | {times} | {said if server == 'ours' else ''} |")
    if args.smoke:
        print("a smoke run is no measurement")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine, "smoke": args.smoke, "clients": args.clients, "results": results}
    (output / "serving.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(ServingArgs, use_underscores=True))
