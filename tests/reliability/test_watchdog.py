"""A rank that is dead, stopped, cut off or stuck ends the run in time and is named; a healthy run is never ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from open_rm import alive
from open_rm.alive import Kind, Sign, beat, look, phase
from open_rm.reliability.judging import Seen, judge
from open_rm.reliability.watchdog import STALLED

HOST = socket.gethostname()
TIMEOUT = 3.0
AT_ONCE = 2.5  # on a noisy machine; less than the timeout
IN_TIME = 3 * TIMEOUT

# One process imports torch, once, and forks for each run a launcher, which forks its ranks. The launcher keeps the store, as
# torchrun's does. Each rank does `body` while it is watched.
NURSERY = """
import ctypes, json, os, signal, socket, subprocess, sys, time, traceback
import torch.distributed as dist
from open_rm.alive import Kind, beat, phase
from open_rm.errors import UserError
from open_rm.reliability import watchdog

def moves(seconds=1e6, name="training step 7"):
    with phase(name, Kind.STEPS):
        for _ in range(int(seconds / 0.02)):
            beat()
            time.sleep(0.02)

def burns(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(400000))
        time.sleep(0.02)

def one(rank, world_size, host, port, folder, timeout, start, body):
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 0
    try:
        store = dist.PrefixStore("here", dist.TCPStore(host, port, world_size, False))
        scope = globals() | dict(rank=rank, folder=folder, store=store)
        exec(start, scope)
        with watchdog.watched(rank, world_size, scope["store"], timeout):
            open(f"{folder}/{rank}.in", "w").close()
            exec(body, scope)
            began = time.monotonic()
        print("left after", time.monotonic() - began, flush=True)
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)

def launch(ranks, namespace, host, port, folder, **given):
    os.environ["MASTER_ADDR"] = host
    if namespace:
        assert ctypes.CDLL(None).setns(os.open(f"/run/netns/{namespace}", os.O_RDONLY), 0x40000000) == 0
    # Open before the ranks look for it, who would wait for a second otherwise; the store's threads come after the forks.
    door = socket.create_server(("", port)) if 0 in ranks else None
    pids = {}
    for rank in ranks:
        pid = os.fork()
        if pid == 0:
            one(rank, host=host, port=port, folder=folder, **given)
        pids[pid] = rank
        with open(f"{folder}/{rank}.pid", "w") as file:
            file.write(str(pid))
    if door:
        fd = door.detach()
        keeper = dist.TCPStore(host, port, given["world_size"], True, wait_for_workers=False, master_listen_fd=fd)
    while pids:
        pid, status = os.wait()
        rank = pids.pop(pid)
        with open(f"{folder}/{rank}.code.new", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
        os.rename(file.name, f"{folder}/{rank}.code")

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for launchers
for line in sys.stdin:
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        launch(**json.loads(line))
        os._exit(0)
"""


class Run:
    """The ranks of a run as processes; what stays of them lies in `folder`."""

    def __init__(self, nursery: subprocess.Popen, folder: Path, world_size: int, timeout: float):
        self.nursery, self.folder, self.world_size, self.timeout = nursery, folder, world_size, timeout

    def launch(self, ranks, body: str, port: int, host: str = "127.0.0.1", namespace: str = "", start: str = ""):
        of_run = {"folder": str(self.folder), "world_size": self.world_size, "timeout": self.timeout}
        given = {"ranks": list(ranks), "body": body, "port": port, "host": host, "namespace": namespace, "start": start}
        self.nursery.stdin.write(json.dumps(of_run | given) + "\n")
        self.nursery.stdin.flush()

    def read(self, rank: int, what: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / f"{rank}.{what}").read_text()
        return ""

    def send(self, number: signal.Signals, *ranks: int):
        for rank in ranks or range(self.world_size):
            os.kill(int(self.read(rank, "pid")), number)

    def codes(self, *ranks: int, within: float) -> list[int]:
        """The statuses with which the ranks left; fails if one has not left in time."""
        ranks = ranks or range(self.world_size)
        wait_for(lambda: all(self.read(rank, "code") for rank in ranks), within, self.everything)
        return [int(self.read(rank, "code")) for rank in ranks]

    def everything(self) -> str:
        return "\n".join(
            f"--- {rank}: {self.read(rank, 'code')}\n{self.read(rank, 'out')}" for rank in range(self.world_size)
        )

    def sentences(self, rank: int = 0) -> list[str]:
        return [line for line in self.read(rank, "out").splitlines() if line.startswith("error: ")]

    def close(self):
        for rank in range(self.world_size):
            if self.read(rank, "pid") and not self.read(rank, "code"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(self.read(rank, "pid")), signal.SIGKILL)


def wait_until_all_are_in(*runs: Run):
    for run in runs:
        ready = [run.folder / f"{rank}.in" for rank in range(run.world_size)]
        wait_for(lambda ready=ready: all(path.exists() for path in ready), 40, run.everything)
    time.sleep(0.3 + max(run.timeout for run in runs) / 10)  # each has sent its sign by now


def wait_for(condition, seconds: float, said=lambda: ""):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s\n{said()}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def nursery():
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.fixture
def start_ranks(nursery, tmp_path):
    runs = []

    def launch(body: str, world_size: int = 3, wait: bool = True, timeout: float = TIMEOUT, start: str = "") -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(Run(nursery, folder, world_size, timeout))
        runs[-1].launch(range(world_size), body, free_port(), start=start)
        if wait:
            wait_until_all_are_in(runs[-1])
        return runs[-1]

    yield launch
    for run in runs:
        run.close()


KEEP = "watchdog.keep_stacks_in(folder)\n"


# ---------------------------------------------------------------- healthy runs


def test_a_healthy_run_leaves_at_once_and_says_nothing(start_ranks):
    """Whoever leaves first; the last one computes alone for a second after the main rank has left."""
    run = start_ranks("moves(0.5 + 0.5 * rank)", wait=False)
    assert run.codes(within=40) == [0, 0, 0]
    for rank in range(3):
        [line] = run.read(rank, "out").splitlines()
        assert float(line.removeprefix("left after ")) < 0.9


def test_each_kind_of_phase_lives_by_its_own_sign(start_ranks):
    """For longer than the timeout nobody but the main rank beats."""
    body = f"""
seconds = {1.4 * TIMEOUT}
if rank == 0:
    moves(seconds)
elif rank == 1:
    with phase("loading the model", Kind.BUSY):
        burns(seconds)
elif rank == 2:
    with phase("tokenizing", Kind.BUSY):
        program = "import time\\nuntil = time.monotonic() + " + str(seconds) + "\\nwhile time.monotonic() < until:"
        subprocess.run([sys.executable, "-c", program + "\\n    sum(range(400000)); time.sleep(0.02)"])
elif rank == 3:
    with phase("waiting for the main rank", Kind.WAITS):
        time.sleep(seconds)
"""
    run = start_ranks(body, world_size=4)
    assert run.codes(within=2 * TIMEOUT + 10) == [0] * 4, run.everything()


def test_a_run_that_was_suspended_as_a_whole_goes_on(start_ranks):
    """Three ranks, and one alone."""
    body = "while not os.path.exists(f'{folder}/resumed'): moves(0.2)\nmoves(1)"
    runs = [start_ranks(body, wait=False), start_ranks(body, world_size=1, wait=False)]
    wait_until_all_are_in(*runs)
    for run in runs:
        run.send(signal.SIGSTOP)
    time.sleep(1.3 * TIMEOUT)
    for run in runs:
        (run.folder / "resumed").touch()
        run.send(signal.SIGCONT)
    for run in runs:
        assert set(run.codes(within=20)) == {0}, run.everything()


def test_strangers_at_the_port_do_not_matter(start_ranks):
    body = """
if rank == 1:
    host, port, token = json.loads(store.get("watchdog"))
    sign = dict(phase="x", kind="steps", beats=0, here=0, idle=1e6, inside=1e6)
    forged = [dict(token=t, rank=0, host="x", sign=sign, failed="forged") for t in ("", None, 3, "ü", token[:-1])]
    words = [b"", b"GET / HTTP/1.0\\r\\n\\r\\n", b"\\xff\\n", b"[]\\n", b"{}\\n", b"[" * 60000 + b"\\n", b"y" * 2000000]
    words += [json.dumps(message).encode() + b"\\n" for message in forged]
    held = []
    for word in words:
        held.append(socket.create_connection((host, port), timeout=1))
        try:
            held[-1].sendall(word)
        except OSError:
            pass
    held.pop().close()
moves(1)
"""
    run = start_ranks(body)
    assert run.codes(within=20) == [0, 0, 0], run.everything()
    assert not run.sentences()
    assert "warning" not in run.read(0, "out"), run.everything()


def test_a_mistake_that_all_ranks_know_of_ends_each_its_own_way(start_ranks):
    body = """
if rank:
    time.sleep(1)
    sys.exit(1)
raise UserError("a mistake")
"""
    run = start_ranks(body, wait=False)
    assert run.codes(within=40) == [1, 1, 1]
    assert not any(run.sentences(rank) for rank in range(3))


def test_a_port_that_a_firewall_closes_is_told_and_ends_nothing(start_ranks):
    start = """
class Elsewhere:
    wait = lambda self, *given: None
    get = lambda self, key: json.dumps(["127.0.0.1", 1, "token"])
if rank == 1:
    store = Elsewhere()
"""
    run = start_ranks("moves(2)", world_size=2, timeout=1.2, start=start)
    assert run.codes(within=20) == [0, 0], run.everything()
    assert run.read(1, "out").count("cannot reach the main rank (rank 0 on 127.0.0.1) on port 1") == 1


# ---------------------------------------------------------------- ranks that are gone


def test_a_stopped_rank_ends_the_others_in_time(start_ranks):
    """Rank 2 of one run, and the main rank of another."""
    with_main, without = start_ranks(KEEP + "moves()", wait=False), start_ranks(KEEP + "moves()", wait=False)
    wait_until_all_are_in(with_main, without)
    began = time.monotonic()
    with_main.send(signal.SIGSTOP, 2)
    without.send(signal.SIGSTOP, 0)
    assert with_main.codes(0, 1, within=IN_TIME) == without.codes(1, 2, within=IN_TIME) == [STALLED] * 2
    assert time.monotonic() - began > 0.8 * TIMEOUT
    for run, rank in ((with_main, 0), (with_main, 1), (without, 1), (without, 2)):
        assert "in moves" in (run.folder / f"stalled/rank_{rank:05d}.txt").read_text()

    [sentence] = with_main.sentences()
    assert f"rank 2 on {HOST} has not moved on for" in sentence
    assert "last in training step 7 (process stopped or cut off); all ranks end" in sentence
    assert f"{with_main.folder}/stalled/" in sentence
    assert not with_main.sentences(1)
    for rank in (1, 2):
        [sentence] = without.sentences(rank)
        assert "the main rank (rank 0 on 127.0.0.1) was not heard for" in sentence
        assert f"rank {rank} on {HOST} ends too, last in training step 7" in sentence

    for run, stopped in ((with_main, 2), (without, 0)):  # who wakes up alone ends too
        run.send(signal.SIGCONT, stopped)
        assert run.codes(stopped, within=10) == [STALLED]
    assert "did not hear the main rank any more" in without.sentences()[0]


def test_a_killed_rank_ends_the_others_at_once(start_ranks):
    """Rank 2 of one run, and the main rank of another; even if a child of it lives on."""
    child = """
if rank == {killed} and os.fork() == 0:
    os.closerange(0, 3)
    time.sleep(8)
    os._exit(0)
moves()
"""
    runs = {killed: start_ranks(child.format(killed=killed), timeout=8, wait=False) for killed in (0, 2)}
    wait_until_all_are_in(*runs.values())
    for killed, run in runs.items():
        run.send(signal.SIGKILL, killed)
    assert runs[0].codes(1, 2, within=AT_ONCE) == runs[2].codes(0, 1, within=AT_ONCE) == [STALLED] * 2
    assert "the main rank (rank 0 on 127.0.0.1) ended without a word" in runs[0].sentences(1)[0]
    [sentence] = runs[2].sentences()
    assert f"rank 2 on {HOST} ended without a word, last in training step 7" in sentence


def test_who_fails_because_another_was_killed_is_not_named(start_ranks):
    """As in a collective: rank 1 sees that rank 2 is gone before the main rank's watchdog does."""
    body = """
if rank == 1:
    time.sleep(1)
    os.kill(int(open(f"{folder}/2.pid").read()), 9)
    raise RuntimeError("connection closed by peer")
moves()
"""
    run = start_ranks(body, timeout=8)
    assert run.codes(within=AT_ONCE + 2) == [STALLED, 1, -9]
    assert "rank 2 on" in run.sentences()[0]


def test_a_rank_that_fails_ends_the_others_at_once_and_keeps_its_traceback(start_ranks):
    """Rank 2 of one run, and the main rank of another."""
    body = """
if rank == {failing}:
    time.sleep(1)
    raise RuntimeError("no such luck")
moves()
"""
    runs = {failing: start_ranks(KEEP + body.format(failing=failing), timeout=60, wait=False) for failing in (0, 2)}
    for failing, run in runs.items():
        assert run.codes(within=40) == [1 if rank == failing else STALLED for rank in range(3)]
        [sentence] = run.sentences()
        assert f"rank {failing} on {HOST} failed with RuntimeError in the start" in sentence
        assert "no such luck" in run.read(failing, "out")
        assert "no such luck" in (run.folder / f"stalled/rank_{failing:05d}.txt").read_text()
        assert "in moves" in (run.folder / "stalled/rank_00001.txt").read_text()


# ---------------------------------------------------------------- ranks that are stuck


def test_a_rank_that_hangs_is_named_with_its_stack(start_ranks):
    """The others wait for it, as in a collective, and are as idle as it is."""
    body = """
moves(0.3, "training step 6")
with phase("training step 7", Kind.STEPS):
    beat()
    if rank != 1:
        beat()
        time.sleep(1e9)

    def hangs():
        time.sleep(1e9)

    hangs()
"""
    run = start_ranks(KEEP + body)
    assert run.codes(within=IN_TIME) == [STALLED] * 3
    [sentence] = run.sentences()
    assert f"rank 1 on {HOST} has not moved on for 3 s, last in training step 7" in sentence
    assert "in hangs" in (run.folder / "stalled/rank_00001.txt").read_text()


def test_a_busy_phase_that_does_nothing_ends_the_run(start_ranks):
    body = """
if rank == 0:
    with phase("loading the model", Kind.BUSY):
        time.sleep(1e9)
moves()
"""
    run = start_ranks(body, world_size=2)
    assert run.codes(within=IN_TIME) == [STALLED] * 2
    [sentence] = run.sentences()
    assert "rank 0" in sentence and "last in loading the model" in sentence and "used no processor time" in sentence
    for rank in range(2):
        assert f"stacks of rank {rank}" in run.read(rank, "out"), "without a folder they go to stderr"


def test_a_process_alone_that_hangs_ends(start_ranks):
    body = """
with phase("training step 9", Kind.STEPS):
    time.sleep(1e9)
"""
    run = start_ranks(body, world_size=1, timeout=1.5)
    assert run.codes(within=IN_TIME) == [STALLED]
    assert "this process has not moved on for 2 s, last in training step 9" in run.sentences()[0]


def test_without_a_timeout_nobody_watches(start_ranks):
    run = start_ranks("assert not [t for t in __import__('threading').enumerate() if t.name == 'watchdog']", timeout=0)
    assert run.codes(within=10) == [0, 0, 0]


# ---------------------------------------------------------------- a network that is cut


def test_a_network_that_is_cut_ends_both_sides_in_time(two_hosts, nursery, tmp_path):
    names, addresses, cut = two_hosts
    run = Run(nursery, tmp_path, 2, TIMEOUT)
    try:
        for rank in range(2):
            run.launch([rank], "moves()", 29555, host=addresses[0], namespace=names[rank])
        wait_until_all_are_in(run)
        cut()
        assert run.codes(within=IN_TIME) == [STALLED] * 2
        [at_main], [at_other] = run.sentences(0), run.sentences(1)
        assert "rank 1 on" in at_main and "(process stopped or cut off); all ranks end" in at_main
        assert f"the main rank (rank 0 on {addresses[0]}) was not heard for" in at_other
    finally:
        run.close()


# ---------------------------------------------------------------- who is the cause


def seen(rank, phase="training step 3", kind=Kind.STEPS, here=1, idle=0.0, inside=0.0, heard=100.0, beats=0):
    return Seen(rank, f"host{rank}", Sign(phase, kind, beats, here, idle, inside), heard)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([seen(0), seen(1, idle=9)], None),
        ([seen(0), seen(1, kind=Kind.WAITS, idle=99)], None),
        ([seen(0, idle=11, here=2, beats=500), seen(1, idle=10, here=3, beats=9)], "rank 0 on host0"),
        ([seen(0, idle=11, here=2), seen(1, idle=9, here=1)], "rank 1 on host1"),
        ([seen(0, idle=11, here=2), seen(1, idle=3, here=1)], "rank 0 on host0"),
        ([seen(0, idle=10, here=2), seen(1, idle=10.5, here=2)], "rank 1 on host1"),
        (
            [seen(0, "evaluation", here=1, idle=10, inside=11), seen(1, here=7, idle=10.2, inside=15)],
            "rank 1 on host1",
        ),
        ([seen(0, idle=10), seen(1, idle=0.1, heard=90.5, here=9)], "rank 1 on host1"),
        ([seen(0), seen(1, kind=Kind.WAITS, heard=90)], "rank 1 on host1"),
    ],
    ids=[
        "nobody long enough",
        "who waits is never the cause",
        "beats of the run do not count",
        "the cause need not be the longest idle",
        "who moved a moment ago is no suspect",
        "the longest idle of equals",
        "the phase that was entered first",
        "silence before idleness",
        "silence of one who waits",
    ],
)
def test_the_cause_is_named(ranks, named):
    verdict = judge(ranks, 100.0, 10.0)
    assert verdict is None if named is None else verdict.startswith(named), verdict


def test_phases_lie_in_each_other_and_beat():
    before = look()
    with phase("outer", Kind.STEPS):
        beat()
        with phase("inner", Kind.BUSY):
            inner = look()
        outer = look()
    after = look()
    assert (inner.phase, inner.kind, inner.here) == ("inner", Kind.BUSY, 1)
    assert (outer.phase, outer.kind, outer.here) == ("outer", Kind.STEPS, 3)
    assert after.phase == "what follows outer"
    assert before.beats < inner.beats < outer.beats < after.beats


def test_work_of_children_is_seen_and_ones_own_look_is_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "sum(range(10**9))"]) as child:
        try:
            first = alive.work_done()
            time.sleep(0.5)
            assert alive.work_done()[0] > first[0] + 0.05
        finally:
            child.kill()
    first = alive.work_done()
    for _ in range(20):
        last = alive.work_done()
    assert last[0] - first[0] < 0.06 and last[1] - first[1] < 50_000
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)  # by this thread, so it does not count either
    assert alive.work_done()[1] - last[1] < 50_000
