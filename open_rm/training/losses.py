"""Per-pair objectives: tensors in, one value per pair out. Those of ranked lists are in list_losses.py.

Everything is computed in float32 whatever the model's dtype. The caller sums over its pairs and divides by the
number of pairs of the whole step on all ranks, so that no average of averages appears anywhere.
Shapes: B pairs, K attributes.
"""

import math

import torch
import torch.nn.functional as F

from open_rm.batching.targets import Targets
from open_rm.bounds import BARRIER_EDGE
from open_rm.flags import ObjectiveFlags
from open_rm.training.list_losses import list_loss


def loss_terms(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    targets: Targets,
    flags: ObjectiveFlags,
    predicted: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The weighted terms whose sum is the loss: ranking; penalty, centering and attributes where they are switched on.

    A new term is a function below, and a line here.

    Args:
        chosen_rewards, rejected_rewards: [B]; see `ranking_loss`.  targets: of these pairs, may be on the CPU.
        predicted: [B, 2, K]; see `attribute_loss`. None where no attributes are trained.

    Returns:
        [B] float32 each.
    """
    both = chosen_rewards, rejected_rewards
    targets = targets.to(chosen_rewards.device)
    if flags.list_loss != "pairs":
        terms = {"ranking": list_loss(*both, targets.lists)}
    elif flags.loss_type == "focal":
        terms = {"ranking": focal_loss(*both, targets.margins, gamma=flags.focal_gamma)}
    else:
        known = {"label_prob": targets.label_prob, "label_smoothing": flags.label_smoothing}
        terms = {"ranking": ranking_loss(*both, targets.margins, **known)}
    if flags.penalty_type == "log_barrier":
        terms["penalty"] = flags.penalty_weight * log_barrier_penalty(*both, bound=flags.penalty_bound)
    elif flags.penalty_type == "L2":
        terms["penalty"] = flags.penalty_weight * l2_penalty(*both)
    if flags.center_rewards_coefficient:
        terms["centering"] = flags.center_rewards_coefficient * centering_penalty(*both)
    if targets.attributes is not None:
        terms["attributes"] = flags.attribute_coefficient * attribute_loss(predicted, targets.attributes)
    return terms


def ranking_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margins: torch.Tensor | None = None,
    *,
    label_prob: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Bradley-Terry negative log-likelihood of preferring chosen over rejected, per pair.

    -log sigmoid(d), d = r_chosen - r_rejected - m; InstructGPT, https://arxiv.org/abs/2203.02155, eq. 1, with the margin m
    of Llama 2, https://arxiv.org/abs/2307.09288, eq. 2.

    Args:
        chosen_rewards: [B] rewards of the chosen responses.
        rejected_rewards: [B] rewards of the rejected responses.
        margins: [B] by how much chosen should lead, in units of reward; None is 0.
        label_prob: [B] how probable it is that chosen is the better one, p * -log sigmoid(d) + (1 - p) * -log sigmoid(-d):
            cross-entropy with p, least where sigmoid(d) = p; of a tie, p = 0.5, where both rewards are equal. None is 1.
        label_smoothing: the share e of labels taken to be swapped, (1 - e) * -log sigmoid(d) + e * -log sigmoid(-d);
            conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3) on rewards. p becomes
            (1 - e) p + e (1 - p).

    Returns:
        [B] float32 losses in nats; ln 2 where chosen leads by just the margin.
    """
    lead = _lead(chosen_rewards, rejected_rewards, margins)
    swapped = label_smoothing  # probability that rejected is the better one
    if label_prob is not None:
        if label_prob.shape != lead.shape:
            raise ValueError(f"rewards and label_prob differ in shape: {tuple(lead.shape)}, {tuple(label_prob.shape)}")
        swapped = label_smoothing + (1 - 2 * label_smoothing) * (1 - label_prob.float())
    # -log sigmoid(-d) = d - log sigmoid(d)
    return swapped * lead - F.logsigmoid(lead)


def focal_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, margins: torch.Tensor | None = None, *, gamma: float
) -> torch.Tensor:
    """`ranking_loss` with less weight on pairs that are already right, per pair.

    (1 - 2 * relu(sigmoid(d) - 1/2))^gamma * -log sigmoid(d); InternLM2, https://arxiv.org/abs/2403.17297, section 4.3.1.
    The gradient flows through the weight too. Where chosen does not lead, it is `ranking_loss`.

    Args, Returns: as `ranking_loss`.  gamma: 0 is `ranking_loss`.
    """
    lead = _lead(chosen_rewards, rejected_rewards, margins)
    # 1 - 2 * (sigmoid(d) - 1/2) = 2 * sigmoid(-d); its logarithm neither cancels nor vanishes where d is large
    weight = torch.exp(gamma * (math.log(2) + F.logsigmoid(-F.relu(lead))))
    return weight * -F.logsigmoid(lead)


def log_barrier_penalty(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, *, bound: float) -> torch.Tensor:
    """A wall on both sides of the rewards, per pair: the sum over both of -ln(bound - r) - ln(bound + r).

    InternLM2, section 4.3.1, as XTuner sums it. XTuner clamps r to +-(bound - 1e-3), where the gradient ends; here
    the tangent at that point goes on, so a reward beyond the wall is pulled back.

    Args:
        chosen_rewards, rejected_rewards: [B].  bound: in units of reward, above 1e-3.

    Returns:
        [B] float32; -4 ln(bound) where both rewards are 0.
    """
    edge = bound - BARRIER_EDGE
    slope = 1 / (bound - edge) - 1 / (bound + edge)

    def wall(rewards: torch.Tensor) -> torch.Tensor:
        inside = rewards.clamp(-edge, edge)
        return slope * F.relu(rewards.abs() - edge) - torch.log(bound - inside) - torch.log(bound + inside)

    return wall(chosen_rewards.float()) + wall(rejected_rewards.float())


def l2_penalty(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """[B] float32 sum of both squared rewards, as XTuner's penalty_type="L2"."""
    return chosen_rewards.float() ** 2 + rejected_rewards.float() ** 2


def centering_penalty(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """[B] float32 (r_chosen + r_rejected)^2, which fixes the zero of the rewards; https://arxiv.org/abs/2312.09244, eq. 2."""
    return (chosen_rewards.float() + rejected_rewards.float()) ** 2


def attribute_loss(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the attributes of both answers, per pair, over those that are known.

    (sum over known (side, k) of (y_side,k - a_side,k)^2) / (how many are known), a the attribute less its mean in the training
    data; 0 where none is known. The loss of HelpSteer2's regression reward models (Wang et al. 2024,
    https://arxiv.org/abs/2406.08673), which take an answer at a time: where all are known, a pair's loss is the mean of its two
    answers'.

    Args:
        predicted: [B, 2, K] y, of chosen and of rejected.  targets: [B, 2, K] a, NaN where one is not known.

    Returns:
        [B] float32, in squared units of the attributes.
    """
    if predicted.shape != targets.shape:
        raise ValueError(f"predicted and attributes differ in shape: {tuple(predicted.shape)}, {tuple(targets.shape)}")
    known = ~targets.isnan()
    # Zeros take the places that are not known before anything is computed: a NaN's gradient would be NaN, times 0 too.
    difference = torch.where(known, predicted.float(), 0.0) - torch.where(known, targets.float(), 0.0)
    return difference.square().sum((1, 2)) / known.sum((1, 2)).clamp(min=1)


def _lead(chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None) -> torch.Tensor:
    """[B] float32 r_chosen - r_rejected - margin."""
    margins = torch.zeros_like(chosen) if margins is None else margins
    if not chosen.shape == rejected.shape == margins.shape:  # (B,) against (B, 1) would broadcast to B x B
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (chosen, rejected, margins))
        raise ValueError(f"rewards and margins differ in shape: {shapes}")
    return chosen.float() - rejected.float() - margins.float()
