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
        ({"zero_optimization": {"stage": 7}}, "DeepSpeed refuses zero_optimization"),
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
