"""Runs that are killed, stopped and started again, as processes; and what two runs must have in common at the end."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import OF_A_GROUP, REPOSITORY

LONGEST = 300.0  # seconds that any of these runs may take on a slow machine before it counts as hanging


class Recipe:
    """A run as a process of its own, torchrun's included, which a test may send signals to."""

    def __init__(self, flags: list[str], *, processes: int = 1, env: dict | None = None, script: Path | None = None):
        """script: runs in place of the recipe, e.g. to have it fail at a certain step."""
        what = [str(script)] if script else ["-m", "open_rm.reward_modeling"]
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
        environment |= {"PYTHONPATH": str(REPOSITORY), **(env or {})}
        self.process = subprocess.Popen(
            [*launcher, *what, *flags],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, reached, what: str = "") -> None:
        """Until `reached()`; the run must not end before."""
        started = time.monotonic()
        while not reached():
            assert self.process.poll() is None, (
                f"ended before {what or 'it was reached'}:\n{self.process.stdout.read()}"
            )
            assert time.monotonic() - started < LONGEST, what
            time.sleep(0.002)

    def kill(self) -> None:
        """kill -9 of all its processes at once: torchrun's ranks have sessions of their own and would go on."""
        for pid in [*self.ranks(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, in their order, under torchrun."""
        found = {}
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(child)
        return [found[rank] for rank in sorted(found)]

    def end(self, timeout: float = LONGEST) -> tuple[int, str]:
        """Exit status and all that was printed."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output


def finished(flags: list[str], *, processes: int = 1, **options) -> str:
    """A run to its end; returns what it printed."""
    status, output = Recipe(flags, processes=processes, **options).end()
    assert status == 0, output
    return output


def lines_of(folder: Path, name: str = "metrics.jsonl") -> int:
    try:
        return (folder / name).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def checkpoint_names(folder: Path) -> list[str]:
    """Committed ones."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def weights_hash(folder: Path) -> str:
    [file] = [path for path in folder.glob("*.safetensors")]
    return hashlib.sha256(file.read_bytes()).hexdigest()


TIMES = ("hours", "perf/", "eval/samples_per_second")


def record(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """A record's rows without what the clock decides."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def same_run(one: Path, other: Path) -> None:
    """Two folders hold one and the same run, bit for bit: weights, metrics, samples."""
    assert record(one) == record(other)
    assert record(one, "samples.jsonl") == record(other, "samples.jsonl")
    assert weights_hash(one) == weights_hash(other)
