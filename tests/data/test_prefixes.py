"""Which sequences share a beginning: the greatest saving, against all partitions."""

import itertools

import numpy as np
import pytest

from open_rm.data.prefixes import best_sharing, in_order, overlap


def partitions(members):
    if not members:
        yield []
        return
    first, *others = members
    for count in range(len(others) + 1):
        for with_it in itertools.combinations(others, count):
            for rest in partitions([one for one in others if one not in with_it]):
                yield [[first, *with_it], *rest]


def greatest_saving(sequences, least: int) -> int:
    def saved(group) -> int:
        shared = min((overlap(sequences[a], sequences[b]) for a, b in itertools.combinations(group, 2)), default=0)
        return (len(group) - 1) * (shared if shared >= least else 0)

    return max(sum(map(saved, groups)) for groups in partitions(list(range(len(sequences)))))


@pytest.mark.parametrize("least", [1, 3])
def test_no_partition_saves_more(least: int):
    rng = np.random.default_rng(least)
    for _ in range(150):
        sequences = [rng.integers(0, 2, rng.integers(0, 8)) for _ in range(rng.integers(1, 7))]
        order, overlaps = in_order(sequences)
        found = best_sharing(overlaps, least=least)
        assert sorted(place for one in found for place in one.places) == list(range(len(sequences)))
        for one in found:
            members = [sequences[order[place]] for place in one.places]
            assert all(overlap(members[0], other) >= one.shared for other in members[1:])
        assert sum(one.saved for one in found) == greatest_saving(sequences, least)


def test_of_two_headers_and_a_sequence_without_one():
    first, second = np.arange(10), np.arange(100, 120)
    sequences = [
        *(np.append(first, i) for i in (50, 51, 52)),
        *(np.append(second, i) for i in (60, 61)),
        np.array([7, 8]),
    ]
    order, overlaps = in_order(sequences)
    found = {tuple(sorted(order[place] for place in one.places)): one.shared for one in best_sharing(overlaps, least=4)}
    assert found == {(0, 1, 2): 10, (3, 4): 20, (5,): 0}
