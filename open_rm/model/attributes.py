"""Regression heads beside the preference's, one for each attribute, which the saved folder holds as one row.

While training the score head has 1 + K rows: row 0 is the preference's, row k predicts attribute k less its mean. The reward is

    r = row · h,    row = w_0 + sum over k of weight_k * w_k,    rounded to the head's dtype

a linear function of the hidden state h again, so that saving `row` as a head of one label gives every client the reward of
training, bit for bit as far as the products are. Wang et al. 2024 (HelpSteer2, https://arxiv.org/abs/2406.08673) combine five
such heads by given weights; Wang et al. 2024 (ArmoRM, https://arxiv.org/abs/2406.12845) by weights that a gate finds, which is
no linear function and not covered.
Shapes: K attributes, D hidden width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from open_rm.errors import UserError
from open_rm.model import families

HEAD = "score."  # what the names of a decoder's head begin with


def check(config, weights: Sequence[float], name: str) -> None:
    """Refuse --attributes where the saved row would not give the reward of training.

    Raises:
        UserError: an encoder, whose head is called with its pooling and gives one number.
    """
    if weights and config.model_type in families.ENCODERS:
        raise UserError(
            f"--attributes: {name} is an encoder ({config.model_type}), whose own pooling and head give one number; name a "
            "decoder, or leave out --attributes and --attribute_weights"
        )


def add_rows(head: nn.Linear, count: int) -> None:
    """Give a head of one row `count` more of zeros, in place: the first rewards are those without them."""
    if not count:
        return
    with torch.no_grad():
        rows = torch.zeros(1 + count, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
        rows[0] = head.weight[0]
    head.weight = nn.Parameter(rows, requires_grad=head.weight.requires_grad)
    head.out_features = 1 + count


def merged_row(weight: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """[1, D] the row that gives the reward. weight: [1 + K, D].  weights: [K]."""
    if not len(weights):
        return weight
    row = weight[:1].float()
    for number, factor in enumerate(weights, start=1):  # no tensor of the weights: making one would wait for a GPU
        row = row + factor * weight[number : number + 1].float()
    return row.to(weight.dtype)


def merged_state(state: dict[str, torch.Tensor], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The weights to save, by the names of a decoder's classifier: those of the head, and of peft's copies of it, as one row."""
    return {name: merged_row(tensor, weights) if name.startswith(HEAD) else tensor for name, tensor in state.items()}
