"""float8: the large matrix products of training in 8 bits, about twice as fast a product as bfloat16's on Hopper and later.

Of a linear layer's three products two are computed in e4m3 (4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433), and the third as ever:

    output            x W^T    a scale for each token of x and for each output channel of W
    input's gradient  g W      a scale for each token of g and for each input channel of W
    weight gradient   g^T x    bfloat16: what a step adds to the weights; no padding of tokens to multiples of 16 either

This is torchao's recipe rowwise_with_gw_hp with a finer scale for W in the second product. Scales are made from the numbers at
hand and powers of two, so that scaling itself rounds nothing. A scale per token, not per tensor: a token's values never depend
on its neighbours in the micro-batch. Not in float8: the last decoder layer, which is what a reward is read from, the score
head, embeddings, norms, attention, and layers too small to gain.
Evaluation computes in bfloat16, as clients do: float8 is a way to train, and the weights stay what they were in memory and in
every file (float8 copies live as long as a product). Every ZeRO stage works: nothing holds on to a view of a weight.
torchao's own Float8Linear is not used: its casts are single passes over memory that it leaves to torch.compile to fuse, and
without that it is slower than bfloat16 (https://github.com/pytorch/ao/issues/2262). Here a cast is one kernel.
Shapes: T tokens, D inputs, E outputs of a layer.
"""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import nn

from open_rm.errors import UserError, quote_error
from open_rm.model import families
from open_rm.model.reward_model import RewardModel, size_of

HOPPER = (9, 0)
LARGEST = tl.constexpr(448.0)  # of e4m3
# Rows of smaller numbers are scaled as if this were their largest: scales stay finite.
SMALLEST_ROW = tl.constexpr(2.0**-100)
# A product takes time as D * E, its casts as D + E. By a GPU's rates (700 and 1200 TFLOP/s, 3.5 TB/s) both are even near
# D * E / (D + E) = 700; left out are e.g. the keys and values of grouped attention.
WORTH = 1024


def why_not(
    *, capability: tuple[int, int] | None, dtype: torch.dtype, family: str, use_peft: bool, freeze_backbone: bool
) -> str | None:
    """Why a run cannot train in float8; None where it can.

    Args:
        capability: compute capability of the device, None where it is no GPU.
        dtype: that the model computes in.
        family: model_type of the text part of the model's config.
    """
    if capability is None:
        return "8-bit products need a GPU, Hopper or later (compute capability 9.0), and there is none"
    if capability < HOPPER:
        return f"8-bit products need Hopper or later (compute capability 9.0), and this GPU has {capability[0]}.{capability[1]}"
    if dtype != torch.bfloat16:
        return f"it goes with --dtype bfloat16, and this run computes in {str(dtype).removeprefix('torch.')}"
    if use_peft:
        return "with --use_peft the large matrices are frozen, and rewards would be learned beside their rounding"
    if freeze_backbone:
        return "with --freeze_backbone the large matrices are frozen, and the head would be learned from their rounding"
    if family not in families.SEGMENTS:
        return f"which linear layers are safe in 8 bits is not known for {family}; it is for {', '.join(families.SEGMENTS)}"
    return None


def why_it_fails(device: torch.device) -> str | None:
    """The first line of the error of a small product there; None where it works. Not every GPU's products take a scale for
    each row, and the cast is a kernel that Triton compiles with a C compiler."""
    try:
        _Product.apply(*torch.ones(2, 16, 16, device=device, dtype=torch.bfloat16))
    except Exception as error:  # of the compiler, the driver, the library: it has no class of its own
        return quote_error(error)
    return None


def apply(model: RewardModel, *, worth: int = WORTH) -> str:
    """Let the large linear layers of all decoder layers but the last compute in float8 while training; in place.

    Parameters, their names and hooks on modules stay, so that ZeRO, checkpoints and files see no difference. To be called
    on a model of a family that `why_not` lets pass, in bfloat16.

    Args:
        worth: least D * E / (D + E) of a layer.

    Returns:
        the log's line.

    Raises:
        UserError: no layer is large enough.
    """
    backbone = getattr(model.classifier, model.backbone_name)
    *layers, _ = getattr(backbone, "language_model", backbone).layers
    linear = [module for layer in layers for module in layer.modules() if type(module) is nn.Linear]
    chosen = [module for module in linear if _gains(module, worth)]
    if not chosen:
        raise UserError(
            "--float8 is not possible: no linear layer before the last decoder layer is large enough to gain from it; leave it out"
        )
    for module in chosen:
        module.__class__ = Float8Linear
    weights = sum(size_of(module.weight) for module in chosen)
    share = weights / sum(map(size_of, model.parameters()))
    return (
        f"float8 on: {len(chosen)} linear layers with {share:.0%} of the weights compute outputs and their inputs' gradients in "
        "e4m3, a scale for each token and each channel; weight gradients, the last decoder layer and evaluation in bfloat16"
    )


def _gains(module: nn.Linear, worth: int) -> bool:
    """Whether float8 pays, and whether the GPU's kernels take its sizes."""
    ins, outs = module.in_features, module.out_features
    return ins % 16 == 0 and outs % 16 == 0 and ins * outs >= worth * (ins + outs)


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """While open the model computes in bfloat16 in training mode too, as if `apply` had not been called."""
    swapped = [module for module in model.modules() if type(module) is Float8Linear]
    for module in swapped:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module in swapped:
            module.__class__ = Float8Linear


class Float8Linear(nn.Linear):
    """A linear layer that computes in float8 while it trains, and as any other in evaluation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        output = _Product.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """x W^T. x: [..., D] bfloat16; W: [E, D] bfloat16. Saved is W itself, not a view of it: under ZeRO-3 its memory is gone
    after the forward, and back before the backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        # Sums of the forward in the tensor cores' own precision (14 bits), those of gradients in float32 every few terms:
        # the custom of torchao and Transformer Engine.
        return _multiply(x, weight, use_fast_accum=True)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = _multiply(gradient, weight.t(), use_fast_accum=False) if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def _multiply(a: torch.Tensor, b: torch.Tensor, *, use_fast_accum: bool) -> torch.Tensor:
    """[..., K] times [N, K] transposed: [..., N] in the dtype of `a`, its factors rounded to float8. K and N: multiples of 16."""
    rows, of_rows = to_float8(a.flatten(0, -2))
    columns, of_columns = to_float8(b)
    product = torch._scaled_mm(
        rows, columns.t(), of_rows, of_columns.t(), out_dtype=a.dtype, use_fast_accum=use_fast_accum
    )
    return product.view(*a.shape[:-1], -1)


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row times the largest power of two that keeps it within e4m3, rounded to nearest even.

    Relative rounding of an element is at most 2^-4, down to 2^-14 of its row's largest. NaN stays NaN, and so does a row with
    an infinity.

    Args:
        x: [R, C] bfloat16, contiguous or the transpose of a contiguous matrix.

    Returns:
        [R, C] float8_e4m3fn, contiguous; and [R, 1] float32, what a row has to be multiplied by to be `x` again.
    """
    if x.is_cuda:
        return _in_one_kernel(x, torch.float8_e4m3fn)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    quotient = LARGEST.value / largest.clamp(min=SMALLEST_ROW.value)
    exponent = quotient.view(torch.int32) & 0x7F800000  # no mantissa: rounded down to a power of two
    scale = exponent.view(torch.float32)
    return (x * scale.to(x.dtype)).to(torch.float8_e4m3fn).contiguous(), 1 / scale


def _in_one_kernel(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`to_float8` with one kernel, into any dtype."""
    x = x if x.t().is_contiguous() else x.contiguous()
    transposed = not x.is_contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    height = 32 if transposed else 4  # a tile is long where numbers lie together in memory
    _kernel[(triton.cdiv(len(x), height),)](x, out, inverse, *x.shape, transposed, height)
    return out, inverse


@triton.jit
def _kernel(x, out, inverse, rows, columns, TRANSPOSED: tl.constexpr, HEIGHT: tl.constexpr):
    """HEIGHT rows a program, in tiles of 4096 numbers: once for the largest number, once more to scale."""
    WIDTH: tl.constexpr = 4096 // HEIGHT
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    largest = tl.full([HEIGHT], SMALLEST_ROW, tl.float32)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        where = row[:, None] + column[None, :] * rows if TRANSPOSED else row[:, None] * columns + column[None, :]
        tile = tl.load(x + where, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(tile.to(tl.float32)), axis=1))
    exponent = tl.div_rn(LARGEST, largest).to(tl.int32, bitcast=True) & 0x7F800000
    scale = exponent.to(tl.float32, bitcast=True)
    tl.store(inverse + row, tl.div_rn(1.0, scale), mask=row < rows)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        where = row[:, None] + column[None, :] * rows if TRANSPOSED else row[:, None] * columns + column[None, :]
        tile = tl.load(x + where, mask=inside, other=0.0)
        scaled = tile.to(tl.float32) * scale[:, None]
        tl.store(out + row[:, None] * columns + column[None, :], scaled.to(out.dtype.element_ty), mask=inside)
