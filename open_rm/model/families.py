"""What is known of a model from its config alone: whether it can be a reward model, and which layouts are exact for it."""

from dataclasses import dataclass

from transformers import AutoConfig

from open_rm.data.tokenizer import reward_id_of
from open_rm.errors import UserError, quote_error
from open_rm.flags import AdapterFlags, ModelFlags
from open_rm.model import any_decoder
from open_rm.model.adapters import is_adapter

# Families whose attention goes through transformers' attention interface with nothing that segments do not know, each
# shown equal to padded batches by tests/model/test_layouts_agree.py.
SEGMENTS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "granite",
    "cohere",
    "cohere2",
    "gpt_oss",
    "ministral3",
    "mixtral",
    "olmo3",
    "olmoe",
    "qwen3_moe",
    "smollm3",
)

# Of these, families with attention sinks.
SINKS = ("gpt_oss",)

# Families that carry a state from token to token in all their layers, and the layers of others that do.
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
RECURRENT_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid"}

# Families whose linear layers are Conv1D, stored transposed.
TRANSPOSED = ("gpt2",)

# Encoder classifiers whose head is `classifier`, a linear layer with a bias after a pooling of their own.
ENCODERS = ("bert", "deberta-v2", "modernbert")


@dataclass(frozen=True)
class Layout:
    """name: padded, packed or shared_prefix.  why_not_shared: if auto fell back to padded, why."""

    name: str
    why_not_shared: str | None = None


def choose_layout(
    wanted: str,
    config,
    *,
    attn_implementation: str | None,
    max_token_length: int,
    on_gpu: bool,
    bf16: bool = True,
    capability: tuple[int, int] | None = None,
) -> Layout:
    """The layout to compute in.

    Args:
        wanted: auto, padded, packed or shared_prefix. auto takes shared_prefix wherever it is exact.
        config: the model's transformers config.
        capability: the GPU's compute capability (major, minor); None is taken as enough.

    Raises:
        UserError: a packed layout was asked for by name and is not exact for this model.
    """
    text, reason = config.get_text_config(), None
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
    if text.model_type not in SEGMENTS:
        reason = _why_not_packed(text)
    elif getattr(text, "use_bidirectional_attention", False) or getattr(text, "is_causal", True) is False:
        reason = "its attention is not causal"
    elif on_gpu and (refused := _flash_refuses(text, bf16, capability)):
        reason = refused
    elif rope.get("rope_type") in ("dynamic", "longrope") and max_token_length > (original or 0):
        reason = f"{rope['rope_type']} rotary embeddings depend on the longest sequence beyond {original} tokens"
    elif attn_implementation is not None:
        reason = f"--attn_implementation {attn_implementation} is attention for padded rows"
    if wanted == "padded" or reason is None:
        return Layout("shared_prefix" if wanted == "auto" else wanted)
    if wanted == "auto":
        return Layout("padded", reason)
    raise UserError(f"--batching {wanted} is not possible: {reason}; pass --batching padded, or leave it to auto")


def _why_not_packed(text) -> str:
    if text.model_type == "llama4_text":
        return "llama4_text attends within chunks of positions, which packed rows would cut elsewhere"
    layers = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    if text.model_type in RECURRENT or layers & RECURRENT_LAYERS:
        return f"{text.model_type} carries a state from token to token, in packed rows from one sequence into the next"
    return f"packed rows are not known to be exact for {text.model_type}"


def _flash_refuses(text, bf16: bool, capability: tuple[int, int] | None) -> str | None:
    """Why flash attention over packed rows does not take this model or GPU: mha_varlen_fwd's own checks, in torch's
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp; None where it does."""
    heads, key_heads, width = attention_shape(text)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return f"{text.model_type} soft-caps attention scores, which torch's flash attention does not"
    if text.model_type in SINKS:
        return f"{text.model_type} has attention sinks, which torch's flash attention does not"
    if not bf16:
        return "flash attention over packed rows computes in bfloat16, and --dtype is float32"
    if width % 8 or width > 256:
        return f"flash attention takes heads of a multiple of 8 numbers up to 256, and here they are of {width}"
    if heads % key_heads:
        return f"flash attention shares key heads evenly, and here are {heads} heads over {key_heads} key heads"
    if capability is not None and capability < (8, 0):
        has = ".".join(map(str, capability))
        return f"flash attention needs a GPU of compute capability 8.0 (A100) or more, and this one has {has}"
    return None


def attention_shapes(text) -> list[tuple[int, int, int]]:
    """Of each layer: query heads H, key heads G and the width D of a head, from the config of a decoder's text part; zeros where
    it names no heads (state-space models)."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * text.num_hidden_layers
    shapes = []
    for layer in layers:
        heads = getattr(layer, "num_attention_heads", None) or 0
        width = heads and (getattr(layer, "head_dim", None) or layer.hidden_size // heads)
        shapes.append((heads, getattr(layer, "num_key_value_heads", None) or heads, width))
    return shapes


def attention_shape(text) -> tuple[int, int, int]:
    """H, G and D of the layer with the widest heads."""
    return max(attention_shapes(text), key=lambda shape: shape[2])


def read_config(flags: ModelFlags, *, max_token_length: int):
    """The model's config; refuses what cannot work from that small file alone, before data and weights are touched."""
    name, trust_remote_code = flags.model_name_or_path, flags.trust_remote_code
    if is_adapter(name):
        raise UserError(f"--model_name_or_path {name}: holds an adapter; start from a model saved with --merge_adapter")
    try:
        config = AutoConfig.from_pretrained(name, revision=flags.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model_name_or_path {name}: needs Python code that it brings along; read that code, then pass "
                "--trust_remote_code"
            ) from error
        raise UserError(
            f"--model_name_or_path {name}: no model could be found ({quote_error(error)}); "
            "check the name, the revision and the network, or pass a local folder"
        ) from error
    any_decoder.loader(config, name, revision=flags.model_revision, trust_remote_code=trust_remote_code)
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"--model_name_or_path {name}: its config asks for the router's auxiliary loss (output_router_logits), which "
            "is not part of this loss; set it to false there to train without"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and max_token_length > positions:
        raise UserError(
            f"--max_token_length {max_token_length} is beyond the {positions} positions of {name}; "
            f"pass --max_token_length {positions} or less"
        )
    return config


def check_together(name: str, config, tokenizer, flags: AdapterFlags) -> None:
    """Refuse what this model, its tokenizer and an adapter cannot do together; `config` is from `read_config`."""
    encoder, pad = config.model_type in ENCODERS, getattr(config.get_text_config(), "pad_token_id", None)
    if reward_id_of(tokenizer) is not None and encoder:
        raise UserError(
            f"--reward_token: {name} is an encoder, whose reward is read where its pooling says; leave it out"
        )
    if not flags.use_peft:
        return
    if encoder:
        raise UserError(f"--use_peft is for decoders, and {name} is an encoder ({config.model_type}); train it in full")
    if flags.load_in_4bit and config.model_type in TRANSPOSED:
        raise UserError(
            f"--load_in_4bit: {config.model_type} stores its layers transposed, and 4 bits lose that; leave it out"
        )
    if not flags.merge_adapter and any_decoder.brings_code(config):
        raise UserError(
            f"--use_peft: transformers has no sequence classifier of {config.model_type}, so that clients of an adapter could "
            "not load its base; add --merge_adapter"
        )
    if not flags.merge_adapter and pad in range(len(tokenizer)) and pad != tokenizer.pad_token_id:
        # An adapter's folder holds no config: clients would look for the last token that is not the base's pad.
        raise UserError(
            f"--use_peft: the config of {name} pads with {tokenizer.convert_ids_to_tokens(pad)!r}, which is "
            f"not the pad here, {tokenizer.pad_token!r}, and clients of an adapter would read the reward at another "
            "token; add --merge_adapter"
        )


def configs_of(config) -> list:
    """The config, and that of its text part where it is another object: models that also see have two."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def name_own_class(config) -> None:
    """Code that a model brings often has a sequence classifier beside its language model without naming it (InternLM2)."""
    named = getattr(config, "auto_map", None) or {}
    language_model = named.get("AutoModelForCausalLM", "")
    if "AutoModelForSequenceClassification" not in named and language_model.endswith("ForCausalLM"):
        own = language_model.removesuffix("ForCausalLM") + "ForSequenceClassification"
        config.auto_map = named | {"AutoModelForSequenceClassification": own}
