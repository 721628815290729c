"""Who takes part in the GPU profile, and why somebody may not."""

import torch

CONTESTANTS = {
    "shared_prefix": {"trainer": "ours", "layout": "shared_prefix"},
    "shared_prefix, float8": {"trainer": "ours", "layout": "shared_prefix", "float8": True},
    "packed": {"trainer": "ours", "layout": "packed"},
    "padded": {"trainer": "ours", "layout": "padded"},
    "TRL": {"trainer": "trl", "weights": "float32"},
    "TRL bfloat16": {"trainer": "trl", "weights": "bfloat16", "sorts": True},
    "TRL bfloat16, flash attention": {"trainer": "trl", "weights": "bfloat16", "sorts": True, "attention": "flash"},
}
# Beside the tables, where a name does not say enough.
MEANS = {
    "packed": "our recipe without shared prefixes: the peer that packs with FlashAttention",
    "TRL": "as shipped, float32 weights with bfloat16 autocast, and Liger's kernels",
    "TRL bfloat16": "tuned: bfloat16 weights and moments (ours keeps float32 ones), a step's pairs sorted by length, Liger",
    "TRL bfloat16, flash attention": "the same with flash attention instead of sdpa",
}


def why_not(name: str) -> str | None:
    """Why a contestant cannot run on this device, None where it can."""
    contestant = CONTESTANTS[name]
    if contestant.get("float8"):
        return _why_no_float8()
    if contestant.get("attention") == "flash" and flash_attention() is None:
        return "neither flash-attn 2 nor flash-attn-4 can be imported, or there is no GPU"
    return None


def flash_attention() -> str | None:
    """The name by which transformers knows the newest flash attention that is installed here, of versions 4 and 2."""
    from transformers.utils import import_utils

    for version in (4, 2):
        available = getattr(import_utils, f"is_flash_attn_{version}_available", None)
        if torch.cuda.is_available() and available is not None and available():
            return f"flash_attention_{version}"
    return None


def _why_no_float8() -> str | None:
    try:
        from open_rm.model import float8
    except ImportError as error:  # of Triton
        return f"float8 cannot be imported ({error})"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    trained = {"use_peft": False, "freeze_backbone": False}
    return float8.why_not(capability=capability, dtype=torch.bfloat16, family="llama", **trained)
