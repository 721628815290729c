"""Padded, packed and shared-prefix batches give the same rewards and the same gradient of every parameter.

Everything here is float32. Layouts differ in nothing but the order in which the same numbers are added.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import transformers
import varlen_reference
from conftest import load_model, read_metrics, read_pairs, shared_data, toy_flags
from largest_tensor import Largest
from pairs_of_ids import as_data
from torch.nn.attention import varlen

from open_rm import toy
from open_rm.batching import attention, feeding, layouts
from open_rm.batching.dealing import deal_step
from open_rm.batching.layouts import lay_out
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.data.pairs import PreferenceData
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import Args, ModelFlags
from open_rm.model import families, last_layer
from open_rm.model.families import Layout, choose_layout
from open_rm.reward_modeling import main
from open_rm.training.losses import ranking_loss

CPU = torch.device("cpu")
# Absolute. Measured over all tests of this file: rewards (up to 2) 1e-6 apart, gradients (up to 8) 3e-6.
TOLERANCE = 1e-5
# Losses after some steps of training; as in test_engine.py.
RUN_TOLERANCE = 1e-5
EVERYTHING = 10**6  # a budget that holds all pairs of a test in one micro-batch


@dataclasses.dataclass
class Result:
    """rewards: [pairs, 2].  gradients: of the step's loss, by parameter.  micro_batches, positions: over all ranks."""

    rewards: torch.Tensor
    gradients: dict[str, torch.Tensor]
    micro_batches: int
    positions: int


def computed(reward_model, pairs: PreferenceData, layout: str, *, world_size=1, max_tokens=EVERYTHING) -> Result:
    """All pairs as one step, as the recipe computes it; the ranks' gradients added up as their all-reduce would."""
    reward_model.zero_grad()
    rewards = torch.full((len(pairs), 2), torch.nan)
    micro_batches = [micro for rank in fed(pairs, layout, world_size, max_tokens) for micro in rank]
    positions = 0
    for micro in micro_batches:
        chosen, rejected, _ = micro.sides(reward_model(**micro.batch.inputs(CPU)))
        (ranking_loss(chosen, rejected).sum() / len(pairs)).backward()
        rewards[micro.indices] = torch.stack((chosen, rejected), 1).detach()
        positions += micro.batch.positions
    gradients = {name: parameter.grad.clone() for name, parameter in reward_model.named_parameters()}
    return Result(rewards, gradients, len(micro_batches), positions)


def fed(pairs: PreferenceData, layout: str, world_size=1, max_tokens=EVERYTHING) -> list[list[feeding.MicroBatch]]:
    """The micro-batches of each rank in a step of all pairs."""
    rules = BatchRules(layout, pad_token_id=2, max_tokens=max_tokens, evaluation_tokens=max_tokens)
    deal = deal_step(np.arange(len(pairs)), pairs.table, rules, world_size)
    return [list(feeding.micro_batches(parts, pairs, rules)) for parts in deal.ranks]


def differences(result: Result, reference: Result) -> tuple[float, float]:
    """(largest difference of rewards, of gradients)"""
    assert result.gradients.keys() == reference.gradients.keys()
    assert not result.rewards.isnan().any()
    apart = [(result.gradients[name] - reference.gradients[name]).abs().max().item() for name in reference.gradients]
    return (result.rewards - reference.rewards).abs().max().item(), max(apart)


def assert_same(result: Result, reference: Result, what=""):
    rewards, gradients = differences(result, reference)
    assert rewards < TOLERANCE, f"{what}: rewards {rewards} apart"
    assert gradients < TOLERANCE, f"{what}: gradients {gradients} apart"


def tokens(count: int, seed: int) -> list[int]:
    """Token ids of the toy's vocabulary, none of them special."""
    return np.random.default_rng(seed).integers(5, 500, count).tolist()


def ranked(prompt, responses) -> list[tuple]:
    """All pairs of a ranked list."""
    sequences = [prompt + response for response in responses]
    return [(better, worse) for i, better in enumerate(sequences) for worse in sequences[i + 1 :]]


P, Q, R = tokens(30, 1), tokens(12, 2), [tokens(n, 10 + n) for n in (20, 14, 9, 25)]
CASES = {
    "one pair": ([(P + R[0], P + R[1])], [30]),
    "rejected longer than chosen": ([(P + R[2], P + R[3])], [30]),
    "ranked lists of two prompts": (ranked(P, R) + ranked(Q, R[:3]), [30] * 6 + [12] * 3),
    "two pairs with the same chosen": ([(P + R[0], P + R[1]), (P + R[0], P + R[2])], [30] * 2),
    "chosen of one pair is rejected of another": ([(P + R[0], P + R[1]), (P + R[1], P + R[2])], [30] * 2),
    "the same pair twice": ([(P + R[0], P + R[1])] * 2 + [(Q + R[0], Q + R[1])], [30, 30, 12]),
    "a response that begins another": ([(P + R[0], P + R[0][:5]), (P + R[0][:1], P + R[0])], [30] * 2),
    "sides alike beyond the prompt": ([(P + R[0] + [7], P + R[0] + [8]), (P + R[1] + [7], P + R[1])], [30] * 2),
    "nothing in common": ([(R[0], R[1]), (R[2], R[3])], [0, 0]),
    "responses of one token": ([(P + [7], P + [8]), (P + [7], P + [9])], [30] * 2),
    "sequences of one token": ([([7], [8]), ([9], [7])], [0, 0]),
    "a prompt longer than what is shared": ([(P + R[0], P[:20] + R[1]), (P + R[0], P + R[2])], [30] * 2),
}


@pytest.fixture(scope="module")
def toy_models(toy):
    """The toy as a reward model, by (layout, gradient checkpointing)."""
    tokenizer = load_tokenizer(str(toy / "model"))
    made = {}

    def get(layout: str, checkpointing: bool = False):
        key = layout, checkpointing
        if key not in made:
            made[key] = load_model(toy / "model", tokenizer, layout=layout, every=int(checkpointing))
        return made[key]

    return get


@pytest.mark.parametrize("case", CASES)
def test_rewards_and_gradients_are_equal_whatever_the_pairs_share(toy_models, case):
    pairs = as_data(*CASES[case])
    reference = computed(toy_models("padded"), pairs, "padded")
    assert max(gradient.abs().max() for gradient in reference.gradients.values()) > 0.01
    for layout in LAYOUTS:
        for world_size, max_tokens in ((1, EVERYTHING), (1, 60), (2, EVERYTHING)):
            result = computed(toy_models(layout), pairs, layout, world_size=world_size, max_tokens=max_tokens)
            assert_same(result, reference, f"{layout}, {world_size} ranks, {max_tokens} tokens")


def headed(size: int, other: int = 0):
    """Pairs of six prompts: three of them begin with `size` tokens, two with `other` tokens, one with none of both."""
    first, second = tokens(size, 90), tokens(other, 91)
    pairs, lengths = [], []
    for number, header in enumerate((first, second, first, [], first, second)):
        prompt, length = header + tokens(3 + 4 * number, 60 + number), len(header) + 3 + 4 * number
        pairs.append((prompt + R[number % 4], prompt + R[(number + 1) % 4]))
        lengths.append(length)
    whole = pairs[0][0]  # and an answer that begins another, one answer in two pairs, a prompt that is another's header
    pairs += [(whole, whole[:-4]), (whole, pairs[0][1]), (first + [7, 8], first + [7, 9, 10])]
    return pairs, [*lengths, lengths[0], lengths[0], size]


def laid_out_with(monkeypatch, least: int) -> list:
    """Have pairs laid out with another least header; returns what is laid out."""
    made = []

    def with_least(*args, **kwargs):
        made.append(lay_out(*args, **kwargs, least_header=least))
        return made[-1]

    monkeypatch.setattr(feeding, "lay_out", with_least)
    return made


HEADERS = [(0, 0, 16), (1, 0, 1), (1, 2, 1), (64, 0, 16), (64, 40, 16), (500, 0, 16)]  # tokens of two, and the least


@pytest.mark.parametrize(("size", "other", "least"), HEADERS)
def test_rewards_and_gradients_are_equal_with_headers_of_any_length(toy_models, monkeypatch, size, other, least):
    made = laid_out_with(monkeypatch, least)
    pairs = as_data(*headed(size, other))
    reference = computed(toy_models("padded"), pairs, "padded", max_tokens=2500)
    made.clear()
    for checkpointing in (False, True):
        result = computed(toy_models("shared_prefix", checkpointing), pairs, "shared_prefix")
        assert_same(result, reference, f"checkpointing {checkpointing}")
    for batch in made:  # four prompts of the first header, of which three have it for nothing; two of the other
        assert batch.per_prompt - batch.computed >= 3 * size + other
        assert max(len(prefix) for *_, prefix in batch.segments.bounds) == (2 if size + other else 1)


def test_identical_responses_of_a_prompt_are_computed_once(toy_models):
    """Six pairs over four responses: the prompt once and each response once, and gradients as if computed six times."""
    pairs = as_data(ranked(P, R), [30] * 6)
    shared, packed = (computed(toy_models(layout), pairs, layout) for layout in ("shared_prefix", "packed"))
    assert shared.positions == 30 + sum(map(len, R))
    assert packed.positions == 3 * sum(len(P + response) for response in R)
    assert_same(shared, packed)


# ---------------------------------------------------------------- real rows


def short_rows(name: str, toy) -> list[dict]:
    """Eight rows with sides below 300 characters; of alpaca_eval, all such pairs of some prompts."""
    folder = toy / "data" if name == "toy" else shared_data(name)
    prompts: dict[str, list[dict]] = {}
    for line in (folder / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        if max(len(json.dumps(row[side])) for side in ("chosen", "rejected")) < 300:
            prompts.setdefault(json.dumps(row.get("prompt", len(prompts))), []).append(row)
    least = 3 if name == "alpaca_eval" else 1
    rows = [row for group in prompts.values() if len(group) >= least for row in group]
    assert len(rows) >= 8
    return rows[:8]


@pytest.fixture(scope="module")
def real_pairs(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    made = {}

    def get(name: str) -> PreferenceData:
        if name not in made:
            rows = short_rows(name, toy)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            flags = {"max_token_length": 2048, "max_prompt_token_length": 2048}
            flags["dataset_local_cache_dir"] = str(folder / "cache")
            tokenizer = load_tokenizer(str(toy / "model"))
            made[name] = read_pairs([folder / f"{name}.jsonl", "1.0"], tokenizer, **flags)
        return made[name]

    return get


REAL = ("toy", "hh_harmless", "alpaca_eval")


@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [("padded", False), ("packed", False), ("shared_prefix", False), ("packed", True), ("shared_prefix", True)],
)
@pytest.mark.parametrize("name", REAL)
def test_real_rows_give_the_same_with_any_ranks_and_budget(toy_models, real_pairs, name, layout, checkpointing):
    """Budgets: everything at once, a third of what padding takes, and a pair each; on 1, 2 and 5 ranks."""
    pairs = real_pairs(name)
    reference = computed(toy_models("padded"), pairs, "padded")
    some = reference.positions // 3
    counts, largest = set(), (0.0, 0.0)
    for world_size, max_tokens in ((1, EVERYTHING), (1, 1), (2, EVERYTHING), (2, some), (5, some)):
        result = computed(
            toy_models(layout, checkpointing), pairs, layout, world_size=world_size, max_tokens=max_tokens
        )
        assert_same(result, reference, f"{world_size} ranks, {max_tokens} tokens")
        counts.add(result.micro_batches)
        largest = tuple(map(max, zip(largest, differences(result, reference), strict=True)))
    print(f"{name}, {layout}: rewards {largest[0]:.1e} apart, gradients {largest[1]:.1e}")
    assert {1, 2, 5, len(pairs)} <= counts


@pytest.mark.parametrize("name", REAL)
def test_layouts_compute_fewer_positions_in_the_order_of_their_names(toy_models, real_pairs, name):
    padded, packed, shared = (computed(toy_models(layout), real_pairs(name), layout).positions for layout in LAYOUTS)
    assert shared < packed < padded


# ---------------------------------------------------------------- the test tested


def seeing_more(layout: str):
    """make_segments, but a segment also sees all that stands between its prefix and it: rejected sees chosen."""
    honest = layouts.make_segments

    def of(start, end, prefix):
        if prefix:
            return start, end, (*prefix[:-1], (prefix[-1][0], start))
        return start, end, ((0, start),) if layout == "packed" and start else ()

    return lambda bounds: honest([of(*bound) for bound in bounds])


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_the_comparison_notices_a_rejected_response_that_sees_the_chosen_one(
    toy_models, real_pairs, monkeypatch, layout, name
):
    pairs = real_pairs(name)
    reference = computed(toy_models("padded"), pairs, "padded")
    monkeypatch.setattr(layouts, "make_segments", seeing_more(layout))
    mutated = computed(toy_models(layout), pairs, layout)
    assert min(differences(mutated, reference)) > 100 * TOLERANCE
    with pytest.raises(AssertionError, match="apart"):
        assert_same(mutated, reference)


@pytest.mark.parametrize("moved", [0, 1])
def test_the_comparison_notices_a_header_or_a_prompt_that_is_a_token_off(toy_models, monkeypatch, moved):
    """One of the two ranges of a prefix begins a token late and ends one late."""
    pairs, honest = as_data(*headed(64)), layouts.make_segments
    reference = computed(toy_models("padded"), pairs, "padded")

    def off(start, end, prefix):
        shifted = tuple((a + 1, b + 1) if number == moved else (a, b) for number, (a, b) in enumerate(prefix))
        return (start, end, shifted if len(prefix) == 2 else prefix)

    monkeypatch.setattr(layouts, "make_segments", lambda bounds: honest([off(*bound) for bound in bounds]))
    mutated = computed(toy_models("shared_prefix"), pairs, "shared_prefix")
    assert min(differences(mutated, reference)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", REAL)
def test_the_comparison_notices_positions_that_do_not_restart(toy_models, real_pairs, monkeypatch, name):
    pairs = real_pairs(name)
    reference = computed(toy_models("padded"), pairs, "padded")

    def running_on(*args, **kwargs):
        batch = lay_out(*args, **kwargs)
        return dataclasses.replace(batch, position_ids=torch.arange(batch.positions)[None])

    monkeypatch.setattr(feeding, "lay_out", running_on)
    mutated = computed(toy_models("shared_prefix"), pairs, "shared_prefix")
    assert min(differences(mutated, reference)) > 10 * TOLERANCE


def test_the_comparison_notices_a_loss_averaged_over_micro_batches(toy_models):
    """Uneven micro-batches: dividing by their own pairs instead of the step's would weigh pairs differently."""
    pairs = as_data(*CASES["ranked lists of two prompts"])
    reference = computed(toy_models("padded"), pairs, "padded")
    few = as_data(*(part[:3] for part in CASES["ranked lists of two prompts"]))
    rest = as_data(*(part[3:] for part in CASES["ranked lists of two prompts"]))
    halves = [computed(toy_models("shared_prefix"), part, "shared_prefix").gradients for part in (few, rest)]
    name = "classifier.score.weight"
    right = sum(len(part) / len(pairs) * half[name] for part, half in zip((few, rest), halves, strict=True))
    assert (right - reference.gradients[name]).abs().max() < TOLERANCE
    assert (sum(half[name] for half in halves) / 2 - reference.gradients[name]).abs().max() > 10 * TOLERANCE


# ---------------------------------------------------------------- families

WINDOW = 8  # below every prompt and below most responses
SIZE = dict(
    vocab_size=1100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    initializer_range=0.1,  # with the usual 0.02, attention is nearly uniform and caps and windows hardly matter
)
GROUPED = SIZE | {"num_key_value_heads": 2}
BOTH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
YARN = {  # queries grow with their position beyond the original ones
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.5,
}
FAMILIES = {
    "llama": lambda **c: transformers.LlamaConfig(**(GROUPED | c)),
    "qwen2": lambda **c: transformers.Qwen2Config(**(GROUPED | c)),
    "qwen2 with windows": lambda **c: transformers.Qwen2Config(
        **(GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1} | c)
    ),
    "qwen3": lambda **c: transformers.Qwen3Config(**(GROUPED | {"head_dim": 8} | c)),
    "mistral": lambda **c: transformers.MistralConfig(**(GROUPED | {"sliding_window": WINDOW} | c)),
    "gemma2": lambda **c: transformers.Gemma2Config(
        **(GROUPED | BOTH | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8} | c)
    ),
    "gemma3_text": lambda **c: transformers.Gemma3TextConfig(**(GROUPED | BOTH | {"query_pre_attn_scalar": 8} | c)),
    "phi3": lambda **c: transformers.Phi3Config(**(GROUPED | c)),
    "phi3 with windows": lambda **c: transformers.Phi3Config(**(GROUPED | {"sliding_window": WINDOW} | c)),
    "olmo2": lambda **c: transformers.Olmo2Config(**(GROUPED | c)),
    "gpt_neox": lambda **c: transformers.GPTNeoXConfig(**(SIZE | c)),
    "gemma": lambda **c: transformers.GemmaConfig(**(GROUPED | {"head_dim": 8} | c)),
    "glm4": lambda **c: transformers.Glm4Config(**(GROUPED | {"head_dim": 8} | c)),
    "glm4_moe": lambda **c: transformers.Glm4MoeConfig(
        **(GROUPED | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8} | c)
    ),
    "granite": lambda **c: transformers.GraniteConfig(
        **(GROUPED | {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0} | c)
    ),
    "cohere": lambda **c: transformers.CohereConfig(**(GROUPED | c)),
    "cohere2": lambda **c: transformers.Cohere2Config(**(GROUPED | BOTH | c)),
    "gpt_oss": lambda **c: transformers.GptOssConfig(**(GROUPED | BOTH | EXPERTS | {"num_local_experts": 4} | c)),
    "ministral3": lambda **c: transformers.Ministral3Config(**(GROUPED | {"head_dim": 8, "rope_parameters": YARN} | c)),
    "mixtral": lambda **c: transformers.MixtralConfig(
        **(GROUPED | EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW} | c)
    ),
    "olmo3": lambda **c: transformers.Olmo3Config(
        **(GROUPED | {"sliding_window": WINDOW, "layer_types": BOTH["layer_types"]} | c)
    ),
    "olmoe": lambda **c: transformers.OlmoeConfig(**(GROUPED | EXPERTS | {"num_experts": 4} | c)),
    "qwen3_moe": lambda **c: transformers.Qwen3MoeConfig(
        **(
            GROUPED
            | EXPERTS
            | {"num_experts": 4, "head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW}
            | c
        )
    ),
    "smollm3": lambda **c: transformers.SmolLM3Config(
        **(GROUPED | {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW} | c)
        | {"layer_types": ["sliding_attention", "full_attention"]}
    ),
}


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory):
    """A folder with a tiny causal model of the family; the same weights whatever the changes to its config."""

    def make(family: str, **changes):
        folder = tmp_path_factory.mktemp("family")
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**changes)).save_pretrained(folder)
        return folder

    return make


HEADER = tokens(500, 77)  # longer than a window; of every family in test_headers_agree.py
FAMILY_PAIRS = (ranked(P, R[:3]) + [(Q + R[3], Q + R[1]), (R[1], R[2] + R[0])], [30] * 3 + [12, 0])
FAMILY_PAIRS_WITH_A_HEADER = (
    ranked(HEADER + P, R[:3]) + [(HEADER + Q + R[3], HEADER + Q + R[1]), (R[1], R[2] + R[0])],
    [530] * 3 + [512, 0],
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_in_all_layouts(family_folder, tokenizer, family, monkeypatch):
    """The reference is padded and computes its last layer at every token."""
    folder, pairs = family_folder(family), as_data(*FAMILY_PAIRS)
    config = families.read_config(ModelFlags(model_name_or_path=str(folder)), max_token_length=256)
    choice = dict(attn_implementation=None, max_token_length=256, on_gpu=False)
    assert choose_layout("auto", config, **choice) == Layout("shared_prefix")
    assert config.model_type == family.split()[0] and config.model_type in families.SEGMENTS
    with monkeypatch.context() as whole:
        whole.setattr(last_layer, "compute_where_read", lambda layer: [])
        reference = computed(load_model(folder, tokenizer), pairs, "padded")
    largest = (0.0, 0.0)
    for layout in LAYOUTS:
        assert choose_layout(layout, config, **choice) == Layout(layout)
        for every, world_size, max_tokens in ((0, 1, EVERYTHING), (1, 2, 120)):
            reward_model = load_model(folder, tokenizer, layout=layout, every=every)
            result = computed(reward_model, pairs, layout, world_size=world_size, max_tokens=max_tokens)
            assert_same(result, reference, f"{family}, {layout}")
            largest = tuple(map(max, zip(largest, differences(result, reference), strict=True)))
    print(f"{family}: rewards {largest[0]:.1e} apart, gradients {largest[1]:.1e}")


@pytest.mark.parametrize(
    "signature", [varlen_reference.of_torch_2_11, varlen_reference.of_this_torch], ids=["2.11", "this"]
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3", "gpt_neox"])
def test_whole_models_give_the_same_by_what_a_gpu_is_told(family_folder, tokenizer, family, signature, monkeypatch):
    """Every layer calls torch's varlen_attn as on a GPU; here it is computed densely, with its kernel's demands."""
    folder, called = family_folder(family, max_position_embeddings=1024), []
    pairs = as_data(*FAMILY_PAIRS_WITH_A_HEADER)
    reference = computed(load_model(folder, tokenizer), pairs, "padded")
    monkeypatch.setattr(varlen, "varlen_attn", signature)

    def as_on_a_gpu(query, key, value, segments, scoring):
        assert scoring.softcap is None and scoring.sinks is None
        called.append(scoring.window)
        return attention._flash(query, key, value, segments, scoring.scaling, scoring.window)

    monkeypatch.setattr(attention, "_on_cpu", as_on_a_gpu)
    for layout in ("packed", "shared_prefix"):
        reward_model = load_model(folder, tokenizer, layout=layout)
        for checkpointing in (False, True):
            if checkpointing:
                reward_model.classifier.activation_checkpointing_enable()
            called.clear()
            assert_same(computed(reward_model, pairs, layout), reference, f"{family}, {layout}, {checkpointing}")
            assert len(called) > 2 if checkpointing else len(called) == 2  # two layers, and again in backward
            assert set(called) == {"gemma3_text": {WINDOW, None}, "mistral": {WINDOW}}.get(family, {None})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_its_mlp_and_output_projection_where_a_reward_is_read(family_folder, tokenizer, family):
    """Equal sequences (three of the pairs are of one ranked list) are read once."""
    reward_model, pairs = load_model(family_folder(family), tokenizer, layout="shared_prefix"), as_data(*FAMILY_PAIRS)
    last, seen = reward_model.classifier.base_model.layers[-1], {}
    for name, module in last.named_modules():
        if isinstance(module, torch.nn.Linear) or name == "mlp":
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: args[0].shape[:-1].numel()})
            )
    [[micro]] = fed(pairs, "shared_prefix")
    batch = micro.batch
    reward_model(**batch.inputs(CPU))
    distinct = len({tuple(side) for pair in FAMILY_PAIRS[0] for side in pair})
    everywhere = {name for name, tokens in seen.items() if tokens == batch.positions}
    assert {tokens for name, tokens in seen.items() if name not in everywhere} == {distinct}
    assert {name.rpartition(".")[2] for name in everywhere} <= {"k_proj", "v_proj", "qkv_proj", "query_key_value"}
    few = set(seen) - everywhere  # with the MLP its experts, which are no linear layers
    trimmed = sum(
        p.numel() for name, p in last.named_parameters() if {name.rpartition(".")[0], name.split(".")[0]} & few
    )
    assert reward_model.read_only_parameters == trimmed


def test_every_family_that_may_be_packed_is_tested_here():
    assert {family.split()[0] for family in FAMILIES} == set(families.SEGMENTS)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("qwen2 with windows", {"sliding_window": 200}),
        ("mistral", {"sliding_window": 200}),
        ("gemma2", {"sliding_window": 200}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3_text", {"sliding_window": 200}),
        ("phi3 with windows", {"sliding_window": 200}),
        ("cohere2", {"sliding_window": 200}),
        ("gpt_oss", {"sliding_window": 200}),
        ("granite", {"attention_multiplier": 0.3}),
        ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.0}}),
        ("mixtral", {"sliding_window": 200}),
        ("olmo3", {"sliding_window": 200}),
        ("qwen3_moe", {"sliding_window": 200}),
        ("smollm3", {"sliding_window": 200}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_and_soft_caps_matter_in_these_models(family_folder, tokenizer, family, without, layout):
    """Else their families would pass above with a window or a cap that nobody applies."""
    pairs = as_data(*FAMILY_PAIRS)
    plain, changed = (
        computed(load_model(family_folder(family, **changes), tokenizer, layout=layout), pairs, layout)
        for changes in ({}, without)
    )
    assert min(differences(plain, changed)) > 100 * TOLERANCE


OTHERS = {
    "bert": transformers.BertConfig(),
    "mamba": transformers.MambaConfig(),
    "gpt2": transformers.GPT2Config(),
    "llama4_text": transformers.Llama4TextConfig(),
    "qwen3_next": transformers.Qwen3NextConfig(),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_padded_and_refused_by_name(family):
    choice = dict(attn_implementation=None, max_token_length=256, on_gpu=False)
    layout = choose_layout("auto", OTHERS[family], **choice)
    assert layout.name == "padded" and family in layout.why_not_shared
    assert choose_layout("padded", OTHERS[family], **choice) == Layout("padded")
    for wanted in ("packed", "shared_prefix"):
        with pytest.raises(
            UserError, match=rf"--batching {wanted} is not possible: .*{family}.*; pass --batching padded"
        ):
            choose_layout(wanted, OTHERS[family], **choice)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.mark.parametrize(
    ("family", "changes", "choice", "reason"),
    [
        ("gemma2", {}, {"on_gpu": True}, "gemma2 soft-caps attention scores"),
        ("gpt_oss", {}, {"on_gpu": True}, "gpt_oss has attention sinks"),
        ("llama", {}, {"on_gpu": True, "bf16": False}, "flash attention over packed rows computes in bfloat16"),
        (
            "llama",
            {"head_dim": 4},
            {"on_gpu": True},
            "flash attention takes heads of a multiple of 8 numbers up to 256",
        ),
        ("llama", {"head_dim": 264}, {"on_gpu": True}, "flash attention takes heads of .*, and here they are of 264"),
        ("gpt_neox", {"num_attention_heads": 8}, {"on_gpu": True}, "flash attention .*, and here they are of 4"),
        ("llama", {}, {"on_gpu": True, "capability": (7, 5)}, "flash attention needs a GPU of .* this one has 7.5"),
        ("llama", {}, {"attn_implementation": "eager"}, "--attn_implementation eager is attention for padded rows"),
        (
            "phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 100},
            {},
            "longrope rotary embeddings depend on the longest sequence beyond 100 tokens",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {"max_token_length": 257},
            "dynamic rotary embeddings depend on the longest sequence beyond 256 tokens",
        ),
    ],
)
def test_settings_that_packed_rows_do_not_have_are_padded_with_the_reason(family, changes, choice, reason):
    choice = dict(attn_implementation=None, max_token_length=256, on_gpu=False) | choice
    layout = choose_layout("auto", FAMILIES[family](**changes), **choice)
    assert layout.name == "padded" and re.match(reason, layout.why_not_shared)
    with pytest.raises(UserError, match=reason):
        choose_layout("shared_prefix", FAMILIES[family](**changes), **choice)


def test_key_heads_that_do_not_divide_the_heads_are_padded_on_a_gpu():
    config = FAMILIES["llama"](hidden_size=48, num_attention_heads=6)
    config.num_key_value_heads = 4
    choice = dict(attn_implementation=None, max_token_length=100, on_gpu=True)
    assert "6 heads over 4 key heads" in choose_layout("auto", config, **choice).why_not_shared


@pytest.mark.parametrize("head_dim", [8, 96, 256])
@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (12, 0)])
def test_what_flash_attention_takes_is_shared_on_a_gpu(head_dim, capability):
    choice = dict(attn_implementation=None, max_token_length=100, on_gpu=True, capability=capability)
    assert choose_layout("auto", FAMILIES["llama"](head_dim=head_dim), **choice) == Layout("shared_prefix")


@pytest.mark.parametrize("changes", [{"head_dim": 4}, {"head_dim": 264}])
def test_a_cpu_takes_heads_of_any_width(changes):
    choice = dict(attn_implementation=None, max_token_length=100, on_gpu=False)
    assert choose_layout("auto", FAMILIES["llama"](**changes), **choice) == Layout("shared_prefix")


def test_rotary_embeddings_that_change_only_beyond_the_longest_sequence_may_be_packed():
    config = FAMILIES["phi3"](rope_parameters=LONGROPE, original_max_position_embeddings=100)
    choice = dict(attn_implementation=None, max_token_length=100, on_gpu=False)
    assert choose_layout("auto", config, **choice) == Layout("shared_prefix")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_no_mask_of_the_whole_row_is_made_by_the_model(family_folder, tokenizer, family):
    """A row of some 5,000 tokens forward and backward: no tensor comes near 5,000 * 5,000."""
    prompts = [tokens(30, i + 999) for i in range(60)]  # none begins like another
    pairs = as_data([(p + tokens(30, i), p + tokens(20, i + 99)) for i, p in enumerate(prompts)], [30] * 60)
    pairs = [(pair[0].tolist(), pair[1].tolist()) for pair in pairs.pairs(range(60))]
    for layout in ("packed", "shared_prefix"):
        reward_model = load_model(family_folder(family), tokenizer, layout=layout)
        batch = lay_out(layout, pairs, pad_token_id=2, prompt_ids=range(60))
        assert batch.positions > 4500
        with Largest() as largest:
            reward_model(**batch.inputs(CPU)).sum().backward()
        assert largest.elements < batch.positions**2 / 50


# ---------------------------------------------------------------- whole runs


# (layout, processes, --max_tokens_per_micro_batch, --group_by_prompt)
RUNS = [
    ("padded", 2, 400, False),
    ("packed", 1, 300, False),
    ("shared_prefix", 1, None, False),
    ("packed", 2, None, True),
    ("shared_prefix", 1, None, True),
    ("shared_prefix", 2, 250, True),
]


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory, run_forked):
    """Run the recipe on ranked lists (12 prompts, 3 responses, 36 pairs); returns its lines of metrics."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [message["content"] for row in toy_rows(36) for message in row["chosen"]]
    lines = []
    for prompt in range(12):
        prefix = {"prompt": toy_rows(12)[prompt]["prompt"]}
        answers = [[{"role": "assistant", "content": text}] for text in texts[3 * prompt : 3 * prompt + 3]]
        lines += [prefix | {"chosen": answers[i], "rejected": answers[j]} for i, j in ((0, 1), (0, 2), (1, 2))]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def run(layout: str, processes: int, max_tokens: int | None, grouped: bool) -> list[dict]:
        output = folder / f"{layout}-{processes}-{max_tokens}-{grouped}"
        flags = dict(
            model_name_or_path=str(toy / "model"),
            dataset_mixer_list=[str(folder / "ranked.jsonl"), "1.0"],
            dataset_mixer_eval_list=[str(toy / "data"), "20"],
            dataset_local_cache_dir=str(folder / "cache"),
            per_device_train_batch_size=10 // processes,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=16,
            max_tokens_per_micro_batch=max_tokens,
            learning_rate=1e-3,
            total_episodes=45,
            num_evals=0,
            num_sample_pairs=2,
            batching=layout,
            group_by_prompt=grouped,
        )
        if not output.exists():
            done = run_forked(*toy_flags(toy, output, **flags), processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
            assert f"batching {layout}" in done.stdout
        return read_metrics(output)

    return run


def toy_rows(count: int) -> list[dict]:
    return toy.make_pairs(count, seed=11)


def column(lines, name):
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(("layout", "processes", "max_tokens", "grouped"), RUNS)
def test_layouts_processes_and_budgets_give_the_same_run(runs, layout, processes, max_tokens, grouped):
    """Compared within --group_by_prompt, since that decides which pairs form a step."""
    reference, other = runs("padded", 1, None, grouped), runs(layout, processes, max_tokens, grouped)
    expected = [9, 18, 27, 36, 45] if grouped else [10, 20, 30, 36, 45]  # with groups of three, steps of ten hold nine
    lines = [[line for line in run if "train/rm/loss" in line] for run in (reference, other)]
    assert column(lines[0], "episode") == column(lines[1], "episode") == expected
    for name in ("train/rm/loss", "eval/rm/loss", "train/rm/chosen_rewards", "train/rm/rejected_rewards"):
        assert column(other, name) == pytest.approx(column(reference, name), abs=RUN_TOLERANCE, rel=0), name
    assert column(other, "train/rm/grad_norm") == pytest.approx(column(reference, "train/rm/grad_norm"), rel=1e-4)
    # Of three responses in three pairs each is computed once, and the prompt once, where a rank holds all of them.
    fraction = max(column(other, "perf/distinct_token_fraction"))
    assert fraction < (0.5 if grouped and processes == 1 else 0.95) if layout == "shared_prefix" else fraction == 1


@pytest.fixture(scope="module")
def gpt2(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=1100, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    load_tokenizer(str(toy / "model")).save_pretrained(folder)
    return folder


def test_a_run_says_in_one_line_why_it_is_padded(toy, gpt2, tmp_path, capfd):
    options = dict(
        model_name_or_path=str(gpt2),
        dataset_mixer_list=[str(toy / "data"), "16"],
        dataset_local_cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(UserError, match="--batching shared_prefix is not possible: .*gpt2"):
        main(Args(**options, batching="shared_prefix"))
    main(Args(**options))
    assert (
        "batching padded, not shared_prefix: packed rows are not known to be exact for gpt2" in capfd.readouterr().out
    )


@pytest.mark.parametrize("change", [{"use_bidirectional_attention": True}, {"is_causal": False}])
def test_attention_that_is_not_causal_is_padded_and_says_so(change):
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    for name, value in change.items():
        setattr(config, name, value)
    options = {"attn_implementation": None, "max_token_length": 10, "on_gpu": False}
    assert choose_layout("auto", config, **options) == Layout("padded", "its attention is not causal")


def test_why_it_is_not_shared_is_said_of_auto_alone():
    """Who names a layout gets it or a refusal, and has nothing to be told."""
    gpt2, llama = transformers.GPT2Config(), FAMILIES["llama"]()
    options = {"attn_implementation": None, "max_token_length": 10, "on_gpu": False}
    reason = "packed rows are not known to be exact for gpt2"
    assert choose_layout("auto", gpt2, **options).why_not_shared == reason
    assert choose_layout("padded", gpt2, **options).why_not_shared is None
    for wanted in ("auto", *LAYOUTS):
        assert choose_layout(wanted, llama, **options).why_not_shared is None
    rules = BatchRules("padded", 0, max_tokens=100, evaluation_tokens=100)
    assert rules.describe(reason).startswith(f"batching padded, not shared_prefix: {reason}, at most 100 positions")
    assert rules.describe(None).startswith("batching padded, at most 100 positions")
