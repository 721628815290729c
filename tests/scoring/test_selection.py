"""The n best answers of a row, and pairs made of scored answers: what is written, what is counted, how lengths balance."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from conftest import shared_data

from open_rm.data.answers import TO_SCORE, read_answers
from open_rm.data.rows import read_row
from open_rm.scoring.selection import LEAD, BestCounts, BestOfN, PairCounts, Pairs
from open_rm.scoring.streams import ScoredRow

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


def scored(row: dict, scores: list[float | None], place: str = "rows.jsonl:1") -> ScoredRow:
    return ScoredRow(place, row, read_answers(row, TO_SCORE), scores, [score is None for score in scores])


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@functools.cache
def ranked_lists() -> list[ScoredRow]:
    """The ranked lists of alpaca_eval with the scores that its judge gave."""
    lines = (shared_data("alpaca_eval") / "ranked.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [scored(row, row["scores"], f"ranked.jsonl:{i}") for i, row in enumerate(rows, 1)]


def test_the_n_best_come_best_first_and_equal_scores_in_the_rows_order():
    row = {"id": 7, "prompt": QUESTION, "responses": ["a", "b", "c", "d"], "models": ["A", "B", "C", "D"]}
    best = BestOfN(3, TO_SCORE)
    assert best.take(scored(row, [1.0, 2.0, 1.0, 1.0])) == [
        {
            "id": 7,
            "prompt": QUESTION,
            "models": ["A", "B", "C", "D"],
            "responses": ["b", "a", "c"],
            "scores": [2.0, 1.0, 1.0],
            "response_indices": [1, 0, 2],
        }
    ]
    assert best.counts == BestCounts(rows=1, tied=1)
    assert read_answers(best.take(scored(row, [1.0, 2.0, 1.0, 1.0]))[0]).given == [2.0, 1.0, 1.0]
    assert "cut between equal scores" in " ".join(best.lines())


def test_the_best_answer_alone_is_a_row_with_one_response():
    row = {"prompt": "Say it.", "responses": ["a", "b"], "scores": [4, 5], "source": "x"}
    best = BestOfN(1, TO_SCORE)
    expected = {"prompt": "Say it.", "input_scores": [4, 5], "source": "x", "response": "a", "score": 0.5}
    assert best.take(scored(row, [0.5, 0.25])) == [expected | {"response_index": 0}]
    assert "now called input_<name>: scores" in " ".join(best.lines())


def test_an_answer_without_a_score_never_wins_and_is_counted():
    row = {"prompt": "Say it.", "responses": ["long", "b", "c"]}
    best = BestOfN(2, TO_SCORE)
    assert best.take(scored(row, [None, -9.0, None]))[0]["responses"] == ["b"]
    assert best.take(scored(row, [None, None, None])) == []
    assert best.counts == BestCounts(rows=2, short=1, none=1, unscored=5)


def test_a_pair_and_a_conversation_are_taken_apart_or_kept():
    pair = {"prompt": QUESTION, "chosen": answer("good"), "rejected": answer("bad"), "id": 3}
    assert BestOfN(1, TO_SCORE).take(scored(pair, [0.0, 1.0])) == [
        {"id": 3, "prompt": QUESTION, "response": answer("bad"), "score": 1.0, "response_index": 1}
    ]
    conversation = {"messages": QUESTION + answer("good"), "id": 3}
    assert BestOfN(4, TO_SCORE).take(scored(conversation, [1.0])) == [conversation | {"score": 1.0}]


def test_the_best_stands_against_the_worst_with_their_margin():
    row = {"prompt": QUESTION, "responses": ["a", "b", "c"], "id": 7}
    assert Pairs(TO_SCORE).take(scored(row, [0.5, 2.0, -1.0])) == [
        {
            "prompt": QUESTION,
            "chosen": answer("b"),
            "rejected": answer("c"),
            "margin": 3.0,
            "chosen_index": 1,
            "rejected_index": 2,
            "id": 7,
        }
    ]


def test_every_pair_of_the_least_margin_or_more_is_given_the_largest_first():
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"]}
    pairs = Pairs(TO_SCORE, min_margin=1.0)
    rows = pairs.take(scored(row, [0.0, 1.0, 3.0, 0.5]))
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in rows] == [
        ("c", "a", 3.0),
        ("c", "d", 2.5),
        ("c", "b", 2.0),
        ("b", "a", 1.0),
    ]
    assert pairs.counts.near == 2 and pairs.counts.pairs == 4


def test_equal_scores_and_identical_answers_give_no_pair_and_are_counted():
    row = {"prompt": "p", "responses": ["a", "b"]}
    for min_margin in (None, 0.0):
        pairs = Pairs(TO_SCORE, min_margin)
        assert pairs.take(scored(row, [1.0, 1.0])) == []
        assert pairs.take(scored({"prompt": "p", "responses": ["same", "same"]}, [1.0, 0.5])) == []
        assert pairs.take(scored(row, [None, 0.5])) == []
        assert pairs.counts == PairCounts(rows=3, none=3, ties=1, repeated=1, unscored=1)


def test_an_answer_that_is_sampled_twice_is_in_no_pair_twice():
    row = {"prompt": "p", "responses": ["a", "b", "a"]}
    assert len(Pairs(TO_SCORE, min_margin=0.0).take(scored(row, [1.0, 0.0, 1.0]))) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say it. ", "responses": ["a", "b"]},
        {"prompt": QUESTION, "responses": ["a", "b"]},
        {"prompt": "What?", "system": "Be short.", "responses": ["a", "b"]},
        {
            "prompt": QUESTION,
            "responses": ["a", "b"],
            "tools": [{"name": "f"}],
            "chat_template_kwargs": {"think": True},
        },
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        {"chosen": QUESTION + answer("a"), "rejected": QUESTION + answer("b")},
        {"prompt_input_ids": [5, 6], "chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6, 8]},
        # Columns that beside chosen and rejected name a form of public sets, whose prompt is another column.
        {
            "prompt": "p",
            "responses": ["a", "b"],
            "question": "q",
            "instruction": "i",
            "subset": "s",
            "id": 3,
            "note": "n",
        },
        {
            "instruction": "p",
            "completions": [{"response": "a", "fine-grained_score": 1}, {"response": "b", "fine-grained_score": 2}],
        },
        {"question": "p", "response_A": "a", "response_B": "b", "label": "A>B"},
    ],
    ids=lambda row: "+".join(row),
)
def test_pairs_are_read_by_training_as_the_same_prompt_and_answers(row):
    given = scored(row, [1.0, 0.0])
    [pair] = Pairs(TO_SCORE).take(given)
    [read] = read_row(json.loads(json.dumps(pair))).pairs
    answers = given.answers
    whole = answers.complete if answers.kind == "token ids" else answers.answers.__getitem__
    assert (read.prompt, read.chosen, read.rejected) == (answers.prompt, whole(0), whole(1))
    assert (read.margin, read.template) == (1.0, answers.template)


def test_columns_that_would_change_the_form_are_renamed_and_named():
    row = {"prompt": "p", "responses": ["a", "b"], "question": "q", "winner": "a", "note": "n", "input_question": "r"}
    pairs = Pairs(TO_SCORE)
    [pair] = pairs.take(scored(row, [1.0, 0.0]))
    assert (pair["note"], pair["input_input_question"], pair["input_winner"]) == ("n", "q", "a")
    assert pair["input_question"] == "r", "a column that is there already keeps its name"
    assert not {"question", "winner"} & pair.keys()
    [pair] = Pairs(TO_SCORE).take(scored({"prompt": "p", "responses": ["a", "b"], "winner": "a"}, [1.0, 0.0]))
    assert "winner" not in pair and pair["input_winner"] == "a"
    assert pairs.counts.renamed == ["question", "winner"] and "input_<name>: question, winner" in pairs.lines()[-1]


def test_lengths_balance_on_real_answers():
    rows = ranked_lists()
    plain, balanced = Pairs(TO_SCORE), Pairs(TO_SCORE, length_balanced=True)
    every, every_balanced = Pairs(TO_SCORE, 1.0), Pairs(TO_SCORE, 1.0, length_balanced=True)
    for row in rows:
        before = dataclasses.replace(balanced.counts)
        balanced.take(row)
        counts = balanced.counts
        assert abs(counts.longer - counts.shorter) <= 1 + LEAD * counts.pairs, "at every point of the file"
        assert counts.pairs - before.pairs <= 1
        for pairs in (plain, every, every_balanced):
            pairs.take(row)
    share = {name: pairs.counts.longer / pairs.counts.pairs for name, pairs in (("one", plain), ("every", every))}
    assert share["one"] > 0.6 and share["every"] > 0.6, "these answers are not balanced by themselves"
    for pairs in (balanced, every_balanced):
        assert pairs.counts.longer / pairs.counts.pairs == pytest.approx(0.5, abs=LEAD / 2 + 1 / pairs.counts.pairs)
    assert balanced.counts.pairs > 0.8 * plain.counts.pairs, "rows of several answers give another pair instead"


def test_lengths_that_are_balanced_already_lose_few_pairs():
    rng = np.random.default_rng(0)
    pairs = Pairs(TO_SCORE, length_balanced=True)
    for longer in rng.random(3000) < 0.5:
        row = {"prompt": "p", "responses": ["longer" if longer else "x", "abc"]}
        pairs.take(scored(row, [1.0, 0.0]))
    assert pairs.counts.pairs > 2850


def test_balance_takes_the_largest_margin_that_it_may():
    row = scored({"prompt": "p", "responses": ["a" * 900, "b" * 200, "c" * 400]}, [2.0, 0.5, -1.0])
    pairs = Pairs(TO_SCORE, length_balanced=True)
    for expected in ((0, 2, 3.0), (1, 2, 1.5)):  # "longer" may lead by one, and then not further
        [pair] = pairs.take(row)
        assert (pair["chosen_index"], pair["rejected_index"], pair["margin"]) == expected
    assert (pairs.counts.longer, pairs.counts.shorter, pairs.counts.second) == (1, 1, 1)


def test_trls_form_has_its_names_of_token_ids_and_no_margin():
    ids = {"prompt_input_ids": [5, 6], "chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6, 8]}
    text = {"chosen": "one", "rejected": "two"}
    tools = {"prompt": QUESTION, "responses": ["a", "b"], "tools": [{"name": "f"}]}
    places = {"score_chosen": 1.5, "score_rejected": 1.0, "chosen_index": 0, "rejected_index": 1}
    expected = [
        {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8]},
        {"prompt": "", "chosen": "one", "rejected": "two"},
        {"prompt": QUESTION, "chosen": answer("a"), "rejected": answer("b"), "tools": '[{"name": "f"}]'},
    ]
    for row, pair in zip((ids, text, tools), expected, strict=True):
        assert Pairs(TO_SCORE, form="trl").take(scored(row, [1.5, 1.0])) == [pair | places]


@pytest.mark.parametrize("length_balanced", [False, True])
def test_what_goes_on_from_written_numbers_writes_the_same(length_balanced):
    rows = ranked_lists()[:120]
    whole = Pairs(TO_SCORE, 0.5, length_balanced)
    expected = [pair for row in rows for pair in whole.take(row)]
    first = Pairs(TO_SCORE, 0.5, length_balanced)
    found = [pair for row in rows[:50] for pair in first.take(row)]
    written = json.loads(json.dumps(dataclasses.asdict(first.counts)))
    second = Pairs(TO_SCORE, 0.5, length_balanced, counts=PairCounts(**written))
    found += [pair for row in rows[50:] for pair in second.take(row)]
    assert found == expected and second.lines() == whole.lines()
