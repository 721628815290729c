"""Runs without the seconds of imports: a process that has imported the recipe forks one for every rank.

Ranks are processes like any other, which a test kills, stops and signals; torchrun's environment is made by hand.
Started with `python forking.py`: reads a JSON object a line (flags, env, log, errors) and prints the rank's process number; for a
number alone it waits for that process and prints its exit status.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from PIL import Image

LONGEST = 300.0  # seconds that any of these runs may take on a slow machine before it counts as hanging


def serve() -> None:
    import transformers

    from open_rm import reward_modeling  # all that a run imports

    importlib.import_module("deepspeed")
    _ = transformers.get_scheduler, transformers.AutoModelForSequenceClassification  # imported when they are asked for
    be_ready_to_fork(reward_modeling)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            _, status = os.waitpid(asked, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            become_a_rank(reward_modeling, **asked)
        print(child, flush=True)


def be_ready_to_fork(recipe) -> None:
    """Everything is imported: from now on runs of the recipe draw no pictures, and collect no garbage of imports."""
    leave_out_pictures(recipe, setattr)
    gc.collect()
    gc.freeze()  # else each run's collections go through all that was imported


def leave_out_pictures(recipe, put) -> None:
    """They would be a third of each run or more; other tests draw them. put: as setattr."""
    from markupsafe import Markup

    from open_rm.evaluation.page import pictures

    put(recipe, "draw_curves", lambda record, title: blank(record.with_name("curves.png")))
    put(pictures, "reliability_png", lambda calibration, path, title: blank(path))
    put(pictures, "_svg", lambda *_, **__: Markup("<svg></svg>"))


def forked(world: int, become) -> None:
    """`become`, in as many ranks of a group, to their end. become: is given the group's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(os.fork())
        if ranks[-1] == 0:
            with contextlib.suppress(SystemExit):
                try:
                    become({name: str(value) for name, value in group.items()})
                    os._exit(0)
                except Exception:
                    traceback.print_exc()
            os._exit(1)
    assert [os.waitpid(pid, 0)[1] for pid in ranks] == [0] * world


def blank(path: Path) -> Path:
    Image.new("RGB", (2, 2)).save(path)
    return path


def become_a_rank(recipe, flags: list[str], env: dict, log: str, errors: str) -> None:
    from open_rm import command_line
    from open_rm.checks import check_args
    from open_rm.flags import Args

    os.environ.update(env)
    os.setsid()
    for number, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.close(0)
    status = 1
    try:
        sys.argv = ["reward_modeling.py", *flags]
        if "TEST_PATCH" in env:
            exec(env["TEST_PATCH"], {})  # what a test has fail
        command_line.run(recipe.main, command_line.read(Args, check_args))
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Nursery:
    """Starts runs; for a `with`."""

    def __enter__(self) -> "Nursery":
        repository = Path(__file__).parent.parent
        environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=repository,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while self._server.stdout.readline() != "ready\n":
            assert self._server.poll() is None
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait()

    def ask(self, what) -> int:
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(
        self,
        flags: list[str],
        log: Path,
        *,
        errors: Path | None = None,
        processes: int = 1,
        env: dict | None = None,
        own: dict | None = None,
    ) -> "Started":
        """A run. errors: for stderr, which goes to `log` else.  env: of all ranks.  own: rank -> env of it alone."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            group = {name: str(value) for name, value in group.items()} if processes > 1 else {}
            group |= (env or {}) | (own or {}).get(rank, {})
            printed = {"log": str(log), "errors": str(errors or log)}
            ranks.append(self.ask({"flags": [str(flag) for flag in flags], "env": group, **printed}))
        return Started(self, ranks, log)


class Started:
    """The ranks of a run. pids: in their order."""

    def __init__(self, nursery: Nursery, pids: list[int], log: Path):
        self.pids, self._nursery, self._log = pids, nursery, log
        self._statuses: dict[int, int] = {}

    @property
    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def running(self) -> bool:
        return all(self.alive(pid) for pid in self.pids)

    def alive(self, pid: int) -> bool:
        if pid in self._statuses:
            return False
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"

    def wait_for(self, reached, what: str = "") -> None:
        """Until `reached()`; no rank may end before."""
        started = time.monotonic()
        while not reached():
            assert self.running(), f"ended before {what}:\n{self.output}"
            assert time.monotonic() - started < LONGEST, what
            time.sleep(0.001)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """kill -9 of all ranks."""
        self.send(signal.SIGKILL)
        self.statuses()

    def statuses(self, timeout: float = LONGEST) -> list[int]:
        """Exit statuses of all ranks, -9 of a killed one; those that hang are killed and fail the test."""
        started = time.monotonic()
        while any(self.alive(pid) for pid in self.pids):
            if time.monotonic() - started > timeout:
                self.send(signal.SIGKILL)
                raise AssertionError(f"hangs after {timeout} s:\n{self.output}")
            time.sleep(0.01)
        for pid in self.pids:
            if pid not in self._statuses:
                self._statuses[pid] = self._nursery.ask(pid)
        return [self._statuses[pid] for pid in self.pids]

    def finish(self) -> str:
        """To its end, which has to be a good one; returns all that was printed."""
        assert self.statuses() == [0] * len(self.pids), self.output
        return self.output


if __name__ == "__main__":
    serve()
