"""The number of processes, the ZeRO stage and the accumulation do not change the mathematics."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, read_metrics, run_recipe, toy_flags
from safetensors.torch import load_file

from open_rm import engine
from open_rm.arguments import Args, check_args
from open_rm.errors import UserError

# 45 pairs in steps of 8: the sixth and last step of each epoch has 5, which two processes share as 3 and 2
SHAPE = {"dataset_mixer_list": None, "total_episodes": 75, "lr_scheduler_type": "linear", "learning_rate": "1e-3"}


@pytest.fixture(scope="module")
def losses(toy, tmp_path_factory):
    """Run the recipe once per layout and keep (losses, final weights, gradient norms, head at the start)."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}

    def run(processes: int, stage: str, accumulation: int = 1, batch: int = 8):
        key = (processes, stage, accumulation, batch)
        if key not in results:
            output = folder / "-".join(map(str, key))
            flags = toy_flags(
                toy,
                output,
                **SHAPE,
                per_device_train_batch_size=batch // processes // accumulation,
                gradient_accumulation_steps=accumulation,
                deepspeed=REPOSITORY / f"configs/ds/{stage}.json",
                num_evals=0,
            )
            done = run_recipe(*flags, "--dataset_mixer_list", toy / "data" / "train.jsonl", "45", processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
            rows = [row for row in read_metrics(output) if "train/rm/loss" in row]
            evaluations = [row["eval/rm/loss"] for row in read_metrics(output) if "eval/rm/loss" in row]
            results[key] = {
                "loss": [row["train/rm/loss"] for row in rows],
                "lr": [row["train/rm/lr"] for row in rows],
                "norm": [row["train/rm/grad_norm"] for row in rows],
                "eval": evaluations,
                "weights": load_file(output / "model.safetensors"),
                "episodes": [row["episode"] for row in rows],
            }
        return results[key]

    return run


@pytest.mark.parametrize(
    ("processes", "stage", "accumulation"),
    [
        (2, "zero0", 1),
        (1, "zero2", 1),
        (2, "zero2", 2),
        (1, "zero3", 1),
        (2, "zero3", 1),
        (1, "zero0", 4),
        (1, "zero3_offload", 1),
    ],
)
def test_processes_zero_stages_and_accumulation_give_the_same_run(losses, processes, stage, accumulation):
    reference, other = losses(1, "zero0"), losses(processes, stage, accumulation)
    assert reference["episodes"] == other["episodes"] == [8, 16, 24, 32, 40, 45, 53, 61, 69, 75]
    # float32 in another order of additions; AdamW's eps of 1e-5 keeps it from being blown up
    assert other["loss"] == pytest.approx(reference["loss"], abs=1e-5)
    assert other["norm"] == pytest.approx(reference["norm"], rel=1e-3)
    # the loss before training holds the initial head: the same one, drawn right, in every layout
    assert other["eval"] == pytest.approx(reference["eval"], abs=1e-5)
    for name, weight in reference["weights"].items():
        assert torch.allclose(weight, other["weights"][name], atol=2e-5), name


def test_learning_rate_falls_linearly_over_optimizer_steps(losses):
    # ten steps, whatever the accumulation: the scheduler counts optimizer steps
    for layout in ((1, "zero0"), (1, "zero0", 4)):
        assert losses(*layout)["lr"] == pytest.approx([1e-3 * (1 - i / 10) for i in range(10)])


@pytest.mark.parametrize(
    ("optim", "stage"), [("adamw_8bit", s) for s in ("zero0", "zero2", "zero3")] + [("adafactor", "zero0")]
)
def test_other_optimizers_train(toy, tmp_path, losses, optim, stage):
    flags = toy_flags(
        toy,
        tmp_path / "out",
        **SHAPE,
        per_device_train_batch_size=8,
        deepspeed=REPOSITORY / f"configs/ds/{stage}.json",
        num_evals=0,
        optim=optim,
    )
    done = run_recipe(*flags, "--dataset_mixer_list", toy / "data" / "train.jsonl", "45")
    assert done.returncode == 0, done.stderr[-3000:]
    reference = losses(1, "zero0")["loss"]
    other = [row["train/rm/loss"] for row in read_metrics(tmp_path / "out") if "train/rm/loss" in row]
    assert other[0] == pytest.approx(reference[0], abs=1e-6)  # the same weights before the first step
    assert other[1:] != reference[1:]  # another optimizer
    if optim == "adamw_8bit":
        # moments rounded to 8 bits: the run stays beside that of whole ones
        assert other == pytest.approx(reference, abs=2e-2)
    else:
        assert other[-1] < other[0]


def test_adafactor_is_refused_where_it_cannot_work():
    for changes in ({"deepspeed": str(REPOSITORY / "configs/ds/zero2.json")}, {"dtype": "bfloat16"}):
        with pytest.raises(UserError, match="--optim adafactor needs whole matrices"):
            check_args(Args(optim="adafactor", **changes))
    for changes in ({"use_peft": True}, {"score_init": "zeros"}):
        with pytest.raises(UserError, match="--optim adafactor makes steps relative to the weights"):
            check_args(Args(optim="adafactor", **changes))
    with pytest.raises(UserError, match="--eps is AdamW's"):
        check_args(Args(optim="adafactor", eps=1e-8))


def test_head_has_the_right_std_when_zero3_has_partitioned_it(toy, tmp_path):
    """Two ranks, each with an empty stand-in for the weight: written outside a gather, it would stay what it was."""
    script = f"""
import math, torch
from open_rm import engine, model, tokenization
ranks = engine.start_ranks()
config = engine.fill_config(engine.read_config("{REPOSITORY}/configs/ds/zero3.json"), width=128, bf16=False,
                            per_device_train_batch_size=1, max_grad_norm=0.0)
tokenizer = tokenization.load_tokenizer("{toy}/model")
reward_model, _ = model.load_reward_model("{toy}/model", revision=None, tokenizer=tokenizer, dtype=torch.float32,
    attn_implementation=None, gradient_checkpointing=False, seed=1, deepspeed_config=config)
trainer = engine.Engine(reward_model, config=config, ranks=ranks, learning_rate=1e-3, eps=1e-5, weight_decay=0.0)
assert reward_model.classifier.model.embed_tokens.weight.shape == (0,), "the model was not partitioned"
state = trainer.gathered_state()
if ranks.is_main:
    head = state["classifier.score.weight"]
    expected = torch.empty(1, 128).normal_(std=1 / math.sqrt(129), generator=torch.Generator().manual_seed(1))
    assert torch.equal(head, expected), (head.std(), expected.std())
    print("HEAD RIGHT", head.std().item())
engine.stop_ranks()
"""
    path = tmp_path / "head.py"
    path.write_text(script)
    done = run_script(path, processes=2)
    assert "HEAD RIGHT" in done.stdout, done.stderr[-3000:]


def run_script(path, processes):
    import os
    import subprocess
    import sys

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(path),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_bfloat16_keeps_float32_master_weights(toy, tmp_path):
    """At a learning rate of 3e-6, an update is far below bfloat16's spacing: only master weights remember it."""
    flags = toy_flags(toy, tmp_path / "out", dtype="bfloat16", learning_rate="3e-6", total_episodes=1200, num_evals=0)
    flags += ["--lr_scheduler_type", "constant", "--deepspeed", "configs/ds/zero2.json"]
    done = run_recipe(*flags, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = load_file(toy / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[name].float() != before[name].bfloat16().float()).float().mean().item()
    assert after[name].dtype == torch.bfloat16
    # 150 steps of 3e-6 add up to 4.5e-4, beyond half the spacing of weights around 0.02 (6e-5)
    assert moved > 0.2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"train_batch_size": 32}, '"train_batch_size" is decided by --per_device_train_batch_size'),
        ({"optimizer": {"type": "Adam"}}, '"optimizer" is decided by --learning_rate'),
        ({"gradient_clipping": 1.0}, '"gradient_clipping" is decided by --max_grad_norm'),
        ({"bf16": {"enabled": True}}, '"bf16" is decided by --dtype'),
        ([], "must hold a JSON object"),
        ({"zero_optimization": 3}, "must hold a JSON object"),
        ({"zero_optimization": {"stage": 7}}, "DeepSpeed refuses zero_optimization"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "DeepSpeed refuses zero_optimization"),
    ],
)
def test_a_deepspeed_file_that_contradicts_a_flag_is_refused(tmp_path, content, sentence):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        engine.read_config(str(tmp_path / "ds.json"))


def test_a_deepspeed_file_written_for_transformers_is_taken(tmp_path):
    """Everything that a flag decides is "auto" there, and the rest is memory layout."""
    content = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    config = engine.read_config(str(tmp_path / "ds.json"))
    assert set(config) == {"zero_optimization"}


def test_a_broken_deepspeed_file_is_named(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="ds.json: not valid JSON"):
        engine.read_config(str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match="cannot be read"):
        engine.read_config(str(tmp_path / "none.json"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/ds").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_files_decide_memory_layout_only(path):
    config = engine.fill_config(
        engine.read_config(str(path)), width=64, bf16=True, per_device_train_batch_size=4, max_grad_norm=0.5
    )
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(config)


def test_ranks_that_wait_for_the_main_one_say_so(monkeypatch, capsys):
    monkeypatch.setattr(engine, "WAITING_SECONDS", 0.05)
    for is_main in (True, False):
        with engine._said_while_waiting(SimpleNamespace(rank=3, is_main=is_main)):
            time.sleep(0.3)
        assert ("[rank 3] waiting for the main rank" in capsys.readouterr().err) is not is_main
