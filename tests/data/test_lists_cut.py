"""Ranked lists that are not whole: answers too long, all alike, said twice, alone; and what a loss of lists makes of the rest.

The loss is written down here in plain numbers, from the texts and the scores of the row, and compared with the recipe's.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from open_rm.batching import targets
from open_rm.data.rows import Reading, read_row
from open_rm.errors import UserError
from open_rm.flags import ObjectiveFlags
from open_rm.inspection.report import inspect_data
from open_rm.training.losses import loss_terms

KINDS = ("plackett_luce", "best_of_k")
LONG = "word " * 60
LIMITS = {"max_token_length": 40, "max_prompt_token_length": 30}


def ranked(*answers, prompt="Q: "):
    """A row of (answer, score)."""
    return {"prompt": prompt, "responses": [text for text, _ in answers], "scores": [score for _, score in answers]}


def cached(data, *names) -> list[tuple]:
    rows = data.dataset.with_format(None)[:]
    return list(zip(*(rows[name] for name in names), strict=True))


def texts_of(data, tokenizer) -> list[tuple[str, str]]:
    """Both answers of each pair, without the prompt "Q: " and the end."""
    pairs = cached(data, "chosen_input_ids", "rejected_input_ids")
    return [
        tuple(tokenizer.decode(ids, skip_special_tokens=True).removeprefix("Q: ") for ids in pair) for pair in pairs
    ]


def reward(text: str) -> float:
    """Any, but the same for the same text."""
    return sum(map(ord, text)) % 17 / 5 - 1.5


def recipes_loss(data, tokenizer, kind: str) -> float:
    """What the recipe makes of all pairs as one step."""
    flags, everything = ObjectiveFlags(list_loss=kind), np.arange(len(data))
    targets.check(data, flags, len(data))
    chosen, rejected = (
        torch.tensor([reward(text) for text in side]) for side in zip(*texts_of(data, tokenizer), strict=True)
    )
    terms = loss_terms(chosen, rejected, targets.columns_of(data, flags).of_step(everything)(everything), flags)
    return (sum(terms.values()).sum() / len(data)).item()


def by_hand(answers, kind: str) -> float:
    """-log of the probability of a ranking, or of its best; tied answers are not compared. answers: (text, score)."""
    best = max(score for _, score in answers)
    found = []
    for text, score in answers:
        worse = [other for other, lower in answers if lower < score]
        if kind == "plackett_luce" or score == best:
            total = math.exp(reward(text)) + sum(math.exp(reward(other)) for other in worse)
            found.append(math.log(total) - reward(text))
    return sum(found) if kind == "plackett_luce" else sum(found) / len(found)


WHOLE = [("five", 9), ("four", 7), ("three", 7), ("two", 5), ("one", 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [(), (0,), (1,), (1, 2), (4,), (0, 4), (1, 2, 3), (0, 1, 3)])
def test_a_list_without_its_long_answers_is_the_list_of_the_others(load, write_rows, tokenizer, missing, kind):
    """The best, the worst, one of two tied ones; what is left is one list in the order that it had."""
    answers = [(text + LONG if i in missing else text, score) for i, (text, score) in enumerate(WHOLE)]
    left = [answer for i, answer in enumerate(answers) if i not in missing]
    data = load([write_rows([ranked(*answers)]), "1.0"], **LIMITS)
    pairs = [(a, b) for a, x in left for b, y in left if x > y]
    assert sorted(texts_of(data, tokenizer)) == sorted(pairs)
    assert len(set(cached(data, "list_id"))) == 1 and set(cached(data, "label_prob")) == {(1.0,)}
    levels = {text: {9: 0, 7: 1, 5: 2, 2: 3}[score] for text, score in answers}  # of the whole list
    assert cached(data, "chosen_level", "rejected_level") == [
        (levels[a], levels[b]) for a, b in texts_of(data, tokenizer)
    ]
    dropped = sum(entry["count"] for entry in data.facts[0]["dropped"].values())
    assert (dropped, data.facts[0]["ties"]) == (9 - len(pairs), 1)
    assert (f"{dropped} filtered (a side > 40 tokens; first " in data.lines[0]) is bool(missing)
    assert recipes_loss(data, tokenizer, kind) == pytest.approx(by_hand(left, kind), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_lists_and_cut_ones_and_pairs_are_a_mean_over_what_is_left_of_them(load, write_rows, tokenizer, kind):
    """Also a list that loses all but one answer, and one all of whose left answers are tied: neither is a list any more."""
    lists = [
        WHOLE,
        [("a" + LONG, 3), ("b", 2), ("c", 1)],
        [("d", 3), ("e" + LONG, 2), ("f" + LONG, 1)],
        [("g" + LONG, 3), ("h", 1), ("i", 1)],
        [("j", 0), ("k", 1)],
    ]
    data = load([write_rows([ranked(*one) for one in lists]), "1.0"], **LIMITS)
    left = [WHOLE, lists[1][1:], lists[4]]
    assert len(set(cached(data, "list_id"))) == len(left)
    expected = np.mean([by_hand(one, kind) for one in left])
    assert recipes_loss(data, tokenizer, kind) == pytest.approx(expected, rel=1e-5)


def test_a_prompt_that_is_too_long_takes_the_whole_list(load, write_rows):
    rows = [ranked(*WHOLE, prompt=LONG), ranked(*WHOLE)]
    data = load([write_rows(rows), "1.0"], max_token_length=200, max_prompt_token_length=30)
    assert len(set(cached(data, "list_id"))) == 1 and len(data) == 9
    assert data.facts[0]["dropped"]["prompt > 30 tokens"]["count"] == 9


def test_that_much_of_the_lists_is_missing_is_a_finding(load, write_rows, tokenizer):
    data = load([write_rows([ranked(("a" + LONG, 3), ("b", 2), ("c", 1))]), "1.0"], **LIMITS)
    report = inspect_data(data, None, tokenizer)
    assert any(
        "66.7% of the pairs are dropped, most of them (2) for: a side > 40 tokens" in f for f in report["findings"]
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_list_of_equal_scores_is_all_ties(load, write_rows, tokenizer, keep):
    alike = [(text, 4) for text in "abcd"]
    row = read_row(ranked(*alike), Reading(keep_ties=keep))
    assert (len(row.pairs), row.ties) == ((6, 0) if keep else (0, 6))
    if not keep:
        with pytest.raises(UserError, match="no pairs are left .*6 ties"):
            load([write_rows([ranked(*alike)]), "1.0"])
        return
    data = load([write_rows([ranked(*alike)]), "1.0"], keep_ties=True)
    assert texts_of(data, tokenizer) == [(a, b) for i, a in enumerate("abcd") for b in "abcd"[i + 1 :]]
    assert set(cached(data, "label_prob", "chosen_level", "rejected_level")) == {(0.5, 0, 0)}
    assert len(set(cached(data, "list_id"))) == 1
    with pytest.raises(UserError, match="a tie, and --list_loss plackett_luce is defined"):
        targets.check(data, ObjectiveFlags(list_loss="plackett_luce"), 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("answers", "ties", "counted"),
    [
        # the same answer twice as good: the list has it once, and so have its pairs no side of their own
        ([("a", 3), ("b", 2), ("a", 3)], 1, [("a", 3), ("b", 2)]),
        # twice the best, three times the worst
        ([("a", 3), ("a", 3), ("b", 1), ("b", 1), ("b", 1), ("c", 2)], 4, [("a", 3), ("c", 2), ("b", 1)]),
        # the same answer with two scores: it has two places, and is chosen at each of them
        ([("a", 3), ("b", 2), ("a", 1)], 1, [("a", 3), ("b", 2), ("a", 1)]),
        # but not where nothing else is worse: no pair says that it is better than itself
        ([("a", 3), ("b", 3), ("a", 1)], 2, [("b", 3), ("a", 1)]),
    ],
)
def test_an_answer_that_stands_twice_in_a_list(load, write_rows, tokenizer, answers, ties, counted, kind):
    data = load([write_rows([ranked(*answers)]), "1.0"])
    expected = [
        (a, b) for (a, x) in sorted(answers, key=lambda answer: -answer[1]) for (b, y) in answers if x > y and a != b
    ]
    assert sorted(texts_of(data, tokenizer)) == sorted(expected) and data.facts[0]["ties"] == ties
    assert recipes_loss(data, tokenizer, kind) == pytest.approx(by_hand(counted, kind), rel=1e-5)


def test_a_list_of_one_is_refused_and_of_joined_rows_it_is_counted(load, write_rows):
    for answers in ([("a", 1)], []):
        with pytest.raises(UserError, match="must be a list of at least 2 responses, not [01] responses"):
            read_row(ranked(*answers))
    rows = [
        {"prompt": f"{i}: ", "response": text, "score": s} for i, text, s in ((0, "a", 1), (1, "b", 1), (1, "c", 2))
    ]
    data = load([write_rows(rows), "1.0"])
    assert len(data) == 1 and "1 rows have fewer than two answers and give no pair (first " in data.lines[0]


def test_a_list_that_lost_pairs_may_be_smaller_than_a_step_again(load, write_rows):
    """What is asked of the step is asked of the pairs that are left."""
    flags = ObjectiveFlags(list_loss="plackett_luce")
    whole = load([write_rows([ranked(*WHOLE)]), "1.0"])
    with pytest.raises(UserError, match="a list of 9 pairs, which is trained in one step, and a step has 8"):
        targets.check(whole, flags, 8)
    cut = [(text + LONG * (score == 9), score) for text, score in WHOLE]
    targets.check(load([write_rows([ranked(*cut)]), "1.0"], **LIMITS), flags, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_one_text_in_all_pairs_of_its_list(load, write_rows, tokenizer, kind):
    """Two of three answers repeat the prompt, as a model does that was asked to go on."""
    answers = [("Q: a", 3), ("Q: b", 2), ("c", 1)]
    data = load([write_rows([ranked(*answers)]), "1.0"])
    sides = {ids for pair in cached(data, "chosen_input_ids", "rejected_input_ids") for ids in map(tuple, pair)}
    assert len(sides) == 3
    lists = targets.columns_of(data, ObjectiveFlags(list_loss=kind)).of_step(np.arange(3))(np.arange(3)).lists
    assert lists.index.shape == (1, 3)


def test_a_copy_of_a_cut_list_is_another_list_of_as_many_pairs(load, write_rows, tokenizer):
    answers = [(text + LONG * (score == 7), score) for text, score in WHOLE]
    data = load([write_rows([ranked(*answers)]), "3.0"], **LIMITS)
    ids = [number for (number,) in cached(data, "list_id")]
    assert sorted(ids.count(number) for number in set(ids)) == [3, 3, 3]
    once = dataclasses.replace(data, dataset=data.dataset.select(np.flatnonzero(np.array(ids) == ids[0])))
    for kind in KINDS:
        assert recipes_loss(data, tokenizer, kind) == pytest.approx(recipes_loss(once, tokenizer, kind), rel=1e-5)
