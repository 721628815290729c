"""A row that is scored has the answers, and their token ids, that training makes of it; what training refuses for want of a
winner is scored all the same."""

import json
from pathlib import Path

import pytest
from conftest import read_pairs, shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_standin import StandIn

from open_rm.data.answers import TO_SCORE, read_answers
from open_rm.data.reading import Reading
from open_rm.data.rows import read_row
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.scoring.blocks import Encoder

PUBLIC = [json.loads(line) for line in (Path(__file__).parent / "public_rows.jsonl").open(encoding="utf-8")]
USER, ANSWER = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}
OTHER = {"role": "assistant", "content": "A river? No."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "now", "description": "the time"}}]


@pytest.fixture(scope="module")
def chatml(toy):
    return load_tokenizer(str(toy / "model"), chat_template_name="chatml")


def scored_ids(rows: list, tokenizer, *, chat: bool, limit: int = 100_000, overlength: str = "null", **reading):
    """Token ids of each row's answers, as they are scored."""
    encoder = Encoder(
        StandIn(tokenizer, chat=chat, max_token_length=limit), Reading(to_score=True, **reading), overlength
    )
    found, faults = encoder.rows([(f"row {i}", row) for i, row in enumerate(rows)])
    assert not faults
    return [one.ids for one in found.values()]


def trained_ids(path, tokenizer, cache, **flags):
    """Token ids of each pair as training reads the file, with the row's place."""
    limits = {"max_token_length": 100_000, "max_prompt_token_length": 100_000}
    data = read_pairs([path, "1.0"], tokenizer, dataset_local_cache_dir=str(cache), **limits | flags)
    sides = [[side.tolist() for side in pair] for pair in data.pairs(range(len(data)))]
    return list(zip(data.places(range(len(data))), sides, strict=True))


def head(path: Path, rows: int, tmp_path: Path) -> Path:
    """The first rows of a file."""
    part = tmp_path / path.name
    part.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    return part


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


REAL = {
    "hh text": ("hh_harmless", "test", False, {}, {}),
    "hh text as messages": ("hh_harmless", "test", True, {"parse_hh": True}, {"parse_hh": ["True"]}),
    "alpaca_eval": ("alpaca_eval", "test", True, {}, {}),
    "llmbar": ("rewardbench_llmbar", "test", True, {}, {}),
}


@pytest.mark.parametrize("name", REAL)
def test_both_sides_of_real_pairs_have_the_ids_of_training(toy, chatml, tmp_path, name):
    folder, split, chat, reading, flags = REAL[name]
    path = head(shared_data(folder) / f"{split}.jsonl", 80, tmp_path)
    trained = [sides for _, sides in trained_ids(path, chatml, tmp_path, skip_bad_rows=100, **flags)]
    assert [ids for ids in scored_ids(rows_of(path), chatml, chat=chat, **reading) if ids[0] != ids[1]] == trained


def test_both_sides_of_the_toys_pairs_have_the_ids_of_training(toy, tokenizer, tmp_path):
    path = toy / "data" / "train.jsonl"
    assert scored_ids(rows_of(path), tokenizer, chat=True) == [ids for _, ids in trained_ids(path, tokenizer, tmp_path)]


def test_answers_of_ranked_lists_have_the_ids_that_their_pairs_have_in_training(toy, chatml, tmp_path):
    path = head(shared_data("alpaca_eval") / "ranked.jsonl", 40, tmp_path)
    trained: dict[str, set] = {}
    for place, sides in trained_ids(path, chatml, tmp_path):
        trained.setdefault(place, set()).update(map(tuple, sides))
    for row, ids in zip(rows_of(path), scored_ids(rows_of(path), chatml, chat=True), strict=True):
        found = trained.pop(f"{path}:{rows_of(path).index(row) + 1}", set())  # none: all of them are ties
        assert found == set(map(tuple, ids)) or (len(set(row["scores"])) < 4 and found < set(map(tuple, ids)))
    assert not trained


FORMS = {
    "text": {"prompt": "Name a river. ", "chosen": "The Rhine.", "rejected": "No."},
    "text that repeats its prompt": {"prompt": "A river:", "chosen": "A river: Rhine", "rejected": "A river: no"},
    "text, prompt implied": {"chosen": "Name a river. The Rhine.", "rejected": "Name a river. No."},
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    "messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "messages, prompt implied": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "system and history": {
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "prompt": "Name a river.",
        "chosen": [ANSWER],
        "rejected": [OTHER],
    },
    "rejected_messages": {"messages": [SYSTEM, USER, ANSWER], "rejected_messages": [SYSTEM, USER, OTHER]},
    "rejected_response": {"messages": [USER, ANSWER], "rejected_response": "No."},
    "chosen_response": {"messages": [USER], "chosen_response": "The Rhine.", "rejected_response": "No."},
    "token ids": {"prompt_input_ids": [5, 6], "chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6, 8, 9]},
    "template's variables": {
        "prompt": [USER],
        "chosen": [ANSWER],
        "rejected": [OTHER],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "labelled a": {"prompt": "Q. ", "response_a": "one", "response_b": "two", "winner": "a"},
    "labelled b": {"prompt": [USER], "response_a": [ANSWER], "response_b": [OTHER], "winner": "b"},
    "strength": {"prompt": "Q. ", "response_a": "one", "response_b": "two", "strength": -1},
    "two scores": {"prompt": "Q. ", "response_a": "one", "response_b": "two", "score_a": 1, "score_b": 2},
    "ranked": {"prompt": "Q. ", "responses": ["one", "two", "three"], "scores": [2, 3, 1]},
    "ranked messages": {"prompt": [USER], "responses": ["one", "two", "three"]},
    "lists of sides": {"prompt": [USER], "chosen": ["one", "two"], "rejected": ["three", "four", "five"]},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_rows_has_the_ids_of_training(chatml, write_rows, tmp_path, name):
    row = FORMS[name]
    path = write_rows([row])
    pairs = [sides for _, sides in trained_ids(path, chatml, tmp_path)]
    kind = read_answers(row).kind
    [ids] = scored_ids([row], chatml, chat=kind == "messages")
    assert sorted(ids) == sorted(map(list, {tuple(side) for sides in pairs for side in sides}))
    if len(pairs) == 1:  # in the row's order: chosen, rejected; a, b
        given = read_answers(row).given
        assert ids == (pairs[0] if given[0] > given[1] else pairs[0][::-1])
    first = next(
        iter(row[key] for key in ("responses", "response_a", "chosen", "chosen_input_ids") if key in row), None
    )
    if isinstance(first, str) and kind == "text":
        assert chatml.decode(ids[0], skip_special_tokens=True).endswith(first)


@pytest.mark.parametrize("case", [case for case in PUBLIC if case.get("pairs")], ids=lambda case: case["set"])
def test_answers_of_public_sets_are_those_of_their_pairs(case):
    before = json.dumps(case["row"])
    reading = Reading(as_messages=case.get("as_messages"), to_score=True)
    answers = read_answers(case["row"], reading)
    complete = [answers.complete(i) for i, answer in enumerate(answers.answers) if answer is not None]
    ids = case["pairs"] and answers.kind == "token ids"
    for pair in case["pairs"]:
        for side in (pair["chosen"], pair["rejected"]):
            assert (side if ids else pair["prompt"] + side) in complete
    assert json.dumps(case["row"]) == before


WORDS = st.sampled_from(["Q:", "Q", "Q: a", "a", "b", "Q: b ", "Q c", "a b"])


@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, responses=st.lists(WORDS, min_size=2, max_size=5, unique=True), chat=st.booleans())
def test_an_answer_that_may_repeat_its_prompt_is_written_as_in_one_of_its_pairs(prompt, responses, chat):
    """Whether words of the prompt at an answer's start are taken off depends on the other one of a pair."""
    row = {"prompt": prompt, "responses": responses}
    pairs = read_row(row, Reading(as_messages=chat)).pairs
    trained = [side for pair in pairs for side in (pair.prompt + pair.chosen, pair.prompt + pair.rejected)]
    answers = read_answers(row, Reading(as_messages=chat, to_score=True))
    assert len(answers.answers) == len(responses)
    assert all(answers.complete(i) in trained for i in range(len(responses)))


NO_WINNER = {
    "two equal sides": {"prompt": "Q. ", "chosen": "one", "rejected": "one"},
    "a tie": {"prompt": "Q. ", "response_a": "one", "response_b": "two", "winner": "tie"},
    "a label that nobody knows": {"prompt": "Q. ", "response_a": "one", "response_b": "two", "winner": "left"},
    "a label that is empty": {"prompt": "Q. ", "response_a": "one", "response_b": "two", "winner": None},
    "no label": {"prompt": "Q. ", "response_a": "one", "response_b": "two"},
    "one response": {"prompt": "Q. ", "responses": ["one"]},
    "equal scores": {"prompt": "Q. ", "responses": ["one", "two"], "scores": [1, 1]},
    "empty scores": {"prompt": "Q. ", "responses": ["one", "two"], "scores": None},
    "fewer scores than answers": {"prompt": "Q. ", "responses": ["one", "two"], "scores": [1]},
    "a margin below 0": {"prompt": "Q. ", "chosen": "one", "rejected": "two", "margin": -1},
    "webgpt without scores": {
        "question": {"full_text": "Q. "},
        "answer_0": "one",
        "answer_1": "two",
        "score_0": None,
        "score_1": None,
    },
}


@pytest.mark.parametrize("name", NO_WINNER)
def test_a_row_that_says_no_winner_is_scored_all_the_same(name):
    answers = read_answers(NO_WINNER[name], Reading(as_messages=False, to_score=True))
    assert answers.several and [answers.complete(i)[:3] for i in range(len(answers.answers))] == ["Q. "] * len(
        answers.answers
    )
    with pytest.raises(UserError):
        assert not read_row(NO_WINNER[name]).pairs
        raise UserError("a tie")


def test_rows_of_one_answer_need_no_score_and_keep_their_words():
    assert read_answers({"prompt": "Q. ", "response": "one"}).complete(0) == "Q. one"
    assert not read_answers({"prompt": "Q. ", "response": "one"}).several
    assert read_answers({"response": "one"}).complete(0) == "one"
    scored = read_answers({"prompt": [USER], "response": "Yes.", "score": "4"})
    assert scored.complete(0) == [USER, {"role": "assistant", "content": "Yes."}] and scored.given == [4.0]
    alone = read_answers({"prompt": "Is it so?", "response": "Is it so? Yes."})  # it may well say it again
    assert alone.complete(0) == "Is it so?Is it so? Yes." and alone.oddities == ("begins with it",)


def test_a_conversation_alone_is_one_answer():
    answers = read_answers({"messages": [SYSTEM, USER, ANSWER], "tools": TOOLS})
    assert (answers.complete(0), answers.several, answers.template) == ([SYSTEM, USER, ANSWER], False, {"tools": TOOLS})
    with pytest.raises(UserError, match="^messages must end with an assistant message"):
        read_answers({"messages": [SYSTEM, USER]})


def test_columns_of_other_names_are_mapped_as_in_training():
    mapped = Reading(column_map={"prompt": "q", "response": "completions[0].text"}, to_score=True)
    assert read_answers({"q": "Q. ", "completions": [{"text": "one"}]}, mapped).complete(0) == "Q. one"
    mapped = Reading(column_map={"prompt": "q", "responses": "completions[].text"}, to_score=True)
    found = read_answers({"q": "Q. ", "completions": [{"text": "one"}, {"text": "two"}]}, mapped)
    assert found.answers == ["one", "two"]


def test_an_empty_answer_of_a_list_has_no_score_and_keeps_its_place():
    answers = read_answers({"prompt": "Q. ", "responses": ["one", " ", "two", None], "scores": [1, 2, 3, 4]})
    assert answers.answers == ["one", None, "two", None]


def test_what_a_row_says_of_its_answers_is_higher_where_it_is_better():
    given = [read_answers(row).given for row in FORMS.values()]
    assert given[:12] == [[1.0, 0.0]] * 12 and given[12:15] == [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    assert given[15:] == [[1.0, 2.0], [2.0, 3.0, 1.0], None, [1.0, 1.0, 0.0, 0.0, 0.0]]
    nectar = {"prompt": "\n\nHuman: Q\n\nAssistant:", "good_natured": True}
    nectar["answers"] = [{"answer": "one", "rank": 1.0}, {"answer": "two", "rank": 2.0}]
    assert read_answers(nectar).given == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "one"}, "no value for chosen and rejected; the row has the columns text"),
        ([1], "a row is an object"),
        ({"prompt": "Q", "responses": []}, "responses must be a list of responses, not an empty list"),
        ({"prompt": "Q", "responses": "one"}, "responses must be a list of responses, not str"),
        ({"prompt": "Q", "response": " "}, "response is empty"),
        ({"question": "Q", "response": "one"}, "the row has no prompt, and its column question looks like one"),
        ({"prompt": "Q", "responses": ["one", [USER, ANSWER]]}, ""),
        ({"prompt": [USER], "response": "a", "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs sets"),
    ],
)
def test_a_bad_row_is_refused_in_words(row, said):
    with pytest.raises(UserError) as caught:
        read_answers(row)
    assert str(caught.value).startswith(said)


def test_training_refuses_rows_of_one_answer_as_before():
    for row in ({"prompt": "Q. ", "response": "one"}, {"messages": [USER, ANSWER]}):
        with pytest.raises(UserError, match="^no value for"):
            read_row(row)
    assert TO_SCORE.identity() == Reading().identity()  # what names training's caches is as it was


def test_pairs_that_are_too_long_are_cut_as_training_cuts_them(chatml, write_rows, tmp_path):
    long = [{**FORMS["text"], "prompt": "Name a river. " * 9}, {**FORMS["messages"], "chosen": "Rhine, " * 30}]
    for row, chat in zip(long, (False, True), strict=True):
        path = write_rows([row])
        limits = {"max_token_length": 24, "max_prompt_token_length": 24, "overlength": "truncate"}
        [(_, trained)] = trained_ids(path, chatml, tmp_path, **limits)
        assert scored_ids([row], chatml, chat=chat, limit=24, overlength="truncate") == [trained]
