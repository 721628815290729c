"""What lasts as long as a run: the watchdog, the signals, the claim on its folder."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from open_rm.errors import STOPPED, LeftAlone, UserError
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
        except SystemExit as end:
            # A launcher ends all ranks as soon as the first one leaves, and the main rank has its records to close.
            if end.code == STOPPED and not isinstance(end, LeftAlone):
                ranks.from_main(lambda: None)
            if not ranks.is_main and end.code != STOPPED:
                _wait_for_main(ranks)
            raise
        except RuntimeError as error:
            if ranks.world_size > 1 and "onnection" in str(error):  # a collective whose other end is gone
                time.sleep(PARTING_SECONDS)  # the watchdog knows who that was, and ends this rank with a sentence
            raise
        finally:
            survival.release()
            if ranks.is_main and ranks.world_size > 1:
                ranks.store("leaving").set("main", "left")


def _wait_for_main(ranks: Ranks) -> None:
    """A launcher ends all ranks when the first one leaves; the main rank still closes its records and says why."""
    store, until = ranks.store("leaving"), time.monotonic() + CLOSING_SECONDS
    try:
        while not store.check(["main"]) and time.monotonic() < until:
            time.sleep(0.05)
    except RuntimeError:  # the store went with the main rank
        return
    time.sleep(SAYING_SECONDS)
