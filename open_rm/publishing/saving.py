"""The saved folder, which any client reads the same.

A `...ForSequenceClassification` with one label and problem_type "regression" (else clients return a sigmoid), a score head
of shape [1, D], the tokenizer's own pad id in the config, a chat template and a tokenizer class that older clients load too,
no BOS twice, files readable by others, nothing that needs custom code. What a client has to know besides is in contract.json.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from open_rm.model import adapters, families
from open_rm.model.contract import Contract
from open_rm.model.reward_model import RewardModel
from open_rm.publishing.tokenizer_files import save_tokenizer


def save_reward_model(
    model: RewardModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    contract: Contract,
) -> None:
    """Write the folder (main rank only): a model, or an adapter with its head where the contract says so.

    state: the complete weights, from Engine.gathered_state.
    """
    path = Path(folder)
    weights = {name.removeprefix("classifier."): tensor.contiguous() for name, tensor in state.items()}
    if model.adapted is None:
        model.classifier.save_pretrained(path, state_dict=weights)
    elif contract.holds_adapter:
        adapters.save(model.adapted, weights, path)
        (path / "README.md").unlink(missing_ok=True)  # peft's; the recipe writes its own
    else:
        _save_merged(model, weights, tokenizer, path, contract)
    save_tokenizer(path, tokenizer, contract)
    if not contract.holds_adapter:
        _mend_model_config(path / "config.json")
    said = contract if contract.holds_adapter else dataclasses.replace(contract, load_in_4bit=False)
    said.write(path)
    for file in path.iterdir():
        if file.is_file():  # safetensors writes for its owner alone
            file.chmod(0o644)


def _save_merged(
    model: RewardModel, weights: dict[str, torch.Tensor], tokenizer, path: Path, contract: Contract
) -> None:
    """The adapter and its base, loaded as it was held in training, as one model."""
    with tempfile.TemporaryDirectory() as apart:
        adapters.save(model.adapted, weights, Path(apart))
        merged = adapters.merge(apart, tokenizer, **contract.base())
    for part in families.configs_of(merged.config):
        part.pad_token_id = tokenizer.pad_token_id
    merged.config.problem_type, merged.config.id2label = "regression", model.classifier.config.id2label
    merged.config.label2id = model.classifier.config.label2id
    merged.save_pretrained(path)


def _mend_model_config(file: Path) -> None:
    """Write rotary settings where transformers 4 looks for them too; it would silently take its defaults instead."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else there are none, or one set per kind of layer, which transformers 4 never had
        rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        config["rope_theta"] = rope["rope_theta"]
        if rest.get("rope_type", "default") != "default":
            config["rope_scaling"] = rest
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config["model_type"] == "gpt_neox":
            config["rotary_emb_base"], config["rotary_pct"] = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
