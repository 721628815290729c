"""Keys that a micro-batch gathers in shared_prefix, where they take memory beside what is computed.

On a GPU the keys and values of a header and a prompt are copied for each sequence that continues them (attention.py); on a CPU
those of short ones are, and all of them where the model has sliding windows, soft caps or sinks. So a micro-batch holds as many
keys as its distinct sequences have tokens, while headers and prompts are computed once. From numbers alone: how many keys a
position of a micro-batch has at most, and which real pairs gather most of them.
"""

from dataclasses import dataclass

import numpy as np

from open_rm.batching.headers import Headers, find_headers
from open_rm.batching.layouts import LEAST_HEADER
from open_rm.batching.work import Units, units_of, work_of
from open_rm.data.pairs import PairTable

LEVELS = 64  # lengths of headers that are looked at one by one; of more, ranges of them
# Headers of at least these quantiles of what neighbours have in common are looked at by themselves, too.
LONGER = (0.5, 0.9)
MOST_HEADERS = 8  # that one micro-batch is filled with
LOOKED_AT = 64  # units about the end of the room


@dataclass(frozen=True)
class _Answers:
    """Sequences of one prompt that are computed together, all [n].

    prompt: number of the cut prompt.  keys: tokens of all the sequences.  positions: that they take at least.
    """

    prompt: np.ndarray
    keys: np.ndarray
    positions: np.ndarray

    def take(self, which: np.ndarray) -> "_Answers":
        return _Answers(self.prompt[which], self.keys[which], self.positions[which])


def most_keys(table: PairTable, budget: int) -> float:
    """Keys of a micro-batch for each of its positions, at most, whichever pairs of a data set a step deals and cuts to up to
    `budget` positions.

    Sequences that take k keys and p positions, h of them a header that n prompts share, are part of a micro-batch that has at
    most k / (p - h + h / n) keys a position, since it computes the header once, and behind it (1 - h / budget) k / (p - h).
    The most over all headers bounds any mixture of them.
    """
    prompts, number = np.unique(table.cut_prompt_ids(np.arange(len(table))), return_inverse=True)
    some = _answers(table, number)
    most = float((some.keys / some.positions).max())
    if table.prompt_order is None:
        return most
    order, overlaps = table.prompt_order().overlaps(prompts)
    values = np.unique(overlaps[overlaps >= LEAST_HEADER])
    if not len(values):
        return most
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    some = some.take(np.argsort(place[some.prompt], kind="stable"))  # those of prompts that begin alike side by side
    places = place[some.prompt]
    beside = np.concatenate(([0], overlaps, [0]))
    longest = np.maximum(beside[:-1], beside[1:])[places]  # that the prompt may have with any other
    levels = values
    if len(values) > LEVELS:
        often = np.quantile(overlaps[overlaps >= LEAST_HEADER], np.linspace(0, 1, LEVELS), method="lower")
        levels = np.unique(often)
    # of each range of headers, the longest
    last = np.append(values[np.searchsorted(values, levels[1:]) - 1], values[-1])
    for header, up_to in zip(levels.tolist(), last.tolist(), strict=True):
        here = np.flatnonzero(longest >= header)
        group = np.cumsum(np.append(0, overlaps < header))  # by place: prompts that all begin with `header` tokens
        of_group, group = np.bincount(group), group[places[here]]
        keys, own = some.keys[here], some.positions[here] - np.minimum(longest[here], up_to)
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        all_prompts = np.maximum.reduceat(keys / (own + header / of_group[group]), starts)
        full = (1 - header / budget) * np.maximum.reduceat(keys / own, starts)
        most = max(most, float(np.minimum(all_prompts, full).max()))
    return most


def _answers(table: PairTable, number: np.ndarray) -> _Answers:
    """What of each prompt can gather most: the k shortest of its sequences, for each k, and each pair alone.

    number: [pairs] of the prompt.
    """
    both, shared = table.chosen_length + table.rejected_length, table.shared_length
    prompt, lengths = _distinct(table, np.arange(len(table)), number)
    prefix = np.zeros(number.max() + 1, np.int64)
    np.maximum.at(prefix, number, np.minimum(table.prompt_length, shared))
    starts = np.flatnonzero(np.diff(prompt, prepend=-1))
    own = np.maximum(lengths - prefix[prompt], 1)
    positions = _running(own, starts) + np.minimum(prefix, lengths[starts] - 1)[prompt]
    keys = _running(lengths, starts)
    return _Answers(*map(np.concatenate, ((prompt, number), (keys, both), (positions, both - shared))))


def _distinct(table: PairTable, pairs: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([n] group, [n] tokens) of the sequences of both sides, each once in a group; by group, and there the shortest first.

    group: [pairs] a number from 0.
    """
    ids = np.concatenate((table.chosen_id[pairs], table.rejected_id[pairs]))
    lengths = np.concatenate((table.chosen_length[pairs], table.rejected_length[pairs]))
    group = np.tile(group, 2)
    order = np.lexsort((ids, lengths, group))  # equal sequences of a group stand side by side
    group, ids, lengths = group[order], ids[order], lengths[order]
    first = (np.diff(group, prepend=-1) != 0) | (np.diff(ids, prepend=0) != 0)
    return group[first], lengths[first]


def _running(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[n] running totals that begin again at each of `starts`."""
    total = np.cumsum(values)
    sizes = np.diff(starts, append=len(values))
    return total - np.repeat(total[starts] - values[starts], sizes)


def keys_of_prompts(table: PairTable) -> tuple[np.ndarray, np.ndarray]:
    """[prompts] their ids; keys that are gathered for each position of a row in which all of a prompt's sequences are."""
    prompts, number, pairs = np.unique(table.prompt_id, return_inverse=True, return_counts=True)
    of_pair = np.where(pairs[number] == 1, table.shared_length, np.minimum(table.prompt_length, table.shared_length))
    prompt, lengths = _distinct(table, np.arange(len(table)), number)
    keys, answers = np.bincount(prompt, lengths), np.bincount(prompt)
    shared = np.full(len(keys), lengths.max())
    np.minimum.at(shared, number, of_pair)
    return prompts, keys / (keys - shared * (answers - 1))


def by_headers(table: PairTable, *, whole_lists: bool, room: int) -> list["ByHeader"]:
    """Ways to fill a micro-batch of up to `room` positions with the pairs that gather most keys, a prompt's pairs cut as dealing
    cuts them; none where no prompts share a header."""
    if table.prompt_order is None:
        return []
    everything = np.arange(len(table))
    _, overlaps = table.prompt_order().overlaps(np.unique(table.cut_prompt_ids(everything)))
    overlaps = overlaps[overlaps >= LEAST_HEADER]
    if not len(overlaps):
        return []
    # Where some prompts have more in common than many do, a step may hold them alone, and share all of it.
    shortest = (LEAST_HEADER, *np.unique(np.quantile(overlaps, LONGER, method="lower")).tolist())
    sets = [find_headers(everything, table, "shared_prefix", least=least) for least in shortest]
    sets = {(headers.number.tobytes(), headers.tokens.tobytes()): headers for headers in sets}  # equal ones once
    found, units_before = [], 0
    for most in (len(table),) if whole_lists else (len(table), 4, 2, 1):
        units = units_of(everything, table, "shared_prefix", most, whole_lists=whole_lists)
        if len(units.size) != units_before:
            found += [ByHeader.of(units, table, headers, room) for headers in sets.values()]
            units_before = len(units.size)
    return found


@dataclass(frozen=True)
class ByHeader:
    """Units header by header, in each those first that have most keys for a position.

    own: [units] positions behind the header.  keys, header: [units] of each.  tokens: [1 + headers] of each header.
    """

    units: Units
    own: np.ndarray
    keys: np.ndarray
    header: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def of(units: Units, table: PairTable, headers: Headers, room: int) -> "ByHeader":
        """room: positions of a micro-batch at most; units that cannot be among the best of a header in so many are left out."""
        header, keys = headers.of(units, table), _keys_of(units, table)
        own = np.maximum(work_of(units, table, "shared_prefix").tokens - headers.tokens[header], 1)
        order = np.lexsort((-keys / own, header))
        order = order[_come_first(own[order], header[order], room)]
        return ByHeader(units.take(order), own[order], keys[order], header[order], headers.tokens)

    def pairs(self, room: int) -> tuple[np.ndarray, int]:
        """(pairs, the positions that they are planned to take: `room` at most), none where nothing fits."""
        both = (self._filled(room, densest) for densest in (False, True))
        taken, planned = max(both, key=lambda one: self.keys[one[0]].sum())
        return self.units.take(taken).members(), planned

    def _filled(self, room: int, densest: bool) -> tuple[np.ndarray, int]:
        """(units, their positions). First those behind the header with which most keys, or most for a position, fit."""
        taken, left, free = [np.zeros(0, int)], room, np.ones(len(self.own), bool)
        for _ in range(MOST_HEADERS):
            here = np.flatnonzero(free & (self.own + self.tokens[self.header] <= left))
            if not len(here):
                break
            own, header = self.own[here], self.header[here]
            before = _running(own, np.flatnonzero(np.diff(header, prepend=-1))) - own
            held = np.clip((left - self.tokens[header] - before) / own, 0, 1)  # the last one in part
            gained = np.bincount(header, self.keys[here] * held)
            used = self.tokens[: len(gained)] + np.bincount(header, own * held)
            best = int((gained / np.maximum(used, 1) if densest else gained).argmax())
            here = here[header == best]
            here = here[_most_of(self.own[here], self.keys[here], left - int(self.tokens[best]))]
            taken.append(here)
            left -= int(self.own[here].sum() + self.tokens[best])
            free[self.header == best] = False
        return np.concatenate(taken), room - left


def _come_first(own: np.ndarray, header: np.ndarray, room: int) -> np.ndarray:
    """[n] bool, of units header by header, in each those with most keys for a position first: which of them may be computed.

    The others come after so many of their header and size, to a factor of two, that these fill the room.
    """
    size = np.frexp(own)[1]
    order = np.lexsort((size, header))  # keeps the order of those that are equal
    starts = np.flatnonzero(np.diff(header[order], prepend=-1) | np.diff(size[order], prepend=-1))
    before = _running(own[order], starts) - own[order]
    first = np.zeros(len(own), bool)
    first[order] = before < room + LOOKED_AT * own[order]  # some more, for about where the room ends
    return first


def _most_of(own: np.ndarray, keys: np.ndarray, room: int) -> np.ndarray:
    """Which of the units, those with most keys for a position first, have most keys within `room` positions: the first ones,
    and of those about where the room ends what is best (a knapsack, filled exactly).

    own, keys: [n].
    """
    ends = int(np.searchsorted(np.cumsum(own), room, side="right"))
    first = max(0, ends - LOOKED_AT // 2)
    room -= int(own[:first].sum())
    some = np.arange(first, min(first + LOOKED_AT, len(own)))
    most, with_it = np.zeros(room + 1, np.int64), np.zeros((len(some), room + 1), bool)
    for number, i in enumerate(some.tolist()):
        if own[i] <= room:
            more = most[: room + 1 - own[i]] + keys[i]
            with_it[number, own[i] :] = more > most[own[i] :]
            most[own[i] :] = np.maximum(more, most[own[i] :])
    taken = []
    for number in reversed(range(len(some))):
        if with_it[number, room]:
            taken.append(some[number])
            room -= int(own[some[number]])
    return np.concatenate((np.arange(first), np.array(taken[::-1], int)))


def _keys_of(units: Units, table: PairTable) -> np.ndarray:
    """[units] tokens of the distinct sequences of each."""
    unit, lengths = _distinct(table, units.members(), np.repeat(np.arange(len(units.size)), units.size))
    return np.bincount(unit, lengths, len(units.size)).astype(np.int64)
