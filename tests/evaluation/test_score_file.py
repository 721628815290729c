"""Scores from our own lines and from what others' tools leave are the same numbers; what cannot be judged is one sentence."""

import gzip
import json
import re
import time
import tracemalloc

import numpy as np
import pytest
from conftest import shared_data

from open_rm.errors import UserError
from open_rm.evaluation import __main__ as command
from open_rm.evaluation.arguments import EvaluationArgs
from open_rm.evaluation.rules.known import BENCHMARKS, plain
from open_rm.evaluation.score_file import (
    META,
    SCORES,
    aligned,
    likely_the_datas,
    order_assumed,
    read_meta,
    read_scores,
    row_of,
)
from open_rm.scoring.lines import Lines


def line(number: int, scores=(1.0, 0.0), **other) -> dict:
    made = row_of(
        set="data",
        benchmark=None,
        id=f"row {number}",
        subset="a",
        scores=list(scores),
        gold=[1.0, 0.0],
        prompt=f"question {number}",
        answers=["yes", "no, ünlikely"],
        overlength=[False, True],
    )
    return made | other


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row + "\n" for row in rows), "utf-8")
    return path


def test_lines_are_read_as_they_were_written(tmp_path):
    """Two sets whose rows alternate; null where a score is not there; a byte order mark and empty lines."""
    rows = [
        line(1, tokens=[3, 4]),
        line(1, set="other", benchmark="rmb", scores=[2.0, None, 1.0], gold=[1, 0, 0], overlength=[False, True, False]),
        line(2, [0.5, 0.25], characters=[7, None]),
    ]
    rows[1]["answers"] = [[{"role": "assistant", "content": "four"}], None, "x"]
    path = tmp_path / SCORES
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([b"", *Lines().of(rows).splitlines(), b""]))
    data, other = read_scores(tmp_path)
    assert (data.name, data.benchmark, data.ids, data.subsets) == ("data", None, ["row 1", "row 2"], ["a", "a"])
    assert data.first.tolist() == [0, 2, 4] and data.scores.tolist() == [1, 0, 0.5, 0.25]
    assert data.gold.tolist() == [1, 0, 1, 0] and data.overlength.tolist() == [False, True, False, True]
    assert data.characters.tolist() == [3, 12, 7, -1] and data.tokens.tolist() == [3, 4, -1, -1]
    assert (other.name, other.benchmark) == ("other", "rmb")
    np.testing.assert_array_equal(other.scores, [2, np.nan, 1])
    assert other.characters.tolist() == [4, -1, 1]
    assert data.texts(1) == ("question 2", ["yes", "no, ünlikely"])
    assert other.texts(0) == ("question 1", rows[1]["answers"])
    assert (data.scores.dtype, data.characters.dtype, data.overlength.dtype) == (np.float64, np.int64, bool)


def test_a_row_that_is_no_finite_number_is_not_written():
    with pytest.raises(UserError, match="row row 1: the model's scores are .*nan.*no finite numbers"):
        line(1, [float("nan"), 0.0])


JUDGED = {"pair_id": "81ec", "source": "livebench-math", "label": "B>A", "characters_A": 5, "characters_B": 6}
PLAIN = {"prompt": "1+1?", "chosen": "2", "rejected": "three"}
# (rows as others write them, benchmark, scores and gold of each row, subsets)
ELSEWHERE = {
    "judge_bench": ([JUDGED | {"score_A": 1, "score_B": 2.5}], "judge_bench", [([1, 2.5], [0, 1])], ["livebench-math"]),
    "judge_bench_outputs": (
        [JUDGED | {"judgments": [{"judgment": {"scores": [1, 2.5]}, "decision": "B>A"}, None]}],
        "judge_bench",
        [([1, 2.5], [0, 1])],
        ["livebench-math"],
    ),
    "rm_bench": (
        [{"id": 8, "domain": "chat", "score_chosen": [3, 2, 1], "score_rejected": [2.5, 0, 4]}],
        "rm_bench",
        [([3, 2, 1, 2.5, 0, 4], [1, 1, 1, 0, 0, 0])],
        ["chat"],
    ),
    "reward_bench": (
        [
            {
                "subset": "hep-go",
                "id": 1,
                "results": 1,
                "scores_chosen": 0.5,
                "scores_rejected": -1,
                "text_chosen": "<s>a",
            }
        ],
        "reward_bench",
        [([0.5, -1], [1, 0])],
        ["hep-go"],
    ),
    "reward_bench_2": (
        [{"subset": "Ties", "id": "tied:1", "num_correct": 2, "scores": [[4.0], [1.0], [0.5]], "results": None}],
        "reward_bench_2",
        [([4, 1, 0.5], [1, 1, 0])],
        ["Ties"],
    ),
    "rmb": (
        [
            {
                "pair_uid": "9",
                "category_path": "Pairwise_set/Harmlessness/S1",
                "chosen_reward": 0.2,
                "reject_reward": 0.1,
            }
        ],
        "rmb",
        [([0.2, 0.1], [1, 0])],
        ["Pairwise_set/Harmlessness/S1"],
    ),
    "chosen_score": ([PLAIN | {"chosen_score": 2, "rejected_score": 1}], None, [([2, 1], [1, 0])], [""]),
    "score_chosen": (
        [PLAIN | {"score_chosen": 2, "score_rejected": 1, "source": "s"}],
        None,
        [([2, 1], [1, 0])],
        ["s"],
    ),
    "save_all": (
        [{"chosen": 2, "rejected": 1}, {"chosen": 0, "rejected": 1}],
        None,
        [([2, 1], [1, 0]), ([0, 1], [1, 0])],
        ["", ""],
    ),
    "scored_pairs": (
        # The data's own annotations are no scores of the model.
        [PLAIN | {"score_chosen": 9, "score_rejected": 8, "scores": [0.5, 1.5], "overlength": [False, True]}],
        None,
        [([0.5, 1.5], [1, 0])],
        [""],
    ),
    "scored_ranked": (
        [
            {
                "prompt": "1+1?",
                "responses": ["2", "3"],
                "input_scores": [5, 1],
                "scores": [0, 1],
                "overlength": [False] * 2,
            }
        ],
        None,
        [([0, 1], [5, 1])],
        [""],
    ),
    "scored_labelled": (
        [
            {
                "prompt": "?",
                "response_a": "x",
                "response_b": "y",
                "winner": "b",
                "scores": [0, 1],
                "overlength": [False] * 2,
            }
        ],
        None,
        [([0, 1], [0, 1])],
        [""],
    ),
}


@pytest.mark.parametrize("form", ELSEWHERE)
@pytest.mark.parametrize("how", ["lines", "list"])
def test_scores_made_elsewhere_are_read(form, how, tmp_path):
    rows, benchmark, found, subsets = ELSEWHERE[form]
    path = tmp_path / f"{form}.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, rows)) if how == "lines" else json.dumps(rows, indent=1), encoding="utf-8"
    )
    [scored] = read_scores(path)
    assert (scored.name, scored.benchmark) == (benchmark or form, benchmark)
    assert scored.scores.tolist() == [score for scores, _ in found for score in scores]
    assert scored.gold.tolist() == [value for _, gold in found for value in gold]
    assert scored.subsets == subsets and len(set(scored.ids)) == len(rows)
    if "chosen" in rows[0] and isinstance(rows[0]["chosen"], str):
        assert scored.texts(0)[1] == ["2", "three"] and scored.characters.tolist() == [1, 5]
    if benchmark == "judge_bench":
        assert scored.characters.tolist() == [5, 6]
    if form == "scored_pairs":
        assert scored.overlength.tolist() == [False, True]


def test_rewardbenchs_columns_are_rows(tmp_path):
    """Its eval-set-scores are one object of columns, and what is no column is of all rows."""
    columns = {
        "subset": ["hep-go", "hep-cpp"],
        "id": [1, 1],
        "scores_chosen": [1.0, 2.0],
        "scores_rejected": [0.5, 3.0],
    }
    for indent in (4, None):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(columns | {"model": "m", "chat_template": "tulu"}, indent=indent), encoding="utf-8")
        [scored] = read_scores(path)
        assert scored.benchmark == "reward_bench" and scored.ids == ["hep-go/1", "hep-cpp/1"]
        assert scored.scores.tolist() == [1, 0.5, 2, 3]
    path.write_text(json.dumps(columns | {"id": [1]}), encoding="utf-8")
    with pytest.raises(UserError, match="columns are of different lengths"):
        read_scores(path)


def test_rm_benchs_lists_without_ids_are_numbered_and_of_their_files_domain(tmp_path):
    rows = [
        {"score_chosen": [3, 2, 1], "score_rejected": [2.5, 0, 4]},
        {"score_chosen": [1, 1, 2], "score_rejected": [1, 0, 3]},
    ]
    path = write(tmp_path / "chat.jsonl", rows)
    [scored] = read_scores(path)
    assert scored.ids == ["row 1", "row 2"] and scored.subsets == ["chat", "chat"]
    found = {line.name: line.estimate.value for line in BENCHMARKS["rm_bench"].judge(scored).lines}
    assert (found["hard"], found["normal"], found["easy"]) == (1 / 3, 0.5, 0.5)
    with pytest.raises(UserError, match="no column domain, and 'scores' is no domain of RM-Bench"):
        read_scores(write(tmp_path / "scores.jsonl", rows))


def test_a_flag_says_whose_rows_they_are(tmp_path):
    """Rows of LLMBar that `open_rm.scoring score` wrote."""
    rows = [json.loads(text) for text in (shared_data("rewardbench_llmbar") / "test.jsonl").open(encoding="utf-8")][:40]
    scored_rows = [
        row | {"scores": [len(row["chosen"]), len(row["rejected"])], "overlength": [False] * 2} for row in rows
    ]
    [scored] = read_scores(write(tmp_path / "out.jsonl", scored_rows), benchmark="reward_bench")
    assert scored.benchmark == scored.name == "reward_bench"
    assert scored.ids == [f"{row['subset']}/{row['id']}" for row in rows]
    assert scored.characters.tolist() == scored.scores.tolist()
    assert scored.texts(3)[1] == [rows[3]["chosen"], rows[3]["rejected"]]


GOOD = json.dumps(line(1))
PAIR = {"chosen_score": 1.0, "rejected_score": 0.0}
BAD = {
    "nan": (
        [GOOD, GOOD.replace('"row 1"', '"row 2"').replace("[1.0, 0.0]", "[NaN, 0.0]")],
        "2: not valid JSON (NaN is no number",
    ),
    "infinity": ([GOOD.replace("[1.0, 0.0]", "[-Infinity, 0.0]")], "-Infinity is no number that JSON has"),
    "so great that a margin overflows": (
        [GOOD.replace("[1.0, 0.0]", "[1e308, -1e308]", 1)],
        "1e+308 among its scores is no finite number from -1e+100 to 1e+100",
    ),
    "infinity in digits": ([GOOD.replace("[1.0, 0.0]", "[1e999, 0.0]", 1)], "inf among its scores is no finite number"),
    "many digits": ([GOOD.replace("[1.0, 0.0]", f"[1{'0' * 320}, 0.0]", 1)], "among its scores is no finite number"),
    "text for a number": (
        [line(1, scores=[1.0]) | {"scores": ["1.0", 0.0]}],
        "'1.0' among its scores is no finite number",
    ),
    "a truth value": ([line(1) | {"scores": [True, 0.0]}], "True among its scores is no finite number"),
    "one number": ([line(1) | {"scores": 1.0}], "scores must be a list of numbers"),
    "no scores": ([line(1) | {"scores": []}], "scores must be a list of numbers"),
    "no id": ([{k: v for k, v in line(1).items() if k != "id"}], "1: no id, which tells a row of data from the others"),
    "no set": ([line(1, set="")], "1: no set"),
    "no gold": ([{k: v for k, v in line(1).items() if k != "gold"}], "gold must be a list"),
    "gold of another length": ([line(1, gold=[1, 0, 0])], "2 scores and 3 of gold"),
    "twice": ([line(1), line(2), line(1)], "3: row 'row 1' of data stands twice, first as row 1 of the set"),
    "unknown benchmark": (
        [line(1, benchmark="mmlu")],
        "'mmlu' is no benchmark that is known here; they are reward_bench",
    ),
    "two benchmarks": ([line(1), line(2, benchmark="rmb")], "set data is of benchmark rmb here, and of None before"),
    "wrong number": ([line(1, benchmark="rm_bench")], "2 scores, and a row of RM-Bench has 6"),
    "wrong number elsewhere": (
        [{"subset": "hep-go", "id": 1, "scores_chosen": [1, 2], "scores_rejected": [0]}],
        "3 scores, and a row of RewardBench has 2",
    ),
    "a subset that is no text": ([line(1, subset=3)], "subset must be text, not 3"),
    "tokens that are no numbers": ([line(1, tokens=["3", 4])], "tokens must be a list of 2 whole numbers"),
    "overlength": ([line(1, overlength=[0, 1])], "overlength must be a list of 2 true or false"),
    "empty": ([], "holds no scores"),
    "not JSON": ([GOOD, GOOD[:-20]], "2: not valid JSON"),
    "nested": (['{"scores": ' + "[" * 100_000], "1: not valid JSON (maximum recursion depth"),
    "no object": ([GOOD, "[1, 2]"], "2: not an object with scores but [1, 2]"),
    "list of numbers": (["[1, 2]"], "row 1: not an object with scores but 1"),
    "mixed forms": ([PAIR, line(1)], "2: not of the form of the rows before it (chosen and rejected scores)"),
    "mixed forms, ours first": ([line(1), PAIR], "2: no set"),
    "other columns": ([{"question": "?", "answer": "!"}], "no scores under any name that is known"),
    "one answer a row": ([{"prompt": "?", "response": "!", "score": 1.0}], "one score a row"),
    "no subset": (
        [{"id": 1, "pair_id": 2, "label": "A>B", "score_A": 1, "score_B": 2}],
        "no column source, by which JudgeBench",
    ),
    "no label": (
        [{"source": "livebench-math", "label": "A=B", "score_A": 1, "score_B": 2}],
        "label must be A>B or B>A, not 'A=B'",
    ),
    "num_correct": ([{"subset": "Math", "id": 1, "scores": [1, 2], "num_correct": 3}], "num_correct must be"),
    # the data's own scores beside the model's
    "two sets of scores": (
        [PAIR | {"score_chosen": 9, "score_rejected": 3}],
        "1: more than one set of scores (score_chosen and score_rejected, and chosen_score and rejected_score); keep the model's, "
        "and remove or rename the others",
    ),
    "two sets of scores, in a later row": (
        [PAIR, PAIR | {"chosen_reward": 9, "rejected_reward": 3}],
        "2: more than one set of scores (chosen_score and rejected_score, and chosen_reward and rejected_reward)",
    ),
    "two sets of scores, one a list": (
        [PLAIN | {"score_chosen": 9, "score_rejected": 3, "scores": [0.5, 1.5]}],
        "more than one set of scores (score_chosen and score_rejected, and scores)",
    ),
    "two sets of scores at JudgeBench": (
        [JUDGED | PAIR | {"score_A": 1, "score_B": 2}],
        "more than one set of scores (chosen_score and rejected_score, and score_A and score_B)",
    ),
    "ids of a subset": (
        [PAIR | {"id": 0, "subset": subset} for subset in ("hep-go", "hep-cpp")],
        "2: row '0' of scores stands twice, first as row 1 of the set; they are of the subsets 'hep-go' and 'hep-cpp': if ids are "
        "unique within a subset alone, name the benchmark whose rows these are (--benchmark reward_bench, reward_bench_2, rm_bench, "
        "judge_bench, rmb), or write the subset into each id",
    ),
    "ids of a subset, ours": ([line(1), line(1, subset="b")], "within a subset alone, write the subset into each id"),
    "ids of a subset that is not there": (
        [{"id": 0, "scores_chosen": 1, "scores_rejected": 2}] * 2,
        "if ids are unique within a subset alone, as RewardBench's, add the column subset and name the benchmark",
    ),
    "no set in the first line": ([{k: v for k, v in line(1).items() if k != "set"}], "1: no set, the name of what"),
    "an unknown domain": (
        [line(1, [1.0] * 6, benchmark="rm_bench", subset="poetry", gold=[1] * 3 + [0] * 3, overlength=[False] * 6)],
        "1: 'poetry' is no domain of RM-Bench; a row's domain begins with chat",
    ),
    "gold of nothing": ([line(1, gold=[None, None])], "data: gold is null in every row"),
    "gold all equal": ([line(1, gold=[2, 2])], "data: gold says of no two answers of a row that one is better"),
    "one answer in every row": (
        [line(1, [1.0], gold=[1], overlength=[False])],
        "data: every row has one answer, so that none stands beside another one",
    ),
    "no scores of two answers": ([line(1, [None, 1.0])], "data: 1 of 2 scores are null, and no row has scores of two"),
    "scores of other answers": (
        [PLAIN | {"scores": [1, 2, 3], "overlength": False}],
        "are not the scores of its 2 answers",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_judged_is_one_sentence(fault, tmp_path):
    rows, says = BAD[fault]
    path = write(tmp_path / SCORES, rows)
    with pytest.raises(UserError) as caught:
        read_scores(path)
    message = str(caught.value)
    assert says in message and message.startswith(str(path)) and "\n" not in message and len(message) < 500


def test_scores_that_are_usually_the_datas_are_told_where_none_is_wrong(tmp_path):
    data = [PLAIN | {"score_chosen": 9 - n, "score_rejected": 3} for n in range(4)]
    path = write(tmp_path / "data.jsonl", data)
    [said] = likely_the_datas(path, read_scores(path))
    assert said.startswith(f"{path}: the scores come from columns score_chosen and score_rejected, which in most")
    for rows in (
        [*data, PLAIN | {"score_chosen": 1, "score_rejected": 3}],
        [PAIR] * 4,
        [PLAIN | {"score_chosen": 3, "score_rejected": 3}],
        [line(1)],
        [{"domain": "chat", "score_chosen": [3, 2, 1], "score_rejected": [0, 0, 0]}],
    ):
        assert likely_the_datas(path, read_scores(write(path, rows))) == []


def judge(folder, scores, **flags) -> dict:
    """As `python -m open_rm.evaluation --scores` does."""
    return command.main(EvaluationArgs(scores=str(scores), output_dir=str(folder), **flags))


def test_the_datas_own_scores_are_warned_of_in_the_report(tmp_path):
    path = write(tmp_path / "data.jsonl", [PLAIN | {"score_chosen": 9, "score_rejected": 3}] * 3)
    assert any("hardly a model's scores" in sentence for sentence in judge(tmp_path / "out", path)["warnings"])
    model = write(tmp_path / "model.jsonl", [PLAIN | {"chosen_score": 9, "rejected_score": 3}] * 3)
    report = judge(tmp_path / "out", model, against=str(path))
    assert any(sentence.startswith(f"{path}: the scores come from") for sentence in report["warnings"])
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["warnings"] == report["warnings"]


def test_a_folder_that_holds_a_report_alone_names_the_scores_file(tmp_path):
    rows = [PAIR, PAIR | {"chosen_score": -1.0}]
    a, b = (write(tmp_path / f"{name}.jsonl", rows) for name in "ab")
    judge(tmp_path / "out", a)
    for flags in ({"against": str(tmp_path / "out")}, {"scores": str(tmp_path / "out")}):
        with pytest.raises(UserError, match=f"holds a report alone, of scores that are elsewhere; .*, {a}$"):
            judge(tmp_path / "other", **{"scores": b} | flags)
    with pytest.raises(UserError, match=f"^--against .*holds a report alone, .*, {a}$"):
        command.main(
            EvaluationArgs(
                model="m", benchmark=["rm_bench"], against=str(tmp_path / "out"), output_dir=str(tmp_path / "c")
            )
        )


def test_of_a_training_runs_folder_the_scores_of_its_own_model_are_taken_and_told(tmp_path, capsys):
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    write(tmp_path / "run" / "evaluation" / SCORES, [line(1), line(2, [0.0, 1.0])])
    own = write(tmp_path / "own.jsonl", [line(1), line(2)])
    report = judge(tmp_path / "out", own, against=str(tmp_path / "run"))
    assert (report["against"]["model"], report["against"]["sets"][0]["won"]) == ("run", 1)
    assert (
        f"{tmp_path / 'run'} is a training run's folder: its evaluation/scores.jsonl is read" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="is the model itself"):
        judge(tmp_path / "out", tmp_path / "run" / "evaluation", against=str(tmp_path / "run"))


def test_what_rules_refuse_is_told_with_the_file_that_it_is_in(tmp_path):
    good = [line(n, benchmark="reward_bench", subset="hep-go") for n in (1, 2)]
    bad = [row | {"gold": [0.0, 1.0]} for row in good]
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("good", good), ("bad", bad))}
    said = f"^{files['bad']}: data: the first answer of row row 1 is not the best one by gold"
    with pytest.raises(UserError, match=said):
        judge(tmp_path / "out", files["bad"])
    assert not (tmp_path / "out").exists()


def test_texts_that_were_left_out_are_no_second_set_of_scores(tmp_path):
    rows = [PAIR | {"chosen": None, "rejected": None}]
    assert read_scores(write(tmp_path / "a.jsonl", rows))[0].scores.tolist() == [1, 0]


def test_what_is_no_file_of_scores_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_scores(tmp_path)
    with pytest.raises(UserError, match="mmlu is no benchmark"):
        read_scores(write(tmp_path / SCORES, [line(1)]), benchmark="mmlu")
    with pytest.raises(UserError, match="the row is of benchmark rmb, and --benchmark says rm_bench"):
        read_scores(write(tmp_path / SCORES, [line(1, benchmark="rmb")]), benchmark="rm_bench")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode().replace(b"question", "fränge".encode("latin-1")))
    with pytest.raises(UserError, match="not UTF-8"):
        read_scores(tmp_path / "latin.jsonl")
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(GOOD.encode()))
    with pytest.raises(UserError, match="packed.jsonl: packed, and texts"):
        read_scores(tmp_path / "packed.jsonl")
    (tmp_path / "half.json").write_text('[\n{"chosen_score": 1,', encoding="utf-8")
    with pytest.raises(UserError, match="half.json: not valid JSON"):
        read_scores(tmp_path / "half.json")


def test_what_the_scores_were_made_with_stands_beside_them(tmp_path):
    path = write(tmp_path / SCORES, [line(1)])
    assert read_meta(tmp_path) == read_meta(path) == {}
    (tmp_path / META).write_text('{"model": "m"}', encoding="utf-8")
    assert read_meta(tmp_path) == read_meta(path) == {"model": "m"}
    assert read_meta(write(tmp_path / "elsewhere.jsonl", [line(1)])) == {}
    for broken in ('{"model"', "[1]"):
        (tmp_path / META).write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(META)):
            read_meta(path)


def test_two_models_rows_meet_by_their_ids(tmp_path):
    """The other model's rows in another order, of different numbers of answers."""
    random = np.random.default_rng(5)
    sizes = [2, 3, 2, 4, 2]
    rows = [
        line(i, random.normal(size=n).tolist(), gold=[1] + [0] * (n - 1), overlength=[False] * n, characters=[i] * n)
        for i, n in enumerate(sizes)
    ]
    others = [row | {"scores": [10 * score for score in row["scores"]], "prompt": f"to {row['id']}"} for row in rows]
    own = read_scores(write(tmp_path / "own.jsonl", rows))
    other = read_scores(write(tmp_path / "other.jsonl", [others[i] for i in (3, 0, 4, 1, 2)]))
    [same] = aligned(own, other)
    assert same.ids == own[0].ids and same.scores.tolist() == [10 * score for score in own[0].scores.tolist()]
    assert same.characters.tolist() == own[0].characters.tolist()
    assert [same.texts(i)[0] for i in range(5)] == [f"to row {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([line(1)], "the two models were not scored on the same rows (2 and 1; only one has row 2)"),
        ([line(1), line(2), line(3)], "the two models were not scored on the same rows (2 and 3; only one has row 3)"),
        ([line(1), line(3)], "only one has row 2"),
        ([line(1), line(2, gold=[0, 1])], "row row 2 has other answers, or other ones are right"),
        ([line(1), line(2, [1, 2, 3], gold=[1, 0, 0], overlength=[False] * 3)], "row row 2 has other answers"),
        (
            [line(1), line(2, answers=["yes", "no"])],
            "data: row row 2 has other answers at the two models, one of 12 and of 2 characters",
        ),
        ([line(1, set="x"), line(2, set="y")], "data: the other model has no scores of it, but of x, y"),
    ],
)
def test_models_scored_on_other_rows_are_not_compared(rows, says, tmp_path):
    own = read_scores(write(tmp_path / "own.jsonl", [line(1), line(2)]))
    with pytest.raises(UserError) as caught:
        aligned(own, read_scores(write(tmp_path / "other.jsonl", rows)))
    assert says in str(caught.value)


def test_rows_without_ids_are_of_the_same_answers_or_said_to_be_matched_by_their_places(tmp_path):
    """The same scores in the other order are other rows, which only lengths can tell."""
    rows = [PLAIN | {"chosen": "yes" * n, "chosen_score": n, "rejected_score": 1} for n in (1, 2, 3)]
    own = read_scores(write(tmp_path / "own.jsonl", rows))
    with pytest.raises(UserError, match="row row 1 has other answers .* 3 and of 9 characters .the files give no ids"):
        aligned(own, read_scores(write(tmp_path / "other.jsonl", rows[::-1])))
    [same] = aligned(own, read_scores(write(tmp_path / "same.jsonl", rows)))
    assert order_assumed(own[0], same) is None
    bare = [{name: row[name] for name in ("chosen_score", "rejected_score")} for row in rows]
    [same] = aligned(own, read_scores(write(tmp_path / "bare.jsonl", bare)))
    assert order_assumed(own[0], same).startswith("own: the files give no ids, so row n of one is taken to be row n of")
    named = [row | {"id": n} for n, row in enumerate(bare)]
    [own, other] = (read_scores(write(tmp_path / f"{name}.jsonl", named)) for name in ("own", "other"))
    assert order_assumed(own[0], aligned(own, other)[0]) is None


def test_fifty_thousand_pairs_are_judged_in_seconds_without_their_texts_in_memory(tmp_path):
    """100 MB of texts. Alone it takes a second; the bound leaves room for a busy machine. Memory is measured on fewer rows, for
    that is slow: less than 400 bytes a row where its texts are 2,000."""
    text = "word " * 200
    path = tmp_path / SCORES
    row = json.dumps(line(0, answers=[text, text])).replace('"row 0"', '"row %d"').replace("1.0, 0.0", "%f, 0.0", 1)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(row % (i, (-1) ** (i // 3)) + "\n" for i in range(50_000))
    start = time.process_time()
    [scored] = read_scores(path)
    estimate = plain(scored).lines[0].estimate
    seconds = time.process_time() - start
    assert (estimate.n, len(scored)) == (50_000, 50_000) and abs(estimate.value - 0.5) < 0.01
    assert seconds < 6, seconds
    few = tmp_path / "few.jsonl"
    with path.open("rb") as all_rows, few.open("wb") as file:
        file.writelines(line for _, line in zip(range(1500), all_rows, strict=False))
    tracemalloc.start()
    kept = read_scores(few)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1500 * 400 + 200_000 and len(kept[0]) == 1500, (held, most)
    assert scored.texts(49_999)[1] == [text, text]
