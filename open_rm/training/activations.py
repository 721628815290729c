"""What a forward keeps for its backward, from the sizes of a layer alone: bytes of a position, for any device.

After Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), which counts a GPT's layer, for what runs here: no dropout, no
scores that are kept (flash attention), fused functions where there are some, the last layer computed where it is read.

Numbers that one layer keeps of a position; D width, A = query heads x head width, K the same of key heads, I width of the MLP
(of all experts that a token goes through), E such experts, k how many keys are gathered for each position at most (1 where no
prefix is shared; on a CPU a long beginning of several sequences is not copied, batching/merged_attention.py):

    part                             on a GPU with Liger   without               on a CPU
    input of a norm                  D                     D, RMSNorm 3 D        D, RMSNorm 2 D where ours is not on
    norms of queries and keys        A + K                 3 (A + K)             as above
    inputs of q, k, v and of MLP     2 D                   2 D                   2 D
    queries, keys, values            A + 2 K k             A + 2 K k             at most A + 2 A k (repeated heads); padded A + 2 K
    attention's output               A                     A                     2 A (put together again)
    products of q, k, v in one       -                     A + K where padded    A + K where no key heads are repeated
    MLP with a gate                  3 I                   4 I                   4 I
    MLP without                      2 I                   2 I                   2 I
    experts                          2 E D                 2 E D                 2 E D (inputs gathered, outputs weighed)

Llama 3.1 8B, bfloat16, Liger: (4 x 4096 + 2 x 4096 + 2 x 1024 + 3 x 14336) x 2 bytes = 136 KiB. A float32 for each head and norm
comes to less than a hundredth. Not in it: layers of state-space models, and attention that keeps its scores (eager, soft caps on
a CPU). `fitting.measure` measures the same on the device; tests/dry_run holds this against it.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from open_rm.model import families
from open_rm.model.recompute import layers_of

# Of families.SEGMENTS those that Liger (0.8.5) has no functions for, or whose classifier it does not take.
NO_LIGER = {"gpt_neox", "cohere", "cohere2", "glm4_moe", "olmoe", "ministral3"}
LIGER = set(families.SEGMENTS) - NO_LIGER | {"nemotron", "llama4_text"}
MLP_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # of its width in configs
ONE_PRODUCT = ("query_key_value", "qkv_proj", "Wqkv", "c_attn")  # names of a linear layer that gives q, k and v


@dataclass(frozen=True)
class Layer:
    """Sizes of a decoder layer, in numbers a position.

    width: D.  queries: A.  keys: K.  mlp: I.  experts: E, 0 where there are none.  gated: whether the MLP has a gate.
    norms: how many of width D have an input of their own.  of_heads: numbers of the norms of queries and keys.
    rms: whether norms are RMSNorms.  ours: whether they are cpu_kernels'.  one_product: whether q, k and v are one.
    """

    width: int
    queries: int
    keys: int
    mlp: int
    experts: int
    gated: bool
    norms: int
    of_heads: int
    rms: bool
    ours: bool
    one_product: bool


@dataclass(frozen=True)
class Kept:
    """kept: bytes that one position keeps over all layers.  layers: those that can be recomputed one by one.  passed: bytes of a
    layer's input.  known: whether the layers are of the kind that the formula is for."""

    kept: float
    layers: int
    passed: float
    known: bool


def layer_of(classifier: PreTrainedModel) -> Layer:
    """Sizes of its layers, from its config and its modules, which may be without memory."""
    text = classifier.config.get_text_config()
    heads, key_heads, head_width = families.attention_shape(text)
    queries, keys, width = heads * head_width, key_heads * head_width, text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None) or 0
    mlp = next((size for name in MLP_NAMES if (size := getattr(text, name, None))), 4 * width)
    if experts:
        mlp = experts * (getattr(text, "moe_intermediate_size", None) or mlp)
    found = layers_of(classifier)
    modules = dict(found[len(found) // 2].named_modules()) if found else {}
    last = {name: name.rpartition(".")[2] for name in modules}
    norms = {name: module for name, module in modules.items() if "Norm" in type(module).__name__}
    of_heads = [name for name in norms if last[name] in ("q_norm", "k_norm")]
    rms = [module for module in norms.values() if "RMS" in type(module).__name__]
    # both branches of a parallel layer start at one input
    together = getattr(text, "use_parallel_residual", False) or text.model_type in ("cohere", "cohere2")
    return Layer(
        width=width,
        queries=queries,
        keys=keys,
        mlp=mlp,
        experts=experts,
        gated=bool(experts) or any("gate" in part or part in ("w3", "Wi") for part in last.values()),
        norms=1 if together else len(norms) - len(of_heads) or 2,
        of_heads=(queries + keys) if of_heads else 0,
        rms=bool(rms),
        ours=any("forward" in vars(module) for module in rms),
        one_product=any(part in ONE_PRODUCT for part in last.values()),
    )


def of_model(
    classifier: PreTrainedModel, layout: str, *, itemsize: int, on_gpu: bool, keys: float, reads_last: bool
) -> Kept:
    """What a position keeps in the forward of a model, which may be without memory.

    Args:
        layout: of batching.rules.LAYOUTS.  itemsize: bytes of a number that is computed with.
        keys: that are gathered for each position at most (gathered.most_keys).
        reads_last: whether the last layer computes only what the head reads (model/last_layer.py).
    """
    text, layer = classifier.config.get_text_config(), layer_of(classifier)
    backbone = getattr(classifier, classifier.base_model_prefix)
    layers, passed = len(layers_of(classifier)) or text.num_hidden_layers, float(layer.width * itemsize)
    if not any(p.requires_grad for p in backbone.parameters()):  # a few tensors at work, as fitting.measure takes it
        return Kept(8 * passed, layers, passed, known=True)
    fused = on_gpu and text.model_type in LIGER
    norm = 1
    if layer.rms and not fused and not layer.ours:
        norm = 3 if itemsize == 2 else 2  # the input in float32, and the normed one
    attention = _attention(layer, layout, on_gpu=on_gpu, keys=keys if layout == "shared_prefix" else 1.0)
    inputs = norm * (layer.norms * layer.width + layer.of_heads) + 2 * layer.width
    mlp = layer.mlp * ((3 if fused else 4) if layer.gated else 2) + 2 * layer.experts * layer.width
    last = inputs + attention + mlp
    if reads_last:  # its MLP, the input of that and of the output's projection are of a few positions
        last -= mlp + layer.width + layer.queries
    numbers = (layers - 1) * (inputs + attention + mlp) + last + norm * layer.width
    scores = not on_gpu and (getattr(text, "attn_logit_softcapping", None) or text.model_type in families.SINKS)
    known = bool(layer.queries and layers_of(classifier)) and text.model_type not in families.RECURRENT and not scores
    return Kept(numbers * itemsize, layers, passed, known)


def _attention(layer: Layer, layout: str, *, on_gpu: bool, keys: float) -> float:
    """Numbers of a position, as the table above has them, on a CPU at most. keys: k."""
    repeated = layout == "padded" if on_gpu else layout != "padded"
    shared = 2 * (layer.queries if repeated else layer.keys) * keys
    viewed = layout == "padded" or (not on_gpu and layer.queries == layer.keys)  # the values are a part of the product
    whole = layer.queries + layer.keys if layer.one_product and viewed else 0
    return layer.queries + shared + whole + layer.queries * (1 if on_gpu else 2)
