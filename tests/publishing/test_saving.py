"""contract.json: what a client of the saved folder has to know besides, and what the run really was."""

import dataclasses
import json

import pytest
from conftest import REPOSITORY

from open_rm.flags import Args
from open_rm.model.contract import Contract
from open_rm.reward_modeling import main

PLAIN = {"chat": True, "adapter": False, "merged": False, "dtype": "float32", "load_in_4bit": False}
PLAIN |= {"trust_remote_code": False}
RUNS = {
    "a whole model on conversations": ({}, {}),
    "on plain text, with a reward token": ({"reward_token": "<|reward|>", "text": True}, {"chat": False}),
    "in bfloat16": (
        {"dtype": "bfloat16", "deepspeed": str(REPOSITORY / "configs/ds/zero2.json")},
        {"dtype": "bfloat16"},
    ),
    "an adapter": ({"use_peft": True}, {"adapter": True}),
    "an adapter of 4-bit weights": (
        {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"},
        {"adapter": True, "load_in_4bit": True, "dtype": "bfloat16"},
    ),
    "a merged adapter": (
        {"use_peft": True, "merge_adapter": True, "load_in_4bit": True},
        {"adapter": True, "merged": True},  # load_in_4bit: false, since the sum's weights are whole
    ),
    "with trusted code": ({"trust_remote_code": True}, {"trust_remote_code": True}),
}


@pytest.fixture
def text_rows(write_rows):
    rows = [{"prompt": f"Say {n}. ", "chosen": f"It is {n}.", "rejected": "No."} for n in range(8)]
    return write_rows(rows)


@pytest.mark.parametrize("name", RUNS)
def test_the_contract_in_the_folder_says_what_the_run_was_and_is_read_back(toy, tmp_path, text_rows, name):
    flags, said = RUNS[name]
    flags = {"dtype": "float32"} | flags
    source = str(text_rows) if flags.pop("text", False) else str(toy / "data")
    main(
        Args(
            model_name_or_path=toy / "model",  # a Path, as Python users have them
            dataset_mixer_list=[source, "8"],
            dataset_local_cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            **flags,
        )
    )
    tokenizer_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    expected = PLAIN | said | {"ending": tokenizer_config["eos_token"] + flags.get("reward_token", "")}
    assert json.loads((tmp_path / "out" / "contract.json").read_text()) == expected
    contract = Contract.read(tmp_path / "out")
    assert dataclasses.asdict(contract) == expected
    assert contract.holds_adapter is (tmp_path / "out" / "adapter_config.json").is_file()
    assert contract.holds_adapter is not (tmp_path / "out" / "model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"it reads {'a conversation' if contract.chat else 'a text'} and returns one number" in card
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_name_or_path"] == str(toy / "model")
