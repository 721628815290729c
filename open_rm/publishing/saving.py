"""The saved folder, which any client reads the same.

A `...ForSequenceClassification` with one label and problem_type "regression" (else clients return a sigmoid), a score head
of shape [1, D], the tokenizer's own pad id in the config, a chat template and a tokenizer class that older clients load too,
no BOS twice, files readable by others, nothing that needs custom code. What a client has to know besides is in contract.json.
"""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_rm.data import tokenizer as tokenizers
from open_rm.flags import AdapterFlags
from open_rm.model import adapters, families
from open_rm.model.reward_model import RewardModel

CONTRACT = "contract.json"


@dataclass(frozen=True)
class Contract:
    """How the folder has to be read, as contract.json in it says.

    chat: trained on conversations, which the chat template renders with all special tokens; else on plain text.
    ending: what plain text has to end with; its last token is scored.
    adapter: trained as an adapter.  merged: the folder holds the sum of it and its base, a whole model.
    dtype: that was computed in: an adapter's base is loaded in it; a whole model's config says its own.
    load_in_4bit: the adapter's base is held in 4 bits (NF4, double quantization); false in the folder of a merged one, whose
        weights are whole.
    trust_remote_code: the model brings Python code of its own.
    """

    chat: bool
    ending: str
    adapter: bool = False
    merged: bool = False
    dtype: str = "float32"
    load_in_4bit: bool = False
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls, flags: AdapterFlags, tokenizer: PreTrainedTokenizerBase, *, chat: bool, dtype: torch.dtype, code: bool
    ) -> "Contract":
        """The contract of a run. code: --trust_remote_code."""
        return cls(
            chat=chat,
            ending=tokenizers.ending(tokenizer),
            adapter=flags.use_peft,
            merged=flags.merge_adapter,
            dtype=str(dtype).removeprefix("torch."),
            load_in_4bit=flags.load_in_4bit,
            trust_remote_code=code,
        )

    @classmethod
    def read(cls, folder: str | Path) -> "Contract":
        """That of a folder saved here."""
        return cls(**json.loads((Path(folder) / CONTRACT).read_text(encoding="utf-8")))

    @property
    def holds_adapter(self) -> bool:
        """Whether a client needs the base model besides."""
        return self.adapter and not self.merged

    def base(self) -> dict:
        """How an adapter's base is loaded (adapters.load, adapters.merge)."""
        return {name: getattr(self, name) for name in ("dtype", "load_in_4bit", "trust_remote_code")}


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
    (path / CONTRACT).write_text(json.dumps(dataclasses.asdict(said), indent=2) + "\n", encoding="utf-8")
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


def save_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, contract: Contract) -> None:
    """Write the tokenizer's files so that a client that encodes a complete text gets the ids of training."""
    tokenizer.save_pretrained(path)
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has a dict under this name, and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # What the encoder adds by itself must not come on top of what the text already has. On a conversation the template
    # has written everything; on plain text the encoder's BOS was trained with, and EOS stands at the end of the text.
    # Written even where absent: transformers 4 takes True for some families then.
    config["add_eos_token"] = False
    unwanted = {tokenizer.eos_token}
    if contract.chat:
        config["add_bos_token"] = False
        unwanted.add(tokenizer.bos_token)
    if (path / "tokenizer.json").is_file():  # not of a tokenizer written in Python
        _remove_added(path / "tokenizer.json", unwanted)
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    added = AutoTokenizer.from_pretrained(path, trust_remote_code=contract.trust_remote_code)("a")["input_ids"]
    if (path / "tokenizer.json").is_file() and set(added) & {
        tokenizer.convert_tokens_to_ids(token) for token in unwanted if token
    }:
        # Some classes (BertTokenizer) put back what their file no longer says; the plain class reads the file alone.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_added(file: Path, tokens: set[str | None]) -> None:
    """Take special tokens out of what the encoder adds (its post-processor)."""

    def without(processor: dict | None) -> dict | None:
        if processor and processor["type"] == "Sequence":
            processor["processors"] = [without(part) for part in processor["processors"]]
        elif processor and processor["type"] == "TemplateProcessing":
            for key in ("single", "pair"):
                pieces = processor[key]
                processor[key] = [piece for piece in pieces if piece.get("SpecialToken", {}).get("id") not in tokens]
        return processor

    content = json.loads(file.read_text(encoding="utf-8"))
    content["post_processor"] = without(content.get("post_processor"))
    Tokenizer.from_str(json.dumps(content)).save(str(file))
