"""The saved tokenizer: whatever client encodes a complete text with it gets the ids of training.

Clients add what a tokenizer names. For conversations, where the template writes every special token, it therefore names no
BOS (verl takes it off and a server's encoder has to put it back; NeMo-RL puts it where the template writes none), and as its
EOS the token that ends the template's text (NeMo-RL adds EOS to any other end). What the template itself prints as
`bos_token` and `eos_token` stands in it as text then. Who goes on from the folder has them back (data/tokenizer.py).
Plain text keeps both names: its encoder writes BOS, and the text ends with EOS.
"""

import copy
import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from open_rm.data.encoding import encode, render_sample, special_tokens
from open_rm.data.tokenizer import change_templates, say_names
from open_rm.model.contract import Contract

# A class that reads tokenizer.json and adds nothing of its own; every version of transformers knows it. Others have a BOS by
# default (GPT2Tokenizer), put back what the file no longer says (BertTokenizer), or read files that are not saved here (Llama's
# in transformers 4, where add_prefix_space is set).
PLAIN_CLASS = "PreTrainedTokenizerFast"


def save_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, contract: Contract) -> None:
    """Write the tokenizer's files so that a client that encodes a complete text gets the ids of training.

    Raises:
        UserError: trained on conversations, and the chat template takes none.
    """
    eos_token = _scored_name(tokenizer) if contract.chat else tokenizer.eos_token
    _with_names_said(tokenizer, eos_token if contract.chat else None).save_pretrained(path)
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has a dict under this name, and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # transformers 4 returns token_type_ids where this is missing, which decoders do not take. Encoders that do take zeros
    # where there are none, as in training.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    if not contract.trust_remote_code:  # names code of the base's, which did not run here and is not in the folder
        config.pop("auto_map", None)
    # What the encoder adds by itself must not come on top of what the text already has. On a conversation the template
    # has written everything; on plain text the encoder's BOS was trained with or not, and EOS stands at the end of the text.
    # Written even where absent: transformers 4 takes True for some families then.
    config["add_eos_token"] = False
    config["add_bos_token"] = not contract.chat and _begins_with_bos(tokenizer)
    if contract.chat:
        config |= {"bos_token": None, "eos_token": eos_token}
        _name(path / "special_tokens_map.json", eos_token)
    if (path / "tokenizer.json").is_file():  # not of a tokenizer written in Python
        _remove_added(path / "tokenizer.json", None if contract.chat else tokenizer.eos_token)
        config |= _prefix_space(path / "tokenizer.json")
        config["tokenizer_class"] = PLAIN_CLASS
    _write(config_file, config)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether plain text begins with BOS in training."""
    return tokenizer.bos_token_id is not None and encode(tokenizer, ["a"], chat=False)[0][0] == tokenizer.bos_token_id


def _prefix_space(file: Path) -> dict:
    """Whether the encoder puts a space before a text, for tokenizer_config.json: transformers 4 has it do what is said there.

    It does so where one pre-tokenizer stands alone, and leaves those in a sequence as they are.
    """
    alone = json.loads(file.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    return {"add_prefix_space": alone["add_prefix_space"]} if "add_prefix_space" in alone else {}


def _scored_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is named EOS for conversations: the token that their text ends with, but for newlines.

    The tokenizer's own EOS where the text ends with an ordinary token: named, it would be cut out of all texts.
    """
    _, text = render_sample(tokenizer)
    text = text.rstrip("\n")
    ends = [token for token in special_tokens(tokenizer) if text.endswith(token)]
    return max(ends, key=len, default=tokenizer.eos_token)


def _with_names_said(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer as it is saved with this EOS and no BOS: with templates that say what it named. None: as it is."""
    changes = eos_token != tokenizer.eos_token or tokenizer.bos_token is not None
    if eos_token is None or not changes:
        return tokenizer
    said = copy.copy(tokenizer)  # training goes on with its own templates
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    change_templates(said, lambda template: say_names(template, **names))
    return said


def _name(file: Path, eos_token: str) -> None:
    """No BOS and this EOS in special_tokens_map.json, which transformers 4 wrote and reads."""
    if file.is_file():
        names = json.loads(file.read_text(encoding="utf-8"))
        names.pop("bos_token", None)
        _write(file, names | {"eos_token": eos_token})


def _write(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def _remove_added(file: Path, token: str | None) -> None:
    """Take a special token out of what the encoder adds (its post-processor). None: all of them."""

    def stays(piece: dict) -> bool:
        return "SpecialToken" not in piece or (token is not None and piece["SpecialToken"]["id"] != token)

    def without(processor: dict | None) -> dict | None:
        if processor and processor["type"] == "Sequence":
            processor["processors"] = [without(part) for part in processor["processors"]]
        if processor and processor["type"] in ("BertProcessing", "RobertaProcessing"):
            processor = _as_template(processor)
        if processor and processor["type"] == "TemplateProcessing":
            for key in ("single", "pair"):
                processor[key] = [piece for piece in processor[key] if stays(piece)]
        return processor

    content = json.loads(file.read_text(encoding="utf-8"))
    content["post_processor"] = without(content.get("post_processor"))
    Tokenizer.from_str(json.dumps(content)).save(str(file))


def _as_template(processor: dict) -> dict:
    """BERT's or RoBERTa's own processor, [CLS] A [SEP], in the general form."""
    (cls, cls_id), (sep, sep_id) = processor["cls"], processor["sep"]

    def special(name: str) -> dict:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [special(cls), {"Sequence": {"id": "A", "type_id": 0}}, special(sep)]
    between = [special(sep)] if processor["type"] == "RobertaProcessing" else []
    ids = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ((cls, cls_id), (sep, sep_id))}
    pair = [*single, *between, {"Sequence": {"id": "B", "type_id": 0}}, special(sep)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}
