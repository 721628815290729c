"""The trust report: golden numbers of real reward models, made-up ones of which the answers are known, and scipy."""

import json
import os
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import shared_data
from scipy import stats

from open_rm.errors import UserError
from open_rm.evaluation.rules import known
from open_rm.evaluation.score_file import read_scores
from open_rm.evaluation.scored import ScoredSet, pairs_of
from open_rm.evaluation.trust import examples, sections, words
from open_rm.evaluation.trust.report import make_report

SKYWORK, INTERNLM = "Skywork_Skywork-Reward-Llama-3.1-8B", "internlm_internlm2-20b-reward"
META = {"dtype": "bfloat16", "facts": {"for": "programs"}}


def scored_set(scores, gold=None, **more) -> ScoredSet:
    """Rows of answers [N, K], of pairs the better one first; lists of rows of any length."""
    sizes = [len(row) for row in scores]
    answers = sum(sizes)
    gold = [[1.0] + [0.0] * (size - 1) for size in sizes] if gold is None else gold
    values = {
        "name": "pairs",
        "benchmark": None,
        "ids": [str(i) for i in range(len(sizes))],
        "subsets": ["all"] * len(sizes),
        "first": np.cumsum([0, *sizes]),
        "scores": np.concatenate([np.asarray(row, float) for row in scores]),
        "gold": np.concatenate([np.asarray(row, float) for row in gold]),
        "characters": np.full(answers, -1),
        "tokens": np.full(answers, -1),
        "overlength": np.zeros(answers, bool),
    }
    return ScoredSet(**values | more)


def of_margins(margins, **more) -> ScoredSet:
    return scored_set(np.stack([margins, np.zeros(len(margins))], 1), **more)


def report_of(*sets: ScoredSet, **more) -> dict:
    """A report that went through strict JSON."""
    made = make_report(list(sets), **{"model": "ours", "meta": META, "command": "python -m it", "seed": 1} | more)
    return json.loads(json.dumps(made, allow_nan=False))


def answer(report: dict, question: str) -> str:
    [found] = [one["answer"] for one in report["answers"] if one["question"] == question]
    return found


def calibrated(n: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Margins of pairs of which the better answer is the better one with probability sigma(margin / scale)."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, 2, n))
    right = rng.random(n) < 1 / (1 + np.exp(-size))
    return np.where(right, size, -size) * scale


# ---------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def real() -> dict[str, list[ScoredSet]]:
    folder = shared_data("judgebench_scores")
    return {name: read_scores(folder / f"{name}.jsonl") for name in (SKYWORK, INTERNLM)}


@pytest.fixture(scope="module")
def both(real) -> dict:
    """Skywork's report, against internlm2."""
    return report_of(*real[SKYWORK], other=("internlm2", real[INTERNLM]))


# reward_benchmarks.md: accuracy, ties, loss, ECE, Brier, temperature, loss at it.
GOLDEN = {
    SKYWORK: (0.6229, 1, 2.4082, 0.3244, 0.3322, 14.221, 0.6303),
    INTERNLM: (0.6343, 0, 0.6138, 0.0534, 0.2149, 1.028, None),
}


@pytest.mark.parametrize("model", GOLDEN)
def test_the_golden_numbers_of_real_models_are_reproduced(real, model):
    [one] = report_of(*real[model])["sets"]
    accuracy, tied, loss, ece, brier, temperature, after = GOLDEN[model]
    found = one["calibration"]
    assert (one["rows"], one["pairs"], one["unscored"], one["overlength"]) == (350, 350, 0, 0)
    assert round(one["headline"]["value"], 4) == round(one["accuracy"]["value"], 4) == accuracy
    assert tied in (one["tied"], 0)
    assert [round(found[name], 4) for name in ("loss", "ece", "brier")] == [loss, ece, brier]
    assert round(found["temperature"], 3) == temperature
    assert after is None or round(found["loss_at_temperature"], 4) == after


def test_what_length_does_to_a_real_model(both):
    [one] = both["sets"]
    length = one["length"]
    assert length["unit"] == "characters"
    assert [(round(length[side]["value"], 4), length[side]["n"]) for side in ("longer", "shorter")] == [
        (0.5528, 161),
        (0.6825, 189),
    ]
    # The published baseline is that of the longer answer, .4600; the shorter one makes the better rule.
    assert (round(length["baseline"]["value"], 4), length["baseline"]["rule"]) == (0.54, "the shorter answer is better")
    assert length["gain"]["value"] == pytest.approx(one["accuracy"]["value"] - length["baseline"]["value"], abs=1e-12)
    assert round(length["prefers_longer"]["gold"]["value"], 4) == 0.46


def test_two_real_models_are_compared_on_the_same_rows(real, both):
    ours, theirs = (pairs_of(*real[name]).margin > 0 for name in (SKYWORK, INTERNLM))
    [one] = both["against"]["sets"]
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    assert (one["won"], one["lost"], one["same"], one["left_out"]) == (won, lost, 350 - won - lost, 0)
    assert one["p_sign_test"] == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)
    overall = one["lines"][0]
    assert (round(overall["own"], 4), round(overall["other"], 4)) == (0.6229, 0.6343)
    assert overall["difference"] == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
    # The normal interval of a mean of 350 differences is as wide as the bootstrap's but for its draws and its lattice.
    spread = 1.96 * np.std(ours.astype(float) - theirs) / np.sqrt(350)
    assert overall["high"] - overall["low"] == pytest.approx(2 * spread, rel=0.1)
    for level in {line["level"] for line in one["lines"]}:
        lines = [line for line in one["lines"] if line["level"] == level]
        for line in lines:
            assert line["p_sidak"] == pytest.approx(1 - (1 - line["p"]) ** len(lines), abs=1e-9)
    assert both["against"]["says"] == "On JudgeBench, ours and internlm2 cannot be told apart on these 350 rows."
    assert both["against"]["says"] in answer(both, words.HOW_GOOD)


def test_a_real_report_says_in_words_what_stands_in_its_numbers(both):
    assert "prefers the better answer in 62.3 % of 350 pairs (95 % interval 57.1 to 67.2)" in answer(
        both, words.HOW_GOOD
    )
    believe = answer(both, words.CAN_I_BELIEVE_IT)
    assert (
        "It is surer than it should be: expected calibration error 0.32 (right probabilities have up to 0.0" in believe
    )
    assert "A temperature of 14.2, fitted on these pairs, takes the loss from 2.408 to 0.630." in believe
    assert "length alone (the shorter answer is better: 54.0 %)" in believe
    assert "Equal scores, which count as wrong: 1 of 350 pairs (0.3 %)" in believe
    assert "No subset is clearly worse than the rest" in answer(both, words.WHERE_DOES_IT_FAIL)
    assert [warning for warning in both["warnings"] if "temperature 14.2" in warning]


def test_intervals_that_overlap_are_not_taken_for_no_difference(both):
    """Those of 89 of 161 and 129 of 189 do; Fisher's p is .015, and Newcombe's interval of the difference without 0."""
    assert stats.fisher_exact([[89, 72], [129, 60]]).pvalue < 0.02
    said = "It is better with shorter better answers, by 13.0 points (2.8 to 22.9): 55.3 % where the better answer is longer"
    assert said in answer(both, words.WHERE_DOES_IT_FAIL)


def test_a_report_is_the_same_each_time(real):
    one, other = (report_of(*real[SKYWORK], other=("b", real[INTERNLM]), seed=3) for _ in range(2))
    assert one | {"created": ""} == other | {"created": ""}
    assert (one["command"], one["seed"], one["made"]) == ("python -m it", 3, [["dtype", "bfloat16"]])


# ---------------------------------------------------------------- made-up models


def test_a_calibrated_model_is_called_so_and_one_five_times_as_sure_is_not():
    good, sure, shy = (report_of(of_margins(calibrated(20_000, scale))) for scale in (1, 5, 0.2))
    [good_set], [sure_set] = good["sets"], sure["sets"]
    assert good_set["calibration"]["ece"] < 0.015
    assert good_set["calibration"]["temperature"] == pytest.approx(1, abs=0.05)
    assert sure_set["calibration"]["temperature"] == pytest.approx(5, abs=0.25)
    said = [answer(report, words.CAN_I_BELIEVE_IT) for report in (good, sure, shy)]
    assert "Its probabilities are about right" in said[0] and good["warnings"] == []
    assert "It is surer than it should be" in said[1] and "It could be surer than it is" in said[2]
    assert any("far too sure (temperature " in warning for warning in sure["warnings"])
    assert any("far less sure than it could be (temperature 0." in warning for warning in shy["warnings"])
    # Of those it is surer than 95 % of, a calibrated model is wrong in less than 5 %.
    assert 0 < good_set["confident"]["wrong"] < 0.05 * good_set["confident"]["pairs"]


def test_of_few_pairs_a_calibrated_model_is_hardly_ever_called_off():
    """100 times 100 pairs. Its ECE is above .1 in half of them and its best temperature beyond 1.25 in a third; two tests at 5 %
    are red in less than a tenth, 16 being two deviations more."""
    reports = [report_of(of_margins(calibrated(100, seed=seed)), examples=0) for seed in range(100)]
    found = [report["sets"][0]["calibration"] for report in reports]
    assert sum(one["ece"] > 0.1 for one in found) > 30 and all(one["ece_of_chance"] > 0.1 for one in found)
    said = [answer(report, words.CAN_I_BELIEVE_IT) for report in reports]
    blamed = ["surer" in one or "are off" in one for one in said]
    assert sum(blamed) <= 16 and sum(bool(report["warnings"]) for report in reports) <= 16
    assert sum("too few pairs to tell whether its probabilities are right" in one for one in said) == 100 - sum(blamed)
    sure = report_of(of_margins(calibrated(100, 5)))
    assert "It is surer than it should be" in answer(sure, words.CAN_I_BELIEVE_IT)
    assert any("far too sure" in warning for warning in sure["warnings"])


def test_ties_are_apart_from_right_and_wrong_where_chance_is_asked_for():
    for wrong, says in (
        (0, None),
        (20, "less than chance, since equal scores count as wrong"),
        (100, "cannot be told"),
    ):
        report = report_of(of_margins(np.repeat([1.0, 0, -1], [100, 100 + 10 * wrong, wrong])))
        believe = answer(report, words.CAN_I_BELIEVE_IT)
        assert ("cannot be told from chance" in believe) == (wrong == 100)
        assert [says in one for one in report["warnings"] if "chance" in one] == ([True] if says else [])
    assert any("(without ties 50.0 %)" in warning for warning in report["warnings"])


def test_a_set_is_as_large_as_the_rows_that_count():
    scored = of_margins(calibrated(1_000))
    scored.scores[20:] = np.nan
    report = report_of(scored)
    assert report["sets"][0]["rows_with_pairs"] == 10
    assert answer(report, words.CAN_I_BELIEVE_IT).startswith("From 10 rows the accuracy is known to about ")
    assert any(warning.startswith("pairs: only 10 of 1,000 rows can be counted") for warning in report["warnings"])


def test_a_constant_model_is_never_right_and_has_no_temperature():
    report = report_of(of_margins(np.zeros(500)))
    [one] = report["sets"]
    assert (one["tied"], one["accuracy"]["value"], one["calibration"]["temperature"]) == (500, 0, None)
    assert one["calibration"]["loss_at_temperature"] is None
    assert one["mistakes"] == [] and len(one["least_sure"]) == 10
    assert "all pairs are tied" in answer(report, words.CAN_I_BELIEVE_IT)
    [chance] = [warning for warning in report["warnings"] if "less than chance" in warning]
    assert "equal scores count as wrong" in chance


def test_a_model_that_is_length_does_not_beat_it():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, (2_000, 2))
    lengths.sort(1)
    lengths = np.where(rng.random((2_000, 1)) < 0.6, lengths[:, ::-1], lengths)  # in 60 % the better answer is longer
    report = report_of(scored_set(lengths / 100, characters=lengths.ravel()))
    length = report["sets"][0]["length"]
    uneven = float((lengths[:, 0] != lengths[:, 1]).mean())
    assert length["longer"]["value"] == 1 and length["shorter"]["value"] == 0
    assert length["reward_length_correlation"] == pytest.approx(1)
    assert length["prefers_longer"]["model"]["value"] == 1
    # Half a point for answers of equal length is all that the rule has more.
    assert length["gain"]["value"] == pytest.approx((uneven - 1) / 2, abs=1e-12)
    assert any("cannot be told from length alone" in warning for warning in report["warnings"])
    assert any(
        "prefers the longer answer in 100.0 % of the pairs; the better one is the longer in " in warning
        for warning in report["warnings"]
    )
    assert "where the better answer is longer" in answer(report, words.WHERE_DOES_IT_FAIL)


def test_the_gain_over_length_has_the_interval_of_a_paired_mean_and_takes_pairs_of_a_row_for_one():
    rng = np.random.default_rng(1)
    margins, lengths = rng.normal(0.3, 1, 400), rng.integers(1, 50, (400, 2))
    scored = of_margins(margins, tokens=lengths.ravel())
    [one] = report_of(scored)["sets"]
    by_rule = (1 + np.sign(lengths[:, 0] - lengths[:, 1])) / 2
    by_rule = by_rule if by_rule.mean() >= 0.5 else 1 - by_rule
    differences = (margins > 0) - by_rule
    spread = 1.959963984540054 * differences.std() / 20
    gain = one["length"]["gain"]
    assert one["length"]["unit"] == "tokens"
    expected = [differences.mean() - spread, differences.mean(), differences.mean() + spread]
    assert gain["value"] == pytest.approx(differences.mean(), abs=1e-12)
    # One row of the largest variance more, among 400 rows.
    assert [gain["low"], gain["value"], gain["high"]] == pytest.approx(expected, abs=1e-3)
    # Three worse answers that are all alike say no more than one.
    thrice = scored_set([[m, 0, 0, 0] for m in margins], tokens=np.array([[a, b, b, b] for a, b in lengths]).ravel())
    again = report_of(thrice)["sets"][0]["length"]["gain"]
    same = [gain[name] for name in ("low", "value", "high")]
    assert [again[name] for name in ("low", "value", "high")] == pytest.approx(same, abs=1e-12)
    # Right on the one row there is, where the rule has half: that is no proof of anything.
    [alone] = report_of(of_margins(np.array([1.0]), tokens=np.array([5, 5])))["sets"]
    assert alone["length"]["gain"]["low"] < 0 < alone["length"]["gain"]["value"]


def test_lengths_that_nobody_knows_are_no_lengths_and_those_of_some_pairs_count_for_them():
    margins = np.array([1.0, -1, 1, 1])
    assert report_of(of_margins(margins))["sets"][0]["length"] is None
    some = np.array([5, 3, -1, 3, 4, 4, 2, 9])
    length = report_of(of_margins(margins, characters=some))["sets"][0]["length"]
    assert [length[side] and length[side]["n"] for side in ("longer", "shorter", "equal")] == [1, 1, 1]
    # One answer of unknown tokens, and all is told in characters.
    known = of_margins(margins, characters=np.arange(8), tokens=np.array([1, 2, 3, 4, 5, 6, 7, -1]))
    assert report_of(known)["sets"][0]["length"]["unit"] == "characters"


def test_rows_without_any_pair_make_a_report_all_the_same():
    unknown = scored_set(
        [[1.0, 0, 0, 0]] * 3, [[np.nan] * 4] * 3, benchmark="reward_bench_2", name="rb2", subsets=["Math"] * 3
    )
    report = report_of(unknown)
    [one] = report["sets"]
    assert (one["pairs"], one["accuracy"], one["calibration"], one["length"]) == (0, None, None, None)
    assert (one["margins"], one["mistakes"], one["least_sure"]) == ([], [], [])
    assert all("no row has two scored answers" in found["answer"] for found in report["answers"])
    assert any("no row has two scored answers" in warning for warning in report["warnings"])


def test_missing_subsets_are_said_with_the_number_and_not_compared():
    rng = np.random.default_rng(0)
    names = ["llmbar-natural", "llmbar-adver-GPTInst"]
    scored = of_margins(
        rng.normal(0.5, 1, 200), name="bench", benchmark="reward_bench", subsets=[names[i % 2] for i in range(200)]
    )
    report = report_of(scored)
    [one] = report["sets"]
    assert "alpacaeval-easy" in one["missing"] and not set(names) & set(one["missing"])
    assert one["headline"]["name"].startswith("Overall (3 of 4 sections are missing")
    said = answer(report, words.HOW_GOOD)
    assert said.startswith("On what is there of RewardBench it prefers the better answer in ")
    assert f"{100 * one['accuracy']['value']:.1f} % of 200 pairs" in said
    assert "cannot be compared with published ones" in said
    [warning] = [warning for warning in report["warnings"] if "not comparable with published numbers" in warning]
    assert warning.startswith("RewardBench: ") and "alpacaeval-easy" in warning and "more" in warning


# ---------------------------------------------------------------- subsets, margins, sources


def with_subsets(rates: dict[str, float], rows: int, seed: int = 0) -> ScoredSet:
    rng = np.random.default_rng(seed)
    margins = np.concatenate([np.where(rng.random(rows) < rate, 1.0, -1.0) for rate in rates.values()])
    return of_margins(margins, subsets=[name for name in rates for _ in range(rows)])


def test_a_subset_is_called_worse_only_if_it_remains_so_among_all_of_them():
    noise = {f"s{i}": 0.7 for i in range(23)}
    # Twenty seeds, of which one may be wrong by chance: 23 subsets uncorrected would be in more than half of them.
    clear = [report_of(with_subsets(noise, 60, seed))["sets"][0]["extremes"]["clear"] for seed in range(20)]
    assert sum(map(bool, clear)) <= 2
    report = report_of(with_subsets(noise | {"bad": 0.35}, 60))
    extremes = report["sets"][0]["extremes"]
    assert [one["name"] for one in extremes["clear"]] == ["bad"]
    assert extremes["worst"] == extremes["clear"][0]
    assert "Clearly worse than the rest, corrected for 24 subsets: bad " in answer(report, words.WHERE_DOES_IT_FAIL)


def test_extremes_have_the_p_of_scipy():
    scored = with_subsets({"a": 0.9, "b": 0.7, "c": 0.5, "small": 0.5}, 12)
    scored = replace(scored, subsets=scored.subsets[:-6] + ["tiny"] * 6)
    right = np.split(pairs_of(scored).margin > 0, [12, 24, 36])
    extremes = report_of(scored)["sets"][0]["extremes"]
    for which, inside in (("best", 0), ("worst", int(np.argmin([side.mean() for side in right[:3]])))):
        found, own = extremes[which], right[inside]
        rest = np.concatenate([side for i, side in enumerate(right) if i != inside])
        table = [[own.sum(), (~own).sum()], [rest.sum(), (~rest).sum()]]
        assert (found["name"], found["tests"]) == ("abc"[inside], 3)  # neither small nor tiny has ten rows
        assert (found["value"], found["rest"]) == pytest.approx((own.mean(), rest.mean()))
        assert found["p"] == pytest.approx(stats.fisher_exact(table).pvalue, rel=1e-9)
        assert found["p_sidak"] == pytest.approx(1 - (1 - found["p"]) ** 3, rel=1e-9)


def test_subsets_of_rows_that_are_won_in_part_have_the_p_of_a_permutation_test():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (600, 4)) + [0.5, 0, 0, 0]
    scored = scored_set(scores, subsets=["a"] * 200 + ["b"] * 400)
    wins = (scores[:, :1] > scores[:, 1:]).mean(1)
    extremes = report_of(scored)["sets"][0]["extremes"]

    def apart(own, rest, axis):
        return abs(np.mean(own, axis) - np.mean(rest, axis))

    p = stats.permutation_test((wins[:200], wins[200:]), apart, vectorized=True, alternative="greater", rng=1).pvalue
    assert extremes["best"]["p"] == pytest.approx(p, abs=0.03)  # five deviations of two shares of 10,000 draws


def test_one_row_that_counts_in_part_does_not_make_chance_clear():
    """23 equal subsets of 12 rows; of Welch's test, whose variance of 12 right rows is 0, one was clear nearly every time. At 5 % 7
    of 60 are two deviations and more."""
    rng, clear = np.random.default_rng(0), 0
    subsets = [f"s{i % 23}" for i in range(276)]
    for _ in range(60):
        scores = np.c_[np.where(rng.random(276) < 0.85, 1.0, -1.0), np.zeros(276)].tolist()
        scored = scored_set([[*scores[0], 0.0], *scores[1:]], subsets=subsets)
        scored.scores[:3] = [1, 0, 2]  # right in one of two pairs
        clear += bool(sections.extremes_of(scored, known.plain(scored))["clear"])
    assert clear <= 7


def test_subsets_of_other_chances_are_not_ranked_against_each_other():
    """RMB's best of eight beside its pairs, RewardBench 2's Ties beside its best of four: as good a model is right less often."""
    rng = np.random.default_rng(0)
    paths = [f"{form}_set/Helpfulness/{task}" for form in ("Pairwise", "BoN") for task in ("A", "B")]
    rows = [rng.normal(0, 1, 2 if path.startswith("Pair") else 8) + np.eye(1, 8)[0, : 2 if path.startswith("Pair") else 8]
            for path in paths for _ in range(80)]  # fmt: skip
    scored = scored_set(rows, name="rmb", benchmark="rmb", subsets=[path for path in paths for _ in range(80)])
    report = report_of(scored)
    extremes = report["sets"][0]["extremes"]
    assert (extremes["clear"], extremes["best"]["tests"]) == ([], 4)
    for one in (extremes["best"], extremes["worst"]):
        wins = {
            path: np.mean([row[0] > row[1:].max() for row in rows[80 * i : 80 * i + 80]])
            for i, path in enumerate(paths)
        }
        [other] = [path for path in paths if path[:3] == one["name"][:3] and path != one["name"]]
        assert (one["value"], one["rest"]) == pytest.approx((wins[one["name"]], wins[other]))
        assert one["form"] == ("pairs" if one["name"].startswith("Pair") else "best of n")
    assert "(the rest of " in answer(report, words.WHERE_DOES_IT_FAIL)
    ties = [[2.0, 1.0, 0.0]] * 40 + [[0.0, 1.0, 0.5, 0.2]] * 15 + [[1.0, 0.0, 0.5, 0.2]] * 15
    ids = [f"Ties/{kind}:{i}" for i in range(20) for kind in ("ref", "tied")] + [f"Math/{i}" for i in range(30)]
    gold = [[1.0, i % 2, 0.0] for i in range(40)] + [[1.0, 0, 0, 0]] * 30
    scored = scored_set(
        ties, gold, name="two", benchmark="reward_bench_2", subsets=["Ties"] * 40 + ["Math"] * 30, ids=ids
    )
    assert report_of(scored)["sets"][0]["extremes"] is None


def test_margins_are_parted_into_bins_that_hold_every_pair_once():
    margins = calibrated(1_001)
    bins = report_of(of_margins(margins))["sets"][0]["margins"]
    assert len(bins) == 8 and sum(one["accuracy"]["n"] for one in bins) == 1_001
    for one in bins:
        inside = (np.abs(margins) >= one["low"]) & (np.abs(margins) <= one["high"])
        assert one["accuracy"]["n"] == inside.sum() and abs(inside.sum() - 125) <= 1
        assert one["accuracy"]["value"] == pytest.approx((margins[inside] > 0).mean())
    few = report_of(of_margins(np.repeat([0.0, 1, -1, 2], [60, 20, 20, 30])))["sets"][0]["margins"]
    assert [(one["low"], one["high"], one["accuracy"]["n"], one["accuracy"]["value"]) for one in few] == [
        (0, 0, 60, 0),
        (1, 1, 40, 0.5),
        (2, 2, 30, 1),
    ]


def test_of_many_sources_the_largest_are_shown_and_the_others_summed_up():
    rng = np.random.default_rng(0)
    subsets = [f"s{i % 100}" for i in range(3_000)] + ["s99"] * 50
    scores = rng.normal(0, 1, (3_050, 2))
    scores[7, 0] = np.nan
    [one] = report_of(scored_set(scores, subsets=subsets))["sets"]
    sources = one["sources"]
    assert len(sources) == 60 and sources[-1]["name"] == "others"
    assert (sum(s["rows"] for s in sources), sum(s["pairs"] for s in sources)) == (3_050, 3_049)
    by_name = {source["name"]: source for source in sources}
    assert by_name["s99"]["rows"] == 80 and by_name["others"]["rows"] == 41 * 30
    inside = np.array([name == "s99" for name in subsets])
    rewards = scores[inside].ravel()
    assert by_name["s99"]["reward"]["mean"] == pytest.approx(rewards.mean())
    assert by_name["s99"]["reward"]["std"] == pytest.approx(rewards.std(ddof=1))
    assert by_name["s99"]["reward"]["quantiles"] == pytest.approx(np.percentile(rewards, [5, 25, 50, 75, 95]))
    assert by_name["s99"]["mean_margin"] == pytest.approx((scores[inside, 0] - scores[inside, 1]).mean())
    assert by_name["s99"]["accuracy"]["value"] == pytest.approx((scores[inside, 0] > scores[inside, 1]).mean())


# ---------------------------------------------------------------- style, ranking


def rm_bench(scores) -> ScoredSet:
    gold = [[1.0, 1, 1, 0, 0, 0]] * len(scores)
    return scored_set(scores, gold, name="rm", benchmark="rm_bench", subsets=["chat"] * len(scores))


def right_cells(scores: np.ndarray) -> np.ndarray:
    return scores[:3, None] > scores[None, 3:]


def test_style_is_the_authors_matrix_and_outweighing_it_is_warned_of():
    report = report_of(rm_bench([[3, 2, 1, 2.5, 0, 4], [1, 1, 2, 1, 0, 3]] * 60))
    matrix = [[cell["value"] for cell in row] for row in report["sets"][0]["style"]["matrix"]]
    assert matrix == [[0.5, 1, 0], [0, 1, 0], [0.5, 1, 0]]
    assert report["sets"][0]["style"]["names"] == ["concise", "detailed", "detailed, markdown"]
    assert np.triu(matrix, 1).sum() / 3 == pytest.approx(1 / 3) and np.tril(matrix, -1).sum() / 3 == 0.5
    assert not [warning for warning in report["warnings"] if "style" in warning]  # 17 points are less than 20
    # Content wins 70 % of the hard ones and all easy ones: style matters, and does not outweigh it.
    right = rm_bench([[2, 2, 2, 1, 1, 1]] * 70 + [[1.5, 2.5, 3.5, 1, 2, 3]] * 30)
    assert np.mean([np.triu(right_cells(row), 1).sum() / 3 for row in right.scores.reshape(-1, 6)]) == pytest.approx(
        0.7
    )
    matters = report_of(right)
    said = (
        "tyle matters, by 30.0 points (20.9 to 39.1): 70.0 % (60.4 to 78.1) right where the wrong answer is the longer"
    )
    assert any(f"s{said}" in warning for warning in matters["warnings"])
    assert f"S{said}" in answer(matters, words.WHERE_DOES_IT_FAIL)
    assert "outweighs" not in json.dumps(matters)
    # A model that sees length and markdown, and hardly the answer.
    fancy = report_of(rm_bench(np.random.default_rng(0).normal(0, 1, (100, 6)) + [0.1, 0.6, 1.1, 0, 0.5, 1]))
    assert any("style outweighs content" in warning for warning in fancy["warnings"])
    assert "Style outweighs content" in answer(fancy, words.WHERE_DOES_IT_FAIL)
    assert report_of(of_margins(calibrated(200)))["sets"][0]["style"] is None


def test_ranked_lists_have_scipys_tau_and_a_curve_of_the_best():
    rng = np.random.default_rng(0)
    gold = [rng.integers(0, 4, rng.integers(3, 7)).astype(float) for _ in range(200)]
    scores = [row + rng.normal(0, 1, len(row)) for row in gold]
    scores[3][1] = np.nan
    report = report_of(scored_set(scores, gold))
    ranking = report["sets"][0]["ranking"]
    known = [(s[~np.isnan(s)], g[~np.isnan(s)]) for s, g in zip(scores, gold, strict=True)]
    known = [(s, g) for s, g in known if len(s) > 2]
    taus = np.array([stats.kendalltau(s, g).statistic for s, g in known])
    assert ranking["rows"] == len(known)
    assert ranking["tau"]["value"] == pytest.approx(np.nanmean(taus), abs=1e-12)
    assert ranking["tau"]["low"] < ranking["tau"]["value"] < ranking["tau"]["high"]
    assert "Kendall's tau" in answer(report, words.HOW_GOOD)
    exact = report_of(scored_set(gold, gold))["sets"][0]["ranking"]
    assert exact["tau"]["value"] == pytest.approx(1)
    assert all(point["expected"] == pytest.approx(point["oracle"]) for point in exact["best_of_n"])
    assert exact["best_of_n"][2]["expected"] > exact["best_of_n"][0]["expected"] + 0.5
    right_or_wrong = report_of(scored_set(np.zeros((5, 4))))["sets"][0]
    assert right_or_wrong["ranking"] is None and right_or_wrong["pairs"] == 15
    assert report_of(scored_set(gold[:50], [np.full(len(row), 0.5) for row in gold[:50]][:49] + [gold[49]]))


# ---------------------------------------------------------------- examples


def test_the_most_confident_mistakes_come_first_and_one_of_a_row():
    rows = [[0.0, 5, 4, -1], [1.0, 0, 0, 0], [0.0, 2, -0.5, 1], [3.0, 2.75, 0, 0], [0.0, 9, 0, 0]]
    read = []

    def texts(row):
        read.append(row)
        return f"question {row}", [f"answer {row}.{i}" for i in range(4)]

    scored = scored_set(rows, subsets=["x", "x", "y", "y", "z"], texts=texts)
    [one] = report_of(scored, examples=3)["sets"]
    assert [(pair["id"], pair["margin"], pair["worse"]) for pair in one["mistakes"]] == [
        ("4", -9, "answer 4.1"),
        ("0", -5, "answer 0.1"),
        ("2", -2, "answer 2.1"),
    ]
    first = one["mistakes"][0]
    assert (first["better"], first["prompt"], first["subset"]) == ("answer 4.0", "question 4", "z")
    assert (first["better_score"], first["worse_score"]) == (0, 9)
    assert first["probability"] == pytest.approx(1 / (1 + np.exp(9)))
    assert [(pair["id"], pair["margin"]) for pair in one["least_sure"]] == [("4", 0), ("3", 0.25), ("2", 0.5)]
    assert len(read) == 6  # texts are read of what is shown


def test_no_text_is_said_and_messages_are_readable():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]},
    ]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}], "name": None}

    def texts(row):
        return {0: None, 1: (messages, ["Because.", [call]]), 2: ("?", ["one answer"])}[row]

    more, one, other = report_of(of_margins(np.array([-1.0, -2, -3]), texts=texts))["sets"][0]["mistakes"]
    assert one["prompt"] == 'system: Be short.\n\nuser: Why?{"type": "image"}'
    assert (one["better"], one["worse"]) == ("Because.", 'assistant: [tool_calls: [{"function": {"name": "look"}}]]')
    assert one["note"] is None
    assert [other[name] for name in ("prompt", "better", "worse")] == ["", "", ""] and "no texts" in other["note"]
    assert more["better"] == "" and "not as many as its scores" in more["note"]
    assert examples.readable(None) == "" and examples.readable([1, 2]) == "[1, 2]"


def test_a_megabyte_is_cut_where_the_answers_differ_and_says_by_how_much():
    same = "ab c" * 200_000
    better, worse, prompt = same + "RIGHT" + same, same + "WRONG", "q" * 10_000 + "?"
    scored = of_margins(np.full(20, -1.0), texts=lambda row: (prompt, [better, worse]))
    started = time.perf_counter()
    mistakes = report_of(scored)["sets"][0]["mistakes"]
    assert time.perf_counter() - started < 3
    for pair in mistakes:
        assert max(len(pair[name]) for name in ("prompt", "better", "worse")) <= 4_000
        assert "RIGHT" in pair["better"] and "WRONG" in pair["worse"] and pair["prompt"].endswith("?")
        for name, whole in (("prompt", prompt), ("better", better), ("worse", worse)):
            left_out = [
                int(n.replace(",", "")) for n in re.findall(r"\[… ([\d,]+) characters left out …\]", pair[name])
            ]
            kept = re.sub(
                r"(\[… [\d,]+ characters left out …\]\n)|(\n\[… [\d,]+ characters left out …\])", "", pair[name]
            )
            assert len(kept) + sum(left_out) == len(whole) and kept in whole


def test_where_two_texts_first_differ_is_found_to_the_character():
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other = ("".join(rng.choice(["a", "b"], rng.integers(0, 9), p=[0.8, 0.2])) for _ in range(2))
        assert examples.first_difference(one, other) == len(os.path.commonprefix([one, other]))


def test_halves_of_characters_and_hostile_names_are_plain_text():
    hostile = "</script><script>alert(1)</script>\ud83d\u202e"
    scored = of_margins(np.array([-1.0, 1]), ids=[hostile, "b"], texts=lambda row: (hostile, [hostile, "x"]))
    report = report_of(scored, meta={"note": hostile, "loss": float("nan"), "places": (1, np.int64(2))})
    assert report["made"][1:] == [["loss", None], ["places", [1, 2]]]
    text = json.dumps(report, ensure_ascii=False).encode()  # which halves of characters would refuse
    assert b"<script>alert(1)" in text  # it is for the page to make it inert


# ---------------------------------------------------------------- against, warnings, speed


def test_the_other_model_may_come_in_another_order_and_lack_scores():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1, 1, (300, 2)), rng.normal(0, 1, (300, 2))
    ours[:, 1] -= 1
    ours[5, 0] = theirs[9, 1] = np.nan
    turned = rng.permutation(300)
    other = scored_set(theirs[turned], ids=[str(i) for i in turned])
    found = report_of(scored_set(ours), other=("theirs", [other]))["against"]
    [one], kept = found["sets"], np.delete(np.arange(300), [5, 9])
    own, others = ((side[kept, 0] > side[kept, 1]).astype(float) for side in (ours, theirs))
    assert (one["left_out"], one["won"] + one["lost"] + one["same"]) == (2, 298)
    assert one["won"] == ((own - others) > 0).sum()
    line = one["lines"][0]
    assert (line["own"], line["other"]) == pytest.approx((own.mean(), others.mean()))
    points = f"{100 * line['difference']:.1f} points ({100 * line['low']:.1f} to {100 * line['high']:.1f})"
    assert found["says"] == f"ours is better on pairs by {points}, on 298 rows."
    back = report_of(other, model="theirs", other=("ours", [scored_set(ours)]))["against"]
    assert back["says"].startswith("ours is better on pairs by ")
    with pytest.raises(UserError, match="not scored on the same rows"):
        report_of(scored_set(ours), other=("theirs", [scored_set(theirs[:299])]))


@pytest.mark.parametrize("won, lost, rows", [(2, 0, 2), (4, 0, 1_000), (9, 2, 11), (20, 9, 29)])
def test_no_model_is_called_better_where_the_exact_test_of_its_rows_is_not(won, lost, rows):
    own, other = (np.repeat(sides, [won, lost, rows - won - lost]) for sides in ([1.0, -1, 1], [-1.0, 1, 1]))
    found = report_of(of_margins(own), other=("theirs", [of_margins(other)]))["against"]
    [one] = found["sets"]
    assert found["says"].startswith(f"On pairs, ours and theirs cannot be told apart on these {rows:,} rows")
    assert one["lines"][0]["p"] >= one["p_sign_test"] > 0.05


def test_a_model_cannot_be_told_from_itself():
    scored = of_margins(calibrated(200))
    found = report_of(scored, other=("itself", [scored]))["against"]
    assert found["says"] == "On pairs, ours and itself cannot be told apart on these 200 rows."
    assert all((line["difference"], line["p"]) == (0, 1) for line in found["sets"][0]["lines"])


def exact(largest: float, flips: int, is_exact: bool) -> dict:
    check = {"what": "other batch size", "largest": largest, "flips": flips, "exact": is_exact}
    return {"rows": 64, "tolerance": 1e-5, "checks": [check], "says": f"64 rows again: {flips} preferences change"}


def test_scores_that_change_with_their_company_are_the_first_warning():
    scored = of_margins(calibrated(2_000))
    moved = report_of(scored, invariance=exact(0.5, 3, False), meta={})
    assert (
        moved["warnings"][0].endswith("64 rows again: 3 preferences change.") and "not the same" in moved["warnings"][0]
    )
    assert "64 rows again: 3 preferences change." in answer(moved, words.CAN_I_BELIEVE_IT)
    same = report_of(scored, invariance=exact(0, 0, True))
    assert same["warnings"] == [] and same["invariance"]["checks"][0]["exact"]
    assert "was not looked at" in answer(report_of(scored), words.CAN_I_BELIEVE_IT)
    assert moved["made"][0][1].startswith("not known") and "is not known" in moved["warnings"][-1]


def _lost(**counts) -> ScoredSet:
    """400 pairs, of whose answers so many are over-length, without a score, tied."""
    scored = of_margins(calibrated(400, seed=2))
    scores, overlength = scored.scores.copy(), scored.overlength.copy()
    overlength[: counts.get("overlength", 0)] = True
    scores[0 : 2 * counts.get("unscored", 0) : 2] = np.nan
    for row in range(100, 100 + counts.get("tied", 0)):
        scores[2 * row] = 0
    return replace(scored, scores=scores, overlength=overlength)


WARNED = {
    "chance": (of_margins(np.tile([1.0, -1], 100)), "50.0 % right (43.1 to 56.9) cannot be told from chance"),
    "worse than chance": (of_margins(-calibrated(400)), "less than chance: it prefers the worse answer"),
    "few rows": (of_margins(calibrated(99)), "only 99 rows"),
    "over-length": (_lost(overlength=9), "longer than what was scored of them: 9 of 800 answers (1.1 %)"),
    "unscored": (_lost(unscored=9), "without a score: 9 of 800 answers (1.1 %)"),
    "tied": (_lost(tied=5), "equal scores, which count as wrong: 5 of 400 pairs (1.2 %)"),
    "calibration": (of_margins(calibrated(2_000, 20)), "expected calibration error 0."),
}


@pytest.mark.parametrize("what", WARNED)
def test_what_is_wrong_with_a_number_is_a_warning(what):
    scored, sentence = WARNED[what]
    assert any(sentence in warning for warning in report_of(scored)["warnings"]), report_of(scored)["warnings"]


def test_what_is_right_is_no_warning():
    assert report_of(_lost(overlength=8, unscored=8, tied=3))["warnings"] == []
    assert report_of(of_margins(calibrated(400, seed=2)))["warnings"] == []


def test_several_sets_are_told_apart_by_their_titles():
    one, other = of_margins(calibrated(500), name="first"), of_margins(calibrated(50), name="second")
    report = report_of(one, other)
    assert [line.split(":")[0] for line in answer(report, words.WHERE_DOES_IT_FAIL).splitlines()] == ["first", "second"]
    assert all(warning.startswith("second: ") for warning in report["warnings"]) and report["warnings"]


def test_fifty_thousand_pairs_take_no_time():
    rng = np.random.default_rng(0)
    n = 50_000
    scored = scored_set(
        rng.normal(0, 1, (n, 2)), subsets=[f"s{i % 300}" for i in range(n)], tokens=rng.integers(1, 900, 2 * n)
    )
    started = time.perf_counter()
    made = make_report([scored], model="m", meta=META, command="", seed=1)
    assert time.perf_counter() - started < 4  # a tenth of it where nothing else runs
    assert made["sets"][0]["pairs"] == n


def test_a_row_of_many_answers_takes_memory_for_its_pairs_alone():
    scores = [np.arange(300.0), np.arange(2.0)]
    found = sections.ranking_of(scored_set(scores, scores))
    assert found["rows"] == 1 and found["tau"].value == pytest.approx(1)


def test_rows_that_were_left_out_are_a_warning():
    rows = of_margins(np.ones(200))
    says = "3 rows that could not be read were left out."
    assert says in report_of(rows, meta=META | {words.LEFT_OUT: 3})["warnings"]
    assert says not in report_of(rows)["warnings"]
