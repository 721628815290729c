"""The worst micro-batches that the data can fill a budget with: what --find_batch_size computes."""

import sys
from collections.abc import Iterator

import numpy as np

from open_rm.batching.feeding import MicroBatch
from open_rm.batching.layouts import LEAST_HEADER, lay_out
from open_rm.batching.rules import BatchRules
from open_rm.batching.targets import TargetColumns
from open_rm.batching.work import units_of, work_of
from open_rm.data.pairs import PreferenceData
from open_rm.training import fitting, gathered

STEP = 256  # budgets are multiples of it
KEYS = 1.5  # so many times the keys a position of a pair alone, and a prompt with many answers is tried too
FILLED_AGAIN = 4  # times at most that a micro-batch behind headers is filled
NEAR = 0.9  # of the most keys, and of the most for a position: a way that has less of both is not filled again


class Filling:
    """The worst micro-batches that the data can fill a budget with.

    The longest pairs, each as if its prompt were its own, or where lists stay whole the longest lists, so that a budget holds the
    largest of them. In shared_prefix, where a GPU (a CPU at times: gathered.py) copies keys and values of header and prompt for
    each answer, also copies of the prompt that has most of them; and where prompts share headers, the pairs that gather most.
    """

    def __init__(self, rules: BatchRules, data: PreferenceData, devices: int, columns: TargetColumns | None = None):
        """devices: that compute a micro-batch together.  columns: what the loss is told; None of plain pairs."""
        self._rules, self._data, self._devices = rules, data, devices
        self._columns = columns or TargetColumns()
        everything = np.arange(len(data.table.chosen_length))
        units = units_of(everything, data.table, rules.layout, 1, whole_lists=rules.whole_lists)
        positions = work_of(units, data.table, rules.layout).tokens
        longest = np.argsort(-positions, kind="stable")
        self._longest, self._positions = units.take(longest), positions[longest]
        ids, keys = gathered.keys_of_prompts(data.table)
        worst = int(keys.argmax())
        alone = np.add.reduceat((data.table.chosen_length + data.table.rejected_length)[units.pairs], units.first)
        self._sharing = rules.layout == "shared_prefix"
        shared = self._sharing and keys[worst] > KEYS * (alone / np.maximum(positions, 1)).max()
        self._answers = np.flatnonzero(data.table.prompt_id == ids[worst]) if shared else None
        self._ways, self._most = [], 0  # to fill up to so many positions behind headers: made when they are needed

    @property
    def smallest(self) -> int:
        """The least budget: the largest pair's or list's, rounded up."""
        return -(-int(self._positions[0]) // (STEP * self._devices)) * STEP

    def micro_batches(self, budget: int) -> list[MicroBatch]:
        """What to compute for a budget of a device, the longest pairs last."""
        room = budget * self._devices
        made = [self.longest(budget)]
        if self._answers is not None:
            made.insert(0, self._copies_of_a_prompt(room))
        if (behind := self._behind_headers(room)) is not None:
            made.insert(0, behind)
        return made

    def longest(self, budget: int) -> MicroBatch:
        """The longest pairs or lists that a budget holds, one at least."""
        room = budget * self._devices
        copies = -(-room // int(self._positions.sum()))
        positions = np.tile(self._positions, copies)
        if self._rules.layout == "padded":
            count = room // int(positions[0])
        else:
            count = int(np.searchsorted(np.cumsum(positions), room, side="right"))
        return self._units(np.resize(np.arange(len(self._positions)), max(count, 1)))

    def least(self) -> MicroBatch:
        """The smallest pair or list."""
        return self._units(np.array([len(self._positions) - 1]))

    def _units(self, which: np.ndarray) -> MicroBatch:
        units = self._longest.take(which)
        return self._laid_out(units.members(), np.repeat(np.arange(len(which)), units.size))

    def _copies_of_a_prompt(self, room: int) -> MicroBatch:
        pairs = self._answers
        while (one := self._laid_out(pairs, np.zeros(len(pairs), int))).batch.positions > room and len(pairs) > 1:
            pairs = pairs[: len(pairs) // 2]
        copies = max(1, room // one.batch.positions)
        return self._laid_out(np.tile(pairs, copies), np.repeat(np.arange(copies), len(pairs)))

    def _behind_headers(self, room: int) -> MicroBatch | None:
        """The pairs that gather most keys, laid out as training does it. All ways to fill the room are tried once, and then again
        those that are near the best."""
        if self._sharing and room > self._most:
            self._most = max(4 * room, fitting.MOST_POSITIONS * self._devices)
            how = {"whole_lists": self._rules.whole_lists, "room": self._most}
            self._ways = gathered.by_headers(self._data.table, **how)
        best, most, densest = None, 0.0, 0.0
        ways = [self._filled(way, room) for way in self._ways]
        while ways:
            found = []
            for way in ways:
                if (one := next(way, None)) is None:
                    continue
                keys, positions = _keys_of(one), one.batch.positions
                found.append((way, keys * min(1.0, room / positions), keys / positions))
                if positions <= room and (best is None or keys > _keys_of(best)):
                    best = one
            most = max([most, *(keys for _, keys, _ in found)])
            densest = max([densest, *(density for *_, density in found)])
            ways = [way for way, keys, density in found if keys >= NEAR * most or density >= NEAR * densest]
        return best

    def _filled(self, way: gathered.ByHeader, room: int) -> Iterator[MicroBatch]:
        """One way, laid out. That shares rather more than was planned, and pairs of one prompt that were planned apart are joined,
        so room that is left is filled and what is too much left out, a few times."""
        aim, too_much = room, sys.maxsize
        for _ in range(FILLED_AGAIN):
            pairs, planned = way.pairs(aim)
            if not planned:
                return
            one = self._laid_out(pairs, self._data.table.cut_prompt_ids(pairs), least_header=LEAST_HEADER)
            yield one
            if one.batch.positions == room:
                return
            too_much = min(too_much, planned) if one.batch.positions > room else too_much
            aim = min(planned + room - one.batch.positions, too_much - 1)

    def _laid_out(self, indices: np.ndarray, prompts: np.ndarray, *, least_header: int = sys.maxsize) -> MicroBatch:
        """least_header: else copies of a pair would share."""
        rules = self._rules
        pairs = self._data.pairs(indices)
        how = {"prompt_ids": prompts.tolist(), "least_header": least_header}
        batch = lay_out(rules.layout, pairs, pad_token_id=rules.pad_token_id, **how)
        return MicroBatch(indices, batch, self._columns.of_step(indices)(indices), last=False)


def _keys_of(micro: MicroBatch) -> int:
    """That attention gathers in a packed row."""
    return int(micro.batch.segments.key_starts[-1])
