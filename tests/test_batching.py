"""Steps, shares and the padded layout."""

import numpy as np
import pytest
import torch

from open_rm import batching


def test_padded_layout_is_the_one_drawn_in_the_docstring():
    a, b, c, d, e, f, g, h, i, j, k = range(1, 12)
    batch = batching.padded_batch([([a, b, c, d, e], [a, b, c, f]), ([g, h, i], [g, h, j, k])], pad_token_id=0)
    assert batch.input_ids.tolist() == [[a, b, c, d, e], [g, h, i, 0, 0], [a, b, c, f, 0], [g, h, j, k, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 4, 4]
    assert [divmod(int(index), 5) for index in batch.reward_index] == [(0, 4), (1, 2), (2, 3), (3, 3)]
    assert (batch.tokens, batch.positions, batch.squared_lengths) == (16, 20, 25 + 9 + 16 + 16)


def test_reward_is_read_by_length_even_where_text_holds_the_pad_id():
    batch = batching.padded_batch([([5, 0, 6, 0], [5, 7])], pad_token_id=0)
    assert batch.reward_index.tolist() == [3, 5]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1]


def test_steps_are_decided_by_seed_and_epoch_alone():
    first = [step.tolist() for step in batching.steps(20, 6, 50, seed=4)]
    assert first == [step.tolist() for step in batching.steps(20, 6, 50, seed=4)]
    assert first != [step.tolist() for step in batching.steps(20, 6, 50, seed=5)]
    assert [len(step) for step in first] == [6, 6, 6, 2, 6, 6, 6, 2, 6, 4]
    assert sorted(sum(first[:4], [])) == list(range(20))  # an epoch sees every pair once
    assert first[:4] != first[4:8]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("pairs", [1, 5, 16])
def test_every_pair_is_counted_once_and_ranks_make_equally_many_micro_batches(world_size, pairs):
    lengths = np.random.default_rng(0).integers(2, 50, size=40)
    step = np.arange(10, 10 + pairs)
    shares = [
        batching.micro_batches(step, lengths, rank=rank, world_size=world_size, batch_size=2)
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = [index for share in shares for part in share for index in part.indices[: part.counted].tolist()]
    assert sorted(counted) == step.tolist()
    assert all(len(part.indices) > 0 for share in shares for part in share)  # a forward always has something to compute


def test_micro_batches_hold_similar_lengths():
    lengths = np.array([9, 1, 8, 2, 7, 3])
    parts = batching.micro_batches(np.arange(6), lengths, rank=0, world_size=1, batch_size=2)
    assert [lengths[part.indices].tolist() for part in parts] == [[1, 2], [3, 7], [8, 9]]


def test_inputs_are_what_the_model_takes():
    inputs = batching.padded_batch([([1, 2], [3])], pad_token_id=0).inputs(torch.device("cpu"))
    assert set(inputs) == {"input_ids", "attention_mask", "reward_index"}
