"""Behind long headers every family gives the rewards and gradients of padded rows, whatever stands behind them.

A header is what prompts have in common at their start. Here it is longer than a sliding window, or the window ends inside it.
"""

import pytest
from conftest import load_model
from pairs_of_ids import as_data
from test_layouts_agree import (
    EVERYTHING,
    FAMILIES,
    TOLERANCE,
    WINDOW,
    P,
    Q,
    R,
    assert_same,
    computed,
    differences,
    family_folder,  # noqa: F401 (a fixture)
    fed,
    ranked,
    tokens,
)

FIRST, SECOND = tokens(500, 77), tokens(300, 78)
ROOM = {"max_position_embeddings": 1024}
WINDOWED = (
    *("qwen2 with windows", "mistral", "gemma2", "gemma3_text", "phi3 with windows", "cohere2", "gpt_oss", "mixtral"),
    *("olmo3", "qwen3_moe", "smollm3"),
)

# Pairs, tokens of their prompts, and how many tokens a row of all of them does not compute because prompts share a header.
CASES = {
    "one pair alone": ([(FIRST + P + R[0], FIRST + P + R[1])], [530], 0),
    "a prompt that is the header": (
        [(FIRST + P + R[0], FIRST + P + R[1]), (FIRST + R[2], FIRST + R[3])],
        [530, 500],
        500,
    ),
    "two prompts that are the header, under two names": (
        [(FIRST + R[0], FIRST + R[1]), (FIRST + [9], FIRST + [9, 7])],
        [500, 501],
        500,
    ),
    "a prompt that begins another": (
        [(FIRST + P + R[0], FIRST + P + R[1]), (FIRST + P + Q + R[0], FIRST + P + Q + R[2])],
        [530, 542],
        530,
    ),
    "an answer that begins another": (
        [(FIRST + P + R[0], FIRST + P + R[0][:-3]), (FIRST + Q + R[1][:1], FIRST + Q + R[1])],
        [530, 512],
        500,
    ),
    "an answer that is another prompt": (
        [(FIRST + P + Q, FIRST + P + R[1]), (FIRST + P + Q + R[0], FIRST + P + Q + R[2])],
        [530, 542],
        530,
    ),
    "answers of one token": ([(FIRST + P + [7], FIRST + P + [8]), (FIRST + [7], FIRST + [8])], [530, 500], 500),
    "two headers": (
        [
            *ranked(FIRST + P, R[:3]),
            *((FIRST + Q + R[3], FIRST + Q + R[1]), (SECOND + R[0], SECOND + R[0][:4]), (R[1], R[2] + R[0])),
            *((SECOND + P + R[2], SECOND + P + R[3]), (FIRST + R[1], FIRST + R[2])),
        ],
        [530] * 3 + [512, 300, 0, 330, 500],
        2 * 500 + 300,
    ),
    "headers that begin alike": (
        [
            (FIRST[:n] + SECOND[: 9 * i] + R[i], FIRST[:n] + SECOND[: 9 * i] + R[3])
            for i, n in enumerate((500, 200, 500))
        ],
        [500, 209, 518],
        None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_behind_two_long_headers(family_folder, tokenizer, family):  # noqa: F811
    """In one row and in many, on one rank and on two, and with every layer recomputed."""
    folder, (pairs, lengths, saved) = family_folder(family, **ROOM), CASES["two headers"]
    pairs = as_data(pairs, lengths)
    reference = computed(load_model(folder, tokenizer), pairs, "padded", max_tokens=3000)
    assert max(gradient.abs().max() for gradient in reference.gradients.values()) > 0.01
    [[micro]] = fed(pairs, "shared_prefix")
    assert micro.batch.per_prompt - micro.batch.computed == saved
    for every, world_size, max_tokens in ((0, 1, EVERYTHING), (1, 2, 700)):
        reward_model = load_model(folder, tokenizer, layout="shared_prefix", every=every)
        result = computed(reward_model, pairs, "shared_prefix", world_size=world_size, max_tokens=max_tokens)
        assert_same(result, reference, f"{family}, {world_size} ranks, {max_tokens} tokens")


@pytest.mark.parametrize("window", [60, 310, 520])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_may_end_anywhere_in_a_header(family_folder, tokenizer, family, window):  # noqa: F811
    """A window of 60 reaches from an answer over its prompt into the header; others end near the headers' beginnings."""
    pairs = as_data(*CASES["two headers"][:2])
    folder = family_folder(family, **ROOM, sliding_window=window)
    reference = computed(load_model(folder, tokenizer), pairs, "padded", max_tokens=3000)
    result = computed(load_model(folder, tokenizer, layout="shared_prefix", every=1), pairs, "shared_prefix")
    assert_same(result, reference, f"{family}, window {window}")
    other = computed(load_model(family_folder(family, **ROOM), tokenizer), pairs, "padded", max_tokens=3000)
    assert min(differences(other, reference)) > 100 * TOLERANCE, "the window does not matter"


def test_families_with_windows_are_those_whose_config_has_one():
    with_window = {name for name, config in FAMILIES.items() if getattr(config(), "sliding_window", None) == WINDOW}
    assert with_window == set(WINDOWED)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("case", CASES)
def test_what_stands_behind_a_header_may_be_anything(family_folder, tokenizer, case, family):  # noqa: F811
    folder, (pairs, lengths, saved) = family_folder(family, **ROOM), CASES[case]
    pairs = as_data(pairs, lengths)
    reference = computed(load_model(folder, tokenizer), pairs, "padded")
    for every in (0, 1):
        [[micro]] = fed(pairs, "shared_prefix")
        assert saved is None or micro.batch.per_prompt - micro.batch.computed == saved
        result = computed(load_model(folder, tokenizer, layout="shared_prefix", every=every), pairs, "shared_prefix")
        assert_same(result, reference, f"{family}, {case}")
