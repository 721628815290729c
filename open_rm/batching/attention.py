"""Attention over a packed row: many sequences in one row of tokens, each blind to the others, shared prefixes seen once.

A row is a list of segments. A segment's tokens attend to a prefix, which is one or more stretches of the row before it (or
nothing), and causally to themselves. Packing is the case without prefixes; a prompt that several responses continue is the
case with them. The pair (abc|de , abc|f) of layouts.py's drawing, computed once per distinct token:

    row        a b c d e f          segment 0: tokens 0..5, no prefix        (prompt + chosen, plain causal)
    position   0 1 2 3 4 3          segment 1: tokens 5..6, prefix 0..3      (rejected: sees abc and itself)

And beside the pair (abg|hi , abg|j), whose prompt begins with the same header ab; a prefix of two stretches is the header and
the rest of the prompt:

    row        a b c d e f g h i j  segment 2: tokens 6..9, prefix 0..2            (sees ab and itself)
    position   0 1 2 3 4 3 2 3 4 3  segment 3: tokens 9..10, prefix 0..2 and 6..7  (sees ab, g and itself)

No T x T mask is made. On a GPU one flash-attention call serves the row (torch's varlen_attn: queries and keys may differ
in number, causal is aligned at the end); on the CPU each segment is one scaled_dot_product_attention, and a long stretch that
several segments continue one more call for all of them (merged_attention.py; not with windows, soft caps and sinks). `dense_attention`
is the slow reference that the tests compare them to.
Not covered, and refused by name when the model is loaded: on a GPU what flash attention does not take, such as soft-capped
scores and attention sinks (families.py knows).
Shapes: T tokens of the row, H query heads, G key/value heads, D head width, s tokens of a segment, p of its prefix.
"""

import functools
import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from open_rm.batching.merged_attention import MergedAttention, Part

NAME = "open_rm_segments"  # what transformers knows this attention by

Bound = tuple[int, int, tuple[tuple[int, int], ...]]  # of a segment: start, end, and the ranges of its prefix
# From which a call of its own pays on a CPU, for a range of a prefix that several segments continue: tokens of it, and tokens that
# copies of it would have beyond the first. A prompt of 128 to 500 tokens with two answers is sooner copied (attention takes 1.1 to
# 1.3 times as long apart), with eight it is even or better; 500 tokens that all prompts begin with take 0.74 of the time, 1500 0.63.
LEAST_STRETCH = 128
LEAST_COPIES = 1024


@dataclass(frozen=True)
class Segments:
    """Which tokens of a row see which.

    bounds: per segment (start, end, prefix), token positions in the row; segments cover it in order. prefix: the ranges
        (start, end) of the row that it continues, which one after another are the beginning of its sequence; () for none.
    key_index: [sum of p + s] int64, or None where no segment has a prefix: the row's tokens in the order in which the
        segments see them. query_starts, key_starts: [segments + 1] int32 running totals of s and of p + s.
    longest_query, longest_key: max of s, and of p + s.
    masks: additive masks by (s, p, window), made at first use and shared by all layers.
    """

    bounds: tuple[tuple[int, int, int, int], ...]
    key_index: torch.Tensor | None
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int
    masks: dict = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device) -> "Segments":
        """The same on another device."""
        if self.query_starts.device == device:
            return self
        index = None if self.key_index is None else self.key_index.to(device, non_blocking=True)
        starts = (starts.to(device, non_blocking=True) for starts in (self.query_starts, self.key_starts))
        return Segments(self.bounds, index, *starts, self.longest_query, self.longest_key)

    def extended(self, tokens: int) -> "Segments":
        """With one more segment of `tokens` tokens at its end, which nothing else sees."""
        if not tokens:
            return self
        end = self.bounds[-1][1]
        index = self.key_index
        if index is not None:
            index = torch.cat((index, torch.arange(end, end + tokens, device=index.device)))
        starts = (torch.cat((starts, starts[-1:] + tokens)) for starts in (self.query_starts, self.key_starts))
        longest = (max(length, tokens) for length in (self.longest_query, self.longest_key))
        return Segments((*self.bounds, (end, end + tokens, ())), index, *starts, *longest)

    @functools.cached_property
    def pieces(self) -> tuple[list[int], list[list[int]]]:
        """The row cut wherever a segment or a range of a prefix begins or ends: the length of each piece, and for each
        segment the numbers of the pieces that it sees, in the order of its sequence."""
        ranges = [[*prefix, (start, end)] for start, end, prefix in self.bounds]
        cuts = sorted({place for seen in ranges for bound in seen for place in bound})
        number = {place: piece for piece, place in enumerate(cuts)}
        lengths = [end - start for start, end in itertools.pairwise(cuts)]
        return lengths, [[piece for a, b in seen for piece in range(number[a], number[b])] for seen in ranges]

    @functools.cached_property
    def stretches(self) -> list[tuple[range, int]]:
        """(numbers of segments side by side, which of their prefix's ranges): the long ranges that many segments continue."""
        found = []
        for level in range(max(len(prefix) for *_, prefix in self.bounds)):
            alike = itertools.groupby(enumerate(self.bounds), key=lambda numbered: numbered[1][2][: level + 1])
            for prefix, group in alike:
                numbers = [number for number, _ in group]
                tokens = _length(prefix[level:])
                if tokens >= LEAST_STRETCH and tokens * (len(numbers) - 1) >= LEAST_COPIES:
                    found.append((range(numbers[0], numbers[-1] + 1), level))
        return found

    def score_area(self) -> int:
        """Query-key products that are needed: the sum over segments of s * p + s (s + 1) / 2."""
        return sum((e - s) * _length(prefix) + (e - s) * (e - s + 1) // 2 for s, e, prefix in self.bounds)


def _length(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def make_segments(bounds: Sequence[Bound]) -> Segments:
    """Segments from (start, end, prefix) in row order."""
    queries = [end - start for start, end, _ in bounds]
    keys = [end - start + _length(prefix) for start, end, prefix in bounds]
    index = None
    if any(prefix for *_, prefix in bounds):
        index = torch.cat([torch.arange(a, b) for start, end, prefix in bounds for a, b in (*prefix, (start, end))])

    def running(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    return Segments(tuple(bounds), index, running(queries), running(keys), max(queries), max(keys))


def segment_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    segments: Segments,
    scaling=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    exchange=None,
    **_,
):
    """The attention function that transformers calls in each layer; see the module docstring.

    Args:
        query: [1, H, T, D].  key, value: [1, G, T, D], G divides H.
        attention_mask: None always; `segments` says who sees whom.
        sliding_window: tokens that a token sees, itself included, or None for all.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2), or None.
        s_aux: [H] attention sinks (gpt-oss): a score of each head's that takes its share of the softmax and no value, or None.
        exchange: where tensors hold a stretch of the row, what brings it together with other ranks
            (model/sequence_parallel.py) and calls this function; else None.

    Returns:
        ([1, T, H, D], None), as transformers expects.
    """
    if exchange is not None:
        how = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return exchange(module, query, key, value, segments=segments, **how)
    if query.device.type == "cuda":
        if softcap is not None or s_aux is not None:  # families.choose_layout lets neither come here
            raise ValueError("flash attention takes neither soft caps nor sinks")
        return _flash(query, key, value, segments, scaling, sliding_window), None
    scoring = _Scoring(scaling, sliding_window, softcap, s_aux)
    return _on_cpu(query, key, value, segments, scoring), None


@dataclass(frozen=True)
class _Scoring:
    """How scores become weights; as `segment_attention` is told."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def written_out(self) -> bool:
        """Whether torch's own attention does not know it."""
        return self.softcap is not None or self.sinks is not None


def _flash(query, key, value, segments, scaling, window):
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    if segments.key_index is not None:
        # [T, 2, G, D]: one gather, and one sum in backward. Indexing with [] would sort the index there, twice a layer.
        key, value = torch.stack((key, value), 1).index_select(0, segments.key_index).unbind(1)
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if _asks_for_gqa(varlen_attn) else {}
    out = varlen_attn(
        query,
        key,
        value,
        segments.query_starts,
        segments.key_starts,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return out.unsqueeze(0)


@functools.cache
def _asks_for_gqa(varlen_attn) -> bool:
    """Whether fewer key heads than query heads have to be asked for; up to torch 2.11 the function has no word for it."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _on_cpu(query, key, value, segments, scoring: _Scoring):
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # once for the row; per segment it would be done again for every prefix
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sees_all = scoring.window is None or segments.longest_key <= scoring.window
    one_kernel = not scoring.written_out and query.shape[-1] == value.shape[-1]
    if segments.stretches and sees_all and one_kernel:
        return MergedAttention.apply(query, key, value, _parts(segments, query), scoring.scaling).transpose(1, 2)
    return _per_segment(query, key, value, segments, scoring)


def _per_segment(query, key, value, segments, scoring: _Scoring):
    window, written_out = scoring.window, scoring.written_out
    # Split once, not sliced per segment: the gradient of a slice is a tensor of the whole row's size.
    queries = query.split([end - start for start, end, _ in segments.bounds], 2)
    lengths, seen = segments.pieces
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    outputs = []
    for q, (start, end, ranges), pieces in zip(queries, segments.bounds, seen, strict=True):
        prefix = _length(ranges)
        k, v = (of[pieces[0]] if len(pieces) == 1 else torch.cat([of[i] for i in pieces], 2) for of in (keys, values))
        plain = not written_out and not prefix and (window is None or end - start <= window)
        mask = None if plain else _mask(segments.masks, end - start, prefix, window, q)
        if written_out:
            output = _written_out(q, k, v, mask, scoring)
        else:
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=scoring.scaling)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1)


def _parts(segments: Segments, like: torch.Tensor) -> list[Part]:
    """What each segment sees by itself, and then the stretches that several continue, each for all of them."""
    apart = {(number, level) for numbers, level in segments.stretches for number in numbers}
    parts = []
    for number, (start, end, prefix) in enumerate(segments.bounds):
        own = [one for level, one in enumerate(prefix) if (number, level) not in apart]
        mask = _mask(segments.masks, end - start, _length(own), None, like) if own else None
        parts.append(Part((start, end), (*own, (start, end)), mask, causal=mask is None))
    for numbers, level in segments.stretches:
        (start, _, prefix), (_, end, _) = segments.bounds[numbers[0]], segments.bounds[numbers[-1]]
        parts.append(Part((start, end), (prefix[level],), None, causal=False))
    return parts


def _mask(masks: dict, queries: int, prefix: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[s, p + s] additive: query i of the segment is at p + i, and sees the keys up to itself within the window."""
    made = masks.get((queries, prefix, window))
    if made is None:
        distance = torch.arange(prefix, prefix + queries)[:, None] - torch.arange(prefix + queries)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        made = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
        masks[queries, prefix, window] = made
    return made


def _written_out(q, k, v, mask, scoring: _Scoring):
    """What torch's own attention does not know: soft-capped scores and sinks."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scoring.scaling is None else scoring.scaling)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    return scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype) @ v


def dense_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    segments: Segments,
    scaling=None,
    sliding_window=None,
    softcap=None,
    **_,
):
    """The reference: one T x T mask, written from the definition. For tests; same interface as `segment_attention`."""
    tokens = query.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, prefix in segments.bounds:
        order = [place for first, last in (*prefix, (start, end)) for place in range(first, last)]  # of its sequence
        for i in range(len(order) - (end - start), len(order)):
            first = 0 if sliding_window is None else max(0, i + 1 - sliding_window)
            seen[order[i], order[first : i + 1]] = True
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None
