"""What the loss is told of each pair: nothing of plain ones, and what it cannot be told is refused before training."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from pairs_of_ids import as_data

from open_rm.batching import feeding, targets
from open_rm.batching.rules import BatchRules
from open_rm.errors import UserError
from open_rm.flags import ObjectiveFlags
from open_rm.ranks import Ranks
from open_rm.reliability.comparing import data_mark

ROW = list(range(5, 60))


def data_of(**columns):
    """Six pairs of one prompt, in lists of three, two and one; columns change others of the cache."""
    sides = [(0, 1), (0, 2), (1, 2), (0, 1), (0, 2), (0, 1)]
    found = as_data(
        [tuple([*ROW[:20], 70 + i // 5, 80 + side] for side in pair) for i, pair in enumerate(sides)], [20] * 6
    )
    known = found.dataset.to_dict()
    known |= {"list_id": [4, 4, 4, -9, -9, 7], "chosen_level": [0, 0, 1, 0, 0, 0], "rejected_level": [1, 2, 2, 1, 1, 1]}
    known |= {"place": [f"rows.jsonl row {number}" for number in (1, 1, 1, 2, 2, 3)]} | columns
    number = datasets.Value("float32")
    types = found.dataset.features | dict.fromkeys(("label_prob", "margin"), number)
    types |= dict.fromkeys(("chosen_attributes", "rejected_attributes"), datasets.Sequence(number))
    types = datasets.Features(types)
    return dataclasses.replace(found, dataset=datasets.Dataset.from_dict(known, features=types))


def test_of_plain_pairs_nothing_is_told():
    assert targets.columns_of(data_of(), ObjectiveFlags()) == targets.TargetColumns()
    assert targets.PLAIN.to(torch.device("cpu")) == targets.PLAIN and targets.PLAIN.decided() is None


def test_margins_and_labels_are_told_where_they_matter():
    probs = [1, 0.5, 0.75, 1, 1, 1]
    data = data_of(label_prob=probs, margin=[0.5] * 6)
    found = targets.columns_of(data, ObjectiveFlags()).of_step(np.arange(6))(np.array([2, 1]))
    assert (found.margins, found.lists, found.label_prob.tolist()) == (None, None, [0.75, 0.5])
    assert found.label_prob.dtype == torch.float32 and found.decided().tolist() == [True, False]
    found = targets.columns_of(data_of(margin=[0.5] * 6), ObjectiveFlags(margin_loss=True)).of_step(np.arange(6))
    assert found(np.array([3])).margins.tolist() == [0.5] and found(np.array([3])).label_prob is None


NAN = float("nan")
# Two of each answer, of some not known; the answers of the six pairs stand in several of them.
CHOSEN = [[1, NAN], [1, NAN], [2, 5], [1, NAN], [1, NAN], [1, NAN]]
REJECTED = [[2, 5], [4, 8], [4, 8], [2, 5], [4, NAN], [NAN, 5]]
ATTRIBUTES = {"chosen_attributes": CHOSEN, "rejected_attributes": REJECTED}


def test_attributes_are_told_less_their_means_over_the_answers_of_all_pairs():
    """An answer that stands in several pairs counts in each."""
    data = data_of(**ATTRIBUTES)
    assert data.attributes().shape == (6, 2, 2)
    first, second = (sum(numbers) / len(numbers) for numbers in ([1, 1, 2, 1, 1, 1, 2, 4, 4, 2, 4], [5, 5, 8, 8, 5, 5]))
    assert targets.facts(data) == {"attribute_means": [pytest.approx(first), pytest.approx(second)]}
    found = targets.columns_of(data, ObjectiveFlags()).of_step(np.arange(6))(np.array([5, 2]))
    assert found.attributes.dtype == torch.float32 and (found.margins, found.label_prob, found.lists) == (None,) * 3
    expected = [[[1 - first, NAN], [NAN, 5 - second]], [[2 - first, 5 - second], [4 - first, 8 - second]]]
    torch.testing.assert_close(found.attributes, torch.tensor(expected), equal_nan=True)
    assert targets.facts(data_of()) == {}


def test_data_with_other_attributes_are_other_data():
    other = [CHOSEN[0], *CHOSEN[:1], [2, 4], *CHOSEN[3:]]
    marks = {data_mark(data_of(**columns)) for columns in ({}, ATTRIBUTES, ATTRIBUTES | {"chosen_attributes": other})}
    assert len(marks) == 3 and data_mark(data_of(**ATTRIBUTES)) in marks


def test_a_list_weighs_pairs_over_lists_of_its_step_on_all_ranks_and_comes_in_one_micro_batch():
    """Six pairs of three lists, on two ranks: each list counts twice, at its first pair."""
    data = data_of()
    flags = ObjectiveFlags(list_loss="best_of_k")
    rules = BatchRules("packed", 0, max_tokens=1, evaluation_tokens=1, whole_lists=True)
    weights, lists = [], []
    for rank in range(2):
        ranks = Ranks(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))
        columns = targets.columns_of(data, flags)
        [step] = feeding.training_steps([np.arange(6)], data, rules, ranks, targets=columns)
        for micro in step.micro_batches:
            weights += micro.targets.lists.weight.tolist()
            lists += [set(data.table.list_id[micro.indices])]
            assert len(micro.targets.lists.of_pair) == len(micro.indices)
    assert sorted(weights) == [0, 0, 0, 2, 2, 2]
    assert sorted(map(sorted, filter(None, lists))) == [[-9], [4], [7]]


def test_tied_best_answers_share_the_weight_of_their_list():
    levels = {"chosen_level": [0, 0, 0, 0, 0, 0], "rejected_level": [1, 1, 1, 1, 1, 1]}
    data = data_of(**levels)
    # the list of three pairs: answers 0 and 1 are best, and 1 and 2 are the rest, by level and tokens
    found = targets.columns_of(data, ObjectiveFlags(list_loss="best_of_k")).of_step(np.arange(3))(np.arange(3))
    assert found.lists.weight.tolist() == [1.5, 0, 0]


def test_pinned_targets_and_those_on_a_device_are_the_same(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
    known = {"label_prob": [0.5] * 6, "margin": [0.25] * 6} | ATTRIBUTES
    columns = targets.columns_of(data_of(**known), ObjectiveFlags(margin_loss=True))
    lists = targets.columns_of(data_of(), ObjectiveFlags(list_loss="plackett_luce")).lists
    made = dataclasses.replace(columns, lists=lists).of_step(np.arange(6))(np.arange(6))
    for other in (made.pinned(), made.to(torch.device("cpu"))):
        assert torch.equal(other.margins, made.margins) and torch.equal(other.label_prob, made.label_prob)
        torch.testing.assert_close(other.attributes, made.attributes, rtol=0, atol=0, equal_nan=True)
        assert all(torch.equal(vars(other.lists)[name], tensor) for name, tensor in vars(made.lists).items())


@pytest.mark.parametrize(
    ("flags", "columns", "sentence"),
    [
        (
            {"margin_loss": True},
            {"label_prob": [1, 1, 1, 0.5, 0.75, 1]},
            "rows.jsonl row 2: a tie, and --margin_loss is defined for pairs of which one side is surely the better",
        ),
        (
            {"loss_type": "focal"},
            {"label_prob": [1, 1, 1, 1, 1, 0.75]},
            "rows.jsonl row 3: a label_prob of 0.75, and --loss_type focal is defined",
        ),
        (
            {"list_loss": "best_of_k"},
            {"label_prob": [0.9] * 6},
            "row 1: a label_prob of 0.9, and --list_loss best_of_k is",
        ),
        (
            {"list_loss": "plackett_luce"},
            {},
            "rows.jsonl row 1: a list of 3 pairs, which is trained in one step, and a step has 2; raise",
        ),
    ],
)
def test_what_the_loss_cannot_be_told_is_refused_with_the_first_row(flags, columns, sentence):
    with pytest.raises(UserError, match=sentence):
        targets.check(data_of(**columns), ObjectiveFlags(**flags), 2)


def test_what_goes_together_is_not_refused():
    soft = data_of(label_prob=[0.5, 0.75, 1, 1, 1, 1])
    targets.check(soft, ObjectiveFlags(label_smoothing=0.1, penalty_type="L2"), 2)
    targets.check(data_of(), ObjectiveFlags(list_loss="plackett_luce"), 3)
    targets.check(data_of(), ObjectiveFlags(), 1)
