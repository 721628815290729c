"""The objectives against golden values."""

import math

import pytest
import torch

from open_rm.losses import ranking_loss


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
