"""What length explains: by counting, against scipy's rank correlation, and where there is nothing to say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_scores import INTERNLM, SKYWORK, scores_of
from scipy import stats

from open_rm.measures import intervals, lengths


def test_every_number_is_that_of_counting():
    #         longer               shorter              equal
    margins = [1.0, -1.0, 0.0, 2.0, 3.0, 1.0, -2.0, 0.5, -0.5, 0.0]
    better = [101, 200, 330, 110, 50, 10, 9, 70, 80, 0]
    worse = [100, 100, 300, 100, 100, 40, 10, 70, 80, 0]
    found = lengths.explained(margins, better, worse, np.arange(10))
    shares = {name: (found[name]["value"], found[name]["n"]) for name in ("longer", "shorter", "equal")}
    assert shares == {"longer": (0.5, 4), "shorter": (2 / 3, 3), "equal": (1 / 3, 3)}
    # Within a tenth of the longer one: 101, 330, 110, 9 of 10, and the three that are equal.
    assert (found["matched"]["value"], found["matched"]["n"]) == (3 / 7, 7)
    assert found["matched"]["within"] == 0.1
    assert found["baseline"]["rule"] == lengths.LONGER
    assert (found["baseline"]["value"], found["baseline"]["n"]) == (0.55, 10)
    low, high = found["longer"]["low"], found["longer"]["high"]
    assert (low, high) == pytest.approx(intervals.wilson(0.5, 4))


def test_the_baseline_is_the_better_of_both_rules():
    margins, row = np.ones(3), np.arange(3)
    assert lengths.explained(margins, [1, 1, 5], [2, 2, 5], row)["baseline"]["rule"] == lengths.SHORTER
    assert lengths.explained(margins, [1, 1, 5], [2, 2, 5], row)["baseline"]["value"] == pytest.approx(2.5 / 3)
    assert lengths.explained(margins, [2, 1, 5], [1, 2, 5], row)["baseline"]["value"] == 0.5


@pytest.mark.parametrize("model", [SKYWORK, INTERNLM])
def test_the_correlation_is_spearmans_of_pairs_in_both_directions(model):
    scores = scores_of(model)
    found = lengths.explained(scores.margins, scores.better, scores.worse, np.arange(350))
    both = (np.concatenate([side, -side]) for side in (scores.margins, scores.better - scores.worse))
    assert found["reward_length_correlation"] == pytest.approx(stats.spearmanr(*both).statistic, abs=1e-12)
    # Which of two answers is the better one, and so comes first, changes nothing.
    turn = np.random.default_rng(0).choice([-1, 1], 350)
    turned = lengths.correlation(scores.margins * turn, (scores.better - scores.worse) * turn)
    assert turned == pytest.approx(found["reward_length_correlation"], abs=1e-12)


def test_a_model_that_is_length_alone_correlates_fully():
    better, worse = np.random.default_rng(1).integers(1, 99, (2, 40))
    assert lengths.correlation(np.log(better) - np.log(worse), np.log(better) - np.log(worse)) == pytest.approx(1.0)
    assert lengths.correlation(worse - better, better - worse) == pytest.approx(-1.0)
    assert lengths.correlation(np.zeros(3), np.array([1, 2, 3])) is None
    assert lengths.correlation(np.array([1.0, 2.0]), np.zeros(2)) is None


def test_pairs_of_which_a_length_is_not_known_are_left_out():
    margins, row = np.array([1.0, -1.0, 1.0]), np.arange(3)
    found = lengths.explained(margins, [5, -1, 9], [4, 3, -1], row)
    assert found["longer"]["n"] == 1 and found["baseline"]["n"] == 1
    assert found["shorter"] is found["equal"] is found["matched"] is found["difference"] is None
    assert lengths.explained(margins, [-1] * 3, [-1] * 3, row) is None
    assert lengths.explained([], [], [], []) is None
    with pytest.raises(ValueError, match="no numbers"):
        lengths.explained([math.nan], [1], [2], [0])


def test_pairs_of_a_row_are_not_independent():
    margins = np.tile([1.0] * 4 + [-1.0] * 4, 10)
    alone, together = (
        lengths.explained(margins, np.full(80, 9), np.full(80, 5), row)["longer"]
        for row in (np.arange(80), np.arange(80) // 4)
    )
    assert together["high"] - together["low"] > 1.5 * (alone["high"] - alone["low"])


pairs = st.tuples(st.sampled_from([-1e308, -1.0, 0.0, 0.5, math.inf]), st.integers(0, 50), st.integers(0, 50))


@settings(max_examples=60, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=30))
def test_parts_add_up_and_the_baseline_is_at_least_a_half(found_pairs):
    margins, better, worse = map(np.array, zip(*found_pairs, strict=True))
    found = lengths.explained(margins, better, worse, np.arange(len(margins)))
    parts = [one for one in (found[name] for name in ("longer", "shorter", "equal")) if one]
    assert sum(one["n"] for one in parts) == len(margins)
    assert sum(one["n"] * one["value"] for one in parts) == pytest.approx(np.sum(margins > 0))
    assert 0.5 <= found["baseline"]["value"] <= 1
    assert found["reward_length_correlation"] is None or -1 <= found["reward_length_correlation"] <= 1
