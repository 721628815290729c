"""The DeepSpeed file decides memory layout only; what a flag decides is the flag's."""

import json

import pytest
from conftest import REPOSITORY

from open_rm.errors import UserError
from open_rm.flags import BatchFlags
from open_rm.training.ds_config import fill_config, read_config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"train_batch_size": 32}, '"train_batch_size" is decided by --per_device_train_batch_size'),
        ({"optimizer": {"type": "Adam"}}, '"optimizer" is decided by --learning_rate'),
        ({"gradient_clipping": 1.0}, '"gradient_clipping" is decided by --max_grad_norm'),
        ({"bf16": {"enabled": True}}, '"bf16" is decided by --dtype'),
        ([], "must hold a JSON object"),
        ({"zero_optimization": 3}, "must hold a JSON object"),
        ({"zero_optimization": {"stage": 7}}, '"stage" is 7; it must be a number, 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": "auto"}}, "\"stage\" is 'auto'; it must be a number"),
        ({"zero_optimization": {"stage": "2"}}, "\"stage\" is '2'; it must be a number"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "auto"}}, '"offload_optimizer" is "auto", which only'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}}, '"offload_param" is "auto"'),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "DeepSpeed refuses zero_optimization"),
    ],
)
def test_a_deepspeed_file_that_contradicts_a_flag_is_refused(tmp_path, content, sentence):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        read_config(str(tmp_path / "ds.json"))


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
    config = read_config(str(tmp_path / "ds.json"))
    assert set(config) == {"zero_optimization"}


def test_a_broken_deepspeed_file_is_named(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match="ds.json: not valid JSON"):
        read_config(str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match="cannot be read"):
        read_config(str(tmp_path / "none.json"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/ds").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_deepspeed_files_decide_memory_layout_only(path):
    flags = BatchFlags(deepspeed=str(path), per_device_train_batch_size=4)
    config = fill_config(flags, width=64, bf16=True, max_grad_norm=0.5)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(config)


def test_deepspeed_waits_for_the_device_nowhere_and_keeps_no_gradient_twice():
    config = fill_config(BatchFlags(), width=64, bf16=True, max_grad_norm=1.0)
    assert config["timers"] == {"throughput": {"enabled": False}}
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}


@pytest.mark.parametrize(
    ("bf16", "world_size", "stage"), [(False, 1, 0), (False, 8, 0), (True, 1, 1), (True, 2, 2), (True, 64, 2)]
)
def test_without_a_file_the_stage_follows_from_dtype_and_devices(bf16, world_size, stage):
    config = fill_config(BatchFlags(), width=64, bf16=bf16, max_grad_norm=1.0, world_size=world_size)
    assert config["zero_optimization"]["stage"] == stage
    assert ("overlap_comm" in config["zero_optimization"]) == bf16


def test_a_stage_that_a_file_names_stays_on_several_devices(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = fill_config(
        BatchFlags(deepspeed=str(tmp_path / "ds.json")), width=64, bf16=True, max_grad_norm=1.0, world_size=8
    )
    assert config["zero_optimization"]["stage"] == 1


def test_buckets_of_the_shipped_files_hold_a_layer():
    """8B: a bucket of width^2, as transformers derives, would be less than a third of one MLP matrix of 58.7 M."""
    for name in ("zero2", "zero3", "zero3_offload"):
        flags = BatchFlags(deepspeed=str(REPOSITORY / f"configs/ds/{name}.json"))
        zero = fill_config(flags, width=4096, bf16=True, max_grad_norm=1.0)["zero_optimization"]
        assert zero["reduce_bucket_size"] == 201_326_592
        if name != "zero2":
            assert zero["stage3_prefetch_bucket_size"] == 201_326_592
