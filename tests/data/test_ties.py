"""Ties from the column that says so to what is said of them: rows, the whole cache, findings."""

import itertools
import json

import numpy as np
import pytest

from open_rm.data.rows import Reading, read_row
from open_rm.errors import UserError
from open_rm.flags import DataFlags
from open_rm.inspection.look import before_training
from open_rm.inspection.report import inspect_data

# As argilla/distilabel-intel-orca-dpo-pairs has them: `status` says which rows are ties (forms.Form.tie).
ORCA = {"system": "", "input": "How far?", "chosen": "A mile.", "rejected": "Near.", "status": "unchanged"}
TIE = ORCA | {"status": "tie"}
KEEP = Reading(keep_ties=True)
PAIR = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}


def said(pair) -> tuple:
    return pair.chosen[0]["content"], pair.rejected[0]["content"], pair.label_prob, pair.margin, pair.levels


@pytest.mark.parametrize("reading", [Reading(), KEEP])
@pytest.mark.parametrize("status", ["unchanged", "swapped", None])
def test_a_row_that_is_no_tie_is_read_alike_whether_ties_are_kept(reading, status):
    row = read_row(ORCA | {"status": status}, reading)
    assert (row.form, row.ties) == ("distilabel_orca", 0)
    assert [said(pair) for pair in row.pairs] == [("A mile.", "Near.", 1.0, None, (0, 1))]


def test_a_column_that_says_tie_makes_one_in_the_order_of_the_row():
    dropped, kept = read_row(TIE), read_row(TIE, KEEP)
    assert (dropped.pairs, dropped.ties) == ([], 1)
    assert (kept.form, kept.ties, kept.oddities) == ("distilabel_orca", 0, ())
    assert [said(pair) for pair in kept.pairs] == [("A mile.", "Near.", 0.5, None, (0, 0))]
    assert kept.pairs[0].is_tie and kept.pairs[0].prompt == [{"role": "user", "content": "How far?"}]


def test_a_tie_of_the_same_answer_is_no_pair():
    for reading in (Reading(), KEEP):
        same = read_row(TIE | {"rejected": TIE["chosen"]}, reading)
        assert (same.pairs, same.ties) == ([], 1)


@pytest.mark.parametrize(
    ("s", "t"),
    [
        (4, 1),
        (1, 4),
    ],
)
def test_a_tie_has_no_margin_but_0_whatever_its_scores_are(s, t):
    """--margin_from of two columns: the row says that it is a tie, and its scores say how long the answers were."""
    scored = TIE | {"s": s, "t": t}
    assert read_row(scored, Reading(margin_from=("s", "t"))).ties == 1
    [pair] = read_row(scored, Reading(margin_from=("s", "t"), keep_ties=True)).pairs
    assert said(pair) == ("A mile.", "Near.", 0.5, 0.0, (0, 0))
    better = tuple(sorted("st", key={"s": -s, "t": -t}.__getitem__))
    [pair] = read_row(scored | {"status": "unchanged"}, Reading(margin_from=better, keep_ties=True)).pairs
    assert said(pair) == ("A mile.", "Near.", 1.0, 3.0, (0, 1))


@pytest.mark.parametrize("reading", [Reading(), KEEP])
def test_a_tie_agrees_with_its_probability_or_is_refused(reading):
    for sure in ({"label_prob": 0.8}, {"n_chosen": 1, "n_rejected": 3}):
        with pytest.raises(UserError, match="the row is a tie, and its votes or label_prob say"):
            read_row(TIE | sure, reading)
    for even in ({"label_prob": 0.5}, {"n_chosen": 2, "n_rejected": 2}):  # the row itself says that it is trained
        [pair] = read_row(TIE | even, reading).pairs
        assert said(pair) == ("A mile.", "Near.", 0.5, None, (0, 0))


def test_ignored_the_column_makes_no_ties():
    [pair] = read_row(TIE, Reading(ignore=("status",))).pairs
    assert pair.label_prob == 1.0 and pair.levels == (0, 1)


def cached(data, *names) -> list[tuple]:
    rows = data.dataset.with_format(None)[:]
    return list(zip(*(rows[name] for name in names), strict=True))


def test_the_whole_cache_counts_them_and_gives_each_a_list_of_its_own(load, write_rows, tokenizer):
    rows = [ORCA, TIE, TIE | {"rejected": TIE["chosen"]}, TIE | {"chosen": "Far.", "label_prob": 0.5}]
    path = write_rows(rows)
    plain, kept = load([path, "2.0"]), load([path, "2.0"], keep_ties=True)
    assert [(len(data), data.facts[0]["ties"], data.facts[0]["ties_trained"]) for data in (plain, kept)] == [
        (4, 4, 2),  # the row that says 0.5 is trained in any case
        (6, 2, 4),
    ]
    assert {data.facts[0]["forms"]["distilabel_orca"] for data in (plain, kept)} == {4}  # of rows, not of copies
    assert [label for (label,) in cached(kept, "label_prob")] == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert {levels for levels in cached(kept, "chosen_level", "rejected_level")[2:]} == {(0, 0)}
    assert len(set(cached(kept, "list_id"))) == 6
    texts = [tokenizer.decode(ids) for (ids,) in cached(kept, "chosen_input_ids")]
    assert ["Far." in text for text in texts] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("form", ["pairs", "distilabel_orca"])
def test_a_form_that_is_named_decides_whether_the_column_makes_ties(load, write_rows, form):
    """Read as plain pairs, the status is a column that nobody asked for."""
    row = {"input": "How far?", "chosen": "How far? A mile.", "rejected": "How far? Near.", "status": "tie"}
    reading = {} if form == "distilabel_orca" else {"column_map": ["prompt=input"]}
    data = load([write_rows([row]), "1.0"], dataset_format=[form], keep_ties=True, **reading)
    assert cached(data, "label_prob") == [(0.5 if form == "distilabel_orca" else 1.0,)]


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("unlikely", "words"),
    [
        ({"label_prob": 0.2}, "label_prob below 0.5"),
        ({"n_chosen": 0, "n_rejected": 3}, "more votes for rejected"),
    ],
)
def test_sides_that_all_change_places_are_a_finding_and_some_are_a_word_in_the_log(
    load, write_rows, tokenizer, unlikely, words
):
    likely = {"label_prob": 0.9} if "label_prob" in unlikely else {"n_chosen": 3, "n_rejected": 1}
    rows = [PAIR | {"prompt": f"{i}? "} | unlikely for i in range(3)]
    for name, more, count in (("all", [], 3), ("some", [PAIR | likely], 4)):
        data = load([write_rows([*rows, *more], f"{name}.jsonl"), "1.0"])
        assert f", 3 rows have {words}, so their sides change places (first " in data.lines[0]
        lines = before_training(data, None, tokenizer, DataFlags(), margin_loss=False)
        finding = f"finding: train {data.labels[0]}: 3 of 3 rows have {words}, so their sides change places, first "
        assert any(line.startswith(finding) and line.endswith("all.jsonl:1") for line in lines) is (name == "all")
        assert "change places" in json.dumps(inspect_data(data, None, tokenizer)["findings"]) or name == "some"
        if name == "all":
            with pytest.raises(UserError, match="--strict: .*change places"):
                before_training(data, None, tokenizer, DataFlags(strict=True), margin_loss=False)
        assert count == len(data)


def test_ties_are_no_contradiction_of_each_other_or_of_a_pair(load, write_rows, tokenizer):
    a, b, numbers = PAIR, PAIR | {"chosen": "no", "rejected": "yes"}, itertools.count()
    tie = {"label_prob": 0.5}

    def contradictory(*rows):
        data = load([write_rows(rows, f"{next(numbers)}.jsonl"), "1.0"])
        return inspect_data(data, None, tokenizer)["splits"]["train"]["overall"]["contradictory"]["count"]

    assert contradictory(a | tie, b | tie) == 0
    assert contradictory(a | tie, b) == 0
    assert contradictory(b, a | tie) == 0
    for rows in ((a, b), (a | tie, a, b), (b, a | tie, a), (a, b | tie, b), (a, a, b, b)):
        assert contradictory(*rows) == 1


def test_what_a_rule_of_length_scores_is_counted_over_pairs_that_are_decided(load, write_rows, tokenizer):
    """Ties whose first side is the longer one say nothing for "longer is better"."""
    long = PAIR | {"chosen": "yes, a lot more of it than there was", "label_prob": 0.5}
    short = PAIR | {"rejected": "no, not by any of the many ways there are"}
    both = load([write_rows([{**long, "prompt": f"{i}: "} for i in range(9)] + [short]), "1.0"])
    found = inspect_data(both, None, tokenizer)["splits"]["train"]["overall"]
    baseline = found["length_baseline"]
    assert (baseline["rule"], baseline["accuracy"], baseline["pairs"]) == ("shorter is better", 1.0, 1)
    assert (found["pairs"], found["chosen_longer"], found["equally_long"]) == (10, 0.0, 0.0)
    ties = load([write_rows([long], "ties.jsonl"), "1.0"])
    report = inspect_data(ties, None, tokenizer)
    found = report["splits"]["train"]["overall"]
    assert (found["length_baseline"]["accuracy"], found["length_baseline"]["pairs"]) == (0.5, 0)
    assert not np.isnan(found["chosen_longer"]) and "alone is right" not in json.dumps(report["findings"])


def test_a_source_of_nothing_but_ties_is_refused_unless_they_are_kept(load, write_rows):
    path = write_rows([TIE])
    with pytest.raises(UserError, match=r"no pairs are left \(.*1 ties.*\); the rows are ties"):
        load([path, "1.0"])
    assert len(load([path, "1.0"], keep_ties=True)) == 1
