"""What computing pairs takes, in numbers alone: pairs that stay together, their tokens and their attention."""

from dataclasses import dataclass

import numpy as np

from open_rm.data.pairs import PairTable


@dataclass(frozen=True)
class Work:
    """What computing units takes, both [units]. tokens: positions in memory.  area: query-key products.  cost: in tokens."""

    tokens: np.ndarray
    area: np.ndarray

    def cost(self, area_cost: float) -> np.ndarray:
        return self.tokens + area_cost * self.area

    def behind(self, header: np.ndarray) -> "Work":
        """The same where the first `header` tokens of each unit were computed before. header: [units]."""
        return Work(self.tokens - header, self.area - header**2 // 2)


@dataclass(frozen=True)
class Units:
    """Pairs that stay together: unit u holds pairs[first[u] : first[u] + size[u]], one at least. first, size: [units]."""

    pairs: np.ndarray
    first: np.ndarray
    size: np.ndarray

    def take(self, which: np.ndarray | slice) -> "Units":
        return Units(self.pairs, self.first[which], self.size[which])

    def starts(self) -> np.ndarray:
        """[units] where each unit starts in `members`."""
        return np.cumsum(self.size) - self.size

    def members(self) -> np.ndarray:
        """The pairs of all units, one unit after another."""
        return self.pairs[np.arange(self.size.sum()) + np.repeat(self.first - self.starts(), self.size)]


def units_of(indices: np.ndarray, table: PairTable, layout: str, most: int, *, whole_lists: bool = False) -> Units:
    """What is dealt: pairs, or up to `most` pairs of one prompt where the layout shares it, or lists, in order of
    appearance."""
    here = np.arange(len(indices))
    if whole_lists:
        key, most = table.list_id[indices], len(indices)
    elif layout == "shared_prefix" and most > 1:
        key = table.cut_prompt_ids(indices)
    else:
        return Units(indices, here, np.ones_like(here))
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    appeared = first[number]  # where the prompt or the list of each pair is first
    order = np.argsort(appeared, kind="stable")
    place = here - np.searchsorted(appeared[order], appeared[order])  # of a pair among those of its prompt
    starts = np.flatnonzero(place % most == 0)
    return Units(indices[order], starts, np.diff(starts, append=len(indices)))


def work_of(units: Units, table: PairTable, layout: str) -> Work:
    """Tokens and area of each unit, its pairs computed together (for `padded`: of a single pair on its own)."""
    members, starts = units.members(), units.starts()
    chosen, rejected = table.chosen_length[members], table.rejected_length[members]
    if layout == "padded":
        longest = np.maximum.reduceat(np.maximum(chosen, rejected), starts)
        return Work(2 * units.size * longest, units.size * longest**2)
    if layout == "packed":
        area = np.add.reduceat(chosen**2 + rejected**2, starts) // 2
        return Work(np.add.reduceat(chosen + rejected, starts), area)
    if (by_prompt := _by_prompt(units, members, table)) is not None:
        parts, unit = by_prompt
        work = _work_shared(parts, table)
        return Work(*(np.bincount(unit, weights=column).astype(np.int64) for column in (work.tokens, work.area)))
    return _work_shared(units, table)


def _by_prompt(units: Units, members: np.ndarray, table: PairTable) -> tuple[Units, np.ndarray] | None:
    """(the units' pairs in parts of one prompt each, [parts] the unit of each); None where units are such parts already.

    Only lists are not: the prompt of a list whose answers differ in length is cut to several lengths.
    """
    prompt, unit = table.cut_prompt_ids(members), np.repeat(np.arange(len(units.size)), units.size)
    if not ((np.diff(prompt) != 0) & (np.diff(unit) == 0)).any():
        return None
    order = np.lexsort((prompt, unit))
    first = np.flatnonzero(np.append(True, (np.diff(prompt[order]) != 0) | (np.diff(unit) != 0)))
    return Units(members[order], first, np.diff(first, append=len(members))), unit[first]


def _work_shared(units: Units, table: PairTable) -> Work:
    """Work in shared_prefix of units of one prompt each."""
    members, starts = units.members(), units.starts()
    chosen, rejected = table.chosen_length[members], table.rejected_length[members]
    shared = table.shared_length[members]
    area = shared**2 // 2 + _suffix_area(shared, chosen - shared) + _suffix_area(shared, rejected - shared)
    tokens, area = np.add.reduceat(chosen + rejected - shared, starts), np.add.reduceat(area, starts)
    several = np.flatnonzero(units.size > 1)
    some = units.take(several)
    together = work_together(some, table, _prefix(some, table))
    fewer = together.tokens <= tokens[several]  # layouts.py decides the same way
    tokens[several[fewer]], area[several[fewer]] = together.tokens[fewer], together.area[fewer]
    return Work(tokens, area)


def _prefix(units: Units, table: PairTable) -> np.ndarray:
    """[units] tokens that all sequences of a unit of several pairs have in common."""
    members = units.members()
    return np.minimum.reduceat(np.minimum(table.prompt_length[members], table.shared_length[members]), units.starts())


def work_together(units: Units, table: PairTable, prefix: np.ndarray) -> Work:
    """Tokens and area where all sequences of a unit share its prefix and equal ones are computed once.

    prefix: [units] tokens.
    """
    members = units.members()
    unit = np.tile(np.repeat(np.arange(len(units.size)), units.size), 2)
    ids = np.concatenate((table.chosen_id[members], table.rejected_id[members]))
    lengths = np.concatenate((table.chosen_length[members], table.rejected_length[members]))
    order = np.lexsort((ids, unit))  # equal sequences of a unit stand side by side
    unit, ids, lengths = unit[order], ids[order], lengths[order]
    distinct = (np.diff(unit, prepend=-1) != 0) | (np.diff(ids, prepend=0) != 0)
    unit = unit[distinct]
    suffix = lengths[distinct] - prefix[unit]
    starts = np.searchsorted(unit, np.arange(len(units.size)))
    area = prefix**2 // 2 + np.add.reduceat(_suffix_area(prefix[unit], suffix), starts)
    return Work(prefix + np.add.reduceat(suffix, starts), area)


def _suffix_area(prefix: np.ndarray, suffix: np.ndarray) -> np.ndarray:
    """Query-key products of `suffix` tokens that continue `prefix` tokens."""
    return suffix * prefix + suffix**2 // 2


def joining(pieces: Units, header: np.ndarray, table: PairTable) -> np.ndarray:
    """[pieces] tokens to add to what a piece has behind its header, so that pieces of one prompt that come into one
    micro-batch take no more there than was planned.

    The layout joins them to one group, which continues the header once. Where the two sides of a pair have far more in
    common than the prompt, the group shares less than its pieces did. With a prompt of p tokens and a header of h, pieces
    that take u_i tokens each with the prompt alone shared make a group of at most sum(u_i) - (k - 1) p; to plan each with
    u_i - h - (p - h) / 2 at least is enough for any k > 1 of them.

    header: [pieces] tokens, 0 where there is none.
    """
    by_prompt = _by_prompt(pieces, pieces.members(), table)
    parts, piece = by_prompt or (pieces, np.arange(len(pieces.size)))
    prompts = table.cut_prompt_ids(parts.pairs[parts.first])
    _, prompt, parts_of_prompt = np.unique(prompts, return_inverse=True, return_counts=True)
    several = np.flatnonzero(parts_of_prompt[prompt] > 1)
    if not len(several):
        return np.zeros(len(pieces.size), np.int64)
    some, prompt, piece = parts.take(several), prompt[several], piece[several]
    shared = np.full(len(parts_of_prompt), np.iinfo(np.int64).max)
    np.minimum.at(shared, prompt, _prefix(some, table))
    prefix = shared[prompt]
    more = work_together(some, table, prefix).tokens - _work_shared(some, table).tokens - (prefix - header[piece]) // 2
    return np.bincount(piece, weights=np.maximum(0, more), minlength=len(pieces.size)).astype(np.int64)
