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
    assert "In the order in which they were named" in table.order
    assert "66.7 % (58.8 to 73.7) †" in leaderboard.markdown(table)


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


def test_a_mistake_is_one_sentence(tmp_path, three):
    (tmp_path / "empty").mkdir()
    for paths, said in (
        ([], "nothing to compare"),
        ([tmp_path / "empty"], "no scores.jsonl in this folder"),
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
