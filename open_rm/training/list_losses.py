"""Objectives of whole ranked lists: the likelihood of a ranking, and of its best answer.

Both are one formula. The answers of a list have levels, 0 the best, equal ones where they are tied. With r the rewards:

    loss of a list = sum over answers i of -log( e^r_i / (e^r_i + sum of e^r_j over the answers j of greater level) )

plackett_luce   the levels are those of the ranking. Without ties it is the negative log-likelihood of Plackett and Luce (Luce 1959,
                Plackett 1975, https://doi.org/10.2307/2346567): the best is chosen among all, the second among the rest, and so on.
                Tied answers are not compared with each other; each is chosen among itself and all that are strictly worse.
best_of_k       there are two levels, the best and the rest, and the sum is a mean over the best (several where they are tied):
                cross-entropy of choosing the best among all. Tied best answers do not compete with each other.

A list of two answers has one term, -log sigmoid(r_1 - r_2): Bradley-Terry, bit for bit.
"""

import torch
import torch.nn.functional as F

from open_rm.batching.targets import Lists


def list_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, lists: Lists) -> torch.Tensor:
    """Losses of the lists of a micro-batch, each whole in it, as a value per pair: a list's at its first pair, 0 at the others.

    Divided by the step's pairs on all ranks, as every loss is, their sum over all ranks is the mean over the step's lists: see
    TargetColumns.of_step, which makes the weights. What is compared is decided by tensors alone, so no device is waited for.

    Args:
        chosen_rewards, rejected_rewards: [B].  lists: on their device.

    Returns:
        [B] float32, in nats.
    """
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.shape != lists.weight.shape:
        shapes = ", ".join(str(tuple(one.shape)) for one in (chosen_rewards, rejected_rewards, lists.weight))
        raise ValueError(f"rewards and lists differ in shape: {shapes}")
    rewards = torch.cat((chosen_rewards, rejected_rewards)).float()[lists.index]  # [L, K]
    level = lists.level
    # [L, K, K]: whether the last answer is worse than the one before it
    worse = (level[:, None, :] > level[:, :, None]) & (level[:, :, None] >= 0)
    behind = rewards[:, None, :] - rewards[:, :, None]
    # -log(e^a / (e^a + sum e^b)) = -log sigmoid(-log sum e^(b - a)). The least number in place of -inf: an answer that has none
    # worse, or that is none, has a loss of 0 then, and a gradient of 0 instead of none.
    others = behind.masked_fill(~worse, torch.finfo(torch.float32).min).logsumexp(dim=2)
    of_lists = -F.logsigmoid(-others).sum(dim=1)
    return of_lists[lists.of_pair] * lists.weight
