"""The order of all prompts of a data set against the overlaps of each two of them, token by token."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_of_ids import as_data

from open_rm.batching.headers import typical_header
from open_rm.data import prefix_order
from open_rm.data.pairs import shareable
from open_rm.data.prefix_order import find_order
from open_rm.data.prefixes import overlap


def column(sequences, rng: np.random.Generator) -> pa.ChunkedArray:
    """In a few chunks, as a cache is written in blocks; some of them empty."""
    cuts = sorted(rng.integers(0, len(sequences) + 1, 3).tolist())
    lists = [sequences[start:end] for start, end in itertools.pairwise([0, *cuts, len(sequences)])]
    return pa.chunked_array([pa.array([list(one) for one in some], pa.list_(pa.int32())) for some in lists])


def check(found, ids, sequences, rng) -> None:
    """Of any of the prompts, the least overlap of neighbours between two is what they have in common."""
    which = rng.permutation(len(ids))[: rng.integers(1, len(ids) + 1)]
    order, overlaps = found.overlaps(ids[which])
    assert sorted(order.tolist()) == list(range(len(which)))
    ordered = [sequences[i] for i in which[order]]
    for a, b in itertools.combinations(range(len(which)), 2):
        assert min(overlaps[a:b]) == overlap(ordered[a], ordered[b])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), different=st.integers(1, 4), most=st.integers(0, 150))
def test_overlaps_are_those_of_a_search_token_by_token(seed, different, most):
    """Sequences of few different tokens that go on like one of them for a while, several blocks at times."""
    rng = np.random.default_rng(seed)
    base, sequences = rng.integers(0, different, 150), []
    for _ in range(rng.integers(1, 25)):
        alike = rng.integers(0, most + 1)
        sequences.append(np.concatenate((base[:alike], rng.integers(0, different, rng.integers(0, 30)))))
    limits = np.array([rng.integers(0, len(one) + 1) if rng.random() < 0.5 else len(one) for one in sequences])
    rows, ids = rng.permutation(len(sequences)), np.sort(rng.permutation(1000)[: len(sequences)])
    stored = [sequences[i].tolist() for i in np.argsort(rows)]
    found = find_order(ids, column(stored, rng), rows, limits)
    check(found, ids, [one[:limit] for one, limit in zip(sequences, limits, strict=True)], rng)


def test_the_order_of_a_data_set_knows_what_all_sequences_of_each_prompt_begin_with():
    """Two prompts with two pairs each, one with a pair whose sides go on alike behind it."""
    header = list(range(100, 130))
    pairs, lengths = [], []
    for prompt, alike, count in (([1, 2], [], 2), ([1, 3], [], 2), ([1, 2, 8], [7, 7], 1), ([9], [7], 1)):
        for number in range(count):
            whole = [*header, *prompt] if prompt != [9] else [9]
            pairs.append(tuple([*whole, *alike, 20 + 2 * number + side, 5] for side in (0, 1)))
            lengths.append(len(whole))
    data = as_data(pairs, lengths)
    ids, rows, limits = shareable(data.table)
    beginnings = {30 + 2, 30 + 3 + 2, 1 + 1}
    assert set(limits.tolist()) == beginnings
    sequences = [np.array(pairs[row][0])[:limit] for row, limit in zip(rows, limits, strict=True)]
    check(data.table.prompt_order(), ids, sequences, np.random.default_rng(0))
    assert data.table.prompt_order() is data.table.prompt_order()  # found once
    # 1 2 stands twice, also as the beginning of 1 2 8, and with 1 3 shares the header and a token: 5 of 6 pairs have one
    assert typical_header(data.table, "shared_prefix", least=16) == 31
    assert typical_header(data.table, "shared_prefix", least=32) == 0  # three of six have one


def test_prompts_that_are_not_in_the_order_are_refused():
    data = as_data([([1, 2], [1, 3])], [1])
    with pytest.raises(KeyError):
        data.table.prompt_order().overlaps(np.array([5]))


@pytest.mark.parametrize("header", [0, 300])
def test_no_more_is_read_of_20_000_prompts_than_they_share_and_a_few_blocks(header, monkeypatch):
    """However long they are behind it."""
    count, length, read = 20_000, 400, 0
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30_000, (count, length), np.int32)
    tokens[:, :header] = 7
    offsets = np.arange(0, length * count + 1, length, np.int32)
    stored = pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens.ravel()))])
    windows = prefix_order._windows

    def counted(values, starts, size):
        nonlocal read
        read += len(starts) * size
        return windows(values, starts, size)

    monkeypatch.setattr(prefix_order, "_windows", counted)
    found = find_order(np.arange(count), stored, np.arange(count), np.full(count, length))
    assert found.overlap_with_next[:-1].min() == header
    assert read <= count * (header + 2 * prefix_order.LARGEST_BLOCK)
