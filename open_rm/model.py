"""The reward model: a transformers backbone and a score head, loaded, initialised, and called for rewards.

It stays a plain `...ForSequenceClassification` inside, so that what is saved is what every client loads; only the place
where the reward is read differs: here by length (see batching.py), there by looking for the last non-pad token. Encoders
(BERT and its like) read it where their own pooling says, most often at the first token, in both.
Shapes: S sequences, T positions, D hidden width, N rewards.
"""

import contextlib
import math
from dataclasses import dataclass

import accelerate
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from open_rm import adapters, attention, cpu_kernels, families, last_layer
from open_rm.errors import UserError, quote_error


class ScoreHead(nn.Linear):
    """The linear score head, computed in float32 whatever the weights' dtype: bfloat16 would round a reward of 5 by
    up to 0.016, more than many margins."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class RewardModel(nn.Module):
    """Batch in, rewards out.

    The whole computation is this module's forward, so that wrappers (DeepSpeed, autocast) see every call.
    """

    def __init__(self, classifier: PreTrainedModel, adapted=None):
        """adapted: peft's wrapper of the classifier (adapters.adapt), None where all of it is trained."""
        super().__init__()
        self.classifier = classifier
        object.__setattr__(self, "adapted", adapted)  # no submodule: it holds the same modules under other names
        self.backbone_name = classifier.base_model_prefix
        self.is_encoder = classifier.config.model_type in families.ENCODERS
        # Swapping the class keeps the parameter, its name and ZeRO-3's hooks on the module.
        self.head.__class__ = ScoreHead
        # A family that is not known to pass keywords down to its layers computes its last layer in full.
        self.read_only_parameters = 0
        if classifier.config.get_text_config().model_type in families.SEGMENTS:
            backbone = getattr(classifier, self.backbone_name)
            layers = getattr(getattr(backbone, "language_model", backbone), "layers", None)
            if layers is not None:
                self.read_only_parameters = sum(map(_size, last_layer.compute_where_read(layers[-1])))

    @property
    def head(self) -> nn.Linear:
        """The linear layer [1, D] that gives the reward."""
        return _head(self.classifier)

    @property
    def width(self) -> int:
        """Hidden width D."""
        return self.classifier.config.get_text_config().hidden_size

    def forward(self, input_ids, reward_index, read_index, **layout) -> torch.Tensor:
        """[N] float32 rewards.

        Args:
            input_ids: [S, T].
            reward_index: [N] into the flattened S * T positions, where each reward is read.  read_index: the distinct
                ones among them.
            layout: attention_mask for right-padded rows; position_ids and segments for a packed row (batching.Batch).
        """
        if self.is_encoder:
            logits = self.classifier(input_ids=input_ids, **layout).logits.squeeze(-1)  # [S]
            return logits[reward_index // input_ids.shape[1]]
        backbone = getattr(self.classifier, self.backbone_name)
        if self.read_only_parameters:
            layout["read_index"] = read_index
        hidden = backbone(input_ids=input_ids, use_cache=False, **layout).last_hidden_state
        return self.head(hidden.flatten(0, 1)[reward_index]).squeeze(-1)


@dataclass(frozen=True)
class Shape:
    """What counting FLOPs needs; see metrics.training_flops. attention_width: heads * head dimension.

    passes: 3, forward and backward for activations and for weights; 2 where the weights are frozen beside an adapter,
        1 where nothing but the head is trained.
    body_parameters: applied at every token.  read_parameters: applied only where a reward is read (see last_layer.py).
    """

    body_parameters: int
    read_parameters: int
    layers: int
    attention_width: int
    passes: int


def load_reward_model(
    name: str,
    *,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    attn_implementation: str | None,
    layout: str = "padded",
    gradient_checkpointing: bool,
    seed: int,
    score_init: str = "default",
    freeze_backbone: bool = False,
    adapter: adapters.Adapter | None = None,
    trust_remote_code: bool = False,
    deepspeed_config: dict,
) -> tuple[RewardModel, list[str]]:
    """Load a checkpoint as a reward model.

    The head is initialised N(0, 1 / (D + 1)), i.e. std = 1 / sqrt(D + 1) (Stiennon et al. 2020,
    https://arxiv.org/abs/2009.01325, p. 11), unless the checkpoint brings one. Dropout is off (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, p. 3).

    Args:
        score_init: of a head that the checkpoint does not bring: "default" as above, or "zeros".
        freeze_backbone: only the head gets gradients.  adapter: the head does, and small matrices beside the backbone.
        trust_remote_code: whether code that the folder brings may run.
        layout: from `families.choose_layout`; packed rows take the place of `attn_implementation` by open_rm.attention.
        deepspeed_config: from engine.fill_config.

    Returns:
        the model, and one line for the log on each thing a user would want to know about it.
    """
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        families.name_own_class(config)
    else:
        config.__dict__.pop("auto_map", None)  # transformers' own class: what is saved needs no code
    text_config = config.get_text_config()
    for part in {id(config): config, id(text_config): text_config}.values():
        for key, value in part.to_dict().items():
            # Some families read their dropout from the config at every call, not from a module.
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
        part.pad_token_id = (
            None  # an embedding cannot be made for a pad beyond its rows; the pad is set when it has them
        )
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}  # this is how num_labels = 1 is stored
    config.problem_type = "regression"  # else pipelines and servers return sigmoid(reward)

    if layout != "padded":
        AttentionInterface.register(attention.NAME, attention.segment_attention)
        attn_implementation = attention.NAME
    torch.manual_seed(seed)  # rows added to the embeddings are random
    with _zero3_loading(deepspeed_config):
        classifier, loading = _from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **({"quantization_config": adapters.quantization(dtype)} if adapter and adapter.load_in_4bit else {}),
        )
        notes = []
        head = _head(classifier)
        if not isinstance(head, nn.Linear) or (head.bias is not None and config.model_type not in families.ENCODERS):
            raise UserError(
                f"--model_name_or_path {name}: {type(classifier).__name__} has no score head that is known here"
            )
        # An encoder's pooling comes before its head and is new where the checkpoint was none.
        new = [key for key in loading["missing_keys"] if not key.startswith(classifier.base_model_prefix + ".")]
        new += [key for key in loading["missing_keys"] if ".pooler." in key]
        if missing := sorted(set(loading["missing_keys"]) - set(new)):
            raise UserError(
                f"--model_name_or_path {name}: the checkpoint lacks weights such as {missing[0]}; is it this architecture?"
            )
        if len(tokenizer) > _rows(classifier.get_input_embeddings()):
            before = _rows(classifier.get_input_embeddings())
            new_ids = [i for i in range(before, len(tokenizer)) if i != tokenizer.pad_token_id]
            if new_ids and (adapter is not None or freeze_backbone):
                raise UserError(
                    f"the token {tokenizer.convert_ids_to_tokens(new_ids[0])} is new to the model, and with --use_peft or "
                    "--freeze_backbone its embedding would stay random; as --reward_token name one that the model knows, "
                    "e.g. a reserved one, or train in full"
                )
            # mean_resizing fits a Gaussian to the whole table; a pad's row is never read, a reward token's is trained
            classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            notes.append(f"embeddings resized from {before} to {len(tokenizer)} rows for added tokens")
    for part in (classifier.config, classifier.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    pooling = [key for key in new if not key.startswith(("score.", "classifier."))]
    if any(key.endswith(("score.weight", "classifier.weight")) for key in new):
        notes.append(initialise_head(head, seed, score_init))
        if pooling:
            notes.append(f"new besides the score head: {', '.join(pooling)}")
    else:
        ignored = ", and --score_init zeros does nothing" if score_init == "zeros" else ""
        notes.append(f"the checkpoint already is a reward model: its score head is kept{ignored}")
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.model_type in families.ENCODERS:
        notes.append("an encoder: the reward is read where its own pooling says, not at the last token")
    if freeze_backbone:
        # what is new is trained, an encoder's pooling included: frozen, it would stay random
        for key, parameter in classifier.named_parameters():
            parameter.requires_grad_(key in new or not key.startswith(f"{classifier.base_model_prefix}."))
        trained = sum(_size(p) for p in classifier.parameters() if p.requires_grad)
        notes.append(
            f"backbone frozen: {trained} weights of the score head{' and the new pooling' if pooling else ''} are trained"
        )
    adapted = None
    if adapter is not None:
        adapted = adapters.adapt(classifier, adapter, name=name, revision=revision, seed=seed)
        notes.append(adapters.describe(classifier, adapter))
    model = RewardModel(classifier, adapted)
    model.train()
    return model, notes


def _from_pretrained(name: str, **how) -> tuple[PreTrainedModel, dict]:
    try:
        return AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **how)
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"--model_name_or_path {name}: cannot be loaded as a reward model ({quote_error(error)})"
        ) from error


def check_trusted_code(name: str, *, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a model whose own code leaves buffers without values when a client loads it (the model is loaded for that).

    transformers 5 makes models without memory and fills in what the checkpoint holds. Its own models compute the rest
    again; code written for transformers 4 (InternLM2's rotary embeddings) does so in constructors alone, and whatever is
    in memory takes the place of those values, here and with every client.
    """
    if not trust_remote_code:
        return
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    families.name_own_class(config)
    config.pad_token_id = None
    classifier, _ = _from_pretrained(name, revision=revision, config=config, dtype="auto", trust_remote_code=True)
    saved = classifier.state_dict().keys()
    computed = {key: buffer.float().cpu() for key, buffer in classifier.named_buffers() if key not in saved}
    with accelerate.init_empty_weights(include_buffers=False):
        made = dict(type(classifier)(classifier.config).named_buffers())
    for key, buffer in computed.items():
        if key in made and not torch.allclose(buffer, made[key].float(), rtol=1e-2, atol=1e-2):  # some are bfloat16
            raise UserError(
                f"--model_name_or_path {name}: its own code was written for transformers 4, and under transformers 5 its "
                f"{key} gets no values, here and with every client; name a version that needs no code "
                "(InternLM2: as a Llama, made by tools/convert2llama.py of github.com/InternLM/InternLM)"
            )


def initialise_head(score: nn.Linear, seed: int, score_init: str) -> str:
    """Draw the head's weights N(0, 1 / (D + 1)), or take zeros, in place, also where ZeRO-3 has partitioned them.

    Returns the log's line.
    """
    std = 1 / math.sqrt(score.in_features + 1) if score_init == "default" else 0.0
    weights = torch.empty(1, score.in_features).normal_(std=std, generator=torch.Generator().manual_seed(seed))
    with _gathered(score.weight), torch.no_grad():
        # Under ZeRO-3, outside this context, the weight is an empty tensor and writing to it does nothing.
        score.weight.copy_(weights)
    if score.bias is not None:
        with _gathered(score.bias), torch.no_grad():
            score.bias.zero_()
    if score_init == "zeros":
        return "score head initialised with zeros: every reward is 0 before the first step"
    return f"score head initialised N(0, std = 1 / sqrt({score.in_features} + 1) = {std:.5f})"


def model_shape(model: RewardModel) -> Shape:
    """Sizes for counting FLOPs."""
    config = model.classifier.config.get_text_config()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    body = sum(_size(p) for p in model.parameters() if id(p) not in embeddings)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    read = model.read_only_parameters + model.width
    frozen = not any(p.requires_grad for p in getattr(model.classifier, model.backbone_name).parameters())
    passes = 1 if frozen else 2 if model.adapted is not None else 3
    return Shape(body - read, read, config.num_hidden_layers, config.num_attention_heads * head, passes)


def apply_fused_kernels(model: RewardModel, device: torch.device) -> str:
    """Swap in Liger's fused RMSNorm, RoPE and SwiGLU on a GPU, those of cpu_kernels.py elsewhere; returns the log's line."""
    if device.type != "cuda":
        fused = cpu_kernels.apply(model.classifier) if model.classifier.dtype == torch.float32 else 0
        ours = f"; our own CPU functions for rotary embeddings and norms are on in {fused} modules" if fused else ""
        return f"Liger kernels off: they are Triton kernels and there is no GPU{ours}"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    # Some of Liger's functions know no sequence classifier (Gemma 3), one no bare backbone (Nemotron). Of models that also
    # see, the part that reads.
    backbone = getattr(model.classifier, model.backbone_name)
    backbone = getattr(backbone, "language_model", backbone)
    family = backbone.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger kernels off: liger-kernel has none for {family}"
    # This patches transformers' modules, not only this model: what is built in this process afterwards is not plain.
    # The fused losses of language modelling stay out: there is no vocabulary head here.
    for taken in (backbone, model.classifier):
        try:
            _apply_liger_kernel_to_instance(taken, cross_entropy=False, fused_linear_cross_entropy=False)
            return f"Liger kernels on: fused norm, rotary embedding and MLP for {family}"
        except (TypeError, AttributeError) as error:
            why = quote_error(error)
    return f"Liger kernels off: liger-kernel does not take {type(model.classifier).__name__} ({why})"


def _head(classifier: PreTrainedModel) -> nn.Module | None:
    head = getattr(classifier, "classifier" if classifier.config.model_type in families.ENCODERS else "score", None)
    return getattr(head, "modules_to_save", {"default": head})["default"]  # peft trains a copy of it


def _size(parameter: nn.Parameter) -> int:
    """Number of weights, also of those that ZeRO-3 has partitioned or bitsandbytes has packed."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def _rows(embedding: nn.Embedding) -> int:
    weight = embedding.weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _gathered(parameter: nn.Parameter):
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)


@contextlib.contextmanager
def _zero3_loading(deepspeed_config: dict):
    """While open under ZeRO-3, transformers partitions weights as it loads them instead of holding them all."""
    if deepspeed_config["zero_optimization"].get("stage") != 3:
        yield
        return
    # transformers keeps only a weak reference: the object must outlive the loading, and not longer, since plain
    # from_pretrained calls (the reload check, a judge model) would be partitioned too
    config = HfDeepSpeedConfig(dict(deepspeed_config))
    try:
        yield
    finally:
        del config
        unset_hf_deepspeed_config()
