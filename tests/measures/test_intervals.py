"""Intervals and tests: against statsmodels and scipy, by what they cover, and at the edges."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from open_rm.measures import intervals
from open_rm.measures.intervals import Estimate

COUNTS = [(0, 1), (1, 1), (0, 5), (5, 5), (8, 10), (218, 350), (731, 1000), (999_999, 1_000_000)]


@pytest.mark.parametrize("k, n", COUNTS)
def test_wilsons_interval_is_that_of_statsmodels_and_scipy(k, n):
    low, high = intervals.wilson(k / n, n)
    assert (low, high) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize("k, n", COUNTS[:-1])
def test_rows_and_pairs_of_right_and_wrong_have_wilsons_interval(k, n):
    right = np.arange(n) < k
    expected = (k / n, *intervals.wilson(k / n, n))
    for found in (intervals.of_rows(right), intervals.of_pairs(right, np.arange(n)[::-1])):
        assert (found.value, found.low, found.high) == pytest.approx(expected, abs=1e-12)
        assert found.n == n


def width(found: Estimate) -> float:
    return found.high - found.low


def test_pairs_that_depend_on_each_other_tell_less():
    """Four pairs a row that are all alike tell as much as one."""
    right = np.random.default_rng(0).random(100) < 0.7
    once = intervals.of_pairs(right, np.arange(100))
    four_times = intervals.of_pairs(np.repeat(right, 4), np.repeat(np.arange(100), 4))
    assert (four_times.low, four_times.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert (four_times.n, once.n) == (400, 100)
    all_right = intervals.of_pairs(np.ones(12), np.repeat([7, 3, 9], 4))  # nothing varies: each row counts once
    assert (all_right.low, all_right.high) == intervals.wilson(1.0, 3)
    assert width(four_times) > 1.9 * width(intervals.of_rows(np.repeat(right, 4)))


def test_rows_that_vary_less_than_right_and_wrong_tell_more_but_few_are_never_sure():
    thirds = np.random.default_rng(0).binomial(3, 0.6, 200) / 3
    # Each row is three independent pairs: as good as 600, but for what the variance of 200 rows is off.
    assert width(intervals.of_rows(thirds)) == pytest.approx(width(intervals.of_rows(np.arange(600) < 360)), rel=0.1)
    assert width(intervals.of_rows([0.5, 0.5])) > 0.5
    assert width(intervals.of_rows([0.5])) > 0.7
    assert width(intervals.of_pairs([1, 1, 0, 0], [7, 7, 7, 7])) > 0.7


def coverage(draw, measure, truth: float, times: int) -> float:
    found = [measure(draw()) for _ in range(times)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.parametrize("rows", [5, 8, 40])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_intervals_of_fractions_of_a_row_cover_the_truth(rows, share):
    """Rows of three pairs of a difficulty of their own (beta-binomial). 1,000 draws at .95, or .94 where rows are so few: .92 is three
    deviations less."""
    rng = np.random.default_rng(rows)

    def draw():
        return rng.binomial(3, rng.beta(2 * share, 2 * (1 - share), rows)) / 3

    assert 0.92 <= coverage(draw, intervals.of_rows, share, 1000) <= 0.99


@pytest.mark.parametrize("rows", [8, 60])
def test_intervals_of_dependent_pairs_cover_the_truth(rows):
    """One to six pairs a row, of one difficulty a row."""
    rng = np.random.default_rng(rows)

    def draw():
        row = np.repeat(np.arange(rows), rng.integers(1, 7, rows))
        return rng.random(len(row)) < rng.beta(1.4, 0.6, rows)[row], row

    assert 0.93 <= coverage(draw, lambda one: intervals.of_pairs(*one), 0.7, 1000) <= 0.98


def test_a_sum_of_one_part_has_the_parts_interval_and_a_difference_newcombes():
    part = intervals.of_rows(np.arange(50) < 33)
    assert intervals.combined([(1.0, part)]) == part
    # Newcombe 1998 (Statistics in Medicine 17, method 10) is the same for a difference of two shares.
    one, other = (Estimate(k / n, *intervals.wilson(k / n, n), n) for k, n in ((56, 70), (48, 80)))
    found = intervals.combined([(1.0, one), (-1.0, other)])
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # printed there, example (a)
    assert found.value == pytest.approx(0.2) and found.n == 150


def test_the_interval_of_a_weighted_sum_covers_the_truth():
    """Subsets as RewardBench's: of unequal size, weighted otherwise than by it, near 1. 1,000 draws."""
    rng = np.random.default_rng(2)
    sizes, weights = np.array([100, 47, 28, 447]), np.array([0.2, 0.3, 0.1, 0.4])
    shares = np.array([0.97, 0.6, 0.9, 0.95])

    def measure(counts):
        parts = [Estimate(k / n, *intervals.wilson(k / n, n), int(n)) for k, n in zip(counts, sizes, strict=True)]
        return intervals.combined(list(zip(weights, parts, strict=True)))

    assert 0.93 <= coverage(lambda: rng.binomial(sizes, shares), measure, float(weights @ shares), 1000) <= 0.975


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.sampled_from([0, 0.25, 0.5, 1]), min_size=1)), min_size=1))
def test_a_mean_of_shares_has_an_interval_around_it_between_0_and_1(parts):
    total = sum(weight for weight, _ in parts)
    found = intervals.combined([(weight / total, intervals.of_rows(values)) for weight, values in parts])
    assert -1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12
    assert found.n == sum(len(values) for _, values in parts)


def test_a_bootstrapped_interval_is_that_of_scipy():
    values = np.random.default_rng(3).exponential(size=(80, 2))

    def ratio(rows):
        return rows[..., 0].mean(-1) / rows[..., 1].mean(-1)

    found = intervals.by_bootstrap(values, ratio, seed=0)
    theirs = stats.bootstrap(
        tuple(values.T),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=1,
    ).confidence_interval
    # Of 10,000 draws the 2.5 % quantile is off by about .02 standard deviations (one is a quarter of the width): five of those.
    noise = 5 * 0.027 * (theirs.high - theirs.low) / 4
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=noise)
    assert found == intervals.by_bootstrap(values, ratio, seed=0) != intervals.by_bootstrap(values, ratio, seed=1)
    assert found.low < found.value < found.high and found.n == 80


@pytest.mark.parametrize("more, less", [(0, 1), (3, 3), (9, 2), (1, 30), (531, 469), (25_300, 24_700)])
def test_the_sign_test_is_mcnemars_exact_one(more, less):
    theirs = mcnemar([[5, more], [less, 7]], exact=True).pvalue
    assert intervals.sign_test(more, less) == pytest.approx(theirs, rel=1e-8, abs=0)
    assert intervals.sign_test(less, more) == intervals.sign_test(more, less)


def test_a_sign_test_of_a_million_rows_is_no_p_of_0_that_is_none_and_of_no_rows_1():
    assert intervals.sign_test(0, 0) == 1.0
    assert intervals.sign_test(502_000, 498_000) == pytest.approx(
        stats.binomtest(498_000, 10**6).pvalue, rel=1e-6, abs=0
    )
    assert intervals.sign_test(1_000_000, 0) == 0.0  # 2^-999999 is below every double


TABLES = [
    (3, 10, 8, 9),
    (0, 5, 0, 7),
    (5, 5, 7, 7),
    (0, 8, 9, 9),
    (1, 2, 500, 1000),
    (20, 46, 305, 373),
    (9000, 9999, 88, 99),
]


@pytest.mark.parametrize("table", TABLES)
def test_fishers_test_is_that_of_scipy(table):
    k1, n1, k2, n2 = table
    theirs = stats.fisher_exact([[k1, n1 - k1], [k2, n2 - k2]]).pvalue
    assert intervals.fisher(*table) == pytest.approx(theirs, rel=1e-8, abs=0)
    assert intervals.fisher(k2, n2, k1, n1) == pytest.approx(theirs, rel=1e-8, abs=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 25), st.integers(0, 25))
def test_fishers_test_is_that_of_scipy_on_any_table(k1, wrong1, k2, wrong2):
    found = intervals.fisher(k1, k1 + wrong1, k2, k2 + wrong2)
    assert found == pytest.approx(stats.fisher_exact([[k1, wrong1], [k2, wrong2]]).pvalue, rel=1e-8, abs=0)


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.002, 0.05, 0.5, 1.0])
def test_sidak_is_that_of_statsmodels(p):
    with np.errstate(divide="ignore"):  # theirs takes the logarithm of 1 - 1
        theirs = multipletests([p] + [1.0] * 22, method="sidak")[1][0]
    assert intervals.sidak(p, 23) == pytest.approx(theirs, rel=1e-9, abs=0)
    assert intervals.sidak(p, 1) == pytest.approx(p, rel=1e-12, abs=0)


def test_the_permutation_test_is_that_of_scipy_over_all_ways_to_divide_the_rows():
    rng = np.random.default_rng(4)
    for size in (3, 5, 9):
        values = rng.choice([0, 0.25, 0.5, 1], 12)

        def apart(own, rest):
            return abs(np.mean(own) - np.mean(rest))

        theirs = stats.permutation_test(
            (values[:size], values[size:]), apart, alternative="greater", n_resamples=np.inf
        ).pvalue
        [found] = intervals.permutation(values, [size], [values[:size].mean()])
        # Five times what chance leaves of a share of 10,000 draws.
        assert found == pytest.approx(theirs, abs=5 * math.sqrt(theirs * (1 - theirs) / 10_000) + 1e-4)


def test_means_of_many_rows_are_distributed_as_drawn_ones(monkeypatch):
    values = np.random.default_rng(5).choice([0, 0.5, 1], 900, p=[0.1, 0.2, 0.7])
    sizes, means = [400, 700], [values.mean() + 0.03, values.mean() - 0.02]
    normal = intervals.permutation(values, sizes, means)
    monkeypatch.setattr(intervals, "FEW_ENOUGH", 10**6)
    # As above; and a lattice of halves in 300 rows takes some of a p.
    assert normal == pytest.approx(intervals.permutation(values, sizes, means), abs=0.015)


def test_a_few_rows_that_are_alike_are_not_taken_for_sure():
    """12 rows right beside 264 of which 84 % are: Welch's test calls that certain."""
    rest = np.r_[np.ones(221), 0.5, np.zeros(42)]
    [p] = intervals.permutation(np.r_[np.ones(12), rest], [12], [1.0])
    assert 0.1 < p < 0.4
    assert intervals.permutation(np.full(9, 0.5), [4, 5], [0.5, 0.5]).tolist() == [1, 1]
    [least] = intervals.permutation(np.r_[np.ones(150), np.zeros(150)], [150], [1.0])
    assert least == 1 / 10_001
    with pytest.raises(ValueError, match="of 3 rows"):
        intervals.permutation([0, 1, 1], [3], [0.7])


NOTHING = {
    "no rows": lambda: intervals.of_rows([]),
    "no pairs": lambda: intervals.of_pairs([], []),
    "no parts": lambda: intervals.combined([]),
    "no draws": lambda: intervals.wilson(0.5, 0),
    "a row that is no number": lambda: intervals.of_rows([1.0, math.nan]),
    "a row above 1": lambda: intervals.of_rows([1.0, 1.5]),
    "a row below 0": lambda: intervals.of_pairs([-0.5], [0]),
    "rows missing": lambda: intervals.of_pairs([1, 0], [0]),
    "nothing to resample": lambda: intervals.by_bootstrap(np.zeros((0, 2)), np.mean, 0),
    "a statistic that is no number": lambda: intervals.by_bootstrap(
        np.array([0.0, 1.0]), lambda v: np.where(v.max(-1) > 0, v.mean(-1), np.nan), 0
    ),
    "no probability": lambda: intervals.sidak(math.nan, 3),
    "more right than there are": lambda: intervals.fisher(3, 2, 0, 1),
    "no rows to divide": lambda: intervals.permutation([], [1], [1.0]),
    "a negative count": lambda: intervals.sign_test(-1, 2),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_measure_and_no_numbers_are_refused(name):
    with pytest.raises(ValueError):
        NOTHING[name]()
