"""How pairs lie in memory: the layouts as drawn, where rewards are read, and what is shared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm.batching.layouts import lay_out, lay_out_sequences
from open_rm.batching.rules import LAYOUTS
from open_rm.data.pairs import common_prefix

a, b, c, d, e, f, g, h, i, j, k = range(1, 12)
DRAWN = [([a, b, c, d, e], [a, b, c, f]), ([g, h, i], [g, h, j, k])]


def laid_out(layout, pairs, prompt_ids):
    return lay_out(layout, pairs, pad_token_id=0, prompt_ids=prompt_ids)


def last_tokens(batch):
    return batch.input_ids.flatten()[batch.reward_index].tolist()


def test_padded_layout_is_the_one_drawn_in_the_docstring():
    batch = laid_out("padded", DRAWN, [0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, d, e], [g, h, i, 0, 0], [a, b, c, f, 0], [g, h, j, k, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 4, 4]
    assert [divmod(int(index), 5) for index in batch.reward_index] == [(0, 4), (1, 2), (2, 3), (3, 3)]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 16, 20, 15 + 6 + 10 + 10)


def test_packed_layout_is_the_one_drawn_in_the_docstring():
    batch = laid_out("packed", DRAWN, [0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, g, h, i, a, b, c, f, g, h, j, k]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 8, 0, 0), (8, 12, 0, 0), (12, 16, 0, 0))
    assert batch.segments.key_index is None  # queries and keys are the same row
    assert last_tokens(batch) == [e, i, f, k]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 16, 16, 15 + 6 + 10 + 10)


def test_shared_prefix_layout_is_the_one_drawn_in_the_docstring():
    batch = laid_out("shared_prefix", DRAWN, [0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, f, g, h, j, k, i]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 2]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 6, 0, 3), (6, 10, 0, 0), (10, 11, 6, 8))
    assert last_tokens(batch) == [e, i, f, k]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 11, 11, 15 + 4 + 10 + 3)


def test_all_pairs_of_a_prompt_share_it_and_a_repeated_response_is_one():
    """Three responses to one prompt in their three pairs: 6 sequences, 3 of them distinct."""
    x, y, z = [a, b, c, d, e], [a, b, f], [a, b, g, h]
    batch = laid_out("shared_prefix", [(x, y), (x, z), (y, z)], [7, 7, 7])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, g, h, f]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 7, 0, 2), (7, 8, 0, 2))
    assert last_tokens(batch) == [e, e, f, f, h, h]
    assert (batch.tokens, batch.computed) == (24, 8)


def test_pairs_of_different_prompts_share_nothing_even_where_tokens_agree():
    batch = laid_out("shared_prefix", [([a, b], [a, c]), ([a, b], [a, d])], [0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, a, b, d]]


def test_a_response_that_begins_another_keeps_its_own_last_token():
    """The reward is read at a sequence's last token, and that token stands in a segment of its own."""
    batch = laid_out("shared_prefix", [([a, b, c, d], [a, b])], [0])
    assert batch.input_ids.tolist() == [[a, b, c, d, b]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 1]]
    assert batch.segments.bounds == ((0, 4, 0, 0), (4, 5, 0, 1))


def test_reward_is_read_by_length_even_where_text_holds_the_pad_id():
    batch = laid_out("padded", [([5, 0, 6, 0], [5, 7])], [0])
    assert batch.reward_index.tolist() == [3, 5]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1]


def test_inputs_are_what_the_model_takes():
    layouts = {layout: laid_out(layout, DRAWN, [0, 1]) for layout in LAYOUTS}
    inputs = {layout: set(batch.inputs(torch.device("cpu"))) for layout, batch in layouts.items()}
    row = {"input_ids", "position_ids", "segments", "reward_index", "read_index"}
    assert inputs == {
        "padded": {"input_ids", "attention_mask", "reward_index", "read_index"},
        "packed": row,
        "shared_prefix": row,
    }


SIDE = st.lists(st.integers(1, 3), min_size=1, max_size=8)  # few tokens, so that sequences often agree
PAIR = st.tuples(SIDE, SIDE)
repeatable = settings(max_examples=100, deadline=None, derandomize=True)


def assert_sequences_can_be_read_back(layout, batch, sequences):
    """Whatever is shared: behind each reward stands exactly its sequence, at the positions 0, 1, 2, ..."""
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


@repeatable
@given(layout=st.sampled_from(LAYOUTS), rows=st.lists(st.tuples(PAIR, st.integers(0, 2)), min_size=1, max_size=6))
def test_every_sequence_can_be_read_back_token_by_token_from_its_reward_backwards(layout, rows):
    pairs, prompt_ids = zip(*rows, strict=True)
    sequences = [pair[side] for side in (0, 1) for pair in pairs]
    assert_sequences_can_be_read_back(layout, laid_out(layout, pairs, prompt_ids), sequences)


# ---------------------------------------------------------------- any number of answers to a prompt


def sequences_laid_out(layout, sequences, prompt_of, unit_of=None):
    return lay_out_sequences(layout, sequences, pad_token_id=0, prompt_of=prompt_of, unit_of=unit_of)


@repeatable
@given(
    layout=st.sampled_from(LAYOUTS),
    rows=st.lists(st.tuples(SIDE, st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9),
    with_units=st.booleans(),
)
def test_any_number_of_answers_to_any_prompts_can_be_read_back(layout, rows, with_units):
    """Odd numbers of them too, and with any parts of a prompt as units."""
    sequences, prompt_of, units = zip(*rows, strict=True)
    batch = sequences_laid_out(layout, sequences, prompt_of, units if with_units else None)
    assert_sequences_can_be_read_back(layout, batch, sequences)


def test_all_answers_to_a_prompt_share_it_and_the_rewards_are_read_in_the_order_of_the_answers():
    """Three answers to one prompt, one to another; the longest of a prompt stands first in the row."""
    answers = [[a, b, c], [a, b, d, e], [g, h], [a, b, f, i, j]]
    batch = sequences_laid_out("shared_prefix", answers, prompt_of=[0, 0, 1, 0])
    assert batch.input_ids.tolist() == [[a, b, f, i, j, d, e, c, g, h]]
    assert batch.segments.bounds == ((0, 5, 0, 0), (5, 7, 0, 2), (7, 8, 0, 2), (8, 10, 0, 0))
    assert batch.reward_index.tolist() == [7, 6, 9, 4] and last_tokens(batch) == [c, e, h, j]
    assert (batch.tokens, batch.computed) == (14, 10)
    packed, padded = (sequences_laid_out(layout, answers, [0, 0, 1, 0]) for layout in ("packed", "padded"))
    assert packed.reward_index.tolist() == [2, 6, 8, 13] and last_tokens(packed) == [c, e, h, j]
    assert padded.input_ids.shape == (4, 5) and last_tokens(padded) == [c, e, h, j]


def test_equal_answers_are_computed_once_and_each_gets_its_reward():
    batch = sequences_laid_out("shared_prefix", [[a, b, c], [a, b, d], [a, b, c]], prompt_of=[5, 5, 5])
    assert batch.input_ids.tolist() == [[a, b, c, d]]
    assert last_tokens(batch) == [c, d, c] and batch.read_index.tolist() == [2, 3]


def test_units_share_more_where_that_leaves_fewer_tokens_and_without_units_a_prompt_is_one_part():
    """Two units of one prompt, each alike for three more tokens: apart 6 + 6 tokens, together 1 + 4 * 4."""
    sequences = [[a, b, c, d, e], [a, b, c, d, f], [a, g, h, i, j], [a, g, h, i, k]]
    apart = sequences_laid_out("shared_prefix", sequences, [0] * 4, unit_of=[0, 0, 1, 1])
    assert apart.input_ids.tolist() == [[a, b, c, d, e, f, a, g, h, i, j, k]]
    together = sequences_laid_out("shared_prefix", sequences, [0] * 4)
    assert together.input_ids.tolist() == [[*sequences[0], *sequences[1][1:], *sequences[2][1:], *sequences[3][1:]]]
    assert last_tokens(apart) == last_tokens(together) == [e, f, j, k]


def described(batch):
    tensors = (batch.input_ids, batch.reward_index, batch.attention_mask, batch.position_ids)
    return (
        *(tensor if tensor is None else tensor.tolist() for tensor in tensors),
        batch.segments and batch.segments.bounds,
        (batch.tokens, batch.computed, batch.positions, batch.area),
    )


@repeatable
@given(layout=st.sampled_from(LAYOUTS), rows=st.lists(st.tuples(PAIR, st.integers(0, 2)), min_size=1, max_size=6))
def test_pairs_are_their_sequences_with_a_unit_each(layout, rows):
    pairs, prompt_ids = zip(*rows, strict=True)
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    units = [*range(len(pairs)), *range(len(pairs))]
    batch = sequences_laid_out(layout, sequences, [*prompt_ids, *prompt_ids], units)
    assert described(batch) == described(laid_out(layout, pairs, prompt_ids))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_two_answers_to_a_prompt_are_a_pair_of_it(layout):
    pairs, prompt_ids = DRAWN, [0, 1]
    batch = sequences_laid_out(layout, [pair[side] for side in (0, 1) for pair in pairs], prompt_ids * 2)
    assert described(batch) == described(laid_out(layout, pairs, prompt_ids))


def test_common_prefix_leaves_each_sequence_a_token_of_its_own():
    def length(*sequences):
        return common_prefix([np.array(sequence) for sequence in sequences])

    assert length([a, b, c], [a, b, d]) == 2
    assert length([a, b, c], [a, b, d], [a, e]) == 1
    assert length([a, b, c], [a, b]) == 1
    assert length([a], [a, b]) == length([a], [b]) == length([a, b], [b, a]) == 0
