"""Which pairs form a step, which of them a rank computes together, and how they are laid out in memory.

A step is a fixed set of pairs decided by (seed, epoch, step), whatever the number of ranks. The step's pairs are dealt
to the ranks, and each rank cuts its share into micro-batches; every rank makes the same number of them, because under
ZeRO-3 each forward is a collective call. A rank that runs out computes a pair again that counts for nothing.

The padded layout, for the pairs (abc|de , abc|f) and (gh|i , gh|jk): S = 4 sequences, chosen first, T = 5 positions

    position   0 1 2 3 4
    chosen 0   a b c d e      reward read at (0, 4)
    chosen 1   g h i . .      reward read at (1, 2)
    rejected 0 a b c f .      reward read at (2, 3)
    rejected 1 g h j k .      reward read at (3, 3)

Only this module knows lengths: the reward is read at the last token by length, never by comparing ids with the pad id.
Shapes: B pairs, S = 2 B sequences, T positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """A micro-batch in memory.

    input_ids: [S, T] int64.
    attention_mask: [S, T] int64, 1 where there is a token.
    reward_index: [2 B] int64 into the flattened S * T positions: B chosen, then B rejected.
    tokens: number of real tokens.
    squared_lengths: sum of length^2 over sequences (for counting attention FLOPs).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    reward_index: torch.Tensor
    tokens: int
    squared_lengths: int

    @property
    def positions(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel()

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What the reward model's forward takes, on its device."""
        return {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "attention_mask", "reward_index")
        }


def padded_batch(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> Batch:
    """Lay out (chosen ids, rejected ids) pairs as right-padded rows; the module docstring draws it."""
    sequences = [np.asarray(pair[side]) for side in (0, 1) for pair in pairs]
    lengths = np.array([len(sequence) for sequence in sequences])
    input_ids = np.full((len(sequences), lengths.max()), pad_token_id, np.int64)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)),
        reward_index=torch.from_numpy(np.arange(len(sequences)) * lengths.max() + lengths - 1),
        tokens=int(lengths.sum()),
        squared_lengths=int((lengths**2).sum()),
    )


def steps(pairs: int, pairs_per_step: int, total_episodes: int, seed: int) -> Iterator[np.ndarray]:
    """The pair indices of each optimizer step, in order.

    Each epoch is a permutation from (seed, epoch). A step never crosses an epoch; the last one of an epoch may be
    smaller. Stops after `total_episodes` pairs.
    """
    epoch = 0
    while total_episodes > 0:
        order = np.random.default_rng((seed, epoch)).permutation(pairs)[:total_episodes]
        for start in range(0, len(order), pairs_per_step):
            yield order[start : start + pairs_per_step]
        total_episodes -= len(order)
        epoch += 1


@dataclass(frozen=True)
class MicroBatch:
    """Pairs to compute together. The first `counted` of them enter loss and metrics (0: only keeps ranks in step)."""

    indices: np.ndarray
    counted: int


def micro_batches(
    indices: np.ndarray, lengths: np.ndarray, *, rank: int, world_size: int, batch_size: int
) -> list[MicroBatch]:
    """This rank's micro-batches of the pairs `indices`; the same number on every rank.

    Pairs are sorted by length, so that a micro-batch holds similar lengths and little padding, and dealt to the ranks
    in turn, so that shares cost about the same. Neither changes the sum over the pairs, and so not the step.

    Args:
        indices: [n] pair indices of the step (or of an evaluation set).
        lengths: [all pairs] tokens of the longer side, by pair index.
        batch_size: most pairs in a micro-batch.
    """
    indices = indices[np.argsort(lengths[indices], kind="stable")]
    share = indices[rank::world_size]
    count = -(-len(indices[::world_size]) // batch_size)  # rank 0 has the largest share
    parts = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    filler = MicroBatch(indices[:1], counted=0)
    return [MicroBatch(part, len(part)) for part in parts] + [filler] * (count - len(parts))
