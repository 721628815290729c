"""On a GPU, each in a process of its own: the recipe trains as on a CPU, and memory is what was estimated."""

import re

import pytest
from conftest import on_gpu, read_metrics, run_recipe, run_recipe_on_gpu, toy_flags

RUNS = {
    "padded": {"batching": "padded"},
    "packed, ZeRO 2": {"batching": "packed", "deepspeed": "configs/ds/zero2.json"},
    "shared_prefix, ZeRO 3": {"deepspeed": "configs/ds/zero3.json"},
    "shared_prefix, offload": {"deepspeed": "configs/ds/zero3_offload.json"},
    "recomputed": {"gradient_checkpointing": "on"},
    "8-bit moments": {"optim": "adamw_8bit"},
    "QLoRA": {"use_peft": True, "load_in_4bit": True, "lora_r": 4},
}


@pytest.fixture(scope="module")
def on_the_cpu(toy, tmp_path_factory):
    """Losses of the run in float32 on the CPU."""
    folder = tmp_path_factory.mktemp("cpu") / "out"
    done = run_recipe(*toy_flags(toy, folder))
    assert done.returncode == 0, done.stderr
    return [row["train/rm/loss"] for row in read_metrics(folder)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_trains_on_a_gpu_as_on_a_cpu(toy, tmp_path, on_the_cpu, name):
    """bfloat16 against float32: 3e-2 of the loss. An adapter has other losses: that its client agrees is what counts."""
    done = run_recipe_on_gpu(*toy_flags(toy, tmp_path / "out", **RUNS[name]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 x cuda, bfloat16" in done.stdout and "Liger kernels on" in done.stdout
    assert re.search(r"reload check: 8 rewards .* bfloat16 on cuda|4-bit on cuda", done.stdout)
    assert "memory: " in done.stdout and "activations: " in done.stdout
    losses = [row["train/rm/loss"] for row in read_metrics(tmp_path / "out")]
    if name not in ("QLoRA", "8-bit moments"):
        assert losses == pytest.approx(on_the_cpu, abs=3e-2)


# A model of 8 layers and 0.1 G weights; pairs of 900 tokens of prompt and answers of 100.
MEMORY = """
import json, sys, torch
import numpy as np
from pairs_of_ids import as_data
from transformers import LlamaConfig, LlamaForCausalLM
from open_rm.batching.layouts import lay_out
from open_rm.batching.rules import BatchRules
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import BatchFlags, ModelFlags, OptimizerFlags
from open_rm.model import recompute
from open_rm.model.kernels import use_fastest
from open_rm.model.loading import load_reward_model
from open_rm.ranks import joined_ranks
from open_rm.training import fitting, footprint
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine

folder, scratch, layout, every, pairs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
tokenizer = load_tokenizer(folder)
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
    num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=2048)
LlamaForCausalLM(config).save_pretrained(scratch)
tokenizer.save_pretrained(scratch)
rng = np.random.default_rng(0)
def pair():
    prompt = rng.integers(5, len(tokenizer), 900)
    return tuple(np.concatenate((prompt, rng.integers(5, len(tokenizer), 100))) for _ in range(2))
given = [tuple(side.tolist() for side in pair()) for _ in range(pairs)]
with joined_ranks() as ranks:
    dtype = torch.bfloat16
    model, _ = load_reward_model(ModelFlags(model_name_or_path=scratch), tokenizer, layout=layout, dtype=dtype)
    use_fastest(model, ranks.device, layout, float8=False)
    ds = fill_config(BatchFlags(), width=1024, bf16=True, max_grad_norm=1.0)
    engine = Engine(model, OptimizerFlags(), ds, ranks, total_steps=4)
    state = sum(footprint.state_bytes(footprint.sizes_of(model), ds, "adamw", 1).values())
    rules = BatchRules(layout, tokenizer.pad_token_id, max_tokens=4096, evaluation_tokens=4096)
    memory = fitting.measure(model, engine, rules, table=as_data(given, [900] * pairs).table, state=state)
    recompute.recompute(model.classifier, every)
    batch = lay_out(layout, given, pad_token_id=tokenizer.pad_token_id, prompt_ids=range(pairs))
    estimated = state + batch.positions * fitting.bytes_of_position(memory, 8, every)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        engine.backward(engine(**batch.inputs(ranks.device)).sum() / pairs, last=True)
        peak = torch.cuda.max_memory_allocated()
        engine.step()
    print(json.dumps([peak, estimated, state]))
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "every"), [("padded", 0), ("shared_prefix", 0), ("shared_prefix", 1), ("packed", 2)]
)
def test_memory_is_estimated_within_15_percent(toy, tmp_path, layout, every):
    peak, estimated, _ = on_gpu(MEMORY, toy / "model", tmp_path, layout, every, 16)
    assert estimated == pytest.approx(peak, rel=0.15)


@pytest.mark.gpu
def test_a_shared_prompt_saves_its_activations(toy, tmp_path):
    """1,100 of 2,000 positions are computed; beside weights and moments the rest is at most 0.6 of what padded rows take."""
    padded, _, state = on_gpu(MEMORY, toy / "model", tmp_path / "padded", "padded", 0, 16)
    shared, _, _ = on_gpu(MEMORY, toy / "model", tmp_path / "shared", "shared_prefix", 0, 16)
    assert shared - state <= 0.6 * (padded - state)
