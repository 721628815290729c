"""A checkpoint becomes a reward model: config, backbone, score head, dropout off, what is trained.

Not covered: training it, and saving it again (publishing/).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from open_rm.batching import attention
from open_rm.errors import UserError, quote_error
from open_rm.flags import AdapterFlags, ModelFlags
from open_rm.model import adapters, any_decoder, attributes, families
from open_rm.model.reward_model import RewardModel, head_of, size_of

NO_ADAPTER = AdapterFlags()
WHOLE_WEIGHTS = {"zero_optimization": {"stage": 0}}


def fetch(flags: ModelFlags) -> None:
    """Have a model's weights on this node: download a Hub model's into the local cache, and look at the files.

    Downloading may take long, and under ZeRO-3 loading is a collective: ranks are not to wait there for one that downloads, nor
    for one that cannot load.

    Raises:
        UserError: there are none here, or a file is not whole.
    """
    name, how = flags.model_name_or_path, {"revision": flags.model_revision}
    asked = how | {"_raise_exceptions_for_missing_entries": False}
    files, why = [], ""
    try:
        for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            if file := cached_file(name, whole, **asked):
                files = [file]
            elif parts := cached_file(name, index, **asked):
                files, _ = get_checkpoint_shard_files(name, parts, **how)
            if files:
                break
    except (OSError, ValueError) as error:
        why = f" ({quote_error(error)})"
    if not files:
        raise UserError(
            f"--model_name_or_path {name}: no weights are found here{why}; every node needs the model: in its folder, in its Hub "
            "cache, or from the network"
        )
    for file in files:
        try:
            with Path(file).open("rb") as opened:
                if file.endswith(".safetensors"):
                    # reads the header, and compares the file's length with it
                    with safe_open(file, framework="pt"):
                        pass
                elif not opened.read(1):
                    raise OSError("an empty file")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--model_name_or_path {name}: cannot be loaded as a reward model, {file} is not whole "
                f"({quote_error(error)}); copy or download it again"
            ) from error


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """What --dtype means on a device."""
    bfloat16 = wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda")
    return torch.bfloat16 if bfloat16 else torch.float32


def load_reward_model(
    flags: ModelFlags,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: AdapterFlags = NO_ADAPTER,
    layout: str = "padded",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    deepspeed_config: dict = WHOLE_WEIGHTS,
) -> tuple[RewardModel, list[str]]:
    """Load a checkpoint as a reward model.

    The head is initialised N(0, 1 / (D + 1)), i.e. std = 1 / sqrt(D + 1) (Stiennon et al. 2020,
    https://arxiv.org/abs/2009.01325, p. 11), unless the checkpoint brings one. Dropout is off (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, p. 3).

    Args:
        adapter: whether the backbone is frozen and small matrices beside it are trained.
        layout: from `families.choose_layout`; packed rows take the place of `attn_implementation` by batching/attention.py.
        deepspeed_config: from ds_config.fill_config; under ZeRO-3 weights are partitioned as they are loaded.

    Returns:
        the model, and one line for the log on each thing a user would want to know about it.
    """
    config, loader = mended_config(flags)
    attributes.check(config, flags.attribute_weights, flags.model_name_or_path)
    torch.manual_seed(seed)  # rows added to the embeddings are random
    with _zero3_loading(deepspeed_config):
        classifier, new = _load(flags, config, loader, adapter, layout, dtype)
        lines = fit_embeddings(classifier, tokenizer, frozen=adapter.use_peft or flags.freeze_backbone)
    for part in families.configs_of(classifier.config):
        part.pad_token_id = tokenizer.pad_token_id
    lines += _make_head(classifier, new, seed, flags.score_init)
    with _gathered(head_of(classifier).weight):
        attributes.add_rows(head_of(classifier), len(flags.attribute_weights))
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if any_decoder.is_made_here(classifier):
        lines.append(any_decoder.describe(classifier))
    if config.model_type in families.ENCODERS:
        lines.append("an encoder: the reward is read where its own pooling says, not at the last token")
    if flags.freeze_backbone:
        lines.append(freeze(classifier, new))
    adapted = None
    if adapter.use_peft:
        name, revision = flags.model_name_or_path, flags.model_revision
        adapted = adapters.adapt(classifier, adapter, name=name, revision=revision, seed=seed)
        lines.append(adapters.describe(classifier, adapter))
    model = RewardModel(classifier, adapted, flags.attribute_weights)
    model.train()
    return model, lines


def mended_config(flags: ModelFlags):
    """The checkpoint's config as that of a reward model (one label, no dropout, no pad yet, no code unless it is trusted), and
    the class that loads it."""
    how = {"revision": flags.model_revision, "trust_remote_code": flags.trust_remote_code}
    config = AutoConfig.from_pretrained(flags.model_name_or_path, **how)
    loader = any_decoder.loader(config, flags.model_name_or_path, **how)
    if flags.trust_remote_code:
        families.name_own_class(config)
    else:
        config.__dict__.pop("auto_map", None)  # transformers' own class: what is saved needs no code
    for part in families.configs_of(config):
        for key, value in part.to_dict().items():
            # Some families read their dropout from the config at every call, not from a module.
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
        # An embedding cannot be made for a pad beyond its rows; the pad is set when it has them.
        part.pad_token_id = None
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}  # this is how num_labels = 1 is stored
    config.problem_type = "regression"  # else pipelines and servers return sigmoid(reward)
    return config, loader


@dataclass(frozen=True)
class New:
    """Names of the weights that the checkpoint did not bring. head: the score head's.  pooling: an encoder's."""

    head: list[str]
    pooling: list[str]


def _load(
    flags: ModelFlags, config, loader, adapter: AdapterFlags, layout: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, New]:
    """The classifier with the checkpoint's weights, and what is new in it."""
    name, attn_implementation = flags.model_name_or_path, flags.attn_implementation
    if layout != "padded":
        AttentionInterface.register(attention.NAME, attention.segment_attention)
        attn_implementation = attention.NAME
    classifier, loading = _from_pretrained(
        loader,
        name,
        revision=flags.model_revision,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=flags.trust_remote_code,
        **({"quantization_config": adapters.quantization(dtype)} if adapter.load_in_4bit else {}),
    )
    check_head(classifier, name)
    missing = list(loading["missing_keys"])
    # An encoder's pooling comes before its head and is new where the checkpoint was none.
    new = [key for key in missing if not key.startswith(classifier.base_model_prefix + ".") or ".pooler." in key]
    if lost := sorted(set(missing) - set(new)):
        raise UserError(
            f"--model_name_or_path {name}: the checkpoint lacks weights such as {lost[0]}; is it this architecture?"
        )
    of_head = [key for key in new if key.startswith(("score.", "classifier."))]
    return classifier, New(of_head, [key for key in new if key not in of_head])


def check_head(classifier: PreTrainedModel, name: str) -> None:
    """Refuse a class whose head is not the one linear layer that gives the reward; without a bias but for encoders."""
    head = head_of(classifier)
    if not isinstance(head, nn.Linear) or (
        head.bias is not None and classifier.config.model_type not in families.ENCODERS
    ):
        raise UserError(
            f"--model_name_or_path {name}: {type(classifier).__name__} has no score head that is known here"
        )


def fit_embeddings(classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, frozen: bool) -> list[str]:
    """Rows for tokens that the tokenizer has and the checkpoint has not. frozen: they would not be trained."""
    before = _rows(classifier.get_input_embeddings())
    if len(tokenizer) <= before:
        return []
    new_ids = [i for i in range(before, len(tokenizer)) if i != tokenizer.pad_token_id]
    if new_ids and frozen:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(new_ids[0])} is new to the model, and with --use_peft or "
            "--freeze_backbone its embedding would stay random; as --reward_token name one that the model knows, "
            "e.g. a reserved one, or train in full"
        )
    # mean_resizing fits a Gaussian to the whole table; a pad's row is never read, a reward token's is trained
    classifier.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return [f"embeddings resized from {before} to {len(tokenizer)} rows for added tokens"]


def _make_head(classifier: PreTrainedModel, new: New, seed: int, score_init: str) -> list[str]:
    """Initialise the head, unless the checkpoint brought one."""
    if not any(key.endswith(".weight") for key in new.head):
        ignored = ", and --score_init zeros does nothing" if score_init == "zeros" else ""
        return [f"the checkpoint already is a reward model: its score head is kept{ignored}"]
    lines = [initialise_head(head_of(classifier), seed, score_init)]
    return lines + ([f"new besides the score head: {', '.join(new.pooling)}"] if new.pooling else [])


def freeze(classifier: PreTrainedModel, new: New) -> str:
    """Leave gradients to the head and to what is new, an encoder's pooling included: frozen, it would stay random."""
    own = f"{classifier.base_model_prefix}."
    for key, parameter in classifier.named_parameters():
        parameter.requires_grad_(key in (*new.head, *new.pooling) or not key.startswith(own))
    trained = sum(size_of(p) for p in classifier.parameters() if p.requires_grad)
    pooling = " and the new pooling" if new.pooling else ""
    return f"backbone frozen: {trained} weights of the score head{pooling} are trained"


def _from_pretrained(loader, name: str, **how) -> tuple[PreTrainedModel, dict]:
    try:
        return loader.from_pretrained(name, output_loading_info=True, **how)
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"--model_name_or_path {name}: cannot be loaded as a reward model ({quote_error(error)})"
        ) from error


def check_trusted_code(flags: ModelFlags) -> None:
    """Refuse a model whose own code leaves buffers without values when a client loads it (the model is loaded for that).

    transformers 5 makes models without memory and fills in what the checkpoint holds. Its own models compute the rest
    again; code written for transformers 4 (InternLM2's rotary embeddings) does so in constructors alone, and whatever is
    in memory takes the place of those values, here and with every client.
    """
    if not flags.trust_remote_code:
        return
    name, revision = flags.model_name_or_path, flags.model_revision
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    families.name_own_class(config)
    loader = any_decoder.loader(config, name, revision=revision, trust_remote_code=True)
    config.pad_token_id = None
    classifier, _ = _from_pretrained(
        loader, name, revision=revision, config=config, dtype="auto", trust_remote_code=True
    )
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


def _rows(embedding: nn.Embedding) -> int:
    weight = embedding.weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _gathered(parameter: nn.Parameter):
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)


@contextlib.contextmanager
def _zero3_loading(deepspeed_config: dict) -> Iterator[None]:
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
