"""The objectives against golden values."""

import math

import pytest
import torch

from open_rm.batching.targets import PLAIN, Targets
from open_rm.flags import ObjectiveFlags
from open_rm.training import losses
from open_rm.training.losses import loss_terms, ranking_loss


def test_equal_rewards_give_ln_2():
    assert ranking_loss(torch.zeros(3), torch.zeros(3)).tolist() == pytest.approx([math.log(2)] * 3)


def test_ranking_loss_equals_its_formula_in_float64():
    margins = torch.tensor([-3.0, -0.5, 0.0, 0.5, 1.0, 2.0, 40.0])
    expected = [math.log1p(math.exp(-d)) for d in margins.tolist()]
    assert ranking_loss(margins, torch.zeros(7)).tolist() == pytest.approx(expected, rel=1e-6)


def test_gradient_is_minus_sigmoid_of_the_negated_margin():
    chosen = torch.tensor([0.3, -1.0], requires_grad=True)
    ranking_loss(chosen, torch.zeros(2)).sum().backward()
    assert torch.allclose(chosen.grad, -torch.sigmoid(-chosen.detach()))


def test_half_precision_rewards_are_computed_in_float32():
    loss = ranking_loss(torch.tensor([5.0], dtype=torch.bfloat16), torch.tensor([0.0], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-5)), rel=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shape"):
        ranking_loss(torch.zeros(4), torch.zeros(4, 1))


def test_a_margin_moves_the_loss_along_and_its_shape_must_be_that_of_the_rewards():
    chosen, rejected = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.5, 0.5, 0.0])
    margins = torch.tensor([0.5, 0.0, -1.0])
    assert torch.equal(ranking_loss(chosen, rejected, margins), ranking_loss(chosen - margins, rejected))
    with pytest.raises(ValueError, match="differ in shape"):
        ranking_loss(chosen, rejected, margins[:, None])


# ---- the other objectives. The expected values are written down from the formulas in float64, without torch.


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def focal(d, gamma=2.0):
    return (1 - 2 * max(sigmoid(d) - 0.5, 0)) ** gamma * -math.log(sigmoid(d))


def barrier(x, b=5.0):
    return -math.log(b - x) - math.log(x + b)


LEADS = [-3.0, -0.5, 0.0, 0.5, 1.0, 2.0, 8.0]


def slope(function, x, step=1e-6):
    return (function(x + step) - function(x - step)) / (2 * step)


def test_focal_golden_values():
    values = losses.focal_loss(torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.zeros(4), gamma=2.0)
    assert values.tolist() == pytest.approx([0.693147, 0.2703, 0.0906, 0.0072], abs=5e-5)


def test_focal_equals_its_formula_and_so_does_its_gradient():
    chosen = torch.tensor(LEADS, requires_grad=True)
    values = losses.focal_loss(chosen, torch.zeros(len(LEADS)), gamma=2.0)
    assert values.tolist() == pytest.approx([focal(d) for d in LEADS], rel=1e-5)
    values.sum().backward()
    # at 0 the two sides have different slopes; there it is ranking's
    expected = [-0.5 if d == 0 else slope(focal, d) for d in LEADS]
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-4)


def test_focal_is_ranking_where_chosen_does_not_lead_and_where_gamma_is_0():
    chosen, rejected, margins = torch.tensor([-2.0, 0.0, 0.4]), torch.zeros(3), torch.tensor([0.0, 0.0, 0.5])
    expected = ranking_loss(chosen, rejected, margins)
    assert torch.allclose(losses.focal_loss(chosen, rejected, margins, gamma=2.0), expected)
    ahead = torch.tensor([3.0, 1.0, 9.0])
    assert torch.allclose(losses.focal_loss(ahead, rejected, gamma=0.0), ranking_loss(ahead, rejected))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_has_a_gradient_however_far_chosen_leads(gamma):
    chosen = torch.tensor([120.0, 1000.0], requires_grad=True)
    losses.focal_loss(chosen, torch.zeros(2), gamma=gamma).sum().backward()
    assert torch.isfinite(chosen.grad).all()


def test_label_smoothing_equals_its_formula():
    values = ranking_loss(torch.tensor(LEADS), torch.zeros(len(LEADS)), label_smoothing=0.1)
    expected = [-0.9 * math.log(sigmoid(d)) - 0.1 * math.log(sigmoid(-d)) for d in LEADS]
    assert values.tolist() == pytest.approx(expected, rel=1e-5)


PROBS = [0.5, 0.6, 0.75, 0.9, 0.99, 1.0, 0.5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_equal_their_formula_alone_and_smoothed(smoothing):
    given = {"label_prob": torch.tensor(PROBS), "label_smoothing": smoothing}
    values = ranking_loss(torch.tensor(LEADS), torch.zeros(len(LEADS)), **given)
    smoothed = [(1 - smoothing) * p + smoothing * (1 - p) for p in PROBS]
    expected = [
        p * -math.log(sigmoid(d)) + (1 - p) * -math.log(sigmoid(-d)) for p, d in zip(smoothed, LEADS, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-5)


def test_labels_that_are_sure_change_no_bit():
    sides = torch.tensor(LEADS), torch.zeros(len(LEADS))
    for smoothing in (0.0, 0.1):
        sure = ranking_loss(*sides, label_prob=torch.ones(len(LEADS)), label_smoothing=smoothing)
        assert torch.equal(sure, ranking_loss(*sides, label_smoothing=smoothing))


def test_a_pair_is_the_same_whichever_side_stands_first():
    sides = torch.tensor(LEADS), torch.zeros(len(LEADS))
    swapped = ranking_loss(*sides[::-1], label_prob=1 - torch.tensor(PROBS))
    assert torch.allclose(ranking_loss(*sides, label_prob=torch.tensor(PROBS)), swapped, rtol=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9])
def test_a_soft_label_is_least_where_the_model_is_as_sure(p):
    """Of a tie where both rewards are equal."""
    chosen = torch.tensor([math.log(p / (1 - p))], requires_grad=True)
    ranking_loss(chosen, torch.zeros(1), label_prob=torch.tensor([p])).sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-6)
    losses = ranking_loss(
        chosen.detach() + torch.tensor([-0.1, 0.0, 0.1]), torch.zeros(3), label_prob=torch.full((3,), p)
    )
    assert losses.argmin() == 1


def test_label_probs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="label_prob differ in shape"):
        ranking_loss(torch.zeros(4), torch.zeros(4), label_prob=torch.ones(4, 1))


def test_soft_labels_of_the_data_reach_the_loss():
    chosen, rejected, p = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.8])
    flags = ObjectiveFlags(label_smoothing=0.2)
    [found] = loss_terms(chosen, rejected, Targets(label_prob=p), flags).values()
    assert torch.equal(found, ranking_loss(chosen, rejected, label_prob=p, label_smoothing=0.2))
    assert not torch.equal(found, loss_terms(chosen, rejected, PLAIN, flags)["ranking"])


DIFFERENTIATED = {
    "ranking": (ranking_loss, lambda c, r: -math.log(sigmoid(c - r))),
    "margin": (lambda c, r: ranking_loss(c, r, torch.tensor([0.7])), lambda c, r: -math.log(sigmoid(c - r - 0.7))),
    "label smoothing": (
        lambda c, r: ranking_loss(c, r, label_smoothing=0.1),
        lambda c, r: -0.9 * math.log(sigmoid(c - r)) - 0.1 * math.log(sigmoid(r - c)),
    ),
    "soft label": (
        lambda c, r: ranking_loss(c, r, label_prob=torch.tensor([0.7])),
        lambda c, r: -0.7 * math.log(sigmoid(c - r)) - 0.3 * math.log(sigmoid(r - c)),
    ),
    "L2": (losses.l2_penalty, lambda c, r: c * c + r * r),
    "centering": (losses.centering_penalty, lambda c, r: (c + r) ** 2),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, 0.0), (1.5, -0.5), (-2.0, 0.25), (3.0, 3.5)])
def test_gradients_of_both_sides_are_those_of_the_formula(name, chosen, rejected):
    ours, formula = DIFFERENTIATED[name]
    sides = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    ours(*sides).sum().backward()
    expected = [slope(lambda c: formula(c, rejected), chosen), slope(lambda r: formula(chosen, r), rejected)]
    assert [side.grad.item() for side in sides] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_barrier_equals_its_formula_inside_the_bounds_and_so_does_its_gradient():
    rewards = [-4.9, -2.0, 0.0, 1.0, 4.99]
    chosen = torch.tensor(rewards, requires_grad=True)
    values = losses.log_barrier_penalty(chosen, torch.full((5,), 0.5), bound=5.0)
    assert values.tolist() == pytest.approx([barrier(x) + barrier(0.5) for x in rewards], rel=1e-4)
    values.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([slope(barrier, x) for x in rewards], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("reward", [4.9995, 5.0, 7.5, 300.0])
@pytest.mark.parametrize("side", [1, -1])
def test_a_reward_beyond_the_barrier_is_pulled_back_and_the_clamped_one_is_not(reward, side):
    chosen = torch.tensor([side * reward], requires_grad=True)
    losses.log_barrier_penalty(chosen, torch.zeros(1), bound=5.0).sum().backward()
    assert chosen.grad.item() * side == pytest.approx(1 / 1e-3 - 1 / 9.999, rel=1e-3)

    clamped = torch.tensor([side * reward], requires_grad=True)  # what XTuner computes
    inside = clamped.clamp(-5 + 1e-3, 5 - 1e-3)
    (-torch.log(5 - inside) - torch.log(inside + 5)).sum().backward()
    assert clamped.grad.item() == 0


def test_the_barrier_has_no_step_where_its_tangent_begins():
    at, beyond = (losses.log_barrier_penalty(torch.tensor([x]), torch.zeros(1), bound=5.0) for x in (4.99899, 4.99901))
    assert beyond.item() - at.item() == pytest.approx(2e-5 * 1000, rel=0.2)


def test_l2_and_centering_equal_their_formulas():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert losses.l2_penalty(chosen, rejected).tolist() == [10.0, 4.25]
    assert losses.centering_penalty(chosen, rejected).tolist() == [16.0, 2.25]


def test_the_first_loss_of_focal_and_log_barrier_with_a_zero_head_is_xtuners():
    flags = ObjectiveFlags(loss_type="focal", penalty_type="log_barrier")
    terms = loss_terms(torch.zeros(4), torch.zeros(4), PLAIN, flags)
    assert list(terms) == ["ranking", "penalty"]
    assert sum(terms.values()).mean().item() == pytest.approx(0.628770, abs=1e-6)


@pytest.mark.parametrize("penalty_type", ["log_barrier", "L2"])
def test_terms_are_weighted_float32_and_one_value_per_pair(penalty_type):
    chosen, rejected = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([0.5, 3.0], dtype=torch.bfloat16)
    how = {"penalty_type": penalty_type, "penalty_bound": 7.0}
    single = ObjectiveFlags(penalty_weight=0.5, center_rewards_coefficient=0.25, **how)
    double = ObjectiveFlags(penalty_weight=1.0, center_rewards_coefficient=0.5, **how)
    terms, doubled = (loss_terms(chosen, rejected, PLAIN, flags) for flags in (single, double))
    assert list(terms) == ["ranking", "penalty", "centering"]
    assert all(term.shape == (2,) and term.dtype == torch.float32 for term in terms.values())
    for name, factor in (("ranking", 1), ("penalty", 2), ("centering", 2)):
        assert torch.allclose(doubled[name], factor * terms[name])


@pytest.mark.parametrize("loss_type", ["ranking", "focal"])
def test_margins_of_the_data_reach_the_loss(loss_type):
    chosen, rejected, margins = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.5, 2.0])
    flags = ObjectiveFlags(loss_type=loss_type)
    [with_margins] = loss_terms(chosen, rejected, Targets(margins), flags).values()
    [moved] = loss_terms(chosen - margins, rejected, PLAIN, flags).values()
    assert torch.equal(with_margins, moved)
    assert not torch.equal(with_margins, loss_terms(chosen, rejected, PLAIN, flags)["ranking"])
