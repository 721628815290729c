"""The reward model: a transformers backbone and a score head, called for rewards.

It stays a plain `...ForSequenceClassification` inside, so that what is saved is what every client loads; only the place
where the reward is read differs: here by length (batching/layouts.py), there by looking for the last non-pad token. Encoders
(BERT and its like) read it where their own pooling says, most often at the first token, in both.
Shapes: S sequences, T positions, D hidden width, N rewards.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from open_rm.batching import attention
from open_rm.model import attributes, families, last_layer


class ScoreHead(nn.Linear):
    """The linear score head, computed in float32 whatever the weights' dtype: bfloat16 would round a reward of 5 by
    up to 0.016, more than many margins.

    attribute_weights: of the rows behind the first, where attributes are trained too (attributes.py).
    """

    attribute_weights: tuple[float, ...] = ()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., 1] rewards; to [..., 1 + K], the predicted attributes behind it, while they are trained."""
        with torch.autocast(hidden.device.type, enabled=False):
            row = attributes.merged_row(self.weight, self.attribute_weights)
            if self.training and self.attribute_weights:
                row = torch.cat((row, self.weight[1:]))
            # a head with a bias is an encoder's, which has no attributes
            return F.linear(hidden.float(), row.float(), None if self.bias is None else self.bias.float())


class RewardModel(nn.Module):
    """Batch in, rewards out.

    The whole computation is this module's forward, so that wrappers (DeepSpeed, autocast) see every call.
    """

    def __init__(self, classifier: PreTrainedModel, adapted=None, attribute_weights: Sequence[float] = ()):
        """adapted: peft's wrapper of the classifier (adapters.adapt), None where all of it is trained.
        attribute_weights: of the head's rows behind the first (attributes.add_rows)."""
        super().__init__()
        self.classifier = classifier
        object.__setattr__(self, "adapted", adapted)  # no submodule: it holds the same modules under other names
        self.backbone_name = classifier.base_model_prefix
        self.is_encoder = classifier.config.model_type in families.ENCODERS
        # Swapping the class keeps the parameter, its name and ZeRO-3's hooks on the module.
        self.head.__class__ = ScoreHead
        self.head.attribute_weights = tuple(attribute_weights)
        # A family that is not known to pass keywords down to its layers computes its last layer in full.
        self.read_only_parameters = 0
        self.sequence_group = None  # the ranks that compute a row with this one (sequence_parallel.use)
        if classifier.config.get_text_config().model_type in families.SEGMENTS:
            backbone = getattr(classifier, self.backbone_name)
            layers = getattr(getattr(backbone, "language_model", backbone), "layers", None)
            if layers is not None:
                self.read_only_parameters = sum(map(size_of, last_layer.compute_where_read(layers[-1])))

    @property
    def head(self) -> nn.Linear:
        """The linear layer that gives the reward: [1, D], or [1 + K, D] where attributes are trained too."""
        return head_of(self.classifier)

    @property
    def width(self) -> int:
        """Hidden width D."""
        return self.classifier.config.get_text_config().hidden_size

    def forward(self, input_ids, reward_index, read_index, **layout) -> torch.Tensor:
        """[N] float32 rewards; [N, 1 + K] in training where attributes are trained too: the reward and the predicted attributes.

        Args:
            input_ids: [S, T].
            reward_index: [N] into the flattened S * T positions, where each reward is read.  read_index: the distinct
                ones among them.
            layout: attention_mask for right-padded rows; position_ids and segments for a packed row (layouts.Batch).
        """
        if self.is_encoder:
            logits = self.classifier(input_ids=input_ids, **layout).logits.squeeze(-1)  # [S]
            return logits[reward_index // input_ids.shape[1]]
        if self.sequence_group is not None:
            return self._by_stretches(self.sequence_group.stretch(input_ids, reward_index, read_index, **layout))
        layout["input_ids"] = input_ids
        if self.read_only_parameters:
            layout["read_index"] = read_index
        return self._read(reward_index, layout)

    def _read(self, reward_index: torch.Tensor, inputs: dict) -> torch.Tensor:
        """[N] or [N, 1 + K] float32 what the head makes of these positions. inputs: the backbone's."""
        hidden = getattr(self.classifier, self.backbone_name)(use_cache=False, **inputs).last_hidden_state
        read = self.head(hidden.flatten(0, 1)[reward_index])
        return read.squeeze(-1) if read.shape[-1] == 1 else read

    def _by_stretches(self, stretch) -> torch.Tensor:
        """[N] float32, the rewards of the whole row on every rank of the group. stretch: this rank's part of it."""
        reads = {}
        if self.read_only_parameters:
            reads = {"read_index": stretch.read_index, "read_here": stretch.read_here}
        rewards = self._read(stretch.reward_index, stretch.inputs | reads)
        here = stretch.reward_here if rewards.dim() == 1 else stretch.reward_here[:, None]
        return self.sequence_group.summed(rewards.masked_fill(~here, 0.0))

    @contextlib.contextmanager
    def padded_rows(self) -> Iterator[None]:
        """While entered padded rows can be computed, by transformers' attention, whatever layout the model was loaded for."""
        own = self.classifier.config._attn_implementation
        if own != attention.NAME or self.sequence_group is not None:  # whose stretches are of padded rows, too
            yield
            return
        # sdpa, which keeps no scores, unless they are soft-capped or beside sinks
        text = self.classifier.config.get_text_config()
        eager = getattr(text, "attn_logit_softcapping", None) is not None or text.model_type in families.SINKS
        self.classifier.set_attn_implementation("eager" if eager else "sdpa")
        try:
            yield
        finally:
            self.classifier.set_attn_implementation(own)


@dataclass(frozen=True)
class Shape:
    """What counting FLOPs needs; see metrics.training_flops. attention_width: heads * head dimension, mean of layers.

    passes: 3, forward and backward for activations and for weights; 2 where the weights are frozen beside an adapter,
        1 where nothing but the head is trained.
    body_parameters: applied at every token.  read_parameters: applied only where a reward is read (see last_layer.py).
    """

    body_parameters: int
    read_parameters: int
    layers: int
    attention_width: int
    passes: int


def model_shape(model: RewardModel) -> Shape:
    """Sizes for counting FLOPs."""
    config = model.classifier.config.get_text_config()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    body = sum(size_of(p) for p in model.parameters() if id(p) not in embeddings)
    widths = [heads * width for heads, _, width in families.attention_shapes(config)]
    read = model.read_only_parameters + model.width * (1 + len(model.head.attribute_weights))
    frozen = not any(p.requires_grad for p in getattr(model.classifier, model.backbone_name).parameters())
    passes = 1 if frozen else 2 if model.adapted is not None else 3
    return Shape(body - read, read, len(widths), sum(widths) // len(widths), passes)


def head_of(classifier: PreTrainedModel) -> nn.Module | None:
    """Its score head; None where it has none that is known here."""
    head = getattr(classifier, "classifier" if classifier.config.model_type in families.ENCODERS else "score", None)
    if hasattr(head, "modules_to_save"):  # peft trains a copy of it
        return head.modules_to_save["default"]
    return head


def size_of(parameter: nn.Parameter) -> int:
    """Number of weights, also of those that ZeRO-3 has partitioned or bitsandbytes has packed."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
