"""A trained reward model in memory: micro-batches of token ids in, rewards out. Whoever computes has one of its own.

Two ways lead to a reward. A decoder whose class is known is computed as training's evaluation computes it (model/
reward_model.py): in the layout that is exact for it, the head in float32. Any other class is called as its clients call it,
on right-padded rows, and says itself where the reward is read.
Shapes: N sequences of a micro-batch, S rows, T positions.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from open_rm.batching import attention
from open_rm.batching.layouts import lay_out_sequences
from open_rm.errors import UserError, quote_error
from open_rm.model import adapters, any_decoder, families, kernels
from open_rm.model.reward_model import RewardModel, ScoreHead, head_of

OWN = "own forward"  # in the place of a layout


@dataclass(frozen=True)
class Recipe:
    """How a folder becomes an open model; any process makes the same of it.

    folder: on the disk.  layout: of batching/rules.py, or OWN.
    dtype: that is computed in, float32 or bfloat16.
    pad_token_id: of the rows, and what the model's class takes for padding; None where its config names none.
    base: how an adapter's base is loaded (Contract.base); None where the folder holds a whole model.
    code: whether the folder's Python code is run.
    """

    folder: str
    layout: str
    dtype: str
    pad_token_id: int | None
    base: dict | None
    code: bool

    @property
    def one_by_one(self) -> bool:
        """A class that finds the end of a row by its pad computes single rows alone where there is none."""
        return self.layout == OWN and self.pad_token_id is None


class OpenModel:
    """The model on its device; `rewards` computes one micro-batch.

    lines: for the log.  rows: of its embeddings.  positions: most tokens that it can place; None: any number.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device, self.lines = recipe, device, []
        classifier = _adapter(recipe) if recipe.base else _whole(recipe)
        classifier.eval()
        if recipe.layout == OWN:
            if type(head := head_of(classifier)) is nn.Linear:
                head.__class__ = ScoreHead
            self.model: nn.Module = classifier
        else:
            if recipe.layout != "padded":
                AttentionInterface.register(attention.NAME, attention.segment_attention)
                classifier.set_attn_implementation(attention.NAME)
            self.model = RewardModel(classifier).eval()
            self.lines += kernels.use_fastest(self.model, device, recipe.layout, float8=False)
        if classifier.device != device:
            self.model.to(device)
        self.rows = classifier.get_input_embeddings().weight.shape[0]
        self.positions = positions_of(classifier)

    @torch.inference_mode()
    def rewards(
        self, sequences: Sequence[np.ndarray], prompt_of: Sequence[int], layout: str | None = None
    ) -> torch.Tensor:
        """[N] float32 on the device. prompt_of: [N] equal where a prompt is shared.  layout: padded, instead of the model's."""
        pad = self.recipe.pad_token_id or 0
        if self.recipe.layout != OWN:
            layout = layout or self.recipe.layout
            batch = lay_out_sequences(layout, sequences, pad_token_id=pad, prompt_of=prompt_of)
            with self.model.padded_rows() if layout == "padded" else contextlib.nullcontext():
                return self.model(**batch.inputs(self.device)).float()
        batch = lay_out_sequences("padded", sequences, pad_token_id=pad, prompt_of=prompt_of)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = self.model(**{name: value.to(self.device) for name, value in inputs.items()}).logits
        return logits.float().reshape(len(sequences))


def positions_of(classifier: PreTrainedModel) -> int | None:
    """Most tokens that a model can place; None: any number."""
    tables = [module for name, module in classifier.named_modules() if name.endswith("position_embeddings")]
    known = [getattr(classifier.config.get_text_config(), "max_position_embeddings", None)]
    # RoBERTa and its like number positions from behind the pad's
    known += [table.num_embeddings - table.padding_idx - 1 for table in tables if getattr(table, "padding_idx", None)]
    return min((n for n in known if n), default=None)


def _whole(recipe: Recipe) -> PreTrainedModel:
    config, loader = read_config(recipe.folder, revision=None, code=recipe.code)
    how = {"config": config, "dtype": recipe.dtype, "trust_remote_code": recipe.code}
    try:
        classifier, loading = loader.from_pretrained(recipe.folder, output_loading_info=True, **how)
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"--model {recipe.folder}: cannot be loaded as a classifier with one label ({quote_error(error)})"
        ) from error
    _check_weights(recipe.folder, classifier, sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"]))
    return classifier


def read_config(name: str, *, revision: str | None, code: bool) -> tuple[PreTrainedConfig, type]:
    """A checkpoint's config, and the class whose from_pretrained makes its classifier. Code that it brings along is run only
    where `code` allows it.

    Raises:
        UserError: there is none, or it needs code.
    """
    how = {"revision": revision, "trust_remote_code": code}
    try:
        config = AutoConfig.from_pretrained(name, **how)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model {name}: needs Python code that it brings along; read that code, then pass --trust_remote_code"
            ) from error
        raise UserError(f"--model {name}: no model could be found ({quote_error(error)})") from error
    loader = any_decoder.loader(config, name, **how)
    own = (getattr(config, "auto_map", None) or {}).get(any_decoder.AUTO)
    if own and not code and loader is AutoModelForSequenceClassification:
        raise UserError(
            f"--model {name}: brings a classifier of its own ({own}); read that code, then pass --trust_remote_code"
        )
    if code:
        families.name_own_class(config)
    else:
        config.__dict__.pop("auto_map", None)
    return config, loader


def _check_weights(folder: str, classifier: PreTrainedModel, missing: list[str], unused: list[str]) -> None:
    """Weights that the checkpoint lacks would be random, and so would every reward; a head that is not used is another."""
    own = f"{classifier.base_model_prefix}."
    if head := [key for key in missing if not key.startswith(own)]:
        raise UserError(
            f"--model {folder}: holds no weights for {head[0]}, so its rewards would be random; it is a language model or an "
            "encoder without a score head: train it with open_rm.reward_modeling, or name a reward model"
        )
    if missing:
        raise UserError(f"--model {folder}: the checkpoint lacks weights such as {missing[0]}; download it again")
    if head := [key for key in unused if key.startswith(("score.", "classifier."))]:
        raise UserError(
            f"--model {folder}: {type(classifier).__name__} does not use {head[0]}, so it is not the class of this model; if "
            "the folder brings code, read it, then pass --trust_remote_code"
        )


def _adapter(recipe: Recipe) -> PreTrainedModel:
    """The adapter beside its base, as peft gives it."""
    try:
        wrapped = adapters.load(recipe.folder, pad_token_id=recipe.pad_token_id, **recipe.base)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--model {recipe.folder}: the adapter cannot be put on its base ({quote_error(error)}); the base has to be "
            "where adapter_config.json says (base_model_name_or_path)"
        ) from error
    classifier = wrapped.base_model.model
    if not recipe.base["load_in_4bit"]:
        return classifier.to(getattr(torch, recipe.dtype))
    for module in classifier.modules():
        # as in training: on some CPUs bitsandbytes would compute in bfloat16 whatever it is told
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return classifier
