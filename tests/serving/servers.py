"""Servers in processes of their own: `python -m open_rm.serve`, or a fork of a process that has imported it already.

A forked one may be held or made to fail in the middle of scoring, by files in its folder.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from conftest import REPOSITORY, environment_of_a_process

LONGEST = 300.0  # seconds that a start may take on a slow machine
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["open_rm.serve", "transformers.models.llama.modeling_llama"])


class Server:
    """A running server. folder: of its log and of the files hold, held, fail."""

    def __init__(self, process, folder: Path):
        self.process, self.folder, self.pid = process, folder, process.pid
        self.url = self.wait_for(r"^serving .* on (http://\S+)$").group(1)
        self.port = int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def wait_for(self, pattern: str) -> re.Match:
        """In its log."""
        until = time.monotonic() + LONGEST
        while not (found := re.search(pattern, self.log, re.MULTILINE)):
            assert self.status is None and time.monotonic() < until, self.log
            time.sleep(0.01)
        return found

    def wait_for_status(self) -> int:
        self.process.wait(LONGEST) if isinstance(self.process, subprocess.Popen) else self.process.join(LONGEST)
        assert self.status is not None, "it does not end"
        return self.status

    def signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Batches wait inside the scorer."""
        (self.folder / "held").unlink(missing_ok=True)
        (self.folder / "hold").touch()
        try:
            yield
        finally:
            (self.folder / "hold").unlink(missing_ok=True)

    def wait_until_held(self) -> None:
        wait_until((self.folder / "held").exists)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Scoring fails."""
        (self.folder / "fail").touch()
        try:
            yield
        finally:
            (self.folder / "fail").unlink()


def wait_until(true) -> None:
    """Look until something has happened elsewhere."""
    until = time.monotonic() + LONGEST
    while not true():
        assert time.monotonic() < until, true
        time.sleep(0.005)


def start(folder: Path, model: Path, *flags: object) -> Server:
    """`python -m open_rm.serve`, as users start it."""
    command = [sys.executable, "-m", "open_rm.serve", "--model", str(model), "--port", "0", *map(str, flags)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment_of_a_process(), stdout=log, stderr=subprocess.STDOUT
        )
    return _started(process, folder)


def fork(folder: Path, model: Path, *flags: object, token: str = "") -> Server:
    """The same without the seconds of imports."""
    return _started(_forked(folder, model, flags, token), folder)


def fork_and_wait(folder: Path, model: Path, *flags: object) -> tuple[int, str]:
    """Exit status and log of one that does not come to serve."""
    process = _forked(folder, model, flags, "")
    process.join(LONGEST)
    return process.exitcode, (folder / "log").read_text()


def _forked(folder: Path, model: Path, flags: Iterable[object], token: str) -> multiprocessing.Process:
    (folder / "log").touch()
    arguments = ["--model", str(model), "--port", "0", *map(str, flags)]
    process = FORKS.Process(target=serve, args=(arguments, str(folder), token), daemon=True)
    process.start()
    return process


def _started(process, folder: Path) -> Server:
    try:
        return Server(process, folder)
    except BaseException:
        process.kill()
        raise


def serve(flags: list[str], folder: str, token: str) -> None:
    """In the forked process."""
    from open_rm import command_line, serve
    from open_rm.scoring.scorer import Scorer
    from open_rm.serving.limits import TOKEN_VARIABLE

    output = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    if token:
        os.environ[TOKEN_VARIABLE] = token
    hold, held, fail = (Path(folder) / name for name in ("hold", "held", "fail"))
    rewards = Scorer.rewards

    @functools.wraps(rewards)
    def obedient(self, *args, **how):
        while hold.exists():
            held.touch()
            time.sleep(0.002)
        if fail.exists():
            raise RuntimeError("out of memory, says a test")
        return rewards(self, *args, **how)

    Scorer.rewards = obedient
    args = command_line.parse(serve.ServeArgs, flags)
    serve.check(args)
    command_line.run(serve.main, args)
