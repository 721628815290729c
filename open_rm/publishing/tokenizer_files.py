"""The saved tokenizer: whatever client encodes a complete text with it gets the ids of training."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_rm.model.contract import Contract


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
