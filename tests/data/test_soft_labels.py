"""How sure it is who won: probabilities, votes, ties that are trained, and the lists that pairs come from."""

import json

import numpy as np
import pytest
from conftest import shared_data

from open_rm.data import building
from open_rm.data.answers import read_answers
from open_rm.data.rows import Reading, read_row
from open_rm.errors import UserError
from open_rm.flags import DataFlags
from open_rm.inspection.look import before_training

PAIR = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}
TWO = {"prompt": "Q: ", "response_a": "yes", "response_b": "no"}
LIST = {"prompt": "Q: ", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 1, 2]}
ANSWER = {"prompt": "Q: ", "response": "a", "score": 1}
KEEP = Reading(keep_ties=True)


def one(row, reading=None):
    """(chosen, rejected, label_prob, margin, levels) of the row's only pair."""
    [pair] = read_row(row, reading or Reading()).pairs
    return pair.chosen, pair.rejected, pytest.approx(pair.label_prob), pair.margin, pair.levels


def columns(data, *names) -> list[tuple]:
    rows = data.dataset.with_format(None)[:]
    return list(zip(*(rows[name] for name in names), strict=True))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ("yes", "no", 1.0, None, (0, 1))),
        ({"label_prob": None}, ("yes", "no", 1.0, None, (0, 1))),
        ({"label_prob": 0.8}, ("yes", "no", 0.8, None, (0, 1))),
        ({"label_prob": "0.3"}, ("no", "yes", 0.7, None, (0, 1))),
        ({"label_prob": 0}, ("no", "yes", 1.0, None, (0, 1))),
        ({"label_prob": 0.5 - 1e-9}, ("yes", "no", 0.5, None, (0, 0))),
        ({"label_prob": 0.5, "margin": 2}, ("yes", "no", 0.5, 0.0, (0, 0))),
        ({"label_prob": 0.9, "margin": 2}, ("yes", "no", 0.9, 2.0, (0, 1))),
        ({"label_prob": 0.1, "margin": -2}, ("no", "yes", 0.9, 2.0, (0, 1))),
        ({"n_chosen": 3, "n_rejected": 1}, ("yes", "no", 0.75, None, (0, 1))),
        ({"n_chosen": 1, "n_rejected": 4}, ("no", "yes", 0.8, None, (0, 1))),
        ({"n_chosen": 2, "n_rejected": 2}, ("yes", "no", 0.5, None, (0, 0))),
    ],
)
def test_a_probability_or_votes_say_which_side_stands_first(more, expected):
    assert one(PAIR | more) == expected
    swapped = expected[0] == "no"
    assert any(key.startswith("less likely") for key in read_row(PAIR | more).oddities) == swapped


def test_a_probability_is_that_of_the_winner_and_of_token_ids_and_may_have_another_name():
    assert one(TWO | {"winner": "b", "label_prob": 0.6}) == ("no", "yes", 0.6, None, (0, 1))
    assert one(TWO | {"winner": "b", "label_prob": 0.4}) == ("yes", "no", 0.6, None, (0, 1))
    assert one(TWO | {"winner": "tie", "label_prob": 0.5}) == ("yes", "no", 0.5, None, (0, 0))
    assert one(PAIR | {"sure": 0.2}, Reading(column_map={"label_prob": "sure"}))[:3] == ("no", "yes", 0.8)
    [pair] = read_row({"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3], "label_prob": 0.25}).pairs
    assert (pair.chosen, pair.label_prob) == ([1, 3], 0.75)
    scores = PAIR | {"s": 1, "t": 4, "label_prob": 0.2}  # a margin of two columns turns with the sides
    assert one(scores, Reading(margin_from=("s", "t"))) == ("no", "yes", 0.8, 3.0, (0, 1))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (PAIR | {"label_prob": 75}, "label_prob is 75, which is no probability; it must be from 0 to 1"),
        (PAIR | {"label_prob": "high"}, "label_prob holds 'high', which is not a finite number"),
        (PAIR | {"label_prob": True}, "label_prob holds True, which is not a finite number"),
        (PAIR | {"label_prob": 0.7, "n_chosen": 2, "n_rejected": 1}, "label_prob and n_chosen both say how sure"),
        (PAIR | {"n_chosen": 0, "n_rejected": 0}, "are both 0, so nobody says which is better"),
        (PAIR | {"n_chosen": 2.5, "n_rejected": 0}, "n_chosen is 2.5, which is no number of votes"),
        (PAIR | {"n_chosen": 1, "n_rejected": -1}, "n_rejected is -1, which is no number of votes"),
        (PAIR | {"n_chosen": 1}, "n_chosen says how many chose one side, and there is no value for n_rejected"),
        (PAIR | {"n_chosen": "", "n_rejected": 1}, "no value for n_chosen"),
        (PAIR | {"label_prob": 0.2, "margin": 2}, "the margin is 2, which says that chosen is the better one"),
        (TWO | {"winner": "a", "n_chosen": 1, "n_rejected": 0}, "rows of response_a and response_b have neither"),
        (TWO | {"winner": "tie", "label_prob": 0.8}, "the row is a tie, and its votes or label_prob say 0.8"),
        (TWO | {"strength": 2, "label_prob": 0.2}, "strength is 2, which says that chosen is the better one"),
        (LIST | {"label_prob": 0.8}, "label_prob is read as label_prob, .* and a ranked list may give many pairs"),
        (ANSWER | {"label_prob": 0.8}, "rows of one answer may give many pairs"),
        (PAIR | {"rejected": ["no", "never"], "label_prob": 0.8}, "the row gives 2 pairs, and its one probability"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(row, says):
    with pytest.raises(UserError, match=says):
        read_row(row)


def test_ties_are_pairs_where_they_are_kept():
    for tie in (
        TWO | {"winner": "tie"},
        TWO | {"strength": 0},
        TWO | {"score_a": 2, "score_b": 2},
    ):
        assert (read_row(tie).pairs, read_row(tie).ties) == ([], 1)
        margin = 0.0 if "strength" in tie else None
        assert one(tie, KEEP) == ("yes", "no", 0.5, margin, (0, 0))
        alike = read_row(tie | {"response_b": "yes"}, KEEP)
        assert (alike.pairs, alike.ties) == ([], 1)
    equal = Reading(keep_ties=True, margin_from=("s", "t"))
    assert one(PAIR | {"s": 1, "t": 1}, equal) == ("yes", "no", 0.5, 0.0, (0, 0))
    unvoted = Reading(keep_ties=True, label_values={"a": "a", "none": "tie"})
    assert (read_row(TWO | {"winner": "none"}, unvoted).pairs, read_row(TWO | {"winner": "none"}, unvoted).ties) == (
        [],
        1,
    )


def test_a_ranked_list_has_levels_and_its_ties_keep_the_order_of_the_file():
    dropped, kept = read_row(LIST), read_row(LIST, KEEP)
    expected = {("b", "d"): (0, 1), ("b", "a"): (0, 2), ("b", "c"): (0, 2), ("d", "a"): (1, 2), ("d", "c"): (1, 2)}
    assert {(pair.chosen, pair.rejected): pair.levels for pair in dropped.pairs} == expected
    assert dropped.ties == 1 and {pair.label_prob for pair in dropped.pairs} == {1.0}
    assert {(p.chosen, p.rejected): p.levels for p in kept.pairs} == expected | {("a", "c"): (2, 2)}
    assert kept.ties == 0
    assert {(p.chosen, p.rejected) for p in kept.pairs if p.label_prob == 0.5} == {("a", "c")}
    alike = read_row(LIST | {"responses": ["a", "b", "a", "d"]}, KEEP)
    assert (len(alike.pairs), alike.ties) == (5, 1)


def test_the_cache_holds_them_alike_in_any_number_of_processes(load, write_rows, tmp_path, tokenizer):
    rows = [PAIR, PAIR | {"label_prob": 0.25}, PAIR | {"label_prob": 0.5}, PAIR | {"chosen": ["yes", "good"]}]
    path = write_rows(rows)
    names = ("place", "label_prob", "list_id", "chosen_level", "rejected_level", "source", "margin")
    found = [load([path, "2.0"], num_proc=n, dataset_local_cache_dir=str(tmp_path / str(n))) for n in (1, 2)]
    first, second = (columns(data, *names[:-1]) for data in found)
    assert first == second
    assert [p for _, p, *_ in first] == [1, 1, 0.75, 0.75, 0.5, 0.5, 1, 1, 1, 1]
    ids = [id for _, _, id, *_ in first]
    assert len(set(ids[:6])) == 6  # a pair is a list of its own, as often as it is taken
    assert sorted(ids.count(id) for id in set(ids[6:])) == [2, 2]  # two copies of a row of two pairs
    assert [tuple(row[3:5]) for row in first[4:6]] == [(0, 0)] * 2
    [facts] = found[0].facts
    assert (facts["ties_trained"], facts["soft_labels"], facts["ties"]) == (2, 2, 0)
    assert "2 ties trained, 2 pairs with a soft label" in found[0].lines[0]
    assert "1 rows have label_prob below 0.5, so their sides change places" in found[0].lines[0]
    lines = before_training(found[0], found[1], tokenizer, DataFlags(), margin_loss=False)
    assert "train: 2 ties trained towards equal rewards" in lines
    assert "eval: 2 ties left out of accuracy" in lines
    assert "train: 2 pairs with a label_prob between 0.5 and 1" in lines


def test_a_row_that_is_dealt_to_several_blocks_keeps_its_copies_apart(load, write_rows, monkeypatch):
    monkeypatch.setattr(building, "BLOCK_ROWS", 3)
    data = load([write_rows([PAIR]), "8"])
    assert len(set(columns(data, "list_id"))) == len(data) == 8


def test_rows_joined_by_their_prompt_are_one_list(load, write_rows):
    rows = [ANSWER | {"response": text, "score": score} for text, score in (("a", 1), ("b", 2), ("c", 2))]
    path = write_rows(
        [*rows, ANSWER | {"prompt": "P: ", "score": 1}, ANSWER | {"prompt": "P: ", "response": "z", "score": 0}]
    )
    plain, kept = load([path, "1.0"]), load([path, "1.0"], keep_ties=True)
    assert [len(plain), len(kept)] == [3, 4]  # another cache
    ids = [id for (id,) in columns(kept, "list_id")]
    assert ids[:3] == ids[:1] * 3 and ids[3] != ids[0]
    assert columns(kept, "chosen_level", "rejected_level", "label_prob")[:3] == [(0, 0, 0.5), (0, 1, 1), (0, 1, 1)]
    assert "1 ties" in plain.lines[0] and "trained" not in plain.lines[0]
    assert "1 ties trained (--keep_ties)" in kept.lines[0]


def test_a_scored_row_says_its_probability():
    for row, expected in (
        (PAIR | {"label_prob": 0.25}, [0.25, 0.75]),
        (PAIR | {"n_chosen": 3, "n_rejected": 1}, [0.75, 0.25]),
        (TWO | {"winner": "b", "label_prob": 0.75}, [0.25, 0.75]),
        (PAIR, [1.0, 0.0]),
        (PAIR | {"label_prob": 7}, None),
    ):
        assert read_answers(row).given == expected


def test_ties_of_real_lists_are_kept(load):
    path = shared_data("alpaca_eval") / "ranked.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    both = [(a, b) for row in rows for a, b in _meeting(row)]
    ties = sum(x == y for x, y in both)
    limits = {"max_token_length": 10**6, "max_prompt_token_length": 10**6}
    data = load([str(path), "1.0"], keep_ties=True, **limits)
    prob = np.array([p for (p,) in columns(data, "label_prob")])
    levels = np.array(columns(data, "chosen_level", "rejected_level"))
    assert ((prob == 0.5) == (levels[:, 0] == levels[:, 1])).all() and (levels[:, 0] <= levels[:, 1]).all()
    assert data.facts[0]["ties_trained"] == (prob == 0.5).sum() == ties
    assert len(data) == len(load([str(path), "1.0"], **limits)) + (prob == 0.5).sum()


def _meeting(row):
    """Scores of each two answers of a row that are not the same."""
    found = list(zip(row["responses"], row["scores"], strict=True))
    return [(x, y) for i, (a, x) in enumerate(found) for b, y in found[i + 1 :] if a != b]
