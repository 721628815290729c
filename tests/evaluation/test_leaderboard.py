"""Many models in one table: computed from their scores, with intervals, with who cannot be told apart from whom."""

import csv
import json
import random

import pytest
from browser import Browser
from conftest import shared_data
from sample_report import HOSTILE

from open_rm.errors import UserError
from open_rm.evaluation import score_file
from open_rm.evaluation.page import leaderboard
from open_rm.evaluation.trust.report import make_report


def write_scores(folder, wins, *, meta=None, shuffled=False, benchmark=None, subset="all"):
    """scores.jsonl of sets of pairs, of which these are ranked right ({set: [bool]}). Returns the folder."""
    folder.mkdir(parents=True)
    rows = [
        score_file.row_of(
            set=name, benchmark=benchmark, id=f"{name}/{number}", subset=subset, scores=[1.0, 0.0] if win else [0.0, 1.0],
            gold=[1.0, 0.0], prompt="p", answers=["a", "b"], overlength=[False, False],
        )
        for name, own in wins.items()
        for number, win in enumerate(own)
    ]  # fmt: skip
    if shuffled:
        random.Random(1).shuffle(rows)
    (folder / score_file.SCORES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if meta is not None:
        (folder / score_file.META).write_text(json.dumps(meta), encoding="utf-8")
    return folder


def wins(right: int, n: int = 400, seed: int = 0) -> list[bool]:
    own = [number < right for number in range(n)]
    random.Random(seed).shuffle(own)
    return own


def cells(table, name: str) -> list[tuple[str, str | None]]:
    """(value in percent or -, what is said of it) of a model's row."""
    [row] = [row for row in table.rows if row.model.name == name]
    return [(cell.text.split(" ")[0], cell.beside_best) for cell in row.cells]


@pytest.fixture
def three(tmp_path):
    """a: good at both sets, b: as good in nearly the same rows of one and without the other, c: worse at both."""
    good = wins(320)
    nearly = [not win if number in (5, 9, 300) else win for number, win in enumerate(good)]
    a = write_scores(
        tmp_path / "a", {"one": good, "two": wins(300)}, meta={"model": "A", "dtype": "float32", "facts": {"x": 1}}
    )
    b = write_scores(tmp_path / "b", {"one": nearly}, shuffled=True)
    c = write_scores(tmp_path / "c", {"one": wins(240, seed=1), "two": wins(200, seed=1)}, meta={"dtype": "bfloat16"})
    return [c, b, a]


def test_real_models_have_the_published_numbers(tmp_path):
    """JudgeBench's own table, and the accuracies of the reference document."""
    files = sorted(shared_data("judgebench_scores").glob("*.jsonl"))
    table = leaderboard.compare(files)
    assert [column.title for column in table.columns] == [
        "JudgeBench", "JudgeBench: Knowledge", "JudgeBench: Reasoning", "JudgeBench: Math", "JudgeBench: Coding",
    ]  # fmt: skip
    skywork = [cell.estimate for cell in next(row for row in table.rows if "Skywork" in row.model.name).cells]
    assert [f"{100 * one.value:.2f}" for one in skywork] == ["62.29", "59.09", "64.29", "76.79", "50.00"]
    assert f"{table.rows[0].cells[0].estimate.value:.4f}" == "0.6343"
    assert table.order == "Ordered by JudgeBench."


def test_who_cannot_be_told_apart_from_the_best_is_marked(three):
    table = leaderboard.compare(three)
    assert [row.model.name for row in table.rows] == ["A", "b", "c"]
    assert cells(table, "A") == [("80.0", "best"), ("75.0", "best")]
    assert cells(table, "b") == [("79.2", leaderboard.LIKE_BEST), ("-", None)]
    assert cells(table, "c") == [("60.0", "lower"), ("50.0", "lower")]


def test_what_a_model_has_no_scores_of_is_a_dash_and_no_part_of_the_order(three, tmp_path):
    table = leaderboard.compare(three)
    assert "all have on the same rows: one" in table.order
    assert [row.mean for row in table.rows][0] == pytest.approx(0.8)
    markdown, page, numbers = leaderboard.write(table, tmp_path)
    lines = [line for line in markdown.read_text(encoding="utf-8").splitlines() if line.startswith("| 2 | b |")]
    assert len(lines) == 1 and lines[0].endswith("| - |") and "0.0 %" not in lines[0]
    with numbers.open(encoding="utf-8", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows["b"]["two"] == rows["b"]["two, low"] == ""
    assert float(rows["A"]["one"]) == 0.8 and float(rows["A"]["one, low"]) == table.rows[0].cells[0].estimate.low
    assert rows["c"]["one, beside the best"] == "lower" and rows["c"]["one, rows"] == "400"


def test_how_the_scores_were_made_stands_beside_the_numbers(three, tmp_path):
    written = leaderboard.markdown(leaderboard.compare(three))
    assert "| A | float32 |" in written and "| c | bfloat16 |" in written and "| b | not known |" in written
    assert "facts" not in written


def test_sets_that_differ_in_rows_are_shown_and_not_compared(tmp_path):
    a, b = (write_scores(tmp_path / name, {"one": wins(300, seed=seed)}) for seed, name in enumerate("ab"))
    c = write_scores(tmp_path / "c", {"one": wins(100, n=150)})
    table = leaderboard.compare([a, b, c])
    assert cells(table, "c") == [("66.7", leaderboard.NOT_COMPARED)]
    assert table.notes[0] == "one, c: rows differ, not compared (150 rows, 150 of the 400 that the others have)"
    assert table.order == "Ordered by one. Last, without a rank: c; no headline of theirs can be compared."
    assert "| - | c | 66.7 % (58.8 to 73.7) † |" in leaderboard.markdown(table)
    table = leaderboard.compare([c, a])
    assert "In the order in which they were named" in table.order
    assert [row.model.name for row in table.rows] == ["c", "a"] and "| 1 |" not in leaderboard.markdown(table)


def without_scores(folder, kept: int, *, first: int = 0):
    """The same scores.jsonl, with null in all rows but `kept` from `first` on."""
    path = folder / score_file.SCORES
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        row if first <= number < first + kept else row | {"scores": [None, row["scores"][1]]}
        for number, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("others", [1, 2])
def test_a_model_without_scores_of_most_rows_is_neither_the_best_nor_ranked(tmp_path, others):
    """Its one row is right: 100 %, which says nothing beside 71 % of 1,000 rows."""
    right = [True, *wins(709, n=999)]
    empty = without_scores(write_scores(tmp_path / "empty", {"one": right}), 1)
    full = [write_scores(tmp_path / name, {"one": right}, shuffled=name == "b") for name in "ab"[:others]]
    table = leaderboard.compare([empty, *full])
    assert cells(table, "empty") == [("100.0", leaderboard.NOT_COMPARED)]
    assert cells(table, "a") == [("71.0", "best" if others == 2 else leaderboard.ALONE)]
    [row] = [row for row in table.rows if row.model.name == "empty"]
    assert row.mean is None and "rows with scores to judge: 1, the others' 1,000" in table.notes[0]
    if others == 2:
        assert [row.model.name for row in table.rows] == ["a", "b", "empty"]
        assert [row.mean for row in table.rows[:2]] == pytest.approx([0.71, 0.71])


def test_models_with_scores_of_the_same_rows_are_compared_and_of_others_not(tmp_path):
    made = {
        name: without_scores(write_scores(tmp_path / name, {"one": wins(300)}), 350, first=first)
        for name, first in (("a", 0), ("b", 0), ("c", 50))
    }
    table = leaderboard.compare(made.values())
    assert [cells(table, name)[0][1] for name in "abc"] == ["best", "best", leaderboard.NOT_COMPARED]


def test_of_answers_without_scores_the_same_ones_are_compared(tmp_path):
    """Of three answers one is null: the pair that is left counts, but is another one at each model."""
    folders = []
    for name, scores in (("a", [2.0, 1.0, None]), ("b", [2.0, 1.0, None]), ("c", [2.0, None, 3.0])):
        rows = [
            score_file.row_of(set="one", benchmark=None, id=f"{n}", subset="", scores=scores, gold=[2.0, 1.0, 0.0])
            for n in range(20)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / score_file.SCORES).write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(tmp_path / name)
    table = leaderboard.compare(folders)
    assert [cells(table, name)[0][1] for name in "abc"] == ["best", "best", leaderboard.NOT_COMPARED]


def test_many_equal_models_are_seldom_called_worse_than_the_luckiest(tmp_path):
    """12 models that are right by chance in 60 % of rows: one comparison alone calls some of them worse than the best of them."""
    alone = leaderboard.sidak
    folders = [
        write_scores(
            tmp_path / f"m{seed}", {"one": [random.Random(seed * 1000 + n).random() < 0.6 for n in range(200)]}
        )
        for seed in range(12)
    ]
    said = [row.cells[0].beside_best for row in leaderboard.compare(folders).rows]
    assert said == ["best"] + [leaderboard.LIKE_BEST] * 11
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(leaderboard, "sidak", lambda p, tests: alone(p, 1))
        assert "lower" in [row.cells[0].beside_best for row in leaderboard.compare(folders).rows]
    assert "Šidák" in leaderboard.legend(leaderboard.compare(folders))


def test_a_headline_without_all_of_its_benchmark_says_so(tmp_path):
    folders = [
        write_scores(
            tmp_path / name, {"reward_bench": wins(60, n=100)}, benchmark="reward_bench", subset="llmbar-natural"
        )
        for name in "ab"
    ]
    table = leaderboard.compare(folders)
    headline, section = table.rows[0].cells
    assert headline.text.endswith(leaderboard.INCOMPLETE) and not section.text.endswith(leaderboard.INCOMPLETE)
    assert any("not the whole benchmark" in note for note in table.notes)
    assert leaderboard.INCOMPLETE in leaderboard.legend(table) and "no scores" not in leaderboard.legend(table)


def test_a_whole_benchmark_and_a_part_of_it_are_one_column(tmp_path):
    """Though RewardBench's overall line is called otherwise where sections are missing."""
    subsets = ("alpacaeval-easy", "llmbar-natural", "refusals-dangerous", "hep-go")
    lines = []
    for name, own in (("whole", subsets), ("part", subsets[:2])):
        folders = [
            write_scores(
                tmp_path / name / subset, {"reward_bench": wins(6, n=10)}, benchmark="reward_bench", subset=subset
            )
            for subset in own
        ]
        texts = [
            (folder / score_file.SCORES).read_text().replace("reward_bench/", f"{folder.name}/") for folder in folders
        ]
        (tmp_path / name / score_file.SCORES).write_text("".join(texts))
        lines.append(tmp_path / name)
    table = leaderboard.compare(lines)
    assert [column.title for column in table.columns] == [
        "RewardBench", "RewardBench: Chat", "RewardBench: Chat Hard", "RewardBench: Safety", "RewardBench: Reasoning",
    ]  # fmt: skip
    assert [cell[0] for cell in cells(table, "whole")] == ["60.0"] * 5
    assert [cell[0] for cell in cells(table, "part")] == ["30.0", "60.0", "60.0", "-", "-"]


def test_two_sets_of_one_benchmark_have_columns_of_their_own_names(tmp_path):
    """In every model's row, of which one has only one of them."""
    how = {"benchmark": "reward_bench", "subset": "llmbar-natural"}
    a = write_scores(tmp_path / "a", {"first": wins(6, n=10), "second": wins(5, n=10)}, **how)
    b = write_scores(tmp_path / "b", {"second": wins(4, n=10)}, **how)
    table = leaderboard.compare([a, b])
    assert [column.title for column in table.columns if column.level == "overall"] == [
        "RewardBench (first)",
        "RewardBench (second)",
    ]
    assert [value for value, _ in cells(table, "b")] == ["-", "-", "10.0", "40.0"]  # three sections are missing
    assert [value for value, _ in cells(table, "a")] == ["15.0", "60.0", "12.5", "50.0"]


def test_rows_that_only_their_places_tell_apart_are_said_to_be_matched_by_them(tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file in files:
        file.write_text('{"chosen_score": 1, "rejected_score": 0}\n' * 3)
    (tmp_path / "x").mkdir()
    table = leaderboard.compare([*files])
    [note] = [note for note in table.notes if "no ids" in note]
    assert note.startswith("preference data, b: the files give no ids")
    files[1] = files[1].rename(tmp_path / "x" / "a.jsonl")
    table = leaderboard.compare(files)
    [note] = [note for note in table.notes if "no ids" in note]
    assert note.startswith("a, a (x/a.jsonl): the files give no ids, so row n of one is taken to be row n of the other")


@pytest.mark.parametrize("sign", "=+-@")
def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path, sign):
    name = f'{sign}HYPERLINK("http://x")'
    a = write_scores(tmp_path / "a", {f"{sign}1+1": wins(30, n=50)}, meta={"model": name})
    *_, numbers = leaderboard.write(leaderboard.compare([a]), tmp_path)
    with numbers.open(encoding="utf-8", newline="") as file:
        header, row = csv.reader(file)
    assert row[1] == f"'{name}" and header[4] == f"'{sign}1+1"
    assert not [cell for cell in header + row if cell.startswith(sign)]


def test_rows_of_the_same_names_with_other_right_answers_are_not_compared(tmp_path):
    a = write_scores(tmp_path / "a", {"one": wins(30, n=50)})
    b = write_scores(tmp_path / "b", {"one": wins(30, n=50)})
    text = (b / score_file.SCORES).read_text().replace('"gold": [1.0, 0.0]', '"gold": [0.0, 1.0]')
    (b / score_file.SCORES).write_text(text)
    table = leaderboard.compare([a, b])
    assert cells(table, "b")[0][1] == leaderboard.NOT_COMPARED
    assert "other answers" in table.notes[0]


def test_two_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_scores(tmp_path / name, {"one": wins(30, n=50)}, meta={"model": "M"}) for name in ("x", "y")]
    assert [row.model.name for row in leaderboard.compare(folders).rows] == ["M (x/scores.jsonl)", "M (y/scores.jsonl)"]


def test_two_models_of_one_name_and_folder_are_told_apart_by_the_path_above(tmp_path):
    folders = [write_scores(tmp_path / name / "x", {"one": wins(30, n=50)}) for name in ("a", "b")]
    names = [row.model.name for row in leaderboard.compare(folders).rows]
    assert names == ["x (a/x/scores.jsonl)", "x (b/x/scores.jsonl)"]


def pairs_file(path, won: list[bool], first: int = 0):
    """Plain pairs with ids, as others write them."""
    rows = [{"id": first + n, "chosen_score": int(win), "rejected_score": 0.5} for n, win in enumerate(won)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sets_without_a_name_meet_by_their_rows(tmp_path):
    """Two files of the same rows are one column, another two of other rows a second, a named set of the same rows names them."""
    a, b = (pairs_file(tmp_path / f"{name}.jsonl", wins(right)) for name, right in (("A", 320), ("B", 200)))
    table = leaderboard.compare([b, a])
    assert [column.title for column in table.columns] == ["preference data"]
    assert cells(table, "A") == [("80.0", "best")] and cells(table, "B") == [("50.0", "lower")]
    others = [pairs_file(tmp_path / f"{name}.jsonl", wins(300), first=1000) for name in ("C", "D")]
    table = leaderboard.compare([a, b, *others])
    assert [cell[0] for cell in cells(table, "A")] == ["80.0", "-"]
    assert [cell[0] for cell in cells(table, "D")] == ["-", "75.0"]
    named = write_scores(tmp_path / "named", {"our pairs": wins(300)})
    rows = [json.loads(text) for text in (named / score_file.SCORES).read_text(encoding="utf-8").splitlines()]
    rows = [row | {"id": row["id"].partition("/")[2]} for row in rows]
    (named / score_file.SCORES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = leaderboard.compare([a, named])
    assert [column.title for column in table.columns] == ["our pairs"] and cells(table, "A") == [("80.0", "best")]


def test_the_p_beside_the_best_is_that_of_two_models_compared(tmp_path, monkeypatch):
    """5 rows won and none lost: p is at least 1/16, that of the exact sign test."""
    right = wins(300)
    worse = [win and number not in [n for n, one in enumerate(right) if one][:5] for number, win in enumerate(right)]
    a, b = (write_scores(tmp_path / name, {"one": own}) for name, own in (("a", right), ("b", worse)))
    own, other = (score_file.read_scores(folder) for folder in (a, b))
    report = make_report(own, model="a", meta={}, command="", seed=leaderboard.SEED, other=("b", other))
    [line] = [one for one in report["against"]["sets"][0]["lines"] if one["level"] == "overall"]
    seen = []
    monkeypatch.setattr(leaderboard, "sidak", lambda p, tests: seen.append(p) or p)
    assert cells(leaderboard.compare([a, b]), "b") == [("73.8", leaderboard.LIKE_BEST)]
    assert seen == [line["p"]] and line["p"] >= 1 / 16


def test_the_datas_own_scores_are_noted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"score_chosen": 9, "score_rejected": 3}\n' * 3)
    assert any("hardly a model's scores" in note for note in leaderboard.compare([path]).notes)


def test_of_a_training_runs_folder_the_report_of_its_model_is_taken(tmp_path):
    write_scores(tmp_path / "run" / "evaluation", {"one": wins(300)})
    [row] = leaderboard.compare([tmp_path / "run"]).rows
    assert row.model.name == "run" and row.cells[0].text.startswith("75.0")


def test_scores_that_rules_refuse_are_told_with_their_file(tmp_path):
    a = write_scores(tmp_path / "a", {"one": wins(30, n=50)}, benchmark="reward_bench", subset="hep-go")
    file = a / score_file.SCORES
    file.write_text(file.read_text().replace('"gold": [1.0, 0.0]', '"gold": [0.0, 1.0]'))
    with pytest.raises(UserError, match=f"^{file}: one: the first answer of row one/0 is not the best one by gold"):
        leaderboard.compare([a])


def test_a_mistake_is_one_sentence(tmp_path, three):
    for name, report in (("empty", None), ("alone", {"command": "python -m x --scores 'my x.jsonl'"}), ("old", [])):
        (tmp_path / name).mkdir()
        if report is not None:
            (tmp_path / name / "report.json").write_text(json.dumps(report))
    for paths, said in (
        ([], "nothing to compare"),
        ([tmp_path / "empty"], "no scores.jsonl in this folder"),
        ([tmp_path / "alone"], "alone: this folder holds a report alone, of scores that are elsewhere; .* my x.jsonl$"),
        ([tmp_path / "old"], "this folder holds a report alone, without scores.jsonl; name the scores file that"),
        ([tmp_path / "absent.jsonl"], "no such file"),
        ([three[0], three[0] / score_file.SCORES], "is the same as"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            leaderboard.compare(paths)
        assert "\n" not in str(raised.value)


def test_hostile_names_are_inert_in_every_form(tmp_path):
    """And the page is one that a browser has nothing to complain of, sorted by its buttons, as the report's."""
    made = {"model": "m" + HOSTILE, "dtype" + HOSTILE: "bf16" + HOSTILE}
    a = write_scores(tmp_path / "a", {"one": wins(300)}, meta=json.loads(json.dumps(made)))
    b = write_scores(tmp_path / "b", {"one": wins(200, seed=2)})
    markdown, page, numbers = leaderboard.write(leaderboard.compare([b, a]), tmp_path)
    text = markdown.read_text(encoding="utf-8")
    assert "<script" not in text and "\u202e" not in text and "&lt;script" in text
    table = text.split("\n\n")[1].splitlines()  # as many cells in each line
    assert len(table) == 4 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "\u202e" not in numbers.read_text(encoding="utf-8")
    browser = Browser(tmp_path / "chromium")
    try:
        browser.show(page, width=390)
        assert browser.evaluate("window.hurt === undefined && document.images.length === 0")
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        assert browser.requests == [page.resolve().as_uri()]
        browser.click("table.models th:nth-child(2) button")
        browser.press("Enter", 13, "\r")
        column = (
            "[...document.querySelectorAll('table.models tbody tr')].map((row) => row.cells[1].textContent.slice(0, 4))"
        )
        assert browser.evaluate(column) == ["50.0", "75.0"]
        assert browser.complaints == []
    finally:
        browser.close()
