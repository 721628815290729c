"""The ranks of a run: which one this process is, what one of them does for the others, sums over all; how one that fails ends."""

import contextlib
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from open_rm import alive, process_group
from open_rm.errors import LeftAlone, OneRanksError, UserError

WAITING_SECONDS = 60.0
AGREEING_SECONDS = 10.0  # in which every rank finds the mistake that one has found, if all of them do


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    device: the torch device it computes on.  sequence_size: ranks that compute the same micro-batches together, each a stretch
        of their positions (model/sequence_parallel.py); neighbours, the first of which has a rank that it divides.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    sequence_size: int = 1

    @property
    def name(self) -> str:
        """Its number and its host, as messages call it."""
        return f"rank {self.rank} on {platform.node()}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def data_rank(self) -> int:
        """Which of `data_size` shares of the pairs this rank computes; ranks of a sequence group have the same."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Number of shares that pairs are dealt into."""
        return self.world_size // self.sequence_size

    @property
    def counts(self) -> bool:
        """Whether what this rank computed of its pairs enters sums over all ranks: of a sequence group the first one's does."""
        return self.rank % self.sequence_size == 0

    def from_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main rank; every rank gets its value (it is pickled: small things only).

        A user's mistake found there is told once, by the main rank, and ends the others too instead of leaving them
        waiting; so does any other error, whose traceback the main rank keeps.
        """
        value, error, ending = None, None, None
        if self.is_main:
            try:
                value = work()
            except BaseException as raised:
                error = self._marked(raised, of_all=_may_be_of_all(raised))
                # a stop, which is no failure, ends the others as it ends this one
                others = type(raised)(raised.code) if isinstance(raised, SystemExit) else SystemExit(1)
                ending = self._marked(others, of_all=error.of_all)
        both, group = [(value, ending)], process_group.waiting()
        device = None if group is None else torch.device("cpu")  # else torch would take the GPU
        with self._waiting_for("the other ranks" if self.is_main else "the main rank"):
            try:
                dist.broadcast_object_list(both, src=0, group=group, device=device)
            except Exception as lost:  # a device that broke, or a rank that is gone, must not hide what was the cause
                if error is None:
                    raise
                if error.of_all:
                    self._marked(error, of_all=False)
                raise error from lost
        value, ending = both[0]
        if ending is not None:
            raise error or ending
        return value

    def main_first(self, build: Callable[[], Any]) -> Any:
        """Run `build` on the main rank, then on one rank of each other node, then on all: they find what it left in the
        cache, and ask the Hub nothing (node_cache.py). Where it fails on one of them, no rank goes on."""
        from open_rm import node_cache  # here, since it imports datasets

        kept = []  # a value that is built is not sent around: it may be large
        notes = node_cache.Notes()

        def first() -> dict:
            with node_cache.noting(notes):
                kept.append(build())
            return notes.commits

        notes.commits |= self.from_main(first)
        with self._ends_all():
            if not self.is_main and self.local_rank == 0:
                first()
        packed = self.gathered(notes.packed() if self.local_rank == 0 or self.is_main else None)
        with self._ends_all():
            if not kept:
                found = node_cache.Notes.unpacked(packed[self.rank - self.local_rank])
                with node_cache.noting(found), node_cache.as_fetched():
                    kept.append(build())
        return kept[0]

    def once_a_node(self, work: Callable[[], None]) -> None:
        """Run `work` on the main rank, then on one rank of each other node. Where it fails on one, no rank goes on."""
        self.from_main(work)
        with self._ends_all():
            if not self.is_main and self.local_rank == 0:
                work()

    def gathered(self, value: Any) -> list:
        """The values of all ranks, on every rank (they are pickled: small things only)."""
        values = [None] * self.world_size
        with self._waiting_for("the other ranks"):
            dist.all_gather_object(values, value, group=process_group.waiting())
        return values

    def store(self, name: str) -> dist.Store:
        """Where ranks leave small texts for each other without waiting, under names of its own."""
        return dist.PrefixStore(f"open_rm/{name}", dist.distributed_c10d._get_default_store())

    def fail(self, sentence: str) -> NoReturn:
        """End the run for a reason that every rank knows; the main rank tells it."""
        raise self._marked(UserError(sentence) if self.is_main else SystemExit(1), of_all=True)

    def all_leave(self, error: BaseException) -> bool:
        """Whether every rank leaves for the reason that `error` is this one's, so that nobody waits for it in a collective.

        `from_main`, `main_first` and `fail` say so of what they raise. SystemExit is a stop, agreed on after a step. Of any
        other UserError the ranks ask each other: most are of files and flags that all read. The rest is this rank's own.
        """
        if not hasattr(error, "of_all"):
            of_all = _may_be_of_all(error)
            if of_all and isinstance(error, UserError) and self.world_size > 1:
                of_all = self._all_come_here()
            self._marked(error, of_all=of_all)
        return error.of_all

    def _marked(self, error: BaseException, *, of_all: bool) -> BaseException:
        """The error, with whether every rank ends for its reason. One that is this rank's own is told here and now: as soon as
        the others hear of it they end, and a launcher then this process."""
        error.of_all = of_all
        if not of_all and self.world_size > 1 and not isinstance(error, SystemExit):
            words = "".join(traceback.format_exception(error))
            if isinstance(error, UserError):
                words = f"error: {error}\n" if self.is_main else f"[rank {self.rank}] {error}\n"
            print(words, end="", file=sys.stderr, flush=True)
        return error

    def _all_come_here(self) -> bool:
        """The same answer on every rank that asks: the first one that knows leaves it for the others."""
        store, until = self.store("failing"), time.monotonic() + AGREEING_SECONDS
        names = [str(rank) for rank in range(self.world_size)]
        try:
            store.set(names[self.rank], "a UserError")
            while not (all_here := store.check(names)) and time.monotonic() < until:
                time.sleep(0.05)
            return store.compare_set("all", "", str(all_here)) == b"True"
        except RuntimeError:  # the store went with its process
            return False

    @contextlib.contextmanager
    def _ends_all(self) -> Iterator[None]:
        """What ranks do inside some of them may fail at, alone; all meet at its end, and one that did ends all. A mistake of the
        user is told by the main rank, with the rank and the host that found it; a stop ends the others as it ends this one."""
        error = None
        try:
            yield
        except LeftAlone:
            raise  # the watchdog tells the others
        except (Exception, SystemExit) as raised:
            error = raised
        alone = error is not None and not _may_be_of_all(error)
        if alone:
            self._marked(error, of_all=False)  # told before the others come here, which may take long
        stop = error.code if isinstance(error, SystemExit) else None
        mistake = f"{self.name}: {error}" if isinstance(error, UserError) and not alone else None
        ends = [end for end in self.gathered((error is not None, stop, mistake)) if end[0]]
        if alone:
            raise error
        if any(stop is None and mistake is None for _, stop, mistake in ends):
            raise self._marked(SystemExit(1), of_all=False)
        for _, _, mistake in ends:
            if mistake is not None:
                self.fail(mistake)
        if ends:
            raise self._marked(SystemExit(ends[0][1]), of_all=True)

    @contextlib.contextmanager
    def _waiting_for(self, whom: str) -> Iterator[None]:
        """A wait that lasts is said every WAITING_SECONDS; WAITING_TIMEOUT ends it."""
        over = threading.Event()

        def say() -> None:
            started = time.monotonic()
            while not over.wait(WAITING_SECONDS):
                waited = time.monotonic() - started
                print(f"[rank {self.rank}] waiting for {whom}, {waited:.0f} s so far", file=sys.stderr, flush=True)

        if self.world_size > 1:
            threading.Thread(target=say, daemon=True).start()
        try:
            with alive.phase(f"waiting for {whom}", alive.Kind.WAITS):
                yield
        finally:
            over.set()


def _may_be_of_all(error: BaseException) -> bool:
    """Whether an error is of a kind that all ranks may end with together. Where a bug or a device ends one, nobody leaves the
    group: that would wait for the others."""
    return isinstance(error, (UserError, SystemExit)) and not isinstance(error, (OneRanksError, LeftAlone))


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun described in the environment, or form a group of one; leave it at the end.

    Where this rank fails alone (Ranks.all_leave), its process ends here, with a status that is not 0: leaving the group, and
    joining another one, would wait for ranks that wait for this one.
    """
    ranks = Ranks(*process_group.join())
    try:
        yield ranks
        if ranks.world_size > 1:
            ranks.gathered(None)  # leaving would wait for ever for a rank that failed while it closed its records
    except BaseException as error:
        if ranks.world_size > 1 and not ranks.all_leave(error):
            _exit(error)
        process_group.leave()
        raise
    process_group.leave()


def _exit(error: BaseException) -> NoReturn:
    """End this process, waiting for nobody."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) and code else 1)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, as a new tensor; the input itself is untouched."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
