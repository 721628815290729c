"""The saved folder, which any client reads the same.

A `...ForSequenceClassification` with one label and problem_type "regression" (else clients return a sigmoid), a score head
of shape [1, D], the tokenizer's own pad id in the config, a chat template and a tokenizer class that older clients load too,
no BOS twice, files readable by others, and no custom code but for families that have no such class (model/any_decoder.py).
What a client has to know besides is in contract.json.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_rm.model import adapters, any_decoder, attributes, families
from open_rm.model.contract import Contract, RewardStatistics
from open_rm.model.reward_model import RewardModel
from open_rm.publishing.tokenizer_files import save_tokenizer

# Names in config.json. OpenRLHF normalises with `mean` and `std`, both or none. `temperature` would be a setting for generating
# text, which transformers takes out of a config.
OF_REWARDS = {"mean": "mean", "std": "std", "reward_temperature": "temperature"}


# Families of transformers 4 with rotary settings for each kind of layer; of later ones it has none, and transformers 5 cannot
# read what would be written.
PER_LAYER = ("gemma3_text", "modernbert")


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
    weights = attributes.merged_state(weights, model.head.attribute_weights)
    said = contract
    if contract.holds_adapter:
        adapters.save(model.adapted, weights, path)
        (path / "README.md").unlink(missing_ok=True)  # peft's; the recipe writes its own
    else:
        whole = model.classifier if model.adapted is None else _merged(model, weights, tokenizer, contract)
        if not contract.trust_remote_code:  # a merged base's: its files are not here
            whole.config.__dict__.pop("auto_map", None)
        whole.save_pretrained(path, state_dict=weights if model.adapted is None else None)
        _mend_model_config(path / "config.json", contract.statistics)
        code = any_decoder.write_code(path, whole) or contract.trust_remote_code
        said = dataclasses.replace(contract, load_in_4bit=False, trust_remote_code=code)
    save_tokenizer(path, tokenizer, contract)
    said.write(path)
    for file in path.iterdir():
        if file.is_file():  # safetensors writes for its owner alone
            file.chmod(0o644)


def _merged(model: RewardModel, weights: dict[str, torch.Tensor], tokenizer, contract: Contract) -> PreTrainedModel:
    """The adapter and its base, loaded as it was held in training, as one model."""
    with tempfile.TemporaryDirectory() as apart:
        adapters.save(model.adapted, weights, Path(apart))
        merged = adapters.merge(apart, tokenizer, **contract.base())
    for part in families.configs_of(merged.config):
        part.pad_token_id = tokenizer.pad_token_id
    merged.config.problem_type, merged.config.id2label = "regression", model.classifier.config.id2label
    merged.config.label2id = model.classifier.config.label2id
    return merged


def _mend_model_config(file: Path, statistics: RewardStatistics | None) -> None:
    """Write how rewards are spread, and rotary settings where transformers 4 looks for them too; it would silently take its
    defaults instead."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in OF_REWARDS:  # those of a reward model that was trained on
        config.pop(name, None)
    if statistics is not None:
        numbers = dataclasses.asdict(statistics)
        config |= {name: numbers[field] for name, field in OF_REWARDS.items() if numbers[field] is not None}
    for part in (config, config.get("text_config") or {}):
        part.update(_rope_of_transformers_4(part))
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rope_of_transformers_4(config: dict) -> dict:
    """Rotary settings of a config under the names that transformers 4 has for them; empty where there are none."""
    rope, kind = config.get("rope_parameters") or {}, config.get("model_type")
    if "rope_theta" in rope:
        names = _one_rope(rope, kind)
        if kind == "gpt_neox":
            names |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
        return names
    if kind not in PER_LAYER or "full_attention" not in rope:
        return {}
    whole, local = rope["full_attention"], rope.get("sliding_attention", rope["full_attention"])
    if kind == "modernbert":
        return {"global_rope_theta": whole["rope_theta"], "local_rope_theta": local["rope_theta"]}
    return _one_rope(whole, kind) | {"rope_local_base_freq": local["rope_theta"]}  # Gemma 3


def _one_rope(rope: dict, kind: str | None) -> dict:
    names = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") == "default":
        return names
    scaling = {name: value for name, value in rope.items() if name not in names}
    if kind == "phi3" and rope["rope_type"] == "longrope":  # it takes these three names and no others
        scaling = {"type": "longrope"} | {name: rope[name] for name in ("short_factor", "long_factor")}
    return names | {"rope_scaling": scaling}
