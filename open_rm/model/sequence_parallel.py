"""Several devices compute one row together, each a stretch of its positions: DeepSpeed-Ulysses (arXiv 2309.14509).

    row of T positions     | rank 0 | rank 1 | rank 2 | rank 3 |    embeddings, norms, products, MLPs: T / N positions a rank
    attention              all T positions on every rank, of H / N of the H heads: an all-to-all before it, another one after

Everything but attention treats positions one by one. Attention is that of batching/attention.py over the whole row, which
knows segments, shared prefixes, windows, soft caps and sinks; so what is exact on one device is exact here. A reward is read
on the rank that has its position and summed over the group, so that all ranks of a group have all rewards and compute the
same loss. Going back, each rank takes the loss's gradient as it is: a rank's gradients are then those of its own stretch,
and their sum over all ranks, which is what Engine makes, counts every pair once.
DeepSpeed is not told of groups: ZeRO divides weights, gradients and moments over all ranks, as without them.
Not covered, and refused by name: heads that cannot be divided, and models for which packed rows are not exact.
Shapes: N ranks of a group, T positions of a row, L = T / N of a stretch, H heads, G key heads, R read positions.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface

from open_rm import process_group
from open_rm.batching import attention
from open_rm.batching.attention import Segments, make_segments, segment_attention
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.model import families
from open_rm.model.reward_model import RewardModel
from open_rm.ranks import Ranks


def grouped(ranks: Ranks, size: int) -> Ranks:
    """The ranks, `size` neighbours of which compute the same micro-batches together.

    Raises:
        UserError: the number of ranks is no multiple of it.
    """
    check_divides(size, ranks.world_size)
    return dataclasses.replace(ranks, sequence_size=size)


def check_divides(size: int, devices: int) -> None:
    """Refuse groups of `size` that a run's devices cannot form.

    Raises:
        UserError: which sizes would do.
    """
    if devices % size:
        said = "the one device" if devices == 1 else f"the {devices} devices"
        raise UserError(
            f"--sequence_parallel_size {size} does not divide {said} of this run; pass "
            f"{_listed(n for n in range(1, devices + 1) if devices % n == 0)}"
        )


def check(config, size: int, flags: ModelFlags, *, max_token_length: int, **device) -> None:
    """Refuse --sequence_parallel_size where it would not be exact, from the model's config alone.

    device: on_gpu, bf16, capability; see families.choose_layout.

    Raises:
        UserError: what it is, and which sizes would do.
    """
    if size == 1:
        return
    how = {"attn_implementation": flags.attn_implementation, "max_token_length": max_token_length}
    why = _why_not(config, size, flags) or families.choose_layout("auto", config, **how, **device).why_not_shared
    if why:
        raise UserError(f"--sequence_parallel_size {size} is not possible: {why}")


def _why_not(config, size: int, flags: ModelFlags) -> str | None:
    text, name = config.get_text_config(), flags.model_name_or_path
    if text.model_type not in families.SEGMENTS:
        kind = "an encoder" if config.model_type in families.ENCODERS else "not among the families that it is exact for"
        return f"{name} is of the family {text.model_type}, {kind}; leave it out"
    if flags.trust_remote_code and getattr(config, "auto_map", None):
        return f"{name} brings code of its own, whose attention is not known here; leave it out"
    shapes = set(families.attention_shapes(text))
    if len(shapes) > 1:
        return f"the layers of {name} differ in their heads; leave it out"
    [(heads, key_heads, _)] = shapes
    if _divides(size, heads, key_heads):
        return None
    sizes = _listed(n for n in range(1, heads + 1) if _divides(n, heads, key_heads))
    if heads % size:
        return f"{name} has {heads} attention heads, which {size} does not divide; sizes that do: {sizes}"
    return (
        f"{name} has {key_heads} key heads, which {size} neither divides nor is a multiple of; sizes that do: {sizes}"
    )


def _divides(size: int, heads: int, key_heads: int) -> bool:
    """Whether each of `size` ranks gets whole heads, and the key heads that they look at."""
    return heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0)


def _listed(numbers: Iterable[int]) -> str:
    *first, final = map(str, numbers)
    return f"{', '.join(first)} or {final}" if first else final


def use(model: RewardModel, ranks: Ranks) -> list[str]:
    """Have the model compute each row by the ranks of a group, in place. A collective call of all ranks.

    ranks: from `grouped`.

    Returns:
        lines for the log; none where a group is of one rank.
    """
    if ranks.sequence_size == 1:
        return []
    AttentionInterface.register(attention.NAME, segment_attention)
    model.classifier.set_attn_implementation(attention.NAME)
    [shape] = set(families.attention_shapes(model.classifier.config.get_text_config()))
    model.sequence_group = SequenceGroup(ranks, shape)
    places = ranks.gathered(ranks.local_rank)
    return [_describe(ranks, shape, spans=_spans_nodes(places, ranks.sequence_size))]


def _spans_nodes(local_ranks: list[int], size: int) -> bool:
    """Whether a group of `size` neighbours is on several nodes; local_ranks: of all ranks in their order."""
    return any(local != local_ranks[i - i % size] + i % size for i, local in enumerate(local_ranks))


def _describe(ranks: Ranks, shape: tuple[int, int, int], *, spans: bool) -> str:
    size, (heads, key_heads, _) = ranks.sequence_size, shape
    repeated = f", its {key_heads} key heads {size // key_heads} times" if key_heads < size else ""
    nodes = "; groups span nodes, whose network every layer then waits for" if spans else ""
    return (
        f"sequence parallel: {size} neighbouring devices compute a micro-batch of up to {size} times the positions together "
        f"({ranks.data_size} groups), each a stretch of the row, and in attention {heads // size} of {heads} heads over all "
        f"of it{repeated}{nodes}"
    )


@dataclass(frozen=True)
class Stretch:
    """One rank's part of a row.

    inputs: what the backbone takes: input_ids and position_ids [1, L], segments of the whole row, exchange.
    reward_index: [N rewards] positions in the stretch.  reward_here: [N rewards] whether it has them; elsewhere 0 stands.
    read_index, read_here: [R] the same of the distinct positions.
    """

    inputs: dict
    reward_index: torch.Tensor
    reward_here: torch.Tensor
    read_index: torch.Tensor
    read_here: torch.Tensor


class SequenceGroup:
    """The ranks that compute a row together, and how this one takes part."""

    def __init__(self, ranks: Ranks, shape: tuple[int, int, int]):
        """shape: query heads, key heads and width of a head, of every layer. A collective call of all ranks."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # here, since it takes seconds

        self.size, self._number = ranks.sequence_size, ranks.rank % ranks.sequence_size
        timeout = process_group.COLLECTIVE_TIMEOUT["nccl" if ranks.on_gpu else "gloo"]
        members = torch.arange(ranks.world_size).view(-1, self.size).tolist()
        self._group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
        heads, key_heads, width = shape
        self._ulysses = UlyssesSPAttentionHF(
            attn=self._of_own_heads,
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=width,
            kv_head_count=key_heads,
            num_hidden_layers=0,  # for a way of debugging alone
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def stretch(self, input_ids, reward_index, read_index, *, segments=None, position_ids=None, **_) -> Stretch:
        """This rank's part of a micro-batch, which all ranks of the group are given whole (layouts.Batch).

        Padded rows become one row in which each is a segment: what pads it comes last and is seen by nothing that is read.
        """
        if segments is None:
            segments, position_ids = _rows_as_segments(*input_ids.shape, input_ids.device)
            input_ids = input_ids.view(1, -1)
        missing = -input_ids.shape[1] % self.size
        length = (input_ids.shape[1] + missing) // self.size
        start = self._number * length
        own = [F.pad(ids, (0, missing))[:, start : start + length] for ids in (input_ids, position_ids)]
        names = {"input_ids": own[0], "position_ids": own[1], "segments": segments.extended(missing)}
        # No index is looked at here, only computed with: choosing those of this stretch would wait for a GPU.
        reads = [part for index in (reward_index, read_index) for part in _within(index - start, length)]
        return Stretch(names | {"exchange": self._exchange}, *reads)

    def summed(self, rewards: torch.Tensor) -> torch.Tensor:
        """[N rewards] the sum over the group; each rank's gradient is that of its own rewards."""
        return _Sum.apply(rewards, self._group)

    def _exchange(self, module, query, key, value, **how):
        """Attention [1, L, H, D] of a stretch, from query [1, H, L, D], key and value [1, G, L, D]; see segment_attention."""
        # DeepSpeed gathers the positions of all tokens in each layer, for attentions that tell sequences apart by them.
        nothing = query.new_zeros((1, 1), dtype=torch.int64)
        return self._ulysses(module, query, key, value, None, **how | {"position_ids": nothing})

    def _of_own_heads(self, module, query, key, value, attention_mask, *, s_aux=None, **how):
        if s_aux is not None:
            s_aux = s_aux.chunk(self.size)[self._number]
        return segment_attention(module, query, key, value, attention_mask, s_aux=s_aux, **how)


def _within(index: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in a stretch, and which of them are in it; the others are moved to its ends."""
    inside = index.clamp(0, length - 1)
    return inside, inside == index


def _rows_as_segments(rows: int, length: int, device: torch.device) -> tuple[Segments, torch.Tensor]:
    """Padded rows one after another: the segments, and the position of each token in its row, [1, rows * length]."""
    segments = make_segments([(row * length, (row + 1) * length, ()) for row in range(rows)])
    return segments.to(device), torch.arange(length, device=device).repeat(1, rows)


class _Sum(torch.autograd.Function):
    """The sum over a group, whose gradient goes back as it is: every rank of the group has the same loss, and a sum would
    count it once for each."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
