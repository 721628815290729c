"""Fused kernels in place of a model's own norms, rotary embeddings and MLPs: Liger's on a GPU, ours on a CPU."""

import torch

from open_rm.errors import quote_error
from open_rm.model import cpu_kernels
from open_rm.model.reward_model import RewardModel


def apply_fused_kernels(model: RewardModel, device: torch.device) -> str:
    """Swap in Liger's fused RMSNorm, RoPE and SwiGLU on a GPU, those of cpu_kernels.py elsewhere; returns the log's line."""
    if device.type != "cuda":
        fused = cpu_kernels.apply(model.classifier) if model.classifier.dtype == torch.float32 else 0
        ours = f"; our own CPU functions for rotary embeddings and norms are on in {fused} modules" if fused else ""
        return f"Liger kernels off: they are Triton kernels and there is no GPU{ours}"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    # Some of Liger's functions know no sequence classifier (Gemma 3), one no bare backbone (Nemotron). Of models that also
    # see, the part that reads.
    backbone = getattr(model.classifier, model.backbone_name)
    backbone = getattr(backbone, "language_model", backbone)
    family = backbone.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger kernels off: liger-kernel has none for {family}"
    # This patches transformers' modules, not only this model: what is built in this process afterwards is not plain.
    # The fused losses of language modelling stay out: there is no vocabulary head here.
    for taken in (backbone, model.classifier):
        try:
            _apply_liger_kernel_to_instance(taken, cross_entropy=False, fused_linear_cross_entropy=False)
            return f"Liger kernels on: fused norm, rotary embedding and MLP for {family}"
        except (TypeError, AttributeError) as error:
            why = quote_error(error)
    return f"Liger kernels off: liger-kernel does not take {type(model.classifier).__name__} ({why})"
