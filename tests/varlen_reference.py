"""torch's varlen_attn without a GPU: the signatures it has had, the demands of its kernel, and what it documents, densely.

The demands are those of mha_varlen_fwd in torch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
Shapes: T tokens, H query heads, G key heads, D head width.
"""

import functools
from inspect import signature

import torch
from torch.nn.attention import varlen

INSTALLED = varlen.varlen_attn


@functools.wraps(INSTALLED)  # and so it has the signature of the torch that is installed, whose binding is Python's own
def of_this_torch(*args, **kwargs):
    bound = signature(INSTALLED).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, key = given["query"], given["key"]
    if "enable_gqa" in given and not given["enable_gqa"] and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")  # its own first check
    return _computed(*bound.args[:7], given["scale"], given["window_size"])


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """The keywords of torch 2.11, which does not look at the numbers of heads; its kernel takes any G that divides H."""
    return _computed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def _computed(query, key, value, starts_q, starts_k, longest_q, longest_k, scale, window):
    """query: [T, H, D].  key, value: [T', G, D].  Causal is aligned at the end; window counts keys to the left and right."""
    (_, heads, width), key_heads = query.shape, key.shape[1]
    assert key.shape == value.shape and key.shape[2] == width and query.dtype == key.dtype == value.dtype
    assert width % 8 == 0 and width <= 256
    assert heads % key_heads == 0
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    for starts, of, longest in ((starts_q, query, longest_q), (starts_k, key, longest_k)):
        assert starts.dtype == torch.int32 and starts.is_contiguous() and starts.device == of.device
        assert len(starts) == len(starts_q) and starts[0] == 0 and starts[-1] == len(of)
        lengths = starts.diff()
        assert lengths.min() > 0 and type(longest) is int and longest == lengths.max()
    left, right = window
    assert right == 0, "attention here is causal"
    rows = []
    for q_start, q_end, k_start, k_end in zip(
        *(bound.tolist() for starts in (starts_q, starts_k) for bound in (starts[:-1], starts[1:])), strict=True
    ):
        queries, keys = q_end - q_start, k_end - k_start
        assert keys >= queries
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        k, v = (of[k_start:k_end].repeat_interleave(heads // key_heads, 1) for of in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q_start:q_end], k) * (width**-0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype)
        rows.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(rows)
