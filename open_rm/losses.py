"""Per-pair objectives: tensors in, one value per pair out.

Everything is computed in float32 whatever the model's dtype. The caller sums over its pairs and divides by the
number of pairs of the whole step on all ranks, so that no average of averages appears anywhere.
Shapes: B pairs.
"""

import torch
import torch.nn.functional as F


def ranking_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, margins: torch.Tensor | None = None
) -> torch.Tensor:
    """Bradley-Terry negative log-likelihood of preferring chosen over rejected, per pair.

    -log sigmoid(r_chosen - r_rejected - m); InstructGPT, https://arxiv.org/abs/2203.02155, eq. 1, with the margin m of
    Llama 2, https://arxiv.org/abs/2307.09288, eq. 2.

    Args:
        chosen_rewards: [B] rewards of the chosen responses.
        rejected_rewards: [B] rewards of the rejected responses.
        margins: [B] by how much chosen should lead, in units of reward; None is 0.

    Returns:
        [B] float32 losses in nats; ln 2 where chosen leads by just the margin.
    """
    margins = torch.zeros_like(chosen_rewards) if margins is None else margins
    if (
        not chosen_rewards.shape == rejected_rewards.shape == margins.shape
    ):  # (B,) against (B, 1) would broadcast to B x B
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (chosen_rewards, rejected_rewards, margins))
        raise ValueError(f"rewards and margins differ in shape: {shapes}")
    return -F.logsigmoid(chosen_rewards.float() - rejected_rewards.float() - margins.float())
