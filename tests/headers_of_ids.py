"""Pairs of token ids whose prompts begin with headers, and the micro-batches that steps of them are dealt to."""

import dataclasses
import itertools
from collections.abc import Iterator

import datasets
import numpy as np
from pairs_of_ids import as_data

from open_rm.batching.dealing import deal_step
from open_rm.batching.layouts import Batch, lay_out
from open_rm.batching.rules import BatchRules
from open_rm.batching.steps import draw_steps
from open_rm.data.pairs import PreferenceData


def conversations(seed: int, *, prompts: int = 30, lists: bool = False) -> PreferenceData:
    """Prompts behind a few headers, some of which begin with another, with one to three pairs each that may begin alike beyond
    their prompt; or with a ranked list each, of two to four answers."""
    rng = np.random.default_rng(seed)
    headers = [[]]
    for number in range(3):
        headers.append([*headers[rng.integers(len(headers))], *[500 + number] * rng.integers(16, 120)])
    pairs, lengths, list_ids = [], [], []
    for number in range(prompts):
        prompt = [*headers[rng.integers(len(headers))], 1000 + number, *rng.integers(0, 3, rng.integers(30)).tolist()]
        if lists:
            answers = [_answer(prompt, 10 + i, rng) for i in range(rng.integers(2, 5))]
            made = list(itertools.combinations(answers, 2))
        else:
            alike = [[*prompt, *rng.integers(2) * [3] * rng.integers(90)] for _ in range(rng.integers(1, 4))]
            made = [tuple(_answer(one, 10 + side, rng) for side in (0, 1)) for one in alike]
        pairs += made
        lengths += [len(prompt)] * len(made)
        list_ids += [number] * len(made)
    data = as_data(pairs, lengths)
    columns = data.dataset.to_dict() | ({"list_id": list_ids} if lists else {})
    return dataclasses.replace(data, dataset=datasets.Dataset.from_dict(columns))


def _answer(prompt: list[int], first: int, rng: np.random.Generator) -> list[int]:
    return [*prompt, first, *rng.integers(0, 2, rng.integers(40)).tolist()]


def batches_dealt(data: PreferenceData, rules: BatchRules, seed: int) -> Iterator[Batch]:
    """What steps of several sizes are computed in, on one rank and on three."""
    table, pairs = data.table, len(data.table)
    for size, world_size in itertools.product((pairs, pairs // 3), (1, 3)):
        list_ids = table.list_id if rules.whole_lists else None
        for step in draw_steps(pairs, size, pairs, seed=seed, list_ids=list_ids):
            for part in itertools.chain(*deal_step(step, table, rules, world_size).ranks):
                prompt_ids = table.cut_prompt_ids(part.indices)
                yield lay_out(rules.layout, data.pairs(part.indices), pad_token_id=0, prompt_ids=prompt_ids)


def keys_of(batch: Batch) -> int:
    """That attention gathers: each segment's own and those of its prefix."""
    return sum(end - start + sum(b - a for a, b in prefix) for start, end, prefix in batch.segments.bounds)
