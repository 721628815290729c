"""Which rank keeps the others from going on: from what was heard of each, nothing else."""

from dataclasses import dataclass

from open_rm.alive import Kind, Sign

GRACE = 0.5  # a rank that was killed makes others fail, whose word may come before its connection closes

KILLED = "(killed, out of memory or crashed)"
UNHEARD = "(process stopped or cut off)"
LACKS = {
    Kind.STEPS: "(its process runs: its stack says where)",
    Kind.BUSY: "(its process runs, but used no processor time and moved no bytes)",
}


@dataclass
class Seen:
    """What the main rank knows of a rank; times are of one clock.

    heard: when, last; None before the first time.  gone: when its connection closed or it said that it ends; then `manner`
    holds what it said.  left: it took its leave, and nobody waits for it any more.
    """

    rank: int
    host: str = ""
    sign: Sign | None = None
    heard: float | None = None
    gone: float | None = None
    manner: str = ""
    left: bool = False

    @property
    def watched(self) -> bool:
        return self.heard is not None and self.gone is None and not self.left

    def idle(self, now: float) -> float:
        return self.sign.idle + now - self.heard

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def judge(ranks: list[Seen], now: float, timeout: float) -> str | None:
    """Who keeps the run from going on, and how; None if nobody does."""
    gone = [seen for seen in ranks if seen.gone is not None]
    if any(now - seen.gone >= GRACE for seen in gone):
        # who ended without a word was the cause; who still had a word may have ended because of that
        first = min(gone, key=lambda seen: (bool(seen.manner), seen.gone))
        return f"{first} {first.manner or f'ended without a word, last in {first.sign.phase} {KILLED}'}"
    here = [seen for seen in ranks if seen.watched]
    # Half the timeout makes a suspect: the one who is the cause need not be the first to reach it.
    silent = [seen for seen in here if now - seen.heard >= timeout / 2]
    stuck = [seen for seen in here if seen.sign.kind != Kind.WAITS and seen.idle(now) >= timeout / 2]
    if max([now - seen.heard for seen in silent] + [seen.idle(now) for seen in stuck], default=0) < timeout:
        return None
    if silent:
        first = min(silent, key=lambda seen: seen.heard)
        return f"{first} {has_not_moved(first.idle(now), first.sign, UNHEARD)}"
    first = _behind(stuck, now)
    return f"{first} {has_not_moved(first.idle(now), first.sign)}"


def has_not_moved(seconds: float, sign: Sign, why: str | None = None) -> str:
    return f"has not moved on for {seconds:.0f} s, last in {sign.phase} {why or LACKS[sign.kind]}"


def _behind(stuck: list[Seen], now: float) -> Seen:
    """The one that the others wait for in a collective: in the phase that was entered first, with the fewest beats there.

    Beats of the whole run would not compare: the main rank does more than others.
    """
    oldest = max(stuck, key=lambda seen: seen.sign.inside + now - seen.heard).sign.phase
    there = [seen for seen in stuck if seen.sign.phase == oldest]
    return min(there, key=lambda seen: (seen.sign.here, -seen.idle(now)))
