"""What lasts as long as a run: the watchdog, the signals, the claim on its folder."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from open_rm import alive
from open_rm.errors import STOPPED, LeftAlone, OneRanksError, UserError
from open_rm.ranks import Ranks
from open_rm.reliability import watchdog
from open_rm.reliability.claim import Claim
from open_rm.reliability.signals import Stop

PARTING_SECONDS = 5.0
CLOSING_SECONDS = 300.0  # most that other ranks wait for the main one to close its records
SAYING_SECONDS = 0.5  # then it says why the run ended


class Survival:
    """stop: whether the run was asked to."""

    def __init__(self, stop: Stop):
        self.stop = stop
        self._claim: Claim | None = None

    def take(self, folder: str) -> None:
        """Claim an output folder for this run (main rank)."""
        self._claim = Claim.take(Path(folder))

    def know(self, folder: str, *, named: bool) -> None:
        """Where the run's folder is, for what every rank writes when it is ended. named: by --output_dir; else the same
        command would look elsewhere."""
        self.stop.again = "" if named else f" with --output_dir {folder}"
        watchdog.keep_stacks_in(folder, self.stop.again)

    def holds(self) -> bool:
        """Whether it is still this run's."""
        return self._claim is None or self._claim.held()

    def check_held(self) -> None:
        """Refuse to write into a folder that another run has taken over meanwhile."""
        if not self.holds():
            raise UserError(
                f"{self._claim.folder}: another run has taken it over while this one stood still; this one ends"
            )

    def release(self) -> None:
        if self._claim is not None:
            self._claim.release()


@contextlib.contextmanager
def surviving(ranks: Ranks, stall_minutes: float) -> Iterator[Survival]:
    """The block is a run."""
    store, seconds = ranks.store("watchdog"), 60 * stall_minutes
    with Stop().listening() as stop, watchdog.watched(ranks.rank, ranks.world_size, store, seconds):
        survival = Survival(stop)
        try:
            yield survival
        except BaseException as error:
            if isinstance(error, RuntimeError) and ranks.world_size > 1 and "onnection" in str(error):
                # A collective whose other end is gone: the watchdog knows who that was, and ends this rank with a sentence.
                time.sleep(PARTING_SECONDS)
            of_all = ranks.all_leave(error)
            if isinstance(error, SystemExit):
                _wait_for_others(ranks, error)
            elif isinstance(error, UserError) and not (of_all or isinstance(error, OneRanksError)):
                raise _of_one(error) from error
            raise
        finally:
            survival.release()
            if ranks.is_main and ranks.world_size > 1:
                with contextlib.suppress(RuntimeError):  # the store is gone, and who would read it
                    ranks.store("leaving").set("main", "left")


def _of_one(error: UserError) -> OneRanksError:
    """The same, as one that the watchdog tells the other ranks of. It is said already."""
    lone = OneRanksError(str(error))
    lone.of_all = False
    return lone


def _wait_for_others(ranks: Ranks, end: SystemExit) -> None:
    """A launcher ends all ranks as soon as the first one leaves, and the main rank has its records to close. Where one is
    gone, or closes for ever, this one leaves without it."""
    there = True
    if end.code == STOPPED and not isinstance(end, LeftAlone):
        try:
            ranks.from_main(lambda: None)
        except RuntimeError:
            there = False
    elif end.code != STOPPED and not ranks.is_main:
        there = _main_has_closed(ranks)
    end.of_all = end.of_all and there


def _main_has_closed(ranks: Ranks) -> bool:
    """Wait for it, and until it has said why the run ended."""
    store, until = ranks.store("leaving"), time.monotonic() + CLOSING_SECONDS
    try:
        with alive.phase("waiting for the main rank", alive.Kind.WAITS):
            while not (closed := store.check(["main"])) and time.monotonic() < until:
                time.sleep(0.05)
    except RuntimeError:  # the store went with the main rank
        return False
    time.sleep(SAYING_SECONDS)
    return closed
