"""Attributes are read from every shape of rows and follow their answers into every pair, whichever side an answer is on.

The rows' attributes are made from the answers' own words (help_of, length_of), so that each side of a pair tells what its
attributes must be, in whatever way it got there.
"""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import read_pairs

from open_rm.data.attributes import parse_attributes
from open_rm.data.building import read_both
from open_rm.data.counts import Counts
from open_rm.data.reading import Reading, reading_of_source
from open_rm.data.rows import read_row
from open_rm.errors import UserError
from open_rm.flags import DataFlags

ASKED = ("help", "long")
HELP = {"yes": 4.0, "no": 1.0, "maybe": 2.5, "never": 0.0, "so": 3.0}
PAIR = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}
TWO = {"prompt": "Q: ", "response_a": "yes", "response_b": "no"}
LIST = {"prompt": "Q: ", "responses": ["no", "yes", "never", "maybe"], "scores": [1, 3, 1, 2]}


def of(answer) -> tuple[float, float]:
    """(help, long) of an answer, by its words."""
    answer = answer[-1]["content"] if isinstance(answer, list) else answer
    return HELP[answer], float(len(answer))


def reading(*asked, **more) -> Reading:
    return Reading(attributes=parse_attributes(asked or ASKED), **more)


def check(row, how, pairs=1):
    """Every pair of the row has the attributes of its two sides."""
    found = read_row(row, how).pairs
    assert len(found) == pairs
    for pair in found:
        assert pair.attributes == (of(pair.chosen), of(pair.rejected))
    return found


def columns(spelling: str, sides: tuple[str, str], answers: tuple[str, str]) -> dict:
    """The attributes of two answers in columns of a spelling, e.g. {side}_{name}."""
    both = itertools.product(zip(sides, answers, strict=True), enumerate(ASKED))
    return {spelling.format(side=side, name=name): of(answer)[k] for (side, answer), (k, name) in both}


@pytest.mark.parametrize("spelling", ["{side}_{name}", "{name}_{side}"])
@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("response_a", "response_b"), ("a", "b")])
def test_two_sides_have_columns_in_either_spelling(spelling, sides):
    row = (PAIR if sides[0] == "chosen" else TWO | {"winner": "b"}) | columns(spelling, sides, ("yes", "no"))
    [pair] = check(row, reading())
    assert pair.chosen == ("yes" if sides[0] == "chosen" else "no")
    plan_unread = read_row(row, reading()).plan.unread
    assert not plan_unread, "a column that is read as an attribute is no finding"
    assert len(read_row(row).plan.unread) == 4


@pytest.mark.parametrize("p", [0.8, 0.2, 0.5])
def test_where_votes_or_a_probability_swap_the_sides_their_attributes_go_along(p):
    row = PAIR | columns("{side}_{name}", ("chosen", "rejected"), ("yes", "no"))
    for more in ({"label_prob": p}, {"n_chosen": round(10 * p), "n_rejected": round(10 - 10 * p)}):
        [pair] = check(row | more, reading())
        assert pair.chosen == ("no" if p < 0.5 else "yes")
    ids = {
        "chosen_input_ids": [1, 2],
        "rejected_input_ids": [1, 3],
        "label_prob": p,
        "help_chosen": 7,
        "help_rejected": 8,
    }
    [pair] = read_row(ids, reading("help")).pairs
    assert pair.attributes == (((8.0,), (7.0,)) if p < 0.5 else ((7.0,), (8.0,)))


@pytest.mark.parametrize(
    "decides",
    [{"winner": "a"}, {"winner": "b"}, {"winner": "tie"}, {"strength": -2}, {"score_a": 1, "score_b": 3}]
    + [{"winner": "b", "label_prob": 0.3}, {"score_a": 1, "score_b": 3, "label_prob": 0.1}, {"strength": 0}],
)
def test_of_two_answers_each_keeps_its_own_whoever_won(decides):
    check(TWO | decides | columns("{name}_{side}", ("a", "b"), ("yes", "no")), reading(keep_ties=True))
    check(TWO | decides | {"h": [4, "1"], "l": [3, 2]}, reading("help=h", "long=l", keep_ties=True))
    check(TWO | decides | {"h": {"x": 4, "y": 1}, "l": 3, "m": 2}, reading("help=h.x,h.y", "long=l,m", keep_ties=True))


@pytest.mark.parametrize("keep_ties", [False, True])
@pytest.mark.parametrize("lower", [None, True])
def test_each_answer_of_a_ranked_list_keeps_its_own(keep_ties, lower):
    lists = {name: [of(answer)[k] for answer in LIST["responses"]] for k, name in enumerate(ASKED)}
    check(LIST | lists, reading(keep_ties=keep_ties, lower_is_better=lower), pairs=5 + keep_ties)
    [first, *_] = check(LIST | lists | {"scores": None}, reading(ignore=("scores",)), pairs=6)
    assert (first.chosen, first.rejected) == ("no", "yes")  # in the order of the file


def completions(answers, scores) -> list[dict]:
    """As UltraFeedback holds them, with ratings in text."""
    rated = [{"help": {"Rating": f"{of(answer)[0]:g}"}, "long": {"Rating": str(len(answer))}} for answer in answers]
    both = zip(answers, scores, rated, strict=True)
    return [{"response": text, "fine-grained_score": score, "annotations": notes} for text, score, notes in both]


def test_elements_of_a_list_have_them_inside_and_answers_left_out_shift_nothing():
    row = {"instruction": "Q", "completions": completions(["no", "yes", "so", "maybe"], [1, 3, None, 2])}
    places = [f"{name}=completions[].annotations.{name}.Rating" for name in ASKED]
    check(row, reading(*places), pairs=3)  # so has no score, and stands before maybe
    found = read_row(row, reading("fine-grained_score")).pairs  # a name among the keys beside the response
    assert {pair.chosen[-1]["content"]: pair.attributes[0] for pair in found} == {"yes": (3.0,), "maybe": (2.0,)}
    row["completions"][1]["annotations"]["help"]["Rating"] = "N/A"
    best = read_row(row, reading(*places)).pairs[0]
    assert math.isnan(best.attributes[0][0]) and best.attributes[0][1] == 3 and best.attributes[1] == of("maybe")
    row["completions"] = json.dumps(row["completions"])  # of a csv file
    assert read_row(row, reading(*places)).pairs[0].attributes[1] == of("maybe")


def test_sides_of_several_answers_have_a_list_each():
    row = {"prompt": "Q: ", "chosen": ["yes", "so"], "rejected": ["no", "never", "maybe"]}
    lists = {"help_chosen": [4, 3], "help_rejected": [1, 0, 2.5], "chosen_long": [3, 2], "rejected_long": [2, 5, 5]}
    check(row | lists, reading(), pairs=6)
    together = {"h": [4, 3, 1, 0, 2.5], "long_chosen": [3, 2], "long_rejected": [2, 5, 5]}
    check(row | together, reading("help=h", "long"), pairs=6)
    check(
        PAIR | {"rejected": ["no", "so"], "h": [4, 1, 3], "l": 3, "m": [2, 2]}, reading("help=h", "long=l,m"), pairs=2
    )


@pytest.mark.parametrize("value", [None, "", " N/A ", "nan", math.nan, "None"])
def test_what_has_no_value_is_not_known(value):
    [pair] = read_row(PAIR | {"chosen_help": value, "rejected_help": 1}, reading()).pairs
    assert np.isnan(pair.attributes).tolist() == [[True, True], [False, True]]
    [pair] = read_row(
        LIST | {"responses": ["no", "yes"], "scores": [1, 2], "help": value, "long": [2, 3]}, reading()
    ).pairs
    assert np.isnan(pair.attributes).tolist() == [[True, False], [True, False]]
    [pair] = read_row({**PAIR, "rejected_help": True}, reading("help")).pairs  # a row may lack the key
    assert math.isnan(pair.attributes[0][0]) and pair.attributes[1] == (1.0,)


def test_without_attributes_there_are_none(load, write_rows):
    assert read_row(PAIR).pairs[0].attributes == ((), ())
    data = load([write_rows([PAIR, LIST]), "1.0"])
    assert data.attributes().shape == (6, 2, 0)
    assert not any("  attribute " in line for line in data.lines)


STEER = {"correctness": 1, "coherence": 2, "complexity": 3, "verbosity": 1}
FIVE = ("helpfulness", *STEER)


def test_answers_a_row_each_are_joined_with_theirs(load, write_rows):
    """HelpSteer2's columns, scattered: one lacks a rating, one has no text."""
    said = [("P", "yes", 4), ("R", "so", 3), ("P", "no", 1), ("R", "never", 0), ("P", "", 3), ("P", "maybe", 2)]
    rows = [{"prompt": p, "response": text, "helpfulness": score} | STEER for p, text, score in said]
    for row in rows:
        row["verbosity"] = len(row["response"])
    rows[2]["coherence"] = None
    path = write_rows(rows)
    for num_proc in (1, 2):
        data = load([path, "1.0"], attributes=list(FIVE), num_proc=num_proc)
        found = data.attributes()
        assert found.dtype == np.float32
        # helpfulness of the two sides -> their verbosity: yes over maybe, yes over no, ...
        expected = {(4, 2): (3, 5), (4, 1): (3, 2), (2, 1): (5, 2), (3, 0): (2, 5)}
        assert {tuple(pair[:, 0]): tuple(pair[:, 4]) for pair in found} == expected
        unknown = np.isnan(found)
        is_no = (found[:, :, 0] == 1) & (found[:, :, 4] == 2)
        assert unknown[:, :, 2].tolist() == is_no.tolist()
        assert not unknown[:, :, [0, 1, 3, 4]].any()
        lines = [line for line in data.lines if "  attribute " in line]
        assert lines[0].endswith("  attribute helpfulness: known of 8 of 8 sides of pairs (100%), 0 to 4")
        assert lines[2].endswith("  attribute coherence: known of 6 of 8 sides of pairs (75%), 2 to 2")
    with pytest.raises(
        UserError, match=r"rows.jsonl:4: the attribute verbosity holds 'long', which is not a finite number"
    ):
        load([write_rows([*rows[:3], rows[3] | {"verbosity": "long"}]), "1.0"], attributes=list(FIVE))
    skipping = load(
        [write_rows([*rows[:5], rows[5] | {"verbosity": "x"}]), "1.0"], attributes=["verbosity"], skip_bad_rows=1
    )
    assert len(skipping) == 2, "the other answers of its prompt are joined all the same"


def test_numbers_of_a_csv_file_are_text(tokenizer, tmp_path):
    rows = [LIST | {"help": [1, 4, 0, 2.5]}, LIST | {"help": [1, None, 0, 2.5]}]
    with (tmp_path / "lists.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    (tmp_path / "pairs.csv").write_text(
        "prompt,chosen,rejected,help_chosen,help_rejected\nQ: ,yes,no,4,\nQ: ,so,no,3,1\n"
    )
    found = {}
    for name in ("lists", "pairs"):
        mixer = [tmp_path / f"{name}.csv", "1.0"]
        cache = str(tmp_path / "cache")
        found[name] = read_pairs(mixer, tokenizer, attributes=["help"], dataset_local_cache_dir=cache).attributes()[
            ..., 0
        ]
    np.testing.assert_array_equal(found["pairs"], [[4, np.nan], [3, 1]])
    one = [[4, 2.5], [4, 1], [4, 0], [2.5, 1], [2.5, 0]]
    other = [[np.nan if number == 4 else number for number in pair] for pair in one]
    np.testing.assert_array_equal(found["lists"], one + other)


def test_copies_dropped_pairs_and_other_sources(load, write_rows):
    """A source that has none, a row that is taken twice, a pair that is too long."""
    helped = columns("{side}_{name}", ("chosen", "rejected"), ("yes", "no"))
    rows = [PAIR | helped, PAIR | {"prompt": "Q: " + "a b " * 200} | helped | {"chosen_help": 100}]
    first, second = write_rows(rows), write_rows([PAIR | {"chosen": "so"}], "plain.jsonl")
    data = load([first, "2.0", second, "1.0"], attributes=list(ASKED), max_token_length=50, max_prompt_token_length=50)
    expected = np.array([[of("yes"), of("no")]] * 2 + [[[np.nan] * 2] * 2])
    np.testing.assert_array_equal(data.attributes(), expected)
    [known, plain] = data.facts
    assert known["attributes"]["help"] == {
        "places": ["chosen_help", "rejected_help"],
        "columns": ["chosen_help", "rejected_help"],
        "answers": 4,
        "known": 4,
        "least": 1,
        "most": 4,
    }
    assert plain["attributes"]["help"]["known"] == 0 and plain["attributes"]["help"]["answers"] == 2
    assert any(
        line.endswith("attribute help (from chosen_help, rejected_help): known of 4 of 4 sides of pairs (100%), 1 to 4")
        for line in data.lines
    )
    assert any(line.endswith("attribute help: known of 0 of 2 sides of pairs") for line in data.lines)


def test_the_cache_is_that_of_the_attributes_and_held_out_data_has_none(load, write_rows, tmp_path, tokenizer):
    helped = columns("{side}_{name}", ("chosen", "rejected"), ("yes", "no"))
    path = write_rows([PAIR | helped])

    def caches() -> int:
        return len(list((tmp_path / "cache").glob("*/manifest.json")))

    mixer = [path, "1.0"]
    numbers = []
    for asked in ([], ["help"], ["help", "long"], ["long", "help"], ["help=chosen_long,rejected_help"], ["help"]):
        data = load(mixer, attributes=asked)
        numbers.append((caches(), data.attributes()[0].tolist()))
    assert [count for count, _ in numbers] == [1, 2, 3, 4, 5, 5]
    yes, no = list(of("yes")), list(of("no"))
    assert [found for _, found in numbers] == [
        [[], []],
        [yes[:1], no[:1]],
        [yes, no],
        [yes[::-1], no[::-1]],
        [yes[1:], no[:1]],
        [yes[:1], no[:1]],
    ]
    flags = DataFlags(
        dataset_mixer_list=[str(path), "1.0"],
        dataset_mixer_eval_list=[str(path), "1.0"],
        dataset_mixer_eval_list_splits=["train"],
        attributes=["help"],
        dataset_local_cache_dir=str(tmp_path / "cache"),
    )
    train, held_out = read_both(flags, tokenizer, seed=1)
    assert (train.attributes().shape, held_out.attributes().shape) == ((1, 2, 1), (1, 2, 0))
    assert caches() == 5, "what was read without attributes is what is held out"
    assert reading_of_source(flags, "eval", str(path)).attributes == ()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["=score"], "--attributes =score: write a name, or NAME=PLACE, or NAME=PLACE,PLACE for two sides"),
        (["help="], "--attributes help=: write a name"),
        (["help=a,"], "--attributes help=a,: write a name"),
        (["help=a,b,c"], "--attributes help=a,b,c: write a name"),
        (["help=a[x]"], r"--attributes help=a\[x\]: 'a\[x\]' names no place in a row"),
        (["help,long"], r"--attributes help,long: separate attributes by spaces \(help long\)"),
    ],
)
def test_what_cannot_be_read_as_a_flag_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        parse_attributes(given)


@pytest.mark.parametrize(
    ("row", "asked", "says"),
    [
        (
            PAIR | {"chosen_help": "good"},
            "help",
            "the attribute help in chosen_help holds 'good', which is not a finite number",
        ),
        (PAIR | {"h": 4}, "help=h", "the attribute help stands in h, which holds one value, and 2 answers need a list"),
        (
            PAIR | {"h": [1, 2, 3]},
            "help=h",
            r"which holds a list of 3, and 2 answers need .* \(--attributes help=PLACE",
        ),
        (LIST | {"help": [1, 2]}, "help", "the attribute help stands in help, which holds a list of 2, and 4 answers"),
        (LIST | {"help": [1, 2, 3, "x"]}, "help", "the attribute help holds 'x', which is not a finite number"),
        (LIST | {"help": [1, 2, 3, 1e40]}, "help", "which is not a finite number"),
        (LIST | {"help": "[1, 2"}, "help", "which holds one value"),
        (
            LIST | {"help": 1},
            "help=help,scores",
            "no two sides, so two places cannot be read; .* a list with a number for each",
        ),
        (LIST, "help=scores[].x", r"scores\[\].x: there is no key x in"),
        (
            LIST | {"notes": [{"help": 1}] * 4},
            "help=notes.help",
            r"notes.help: there is a list before .help; write \[\].help for all its elements, or \[0\].help",
        ),
        (
            LIST | {"notes": [{"Rating": 1, "Why": "x"}] * 4},
            "help=notes",
            r"the attribute help in notes is an object with Rating, Why, and has to be .* name the place of one, notes\[\].KEY \(",
        ),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused_by_name(row, asked, says):
    with pytest.raises(UserError, match=says):
        read_row(row, reading(asked))


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        (PAIR | {"chosen_help": 4, "rejected_help": 1}, "help"),
        (PAIR | {"h": 4, "r": 1}, "help=h,r"),
        (TWO | {"winner": "b", "response_a_help": 4, "response_b_help": 1}, "help"),
    ],
)
def test_a_column_that_is_ignored_is_absent_and_its_side_is_not_known(row, asked):
    first, second = [name for name in row if name not in (*PAIR, *TWO, "winner")]
    value_of = {row.get("response_a", "yes"): 4.0, row.get("response_b", "no"): 1.0}

    def of_sides(row, **how) -> tuple[tuple[float, float], tuple[str, ...]]:
        found = read_row(row, reading(asked, **how))
        [pair] = found.pairs
        numbers = {
            text: of_text for text, (of_text,) in zip((pair.chosen, pair.rejected), pair.attributes, strict=True)
        }
        return tuple(numbers[text] for text in value_of), found.oddities

    assert of_sides(row) == (tuple(value_of.values()), ())
    for half, oddity in (
        (of_sides(row, ignore=(second,)), f"one side: help ({first})"),
        (of_sides(row | {second: None}), f"one side: help ({first}, {second})"),
    ):
        (of_first, of_second), oddities = half
        assert of_first == 4 and math.isnan(of_second) and oddities == (oddity,)
    neither, oddities = of_sides(row, ignore=(first, second))
    assert np.isnan(neither).all() and not oddities


def test_a_whole_pair_of_columns_is_taken_before_a_half_one_and_one_column_is_never_both_sides():
    row = PAIR | {"chosen_help": 9, "help_chosen": 4, "help_rejected": 1}
    assert read_row(row, reading("help")).pairs[0].attributes == ((4.0,), (1.0,))
    two = {"prompt": "Q: ", "answers": ["yes", "no"], "winner": "a", "answers_help": 7, "a_help": 4, "b_help": 1}
    places = {"response_a": "answers[0]", "response_b": "answers[1]"}
    assert read_row(two, reading("help", column_map=places)).pairs[0].attributes == ((4.0,), (1.0,))


def test_a_place_that_no_row_has_is_refused_by_name(load, write_rows):
    rows = [PAIR | {"h": 4, "r": 1}, PAIR | {"prompt": "P: ", "h": 3}]
    assert len(load([write_rows(rows), "1.0"], attributes=["help=h,r"])) == 2, "some rows may lack one"
    joined = [{"prompt": "P", "response": text, "score": of(text)[0]} for text in HELP]
    joined[1]["h"] = 3  # not in the first row of the prompt, which stands for it
    assert np.nanmax(load([write_rows(joined, "rows_of_one.jsonl"), "1.0"], attributes=["help=h"]).attributes()) == 3
    with pytest.raises(UserError, match="no row of the training data has r; .* columns chosen, h, prompt, rejected$"):
        load([write_rows(rows), "1.0"], attributes=["help=h,r"], ignore_columns=["r"])
    for asked in ("help=h,typo", "help=typo,h"):
        with pytest.raises(UserError) as error:
            load([write_rows(rows), "1.0"], attributes=[asked])
        assert str(error.value).startswith(f"--attributes {asked}: no row of the training data has typo; correct it,")
        assert "rows.jsonl: the row has the columns chosen, h, prompt, r, rejected" in str(error.value)


def test_an_attribute_that_no_answer_has_is_refused_with_the_columns_that_there_are(load, write_rows):
    first, second = write_rows([PAIR | {"chosen_helpful": None}]), write_rows([LIST], "lists.jsonl")
    for _ in range(2):  # built, and found in the cache
        with pytest.raises(UserError) as error:
            load([first, "1.0", second, "1.0"], attributes=["helpful"])
        says = str(error.value)
        assert says.startswith(
            "--attributes helpful: it is known of no answer of the training data; name one that is, or write"
        )
        assert "rows.jsonl: the row has the columns chosen, chosen_helpful, prompt, rejected;" in says
        assert "lists.jsonl: the row has the columns prompt, responses, scores" in says


PUBLIC = {
    "ultrafeedback_raw": ["helpfulness=completions[].annotations.helpfulness.Rating", "overall_score"],
    "pku_saferlhf": ["severity_level", "safe=is_response_0_safe,is_response_1_safe"],
    "unified_feedback": ["rating"],
    "ultrafeedback_binarized_h4": ["score"],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_sets_give_them_as_the_documentation_says(name):
    lines = (Path(__file__).parent / "public_rows.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["set"] == name and case.get("pairs")]
    assert cases
    counts = Counts()
    for case in cases:
        for pair in read_row(case["row"], reading(*PUBLIC[name])).pairs:
            counts.add_attributes(PUBLIC[name], pair.attributes, 1)
    assert all(entry["known"] for entry in counts.attributes.values()), counts.attributes
