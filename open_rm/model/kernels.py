"""What makes a model fast on its device: fused kernels (Liger's on a GPU, ours on a CPU), flash attention, 8-bit products."""

import torch

from open_rm.errors import UserError, quote_error
from open_rm.flags import ModelFlags
from open_rm.model import cpu_kernels, flash
from open_rm.model.reward_model import RewardModel


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """A GPU's compute capability, such as (9, 0) for Hopper; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def use_fastest(model: RewardModel, device: torch.device, layout: str, *, float8: bool) -> list[str]:
    """Put all of it to use, in place; returns lines for the log.

    layout: from `families.choose_layout`.  float8: as --float8 asks, which `check_float8` has let pass.
    """
    # a sequence group computes padded rows as one row of segments
    rows = "packed" if model.sequence_group is not None else layout
    lines = [
        apply_fused_kernels(model, device),
        flash.activate(model.classifier.config, rows, device, capability_of(device)),
    ]
    if float8:
        from open_rm.model import float8 as eight_bits  # here, since it needs Triton

        lines.append(eight_bits.apply(model))
    return [line for line in lines if line]


def check_float8(flags: ModelFlags, config, device: torch.device, dtype: torch.dtype, *, use_peft: bool) -> None:
    """Refuse --float8 where it cannot be; config: the model's of transformers."""
    if not flags.float8:
        return
    from open_rm.model import float8

    how = {"capability": capability_of(device), "dtype": dtype, "family": config.get_text_config().model_type}
    why = float8.why_not(**how, use_peft=use_peft, freeze_backbone=flags.freeze_backbone) or float8.why_it_fails(device)
    if why:
        raise UserError(f"--float8 is not possible: {why}; leave it out")


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
    if why := _why_triton_fails(device):
        return f"Liger kernels off: Triton cannot compile here ({why}); install gcc and the Python headers"
    # This patches transformers' modules, not only this model: what is built in this process afterwards is not plain.
    # The fused losses of language modelling stay out: there is no vocabulary head here.
    for taken in (backbone, model.classifier):
        try:
            _apply_liger_kernel_to_instance(taken, cross_entropy=False, fused_linear_cross_entropy=False)
            return f"Liger kernels on: fused norm, rotary embedding and MLP for {family}"
        except (TypeError, AttributeError) as error:
            why = quote_error(error)
    return f"Liger kernels off: liger-kernel does not take {type(model.classifier).__name__} ({why})"


def _why_triton_fails(device: torch.device) -> str | None:
    """The first line of its error, None where it works: one small kernel is tried, because Triton builds each kernel's
    launcher with a C compiler at its first call, which would be in the middle of the first forward."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    try:
        LigerSiLUMulFunction.apply(*torch.ones(2, 1, 8, device=device))
    except Exception as error:  # of the compiler, the driver, the files that Triton keeps: it has no class of its own
        return quote_error(error)
    return None
