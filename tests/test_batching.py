"""How pairs lie in memory: the layouts as drawn, where rewards are read, and what is shared."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm import batching

a, b, c, d, e, f, g, h, i, j, k = range(1, 12)
LAYOUTS = ("padded", "packed", "shared_prefix")
DRAWN = [([a, b, c, d, e], [a, b, c, f]), ([g, h, i], [g, h, j, k])]


def last_tokens(batch):
    return batch.input_ids.flatten()[batch.reward_index].tolist()


def test_padded_layout_is_the_one_drawn_in_the_docstring():
    batch = batching.padded_batch(DRAWN, pad_token_id=0)
    assert batch.input_ids.tolist() == [[a, b, c, d, e], [g, h, i, 0, 0], [a, b, c, f, 0], [g, h, j, k, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 4, 4]
    assert [divmod(int(index), 5) for index in batch.reward_index] == [(0, 4), (1, 2), (2, 3), (3, 3)]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 16, 20, 15 + 6 + 10 + 10)


def test_packed_layout_is_the_one_drawn_in_the_docstring():
    batch = batching.packed_batch(DRAWN)
    assert batch.input_ids.tolist() == [[a, b, c, d, e, g, h, i, a, b, c, f, g, h, j, k]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 8, 0, 0), (8, 12, 0, 0), (12, 16, 0, 0))
    assert batch.segments.key_index is None  # queries and keys are the same row
    assert last_tokens(batch) == [e, i, f, k]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 16, 16, 15 + 6 + 10 + 10)


def test_shared_prefix_layout_is_the_one_drawn_in_the_docstring():
    batch = batching.shared_prefix_batch(DRAWN, prompt_ids=[0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, f, g, h, j, k, i]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 2]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 6, 0, 3), (6, 10, 0, 0), (10, 11, 6, 8))
    assert last_tokens(batch) == [e, i, f, k]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 11, 11, 15 + 4 + 10 + 3)


def test_all_pairs_of_a_prompt_share_it_and_a_repeated_response_is_one():
    """Three responses to one prompt in their three pairs: 6 sequences, 3 of them distinct."""
    x, y, z = [a, b, c, d, e], [a, b, f], [a, b, g, h]
    batch = batching.shared_prefix_batch([(x, y), (x, z), (y, z)], prompt_ids=[7, 7, 7])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, g, h, f]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 7, 0, 2), (7, 8, 0, 2))
    assert last_tokens(batch) == [e, e, f, f, h, h]
    assert (batch.tokens, batch.computed) == (24, 8)


def test_pairs_of_different_prompts_share_nothing_even_where_tokens_agree():
    batch = batching.shared_prefix_batch([([a, b], [a, c]), ([a, b], [a, d])], prompt_ids=[0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, a, b, d]]


def test_a_response_that_begins_another_keeps_its_own_last_token():
    """The reward is read at a sequence's last token, and that token stands in a segment of its own."""
    batch = batching.shared_prefix_batch([([a, b, c, d], [a, b])], prompt_ids=[0])
    assert batch.input_ids.tolist() == [[a, b, c, d, b]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 1]]
    assert batch.segments.bounds == ((0, 4, 0, 0), (4, 5, 0, 1))


def test_reward_is_read_by_length_even_where_text_holds_the_pad_id():
    batch = batching.padded_batch([([5, 0, 6, 0], [5, 7])], pad_token_id=0)
    assert batch.reward_index.tolist() == [3, 5]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1]


def test_inputs_are_what_the_model_takes():
    layouts = {layout: batching.lay_out(layout, DRAWN, pad_token_id=0, prompt_ids=[0, 1]) for layout in LAYOUTS}
    inputs = {layout: set(batch.inputs(torch.device("cpu"))) for layout, batch in layouts.items()}
    row = {"input_ids", "position_ids", "segments", "reward_index", "read_index"}
    assert inputs == {
        "padded": {"input_ids", "attention_mask", "reward_index", "read_index"},
        "packed": row,
        "shared_prefix": row,
    }


TOKEN = st.integers(1, 3)  # few, so that sequences often agree
PAIR = st.tuples(st.lists(TOKEN, min_size=1, max_size=8), st.lists(TOKEN, min_size=1, max_size=8))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=st.sampled_from(LAYOUTS), rows=st.lists(st.tuples(PAIR, st.integers(0, 2)), min_size=1, max_size=6))
def test_every_sequence_can_be_read_back_token_by_token_from_its_reward_backwards(layout, rows):
    """Whatever is shared: behind each reward stands exactly its sequence, at the positions 0, 1, 2, ..."""
    pairs, prompt_ids = zip(*rows, strict=True)
    batch = batching.lay_out(layout, pairs, pad_token_id=0, prompt_ids=prompt_ids)
    sequences = [pair[side] for side in (0, 1) for pair in pairs]
    assert len(batch.reward_index) == len(sequences)
    for index, sequence in zip(batch.reward_index.tolist(), sequences, strict=True):
        if layout == "padded":
            row, column = divmod(index, batch.input_ids.shape[1])
            places = [row * batch.input_ids.shape[1] + i for i in range(column + 1)]
            assert batch.attention_mask.flatten()[places].all()
        else:
            [(start, end, prefix_start, prefix_end)] = [b for b in batch.segments.bounds if b[1] == index + 1]
            places = [*range(prefix_start, prefix_end), *range(start, end)]
            assert batch.position_ids.flatten()[places].tolist() == list(range(len(sequence)))
        assert batch.input_ids.flatten()[places].tolist() == sequence
    assert batch.tokens == sum(map(len, sequences))
    assert batch.computed == (batch.tokens if layout == "padded" else batch.positions)
    assert batch.computed <= batch.tokens


def test_common_prefix_leaves_each_sequence_a_token_of_its_own():
    def length(*sequences):
        return batching.common_prefix([np.array(sequence) for sequence in sequences])

    assert length([a, b, c], [a, b, d]) == 2
    assert length([a, b, c], [a, b, d], [a, e]) == 1
    assert length([a, b, c], [a, b]) == 1
    assert length([a], [a, b]) == length([a], [b]) == length([a, b], [b, a]) == 0
