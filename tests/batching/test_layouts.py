"""How pairs lie in memory: the layouts as drawn, where rewards are read, and what is shared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm.batching.layouts import LEAST_HEADER, lay_out, lay_out_sequences
from open_rm.batching.rules import LAYOUTS
from open_rm.data.pairs import common_prefix
from open_rm.data.prefixes import best_sharing, in_order

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
    assert batch.segments.bounds == ((0, 5, ()), (5, 8, ()), (8, 12, ()), (12, 16, ()))
    assert batch.segments.key_index is None  # queries and keys are the same row
    assert last_tokens(batch) == [e, i, f, k]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 16, 16, 15 + 6 + 10 + 10)


def test_shared_prefix_layout_is_the_one_drawn_in_the_docstring():
    batch = laid_out("shared_prefix", DRAWN, [0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, f, g, h, j, k, i]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 2]]
    assert batch.segments.bounds == ((0, 5, ()), (5, 6, ((0, 3),)), (6, 10, ()), (10, 11, ((6, 8),)))
    assert last_tokens(batch) == [e, i, f, k]
    assert (batch.tokens, batch.computed, batch.positions, batch.area) == (16, 11, 11, 15 + 4 + 10 + 3)


def test_all_pairs_of_a_prompt_share_it_and_a_repeated_response_is_one():
    """Three responses to one prompt in their three pairs: 6 sequences, 3 of them distinct."""
    x, y, z = [a, b, c, d, e], [a, b, f], [a, b, g, h]
    batch = laid_out("shared_prefix", [(x, y), (x, z), (y, z)], [7, 7, 7])
    assert batch.input_ids.tolist() == [[a, b, c, d, e, g, h, f]]
    assert batch.segments.bounds == ((0, 5, ()), (5, 7, ((0, 2),)), (7, 8, ((0, 2),)))
    assert last_tokens(batch) == [e, e, f, f, h, h]
    assert (batch.tokens, batch.computed) == (24, 8)


def test_pairs_of_different_prompts_share_nothing_where_fewer_tokens_agree_than_a_header_has():
    batch = laid_out("shared_prefix", [([a, b], [a, c]), ([a, b], [a, d])], [0, 1])
    assert batch.input_ids.tolist() == [[a, b, c, a, b, d]]


def test_a_response_that_begins_another_keeps_its_own_last_token():
    """The reward is read at a sequence's last token, and that token stands in a segment of its own."""
    batch = laid_out("shared_prefix", [([a, b, c, d], [a, b])], [0])
    assert batch.input_ids.tolist() == [[a, b, c, d, b]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 1]]
    assert batch.segments.bounds == ((0, 4, ()), (4, 5, ((0, 1),)))


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


def seen_by(bound) -> list[int]:
    """The row's positions that the last token of a segment sees, in the order of its sequence."""
    start, end, prefix = bound
    return [place for a, b in (*prefix, (start, end)) for place in range(a, b)]


def assert_sequences_can_be_read_back(layout, batch, sequences):
    """Whatever is shared: behind each reward stands exactly its sequence, at the positions 0, 1, 2, ..."""
    assert len(batch.reward_index) == len(sequences)
    for index, sequence in zip(batch.reward_index.tolist(), sequences, strict=True):
        if layout == "padded":
            row, column = divmod(index, batch.input_ids.shape[1])
            places = [row * batch.input_ids.shape[1] + i for i in range(column + 1)]
            assert batch.attention_mask.flatten()[places].all()
        else:
            [places] = [seen_by(bound) for bound in batch.segments.bounds if bound[1] == index + 1]
            assert batch.position_ids.flatten()[places].tolist() == list(range(len(sequence)))
        assert batch.input_ids.flatten()[places].tolist() == sequence
    assert batch.tokens == sum(map(len, sequences))
    assert batch.computed == (batch.tokens if layout == "padded" else batch.positions)
    assert batch.computed <= batch.per_prompt <= batch.tokens


@repeatable
@given(layout=st.sampled_from(LAYOUTS), rows=st.lists(st.tuples(PAIR, st.integers(0, 2)), min_size=1, max_size=6))
def test_every_sequence_can_be_read_back_token_by_token_from_its_reward_backwards(layout, rows):
    pairs, prompt_ids = zip(*rows, strict=True)
    sequences = [pair[side] for side in (0, 1) for pair in pairs]
    assert_sequences_can_be_read_back(layout, laid_out(layout, pairs, prompt_ids), sequences)


# ---------------------------------------------------------------- any number of answers to a prompt


def sequences_laid_out(layout, sequences, prompt_of, unit_of=None, **least_header):
    return lay_out_sequences(layout, sequences, pad_token_id=0, prompt_of=prompt_of, unit_of=unit_of, **least_header)


@repeatable
@given(
    layout=st.sampled_from(LAYOUTS),
    rows=st.lists(st.tuples(SIDE, st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9),
    with_units=st.booleans(),
    least_header=st.integers(1, 4),
)
def test_any_number_of_answers_to_any_prompts_can_be_read_back(layout, rows, with_units, least_header):
    """Odd numbers of them too, with any parts of a prompt as units, and prompts that share a header."""
    sequences, prompt_of, units = zip(*rows, strict=True)
    how = {"least_header": least_header}
    batch = sequences_laid_out(layout, sequences, prompt_of, units if with_units else None, **how)
    assert_sequences_can_be_read_back(layout, batch, sequences)


def test_all_answers_to_a_prompt_share_it_and_the_rewards_are_read_in_the_order_of_the_answers():
    """Three answers to one prompt, one to another; the longest of a prompt stands first in the row."""
    answers = [[a, b, c], [a, b, d, e], [g, h], [a, b, f, i, j]]
    batch = sequences_laid_out("shared_prefix", answers, prompt_of=[0, 0, 1, 0])
    assert batch.input_ids.tolist() == [[a, b, f, i, j, d, e, c, g, h]]
    assert batch.segments.bounds == ((0, 5, ()), (5, 7, ((0, 2),)), (7, 8, ((0, 2),)), (8, 10, ()))
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
        (batch.tokens, batch.computed, batch.per_prompt, batch.positions, batch.area),
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


# ---------------------------------------------------------------- headers: what prompts have in common at their start


def test_prompts_that_begin_alike_are_laid_out_as_drawn():
    pairs = [([a, b, c, d, e], [a, b, c, f]), ([a, b, g, h, i], [a, b, g, j])]
    batch = lay_out("shared_prefix", pairs, pad_token_id=0, prompt_ids=[0, 1], least_header=2)
    assert batch.input_ids.tolist() == [[a, b, c, d, e, f, g, h, i, j]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2, 3, 4, 3]]
    assert batch.segments.bounds == ((0, 5, ()), (5, 6, ((0, 3),)), (6, 9, ((0, 2),)), (9, 10, ((0, 2), (6, 7))))
    assert batch.segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 6, 7, 8, 0, 1, 6, 9]
    assert last_tokens(batch) == [e, i, f, j]
    assert (batch.tokens, batch.computed, batch.per_prompt, batch.area) == (18, 10, 12, 15 + 4 + 12 + 4)
    without = lay_out("shared_prefix", pairs, pad_token_id=0, prompt_ids=[0, 1], least_header=3)
    assert (without.computed, without.per_prompt) == (12, 12)


def test_two_headers_and_a_prompt_without_one_stand_in_a_row_and_groups_of_a_header_side_by_side():
    """Of the prompts 0 and 2 one header, of 1 and 4 another; 3 begins like none; 2, 3 and 4 have one answer each."""
    first, second = [*range(100, 120)], [*range(200, 230)]
    sequences = [
        *([*first, 1, 2], [*first, 1, 3]),
        *([*second, 4, 5, 6], [*second, 4, 7]),
        *([*first, 8], [9, 10], [*second, 11]),
    ]
    batch = sequences_laid_out("shared_prefix", sequences, [0, 0, 1, 1, 2, 3, 4])
    row = [*first, 1, 2, 3, 8, *second, 4, 5, 6, 7, 11, 9, 10]
    assert batch.input_ids.tolist() == [row]
    assert batch.segments.bounds == (
        *((0, 22, ()), (22, 23, ((0, 21),)), (23, 24, ((0, 20),))),
        *((24, 57, ()), (57, 58, ((24, 55),)), (58, 59, ((24, 54),)), (59, 61, ())),
    )
    assert (batch.computed, batch.per_prompt) == (61, 61 + 20 + 30)
    assert_sequences_can_be_read_back("shared_prefix", batch, sequences)


@pytest.mark.parametrize("shared", [LEAST_HEADER - 1, LEAST_HEADER])
def test_a_header_is_shared_from_its_least_length_on(shared):
    header = [*range(100, 100 + shared)]
    batch = sequences_laid_out("shared_prefix", [[*header, 1], [*header, 2]], [0, 1])
    assert batch.computed == 2 + shared * (1 if shared >= LEAST_HEADER else 2)
    assert (batch.tokens, batch.per_prompt) == (2 + 2 * shared, 2 + 2 * shared)


@pytest.mark.parametrize(
    ("sequences", "prompts", "row"),
    [
        ([[a, b, c, d], [a, b]], [0, 1], [a, b, c, d, b]),  # one is the other's beginning, under another prompt
        ([[a, b, c], [a, b, c]], [0, 1], [a, b, c, c]),  # equal ones of two prompts
        ([[a, b, c], [a, b, c], [a, b, d, e], [a, b, d, e]], [0, 0, 1, 1], [a, b, c, d, e]),  # each prompt's are one
        (
            [[a, b, c], [a, b], [a, b, d]],
            [0, 0, 1],
            [a, b, c, b, b, d],
        ),  # the header ends before the shorter answer's end
        ([[a], [a, b]], [0, 1], [a, a, b]),  # a sequence of one token shares none
    ],
)
def test_each_sequence_keeps_its_last_token_beside_a_header(sequences, prompts, row):
    batch = sequences_laid_out("shared_prefix", sequences, prompts, least_header=1)
    assert batch.input_ids.tolist() == [row]
    assert_sequences_can_be_read_back("shared_prefix", batch, sequences)


@repeatable
@given(rows=st.lists(st.tuples(SIDE, st.integers(0, 3)), min_size=1, max_size=9), least=st.integers(1, 4))
def test_no_query_sees_more_than_its_own_sequence_and_the_row_is_as_short_as_sharing_makes_it(rows, least):
    sequences, prompt_of = zip(*rows, strict=True)
    batch = sequences_laid_out("shared_prefix", sequences, prompt_of, least_header=least)
    ids, expected = batch.input_ids[0].tolist(), {tuple(sequence) for sequence in sequences}
    ends = set(batch.reward_index.tolist())
    for (
        bound
    ) in batch.segments.bounds:  # whatever a token sees is the beginning of a sequence, and all of it at its end
        assert bound[1] - 1 in ends and tuple(ids[place] for place in seen_by(bound)) in expected
    groups = {}
    for sequence, prompt in rows:
        groups.setdefault(prompt, set()).add(tuple(sequence))
    starts, tokens = [], 0
    for group in groups.values():
        distinct = [np.array(sequence) for sequence in group]
        prefix = common_prefix(distinct)
        tokens += sum(map(len, distinct)) - prefix * (len(distinct) - 1)
        starts.append(distinct[0][:prefix])
    saved = sum(one.saved for one in best_sharing(in_order(starts)[1], least=least))
    assert (batch.per_prompt, batch.positions, batch.computed) == (tokens, tokens - saved, tokens - saved)
