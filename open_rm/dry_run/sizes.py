"""The model's sizes from its config alone: it is made as loading makes it, of tensors without memory (torch's meta device)."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from open_rm.dry_run.told import Told, size, thousands
from open_rm.errors import UserError, quote_error
from open_rm.flags import AdapterFlags, ModelFlags
from open_rm.model import adapters, attributes, kernels, loading
from open_rm.model.reward_model import RewardModel, Shape, head_of, model_shape
from open_rm.training import footprint
from open_rm.training.footprint import Sizes

# NF4 with double quantization (QLoRA, arXiv 2305.14314): half a byte, an 8-bit scale for 64 weights, a float32 for 256 of these.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Planned:
    """model: without memory.  sizes: for footprint.state_bytes.  shape: for counting FLOPs.  saved: bytes of the saved folder's
    weights."""

    model: RewardModel
    sizes: Sizes
    shape: Shape
    parameters: int
    largest: int
    saved: float
    lines: list[str]

    def told(self) -> Told:
        numbers = {"class": type(self.model.classifier).__name__, "parameters": self.parameters}
        numbers |= {"trained": self.sizes.trained, "frozen_bytes": self.sizes.frozen}
        numbers |= {"largest_tensor": self.largest, "width": self.model.width, "layers": self.shape.layers}
        return Told("model", self.lines, numbers)


def planned(
    flags: ModelFlags, tokenizer: PreTrainedTokenizerBase, *, adapter: AdapterFlags, dtype: torch.dtype, on_gpu: bool
) -> Planned:
    """The reward model that these flags make, without its weights.

    Raises:
        UserError: what loading refuses too, as far as the config tells it.
    """
    name = flags.model_name_or_path
    config, loader = loading.mended_config(flags)
    how = {"dtype": dtype, "attn_implementation": "eager"}  # sizes do not depend on it, and every family has it
    try:
        with torch.device("meta"):
            if loader is AutoModelForSequenceClassification:
                classifier = loader.from_config(config, trust_remote_code=flags.trust_remote_code, **how)
            else:
                classifier = loader._from_config(config, **how)
            loading.fit_embeddings(classifier, tokenizer, frozen=adapter.use_peft or flags.freeze_backbone)
    except (ValueError, ImportError, RuntimeError, AttributeError, OSError) as error:
        raise UserError(f"--model_name_or_path {name}: cannot be a reward model ({quote_error(error)})") from error
    loading.check_head(classifier, name)
    whole = sum(p.numel() for p in classifier.parameters())
    attributes.add_rows(head_of(classifier), len(flags.attribute_weights))  # which are no part of what is saved
    if flags.freeze_backbone:
        loading.freeze(classifier, _new_weights(classifier))
    adapted = None
    if adapter.use_peft:
        with torch.device("meta"):
            adapted = adapters.adapt(classifier, adapter, name=name, revision=flags.model_revision, seed=0)
    model = RewardModel(classifier, adapted, flags.attribute_weights)
    if not on_gpu:
        kernels.apply_fused_kernels(model, torch.device("cpu"))
    sizes = footprint.sizes_of(model)
    if adapter.load_in_4bit:
        sizes = dataclasses.replace(sizes, frozen=int(sizes.frozen - _saved_by_4_bits(classifier)))
    saved = (whole if not adapter.use_peft or adapter.merge_adapter else sizes.trained) * dtype.itemsize
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    shape = model_shape(model)
    kind = type(classifier).__name__
    lines = [
        f"{name}: {kind}, {thousands(whole)} weights, {shape.layers} layers of width {model.width}; no weights were read"
    ]
    if sizes.trained < whole:
        lines.append(f"{thousands(sizes.trained)} weights are trained; {size(sizes.frozen)} are frozen")
    return Planned(model, sizes, shape, whole, largest, saved, lines)


def _new_weights(classifier) -> loading.New:
    """What a checkpoint without a head would not bring."""
    own = f"{classifier.base_model_prefix}."
    names = [name for name, _ in classifier.named_parameters()]
    head = [name for name in names if name.startswith(("score.", "classifier."))]
    return loading.New(head, [name for name in names if not name.startswith(own) and name not in head])


def _saved_by_4_bits(classifier) -> float:
    """Bytes less that the frozen linear layers of the backbone take."""
    backbone = getattr(classifier, classifier.base_model_prefix)
    held = [m.weight for m in backbone.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    return sum(weight.numel() * (weight.element_size() - FOUR_BITS) for weight in held)
