"""Two models on the same rows: against scipy's paired bootstrap, by what the interval covers, and where parts share rows."""

import dataclasses

import numpy as np
import pytest
from real_scores import INTERNLM, SKYWORK, scores_of
from scipy import stats

from open_rm.evaluation.rules.verdict import Part
from open_rm.measures import paired
from open_rm.measures.intervals import sign_test


def part(values, weight=1.0, first=0, statistic=None) -> Part:
    return Part(weight, np.arange(first, first + len(values)), np.asarray(values, dtype=float), statistic)


def tanh_of_means(values):
    """A statistic of two numbers a row that is no mean."""
    return 0.3 * values[..., 0].mean(-1) + np.tanh(values[..., 1].mean(-1))


def by_scipy(own, other, statistic):
    """(low, high) of the percentile interval over rows [n, ...] of both, drawn together."""
    rows = np.arange(len(own))

    def difference(chosen, axis):
        chosen = np.moveaxis(chosen, axis, -1)
        return statistic(own[chosen]) - statistic(other[chosen])

    found = stats.bootstrap(
        (rows,), difference, method="percentile", n_resamples=10_000, rng=7, batch=1000, vectorized=True
    ).confidence_interval
    return found.low, found.high


def noise(low, high):
    """Five times what chance leaves of a 2.5 % quantile of 10,000 draws, sqrt(.025 * .975 / 10,000) / density = .027 standard
    deviations, of two such."""
    return 5 * 2**0.5 * 0.027 * (high - low) / 4


def test_the_difference_of_two_public_models_is_that_of_scipy():
    own, other = ((scores_of(model).margins > 0).astype(float) for model in (INTERNLM, SKYWORK))
    found = paired.difference([part(own)], [part(other)], seed=0)
    low, high = by_scipy(own, other, lambda values: values.mean(-1))
    assert (found.low, found.high) == pytest.approx((low, high), abs=noise(low, high) + 1 / 350)
    assert found.value == pytest.approx(4 / 350) and found.n == 350


@pytest.mark.parametrize("most", [2000, 1], ids=["by counts", "normally"])
def test_means_are_distributed_as_resampled_ones(monkeypatch, most):
    rng = np.random.default_rng(1)
    own, other = rng.choice([0, 0.25, 0.5, 1], (2, 300))
    monkeypatch.setattr(paired, "MOST_DISTINCT", most)
    found = paired.difference([part(own)], [part(other)], seed=0)
    low, high = by_scipy(own, other, lambda values: values.mean(-1))
    assert (found.low, found.high) == pytest.approx((low, high), abs=noise(low, high))


def test_any_statistic_is_resampled_with_the_same_rows_for_both():
    rng = np.random.default_rng(2)
    own = rng.normal(size=(120, 2))
    other = own + rng.normal(size=(120, 2)) / 4
    found = paired.difference([part(own, 2.0, 0, tanh_of_means)], [part(other, 2.0, 0, tanh_of_means)], seed=0)
    low, high = by_scipy(own, other, lambda values: 2 * tanh_of_means(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=noise(low, high))


@pytest.mark.parametrize("most", [2000, 1], ids=["by counts", "normally"])
def test_a_ratio_of_sums_is_resampled_as_rows_are(monkeypatch, most):
    """Right pairs of one to six a row, beside a mean of the same rows."""
    rng = np.random.default_rng(8)
    pairs = rng.integers(1, 7, 150)
    own, other = (np.stack([rng.binomial(pairs, share), pairs], 1) for share in (0.7, 0.6))
    monkeypatch.setattr(paired, "MOST_DISTINCT", most)

    def ratio(values):
        return values[..., 0].sum(-1) / values[..., 1].sum(-1)

    def line(values, statistic):
        return [part(values, 0.8, 0, statistic), part(values[:, 0] / 6, 0.2)]

    of_means = paired.OfMeans(lambda means: means[..., 0] / means[..., 1])
    found = paired.difference(line(own, of_means), line(other, of_means), seed=0)
    by_rows = paired.difference(line(own, ratio), line(other, ratio), seed=1)
    assert found.value == pytest.approx(by_rows.value, abs=1e-12)
    low, high = by_scipy(own, other, lambda values: 0.8 * ratio(values) + 0.2 * values[..., 0].mean(-1) / 6)
    for one in (found, by_rows):
        assert (one.low, one.high) == pytest.approx((low, high), abs=noise(low, high))


def test_parts_of_the_same_rows_are_resampled_together():
    """A row's hard and easy pairs that always go together: their mean varies as either does, not as two of independent rows."""
    rng = np.random.default_rng(3)
    own, other = rng.integers(0, 2, (2, 200)).astype(float)
    alone = paired.difference([part(own)], [part(other)], seed=0)
    halves = [[part(values, 0.5), part(values, 0.5)] for values in (own, other)]
    assert paired.difference(*halves, seed=0) == alone
    of_other_rows = [[part(values, 0.5), part(values, 0.5, first=200)] for values in (own, other)]
    found = paired.difference(*of_other_rows, seed=0)
    assert found.n == 400
    assert (found.high - found.low) * 2**0.5 == pytest.approx(alone.high - alone.low, rel=0.08)
    # One with a statistic of its own goes with the others of its rows: what cancels in every row cancels in every draw.
    cancelling = [
        [part(values, 1.0), part(values[:, None], -1.0, 0, lambda v: v[..., 0].mean(-1))] for values in (own, other)
    ]
    found = paired.difference(*cancelling, seed=0)
    assert (found.low, found.high) == (0.0, 0.0)


def test_the_interval_covers_the_truth():
    """Two subsets of unequal weight, models of which one is right in 8 and 5 points more. 600 draws at .95: .923 is three deviations
    less."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(600):
        lines = [[], []]
        for n, weight, first, gain in ((60, 0.7, 0, 0.08), (150, 0.3, 60, 0.05)):
            easy = rng.random(n)
            for line, share in zip(lines, (0.6 + gain, 0.6), strict=True):
                line.append(part(easy + rng.normal(size=n) / 4 < share, weight, first))
        found = paired.difference(lines[0], lines[1], seed=0, draws=1000)
        covered += found.low <= TRUTH <= found.high
    assert 0.923 <= covered / 600 <= 0.985


def share(below: float) -> float:
    """P(uniform + normal / 4 < below), by the uniform distribution's quantiles."""
    return float(np.mean(stats.norm.cdf((below - (np.arange(20_000) + 0.5) / 20_000) * 4)))


TRUTH = 0.7 * (share(0.68) - share(0.6)) + 0.3 * (share(0.65) - share(0.6))


def test_p_is_below_5_percent_where_the_interval_is_without_0():
    rng = np.random.default_rng(5)
    found = []
    for gain in np.linspace(0, 0.3, 60):
        own, other = (
            [part(rng.random(60) < share, 0.7), part(rng.random(60) < share, 0.3, 60)] for share in (0.5 + gain, 0.5)
        )
        estimate, p = paired.compare(own, other, 0, 1000)
        found.append(p < 0.05)
        assert found[-1] == (not estimate.low <= 0 <= estimate.high)
    assert 10 < sum(found) < 50


def test_p_of_models_that_do_not_differ_is_1_and_never_0():
    same = [part([1, 0, 1, 1])]
    assert paired.p_value(same, same, 0) == 1.0
    found = paired.difference(same, same, 0)
    assert (found.value, found.low, found.high, found.n) == (0.0, 0.0, 0.0, 4)
    assert paired.p_value([part(np.ones(50))], [part(np.zeros(50))], 0, draws=999) == 0.002
    [one] = [paired.difference([part([1.0])], [part([0.0])], 0)]
    assert one.low < 0 < one.value == one.high == 1


def won_and_lost(won, lost, rows, weight=1.0, first=0):
    """A part of each model: of rows, so many that one alone has right, and so many that the other has."""
    own = np.repeat([1, 0, 1], [won, lost, rows - won - lost])
    other = np.repeat([0, 1, 1], [won, lost, rows - won - lost])
    return part(own, weight, first), part(other, weight, first)


@pytest.mark.parametrize("rows", [30, 1000])
@pytest.mark.parametrize(
    "won, lost", [(1, 0), (2, 0), (4, 0), (5, 0), (7, 0), (7, 1), (9, 1), (9, 2), (11, 2), (20, 9)]
)
def test_a_few_rows_that_differ_are_about_as_little_proof_as_by_the_exact_sign_test(won, lost, rows):
    own, other = won_and_lost(won, lost, rows)
    found, p = paired.compare([own], [other], seed=0)
    exact = sign_test(won, lost)
    assert (found.low > 0) == (exact < 0.05) or 0.04 < exact < 0.07
    assert exact <= p < 2 * exact + 0.03 and (p >= 0.05 or found.low > 0)
    assert found.low <= found.value == pytest.approx((won - lost) / rows)


def test_two_rows_tell_nothing_and_neither_do_four_in_parts_of_unequal_weight():
    [own, other] = won_and_lost(2, 0, 2)
    assert paired.difference([own], [other], 0).low <= 0
    lines = zip(*(won_and_lost(1, 0, 50, weight, 50 * i) for i, weight in enumerate((0.4, 0.3, 0.2, 0.1))), strict=True)
    assert paired.p_value(*map(list, lines), 0) > 0.05


def test_of_few_rows_that_differ_chance_is_called_a_difference_in_5_percent_at_most():
    """400 times: .072 is two deviations more."""
    rng = np.random.default_rng(7)
    called = 0
    for _ in range(400):
        differing = rng.poisson(7)
        won = rng.binomial(differing, 0.5)
        called += paired.p_value(*([one] for one in won_and_lost(won, differing - won, 300)), 0, 1000) < 0.05
    assert called / 400 <= 0.072


def test_an_estimate_and_its_p_are_of_the_same_draws(monkeypatch):
    lines = [[one] for one in won_and_lost(30, 12, 80)]
    found = paired.compare(*lines, seed=2)
    assert found == (paired.difference(*lines, seed=2), paired.p_value(*lines, seed=2))
    times, drawn = [], paired._drawn
    monkeypatch.setattr(paired, "_drawn", lambda *args: times.append(1) or drawn(*args))
    paired.compare(*lines, seed=2)
    assert len(times) == 1


def test_the_same_seed_gives_the_same_numbers_and_what_rounding_makes_of_0_is_0():
    rng = np.random.default_rng(6)
    thirds = [[part(rng.integers(0, 4, 50) / 3, 1 / 3) for _ in range(3)] for _ in range(2)]
    assert paired.difference(*thirds, seed=3) == paired.difference(*thirds, seed=3)
    assert paired.difference(*thirds, seed=3) != paired.difference(*thirds, seed=4)
    mixed = [part([1 / 3, 2 / 3, 1]), part([1, 2 / 3, 1 / 3])]
    other = [part([1, 1 / 3, 2 / 3]), part([2 / 3, 1 / 3, 1])]
    draws = paired._drawn([list(zip(mixed, other, strict=True))], seed=0, draws=200)
    assert (draws == 0).any() and not ((draws != 0) & (np.abs(draws) < 1e-9)).any()


def test_parts_that_do_not_match_are_refused():
    own = [part([1, 0, 1]), part([1, 1], 1.0, 3)]
    for other in (
        own[:1],
        [own[0], part([1, 1], 0.5, 3)],
        [own[0], part([1, 1], 1.0, 4)],
        [own[0], part([1, 1, 1], 1.0, 3)],
    ):
        with pytest.raises(ValueError):
            paired.difference(own, other, 0)
    for line in ([], [part([])], [part([1, 0]), part([1, 0], 1.0, 1)], [dataclasses.replace(own[1], rows=[3, 3])]):
        with pytest.raises(ValueError):
            paired.p_value(line, line, 0)
