"""The bash recipes resolve to the command that they promise."""

import json
import os
import shlex
import string
import subprocess
import sys

import pytest
import transformers
from conftest import REPOSITORY

from open_rm.arguments import Args, check_args
from open_rm.command_line import parse


def dry(script: str, *flags: str, **variables: str) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "DRY": "1", **variables}
    command = ["bash", str(REPOSITORY / "scripts/train" / script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    return shlex.split(done.stdout)


def recipe_args(command: list[str]) -> Args:
    args = parse(Args, command[command.index("open_rm.reward_modeling") + 1 :])
    check_args(args)
    return args


def test_debug_recipe_takes_model_data_and_flags_from_the_user(toy):
    command = dry(
        "debug/reward_modeling.sh", "--seed", "7", MODEL="my/model", DATASET=str(toy / "data"), EVAL_DATASET="x/y"
    )
    args = recipe_args(command)
    assert (args.model_name_or_path, args.seed) == ("my/model", 7)
    assert (args.dataset_mixer_list, args.dataset_mixer_eval_list) == ([str(toy / "data"), "1.0"], ["x/y", "1.0"])


@pytest.mark.parametrize(
    ("variables", "accumulation", "nodes"),
    [
        ({"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "gpu:8"}, 32, "1"),
        ({}, 4, "8"),
        ({"NNODES": "2"}, 16, "2"),
        ({"NNODES": "1", "GPUS_PER_NODE": "2", "PER_DEVICE": "4"}, 32, "1"),
        ({"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8", "MASTER_ADDR": "10.0.0.1"}, 8, "4"),
    ],
)
def test_tulu_recipe_makes_steps_of_256_pairs_on_any_number_of_devices(variables, accumulation, nodes):
    command = dry("tulu3/reward_modeling_8b.sh", **variables)
    args = recipe_args(command)
    devices = int(command[command.index("--nproc_per_node") + 1]) * int(nodes)
    assert args.gradient_accumulation_steps == accumulation
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * devices == 256
    assert command[command.index("--nnodes") + 1] == nodes
    assert command[command.index("--node_rank") + 1] == variables.get("SLURM_NODEID", "0")


def test_tulu_recipe_is_the_published_run():
    args = recipe_args(dry("tulu3/reward_modeling_8b.sh"))
    assert args.model_name_or_path == args.tokenizer_name == "allenai/Llama-3.1-Tulu-3-8B-SFT"
    assert args.dataset_mixer_list == ["allenai/llama-3.1-tulu-3-8b-preference-mixture", "1.0"]
    assert (args.max_token_length, args.max_prompt_token_length) == (4096, 2048)
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs, args.seed) == (3e-6, "linear", 1, 8)
    assert args.with_tracking and args.push_to_hub and args.gradient_checkpointing
    assert args.deepspeed == "configs/ds/zero3.json"


@pytest.mark.parametrize("name", ["NNODES", "GPUS_PER_NODE", "PER_DEVICE"])
def test_a_count_of_none_is_refused(name):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry("tulu3/reward_modeling_8b.sh", **{name: "0"})
    assert "counts of 1 or more" in caught.value.stderr


def test_devices_that_do_not_divide_256_are_refused():
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry("tulu3/reward_modeling_8b.sh", NNODES="3")
    assert "not a multiple" in caught.value.stderr


@pytest.mark.parametrize("script", sorted((REPOSITORY / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


SINGLE_MACHINE = {
    "internlm2/reward_modeling_1.8b.sh": 64,
    "llama3/reward_modeling_8b.sh": 128,
    "pythia/reward_modeling_1b_sentiment.sh": 32,
    "minilm/reward_modeling.sh": 16,
}


@pytest.mark.parametrize("script", SINGLE_MACHINE)
@pytest.mark.parametrize("gpus", ["1", "2", "8"])
def test_a_step_is_the_same_pairs_on_any_number_of_devices(script, gpus):
    per_device = {"PER_DEVICE": "2"} if "minilm" in script or "pythia" in script else {}
    command = dry(script, GPUS=gpus, **per_device)
    args = parse(Args, command[command.index("open_rm.reward_modeling") + 1 :])
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * int(gpus) == SINGLE_MACHINE[script]
    assert ("torch.distributed.run" in command) == (gpus != "1")


@pytest.mark.parametrize("qlora", ["0", "1"])
def test_the_recipes_after_xtuner_have_its_settings(qlora):
    internlm, llama = (
        recipe_args(dry(script, QLORA=qlora)) for script in SINGLE_MACHINE if "internlm" in script or "llama" in script
    )
    for args in (internlm, llama):
        assert (args.loss_type, args.penalty_type, args.score_init) == ("focal", "log_barrier", "zeros")
        assert (args.max_token_length, args.warmup_ratio, args.lr_scheduler_type) == (2048, 0.03, "cosine")
        assert args.learning_rate == (1e-4 if qlora == "1" else 2e-5)
        assert (args.use_peft, args.load_in_4bit) == (qlora == "1", qlora == "1")
        assert args.merge_adapter == (qlora == "1" and args is internlm)  # see families.check_together
        if qlora == "1":
            assert (args.lora_r, args.lora_alpha) == (64, 16)
    assert internlm.reward_token == "[UNUSED_TOKEN_130]" and not internlm.trust_remote_code
    assert llama.reward_token == "<|reserved_special_token_0|>" and not llama.trust_remote_code


def test_the_internlm2_recipe_says_how_its_model_is_made():
    script = str(REPOSITORY / "scripts/train/internlm2/reward_modeling_1.8b.sh")
    done = subprocess.run(
        ["bash", script], env={**os.environ, "MODEL": "no/folder"}, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: there is no folder no/folder; make it with convert2llama.py" in done.stderr


@pytest.mark.parametrize(
    ("variant", "name", "value"),
    [("plain", "margin_loss", False), ("center", "center_rewards_coefficient", 0.01), ("margin", "margin_loss", True)],
)
def test_the_sentiment_recipe_has_trls_variants(variant, name, value):
    args = recipe_args(dry("pythia/reward_modeling_1b_sentiment.sh", VARIANT=variant))
    assert getattr(args, name) == value


@pytest.mark.parametrize(
    ("variant", "name"), [("encoder", "BertForSequenceClassification"), ("decoder", "LlamaForSequenceClassification")]
)
def test_the_minilm_recipe_trains_the_encoder_or_a_decoder_of_its_sizes(variant, name, toy, tmp_path):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz.,?:",
        *map("##{}".format, string.ascii_lowercase),
    ]
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    sizes = dict(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    data = {"DATASET": str(toy / "data/train.jsonl"), "EVAL_DATASET": str(toy / "data/test.jsonl")}
    folders = {"MODEL": str(tmp_path / "bert"), "DECODER": str(tmp_path / "decoder"), "PYTHON": sys.executable}
    script = str(REPOSITORY / "scripts/train/minilm/reward_modeling.sh")
    flags = ["--output_dir", tmp_path / "out", "--total_episodes", "16", "--num_evals", "0"]
    done = subprocess.run(
        ["bash", script, *map(str, flags), "--dataset_local_cache_dir", str(tmp_path / "cache")],
        env={**os.environ, **data, **folders, "VARIANT": variant},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["architectures"] == [name]
    assert (saved["hidden_size"], saved["intermediate_size"]) == (16, 48 if variant == "encoder" else 32)


def test_every_recipe_is_listed():
    listed = (REPOSITORY / "scripts/train/README.md").read_text()
    for script in sorted((REPOSITORY / "scripts/train").rglob("*.sh")):
        assert f"`{script.relative_to(REPOSITORY / 'scripts/train')}`" in listed
