"""Attention in parts on a CPU: several calls of torch's flash kernel for the same queries, merged by log-sum-exp.

A header that many segments see would be copied in front of each one's keys, and its gradient added up as often. As a part of its
own it is one dense product of all their queries with its keys, without a mask. With o_i, l_i the output and the log-sum-exp of the
scores of part i, and l = log sum_i exp(l_i),

    o = sum_i exp(l_i - l) o_i

which is attention over all parts' keys (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682). A part's gradients follow from o and l in place of its own (Liu et al. 2023, Ring Attention,
https://arxiv.org/abs/2310.01889): dS = exp(s - l) * (dO V^T - rowsum(dO * o)), which is what the kernel's backward computes.
"""

from typing import NamedTuple

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """One call of the kernel, all places in the row.

    queries: (start, end).  keys: ranges, one after another; those of the queries themselves stand last.
    mask: [queries, keys] additive, or None.  causal: with no mask, a query sees the keys up to itself; else all.
    """

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None
    causal: bool


class MergedAttention(torch.autograd.Function):
    """[1, H, T, D] from query, key, value of that shape: each query sees the keys of all parts that it is in.

    parts: first those that cover the row, one after another, then others for queries that these have covered.
    """

    @staticmethod
    def forward(ctx, query, key, value, parts: list[Part], scaling: float | None):
        out = torch.empty_like(query)
        log_sums, covered = torch.empty(query.shape[:3], dtype=torch.float32), 0
        for part in parts:
            rows = slice(*part.queries)
            one, log_sum = _forward(
                query[:, :, rows],
                _taken(key, part.keys),
                _taken(value, part.keys),
                0.0,
                part.causal,
                attn_mask=part.mask,
                scale=scaling,
            )
            if part.queries[0] >= covered:
                out[:, :, rows], log_sums[:, :, rows], covered = one, log_sum, part.queries[1]
                continue
            before = log_sums[:, :, rows]
            share = torch.sigmoid(log_sum - before).unsqueeze(-1)  # exp(l_i - l)
            out[:, :, rows] = torch.lerp(out[:, :, rows].float(), one.float(), share).to(out.dtype)
            log_sums[:, :, rows] = torch.logaddexp(before, log_sum)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, log_sums = ctx.saved_tensors
        # Sums over parts in float32: bfloat16 would lose a little with each of them.
        of_query = torch.empty_like(query, dtype=torch.float32)
        of_key, of_value = (torch.zeros_like(of, dtype=torch.float32) for of in (key, value))
        covered = 0
        for part in ctx.parts:
            rows = slice(*part.queries)
            one, *keys_and_values = _backward(
                gradient[:, :, rows],
                query[:, :, rows],
                _taken(key, part.keys),
                _taken(value, part.keys),
                out[:, :, rows],
                log_sums[:, :, rows],
                0.0,
                part.causal,
                attn_mask=part.mask,
                scale=ctx.scaling,
            )
            if part.queries[0] >= covered:
                of_query[:, :, rows], covered = one, part.queries[1]
            else:
                of_query[:, :, rows] += one
            lengths = [end - start for start, end in part.keys]
            for total, found in zip((of_key, of_value), keys_and_values, strict=True):
                for (start, end), piece in zip(part.keys, found.split(lengths, 2), strict=True):
                    total[:, :, start:end] += piece
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _taken(of: torch.Tensor, ranges) -> torch.Tensor:
    pieces = [of[:, :, start:end] for start, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
