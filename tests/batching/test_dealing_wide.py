"""64 ranks and nested headers: loads and budgets by what the layouts really make, not by what the planner says of itself."""

import itertools

import numpy as np
import pytest
from pairs_of_ids import as_data
from test_dealing import check_plan, real_batch

from open_rm.batching.dealing import deal_step
from open_rm.batching.rules import BatchRules

RANKS = 64
AREA_COST = 6e-5  # as of a model of some billions of parameters


def tree_of_headers(rng, depth: int, width: int) -> list[list[int]]:
    """Headers of which each begins with one of the level above: a system prompt, tools behind it, a rubric behind those."""
    headers, level = [[]], [[]]
    for _ in range(depth):
        level = [
            [*one, *[int(rng.integers(500, 900))] * int(rng.integers(20, 160))] for one in level for _ in range(width)
        ]
        headers += level
    return headers


def table_of_lists(seed: int, lists: int, most_answers: int, depth: int):
    """Ranked lists behind nested headers: (pairs, table). Answers have lengths as real ones have them, some begin alike, some
    are said twice, and a list's prompt may be a header or begin another list's."""
    rng = np.random.default_rng(seed)
    headers = tree_of_headers(rng, depth=depth, width=2)
    pairs, lengths, ids, prompts = [], [], [], [[3, 4]]
    for number in range(lists):
        header = headers[rng.integers(len(headers))]
        kind = rng.random()
        if kind < 0.05:
            prompt = [*header, 5] if header else [6, 5]
        elif kind < 0.1:
            prompt = [*prompts[rng.integers(len(prompts))], 7]
        else:
            prompt = [*header, 1000 + number, *rng.integers(0, 9, rng.integers(60)).tolist()]
        prompts.append(prompt)
        alike = [9] * int(rng.integers(2) * rng.integers(50))
        answers = [
            [*alike, 10 + i, *rng.integers(0, 9, int(min(900, rng.lognormal(4.5, 0.7)))).tolist()]
            for i in range(rng.integers(2, most_answers + 1))
        ]
        if rng.random() < 0.1:
            answers.append(answers[0][:-1] or [11])  # one that begins another
        sides = [[*prompt, *answer] for answer in answers]
        for chosen, rejected in itertools.combinations(sides, 2):
            pairs.append((chosen, rejected))
            lengths.append(len(prompt))
            ids.append(number)
    table = as_data(pairs, lengths).table
    table.list_id[:] = ids
    return pairs, table


# (seed, levels of headers, positions of a micro-batch, whole lists, most of max over mean load that is planned)
CASES = [
    *((0, 1, 2048, False, 1.05), (1, 1, 2048, True, 1.05), (2, 1, 8192, True, 1.05), (2, 1, 8192, False, 1.05)),
    *((3, 2, 2048, False, 1.06), (1, 2, 8192, False, 1.06), (1, 2, 2048, True, 1.06)),
    *((1, 3, 2048, False, 1.08), (0, 3, 8192, True, 1.08)),
    # little above a header: what is left of each fills a bin badly
    *((0, 3, 700, False, 1.3), (3, 2, 1024, True, 1.3)),
    (0, 1, 8192, False, 1.05),  # a prompt of 150 pairs, more than a rank's mean load
]


@pytest.mark.parametrize(("seed", "depth", "max_tokens", "whole_lists", "most"), CASES)
def test_real_loads_of_64_ranks_are_even_and_no_real_micro_batch_is_beyond_its_budget(
    seed, depth, max_tokens, whole_lists, most
):
    """Also of prompts that no micro-batch holds: what they take once they are cut is planned. A rank whose prompts begin alike
    beyond their header computes somewhat less than planned."""
    pairs, table = table_of_lists(seed, lists=700, most_answers=3 if whole_lists else 5, depth=depth)
    how = {"evaluation_tokens": max_tokens, "area_cost": AREA_COST, "whole_lists": whole_lists}
    indices = np.random.default_rng(seed).permutation(len(table))
    deal = deal_step(indices, table, BatchRules("shared_prefix", 0, max_tokens, **how), RANKS)
    check_plan(deal, indices)
    loads = np.zeros(RANKS)
    for number, part in ((number, part) for number, rank in enumerate(deal.ranks) for part in rank):
        batch = real_batch("shared_prefix", pairs, table, part.indices)
        units = table.list_id[part.indices] if whole_lists else part.indices
        assert batch.positions <= max_tokens or len(set(units.tolist())) == 1
        loads[number] += (batch.positions + AREA_COST * batch.area) * (part.counted > 0)
    assert 1 <= deal.imbalance <= most
    assert loads.max() / loads.mean() <= 1.08 * deal.imbalance
    if whole_lists:
        ranks_of = [
            (one, number)
            for number, rank in enumerate(deal.ranks)
            for part in rank
            if part.counted
            for one in set(table.list_id[part.indices].tolist())
        ]
        assert len(ranks_of) == len(set(table.list_id.tolist()))  # each in one micro-batch of one rank
