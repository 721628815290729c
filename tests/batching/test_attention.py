"""Attention over packed rows: the path of a CPU against the reference, and the reference against attention spelled out.

That of a GPU: test_flash.py.
"""

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

# (start, end, prefix) of each segment. A window of 5 is below the prefixes and below the segments.
ROWS = {
    "one sequence": [(0, 12, ())],
    "packed": [(0, 7, ()), (7, 8, ()), (8, 21, ())],
    "shared prefix": [(0, 16, ()), (16, 24, ((0, 9),)), (24, 25, ((0, 9),)), (25, 31, ((0, 9),))],
    "several groups": [
        (0, 14, ()),
        (14, 22, ((0, 8),)),
        (22, 23, ()),
        (23, 40, ()),
        (40, 47, ((23, 33),)),
        (47, 59, ((23, 33),)),
    ],
    "a header of two prompts": [
        (0, 14, ()),
        (14, 22, ((0, 9),)),
        (22, 31, ((0, 6),)),
        (31, 32, ((0, 6), (22, 25))),
        (32, 39, ((0, 6), (22, 25))),
        (39, 41, ()),
    ],
    "a prompt that is its header": [(0, 5, ()), (5, 12, ((0, 1),)), (12, 15, ((0, 1),)), (15, 19, ((0, 1), (5, 6)))],
    "prefix of one token": [(0, 2, ()), (2, 12, ((0, 1),))],
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


@pytest.fixture(autouse=True, scope="module", params=[1, 10**9], ids=["long stretches apart", "by segment"])
def least_stretch(request):
    """All tests with every range that several segments continue as a call of its own, and with none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LEAST_STRETCH", request.param)
        patch.setattr(attention, "LEAST_COPIES", 1)
        yield request.param


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


def test_a_long_stretch_is_found_for_all_segments_that_continue_it(least_stretch):
    found = {name: make_segments(bounds).stretches for name, bounds in ROWS.items()}
    if least_stretch > 1:
        assert not any(found.values())
        return
    assert found["one sequence"] == found["packed"] == found["prefix of one token"] == []
    assert found["shared prefix"] == [(range(1, 4), 0)]
    assert found["several groups"] == [(range(4, 6), 0)]
    assert found["a header of two prompts"] == [(range(2, 5), 0), (range(3, 5), 1)]
    assert found["a prompt that is its header"] == [(range(1, 4), 0)]


def test_few_copies_of_a_stretch_are_made(monkeypatch):
    """Of 600 tokens, two segments need one copy more, and three two."""
    for name, least in (("LEAST_STRETCH", 128), ("LEAST_COPIES", 1024)):
        monkeypatch.setattr(attention, name, least)
    bounds = [(0, 600, ()), *((600 + i, 601 + i, ((0, 600),)) for i in range(3))]
    assert make_segments(bounds).stretches == [(range(1, 4), 0)]
    assert make_segments(bounds[:3]).stretches == []


def test_in_bfloat16_outputs_and_gradients_are_as_near_to_float32_as_those_by_segment(least_stretch):
    bounds = ROWS["a header of two prompts"]
    inputs, upstream = random_qkv(bounds, 4, 2)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    exact = output_and_gradients(
        dense_attention, bounds, [half.float().detach().requires_grad_() for half in halves], upstream, {}
    )
    out, gradients = output_and_gradients(segment_attention, bounds, halves, upstream.bfloat16(), {})
    torch.testing.assert_close(out.float(), exact[0], rtol=0, atol=0.02)  # outputs below 4 are rounded by 0.008
    for ours, theirs in zip(gradients, exact[1], strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.05)


@st.composite
def trees(draw):
    """Random rows: each segment stands alone or continues any stretches of the row before it."""
    bounds, used = [], 0
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 9))
        ends = sorted(draw(st.sets(st.integers(0, used), max_size=6))) if used else []
        prefix = tuple(zip(ends[::2], ends[1::2], strict=False))  # one that is left over is left out
        bounds.append((used, used + length, prefix))
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
    for start, end, prefix in bounds:
        tokens = [token for a, b in (*prefix, (start, end)) for token in range(a, b)]
        expected = alone(*(tensor[:, :, tokens] for tensor in (q, k, v)), window).transpose(1, 2)
        torch.testing.assert_close(out[:, start:end], expected[:, start - end :], rtol=0, atol=OUTPUT_TOLERANCE)


def test_a_window_is_counted_along_the_sequence_across_prefix_and_segment():
    """Token 2 of a segment behind a prefix of 6 sees, with a window of 5: the prefix's last two, and three of its own."""
    bounds = [(0, 8, ()), (8, 13, ((0, 6),))]
    (q, k, v), _ = random_qkv(bounds, 1, 1)
    for function in (segment_attention, dense_attention):
        out, _ = function(None, q, k, v, None, segments=make_segments(bounds), sliding_window=5)
        (seen,) = torch.autograd.grad(out[0, 10].sum(), v)
        assert seen[0, 0].abs().sum(1).nonzero().flatten().tolist() == [4, 5, 8, 9, 10]


def test_a_window_is_counted_across_header_prompt_and_segment():
    """Token 1 of a segment behind 3 tokens of a header and 2 of a prompt sees, with a window of 6: all but the first one."""
    bounds = [(0, 4, ()), (4, 8, ((0, 3),)), (8, 11, ((0, 3), (4, 6)))]
    (q, k, v), _ = random_qkv(bounds, 1, 1)
    for function in (segment_attention, dense_attention):
        out, _ = function(None, q, k, v, None, segments=make_segments(bounds), sliding_window=6)
        (seen,) = torch.autograd.grad(out[0, 9].sum(), v)
        assert seen[0, 0].abs().sum(1).nonzero().flatten().tolist() == [1, 2, 4, 5, 8, 9]


def test_soft_capping_is_the_formula_and_changes_the_result():
    (q, k, v), _ = random_qkv([(0, 6, ())], 1, 1)
    out, _ = dense_attention(None, q, k, v, None, segments=make_segments([(0, 6, ())]), softcap=1.5)
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


@pytest.mark.parametrize("header", [0, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_of_the_whole_row_is_made_forward_or_backward(kind, header):
    """4,096 tokens in groups of 64 + 32: the largest tensors are the row's own, 32 a token, far from T * T."""
    tokens, bounds = 4096, []
    for used in range(0, tokens - 95, 96):
        root = ((0, header),) if header and used else ()
        bounds += [(used, used + 64, root), (used + 64, used + 96, (*root, (used, used + 40)))]
    bounds.append((bounds[-1][1], tokens, ()))
    segments = make_segments(bounds)
    inputs, upstream = random_qkv(bounds, 4, 2)
    with Largest() as largest:
        out, _ = segment_attention(None, *inputs, None, segments=segments, **KINDS[kind])
        torch.autograd.grad(out, inputs, upstream)
    assert 4 * tokens * WIDTH <= largest.elements <= 8 * tokens * WIDTH < tokens * tokens / 50
    shapes = {(end - start, end - start + sum(b - a for a, b in prefix)) for start, end, prefix in bounds}
    shapes |= {(queries, keys - header) for queries, keys in shapes}  # where the header is a call of its own
    assert {tuple(mask.shape) for mask in segments.masks.values()} <= shapes
    # the measure itself: the reference, on a shorter row, is caught
    shorter = [tensor[:, :, :1000] for tensor in inputs]
    with Largest() as largest:
        dense_attention(None, *shorter, None, segments=make_segments([(0, 1000, ())]))
    assert largest.elements >= 1000 * 1000


def test_score_area_is_the_number_of_query_key_products():
    for bounds in ROWS.values():
        seen = [sum(b - a for a, b in prefix) + i + 1 for start, end, prefix in bounds for i in range(end - start)]
        assert make_segments(bounds).score_area() == sum(seen)


def copies_of_the_row(bounds) -> int:
    """How many tensors of the row's size a step makes of the keys, forward and backward, of one head."""
    (q, k, v), upstream = random_qkv(bounds, 1, 1)
    made, row = [], k.numel()

    class Sized(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(1 for tensor in (out if isinstance(out, tuple | list) else [out]) if tensor.numel() >= row)
            return out

    with Sized():
        out, _ = segment_attention(None, q, k, v, None, segments=make_segments(bounds))
        torch.autograd.grad(out, (q, k, v), upstream)
    return len(made)


def test_more_segments_behind_a_header_make_no_more_copies_of_the_row():
    """The gradient of a slice of the row would be a tensor of its size, one for each segment that sees the header."""

    def of(prompts: int):
        bounds = [(0, 16, ()), (16, 20, ((0, 12),))]
        for used in range(20, 20 + 8 * prompts, 8):
            bounds += [(used, used + 6, ((0, 10),)), (used + 6, used + 8, ((0, 10), (used, used + 3)))]
        return bounds

    assert copies_of_the_row(of(12)) == copies_of_the_row(of(4))
