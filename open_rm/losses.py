"""Per-pair objectives: tensors in, one value per pair out.

Everything is computed in float32 whatever the model's dtype. The caller sums over its pairs and divides by the
number of pairs of the whole step on all ranks, so that no average of averages appears anywhere.
Shapes: B pairs.
"""

import torch
import torch.nn.functional as F


def ranking_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry negative log-likelihood of preferring chosen over rejected, per pair.

    -log sigmoid(r_chosen - r_rejected); InstructGPT, https://arxiv.org/abs/2203.02155, eq. 1.

    Args:
        chosen_rewards: [B] rewards of the chosen responses.
        rejected_rewards: [B] rewards of the rejected responses.

    Returns:
        [B] float32 losses in nats; ln 2 where the two rewards are equal.
    """
    if chosen_rewards.shape != rejected_rewards.shape:  # (B,) against (B, 1) would broadcast to B x B
        raise ValueError(f"rewards differ in shape: {tuple(chosen_rewards.shape)}, {tuple(rejected_rewards.shape)}")
    return -F.logsigmoid(chosen_rewards.float() - rejected_rewards.float())
