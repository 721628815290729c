"""Devices that compute a row together give the rewards, gradients and runs of one device.

The reference is one rank: for rewards and gradients padded rows through transformers' own attention, for runs the recipe.
All ranks are processes on the CPU with gloo, in float32; they differ in the order in which the same numbers are added.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY, environment_of_a_process, python_path, read_metrics
from pairs_of_ids import as_data
from ranks_of_a_sequence import ADAPTERS, HEADERS, SHARING, STAGES
from safetensors.torch import load_file
from test_layouts_agree import FAMILIES, LONGROPE

from open_rm.batching import feeding
from open_rm.batching.attention import make_segments, segment_attention
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.model import sequence_parallel
from open_rm.model.sequence_parallel import check, grouped
from open_rm.ranks import Ranks

# Absolute; measured: rewards up to 1e-6 apart, gradients up to 3e-6, losses and weights after 10 steps up to 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory) -> Path:
    """What ranks_of_a_sequence.py has computed there."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "toy").symlink_to(toy)
    paths = [REPOSITORY, REPOSITORY / "tests", Path(__file__).parent]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "ranks_of_a_sequence.py", folder],
        env=environment_of_a_process() | {"PYTHONPATH": python_path(*paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    """(ranks, size of a group) -> case -> what was found."""
    read = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    return {tuple(map(int, name.split("_"))): cases for name, cases in read.items()}


def apart(result: dict, reference: dict) -> float:
    """The largest difference of rewards and gradients."""
    assert result["gradients"].keys() == reference["gradients"].keys()
    assert max(gradient.abs().max() for gradient in reference["gradients"].values()) > 0.01
    gradients = [result["gradients"][name] - value for name, value in reference["gradients"].items()]
    rewards = [result["rewards"] - reference["rewards"]] if "rewards" in reference else []
    return max(difference.abs().max().item() for difference in gradients + rewards)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewards_and_gradients_in_every_layout_are_those_of_one_rank(found, layout, world):
    """On 4 ranks with recomputation, and two key heads, which two ranks each have."""
    assert apart(found[world, world][f"all pairs, {layout}"], found[1, 1]["all pairs"]) < TOLERANCE


@pytest.mark.parametrize("case", [*SHARING, *(f"family {family}" for family in FAMILIES)])
def test_every_family_and_whatever_pairs_share_is_computed_as_by_one_rank(found, case):
    """Windows, soft caps, sinks and experts among them; rows that are shorter than a group has ranks, too."""
    assert apart(found[4, 4][case], found[1, 1][case]) < TOLERANCE


def test_headers_in_stretches_of_two_ranks_are_computed_as_by_one(found):
    assert apart(found[2, 2][HEADERS], found[1, 1][HEADERS]) < TOLERANCE


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_trained_as_by_one_rank(found, adapter):
    assert apart(found[2, 2][adapter], found[1, 1][adapter]) < TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_counts_a_groups_gradients_once(found, stage):
    """Neither their sum over the group's copies of the loss (twice) nor their mean over its ranks (a half)."""
    result, reference = found[2, 2][f"gradients, {stage}"], found[1, 1]["gradients"]
    assert apart(result, reference) < TOLERANCE
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)


def test_the_comparison_notices_a_sum_whose_gradient_is_a_sum(found):
    result, reference = found[2, 2]["summed backward"], found[1, 1]["gradients"]
    assert result["norms"] == pytest.approx([2 * norm for norm in reference["norms"]], rel=1e-5)
    assert apart(result, reference) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("world", "case"),
    [(2, "ZeRO 2, padded"), (2, "ZeRO 3, packed"), (4, "ZeRO 2, packed"), (4, "ZeRO 3, padded")],
)
def test_ten_steps_clipped_and_recomputed_are_those_of_one_rank(found, world, case):
    """Steps of several micro-batches. The reference is ZeRO 0, padded, without recomputation."""
    result, reference = found[world, world][f"losses, {case}"], found[1, 1]["losses"]
    assert max(reference["losses"]) > 0.3 and max(reference["norms"]) > 0.5 > min(
        reference["norms"]
    )  # some are clipped
    assert result["losses"] == pytest.approx(reference["losses"], abs=TOLERANCE)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    for name, weight in reference["weights"].items():
        assert torch.allclose(result["weights"][name], weight, rtol=0, atol=TOLERANCE), name


def test_two_groups_judge_conversations_and_make_probes_as_one_rank(found):
    """Micro-batches in padded rows among them."""
    result, reference = found[4, 2]["judging"], found[1, 1]["judging"]
    assert (result["rewards"] - reference["rewards"]).abs().max() < TOLERANCE
    assert result["noise"] < TOLERANCE


# ---------------------------------------------------------------- whole runs


def series(output: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(output) if name in row]


@pytest.mark.parametrize("run", ["groups", "resumed"])
def test_a_run_of_two_groups_and_one_rank_that_goes_on_with_it_are_that_of_one_rank(folder, run):
    """groups: four ranks, ZeRO 3, evaluations, the saved model proven. resumed: from its third step, on one rank."""
    for name in ("train/rm/loss", "train/rm/accuracy", "eval/rm/loss", "eval/rm/accuracy", "eval/rm/reward_margin"):
        reference = series(folder / "one", name)
        assert len(reference) == (6 if name.startswith("train") else 3)
        assert series(folder / run, name) == pytest.approx(reference, abs=TOLERANCE), name
    weights, reference = (load_file(folder / name / "model.safetensors") for name in (run, "one"))
    assert weights.keys() == reference.keys()
    assert max((weights[name] - reference[name]).abs().max().item() for name in weights) < TOLERANCE
    configs = [json.loads((folder / name / "config.json").read_text()) for name in (run, "one")]
    statistics = [[config.pop(name) for name in ("mean", "std", "reward_temperature")] for config in configs]
    assert statistics[0] == pytest.approx(statistics[1], rel=1e-4)  # of the last evaluation
    assert configs[0] == configs[1]


def test_the_log_says_who_computes_together(folder):
    log = (folder / "groups.log").read_text()
    assert "sequence parallel: 2 neighbouring devices compute a micro-batch of up to 2 times the positions" in log
    assert "2 of 4 heads" in log and "groups span nodes" not in log and "reload check: 8 rewards" in log
    assert "sequence parallel" not in (folder / "one.log").read_text()


# ---------------------------------------------------------------- who computes what


def rank_of(rank: int, world_size: int = 8) -> Ranks:
    return Ranks(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))


def test_ranks_of_a_group_are_fed_the_same_and_all_groups_everything():
    rng = np.random.default_rng(0)
    sides = [[rng.integers(5, 500, rng.integers(20, 90)).tolist() for _ in range(2)] for _ in range(30)]
    pairs = as_data([tuple(pair) for pair in sides], [0] * 30)
    rules = BatchRules("packed", pad_token_id=0, max_tokens=100, evaluation_tokens=100)

    def fed(rank: int) -> list[list[int]]:
        [step] = feeding.training_steps([np.arange(30)], pairs, rules, grouped(rank_of(rank), 4))
        assert max(micro.batch.positions for micro in step.micro_batches) > 300  # a device's 100, four times
        return [micro.indices.tolist() for micro in step.micro_batches]

    everyone = [fed(rank) for rank in range(8)]
    assert everyone[0] == everyone[1] == everyone[2] == everyone[3] != everyone[4] == everyone[7]
    assert sorted(sum(everyone[0] + everyone[4], [])) == list(range(30))
    assert [grouped(rank_of(rank), 4).counts for rank in range(8)] == [True, False, False, False] * 2


@pytest.mark.parametrize(
    ("world_size", "size", "words"),
    [
        (1, 2, "does not divide the one device of this run; pass 1"),
        (8, 3, "the 8 devices of this run; pass 1, 2, 4 or 8"),
    ],
)
def test_a_size_that_does_not_divide_the_devices_is_refused(world_size, size, words):
    with pytest.raises(UserError, match=f"--sequence_parallel_size {size} .*{words}"):
        grouped(rank_of(0, world_size), size)


def test_groups_that_span_nodes_are_noticed():
    inside, across = [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]
    assert not sequence_parallel._spans_nodes(inside, 2) and not sequence_parallel._spans_nodes(inside, 4)
    assert sequence_parallel._spans_nodes(inside, 8) and sequence_parallel._spans_nodes(across, 2)
    assert sequence_parallel._spans_nodes([0, 0], 2)  # a device a node
    assert "groups span nodes" in sequence_parallel._describe(grouped(rank_of(0), 4), (8, 2, 16), spans=True)


def test_a_row_of_another_length_is_computed_as_it_was_beside_what_fills_it():
    bounds = [(0, 9, ()), (9, 12, ((0, 4),)), (12, 14, ((0, 4), (9, 11))), (14, 17, ())]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3))
    longer = make_segments(bounds).extended(3)
    assert longer.bounds[-1] == (17, 20, ())
    made = make_segments([*bounds, (17, 20, ())])
    for name in ("key_index", "query_starts", "key_starts"):
        assert torch.equal(getattr(longer, name), getattr(made, name)), name
        assert getattr(longer, name).dtype == getattr(made, name).dtype
    assert (longer.longest_query, longer.longest_key) == (made.longest_query, made.longest_key)
    whole, _ = segment_attention(None, query, key, value, None, segments=longer)
    own, _ = segment_attention(
        None, *(tensor[:, :, :17] for tensor in (query, key, value)), None, segments=make_segments(bounds)
    )
    assert torch.equal(whole[:, :17], own)


# ---------------------------------------------------------------- what is refused

LLAMA = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96}
ON_CPU = {"on_gpu": False, "bf16": False, "capability": None}
ON_GPU = {"on_gpu": True, "bf16": True, "capability": (9, 0)}
PER_LAYER = {1: {"num_key_value_heads": 2}}


@pytest.mark.parametrize(
    ("config", "size", "flags", "device", "words"),
    [
        (transformers.LlamaConfig(**LLAMA), 5, {}, ON_CPU, "M has 12 attention heads, which 5 does not divide; sizes that do: 1, 2, 4 or 12"),
        (transformers.LlamaConfig(**LLAMA), 3, {}, ON_CPU, "M has 4 key heads, which 3 neither divides nor is a multiple of; sizes that do: 1, 2, 4 or 12"),
        (transformers.BertConfig(), 2, {}, ON_CPU, "M is of the family bert, an encoder"),
        (transformers.GPT2Config(), 2, {}, ON_CPU, "M is of the family gpt2, not among the families that it is exact for"),
        (transformers.MambaConfig(), 2, {}, ON_CPU, "M is of the family mamba"),
        (transformers.LlamaConfig(**LLAMA), 2, {"attn_implementation": "sdpa"}, ON_CPU, "--attn_implementation sdpa"),
        (transformers.LlamaConfig(**LLAMA, auto_map={"AutoModel": "x.X"}), 2, {"trust_remote_code": True}, ON_CPU, "M brings code of its own"),
        (transformers.LlamaConfig(**LLAMA, per_layer_config=PER_LAYER), 2, {}, ON_CPU, "the layers of M differ in their heads"),
        (transformers.Phi3Config(max_position_embeddings=512, original_max_position_embeddings=64, hidden_size=64, num_attention_heads=8, num_key_value_heads=8, rope_parameters=LONGROPE), 2, {}, ON_CPU, "longrope rotary embeddings depend on the longest sequence beyond 64 tokens"),
        (FAMILIES["gemma2"](), 2, {}, ON_GPU, "gemma2 soft-caps attention scores"),
        (FAMILIES["gpt_oss"](), 2, {}, ON_GPU, "gpt_oss has attention sinks"),
        (FAMILIES["llama"](), 2, {}, ON_GPU | {"bf16": False}, "--dtype is float32"),
    ],
)  # fmt: skip
def test_what_would_not_be_exact_is_refused_in_a_sentence_before_any_data_is_read(config, size, flags, device, words):
    flags = ModelFlags(model_name_or_path="M", **flags)
    with pytest.raises(UserError) as refused:
        check(config, size, flags, max_token_length=256, **device)
    assert f"--sequence_parallel_size {size} is not possible: " in str(refused.value) and words in str(refused.value)
    assert check(config, 1, flags, max_token_length=256, **device) is None


@pytest.mark.parametrize(("family", "sizes"), [("llama", (2, 4)), ("gpt_oss", (2, 4)), ("gpt_neox", (2, 4))])
def test_sizes_that_divide_the_heads_are_let_pass(family, sizes):
    for size in sizes:
        assert check(FAMILIES[family](), size, ModelFlags(), max_token_length=256, **ON_CPU) is None
