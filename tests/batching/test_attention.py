"""Attention over packed rows: the fast paths against the reference, and the reference against attention spelled out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import Largest

from open_rm.batching import attention
from open_rm.batching.attention import dense_attention, make_segments, segment_attention

WIDTH = 8
# float32 sums of up to 60 products in another order: outputs are below 4, gradients below 20.
OUTPUT_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5

# (start, end, prefix_start, prefix_end) of each segment. A window of 5 is below the prefixes and below the segments.
ROWS = {
    "one sequence": [(0, 12, 0, 0)],
    "packed": [(0, 7, 0, 0), (7, 8, 0, 0), (8, 21, 0, 0)],
    "shared prefix": [(0, 16, 0, 0), (16, 24, 0, 9), (24, 25, 0, 9), (25, 31, 0, 9)],
    "several groups": [
        (0, 14, 0, 0),
        (14, 22, 0, 8),
        (22, 23, 0, 0),
        (23, 40, 0, 0),
        (40, 47, 23, 33),
        (47, 59, 23, 33),
    ],
    "prefix of one token": [(0, 2, 0, 0), (2, 12, 0, 1)],
}
KINDS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window beyond all": {"sliding_window": 100},
    "scaled": {"scaling": 0.9},
    "soft-capped": {"softcap": 1.5},
    "window, soft-capped, scaled": {"sliding_window": 5, "softcap": 1.5, "scaling": 0.9},
}


def random_qkv(bounds, heads: int, key_heads: int, seed: int = 0):
    """q [1, H, T, D], k and v [1, G, T, D], and an output gradient [1, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = bounds[-1][1]
    q, k, v = (torch.randn(1, n, tokens, WIDTH, generator=generator) for n in (heads, key_heads, key_heads))
    return [tensor.requires_grad_() for tensor in (q, k, v)], torch.randn(1, tokens, heads, WIDTH, generator=generator)


def output_and_gradients(function, bounds, inputs, upstream, kind):
    out, weights = function(None, *inputs, None, segments=make_segments(bounds), **kind)
    assert weights is None
    return out.detach(), torch.autograd.grad(out, inputs, upstream)


def assert_same(bounds, heads, key_heads, kind, seed=0):
    inputs, upstream = random_qkv(bounds, heads, key_heads, seed)
    out, gradients = output_and_gradients(segment_attention, bounds, inputs, upstream, kind)
    reference, reference_gradients = output_and_gradients(dense_attention, bounds, inputs, upstream, kind)
    torch.testing.assert_close(out, reference, rtol=0, atol=OUTPUT_TOLERANCE)
    for name, ours, theirs in zip("qkv", gradients, reference_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=GRADIENT_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_outputs_and_gradients_are_those_of_the_reference(row, kind, key_heads):
    assert_same(ROWS[row], 4, key_heads, KINDS[kind])


@st.composite
def trees(draw):
    """Random rows: each segment stands alone or continues any stretch of the row before it."""
    bounds, used = [], 0
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 9))
        prefix = (0, 0)
        if used and draw(st.booleans()):
            start = draw(st.integers(0, used - 1))
            prefix = (start, draw(st.integers(start + 1, used)))
        bounds.append((used, used + length, *prefix))
        used += length
    return bounds


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bounds=trees(),
    key_heads=st.sampled_from([1, 2]),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.just(1.5),
    seed=st.integers(0, 99),
)
def test_random_trees_of_segments_are_computed_as_the_reference_does(bounds, key_heads, window, softcap, seed):
    assert_same(bounds, 2, key_heads, {"sliding_window": window, "softcap": softcap}, seed)


def alone(q, k, v, window=None):
    """Plain causal attention of one sequence, [1, H, n, D]; torch's own, with a band of `window` tokens."""
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    band = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band)


@pytest.mark.parametrize("window", [None, 5, 12])
@pytest.mark.parametrize("row", ROWS)
def test_the_reference_is_each_sequence_spelled_out_alone(row, window):
    bounds = ROWS[row]
    (q, k, v), _ = random_qkv(bounds, 4, 4)
    out, _ = dense_attention(None, q, k, v, None, segments=make_segments(bounds), sliding_window=window)
    for start, end, prefix_start, prefix_end in bounds:
        tokens = [*range(prefix_start, prefix_end), *range(start, end)]
        expected = alone(*(tensor[:, :, tokens] for tensor in (q, k, v)), window).transpose(1, 2)
        torch.testing.assert_close(out[:, start:end], expected[:, start - end :], rtol=0, atol=OUTPUT_TOLERANCE)


def test_a_window_is_counted_along_the_sequence_across_prefix_and_segment():
    """Token 2 of a segment behind a prefix of 6 sees, with a window of 5: the prefix's last two, and three of its own."""
    bounds = [(0, 8, 0, 0), (8, 13, 0, 6)]
    (q, k, v), _ = random_qkv(bounds, 1, 1)
    for function in (segment_attention, dense_attention):
        out, _ = function(None, q, k, v, None, segments=make_segments(bounds), sliding_window=5)
        (seen,) = torch.autograd.grad(out[0, 10].sum(), v)
        assert seen[0, 0].abs().sum(1).nonzero().flatten().tolist() == [4, 5, 8, 9, 10]


def test_soft_capping_is_the_formula_and_changes_the_result():
    (q, k, v), _ = random_qkv([(0, 6, 0, 0)], 1, 1)
    out, _ = dense_attention(None, q, k, v, None, segments=make_segments([(0, 6, 0, 0)]), softcap=1.5)
    scores = 1.5 * torch.tanh((q @ k.mT).double() * WIDTH**-0.5 / 1.5)
    weights = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    torch.testing.assert_close(out, (weights @ v.double()).transpose(1, 2).float(), rtol=0, atol=OUTPUT_TOLERANCE)
    assert (out - alone(q, k, v).transpose(1, 2)).abs().max() > 0.01


def test_segments_do_not_see_each_other():
    bounds = ROWS["several groups"]
    (q, k, v), _ = random_qkv(bounds, 2, 2)
    out, _ = segment_attention(None, q, k, v, None, segments=make_segments(bounds))
    (seen,) = torch.autograd.grad(out[0, 40:47].sum(), k)
    touched = set(seen.abs().sum((0, 1, 3)).nonzero().flatten().tolist())
    assert touched <= {*range(23, 33), *range(40, 47)}
    assert {23, 32, 40} <= touched


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_of_the_whole_row_is_made_forward_or_backward(kind):
    """4,096 tokens in groups of 64 + 32: the largest tensors are the row's own, 32 a token, far from T * T."""
    tokens, bounds = 4096, []
    for used in range(0, tokens - 95, 96):
        bounds += [(used, used + 64, 0, 0), (used + 64, used + 96, used, used + 40)]
    bounds.append((bounds[-1][1], tokens, 0, 0))
    segments = make_segments(bounds)
    inputs, upstream = random_qkv(bounds, 4, 2)
    with Largest() as largest:
        out, _ = segment_attention(None, *inputs, None, segments=segments, **KINDS[kind])
        torch.autograd.grad(out, inputs, upstream)
    assert 4 * tokens * WIDTH <= largest.elements <= 8 * tokens * WIDTH < tokens * tokens / 50
    shapes = {(end - start, end - start + pe - ps) for start, end, ps, pe in bounds}
    assert {tuple(mask.shape) for mask in segments.masks.values()} <= shapes
    # the measure itself: the reference, on a shorter row, is caught
    shorter = [tensor[:, :, :1000] for tensor in inputs]
    with Largest() as largest:
        dense_attention(None, *shorter, None, segments=make_segments([(0, 1000, 0, 0)]))
    assert largest.elements >= 1000 * 1000


def test_score_area_is_the_number_of_query_key_products():
    for bounds in ROWS.values():
        products = sum(pe - ps + i + 1 for start, end, ps, pe in bounds for i in range(end - start))
        assert make_segments(bounds).score_area() == products


def varlen_by_its_documentation(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's varlen_attn as documented: [T, heads, D]; causal is aligned at the end, window_size counts to the left."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size[1] == 0  # causal
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (tensor[cu_seq_k[i] : cu_seq_k[i + 1]] for tensor in (key, value))
        assert len(q) <= max_q and len(k) <= max_k
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "softcap" not in KINDS[kind]])
@pytest.mark.parametrize("row", ROWS)
def test_the_flash_call_says_the_same_in_terms_of_varlen_attn(monkeypatch, row, kind, key_heads):
    """What a GPU is told to compute, checked without one against what varlen_attn documents."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_its_documentation)

    def flash(module, query, key, value, mask, *, segments, scaling=None, sliding_window=None):
        return attention._flash(query, key, value, segments, scaling, sliding_window), None

    bounds = ROWS[row]
    inputs, upstream = random_qkv(bounds, 4, key_heads)
    out, gradients = output_and_gradients(flash, bounds, inputs, upstream, KINDS[kind])
    reference, reference_gradients = output_and_gradients(dense_attention, bounds, inputs, upstream, KINDS[kind])
    torch.testing.assert_close(out, reference, rtol=0, atol=OUTPUT_TOLERANCE)
    for ours, theirs in zip(gradients, reference_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=GRADIENT_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention over variable lengths needs a GPU")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_flash_attention_equals_the_per_segment_path_in_bfloat16(key_heads, window):
    """Both from the same bfloat16 inputs; the per-segment path computes in float32.

    bfloat16 keeps 8 bits: outputs, below 4, are rounded by up to 2**-7 = 8e-3, and the weights inside likewise. 2e-2, and
    for gradients 2e-2 of the largest entry, leave a factor of two.
    """
    bounds = [(0, 700, 0, 0), (700, 1000, 0, 400), (1000, 1001, 0, 400), (1001, 1300, 0, 0), (1300, 1600, 1001, 1200)]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 8, 1600, 64), (1, key_heads, 1600, 64), (1, key_heads, 1600, 64), (1, 1600, 8, 64)]
    q, k, v, upstream = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (q, k, v)]
        segments = make_segments(bounds).to(torch.device(device))
        out, _ = segment_attention(None, *inputs, None, segments=segments, sliding_window=window)
        gradients = torch.autograd.grad(out, inputs, upstream.to(device, dtype))
        results.append([tensor.detach().float().cpu() for tensor in (out, *gradients)])
    (out, *gradients), (reference, *reference_gradients) = results
    torch.testing.assert_close(out, reference, rtol=0, atol=2e-2)
    for ours, theirs in zip(gradients, reference_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * theirs.abs().max().item())
