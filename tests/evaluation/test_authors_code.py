"""Our numbers are those of the authors' own code on the same scores.

RewardBench's functions are taken from its package (0.1.4, of an environment that old_clients.py keeps) and run as they are. The code
of RM-Bench and JudgeBench has no package; their loops are written again here, one comparison at a time.
"""

import ast
import json
import math

import numpy as np
import pandas as pd
import pytest
from conftest import shared_data
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from old_clients import REWARDBENCH, environment
from scored_rows import scored_set, values_of

from open_rm.evaluation.rules.known import BENCHMARKS

SCORE = st.integers(-2, 2)  # few values, so that many are equal


@pytest.fixture(scope="module")
def theirs() -> dict:
    """Names of rewardbench/constants.py and of functions of rewardbench/utils.py, without the models that the package imports."""
    folder = environment(REWARDBENCH) / "rewardbench"
    names = {"np": np, "pd": pd, "math": math, "Dataset": Dataset}
    exec(compile((folder / "constants.py").read_text(), "constants.py", "exec"), names)
    wanted = ("calculate_scores_per_section", "reroll_and_score_dataset", "sample_stats", "process_single_model")
    module = ast.parse((folder / "utils.py").read_text())
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert len(module.body) == len(wanted)
    exec(compile(module, "utils.py", "exec"), names)
    return names


def llmbar() -> list[dict]:
    return [json.loads(line) for line in (shared_data("rewardbench_llmbar") / "test.jsonl").open(encoding="utf-8")]


def of_rewardbench(theirs: dict, subsets: list[str], scores: np.ndarray) -> dict[str, float]:
    """What scripts/run_rm.py prints: results of each row, a mean for each subset, sections. scores: [rows, 2]."""
    results = [1 if chosen > rejected else 0 for chosen, rejected in scores]
    of_subset = {
        name: [result for result, subset in zip(results, subsets, strict=True) if subset == name]
        for name in set(subsets)
    }
    grouped = {name: sum(found) / len(found) for name, found in of_subset.items()}
    sections = theirs["calculate_scores_per_section"](theirs["EXAMPLE_COUNTS"], theirs["SUBSET_MAPPING"], grouped)
    return grouped | sections


def ours(subsets: list[str], scores: np.ndarray):
    rows = [(subset, list(both), [1, 0]) for subset, both in zip(subsets, scores, strict=True)]
    return BENCHMARKS["reward_bench"].judge(scored_set("reward_bench", rows))


@pytest.mark.parametrize("how", ["characters", "words", "ties", "normal"])
def test_sections_on_llmbar_are_those_of_rewardbench(theirs, how):
    rows, random = llmbar(), np.random.default_rng(7)
    of_texts = {"characters": len, "words": lambda text: len(text.split())}
    if how in of_texts:
        scores = np.asarray([[of_texts[how](row[side]) for side in ("chosen", "rejected")] for row in rows], float)
    else:
        scores = (
            random.integers(0, 3, (len(rows), 2)).astype(float) if how == "ties" else random.normal(size=(len(rows), 2))
        )
    subsets = [row["subset"] for row in rows]
    assert len(rows) == 419 and (how == "normal" or (scores[:, 0] == scores[:, 1]).any())
    found, wanted = values_of(ours(subsets, scores)), of_rewardbench(theirs, subsets, scores)
    overall = next(value for name, value in found.items() if name.startswith("Overall"))
    assert overall == sum(wanted[name] for name in theirs["SUBSET_MAPPING"]) / 4
    absent = {name for name in theirs["SUBSET_MAPPING"] if name not in found}
    assert absent == {"Chat", "Safety", "Reasoning"} and all(wanted[name] == 0 for name in absent)
    assert {name: value for name, value in found.items() if not name.startswith("Overall")} == {
        name: value for name, value in wanted.items() if name not in absent
    }


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_sections_are_those_of_rewardbench(theirs, data):
    """Any of its subsets, of any number of rows."""
    names = data.draw(st.lists(st.sampled_from(sorted(theirs["EXAMPLE_COUNTS"])), min_size=1, unique=True))
    subsets = [name for name in names for _ in range(data.draw(st.integers(1, 4)))]
    scores = np.asarray(
        data.draw(st.lists(st.tuples(SCORE, SCORE), min_size=len(subsets), max_size=len(subsets))), float
    )
    found, wanted = values_of(ours(subsets, scores)), of_rewardbench(theirs, subsets, scores)
    for name, value in wanted.items():
        assert found.get(name, 0) == value


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["Math", "Focus"]), st.lists(SCORE, min_size=2, max_size=6)), min_size=1, max_size=8
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_best_of_four_is_that_of_rewardbench(theirs, rows):
    flat = [(subset, i, float(score), "") for i, (subset, scores) in enumerate(rows) for score in scores]
    dataset = Dataset.from_pandas(pd.DataFrame(flat, columns=["subset", "id", "scores", "text"]))
    rolled = theirs["reroll_and_score_dataset"](dataset, [len(scores) for _, scores in rows])
    judged = [(subset, scores, [1] + [0] * (len(scores) - 1)) for subset, scores in rows]
    verdict = BENCHMARKS["reward_bench_2"].judge(scored_set("reward_bench_2", judged))
    assert verdict.wins.tolist() == list(rolled["results"])
    for subset in {subset for subset, _ in rows}:
        results = [r for r, s in zip(rolled["results"], rolled["subset"], strict=True) if s == subset]
        # Sums of 1/k in another order.
        assert values_of(verdict)[subset] == pytest.approx(sum(results) / len(results), abs=1e-15)


PROMPT = st.tuples(
    st.lists(SCORE, min_size=2, max_size=4),  # ref: one right answer
    st.integers(2, 3),  # right ones of tied
    st.lists(SCORE, min_size=4, max_size=6),
)


def ties_rows(prompts) -> list[tuple[str, list[float], int]]:
    named = [[(f"ref:{n}", ref, 1), (f"tied:{n}", tied, right)] for n, (ref, right, tied) in enumerate(prompts)]
    return [row for both in named for row in both]


def ties_judged(rows) -> float:
    judged = [("Ties", scores, [1] * right + [0] * (len(scores) - right)) for _, scores, right in rows]
    ids = [f"Ties/{name}" for name, _, _ in rows]
    return values_of(BENCHMARKS["reward_bench_2"].judge(scored_set("reward_bench_2", judged, ids)))["Ties"]


@given(prompts=st.lists(PROMPT, min_size=1, max_size=6), missing=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ties_are_scored_as_by_rewardbench(theirs, prompts, missing):
    """Version 0.1.4, which leaves prompts whose right answers all have one score out of the smallest term (1 %): those get
    another one here. missing: a prompt of which only ref is there."""
    apart = [(ref, right, [tied[0] + 0.5, *tied[1:]]) for ref, right, tied in prompts]
    rows = ties_rows(apart)[: -1 if missing and len(prompts) > 1 else None]
    dataset = Dataset.from_list([{"id": name, "scores": scores, "num_correct": right} for name, scores, right in rows])
    _, score = theirs["process_single_model"](dataset)
    assert ties_judged(rows) == pytest.approx(score, abs=1e-14)


@given(prompts=st.lists(PROMPT, min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_ties_without_spread_are_scored_as_by_the_later_rule(prompts):
    """rewardbench/utils.py at 05a9005: a gap over no spread is infinite, 0 / 0 is 0; written with ifs."""
    terms = []
    for ref, right, tied in prompts:
        gap_ref = ref[0] - max(ref[1:])
        gap, spread = min(tied[:right]) - max(tied[right:]), max(tied[:right]) - min(tied[:right])
        least = min(gap, gap_ref)
        if spread:
            far = math.tanh(least / spread - 1)
        else:
            far = 0 if least == 0 else math.copysign(1, least)
        terms.append(0.3 * (gap > 0) + 0.3 * (gap_ref > 0) + 0.2 * (gap > spread) + 0.2 * (least > spread) + 0.01 * far)
    assert ties_judged(ties_rows(prompts)) == pytest.approx(sum(terms) / len(terms), abs=1e-14)


def of_rm_bench(rows: list[tuple[str, list, list]]) -> dict[str, float]:
    """What `compute_accuracy` of scripts/utils.py in THU-KEG/RM-Bench (73c52d7) does, comparison by comparison."""
    counts = {}
    for domain, chosen, rejected in rows:
        of = counts.setdefault(domain.split("-")[0], {"rows": 0, "hard": 0, "normal": 0, "easy": 0})
        of["rows"] += 1
        for i in range(3):
            for j in range(3):
                kind = "normal" if i == j else "hard" if j > i else "easy"
                of[kind] += chosen[i] > rejected[j]
    kinds = ("hard", "normal", "easy")
    shares = {name: {kind: of[kind] / of["rows"] / 3 for kind in kinds} for name, of in counts.items()}
    found = {name: sum(of.values()) / 3 for name, of in shares.items()}
    found["Overall"] = sum(found.values()) / len(shares)
    return found | {kind: sum(of[kind] for of in shares.values()) / len(shares) for kind in kinds}


THREE = st.tuples(SCORE, SCORE, SCORE)
DOMAIN = st.sampled_from(["chat", "math", "code", "safety-refuse", "safety-response"])


@given(rows=st.lists(st.tuples(DOMAIN, THREE, THREE), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_rm_bench_is_scored_as_by_its_authors(rows):
    judged = [(domain, [*chosen, *rejected], [1, 1, 1, 0, 0, 0]) for domain, chosen, rejected in rows]
    found = values_of(BENCHMARKS["rm_bench"].judge(scored_set("rm_bench", judged)))
    for name, value in of_rm_bench(rows).items():
        assert found[name] == pytest.approx(value, abs=1e-14)


def of_judge_bench(rows: list[tuple[str, float, float, str]]) -> float:
    """RewardModel.get_judgment in utils/judges.py and compute_final_metrics in utils/metrics.py of ScalerLab/JudgeBench
    (e2c52c2), both orders."""
    flipped = {"A>B": "B>A", "B>A": "A>B"}

    def vote(first: float, second: float) -> str:
        return "A>B" if first > second else "B>A"

    correct = 0
    for _, score_a, score_b, label in rows:
        votes = [vote(score_a, score_b), flipped[vote(score_b, score_a)]]
        balance = sum((found == label) - (found == flipped[label]) for found in votes)
        correct += balance > 0
    return correct / len(rows)


SOURCE = st.sampled_from(["mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench"])
NAMES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


@given(rows=st.lists(st.tuples(SOURCE, SCORE, SCORE, st.sampled_from(["A>B", "B>A"])), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_judge_bench_is_scored_as_by_its_authors(rows):
    judged = [(source, [a, b], [1, 0] if label == "A>B" else [0, 1]) for source, a, b, label in rows]
    found = values_of(BENCHMARKS["judge_bench"].judge(scored_set("judge_bench", judged)))
    assert found["Overall"] == of_judge_bench(rows)
    for source, name in NAMES.items():
        inside = [row for row in rows if row[0].startswith(source)]
        assert not inside or found[name] == of_judge_bench(inside)
