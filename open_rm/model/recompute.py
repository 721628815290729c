"""Activations that are computed again in the backward pass instead of being kept (Chen et al. 2016, arXiv 1604.06174).

A recomputed layer keeps its input alone, and its forward is paid twice. The last layer is never recomputed: it computes little
more than what the head reads (last_layer.py), and its hooks know the rows of the latest forward only, so that a second
forward before the first one's backward would give wrong gradients.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from open_rm.errors import UserError

# Prime lengths: a saved tensor belongs to tokens if its size is a multiple of theirs, which no weight's is.
MEASURED = (509, 251, 127, 61, 31, 13)


def every_how_many(flag: str | bool) -> int | None:
    """--gradient_checkpointing as a number: 0 for off, 1 for all layers but the last, N for every Nth; None for auto."""
    word = str(flag).lower()
    return {"auto": None, "off": 0, "false": 0, "on": 1, "true": 1}[word] if not word.isdecimal() else int(word)


def layers_of(classifier: PreTrainedModel) -> list[nn.Module]:
    """The layers that can be recomputed one by one, in order; none where a model's own code knows only all or nothing. Of a
    model that also sees, those that read."""
    backbone = getattr(classifier, classifier.base_model_prefix)
    backbone = getattr(backbone, "language_model", backbone)
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def _is_frozen(classifier: PreTrainedModel) -> bool:
    """Then a forward keeps nothing, and transformers would make gradients flow through it for nothing."""
    return not any(p.requires_grad for p in getattr(classifier, classifier.base_model_prefix).parameters())


def recompute(classifier: PreTrainedModel, every: int) -> int:
    """Recompute every `every`th layer, 0 for none; the last one never. Returns how many are."""
    layers = layers_of(classifier)
    if every == 0 or len(layers) == 1 or _is_frozen(classifier):
        if classifier.is_activation_checkpointing:
            classifier.activation_checkpointing_disable()
        return 0
    if not classifier.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient_checkpointing: {type(classifier).__name__} of transformers cannot recompute its layers; pass off, or auto"
        )
    classifier.activation_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0 and number + 1 < len(layers)
    return sum(layer.gradient_checkpointing for layer in layers)


def describe(classifier: PreTrainedModel, every: int) -> str:
    """One line for the log on what `recompute` did."""
    layers = layers_of(classifier)
    if every == 0 or _is_frozen(classifier):
        return "activations: none are recomputed in the backward pass"
    if not layers:
        return "activations: recomputed in the backward pass, as this model's own code does it"
    count = sum(layer.gradient_checkpointing for layer in layers)
    return f"activations: recomputed in {count} of {len(layers)} layers in the backward pass"


def measured_tokens(longest: int) -> int:
    """Tokens of the row for `Saved`: not more than the longest sequence of the data, which the model is known to take."""
    return next((tokens for tokens in MEASURED if tokens <= longest), MEASURED[-1])


class Saved:
    """Counts, while entered, the bytes that a forward keeps for its backward: `per_token` afterwards.

    The forward has to be of one row of `tokens` tokens (measured_tokens). Weights are not counted, and a tensor that several
    operations keep is counted once.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens

    def __enter__(self) -> "Saved":
        self._kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out again
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
        self.per_token = sum(storage.nbytes() for storage in self._kept.values()) / self._tokens
        self._kept.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and tensor.numel() % self._tokens == 0:
            storage = tensor.untyped_storage()
            self._kept[storage.data_ptr()] = storage
        return tensor
