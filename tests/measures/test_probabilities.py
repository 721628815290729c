"""Differences as probabilities: against scikit-learn and torch on real rewards, and at the edges."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_scores import INTERNLM, SKYWORK, scores_of
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from open_rm.measures import calibration

MODELS = (SKYWORK, INTERNLM)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def both_orders(margins):
    """What scikit-learn takes: each pair in both orders, whether the first answer is the better one, and its probability."""
    return np.repeat([1, 0], len(margins)), sigmoid(np.concatenate([margins, -margins]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bins", [10, 7])
def test_bins_are_those_of_scikit_learn(model, bins):
    margins = scores_of(model).margins
    # scikit-learn's bins lie on [0, 1], and a value at an edge, as a tie is at the lowest, belongs to the bin below.
    confidence = 2 * sigmoid(np.abs(margins)) - 1
    accuracy, mean = calibration_curve(margins > 0, confidence, n_bins=bins)
    found = calibration.reliability(margins, bins)
    assert [one["accuracy"] for one in found] == pytest.approx(accuracy.tolist(), abs=1e-12)
    assert [one["confidence"] for one in found] == pytest.approx(((mean + 1) / 2).tolist(), abs=1e-12)
    assert sum(one["n"] for one in found) == 350
    weights = np.array([one["n"] for one in found]) / 350
    assert calibration.ece(margins, bins) == pytest.approx(weights @ np.abs(accuracy - (mean + 1) / 2), abs=1e-12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [3.0, 14.0])
def test_brier_and_loss_are_those_of_scikit_learn(model, temperature):
    margins = scores_of(model).margins
    truth, probability = both_orders(margins)
    assert calibration.brier(margins) == pytest.approx(brier_score_loss(truth, probability), abs=1e-12)
    # At T = 1 scikit-learn clips the surest probabilities, and 1 - p of a double loses digits where p is near 1.
    truth, probability = both_orders(margins / temperature)
    assert calibration.loss(margins, temperature) == pytest.approx(log_loss(truth, probability), rel=1e-9)


def test_a_bin_has_its_lower_edge_and_its_interval_follows_the_rows():
    found = calibration.reliability(np.array([0.0, 0.0, 0.0, 50.0, -50.0]))
    assert [(one["low"], one["high"], one["n"], one["accuracy"]) for one in found] == [
        (0.5, pytest.approx(0.55), 3, 0.0),
        (pytest.approx(0.95), 1.0, 2, 0.5),
    ]
    assert sigmoid(math.log(3)) == 0.75
    assert [one["low"] for one in calibration.reliability(np.array([math.log(3)]))] == [0.75]
    margins = np.tile([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0], 10)
    [alone], [together] = (calibration.reliability(margins, row=row) for row in (None, np.arange(80) // 4))
    assert alone["interval"][1] - alone["interval"][0] < 0.6 * (together["interval"][1] - together["interval"][0])


def fitted_by_torch(margins: torch.Tensor) -> float:
    """The temperature that LBFGS finds, searching its logarithm."""
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logarithm], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-margins / logarithm.exp()).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return logarithm.exp().item()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6])
def test_the_temperature_of_real_rewards_is_the_one_that_torch_finds(model, scale):
    margins = scores_of(model).margins
    found = calibration.fit_temperature(margins * scale)
    # Where LBFGS stops the loss is flat to 1e-12, which leaves its square root of T.
    assert found == pytest.approx(fitted_by_torch(torch.from_numpy(margins)) * scale, rel=1e-6)
    at_best = calibration.loss(margins * scale, found)
    assert all(calibration.loss(margins * scale, found * factor) > at_best for factor in (0.99, 1.01))


def test_the_temperature_of_probabilities_that_are_known_is_found_again():
    """Margins whose sides are drawn with probability sigmoid(margin / 3): T is 3, within what chance leaves of 200,000."""
    rng = np.random.default_rng(0)
    size = rng.normal(size=200_000) * 4
    right = rng.random(200_000) < sigmoid(size / 3)
    assert calibration.fit_temperature(np.where(right, size, -size)) == pytest.approx(3.0, rel=0.02)


EDGES = {
    "all right": ([0.5, 1.0, 2.0], "every pair is ranked right"),
    "all right but for ties": ([0.0, 1.0], "no pair is ranked wrong"),
    "nearly all right": ([1.0] * 9 + [1e-10, -1e-12], "nearly every pair is ranked right"),
    "no more right than wrong": ([1.0, -1.0], "no higher rewards than worse ones on average"),
    "hardly more right than wrong": ([1.0, -1.0 + 1e-9], "no higher rewards"),
    "mostly wrong": ([0.5, -3.0], "no higher rewards"),
    "mostly right": ([1.0] * 9 + [-10.0], "on average"),
    "all equal": ([0.0, 0.0], "all pairs are tied"),
    "not a number": ([1.0, -0.5, math.nan], "not finite"),
    "infinite": ([1.0, -0.5, math.inf], "not finite"),
    "none": ([], "no pairs"),
}


@pytest.mark.parametrize("name", EDGES)
def test_there_is_no_temperature_where_no_finite_one_above_0_fits_best_and_the_reason_is_said(name):
    margins, reason = EDGES[name]
    assert calibration.fit_temperature(np.array(margins)) is None
    assert reason in calibration.why_no_temperature(np.array(margins))


EXTREME = [[5.0, -1e-3], [1.0, -0.999], [1e-200, -1e-201], [1e5] * 50 + [-1.0], [1.0, 1.0, -1e-12]]


@pytest.mark.parametrize("margins", [*EXTREME, [1e300, -9e299], [1e308, 1e308, -1e308]])
def test_extreme_margins_have_the_temperature_at_which_the_slope_is_0(margins):
    margins = np.array(margins)
    found = calibration.fit_temperature(margins)
    assert calibration.why_no_temperature(margins) is None
    beta = np.abs(margins).max() / found
    margins /= np.abs(margins).max()
    with np.errstate(over="ignore"):
        terms = margins * sigmoid(-beta * margins)
    # The mean slope beside the sizes of its parts: rounding alone is left.
    assert abs(terms.sum()) <= 1e-9 * np.abs(terms).sum()


@pytest.mark.parametrize("n, a_row", [(30, 1), (100, 1), (2_000, 1), (400, 4)])
def test_the_ece_that_right_probabilities_have_by_chance_is_that_of_drawn_models(n, a_row):
    """Pairs of a row all right or all wrong where their probabilities are alike. Of 2,000 draws a 95 % quantile is off by about .03
    deviations, a third of the quantile: and a bin's number of right pairs is no normal one where pairs are few."""
    rng = np.random.default_rng(n)
    row = np.arange(n) // a_row
    size = np.abs(rng.normal(0, 2, n // a_row))[row]
    draws = rng.random((1_000, n // a_row))[:, row] < sigmoid(size)
    drawn = [calibration.ece(np.where(right, size, -size)) for right in draws]
    assert calibration.ece_of_chance(size, row) == pytest.approx(np.quantile(drawn, 0.95), rel=0.06)
    assert calibration.ece_of_chance(size, row) == calibration.ece_of_chance(-size, row)


def test_a_temperature_of_1_is_refused_in_5_percent_and_one_of_3_always():
    """800 times 100 pairs: .066 is two deviations more. Four pairs of a row that are all alike tell as much as one."""
    rng, refused = np.random.default_rng(0), {1: 0, 3: 0}
    for scale in refused:
        for _ in range(800):
            size = np.abs(rng.normal(0, 2, 100))
            margins = scale * np.where(rng.random(100) < sigmoid(size), size, -size)
            temperature = calibration.fit_temperature(margins)
            p = calibration.temperature_p(margins, np.arange(100), temperature)
            refused[scale] += p < 0.05
    again = calibration.temperature_p(np.repeat(margins, 4), np.repeat(np.arange(100), 4), temperature)
    assert again == pytest.approx(p, rel=1e-9)
    assert 0.034 <= refused[1] / 800 <= 0.066 and refused[3] > 790


def test_nothing_overflows_and_a_tie_is_not_right():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = np.array([1e308, -1e308, math.inf])
        assert calibration.brier(huge) == pytest.approx(1 / 3)
        assert calibration.ece(huge) == pytest.approx(1 / 3)
        assert calibration.loss(np.array([1e300, 800.0])) == 0.0
        assert calibration.loss(np.array([-800.0])) == 800.0
        assert calibration.loss(np.array([1e308]), 1e-3) == 0.0
    tied = np.zeros(4)
    assert (calibration.brier(tied), calibration.loss(tied), calibration.ece(tied)) == (0.25, math.log(2), 0.5)
    assert calibration.reliability(tied)[0]["accuracy"] == 0.0


def test_no_pairs_have_nothing_and_what_is_no_number_is_refused():
    none = np.zeros(0)
    assert calibration.reliability(none) == []
    assert [measure(none) for measure in (calibration.ece, calibration.brier, calibration.loss)] == [None] * 3
    assert calibration.ece_of_chance(none, none) is None
    for measure in (calibration.ece, calibration.brier, calibration.loss, calibration.reliability):
        with pytest.raises(ValueError, match="no numbers"):
            measure(np.array([1.0, math.nan]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_bins_hold_every_pair_and_errors_lie_between_0_and_1(margins):
    margins = np.array(margins)
    bins = calibration.reliability(margins)
    assert sum(one["n"] for one in bins) == len(margins)
    assert all(one["low"] - 1e-12 <= one["confidence"] <= one["high"] + 1e-12 for one in bins)
    assert all(0 <= one["interval"][0] <= one["accuracy"] <= one["interval"][1] <= 1 for one in bins)
    assert 0 <= calibration.ece(margins) <= 1 and 0 <= calibration.brier(margins) <= 1
    temperature = calibration.fit_temperature(margins)
    assert (temperature is None) == (calibration.why_no_temperature(margins) is not None)
    if temperature is not None:
        assert calibration.loss(margins, temperature) <= calibration.loss(margins) + 1e-12
