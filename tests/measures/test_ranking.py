"""Rows of several answers: Kendall's tau against scipy, the best of n against every subset."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from open_rm.measures import ranking

values = st.integers(-3, 3).map(lambda n: n / 2)
rows_of_answers = st.integers(1, 6).flatmap(
    lambda size: st.tuples(*[st.lists(values, min_size=size, max_size=size) for _ in range(2)])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(rows_of_answers, min_size=1, max_size=8))
def test_taus_are_those_of_scipy_and_so_is_their_mean(rows):
    expected = []
    for scores, gold in rows:
        theirs = stats.kendalltau(scores, gold).statistic if len(scores) > 1 else math.nan
        found = ranking.kendall_tau_b(scores, gold)
        assert (found is None) == math.isnan(theirs)
        if found is not None:
            assert found == pytest.approx(theirs, abs=1e-12)
            expected.append(theirs)
    mean = ranking.mean_tau(rows)
    assert (mean is None) == (not expected)
    if mean is not None:
        assert mean.value == pytest.approx(np.mean(expected), abs=1e-12) and mean.n == len(expected)
        assert -1 <= mean.low <= mean.value + 1e-12 and mean.value - 1e-12 <= mean.high <= 1


def by_every_subset(scores, gold, n: int) -> tuple[float, float]:
    """Mean over all subsets of n answers: gold of the best-scored (of ties, each as often), and the best gold."""
    chosen, best = [], []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        chosen.append(np.mean([gold[i] for i in subset if scores[i] == top]))
        best.append(max(gold[i] for i in subset))
    return float(np.mean(chosen)), float(np.mean(best))


@settings(max_examples=60, deadline=None)
@given(st.lists(rows_of_answers, min_size=1, max_size=5))
def test_the_best_of_n_is_that_of_every_subset(rows):
    sizes = [len(scores) for scores, _ in rows]
    most = max(n for n in range(1, 7) if sum(size >= n for size in sizes) * 2 >= len(sizes))
    counted = [row for row in rows if len(row[0]) >= most]
    found = ranking.best_of_n(rows)
    assert [one["n"] for one in found] == list(range(1, most + 1))
    for one in found:
        expected = np.mean([by_every_subset(*row, one["n"]) for row in counted], 0)
        assert (one["expected"], one["oracle"]) == pytest.approx(tuple(expected), abs=1e-12)
        assert one["random"] == pytest.approx(np.mean([np.mean(gold) for _, gold in counted]), abs=1e-12)
        assert one["rows"] == len(counted)


def test_one_answer_is_a_random_one_and_all_are_the_best_scored():
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=5), rng.normal(size=5)) for _ in range(40)]
    found = ranking.best_of_n(rows)
    assert [found[0]["expected"], found[0]["oracle"]] == pytest.approx([found[0]["random"]] * 2)
    assert found[-1]["expected"] == pytest.approx(np.mean([gold[scores.argmax()] for scores, gold in rows]))
    assert found[-1]["oracle"] == pytest.approx(np.mean([gold.max() for _, gold in rows]))


def test_one_short_row_does_not_cut_the_curve_and_one_long_row_does_not_stretch_it():
    rows = [(np.arange(size), np.arange(size)) for size in (4, 4, 4, 2, 9)]
    found = ranking.best_of_n(rows)
    assert [(one["n"], one["rows"]) for one in found] == [(n, 4) for n in range(1, 5)]


def test_thousands_of_answers_do_not_overflow():
    scores = np.random.default_rng(1).normal(size=1500)
    found = ranking.best_of_n([(scores, scores)])
    assert found[-1]["expected"] == scores.max() and len(found) == 1500
    assert [one["expected"] for one in found] == pytest.approx([one["oracle"] for one in found])
    assert ranking.kendall_tau_b([1.7e308, -1.7e308], [0, 1]) == -1.0


def test_nothing_to_rank_is_nothing_and_no_numbers_are_refused():
    assert ranking.best_of_n([]) == [] == ranking.best_of_n([([], [])])
    assert ranking.mean_tau([]) is ranking.mean_tau([([1.0], [2.0])]) is ranking.kendall_tau_b([], []) is None
    for function in (ranking.best_of_n, ranking.mean_tau):
        with pytest.raises(ValueError, match="finite"):
            function([([1.0, math.nan], [0.0, 1.0])])
        with pytest.raises(ValueError, match="2 scores of 1"):
            function([([1.0, 2.0], [0.0])])
