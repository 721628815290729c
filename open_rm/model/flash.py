"""Which flash attention computes packed rows on a GPU.

torch's own is version 2. It puts version 3 (for Hopper) or 4 (for Hopper and Blackwell) in its place where their packages
are installed. Both move with torch, and not always together: torch 2.11 calls version 4's backward in a way that refuses
windows; torch 2.13 expects two values of its forward, and from 4.0.0b19 on flash-attn-4 returns more. So a newer one is
tried on a small row, forward and backward, and kept only where it says the same as torch's own.
Not covered: padded rows, which go through scaled_dot_product_attention.
"""

import importlib.util

import torch
from torch.nn import attention as of_torch

from open_rm.batching.attention import make_segments, segment_attention
from open_rm.errors import quote_error
from open_rm.model.families import attention_shape

# By torch's name: what torch imports for it, and what it is called in the log.
NEWER = {
    "FA3": ("flash_attn_interface", "flash attention 3 (flash_attn_interface)"),
    "FA4": ("flash_attn.cute.interface", "flash attention 4 (flash-attn-4)"),
}
# By the GPU's major compute capability, the better first; torch's _fa3.py and _fa4.py refuse others.
MADE_FOR = {9: ("FA3", "FA4"), 10: ("FA4",)}
OWN = "attention over packed rows: torch's own flash attention 2"

# Two sequences of a prompt and a packed one, longer than a kernel's tile of 128; a window inside all of them.
BOUNDS = [(0, 300, ()), (300, 430, ((0, 150),)), (430, 600, ())]
WINDOW = 100
# Norm of the difference over the norm. bfloat16 keeps 8 bits: rounding gives some 4e-3; a key too many or too few for each
# query, 5e-2 and more.
TOLERANCE = 2e-2


def activate(config, layout: str, device: torch.device, capability: tuple[int, int] | None) -> str | None:
    """Let packed rows be computed by the newest flash attention that is installed and right here.

    It is torch's setting, for the whole process. Version 4 is compiled when it is tried, for some seconds, as it would be in
    the first forward.

    Args:
        config: the model's transformers config.  layout: from `families.choose_layout`.
        device: where the model is computed.  capability: its compute capability (major, minor); None where it is no GPU.

    Returns:
        The line for the log; None where rows are not packed or there is no GPU.
    """
    _restore()  # an earlier run of this process may have left one
    if layout == "padded" or capability is None:
        return None
    if capability[0] not in MADE_FOR:
        return f"{OWN}; newer ones are for GPUs of compute capability 9 and 10, and this one has {capability[0]}"
    if not hasattr(of_torch, "activate_flash_attention_impl"):
        return f"{OWN}; torch {torch.__version__} knows no other"
    refused, missing = [], []
    for name in MADE_FOR[capability[0]]:
        module, called = NEWER[name]
        if not _importable(module):
            missing.append(f"{called} is not installed")
        elif why := _why_not(name, config.get_text_config(), device):
            refused.append(f"{called} is installed and not used: {why}")
        else:
            return "; ".join([f"attention over packed rows: {called}, which was tried against torch's own", *refused])
    return "; ".join([OWN, *refused, *missing])


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it is in, e.g. a flash_attn built for another torch
        return False


def _why_not(name: str, text, device: torch.device) -> str | None:
    """Activate it and compare; where it is not right, torch's own is back and the reason is returned."""
    windows = [None] if getattr(text, "sliding_window", None) is None else [None, WINDOW]
    # choose_layout has seen that torch's own takes this shape
    own = [_computed(text, device, window) for window in windows]
    try:
        of_torch.activate_flash_attention_impl(name)
        newer = [_computed(text, device, window) for window in windows]
        why = None if _same(newer, own) else "its results differ from those of torch's own"
    except Exception as error:  # a package of another time, a GPU it does not know: whatever it is, torch's own works
        why = quote_error(error)
    if why:
        _restore()
    return why


def _restore() -> None:
    """torch's own flash attention again; torch 2.10 and older know no other."""
    current = getattr(of_torch, "current_flash_attention_impl", lambda: None)
    if current() is not None:
        of_torch.restore_flash_attention_impl()


def _computed(text, device: torch.device, window: int | None) -> list[torch.Tensor]:
    """Outputs [1, T, H, D] and the gradients of q, k and v, for heads as this model has them."""
    heads, key_heads, width = attention_shape(text)
    segments = make_segments(BOUNDS)
    tokens, generator = BOUNDS[-1][1], torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(1, n, tokens, width, generator=generator).to(device, torch.bfloat16)
        for n in (heads, key_heads, key_heads, heads)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    out, _ = segment_attention(None, *inputs, None, segments=segments.to(device), sliding_window=window)
    results = (out.detach(), *torch.autograd.grad(out, inputs, upstream.transpose(1, 2)))
    return [tensor.float() for tensor in results]


def _same(newer: list[list[torch.Tensor]], own: list[list[torch.Tensor]]) -> bool:
    pairs = [pair for results in zip(newer, own, strict=True) for pair in zip(*results, strict=True)]
    return all((a - b).norm() <= TOLERANCE * b.norm() for a, b in pairs)  # False where one is no number
