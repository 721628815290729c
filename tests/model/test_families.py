"""Every family gives, from the saved folder in plain transformers, the rewards that the trainer saw; others are refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import REPOSITORY, load_model, run_recipe, toy_flags
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from open_rm.batching.layouts import lay_out
from open_rm.data.tokenizer import ending, load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, ModelFlags
from open_rm.model import families
from open_rm.model.contract import Contract
from open_rm.model.kernels import apply_fused_kernels
from open_rm.model.loading import load_reward_model
from open_rm.model.recompute import recompute
from open_rm.model.reward_model import model_shape
from open_rm.publishing.proof import client_rewards
from open_rm.publishing.saving import save_reward_model

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=640)
GQA = SMALL | {"num_key_value_heads": 1}
FAMILIES = {
    "llama": ("LlamaConfig", GQA),
    "mistral": ("MistralConfig", GQA | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", GQA | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GQA | {"head_dim": 16, "sliding_window": 8}),
    "gemma3_text": ("Gemma3TextConfig", GQA | {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", GQA | {"pad_token_id": 0}),
    "olmo2": ("Olmo2Config", GQA | {"pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 640, "attn_pdrop": 0.5}),
    "bert": ("BertConfig", SMALL),
    "deberta-v2": (
        "DebertaV2Config",  # as deberta-v3-base has them
        SMALL
        | {"relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        | {"pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, "position_biased_input": False},
    ),
    "modernbert": (
        "ModernBertConfig",
        SMALL
        | {"global_attn_every_n_layers": 2, "local_attention": 8, "classifier_pooling": "cls"}
        | dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)
        | dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    ),
}
FAMILIES["modernbert, mean"] = ("ModernBertConfig", FAMILIES["modernbert"][1] | {"classifier_pooling": "mean"})
ENCODERS = [name for name in FAMILIES if "bert" in name]
PAIRS = [(list(range(5, 35)), [5, 6, 11]), ([20, 21], [20, 22, 23, 24])]


def checkpoint(name: str, folder) -> None:
    """A backbone without a head, as pretraining leaves it."""
    kind, sizes = FAMILIES[name]
    config = getattr(transformers, kind)(**sizes)
    torch.manual_seed(1)
    transformers.AutoModel.from_config(config).save_pretrained(folder)


def load(folder, tokenizer, *, seed=1, **flags):
    """The model and the lines for the log."""
    return load_reward_model(ModelFlags(model_name_or_path=str(folder), **flags), tokenizer, seed=seed)


def rewards(reward_model, tokenizer) -> torch.Tensor:
    """[4]: chosen of both pairs, then rejected."""
    batch = lay_out("padded", PAIRS, pad_token_id=tokenizer.pad_token_id, prompt_ids=range(len(PAIRS)))
    return reward_model(**batch.inputs(torch.device("cpu")))


def rewards_of_clients(reward_model, tokenizer, folder):
    """What plain transformers computes for the four sequences once the model is saved."""
    contract = Contract(chat=False, ending=ending(tokenizer))
    save_reward_model(reward_model, reward_model.state_dict(), tokenizer, str(folder), contract)
    return client_rewards(str(folder), [ids for side in zip(*PAIRS, strict=True) for ids in side])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rewards_equal_plain_transformers_on_the_saved_folder(name, checkpointing, tokenizer, tmp_path):
    checkpoint(name, tmp_path / "base")
    reward_model, notes = load(tmp_path / "base", tokenizer)
    recompute(reward_model.classifier, int(checkpointing))
    apply_fused_kernels(reward_model, torch.device("cpu"))
    assert any(note.startswith("score head initialised N(0") for note in notes)
    optimizer = torch.optim.SGD(reward_model.parameters(), lr=0.1)
    chosen, rejected = rewards(reward_model, tokenizer).chunk(2)
    (rejected - chosen).sum().backward()
    assert reward_model.head.weight.grad.abs().sum() > 0
    optimizer.step()
    ours = rewards(reward_model, tokenizer).tolist()
    reloaded = rewards_of_clients(reward_model, tokenizer, tmp_path / "saved")
    # float32 in another order; rewards are up to 2
    assert reloaded.one_by_one == pytest.approx(ours, abs=1e-5)
    assert reloaded.padded == pytest.approx(ours, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert plain.config.num_labels == 1 and plain.config.problem_type == "regression"

    again, notes = load(tmp_path / "saved", tokenizer, seed=5)
    assert "the checkpoint already is a reward model: its score head is kept" in notes
    assert rewards(again, tokenizer).tolist() == pytest.approx(ours, abs=1e-6)


LIGER = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")
PATCH_ALL = """
import torch
from test_families import FAMILIES, apply_fused_kernels, checkpoint, load_model, load_tokenizer
from open_rm.model import kernels
kernels._why_triton_fails = lambda device: None
tokenizer = load_tokenizer("{tokenizer}")
FAMILIES["nemotron"] = "NemotronConfig", FAMILIES["llama"][1]  # Liger wants the whole classifier of it
for name in FAMILIES:
    checkpoint(name, "{folder}/" + name)
    reward_model = load_model("{folder}/" + name, tokenizer)
    print("FAMILY", name + ":", apply_fused_kernels(reward_model, torch.device("cuda")))
"""


def test_liger_takes_every_family_it_knows_and_names_those_it_does_not(toy, tmp_path):
    """Patching needs no GPU, only running does; in a process of its own, since transformers' modules are changed."""
    script = PATCH_ALL.format(tokenizer=toy / "model", folder=tmp_path)
    path = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests/model"]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.removeprefix("FAMILY ").split(": ", 1) for line in done.stdout.splitlines() if "FAMILY" in line)
    assert said.keys() == FAMILIES.keys() | {"nemotron"}
    assert {name for name, line in said.items() if line.startswith("Liger kernels on")} == {*LIGER, "nemotron"}
    assert said["bert"] == "Liger kernels off: liger-kernel has none for bert"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_head_of_zeros_gives_zero_and_a_frozen_backbone_only_trains_the_head(name, tokenizer, tmp_path):
    checkpoint(name, tmp_path)
    reward_model, notes = load(tmp_path, tokenizer, score_init="zeros", freeze_backbone=True)
    result = rewards(reward_model, tokenizer)
    assert result.tolist() == [0.0] * 4
    result.chunk(2)[0].sum().backward()
    trained = {name for name, parameter in reward_model.named_parameters() if parameter.grad is not None}
    head = "classifier.classifier" if name == "bert" else "classifier.score"
    assert trained == {f"{head}.weight"} | ({f"{head}.bias"} if name == "bert" else set())
    assert model_shape(reward_model).passes == 1
    count = 33 if name == "bert" else 32
    assert any(f"backbone frozen: {count} weights" in note for note in notes)


def test_a_new_pooling_is_trained_beside_a_frozen_backbone(tokenizer, tmp_path):
    checkpoint("deberta-v2", tmp_path)
    reward_model, notes = load(tmp_path, tokenizer, freeze_backbone=True)
    rewards(reward_model, tokenizer).sum().backward()
    trained = {name for name, parameter in reward_model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in trained} == {"pooler", "classifier"}
    assert any("weights of the score head and the new pooling are trained" in note for note in notes)


def test_a_reward_token_on_an_encoder_is_refused(tokenizer, tmp_path, toy):
    checkpoint("bert", tmp_path)
    with_token = load_tokenizer(str(toy / "model"), reward_token="<|reward|>")
    with pytest.raises(UserError, match="--reward_token: .* is an encoder"):
        check_together(tmp_path, with_token)


def test_gpt2_in_four_bits_is_refused(tokenizer, tmp_path):
    checkpoint("gpt2", tmp_path)
    with pytest.raises(UserError, match="gpt2 stores its layers transposed"):
        check_together(tmp_path, tokenizer, use_peft=True, load_in_4bit=True)


def test_an_adapter_on_an_encoder_is_refused(tokenizer, tmp_path):
    checkpoint("bert", tmp_path)
    with pytest.raises(UserError, match="--use_peft is for decoders, and .* is an encoder"):
        check_together(tmp_path, tokenizer, use_peft=True)


def test_an_adapter_whose_clients_would_take_another_token_for_the_pad_is_refused(toy, tmp_path, run_forked):
    """As of fine-tuned models whose config pads with their eos."""
    base = tmp_path / "base"
    shutil.copytree(toy / "model", base)
    for file, changes in (
        ("config.json", {"pad_token_id": 1}),
        ("tokenizer_config.json", {"pad_token": "<|eos|>"}),
    ):
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | changes))
    with_own_pad = load_tokenizer(str(base))
    with pytest.raises(UserError, match="pads with '<.eos.>', which is not the pad here, '<.pad.>'.* --merge_adapter"):
        check_together(base, with_own_pad, use_peft=True)
    check_together(base, with_own_pad, use_peft=True, merge_adapter=True)
    check_together(toy / "model", with_own_pad, use_peft=True)
    config = read_config(base)
    config.pad_token_id = -1  # as some write it: no token
    for padless in (config, transformers.PreTrainedConfig()):
        families.check_together("base", padless, with_own_pad, AdapterFlags(use_peft=True))
    done = run_forked(*toy_flags(toy, tmp_path / "out", model_name_or_path=base, use_peft=True))
    assert done.returncode == 1
    assert "add --merge_adapter" in done.stderr


def read_config(folder):
    return families.read_config(ModelFlags(model_name_or_path=str(folder)), max_token_length=20)


def check_together(folder, tokenizer, **flags) -> None:
    families.check_together(str(folder), read_config(folder), tokenizer, AdapterFlags(**flags))


def test_a_models_configs_are_its_own_and_that_of_a_text_part_where_it_has_one():
    """A model that also sees keeps what matters for text, such as its pad, in a config of its text part."""
    llama = transformers.LlamaConfig(**GQA)
    assert llama.get_text_config() is llama
    [only] = families.configs_of(llama)
    assert only is llama
    both = transformers.Gemma3Config(text_config=transformers.Gemma3TextConfig(**GQA))
    outer, text = families.configs_of(both)
    assert outer is both and text is both.text_config


def test_the_code_of_an_untrusted_model_is_not_named_in_what_is_saved(toy, tokenizer, tmp_path):
    folder = tmp_path / "with_map"
    shutil.copytree(toy / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "a.XForCausalLM"}}))
    reward_model = load_model(folder, tokenizer)
    reward_model.classifier.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("name", [*ENCODERS, "gpt2"])
def test_packed_rows_are_refused_by_name_where_they_are_not_known_to_be_exact(name, tokenizer, tmp_path):
    checkpoint(name, tmp_path)
    config = read_config(tmp_path)
    how = {"attn_implementation": None, "max_token_length": 20, "on_gpu": False}
    layout = families.choose_layout("auto", config, **how)
    reason = f"packed rows are not known to be exact for {config.model_type}"
    assert layout == families.Layout("padded", why_not_shared=reason)
    assert families.choose_layout("padded", config, **how) == families.Layout("padded", why_not_shared=None)
    with pytest.raises(UserError, match="--batching packed is not possible: packed rows are not known to be exact"):
        families.choose_layout("packed", config, **how)


def test_a_family_with_another_head_is_refused_by_name(tokenizer, tmp_path):
    config = transformers.RobertaConfig(**SMALL)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="RobertaForSequenceClassification has no score head that is known here"):
        load(tmp_path, tokenizer)


def encoder_tokenizer(folder, own_class: bool) -> None:
    """[CLS] words [SEP], as BERT's, with no bos or eos; in BERT's own class, which adds both whatever its file says."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(20))]
    if own_class:
        transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
        return
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_encoder_trains_is_saved_and_pools_at_cls(chat, stage, toy, write_rows, tmp_path, run_forked):
    checkpoint("bert", tmp_path / "model")
    encoder_tokenizer(tmp_path / "model", own_class=stage == "zero2")
    rows = []
    for i in range(24):
        prompt, good, bad = f"word{i % 7} ", f"word{i % 5} word1", f"word{i % 5} word2"
        if chat:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt.strip()}],
                    "chosen": [{"role": "assistant", "content": good}],
                    "rejected": [{"role": "assistant", "content": bad}],
                }
            )
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    source = [write_rows(rows), "1.0"]
    flags = toy_flags(
        toy,
        tmp_path / "out",
        model_name_or_path=tmp_path / "model",
        dataset_mixer_list=source,
        dataset_mixer_eval_list=source,
        total_episodes=48,
        deepspeed=f"configs/ds/{stage}.json",
        chat_template_name="encoder" if chat else None,
        num_sample_pairs=1,
    )
    done = run_forked(*flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout
    assert "padded, not shared_prefix: packed rows are not known to be exact for bert" in done.stdout
    first = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    sample = json.dumps(first)
    assert sample.count("[CLS]") >= 1 and "[SEP]" in sample


CUSTOM_CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
CUSTOM_MODEL = """
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel

from .configuration_own import OwnConfig

print("CODE OF THE MODEL RUNS")


class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
"""


CUSTOM_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

print("CODE OF THE TOKENIZER RUNS")


class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def custom(toy, tmp_path):
    """The toy as a model with code of its own for model and tokenizer, as InternLM2 comes."""
    folder = tmp_path / "custom"
    shutil.copytree(toy / "model", folder)
    (folder / "configuration_own.py").write_text(CUSTOM_CONFIG)
    (folder / "modeling_own.py").write_text(CUSTOM_MODEL)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",  # as InternLM2, whose classifier is not named
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenization_own.py").write_text(CUSTOM_TOKENIZER)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "OwnTokenizerFast"
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_custom_code_never_runs_unless_it_is_trusted(custom, toy, tmp_path, run_forked):
    done = run_forked(*toy_flags(toy, tmp_path / "out", model_name_or_path=custom))
    assert done.returncode == 1
    assert "needs Python code that it brings along; read that code, then pass --trust_remote_code" in done.stderr
    assert "CODE OF THE" not in done.stdout + done.stderr


@pytest.mark.parametrize("adapted", [False, True], ids=["in full", "merged adapter"])
def test_a_model_with_trusted_code_trains_and_its_folder_brings_the_code(custom, toy, tmp_path, adapted):
    changes = {"total_episodes": 16, "use_peft": adapted, "merge_adapter": adapted}
    flags = toy_flags(toy, tmp_path / "out", model_name_or_path=custom, trust_remote_code=True, **changes)
    done = run_recipe(*flags, env={"HF_HOME": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CODE OF THE MODEL RUNS" in done.stdout and "CODE OF THE TOKENIZER RUNS" in done.stdout
    assert "padded, not shared_prefix: packed rows are not known to be exact for own" in done.stdout
    assert "reload check" in done.stdout
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    assert "'trust_remote_code': True" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_code_whose_buffers_get_no_values_is_refused(custom, toy, tmp_path, stage):
    """As InternLM2's rotary embeddings under transformers 5: whatever is in memory would take their place."""
    code = (custom / "modeling_own.py").read_text()
    buffer = "        self.register_buffer('scale', torch.arange(3.0) + 5, persistent=False)\n        self.post_init()"
    (custom / "modeling_own.py").write_text("import torch\n" + code.replace("        self.post_init()", buffer))
    changes = {"trust_remote_code": True, "deepspeed": f"configs/ds/{stage}.json"}
    flags = toy_flags(toy, tmp_path / "out", model_name_or_path=custom, **changes)
    done = run_recipe(*flags, env={"HF_HOME": str(tmp_path / "hub")})
    assert done.returncode == 1
    assert "under transformers 5 its scale gets no values, here and with every client" in done.stderr


def test_a_routers_auxiliary_loss_is_refused_by_name(tmp_path):
    transformers.MixtralConfig(**GQA, output_router_logits=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="asks for the router's auxiliary loss .output_router_logits."):
        read_config(tmp_path)


def test_a_mixture_of_experts_without_it_trains_padded(tokenizer, tmp_path):
    config = transformers.MixtralConfig(**GQA, num_local_experts=2, num_experts_per_tok=1)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    reward_model = load_model(tmp_path / "base", tokenizer)
    ours = rewards(reward_model, tokenizer)
    ours.sum().backward()
    reloaded = rewards_of_clients(reward_model, tokenizer, tmp_path / "saved")
    assert reloaded.one_by_one == pytest.approx(ours.tolist(), abs=1e-5)


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_adapter_on_a_mixture_of_experts_is_reloaded(merged, toy, tmp_path, run_forked):
    """Its experts are no linear layers but one tensor: they stay frozen, attention and the head are trained."""
    base = tmp_path / "base"
    shutil.copytree(toy / "model", base)
    transformers.set_seed(1)
    sizes = GQA | {"vocab_size": 1024, "num_local_experts": 2, "num_experts_per_tok": 1}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(base)
    changes = {"model_name_or_path": base, "use_peft": True, "merge_adapter": merged, "total_episodes": 16}
    done = run_forked(*toy_flags(toy, tmp_path / "out", **changes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout
    weights = load_file(tmp_path / "out" / ("model.safetensors" if merged else "adapter_model.safetensors"))
    adapted = {name.split(".")[-3] for name in weights if "lora" in name}
    assert adapted == (set() if merged else {"q_proj", "k_proj", "v_proj", "o_proj"})


def test_a_tokenizer_written_in_python_is_saved(toy, tmp_path, run_forked):
    """It has no tokenizer.json; bytes, and an end token that its encoder adds."""
    base = tmp_path / "base"
    shutil.copytree(toy / "model", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}"
    (base / "chat_template.jinja").write_text(template)
    transformers.ByT5Tokenizer(chat_template=template).save_pretrained(base)
    done = run_forked(*toy_flags(toy, tmp_path / "out", model_name_or_path=base, total_episodes=16))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout


def test_an_adapter_as_a_starting_point_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter; start from a model saved with --merge_adapter"):
        read_config(tmp_path)
