"""Every causal model type of this transformers as a reward model: which train, are saved, and are read again by their clients.

    PYTHONPATH=.:tests python tests/model/every_decoder.py [TYPE ...]

Each type is made tiny with random weights and taken through what training does with it: loaded by load_reward_model, padded
rewards against the same sequences one by one (right padding is exact), rewards in training mode against those without (no
noise that nobody asked for), a step, saved. Then one process of plain transformers, without this repository, loads every
folder with trust_remote_code and computes the rewards again, one by one and padded. Some minutes; test_any_decoder.py does
the same for a few types in seconds.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

from open_rm import toy
from open_rm.batching.layouts import lay_out
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.model import any_decoder
from open_rm.model.loading import load_reward_model
from open_rm.model.reward_model import model_shape

TYPES = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LACK = [kind for kind in TYPES if kind not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
# Absolute plus relative to the reward: float32 in another order.
TOLERANCE = 1e-5
VOCABULARY = 1024  # the toy's tokenizer has some tokens fewer

# Values of whatever numbers a config has by these names.
SIZES = {
    32: "hidden_size d_model n_embd embedding_dim emb_dim moe_intermediate_size expert_ffn_hidden_size lru_width "
    "attention_hidden_size shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_dim vision_embed_dim",
    64: "intermediate_size ffn_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size dim_ff mamba_d_ssm "
    "decoder_ffn_dim encoder_ffn_dim n_inner feed_forward_size",
    2: "num_hidden_layers n_layer n_layers num_layers num_blocks num_key_value_heads num_experts_per_tok moe_k moe_topk "
    "num_experts_per_token moe_top_k top_k_experts index_n_heads o_groups linear_num_key_heads linear_num_value_heads "
    "zero_expert_num layer_group_size global_attn_every_n_layers altup_num_inputs decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers pad_token_id",
    4: "num_attention_heads n_head n_heads attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "rotary_dim time_step_rank linear_num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group num_expert_group num_dense_layers "
    "first_k_dense_replace moe_layer_start_index moe_layer_end_index n_groups heads_per_ngram split_ngram_parts eos_token_id",
    0: "num_kv_shared_layers num_nextn_predict_layers bos_token_id",
    8: "head_dim dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim o_lora_rank index_head_dim sliding_window "
    "attention_chunk_size mamba_n_heads mamba_d_head mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size state_size "
    "num_heads attention_window_size linear_head_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
    "laurel_rank hc_lowrank make_ngram_vocab_size_divisible_by",
    16: "q_lora_rank kv_lora_rank mamba_chunk_size chunk_size router_hidden_size ple_embed_dim query_pre_attn_scalar",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}
BY_NAME = {name: value for value, names in SIZES.items() for name in names.split()}
OWN_HEADS = {"num_key_value_heads": 4}  # as many keys as queries
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SPECIAL = {
    "axk1": OWN_HEADS,
    "axk2": OWN_HEADS,
    "bailing_hybrid": OWN_HEADS,
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "deepseek_v2": OWN_HEADS | {"num_experts_per_tok": 2},
    "deepseek_v3": OWN_HEADS,
    "deepseek_v32": OWN_HEADS,
    "dots3_note_text": OWN_HEADS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
    },
    "git": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    },
    "glm4_moe_lite": OWN_HEADS,
    "glm_moe_dsa": OWN_HEADS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": OWN_HEADS | HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": OWN_HEADS,
    "minicpm3": OWN_HEADS,
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 56, "crop_size": 56},
        "audio_config": {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 4}
        | {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "bias_max_distance": 8,
        },
    },
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},
    "youtu": OWN_HEADS,
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 8, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}
TEXT = {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text", "got_ocr2": "qwen2", "fuyu": "persimmon"}
TEXT |= {"moss_transcribe_diarize": "qwen3", "gemma3": "gemma3_text", "gemma3n": "gemma3n_text"}


def tiny(kind: str, **changes):
    """A config of a model type with small numbers in it."""
    made = CONFIG_MAPPING[kind]
    default = {}
    with contextlib.suppress(Exception):
        default = made().to_dict()
    if kind in TEXT:
        parts = {"text_config": tiny(TEXT[kind]).to_dict()}
        for part in ("vision_config", "audio_config"):
            if default.get(part):
                small = {name: BY_NAME[name] for name, value in default[part].items() if _is_size(name, value)}
                parts[part] = default[part] | small
        return made(**parts | changes)
    sizes = {name: BY_NAME[name] for name, value in default.items() if _is_size(name, value)}
    sizes |= {name: BY_NAME[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return made(**sizes | SPECIAL.get(kind, {}) | changes)


def _is_size(name: str, value) -> bool:
    return name in BY_NAME and isinstance(value, int) and not isinstance(value, bool)


def save_tiny(kind: str, folder: Path, tokenizer, **changes) -> None:
    """A random causal model of a type, as pretraining leaves it, with a tokenizer."""
    config = tiny(kind, **changes)
    any_decoder.class_for(config)  # says at once what cannot be
    maker = AutoModelForCausalLM
    with torch.device("meta"):
        weights = sum(p.numel() for p in maker.from_config(config).parameters())
    if weights > 4_000_000:
        raise ValueError(f"{weights} weights: no tiny config is known")
    torch.manual_seed(0)
    model = maker.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # some are zeros, and attention is nearly uniform with what is usual
            if p.is_floating_point() and p.dim() > 1:
                p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pairs() -> list:
    """Eight sequences of unlike lengths, as pairs."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 500, (n,), generator=generator).tolist() for n in (30, 17, 9, 3, 40, 25, 1, 12)]
    return list(zip(ids[::2], ids[1::2], strict=True))


def rewards(model, some: list, pad: int) -> torch.Tensor:
    """[2 pairs] chosen of all, then rejected of all, in one padded batch."""
    return model(**lay_out("padded", some, pad_token_id=pad, prompt_ids=range(len(some))).inputs(torch.device("cpu")))


def one_by_one(model, some: list, pad: int) -> torch.Tensor:
    """The same, each sequence without a neighbour (a pair of the same sequence twice)."""
    return torch.stack([rewards(model, [(ids, ids)], pad)[0] for side in zip(*some, strict=True) for ids in side])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to 1 + |reward|; infinite where one is no number."""
    difference = ((one - other).abs() / (1 + other.abs())).max().item()
    return difference if difference == difference else float("inf")


def train(kind: str, folder: Path, tokenizer) -> dict:
    """One type from a checkpoint to a saved folder; what a client then has to find."""
    save_tiny(kind, folder / "base", tokenizer)
    model, _ = load_reward_model(ModelFlags(model_name_or_path=str(folder / "base")), tokenizer)
    some, pad = pairs(), tokenizer.pad_token_id
    with torch.no_grad():
        padded, single = rewards(model, some, pad), one_by_one(model, some, pad)
        quiet = rewards(model.eval(), some, pad)
    model_shape(model)
    facts = {"padding": apart(padded, single), "noise": apart(padded, quiet), "spread": single.std().item()}
    model.train()
    chosen, rejected = rewards(model, some, pad).chunk(2)
    torch.nn.functional.softplus(rejected - chosen).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()
    with torch.no_grad():
        trained = rewards(model, some, pad)
    saved = folder / "saved"
    model.classifier.save_pretrained(saved)
    facts["brought"] = any_decoder.write_code(saved, model.classifier)
    names = {at: _names(folder / at) for at in ("base", "saved")}
    heads = {name for name in names["base"] if re.match(r"(lm_head|head|output|embed_out|cls|generator)\b", name)}
    facts |= {"idle": len(idle), "as the language model": names["saved"] == names["base"] - heads | {"score.weight"}}
    return facts | {"moved": apart(trained, single), "rewards": trained.tolist()}


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# Plain transformers: no import of this repository.
CLIENT = """
import json, sys, torch, transformers
from transformers import AutoModelForSequenceClassification
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
sequences, pad = json.load(sys.stdin)
ids = torch.tensor([s + [pad] * (max(map(len, sequences)) - len(s)) for s in sequences])
mask = torch.tensor([[1] * len(s) + [0] * (ids.shape[1] - len(s)) for s in sequences])
for folder in sys.argv[1:]:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            single = [model(input_ids=torch.tensor([s])).logits.item() for s in sequences]
            padded = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).tolist()
        print("READ", json.dumps([folder, single, padded]), flush=True)
    except Exception as error:
        print("READ", json.dumps([folder, type(error).__name__ + ": " + str(error)[:150], None]), flush=True)
assert not any(name.split(".")[0] == "open_rm" for name in sys.modules)
"""


def read_by_clients(folders: list[Path], pad: int) -> dict[str, tuple]:
    """By folder: rewards one by one and padded, or an error, in a process of plain transformers."""
    sequences = [ids for side in zip(*pairs(), strict=True) for ids in side]
    with tempfile.TemporaryDirectory() as home:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *map(str, folders)],
            input=json.dumps([sequences, pad]),
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("READ ")]
    return {folder: (single, padded) for folder, single, padded in lines}


def judge(facts: dict, read: tuple) -> str:
    """What is wrong with a type; nothing where all holds."""
    single, padded = read
    if isinstance(single, str):
        return f"a client cannot load it: {single}"
    ours = torch.tensor(facts["rewards"])
    facts["client"] = max(apart(torch.tensor(theirs), ours) for theirs in (single, padded))
    wrong = [name for name in ("padding", "noise", "client") if not facts[name] < TOLERANCE]
    return ", ".join(f"{name} {facts[name]:.0e}" for name in wrong) or ("" if facts["spread"] > 1e-2 else "no spread")


def main(kinds: list[str]) -> None:
    """Print a line a type, and counts."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        toy.main(toy.ToyArgs(folder=folder, train_pairs=40, test_pairs=10))
        tokenizer: PreTrainedTokenizerFast = load_tokenizer(f"{folder}/model")
        facts, refused, failed, began = {}, {}, {}, time.time()
        for kind in kinds:
            try:
                facts[kind] = train(kind, Path(folder) / kind, tokenizer)
            except UserError as error:
                refused[kind] = str(error).replace(f"{folder}/", "")
            except Exception as error:
                failed[kind] = f"{type(error).__name__}: {str(error)[:150]}".replace("\n", " ")
        read = read_by_clients([Path(folder) / kind / "saved" for kind in facts], tokenizer.pad_token_id)
        for kind, found in facts.items():
            wrong = judge(found, read[f"{folder}/{kind}/saved"])
            numbers = " ".join(
                f"{k}={v:.0e}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items() if k != "rewards"
            )
            print(f"{'WRONG' if wrong else 'holds'} {kind}: {wrong or numbers}")
            if wrong:
                failed[kind] = wrong
    for name, some in (("refused", refused), ("failed", failed)):
        for kind, why in some.items():
            print(f"{name} {kind}: {why}")
    held = [kind for kind in facts if kind not in failed]
    print(
        f"{len(kinds)} types: {len(held)} hold ({sum(kind in LACK for kind in held)} of those without a class), ",
        end="",
    )
    print(f"{len(refused)} refused, {len(failed)} failed, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or TYPES)
