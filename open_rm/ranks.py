"""The processes of a run: which one this is, what one of them does for the others, and sums over all.

gloo on the CPU, nccl on a GPU; alone, a process is a group of one, so that nothing below has to ask.
"""

import contextlib
import ctypes
import functools
import itertools
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import transformers

from open_rm import alive
from open_rm.errors import UserError

# DeepSpeed reads these when it is imported; without a GPU it would otherwise probe for one and warn.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

# Tokenizing a large data set on one rank may take long; the others wait for it in a collective.
COLLECTIVE_TIMEOUT = timedelta(hours=4)
WAITING_SECONDS = 60.0
GROUP_OF_ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
_GROUP_NUMBERS = itertools.count()  # every rank counts the groups that it has joined alike


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. device: the torch device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def from_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main rank; every rank gets its value (it is pickled: small things only).

        A user's mistake found there is told once, by the main rank, and ends the others too instead of leaving them
        waiting; so does any other error, whose traceback the main rank keeps.
        """
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except BaseException as raised:
                error = raised
        both = [(value, error is not None)]
        waits = contextlib.nullcontext() if self.is_main else alive.phase("waiting for the main rank", alive.Kind.WAITS)
        with waits, self._said_while_waiting():
            try:
                dist.broadcast_object_list(both, src=0)
            except Exception as lost:  # a device that broke, or a rank that is gone, must not hide what was the cause
                if error is None:
                    raise
                raise error from lost
        value, failed = both[0]
        if failed:
            raise error or SystemExit(1)
        return value

    def main_first(self, build: Callable[[], Any]) -> Any:
        """Run `build` on the main rank, then on one rank of each other node, then on all: they find what it left in the
        cache."""
        kept = []  # a value that is built is not sent around: it may be large
        self.from_main(lambda: kept.append(build()))
        if not self.is_main and self.local_rank == 0:
            kept.append(build())
        with alive.phase("waiting for the other ranks", alive.Kind.WAITS), self._said_while_waiting():
            dist.barrier()
        return kept[0] if kept else build()

    def gathered(self, value: Any) -> list:
        """The values of all ranks, on every rank (they are pickled: small things only)."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def store(self, name: str) -> dist.Store:
        """Where ranks leave small texts for each other without waiting, under names of its own."""
        return dist.PrefixStore(f"open_rm/{name}", dist.distributed_c10d._get_default_store())

    def fail(self, sentence: str) -> NoReturn:
        """End the run for a reason that every rank knows; the main rank tells it."""
        raise UserError(sentence) if self.is_main else SystemExit(1)

    @contextlib.contextmanager
    def _said_while_waiting(self) -> Iterator[None]:
        """Ranks that wait for the main one for long say so, every WAITING_SECONDS; COLLECTIVE_TIMEOUT ends it."""
        over = threading.Event()

        def say() -> None:
            started = time.monotonic()
            while not over.wait(WAITING_SECONDS):
                waited = time.monotonic() - started
                print(
                    f"[rank {self.rank}] waiting for the main rank, {waited:.0f} s so far", file=sys.stderr, flush=True
                )

        if not self.is_main:
            threading.Thread(target=say, daemon=True).start()
        try:
            yield
        finally:
            over.set()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun described in the environment, or form a group of one; leave it at the end."""
    ranks = _join()
    try:
        yield ranks
    finally:
        _leave()


def _join() -> Ranks:
    import deepspeed  # here, since it takes seconds

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(GROUP_OF_ONE, MASTER_PORT=str(port))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Lines of libraries would hide ours; DeepSpeed 0.19 calls collectives by names that torch 2.13 renames, a line a call.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
        # DeepSpeed would compile a helper that only its inference calls, and wait for ever for the lock of a run that
        # was killed while it compiled.
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        store, rank, world_size = _meeting_place()
        dist.init_process_group(
            backend,
            # torchrun's store outlives a group and keeps the addresses that its ranks had; the next one, in another run of
            # the same processes, would look for its ranks there and wait for ever. So each group has names of its own.
            store=dist.PrefixStore(f"open_rm/{next(_GROUP_NUMBERS)}", store),
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if backend == "nccl" and world_size > 1 else None,  # as DeepSpeed does
        )
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store in which ranks find each other, this process's rank and their number; one for all groups."""
    return next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))


def _leave() -> None:
    """Leave the process group. Exiting without it ends some runs with a signal on their way out."""
    import deepspeed

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    if os.environ.get("WORLD_SIZE") == "1" and not dist.is_torchelastic_launched():
        # what _join set would lead child processes to this group
        _meeting_place.cache_clear()
        for name in (*GROUP_OF_ONE, "MASTER_PORT"):
            os.environ.pop(name, None)


def _keep_freed_memory() -> None:
    """Let glibc reuse the large blocks that each step frees, instead of giving them back and having them zeroed again.

    About a tenth of a CPU step was page faults. Elsewhere than under glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is kept


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, as a new tensor; the input itself is untouched."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
