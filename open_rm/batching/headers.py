"""Headers of a step: what many of its prompts have in common at their start (a system prompt, a rubric, tools).

The layout computes a header once in each micro-batch that holds prompts which begin with it (layouts.py). Here it is known
from numbers alone, so that pairs with the same header can be dealt and cut together.
"""

from dataclasses import dataclass

import numpy as np

from open_rm.batching.layouts import LEAST_HEADER
from open_rm.batching.work import Units, Work
from open_rm.data.pairs import PairTable
from open_rm.data.prefixes import best_sharing


@dataclass(frozen=True)
class Headers:
    """prompts: [M] cut prompts of the step, rising.  number: [M] the header of each, 0: none.

    tokens: [1 + headers] of each header, of none 0.
    """

    prompts: np.ndarray
    number: np.ndarray
    tokens: np.ndarray

    def __bool__(self) -> bool:
        return len(self.tokens) > 1

    def of(self, units: Units, table: PairTable) -> np.ndarray:
        """[units] the header of each; none where its pairs have several."""
        if not self:
            return np.zeros(len(units.size), np.int64)
        prompts = table.cut_prompt_ids(units.members())
        number, starts = self.number[np.searchsorted(self.prompts, prompts)], units.starts()
        first = np.minimum.reduceat(number, starts)
        return np.where(first == np.maximum.reduceat(number, starts), first, 0)

    def cost(self, area_cost: float) -> np.ndarray:
        """[1 + headers] what computing each takes, in tokens."""
        return Work(self.tokens, self.tokens**2 // 2).cost(area_cost)


NONE = Headers(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))


def find_headers(indices: np.ndarray, table: PairTable, layout: str, *, least: int = LEAST_HEADER) -> Headers:
    """The headers of a step's pairs that leave fewest tokens if each is computed once.

    least: tokens; shorter ones are not shared.
    """
    if layout != "shared_prefix" or table.prompt_order is None:
        return NONE
    prompts = np.unique(table.cut_prompt_ids(indices))
    order, overlaps = table.prompt_order().overlaps(prompts)
    # Shorter ones are not shared, and as zeros they are not looked at one after another.
    overlaps = np.where(overlaps < least, 0, overlaps).tolist()
    shared = [one for one in best_sharing(overlaps, least=least) if one.shared]
    number = np.zeros(len(prompts), np.int64)
    for i, one in enumerate(shared, start=1):
        number[order[one.places]] = i
    return Headers(prompts, number, np.array([0, *(one.shared for one in shared)]))


def typical_header(table: PairTable, layout: str, *, least: int = LEAST_HEADER) -> int:
    """Tokens of the header behind which the median pair of a data set stands, 0 where most pairs have none.

    least: as `find_headers`.
    """
    everything = np.arange(len(table))
    headers = find_headers(everything, table, layout, least=least)
    if not headers:
        return 0
    number = headers.number[np.searchsorted(headers.prompts, table.cut_prompt_ids(everything))]
    return int(np.quantile(headers.tokens[number], 0.5, method="lower"))
