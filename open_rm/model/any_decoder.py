"""Decoders that transformers has no sequence classifier of: one is made of their own decoder, and saved with them.

More than half of the causal model types have none (Granite, OLMoE, Cohere 2, Gemma 4, GLM-4 MoE ...). What they lack is a
score head, which modeling_reward.py adds to the family's own PreTrainedModel. The saved folder brings that file, with a
line for the family, and its config names it in auto_map: plain transformers reads it with trust_remote_code=True.
`architectures` is XForSequenceClassification where the language model is XForCausalLM, and the weights are the decoder's
and score.weight, which vLLM reads without any code (--runner pooling --convert classify).
A folder whose file is what is written here, or was by an earlier version, needs no trust: the class is made here again, and
the file is not run.
Not covered, and refused by name: what WHY_NOT lists, and encoders with a decoder.
"""

import hashlib
import inspect
import json
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from open_rm.errors import UserError
from open_rm.model import modeling_reward

FILE = "modeling_reward.py"
AUTO = "AutoModelForSequenceClassification"
# sha256 of modeling_reward.py as all versions had it that give the same rewards; the last is today's.
COMMON = ("aed31a6eb1fffb03009521191ca3ead93927770837f937f80a50a07428df48ac",)
LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")

# Model types whose decoder alone is no reward model, or none whose padded batches equal its sequences one by one: shown by
# tests/model/every_decoder.py, which goes through all types.
WHY_NOT = {
    "bert-generation": "it reads its text in both directions unless its config says is_decoder",
    "blt": "it cuts bytes into patches by a model of its own, which has no place here",
    "cpmant": "it wants its padding on the left",
    "xglm": "its position embeddings depend on which token the pad is, and training chooses a pad of its own",
}


def class_for(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The classifier that is made here for a config; None where transformers has its own, or knows no such language model.

    Raises:
        UserError: a language model that cannot be a reward model.
    """
    kind = config.model_type
    languages = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    # by name: a class that trusted code has registered in this process is not transformers' own
    if kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES or type(config) not in languages:
        return None
    if why := _why_not(config, languages[type(config)]):
        raise UserError(f"{config.name_or_path}: {kind} cannot be a reward model: {why}")
    return _make(config, languages[type(config)])


def _why_not(config: PreTrainedConfig, language_model: type[PreTrainedModel]) -> str | None:
    # a decoder that was saved alone keeps its family's type
    if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False):
        return "it is an encoder and a decoder, and only decoders are made into reward models"
    if config.model_type in WHY_NOT:
        return WHY_NOT[config.model_type]
    if type(config) not in modeling_auto.MODEL_MAPPING:
        return "transformers has no plain decoder of it"
    text = config.get_text_config()
    if text is not config and language_model.config_class is type(text):
        if text.model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "it also sees, and the part that reads is no model of its own"
        return (
            f"it also sees; save the part that reads, {text.model_type}, with AutoModelForCausalLM.from_pretrained(NAME)"
            ".save_pretrained(FOLDER), and name that folder"
        )
    return None


def _make(config: PreTrainedConfig, language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    family = next(base for base in language_model.__mro__ if PreTrainedModel in base.__bases__)
    stem = language_model.__name__
    for suffix in LANGUAGE_MODELS:
        stem = stem.removesuffix(suffix)
    named = {
        "__module__": __name__,
        "config_class": type(config),
        "base_model_prefix": family.base_model_prefix or "model",
    }
    return type(f"{stem}ForSequenceClassification", (modeling_reward.ScoreOverDecoder, family), named)


def brings_code(config: PreTrainedConfig) -> bool:
    """Whether the saved folder of a model with this config brings the file, and its clients have to trust it."""
    return class_for(config) is not None


def is_made_here(classifier: PreTrainedModel) -> bool:
    """Whether a classifier's class is one of `class_for`, so that its folder needs the file."""
    return isinstance(classifier, modeling_reward.ScoreOverDecoder)


def describe(classifier: PreTrainedModel) -> str:
    """One line for the log."""
    return (
        f"{classifier.config.model_type} has no sequence classifier in transformers: the saved folder brings one, {FILE}, "
        "which clients load with trust_remote_code=True"
    )


def code_of(made: type[PreTrainedModel]) -> str:
    """The text of FILE for a class of `class_for`."""
    imports, of_family = _of_family(made)
    source = inspect.getsource(modeling_reward)
    last_import = "from transformers.modeling_outputs import SequenceClassifierOutputWithPast\n"
    assert last_import in source
    return source.replace(last_import, last_import + imports) + of_family


def _of_family(made: type[PreTrainedModel]) -> tuple[str, str]:
    """What FILE has beside modeling_reward.py's text: its imports of the family, and the class at its end."""
    family, config = made.__mro__[2], made.config_class
    imports = f"from {config.__module__} import {config.__name__}\nfrom {family.__module__} import {family.__name__}\n"
    return imports, (
        f"\n\nclass {made.__name__}(ScoreOverDecoder, {family.__name__}):\n"
        f'    """{family.__name__.removesuffix("PreTrainedModel")}\'s decoder with a score head."""\n\n'
        f"    config_class = {config.__name__}\n"
        f'    base_model_prefix = "{made.base_model_prefix}"\n'
    )


def write_code(folder: str | Path, classifier: PreTrainedModel) -> bool:
    """Into the folder of a saved classifier: the file, and its name in config.json. Nothing where transformers has a class.

    Returns whether the folder needs it, which contract.json says as trust_remote_code.
    """
    if not is_made_here(classifier):
        return False
    made, path = type(classifier), Path(folder)
    (path / FILE).write_text(code_of(made), encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {AUTO: f"{FILE.removesuffix('.py')}.{made.__name__}"}
    (path / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def loader(config: PreTrainedConfig, name: str, *, revision: str | None = None, trust_remote_code: bool = False):
    """The class whose from_pretrained loads the checkpoint `name` as a classifier.

    Args:
        config: as AutoConfig gives it, its auto_map still in it.

    Raises:
        UserError: the checkpoint names a classifier of its own, which is not ours and not trusted; or `class_for` refuses.
    """
    named = (getattr(config, "auto_map", None) or {}).get(AUTO)
    foreign = named is not None and not _is_written_here(config, named, name, revision)
    if foreign and trust_remote_code:
        return AutoModelForSequenceClassification
    made = class_for(config)
    if foreign and made is not None:
        what = f"brings a classifier of its own ({named}); read that code"
        if _names_file(named):
            what = f"its {FILE} is of another version of open_rm, or was changed; read it"
        raise UserError(f"{name}: {what}, then pass --trust_remote_code")
    return made or AutoModelForSequenceClassification


def _names_file(named: str) -> bool:
    return named.partition(".")[0] == FILE.removesuffix(".py")


def _is_written_here(config: PreTrainedConfig, named: str, name: str, revision: str | None) -> bool:
    """Whether the file that a checkpoint names its classifier in is ours byte for byte, of this version or an earlier one."""
    if not _names_file(named):
        return False
    made = class_for(config)
    file = cached_file(name, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if made is None or file is None:
        return False
    text = Path(file).read_bytes()
    imports, of_family = (part.encode() for part in _of_family(made))
    common = text.removesuffix(of_family).replace(imports, b"", 1)
    ours = imports in text and text.endswith(of_family)
    return ours and hashlib.sha256(common).hexdigest() in COMMON
