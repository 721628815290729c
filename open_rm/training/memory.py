"""Memory: what a rank has held at most and may still take; out of memory, in a sentence that says at which pair and which flag to
turn."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from open_rm.batching.feeding import MicroBatch
from open_rm.batching.rules import BatchRules
from open_rm.data.pairs import PreferenceData
from open_rm.errors import OneRanksError
from open_rm.training import footprint

# Allocators of devices have a class of their own; the CPU's says it in words.
IN_WORDS = ("can't allocate memory", "not enough memory", "out of memory")
KIB = 1024


@contextlib.contextmanager
def explained(micro: MicroBatch, data: PreferenceData, rules: BatchRules) -> Iterator[None]:
    """The block computes `micro`; what does not fit into memory ends it with a OneRanksError that names its longest pair."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        positions = micro.batch.positions
        names = "--gradient_checkpointing on, or --deepspeed configs/ds/zero3.json"
        budget = f"--max_tokens_per_micro_batch {max(1, rules.max_tokens // 2)} (it is {rules.max_tokens}), "
        raise OneRanksError(
            f"out of memory in a micro-batch of {len(micro.indices)} pairs and {positions} positions, {_longest(micro, data)}"
            f"; pass {budget if len(micro.indices) > 1 else ''}{names}"
        ) from error


def is_shortage(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in IN_WORDS)


def _longest(micro: MicroBatch, data: PreferenceData) -> str:
    if not len(micro.indices):
        return "which only keeps this rank in step"
    lengths = data.table.chosen_length[micro.indices] + data.table.rejected_length[micro.indices]
    index = micro.indices[lengths.argmax()]
    return f"the longest pair being {data.places([index])[0]} with {lengths.max()} tokens"


class GpuMemory:
    """Of tensors on this process's GPU, in bytes."""

    def __init__(self, device: torch.device):
        self._device = device

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def left(self) -> int:
        """That tensors may still take."""
        return footprint.free_bytes(self._device)

    def reset(self) -> None:
        """`peak` counts from now on."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Most that was held."""
        return torch.cuda.max_memory_allocated(self._device)

    def give_back(self) -> None:
        torch.cuda.empty_cache()


class CpuMemory:
    """Of this process, in bytes, under Linux. sharing: processes like it that take from the same machine, itself among them."""

    def __init__(self, sharing: int):
        self._sharing = sharing

    def held(self) -> int:
        return KIB * _status("VmRSS")

    def left(self) -> int:
        """That this process may still take: its share of what the machine and its control group have, and its own limits."""
        machine = KIB * _number_of("/proc/meminfo", "MemAvailable")
        shared = [machine, *_left_of_control_groups()]
        own = [
            limit - KIB * _status(name)
            for which, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
            if (limit := resource.getrlimit(which)[0]) != resource.RLIM_INFINITY
        ]
        return min(min(shared) // self._sharing, *own) if own else min(shared) // self._sharing

    def reset(self) -> None:
        """`peak` counts from now on; where the system forbids it, from the start of the process."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Most that was held."""
        return KIB * _status("VmHWM")

    def give_back(self) -> None:
        """What was freed goes back by itself."""


def _status(name: str) -> int:
    return _number_of("/proc/self/status", name)


def _number_of(file: str, name: str) -> int:
    """From lines such as `VmRSS:  1234 kB`."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def _left_of_control_groups(root: Path = Path("/")) -> list[int]:
    """What limits of control groups leave: [] without one. Pages that the system can drop count as free."""
    return [most - held for most, held in _control_groups(root)]


def limits_of_control_groups() -> list[int]:
    """Bytes that this process's control group, and those that it lies in, may hold: [] without a limit."""
    return [most for most, _ in _control_groups(Path("/"))]


def _control_groups(root: Path) -> list[tuple[int, int]]:
    """Bytes that this process's control group, and those that it lies in, may hold, and that they hold and cannot drop. In a
    container the process may be named a group of the host, which is not there: then the topmost is the container's.

    root: of the file system.
    """
    groups = []
    for line in _lines_of(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, used, stat = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, stat = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = top.joinpath(*parts[:depth])
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                most, held = (int((group / name).read_text()) for name in (limit, used))
                of_pages = dict(line.split() for line in _lines_of(group / "memory.stat"))
                groups.append((most, held - int(of_pages.get(stat, 0))))
    return groups


def _lines_of(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
