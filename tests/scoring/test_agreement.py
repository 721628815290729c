"""How far two reward models agree: against scipy 1.17.1's numbers, and what the interval covers."""

import dataclasses
import json

import numpy as np
import pytest

from open_rm.measures.intervals import wilson
from open_rm.scoring.agreement import Agreement


def taken(*prompts: tuple[list, list]) -> Agreement:
    sums = Agreement()
    for scores, judged in prompts:
        sums.take(scores, judged)
    return sums


@pytest.mark.parametrize(
    "scores, judged, tau",  # scipy.stats.kendalltau(scores, judged).statistic
    [
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -0.4714045207910316),
        ([1, 2, 3, 4, 5], [3, 1, 2, 5, 4], 0.4),
        ([1, 1, 2, 2, 3], [1, 2, 2, 3, 3], 0.75),
        ([0.5, -1, -1, 2], [1, 1, 0, 3], 0.8),
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [2], None),
    ],
)
def test_taus_are_those_of_scipy(scores, judged, tau):
    assert taken((scores, judged)).tau == (None if tau is None else pytest.approx(tau, abs=1e-12))


@pytest.mark.parametrize(
    "k, n, low, high",  # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    [
        (8, 10, 0.4901624715366418, 0.9433178485456248),
        (0, 5, 0.0, 0.43448246478317476),
        (5, 5, 0.5655175352168251, 1.0),
        (731, 1000, 0.702670228864586, 0.7575618087150874),
    ],
)
def test_intervals_are_those_of_scipy(k, n, low, high):
    assert wilson(k / n, n) == pytest.approx((low, high), abs=1e-12)


def test_pairs_are_every_two_answers_and_ties_are_told_apart():
    sums = taken(([1.0, 2.0, 2.0], [1.0, 3.0, 0.5]), ([5.0, 5.0], [1.0, 1.0]), ([0.0, 1.0], [2.0, 2.0]))
    assert (sums.pairs, sums.strict, sums.agreeing) == (5, 2, 1)
    assert (sums.tied_model, sums.tied_judge, sums.tied_both) == (1, 1, 1)
    assert sums.share == 0.5 and sums.tau_prompts == 1


def test_the_correlation_is_that_of_margins_in_both_directions():
    rng = np.random.default_rng(1)
    prompts = [(rng.normal(size=4), rng.normal(size=4)) for _ in range(50)]
    prompts = [(a.tolist(), (a + noise).tolist()) for a, noise in prompts]
    margins = [np.subtract.outer(s, s)[~np.eye(4, dtype=bool)] for prompt in prompts for s in map(np.array, prompt)]
    both = np.concatenate(margins[::2]), np.concatenate(margins[1::2])
    sums = taken(*prompts)
    assert sums.correlation == pytest.approx(np.corrcoef(*both)[0, 1], abs=1e-12)
    mean = sums.report("a", "b")["mean_margin"]
    assert mean["model"] == pytest.approx(np.abs(both[0]).mean())
    assert mean["judge"] == pytest.approx(np.abs(both[1]).mean())


def test_an_answer_that_either_gave_no_score_is_left_out_and_counted():
    sums = taken(([1.0, None, 3.0], [2.0, 1.0, 3.0]), ([1.0, 2.0], [None, 1.0]))
    assert (sums.prompts, sums.pairs, sums.agreeing, sums.unscored) == (2, 1, 1, 2)


def test_one_pair_a_prompt_gives_wilsons_interval_of_the_pairs():
    rng = np.random.default_rng(2)
    sums = taken(*(([0.0, 1.0], [0.0, 1.0] if agrees else [1.0, 0.0]) for agrees in rng.random(200) < 0.7))
    assert sums.independent_pairs == pytest.approx(200)
    assert sums.interval == pytest.approx(wilson(sums.share, 200))


def test_prompts_that_all_agree_count_once_each():
    sums = taken(*[([1.0, 2.0, 3.0, 4.0], [0.0, 5.0, 6.0, 7.0])] * 3)
    assert (sums.strict, sums.agreeing, sums.independent_pairs) == (18, 18, 3.0)
    assert sums.interval == wilson(1.0, 3) and Agreement().independent_pairs == 0.0


def test_the_interval_covers_the_truth_where_pairs_of_a_prompt_are_alike():
    """The judge turns half of the prompts round: 0.5 is true, and six pairs of a prompt say one thing."""
    rng = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(200):
        sums = Agreement()
        for _ in range(60):
            scores = rng.normal(size=4)
            sums.take(scores.tolist(), (rng.choice([-1, 1]) * scores + rng.normal(size=4) / 4).tolist())
        covered += sums.interval[0] <= 0.5 <= sums.interval[1]
        low, high = wilson(sums.share, sums.strict)
        naive += low <= 0.5 <= high
    # 200 draws at 0.95: 190, and 181 is three standard deviations less.
    assert covered >= 181 > 150 > naive


def test_sums_that_are_taken_up_from_json_give_the_same_report():
    rng = np.random.default_rng(4)
    prompts = [(rng.normal(size=3).tolist(), rng.normal(size=3).tolist()) for _ in range(20)]
    first = taken(*prompts[:7])
    second = Agreement(**json.loads(json.dumps(dataclasses.asdict(first))))
    for prompt in prompts[7:]:
        second.take(*prompt)
    assert second.report("a", "b") == taken(*prompts).report("a", "b")


def test_the_lines_say_it_in_words_and_nothing_to_compare_is_said():
    lines = taken(([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), ([None, 1.0], [1.0, 1.0])).lines("A", "B")
    assert lines[0].startswith("A and B prefer the same answer in 2 of 3 pairs: 66.7% (95 % interval ")
    assert "left out: 1 answers" in lines[-1]
    [line] = taken(([1.0], [2.0])).lines("A", "B")
    assert "cannot be compared" in line
    json.dumps(Agreement().report("A", "B"))
