"""The number of processes, the ZeRO stage and the accumulation do not change the mathematics."""

import json

import pytest
import torch
import transformers
from conftest import REPOSITORY, launch, read_metrics, toy_flags
from safetensors.torch import load_file

from open_rm.checks import check_args
from open_rm.errors import UserError
from open_rm.flags import Args, OptimizerFlags
from open_rm.training import engine as engine_room

# 45 pairs in steps of 8: the sixth and last step of each epoch has 5, which two processes share as 3 and 2
SHAPE = {"dataset_mixer_list": None, "total_episodes": 75, "lr_scheduler_type": "linear", "learning_rate": "1e-3"}


@pytest.fixture(scope="module")
def losses(toy, tmp_path_factory, run_forked):
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
            done = run_forked(*flags, "--dataset_mixer_list", toy / "data" / "train.jsonl", "45", processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
            rows = [row for row in read_metrics(output) if "train/rm/loss" in row]
            evaluations = [row["eval/rm/loss"] for row in read_metrics(output) if "eval/rm/loss" in row]
            results[key] = {
                "loss": [row["train/rm/loss"] for row in rows],
                "lr": [row["train/rm/lr"] for row in rows],
                "norm": [row["train/rm/grad_norm"] for row in rows],
                "eval": evaluations,
                "weights": load_file(output / "model.safetensors"),
                "plan": json.loads((output / "run.json").read_text())["plan"],
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


def test_a_step_has_the_pairs_of_all_devices_times_micro_batch_times_accumulation(losses):
    for layout in ((1, "zero0"), (2, "zero0"), (1, "zero0", 4), (2, "zero2", 2)):
        assert losses(*layout)["plan"]["pairs_per_step"] == 8


def test_learning_rate_falls_linearly_over_optimizer_steps(losses):
    # ten steps, whatever the accumulation: the scheduler counts optimizer steps
    for layout in ((1, "zero0"), (1, "zero0", 4)):
        assert losses(*layout)["lr"] == pytest.approx([1e-3 * (1 - i / 10) for i in range(10)])


@pytest.mark.parametrize(
    ("optim", "stage"), [("adamw_8bit", s) for s in ("zero0", "zero2", "zero3")] + [("adafactor", "zero0")]
)
def test_other_optimizers_train(toy, tmp_path, losses, optim, stage, run_forked):
    flags = toy_flags(
        toy,
        tmp_path / "out",
        **SHAPE,
        per_device_train_batch_size=8,
        deepspeed=REPOSITORY / f"configs/ds/{stage}.json",
        num_evals=0,
        optim=optim,
    )
    done = run_forked(*flags, "--dataset_mixer_list", toy / "data" / "train.jsonl", "45")
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
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import BatchFlags, ModelFlags, OptimizerFlags
from open_rm.model.loading import load_reward_model
from open_rm.ranks import joined_ranks
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine

with joined_ranks() as ranks:
    config = fill_config(BatchFlags(deepspeed="{REPOSITORY}/configs/ds/zero3.json"), width=128, bf16=False,
                         max_grad_norm=0.0)
    tokenizer = load_tokenizer("{toy}/model")
    flags = ModelFlags(model_name_or_path="{toy}/model")
    reward_model, _ = load_reward_model(flags, tokenizer, seed=1, deepspeed_config=config)
    trainer = Engine(reward_model, OptimizerFlags(learning_rate=1e-3), config, ranks)
    assert reward_model.classifier.model.embed_tokens.weight.shape == (0,), "the model was not partitioned"
    state = trainer.gathered_state()
    if ranks.is_main:
        head = state["classifier.score.weight"]
        expected = torch.empty(1, 128).normal_(std=1 / math.sqrt(129), generator=torch.Generator().manual_seed(1))
        assert torch.equal(head, expected), (head.std(), expected.std())
        print("HEAD RIGHT", head.std().item())
"""
    path = tmp_path / "head.py"
    path.write_text(script)
    done = launch(path, processes=2, env={"OMP_NUM_THREADS": "1"})
    assert "HEAD RIGHT" in done.stdout, done.stderr[-3000:]


def test_bfloat16_keeps_float32_master_weights(toy, tmp_path, run_forked):
    """At a learning rate of 3e-6, an update is far below bfloat16's spacing: only master weights remember it.

    Steps of one pair, and no evaluation: some CPUs compute bfloat16 at a thirtieth of float32's rate.
    """
    few = {"per_device_train_batch_size": 1, "total_episodes": 75, "dataset_mixer_eval_list": None}
    flags = toy_flags(toy, tmp_path / "out", dtype="bfloat16", learning_rate="3e-6", **few)
    flags += ["--lr_scheduler_type", "constant", "--deepspeed", REPOSITORY / "configs/ds/zero2.json"]
    done = run_forked(*flags)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = load_file(toy / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[name].float() != before[name].bfloat16().float()).float().mean().item()
    assert after[name].dtype == torch.bfloat16
    # 75 steps of 3e-6 add up to 2.2e-4, beyond half the spacing of weights around 0.02 (6e-5); without master weights only
    # those below 1e-3 could move, a twentieth of them
    assert moved > 0.2


def test_8_bit_moments_are_of_tensors_that_bitsandbytes_can_count(monkeypatch):
    """ZeRO makes one tensor of a group of parameters, and its count has 31 bits; a 3B on one device would wrap to a negative."""
    with torch.device("meta"):
        model = torch.nn.ModuleList([torch.nn.Linear(2**15, 2**14, bias=False) for _ in range(9)])  # 2**29 weights each
    groups = engine_room._optimizer(model, OptimizerFlags(optim="adamw_8bit")).param_groups
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert max(sizes) < 2**31 and sum(sizes) == 9 * 2**29
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert len(engine_room._optimizer(model, OptimizerFlags()).param_groups) == 1
    with torch.device("meta"):
        one = torch.nn.Linear(2**17, 2**14, bias=False)
    with pytest.raises(UserError, match="more than bitsandbytes can count; pass --optim adamw"):
        engine_room._optimizer(one, OptimizerFlags(optim="adamw_8bit"))


def test_a_schedule_goes_on_with_more_groups_of_parameters_than_it_was_saved_with():
    """8-bit moments of a large model are divided into groups, which older checkpoints do not know."""
    engine = engine_room.Engine.__new__(engine_room.Engine)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    engine.optimizer = torch.optim.SGD([{"params": [p]} for p in weights], lr=1.0)
    engine._schedule = transformers.get_scheduler("linear", engine.optimizer, 0, 10)
    engine.set_schedule({"last_epoch": 4, "_last_lr": [0.6]})
    assert engine.learning_rate == 0.6 and [group["lr"] for group in engine.optimizer.param_groups] == [0.6] * 3
    engine.optimizer.step()
    engine._schedule.step()
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.5] * 3)
