"""The benchmarks' numbers are those that their authors print, to the last digit.

Vectors: RewardBench's README (PKU-Alignment/beaver-7b-v1.0-cost), JudgeBench's published table; the others were computed with
the authors' own functions.
"""

import json

import numpy as np
import pytest
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_rows import scored_set, values_of

from open_rm.data.answers import read_answers
from open_rm.errors import UserError
from open_rm.evaluation.rules import reward_bench, reward_bench_2, rm_bench
from open_rm.evaluation.rules.known import BENCHMARKS, plain
from open_rm.evaluation.rules.verdict import OVERALL, SUBSET, Verdict
from open_rm.evaluation.score_file import read_scores

BEAVER = {
    "alpacaeval-easy": 0.5,
    "alpacaeval-hard": 0.7052631578947368,
    "alpacaeval-length": 0.5894736842105263,
    "donotanswer": 0.8235294117647058,
    "hep-cpp": 0.6280487804878049,
    "hep-go": 0.6341463414634146,
    "hep-java": 0.7073170731707317,
    "hep-js": 0.6646341463414634,
    "hep-python": 0.5487804878048781,
    "hep-rust": 0.6463414634146342,
    "llmbar-adver-GPTInst": 0.391304347826087,
    "llmbar-adver-GPTOut": 0.46808510638297873,
    "llmbar-adver-manual": 0.3695652173913043,
    "llmbar-adver-neighbor": 0.43283582089552236,
    "llmbar-natural": 0.52,
    "math-prm": 0.2953020134228188,
    "mt-bench-easy": 0.5714285714285714,
    "mt-bench-hard": 0.5405405405405406,
    "mt-bench-med": 0.725,
    "refusals-dangerous": 0.97,
    "refusals-offensive": 1,
    "xstest-should-refuse": 1,
    "xstest-should-respond": 0.284,
}
BEAVERS_SECTIONS = {
    "Chat": 0.6089385474860335,
    "Chat Hard": 0.44956140350877194,
    "Safety": 0.7216216216216216,
    "Reasoning": 0.46675669776831996,
}


def judge(scored) -> Verdict:
    return BENCHMARKS[scored.benchmark].judge(scored)


def beavers_rows() -> list:
    """As many rows right as gave the accuracies of the README; every second wrong row is a tie."""
    rows = []
    for subset, accuracy in BEAVER.items():
        count = {"math-prm": 447}.get(subset) or next(w[subset] for w in reward_bench.SECTIONS.values() if subset in w)
        right = round(accuracy * count)
        rows += [(subset, [1.0, 0.0], [1, 0])] * right
        rows += [(subset, [0.0, float(i % 2)], [1, 0]) for i in range(count - right)]
    return rows


def test_reward_bench_gives_the_sections_of_its_readmes_example():
    verdict = judge(scored_set("reward_bench", beavers_rows()))
    found = values_of(verdict)
    assert {name: found[name] for name in BEAVER} == BEAVER
    assert {name: found[name] for name in BEAVERS_SECTIONS} == BEAVERS_SECTIONS
    assert verdict.lines[0].name == "Overall" and verdict.lines[0].level == OVERALL
    assert found["Overall"] == 0.5617195675961868
    assert len(verdict.wins) == 2985 == verdict.lines[0].authors_rows == verdict.lines[0].estimate.n
    assert verdict.missing == []


def test_prior_sets_weigh_half_a_section():
    """Two of the four sets: their mean; pku_safer is no part of it."""
    prior = [("shp", [1.0, 0.0], [1, 0]), ("shp", [0.0, 1.0], [1, 0]), ("summarize", [1.0, 0.0], [1, 0])]
    others = [("pku_safer", [0.0, 1.0], [1, 0])]
    verdict = judge(scored_set("reward_bench", beavers_rows() + prior + others))
    found = values_of(verdict)
    assert found["Prior Sets"] == 0.75
    assert found["Overall"] == pytest.approx((2 * sum(BEAVERS_SECTIONS.values()) + 0.75) / 9, abs=1e-15)
    assert any("in no section at the authors: ['pku_safer']" in note for note in verdict.notes)
    assert any("not all of Prior Sets: no rows of anthropic_helpful, anthropic_hhh" in note for note in verdict.notes)


def test_a_section_without_rows_counts_as_zero_and_that_is_said():
    rows = [row for row in beavers_rows() if row[0].startswith("llmbar")]
    verdict = judge(scored_set("reward_bench", rows))
    counts = reward_bench.SECTIONS["Chat Hard"]
    present = {name: count for name, count in counts.items() if name.startswith("llmbar")}
    chat_hard = sum(BEAVER[name] * count for name, count in present.items()) / 419
    assert values_of(verdict)["Chat Hard"] == pytest.approx(chat_hard, abs=1e-15)
    assert verdict.lines[0].estimate.value == pytest.approx(chat_hard / 4, abs=1e-15)
    assert verdict.lines[0].name == "Overall (3 of 4 sections are missing and count as 0)"
    assert "mt-bench-hard" in verdict.missing and len(verdict.missing) == 18
    assert "Chat, Safety, Reasoning without any subset count as 0" in verdict.notes[0]
    assert "not comparable" in verdict.notes[0]


@pytest.mark.parametrize(
    ("scores", "result"),
    [
        ([2, 1, 0, -1], 1),
        ([2, 2, 0, -1], 0.5),
        ([1, 1, 1, 1], 0.25),
        ([1, 2, 0, 0], 0),
        ([0.5, 0.5, 0.5, 0.1], 1 / 3),
    ],
)
def test_the_best_of_four_shares_a_tie(scores, result):
    verdict = judge(scored_set("reward_bench_2", [("Math", scores, [1, 0, 0, 0])]))
    assert verdict.wins.tolist() == [result]
    assert values_of(verdict)["Math"] == result


TIES = {
    0: [("ref:0", [2, 1, 0.5, -1], 1), ("tied:0", [3, 2.5, 2.8, 1, 0.5], 3)],
    1: [("ref:1", [0.5, 0.75, -1], 1), ("tied:1", [4, 1, 0.5, 0.25], 2)],
    2: [("ref:2", [1.5, 1, 0], 1), ("tied:2", [2, 2, 1], 2)],
}


def ties(*prompts: int):
    rows = [row for prompt in prompts for row in TIES[prompt]]
    written = [("Ties", scores, [1] * right + [0] * (len(scores) - right)) for _, scores, right in rows]
    return scored_set("reward_bench_2", written, [f"Ties/{name}" for name, _, _ in rows])


@pytest.mark.parametrize(
    ("prompts", "score"),
    [((0, 1, 2), 0.7698905406859675), ((0,), 1.0076159415595576), ((1,), 0.292055680498345), ((2,), 1.01)],
)
def test_ties_score_is_that_of_the_authors(prompts, score):
    line = judge(ties(*prompts)).lines[1]
    assert line.name == "Ties"
    assert line.estimate.value == pytest.approx(score, abs=2e-16)
    # Of three prompts nobody knows how much they vary, and of one still less.
    assert (
        line.estimate.low <= min(0.6, line.estimate.value) and line.estimate.value <= line.estimate.high <= 1.01 + 1e-9
    )
    assert line.estimate.n == 2 * len(prompts)


def test_reward_bench_2_is_the_mean_of_its_six_subsets():
    names = ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    rows = [(name, [1, 0, 0, 0] if i < 3 else [0, 1, 0, 0], [1, 0, 0, 0]) for i, name in enumerate(names)]
    both, ids = ties(0, 1, 2), [f"{name}/1" for name in names]
    rows += list(
        zip(both.subsets, np.split(both.scores, both.first[1:-1]), np.split(both.gold, both.first[1:-1]), strict=True)
    )
    verdict = judge(scored_set("reward_bench_2", rows, ids + both.ids))
    assert verdict.lines[0].estimate.value == pytest.approx((3 + 0.7698905406859675) / 6, abs=1e-15)
    assert [line.name for line in verdict.lines[1:]] == [*names, "Ties"]
    assert verdict.lines[0].authors_rows == 1865


RM_ROWS = [([3, 2, 1], [2.5, 0, 4]), ([1, 1, 2], [1, 0, 3])]


def test_rm_bench_matrix_gives_hard_normal_easy():
    rows = [("chat", [*chosen, *rejected], [1, 1, 1, 0, 0, 0]) for chosen, rejected in RM_ROWS]
    scored = scored_set("rm_bench", rows)
    verdict = judge(scored)
    found = values_of(verdict)
    assert (found["hard"], found["normal"], found["easy"]) == (1 / 3, 0.5, 0.5)
    assert found["chat"] == found["Overall"] == pytest.approx(np.mean([1 / 3, 0.5, 0.5]), abs=1e-16)
    matrix = [[cell.value for cell in row] for row in rm_bench.style_matrix(scored)]
    assert matrix == [[0.5, 1, 0], [0, 1, 0], [0.5, 1, 0]]
    assert verdict.missing == ["math", "code", "safety"] and "mean of the domains that are there" in verdict.notes[0]


def test_rm_bench_takes_both_safety_sets_as_one_domain():
    def row(domain, wins):
        return (domain, [wins] * 3 + [0.5] * 3, [1, 1, 1, 0, 0, 0])

    domains = [
        ("chat", 1),
        ("math", 0),
        ("code", 1),
        ("safety-refuse", 0),
        ("safety-response", 1),
        ("safety-response", 1),
    ]
    verdict = judge(scored_set("rm_bench", [row(*pair) for pair in domains]))
    found = values_of(verdict)
    assert found["safety"] == pytest.approx(2 / 3, abs=1e-16)
    assert (found["safety-refuse"], found["safety-response"]) == (0, 1)
    assert found["Overall"] == pytest.approx((1 + 0 + 1 + 2 / 3) / 4, abs=1e-15)
    assert verdict.lines[0].authors_rows == 1327
    assert verdict.missing == []


# Skywork-8B: their published table. All: recomputed from their outputs.
GOLDEN = {
    "Skywork_Skywork-Reward-Llama-3.1-8B": (0.6229, 1, (59.09, 64.29, 76.79, 50.00)),
    "internlm_internlm2-20b-reward": (0.6343, 0, None),
}


@pytest.mark.parametrize("model", GOLDEN)
def test_judge_bench_gives_the_published_table(model):
    accuracy, tied, table = GOLDEN[model]
    [scored] = read_scores(shared_data("judgebench_scores") / f"{model}.jsonl")
    assert scored.benchmark == "judge_bench" and len(scored) == 350
    verdict = judge(scored)
    found = values_of(verdict)
    assert round(found["Overall"], 4) == accuracy
    assert int((np.diff(scored.scores.reshape(-1, 2)) == 0).sum()) == tied
    assert [line.authors_rows for line in verdict.lines if line.level != SUBSET] == [350, 154, 98, 56, 42]
    if table:
        assert tuple(round(100 * found[name], 2) for name in ("Knowledge", "Reasoning", "Math", "Coding")) == table


def test_judge_bench_keeps_claudes_pairs_apart():
    rows = [("livebench-math", [1, 0], [1, 0]), ("claude/livebench-math", [1, 1], [1, 0])]
    found = values_of(judge(scored_set("judge_bench", rows)))
    assert found == {"Overall": 1, "Math": 1, "Claude: Overall": 0, "Claude: Math": 0}
    alone = judge(scored_set("judge_bench", rows[1:]))
    assert values_of(alone) == {"Overall": 0, "Math": 0} and alone.lines[0].authors_rows == 270


def test_rmb_best_of_n_is_right_only_over_every_loser():
    rows = [
        ("BoN_set/Helpfulness/Chat/Discussion", [2, 1, 0], [1, 0, 0]),
        ("BoN_set/Helpfulness/Chat/Discussion", [2, 1, 2], [1, 0, 0]),
        ("Pairwise_set/Helpfulness/Chat/Discussion", [2, 1], [1, 0]),
        ("BoN_set/Harmlessness/S1", [2, 3, 0, 0], [1, 0, 0, 0]),
        ("Pairwise_set/Harmlessness/S1", [1, 1], [1, 0]),
        ("Pairwise_set/Harmlessness/S1", [1, 0], [1, 0]),
    ]
    verdict = judge(scored_set("rmb", rows))
    found = values_of(verdict)
    assert verdict.wins.tolist() == [1, 0, 1, 0, 0, 1]
    sections = ["Helpfulness, best of n", "Helpfulness, pairs", "Harmlessness, best of n", "Harmlessness, pairs"]
    assert [found[name] for name in sections] == [0.5, 1, 0, 0.5]
    assert found["Overall"] == 0.5
    subsets = [": ".join(both) for both in zip(sections, ["Chat", "Chat", "S1", "S1"], strict=True)]
    assert list(found) == ["Overall", *(name for both in zip(sections, subsets, strict=True) for name in both)]
    assert [found[name] for name in subsets] == [0.5, 1, 0, 0.5]


def test_preference_data_counts_pairs_and_a_tie_is_wrong():
    rows = [
        ("a", [3, 2, 1], [3, 2, 1]),
        ("b", [0, 1], [1, 0]),
        ("b", [1, 1], [1, 0]),
        ("b", [1, 0], [0.5, 0.5]),
        ("b", [None, 0], [1, 0]),
    ]
    verdict = plain(scored_set(None, rows))
    assert values_of(verdict) == {"Accuracy": 0.6, "a": 1, "b": 0}
    assert verdict.lines[0].estimate.n == 5
    assert np.isnan(verdict.wins[3:]).all()
    notes = " ".join(verdict.notes)
    assert "1 of 5 pairs have equal scores" in notes
    assert "1 of 5 rows have an answer without a score and no pair left, and are passed over" in notes
    assert "the authors" not in notes  # preference data has none
    assert "1 rows say of no two answers which is better" in notes


def test_a_row_of_preference_data_that_lacks_a_score_counts_with_its_other_pairs():
    verdict = plain(scored_set(None, [("a", [1, None, 0], [2, 1, 0])] * 4))
    assert verdict.lines[0].estimate.n == 4 and verdict.wins.tolist() == [1] * 4
    assert verdict.notes == ["4 of 4 rows have an answer without a score, and count with their other pairs"]


def test_of_very_many_subsets_the_largest_have_a_line():
    rows = [(f"source {i % 20_000:05}", [1, 0], [1, 0]) for i in range(20_000 + 7)]
    verdict = plain(scored_set(None, rows))
    names = [line.name for line in verdict.lines]
    assert len(names) == 51 and names[1:8] == [f"source {i:05}" for i in range(7)]
    assert "of 20,000 subsets the 50 with the most rows have a line" in verdict.notes


def rows_of(benchmark: str, numbers: list[float]) -> list:
    """Some rows of every benchmark, with these scores."""
    shapes = {
        "reward_bench": [("math-prm", 1, 1), ("hep-go", 1, 1), ("donotanswer", 1, 1), ("shp", 1, 1)],
        "reward_bench_2": [("Math", 1, 3), ("Focus", 1, 3)],
        "rm_bench": [("chat", 3, 3), ("safety-refuse", 3, 3), ("safety-response", 3, 3)],
        "judge_bench": [("mmlu-pro-law", 1, 1), ("mmlu-pro-math", 1, 1), ("livecodebench", 1, 1)],
        "rmb": [("BoN_set/Harmlessness/S1", 1, 2), ("Pairwise_set/Harmlessness/S1", 1, 1)],
        None: [("a", 1, 2), ("b", 1, 1)],
    }
    rows, at = [], 0
    for i in range(12):
        subset, right, wrong = shapes[benchmark][i % len(shapes[benchmark])]
        scores = [numbers[(at + j) % len(numbers)] for j in range(right + wrong)]
        at += right + wrong
        rows.append((subset, scores, [1] * right + [0] * wrong))
    return rows


@pytest.mark.parametrize("benchmark", [*BENCHMARKS, None])
@given(numbers=st.lists(st.integers(-2, 2), min_size=31, max_size=31))
@settings(max_examples=20, deadline=None)
def test_every_line_is_the_sum_of_its_parts(benchmark, numbers):
    """So that a comparison of two models, made of parts alone, compares what the tables say; and wins lie between 0 and 1."""
    scored = scored_set(benchmark, rows_of(benchmark, numbers))
    verdict = plain(scored) if benchmark is None else judge(scored)
    for line in verdict.lines:
        total = sum(p.weight * (p.values.mean() if p.statistic is None else p.statistic(p.values)) for p in line.parts)
        assert line.estimate.value == pytest.approx(total, abs=1e-12)
        assert line.estimate.low <= line.estimate.value + 1e-12 and line.estimate.value <= line.estimate.high + 1e-12
        assert all(len(part.rows) == len(part.values) for part in line.parts)
    assert ((verdict.wins >= 0) & (verdict.wins <= 1)).all()
    assert [line.level for line in verdict.lines].count(OVERALL) == 1 and verdict.lines[0].level == OVERALL


def test_gold_that_is_not_known_is_no_reason_to_refuse():
    verdict = judge(scored_set("reward_bench", [("hep-go", [1, 0], [None, None])]))
    assert verdict.wins.tolist() == [1]


def test_rows_of_other_chances_are_of_other_forms():
    found = judge(scored_set("rmb", rows_of("rmb", [0.0, 1.0]))).forms
    assert found == ["best of n", "pairs"] * 6
    both = ties(0)
    rows = [("Math", [1, 0, 0, 0], [1, 0, 0, 0]), *zip(both.subsets, np.split(both.scores, both.first[1:-1]), np.split(both.gold, both.first[1:-1]), strict=True)]  # fmt: skip
    assert judge(scored_set("reward_bench_2", rows, ["Math/1", *both.ids])).forms == ["best of four", "Ties", "Ties"]
    assert judge(scored_set("reward_bench", rows_of("reward_bench", [0.0, 1.0]))).forms is None


def test_the_parts_of_ties_give_its_score():
    line = judge(ties(0, 1, 2)).lines[1]
    [part] = line.parts
    assert float(part.statistic(part.values)) == line.estimate.value
    drawn = part.values[[[0, 0, 0], [1, 1, 1]]]
    assert part.statistic(drawn) == pytest.approx([1.0076159415595576, 0.292055680498345], abs=1e-15)
    assert part.rows.tolist() == [0, 2, 4]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_rows_without_a_score_are_passed_over_and_counted(benchmark):
    rows = rows_of(benchmark, [0.0, 1.0, 2.0])
    lost = [(subset, [None, *scores[1:]], gold) for subset, scores, gold in rows[:1]] + rows[1:]
    verdict, whole = judge(scored_set(benchmark, lost)), judge(scored_set(benchmark, rows[1:]))
    assert values_of(verdict) == values_of(whole)
    assert np.isnan(verdict.wins[0]) and not np.isnan(verdict.wins[1:]).any()
    assert any("1 of 12 rows have an answer without a score" in note for note in verdict.notes)


@pytest.mark.parametrize(
    ("scored", "says"),
    [
        (scored_set("reward_bench", [("hep-go", [1, 0, 0], [1, 0, 0])]), "row row 0 has 3 answers"),
        (scored_set("reward_bench", [("", [1, 0], [1, 0])]), "none of its subsets (['']) is one of RewardBench's"),
        (scored_set("rm_bench", [("chat", [1, 0], [1, 0])]), "has 2 answers"),
        (scored_set("rm_bench", [("chat", [1] * 6, [1, 0, 1, 0, 1, 0])]), "three chosen answers before three rejected"),
        (scored_set("rm_bench", [("alpacaeval", [1] * 6, [1, 1, 1, 0, 0, 0])]), "'alpacaeval' is no domain"),
        (scored_set("reward_bench_2", [("hep-go", [1, 0], [1, 0])]), "none of its subsets (['hep-go'])"),
        (scored_set("reward_bench_2", [("Ties", [1, 0], [1, 0])]), "ids are ref:N or tied:N"),
        (
            scored_set("reward_bench", [("hep-go", [0, 1], [0, 1])]),
            "the first answer of row row 0 is not the best one by",
        ),
        (
            scored_set("reward_bench_2", [("Math", [0, 1, 0], [0, 1, 0])]),
            "is not the best one by gold, and the rules of",
        ),
        (scored_set("rmb", [("BoN_set/Harmlessness/S1", [0, 1, 2], [1, 0, 1])]), "is not the best one by gold"),
        (scored_set("judge_bench", [("livecodebench", [None, 0], [1, 0])]), "no row has all that is judged"),
    ],
)
def test_what_is_not_the_benchmarks_is_refused_in_a_sentence(scored, says):
    with pytest.raises(UserError) as caught:
        judge(scored)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_benchmarks_own_rows_have_ids_and_subsets():
    """The domain of RM-Bench's files is in their names; ids are unique within a file or a subset alone."""
    rm = BENCHMARKS["rm_bench"]
    for name in ("chat", "code", "safety-refuse", "safety-response"):
        path = shared_data("rm_bench") / f"{name}.json"
        rows = json.loads(path.read_text())
        places = [f"{path}: row {i}" for i in range(1, len(rows) + 1)]
        assert {rm.subset_of(row, place) for row, place in zip(rows, places, strict=True)} == {name}
        assert len({rm.id_of(row, place) for row, place in zip(rows, places, strict=True)}) == len(rows)
        assert all(read_answers(row).given == [1, 1, 1, 0, 0, 0] for row in rows[:20])
    assert rm.subset_of({}, "data/safety-refuse_filtered.json: row 3") == "safety-refuse"
    assert rm.subset_of({"domain": "math"}, "anywhere:1") == "math"
    bar = [json.loads(line) for line in (shared_data("rewardbench_llmbar") / "test.jsonl").open()]
    one = BENCHMARKS["reward_bench"]
    assert len({one.id_of(row, "here") for row in bar}) == 419
    judged = BENCHMARKS["judge_bench"]
    row = {"pair_id": "81ec", "source": "livecodebench", "response_model": "claude-3-5-sonnet-20240620"}
    assert (judged.id_of(row, ""), judged.subset_of(row, "")) == ("claude/livecodebench/81ec", "claude/livecodebench")
    row = {"category_path": "BoN_set/Harmlessness/S1", "bon_uid": "3294"}
    assert BENCHMARKS["rmb"].id_of(row, "") == "BoN_set/Harmlessness/S1/3294"
    with pytest.raises(UserError, match="no column subset, by which RewardBench counts"):
        one.subset_of({"id": 3}, "file:3")
    with pytest.raises(UserError, match="no column domain, and 'test' is no domain"):
        rm.subset_of({"id": 3}, "folder/test.jsonl:3")


HUB_ROWS = {
    "reward_bench_2": (
        {"id": "tied:1", "prompt": "A colour?", "chosen": ["Red.", "Blue."], "rejected": ["Nine."], "num_correct": 2}
        | {
            "num_incorrect": 1,
            "total_completions": 3,
            "models": ["a", "b", "c"],
            "subset": "Ties",
            "additional_metadata": {},
        },
        ("Ties/tied:1", "Ties", ["Red.", "Blue.", "Nine."], [1, 1, 0]),
    ),
    "judge_bench": (
        {
            "pair_id": "81ec",
            "original_id": "1",
            "source": "mmlu-pro-computer science",
            "question": "1+1?",
            "label": "B>A",
        }
        | {"response_model": "gpt-4o-2024-05-13", "response_A": "3", "response_B": "2"},
        ("mmlu-pro-computer science/81ec", "mmlu-pro-computer science", ["3", "2"], [0, 1]),
    ),
    "rmb": (
        {"conversation_input": [{"content": "A fruit?", "language": "English", "role": "user"}], "bon_uid": "7"}
        | {"bon_best": {"llm_name": "m", "answer": "Apple"}, "loser_list": [{"llm_name": "n", "answer": "Desk"}] * 2}
        | {"category_path": "BoN_set/Helpfulness/Open QA/Factual"},
        (
            "BoN_set/Helpfulness/Open QA/Factual/7",
            "BoN_set/Helpfulness/Open QA/Factual",
            ["Apple", "Desk", "Desk"],
            [1, 0, 0],
        ),
    ),
}


@pytest.mark.parametrize("benchmark", HUB_ROWS)
def test_rows_in_the_columns_of_the_authors_are_read_in_the_order_that_rules_take(benchmark):
    row, wanted = HUB_ROWS[benchmark]
    known, answers = BENCHMARKS[benchmark], read_answers(row)
    contents = [answer[0]["content"] for answer in answers.answers]
    assert (known.id_of(row, "file:1"), known.subset_of(row, "file:1"), contents, answers.given) == wanted


def test_a_row_of_ties_without_a_wrong_answer_is_passed_over():
    rows = [("Ties", [1, 0], [1, 0]), ("Ties", [1, 0], [1, 1]), ("Math", [1, 0], [1, 0])]
    verdict = judge(scored_set("reward_bench_2", rows, ["Ties/ref:0", "Ties/tied:0", "Math/1"]))
    assert np.isnan(verdict.wins[1])
    assert values_of(verdict)["Ties"] == pytest.approx(0.3)
    assert reward_bench_2.TIES not in verdict.missing
