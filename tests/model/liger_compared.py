"""Liger's kernels beside the plain model, in rewards and gradients. For processes of their own: Liger changes transformers.

On a GPU as they are; without one by Triton's interpreter, which runs each kernel program by program in numpy.
"""

import tempfile
from types import SimpleNamespace

import torch
import transformers
from test_layouts_agree import FAMILIES

from open_rm.batching.layouts import lay_out
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import ModelFlags
from open_rm.model import kernels
from open_rm.model.loading import load_reward_model
from open_rm.training.losses import ranking_loss

CASES = FAMILIES | {"phi3 rotated in part": lambda: FAMILIES["phi3"](partial_rotary_factor=0.5)}  # Phi-4-mini
# A prompt with three responses and one with two, few and short: an interpreted token takes a tenth of a second.
P = [5, 6, 7, 8]
PAIRS = [(P + [20, 21], P + [30]), (P + [20, 21], P + [40]), ([9, 50], [9, 60, 61])]
PROMPT_IDS = [0, 0, 1]


def interpret() -> None:
    """What Triton's interpreter lacks for Liger's kernels. TRITON_INTERPRET=1 has to be set before triton is imported."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def convert(argument):  # a float stays Python's there, and kernels call .to() of it
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return plain(argument)

    interpreter._implicit_cvt = convert
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # theirs are of libdevice, which is for GPUs
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=2, major=9, minor=0)
    tried = kernels._why_triton_fails
    kernels._why_triton_fails = lambda _: tried(torch.device("cpu"))


def compared(cases: list[tuple[str, str, bool]], tokenizer_folder: str, device: str, dtype: torch.dtype) -> dict:
    """By case, (family, layout, checkpointing): the log's line, and how far plain and fused are from plain in float32 on a CPU.

    [rewards, gradients]: the largest difference; and the largest of a parameter's, norm over norm, where a norm below a
    hundredth of the largest parameter's counts as that.
    """
    tokenizer, folders, found = load_tokenizer(tokenizer_folder), {}, {}
    for family in {family for family, *_ in cases}:
        folders[family] = tempfile.mkdtemp()
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(CASES[family]()).save_pretrained(folders[family])

    def load(family, layout, checkpointing, device, dtype):
        flags = ModelFlags(model_name_or_path=folders[family])
        model, _ = load_reward_model(flags, tokenizer, layout=layout, dtype=dtype)
        if checkpointing:
            model.classifier.activation_checkpointing_enable()
        return model.to(device)

    references = {case: _results(load(*case, "cpu", torch.float32), case[1]) for case in cases}
    for case in cases:  # all of them before Liger changes transformers
        found[case] = {"plain": _apart(_results(load(*case, device, dtype), case[1]), references[case])}
    for case in cases:
        model = load(*case, device, dtype)
        found[case]["line"] = kernels.apply_fused_kernels(model, torch.device("cuda"))
        found[case]["fused"] = _apart(_results(model, case[1]), references[case])
    return {", ".join(map(str, case)): values for case, values in found.items()}


def _results(model, layout: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = lay_out(layout, PAIRS, pad_token_id=2, prompt_ids=PROMPT_IDS)
    rewards = model(**batch.inputs(next(model.parameters()).device))
    ranking_loss(*rewards.chunk(2)).sum().backward()
    return rewards.detach().cpu(), {name: weight.grad.float().cpu() for name, weight in model.named_parameters()}


def _apart(results, reference) -> list[float]:
    (rewards, gradients), (expected, right) = results, reference
    assert gradients.keys() == right.keys()
    least = 0.01 * max(gradient.norm() for gradient in right.values())
    of_each = [(gradients[name] - right[name]).norm() / right[name].norm().clamp(min=least) for name in right]
    return [(rewards - expected).abs().max().item(), max(of_each).item()]
