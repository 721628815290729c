"""What Liger's kernels are to a GPU, for the CPU: rotary embeddings and RMS norms in fewer passes over memory.

On a CPU the matrix products of a small model take half of a step; the rest is many passes over activations, and
transformers' rotary embedding (negate, concatenate, multiply, and slices whose gradients are filled with zeros) and RMS
norm make most of them. Here each is one function with its gradient written out. Bound to the modules of one model:
nothing else in the process is changed. Only modules whose code is Llama's are replaced, so that the mathematics is known.
"""

import types

import torch
from transformers.models.llama import modeling_llama


class _Rotary(torch.autograd.Function):
    """RoFormer (https://arxiv.org/abs/2104.09864, equation 34) in the half-split order of Llama. x: [S, H, T, D]; cos, sin:
    [S, 1, T, D]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1)

    @staticmethod
    def backward(ctx, gradient):
        return _rotate(gradient, *ctx.saved_tensors, sign=-1), None, None  # a rotation's transpose turns back


def _rotate(x, cos, sin, sign):
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    """In place of transformers' apply_rotary_pos_emb."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) (https://arxiv.org/abs/1910.07467, equation 4). x: [..., D]; w: [D]."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        product = gradient * normed
        of_weight = product.flatten(0, -2).sum(0)
        along = (product @ weight).unsqueeze(-1) / x.shape[-1]
        return (gradient * weight).addcmul_(normed, along, value=-1).mul_(inverse), of_weight, None


def _norm(self, hidden_states):
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def apply(model: torch.nn.Module) -> int:
    """Bind the functions to a float32 model's modules; returns how many modules were bound."""
    bound = 0
    norm, rotation = modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb
    for module in model.modules():
        forward = type(module).forward
        if getattr(forward, "__code__", None) is None:
            continue
        if type(module).__name__.endswith("RMSNorm") and _same_code(forward, norm):
            module.forward = types.MethodType(_norm, module)
            bound += 1
        elif (
            "apply_rotary_pos_emb" in forward.__code__.co_names
            and _same_code(forward.__globals__.get("apply_rotary_pos_emb"), rotation)
            and _same_code(forward.__globals__.get("rotate_half"), modeling_llama.rotate_half)
        ):
            own = types.FunctionType(
                forward.__code__,
                forward.__globals__ | {"apply_rotary_pos_emb": rotary},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            module.forward = types.MethodType(own, module)
            bound += 1
    return bound


def _same_code(a, b) -> bool:
    """Whether two functions do the same, documentation aside."""

    def essence(function) -> tuple | None:
        code = getattr(function, "__code__", None)
        numbers = code and [constant for constant in code.co_consts if not isinstance(constant, str)]
        return code and (code.co_code, code.co_names, numbers)

    return essence(a) is not None and essence(a) == essence(b)
