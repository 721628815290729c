"""Rows and flags that once trained on something else without a word: each is right, refused or told."""

from decimal import Decimal

import pytest

from open_rm.data.counts import Counts
from open_rm.data.reading import Reading, reading_of_source
from open_rm.data.rows import read_row
from open_rm.errors import UserError
from open_rm.flags import DataFlags

HH = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
PKU = {"prompt": "q", "response_0": "good", "response_1": "bad", "better_response_id": 0, "safer_response_id": 1}
ULTRA = {"instruction": "q", "completions": [{"response": t, "fine-grained_score": s} for t, s in (("a", 5), ("b", 1))]}
BEST_OF = {"prompt": "q", "response_1": "r1", "response_2": "r2", "parsed_outputs": []}
ARENA_TURNS = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
ARENA = {
    f"conversation_{side}": [*ARENA_TURNS[:1], {"role": "assistant", "content": side}, ARENA_TURNS[2], ARENA_TURNS[1]]
    for side in "ab"
}


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def orders(row: dict, reading: Reading | None = None, **how) -> list[tuple]:
    """(chosen, rejected) of every pair, messages by their last content."""
    found = read_row(row, reading or Reading(**how)).pairs
    return [
        tuple(side if isinstance(side, str) else side[-1]["content"] for side in (p.chosen, p.rejected)) for p in found
    ]


def reading(name: str = "a", **flags) -> Reading:
    return reading_of_source(
        DataFlags(dataset_mixer_list=["a", "1.0", "b", "1.0"], **flags), "train", name, "ab".index(name)
    )


LISTS = {"prompt": "q", "responses": ["bad", "good"]}
NESTED = {"prompt": "q", "answers": ["bad", "good"], "meta": {"rating": [1, 5]}}
STARS = {"prompt": "q", "r_1": "a", "r_2": "b", "s_1": 1, "s_3": 2}
TWO = {"prompt": "q", "x": "best", "y": "worst", "rank_a": 1, "rank_b": 2}
TWO_MAP = {"response_a": "x", "response_b": "y", "score_a": "rank_a", "score_b": "rank_b"}
REFUSED = {
    "scores null": (LISTS | {"scores": None}, {}, "no value for scores.*--ignore_columns scores"),
    "scores at a key that is not there": (
        NESTED, {"column_map": {"responses": "answers", "scores": "meta.ratings"}}, "no value for meta.ratings"
    ),
    "fewer scores than answers": (BEST_OF | {"response_3": "r3", "scores": [0, 1]}, {}, "3 responses and 2 scores"),
    "other numbers": (STARS, {"column_map": {"responses": "r_*", "scores": "s_*"}}, "not have the same numbers"),
    "ranks as two scores": (TWO, {"column_map": TWO_MAP}, "rank_a is read as a score.*--lower_is_better"),
    "ranks as a list": (LISTS | {"rank": [2, 2]}, {"column_map": {"scores": "rank"}}, "rank is read as a score"),
    "mapped for nothing": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "ratings": 1}, {"column_map": {"scores": "ratings"}}, "no use for scores"
    ),
    "an open brace": (
        {"question": "q", "context": "c", "chosen": "a", "rejected": "b"},
        {"column_map": {"prompt": "{question} {context"}}, "names no place in a row",
    ),
    "a prompt at a key that is not there": (
        {"q": {"full_text": "2+2?"}, "chosen": "4", "rejected": "5"}, {"column_map": {"prompt": "q.text"}}, "no value for q.text"
    ),
    "an OpenAI row without its messages": (
        {"input": {}, "preferred_output": [turn("assistant", "a")], "non_preferred_output": [turn("assistant", "b")]}, {},
        "no value for input.messages",
    ),
    "instructions beside text answers": (
        {"instruction": "2+2?", "responses": ["4", "5"], "chosen": "4", "rejected": "5"}, {}, "its column instruction looks like"
    ),
    "history in text": (
        {"history": [["hi", "hello"]], "prompt": "q ", "chosen": "a", "rejected": "b"}, {"as_messages": False}, "has a history"
    ),
    "half a turn in history": (
        {"history": [["hi"], ["q", "a"]], "prompt": "q ", "chosen": "a", "rejected": "b"}, {}, r"a list of \[question, answer\]"
    ),
    "two system texts": (
        {"system": "s", "history": [turn("system", "t"), turn("user", "u")], "prompt": "q", "chosen": "a", "rejected": "b"}, {},
        "another one in the history",
    ),
    "another prompt than the messages": (
        {"prompt": "other", "messages": [turn("user", "q"), turn("assistant", "a")], "rejected_response": "b"}, {},
        "prompt and messages say different things",
    ),
    "an old call": (
        {"chosen": [turn("user", "q"), turn("assistant", "a", function_call={"name": "f"})], "rejected": [turn("user", "q")]}, {},
        "with function_call.*tool_calls",
    ),
    "images of a message": (
        {"chosen": [turn("user", "q", images=["a.png"]), turn("assistant", "a")], "rejected": [turn("user", "q")]}, {},
        "with images, which",
    ),
    "HH prompt in one side": (
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": " bad"},
        {"parse_hh": True}, "chosen begins with the prompt and rejected does not",
    ),
    "steps without an answer": (
        {"prompt": "q", "initial_reason_steps": "Step 1.", "chosen": "", "rejected": "x"}, {}, "chosen is empty"
    ),
    "messages as Python prints them": (
        {"prompt": "q", "chosen": "[{'name': 'x', 'role': 'user', 'content': 'y'}]", "rejected": "b"}, {}, "as Python prints it"
    ),
    "an array of messages": (
        {"prompt": "q", "chosen": "array([{'content': 'y', 'role': 'user'}])", "rejected": "b"}, {}, "as Python prints it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_known_is_refused(what):
    row, how, says = REFUSED[what]
    with pytest.raises(UserError, match=says):
        read_row(row, Reading(**how))


def test_the_way_on_of_those_refusals_leads_to_the_right_pair():
    assert orders(LISTS | {"scores": None}, ignore=("scores",)) == [("bad", "good")]
    assert orders(TWO, column_map=TWO_MAP, lower_is_better=True) == [("best", "worst")]
    assert orders(TWO, column_map=TWO_MAP, lower_is_better=False) == [("worst", "best")]
    row = {"messages": [turn("assistant", "4")], "rejected_response": "5", "prompt": "2+2?"}
    [pair] = read_row(row).pairs
    assert pair.prompt == [turn("user", "2+2?")]
    row = {"messages": [turn("assistant", "4")], "rejected_messages": [turn("assistant", "5")], "prompt": "2+2?"}
    assert read_row(row).pairs == [pair]


def test_a_flag_for_all_sources_does_not_turn_a_known_set_round():
    for flags, row in (({"label_values": ["a=1", "b=0"]}, PKU), ({"lower_is_better": ["True"]}, ULTRA)):
        with pytest.raises(UserError, match="written? for the sources|write it for the sources"):
            read_row(row, reading(**flags))
        scoped = {flag: [f"a::{value}" for value in values] for flag, values in flags.items()}
        [(chosen, _)] = orders(row, reading("a", **scoped))
        [(usual, _)] = orders(row, reading("b", **scoped))
        assert (chosen, usual) in (("bad", "good"), ("b", "a"))
    assert orders(PKU, reading(label_values=["a=0", "b=1"])) == [("good", "bad")], "the same is no contradiction"


def test_what_is_written_for_one_source_adds_to_what_is_for_all():
    both = {"column_map": ["winner=safer_response_id", "b::prompt=prompt"], "ignore_columns": ["x", "b::y"]}
    assert orders(PKU, reading("b", **both)) == [("bad", "good")]
    assert set(reading("b", **both).ignore) == {"x", "y"}
    assert reading("a", **both).ignore == ("x",)


def test_forms_for_the_held_out_sources_are_counted_by_those():
    flags = DataFlags(
        dataset_mixer_list=["a", "1.0", "b", "1.0"],
        dataset_mixer_eval_list=["c", "1.0"],
        dataset_format=["eval::orca"],
    )
    assert reading_of_source(flags, "eval", "c", 0).form.name == "orca"
    for values in (["eval::orca", "eval::pairs"], ["c::orca", "c::pairs"]):
        wrong = DataFlags(**{**vars(flags), "dataset_format": values})
        with pytest.raises(UserError, match="has 2 values for 1 sources"):
            reading_of_source(wrong, "eval", "c", 0)


@pytest.mark.parametrize("judged", [1, 1.0, "1"])
def test_a_vote_on_the_first_turn_is_about_that_turn_however_it_is_written(judged):
    assert orders(ARENA | {"winner": "model_a", "turn": judged}) == [("a", "b")]


def test_hh_text_keeps_its_system_text_and_history():
    for how in ({}, {"parse_hh": True}):
        [pair] = read_row(HH | {"system": "Be terse."}, Reading(**how)).pairs
        assert pair.prompt == [turn("system", "Be terse."), turn("user", "q")]
    [pair] = read_row(HH | {"history": [["hi", "hello"]]}).pairs
    assert pair.prompt == [turn("user", "hi"), turn("assistant", "hello"), turn("user", "q")]


def test_messages_as_json_are_read_wherever_an_answer_stands():
    row = {"prompt": "q", "responses": ['[{"role": "assistant", "content": "good"}]', "bad"], "scores": [2, 1.5]}
    assert orders(row) == [("good", "bad")]
    benchmark = {"prompt": "q", "chosen": '["good"]', "rejected": "bad", "subset": "s", "id": "1"}
    assert "JSON" in read_row(benchmark).oddities


def test_what_is_odd_is_told():
    ends = {"prompt": [turn("user", "q"), turn("assistant", "old")], "chosen": "x", "rejected": "y"}
    assert read_row(ends).oddities == ("prefill",)
    assert read_row(LISTS).oddities == ("in order",)
    assert read_row({"chosen": "x", "rejected": "y", "model_input": "What is 2 + 2?"}).oddities == (
        "no prompt: model_input",
    )
    typo = read_row(
        {"meta": {"s": "be terse"}, "prompt": "q", "chosen": "x", "rejected": "y"}, Reading({"system": "meta.typo"})
    )
    assert typo.oddities == ("nothing there: meta.typo",)
    with pytest.raises(UserError, match="its column problem looks like one"):
        read_row({"chosen": "x", "rejected": "y", "problem": "What is 2 + 2?"})


def test_sparse_unread_columns_are_told_by_the_first_value_they_hold():
    counts = Counts()
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y", "image": None if i < 90 else "a.png"} for i in range(100)]
    counts.add_rows([(f"a:{i + 1}", row, read_row(row), 1) for i, row in enumerate(rows)])
    assert counts.unread == {"image": {"says": "image", "first": "a:91"}}
    odd = {"prompt": "q", "score\ud800\n": 5, "chosen": "x", "rejected": "y"}
    counts.add_rows([("b:1", odd, read_row(odd), 1)])
    assert all(name.isascii() and name.isprintable() for name in counts.unread)


def test_equal_scores_are_ties_where_they_are_the_margin_and_leave_no_other_trace():
    pair = {"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": 3, "score_rejected": 3}
    tie = read_row(pair, Reading(margin_from=("score_chosen", "score_rejected")))
    assert (tie.pairs, tie.ties, tie.oddities, tie.form) == ([], 1, (), "")
    labelled = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "a", "s": 3, "t": 3}
    assert read_row(labelled, Reading(margin_from=("s", "t"))).ties == 1


def test_what_table_files_hold_for_the_same_thing():
    alpaca = {"instruction": "q", "input": None, "chosen": "x", "rejected": "y"}
    assert orders(alpaca) == [("x", "y")]
    assert orders(LISTS | {"scores": [Decimal("1.5"), Decimal("2.5")]}) == [("good", "bad")]
    assert orders(LISTS | {"scores": ["False", "True"]}) == [("good", "bad")]
    assert orders(BEST_OF | {"response_²": "note", "scores": [0, 1]}) == [("r2", "r1")]
