"""Objectives of ranked lists against the products of choices that they stand for, written down without tensors or by autograd in
float64."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm.batching.targets import NO_ANSWER, ListColumns, TargetColumns, Targets
from open_rm.flags import ObjectiveFlags
from open_rm.training.list_losses import list_loss
from open_rm.training.losses import loss_terms, ranking_loss

KINDS = ("plackett_luce", "best_of_k")


class Ranked:
    """Lists given by the levels of their answers, as the pairs that the data room makes of them: each two that differ, shuffled.

    pairs: [P, 2] numbers of the answers of all lists.
    """

    def __init__(self, *lists, kind: str = "plackett_luce", seed: int = 0, pairs=None):
        self.levels = np.concatenate(lists).astype(np.int32)
        self.list_of = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
        every = itertools.permutations(range(len(self.levels)), 2)
        made = [(i, j) for i, j in every if self.list_of[i] == self.list_of[j] and self.levels[i] < self.levels[j]]
        self.pairs = np.random.default_rng(seed).permutation(np.array(made if pairs is None else pairs))
        ids = np.random.default_rng(seed + 1).permutation(10**6)[: len(self.levels)]  # hashes, whose order says nothing
        lists_of_pairs = 100 - self.list_of[self.pairs[:, 0]]
        sides = tuple(self.pairs.T)
        self.columns = TargetColumns(
            lists=ListColumns(
                lists_of_pairs,
                tuple(ids[side] for side in sides),
                tuple(self.levels[side] for side in sides),
                best_alone=kind == "best_of_k",
            )
        )

    def mean(self, rewards: torch.Tensor, *parts: np.ndarray) -> torch.Tensor:
        """What the loop makes of it: sums over the parts that the step is cut into, divided by its pairs. rewards: of answers."""
        everything = np.arange(len(self.pairs))
        targets_of, total = self.columns.of_step(everything), 0.0
        for part in parts or (everything,):
            sides = (rewards[torch.from_numpy(side)] for side in self.pairs[part].T)
            total = total + list_loss(*sides, targets_of(part).lists).sum() / len(everything)
        return total


def choices(rewards, levels) -> float:
    """-log of the probability of the ranking: each answer chosen among itself and all that are worse."""
    total = 0.0
    for reward, level in zip(rewards, levels, strict=True):
        worse = [r for r, other in zip(rewards, levels, strict=True) if other > level]
        total -= math.log(math.exp(reward) / (math.exp(reward) + sum(map(math.exp, worse))))
    return total


def best(rewards, levels) -> float:
    """-log of the probability that a best one is chosen among itself and all that are not best; the mean over the best."""
    top = [r for r, level in zip(rewards, levels, strict=True) if level == min(levels)]
    rest = sum(math.exp(r) for r, level in zip(rewards, levels, strict=True) if level != min(levels))
    return sum(-math.log(math.exp(r) / (math.exp(r) + rest)) for r in top) / len(top)


FORMULAS = {"plackett_luce": choices, "best_of_k": best}
LISTS = {
    "2": [[0, 1]],
    "5": [[3, 0, 4, 1, 2]],
    "ties": [[1, 0, 1, 2, 0, 2]],
    "all but one tied": [[1, 1, 0, 1]],
    "several": [[0, 1], [2, 0, 1], [0, 1], [1, 0, 0, 2, 3], [0, 1, 1]],
}


def random(count: int, seed: int = 3) -> torch.Tensor:
    return 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def in_lists(ranked: Ranked, values) -> list[tuple[list, list]]:
    """(values, levels) of each list."""
    numbers = [np.flatnonzero(ranked.list_of == i) for i in range(ranked.list_of.max() + 1)]
    return [([values[i] for i in of_list], ranked.levels[of_list].tolist()) for of_list in numbers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LISTS)
def test_the_loss_is_the_mean_over_lists_of_the_products_of_choices(name, kind):
    ranked = Ranked(*LISTS[name], kind=kind)
    rewards = random(len(ranked.levels))
    expected = [FORMULAS[kind](*one) for one in in_lists(ranked, rewards.tolist())]
    assert ranked.mean(rewards).item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LISTS)
def test_the_gradient_is_that_of_its_definition(name, kind):
    """By differences of the formula in float64."""
    ranked = Ranked(*LISTS[name], kind=kind)
    rewards = random(len(ranked.levels)).requires_grad_()
    ranked.mean(rewards).backward()
    at = rewards.detach().double().tolist()

    def mean(values) -> float:
        found = [FORMULAS[kind](*one) for one in in_lists(ranked, values)]
        return sum(found) / len(found)

    step = 1e-6
    for i in range(len(at)):
        moved = [mean([x + sign * step * (i == j) for j, x in enumerate(at)]) for sign in (1, -1)]
        assert rewards.grad[i].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_the_probabilities_of_all_rankings_are_a_distribution_and_the_best_ones_are_their_marginal(count):
    """Plackett-Luce over all permutations sums to 1, and over those that begin with an answer to the best-of-K probability of it."""
    rewards = random(count, seed=count)
    first = np.zeros(count)
    for levels in itertools.permutations(range(count)):
        first[levels.index(0)] += math.exp(-Ranked(levels).mean(rewards).item())
    assert first.sum() == pytest.approx(1, abs=1e-5)
    for answer in range(count):
        levels = [int(i != answer) for i in range(count)]
        assert Ranked(levels, kind="best_of_k").mean(rewards).item() == pytest.approx(
            -math.log(first[answer]), rel=1e-5
        )
        cross_entropy = F.cross_entropy(rewards, torch.tensor(answer)).item()
        assert Ranked(levels, kind="best_of_k").mean(rewards).item() == pytest.approx(cross_entropy, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_answers_are_bradley_terry_bit_for_bit_however_far_apart(kind):
    leads = torch.tensor([0.0, 1e-4, -0.7, 3.0, -20.0, 25.0, 90.0, -300.0, 1e4, -1e4, 1e30])
    ranked = Ranked(*[[0, 1]] * len(leads), kind=kind)
    grads = []
    for of_pairs in (False, True):
        rewards = torch.stack((1.25 + leads, torch.full_like(leads, 1.25)), dim=1).flatten().requires_grad_()
        chosen, rejected = (rewards[torch.from_numpy(side)] for side in ranked.pairs.T)
        lists = ranked.columns.of_step(np.arange(len(leads)))(np.arange(len(leads))).lists
        losses = ranking_loss(chosen, rejected) if of_pairs else list_loss(chosen, rejected, lists)
        losses.sum().backward()
        grads.append((losses.detach(), rewards.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert torch.isfinite(grads[0][1]).all()


def test_rewards_far_apart_have_finite_losses_and_gradients():
    for kind in KINDS:
        ranked = Ranked([0, 1, 2, 2], [0, 0, 1], kind=kind)
        for scale in (1e3, 1e30):
            rewards = (scale * torch.tensor([-1.0, 1.0, 0.5, -2.0, 1.0, -1.0, 0.0])).requires_grad_()
            loss = ranked.mean(rewards)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(rewards.grad).all() and rewards.grad.abs().max() > 0.1


# ---- how a step is cut


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lists=st.lists(
        st.lists(st.integers(0, 4), min_size=2, max_size=6).filter(lambda one: len(set(one)) > 1),
        min_size=1,
        max_size=6,
    ),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 5),
)
def test_lists_in_one_micro_batch_are_as_one_by_one_and_as_in_two(lists, kind, seed):
    ranked = Ranked(*lists, kind=kind, seed=seed)
    of_pair = ranked.list_of[ranked.pairs[:, 0]]
    alone = [np.flatnonzero(of_pair == i) for i in range(len(lists))]
    halves = [np.flatnonzero(of_pair % 2 == i) for i in range(2)]
    found = []
    for parts in ([np.arange(len(ranked.pairs))], alone, [half for half in halves if len(half)]):
        rewards = random(len(ranked.levels), seed).requires_grad_()
        loss = ranked.mean(rewards, *parts)
        loss.backward()
        found.append((loss.item(), rewards.grad))
    for loss, grad in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6, abs=1e-7)
        assert torch.allclose(grad, found[0][1], atol=1e-7)


def test_a_lists_loss_stands_at_its_first_pair_and_lists_weigh_alike():
    """A list of three pairs and one of one: four pairs, two lists, so that each list counts twice."""
    ranked = Ranked([0, 1, 2], [0, 1])
    rewards = random(5)
    targets = ranked.columns.of_step(np.arange(4))(np.arange(4))
    column = list_loss(*(rewards[torch.from_numpy(side)] for side in ranked.pairs.T), targets.lists)
    of_pair = ranked.list_of[ranked.pairs[:, 0]]
    first = [int(np.flatnonzero(of_pair == i)[0]) for i in range(2)]
    assert [i for i in range(4) if column[i]] == sorted(first)
    for i, (values, levels) in enumerate(in_lists(ranked, rewards.tolist())):
        assert column[first[i]].item() == pytest.approx(2 * choices(values, levels), rel=1e-6)


def test_a_micro_batch_without_a_pair_that_counts_has_a_gradient_of_zeros():
    columns = Ranked([0, 1, 2]).columns
    rewards = torch.zeros(2, requires_grad=True)
    lists = columns.of_step(np.arange(3))(np.arange(0)).lists
    list_loss(rewards[:0], rewards[:0], lists).sum().backward()
    assert rewards.grad.tolist() == [0, 0]


def test_places_beyond_a_shorter_list_are_marked_and_have_no_gradient():
    ranked = Ranked([0, 1, 2, 3], [0, 1])
    lists = ranked.columns.of_step(np.arange(7))(np.arange(7)).lists
    assert sorted((lists.level == NO_ANSWER).sum(dim=1).tolist()) == [0, 2]
    rewards = random(6).requires_grad_()
    chosen, rejected = (rewards[torch.from_numpy(side)] for side in ranked.pairs.T)
    of_short = list_loss(chosen, rejected, lists)[np.flatnonzero(ranked.list_of[ranked.pairs[:, 0]] == 1)]
    of_short.sum().backward()
    assert rewards.grad[:4].abs().sum() == 0 and rewards.grad[4:].abs().min() > 0


# ---- what an answer is


def test_answers_are_told_by_list_level_and_tokens():
    """Equal tokens in two lists, or at two levels of one list, are two answers; in two pairs of a list they are one."""
    same, other, third = 5, 6, 7
    columns = ListColumns(
        np.array([1, 1, 2, 2]),
        (np.array([same, same, same, same]), np.array([other, third, same, other])),
        (np.array([0, 0, 0, 0]), np.array([1, 1, 1, 2])),
        best_alone=False,
    )
    lists = columns.of(np.arange(4), 1.0)
    assert (lists.level != NO_ANSWER).sum(dim=1).tolist() == [3, 3]
    assert lists.level.tolist() == [[0, 1, 1], [0, 1, 2]]
    assert [sorted(row) for row in lists.index.tolist()] == [[0, 4, 5], [2, 6, 7]]


def test_pairs_that_the_data_room_left_out_leave_the_answers_that_are_there():
    """Three answers of four, of which the two tied ones are paired with the third alone."""
    ranked = Ranked([0, 0, 1, 2], pairs=[(0, 2), (1, 2)])
    rewards = random(4)
    expected = choices(rewards.tolist()[:3], [0, 0, 1])
    assert ranked.mean(rewards).item() == pytest.approx(expected, rel=1e-6)
    # of a list whose best answer is not there the best of the rest is the best
    ranked = Ranked([0, 1, 2], kind="best_of_k", pairs=[(1, 2)])
    assert ranked.mean(rewards[:3]).item() == pytest.approx(best(rewards.tolist()[1:3], [0, 1]), rel=1e-6)


# ---- among the terms


@pytest.mark.parametrize("kind", KINDS)
def test_lists_replace_the_ranking_term_and_penalties_stay_means_over_pairs(kind):
    ranked = Ranked([0, 1, 2], [1, 0], kind=kind)
    rewards = random(5)
    chosen, rejected = (rewards[torch.from_numpy(side)].bfloat16() for side in ranked.pairs.T)
    targets = ranked.columns.of_step(np.arange(4))(np.arange(4))
    extra = {"penalty_type": "L2", "center_rewards_coefficient": 0.1}
    found = loss_terms(chosen, rejected, targets, ObjectiveFlags(list_loss=kind, **extra))
    plain = loss_terms(chosen, rejected, Targets(), ObjectiveFlags(**extra))
    assert list(found) == list(plain) and all(
        term.dtype == torch.float32 and term.shape == (4,) for term in found.values()
    )
    assert torch.equal(found["penalty"], plain["penalty"]) and torch.equal(found["centering"], plain["centering"])
    assert torch.equal(found["ranking"], list_loss(chosen.float(), rejected.float(), targets.lists))
    assert not torch.equal(found["ranking"], plain["ranking"])


def test_shapes_that_do_not_belong_together_are_refused():
    lists = Ranked([0, 1, 2]).columns.of_step(np.arange(3))(np.arange(3)).lists
    with pytest.raises(ValueError, match="differ in shape"):
        list_loss(torch.zeros(2), torch.zeros(2), lists)
