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

from open_rm.checks import check_args
from open_rm.command_line import parse
from open_rm.flags import Args


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


def option(command: list[str], name: str, default: str) -> str:
    return command[command.index(name) + 1] if name in command else default


def launcher(command: list[str]) -> list[str]:
    """The part of the command before the program and its flags."""
    return command[: command.index("open_rm.reward_modeling")]


@pytest.mark.parametrize(
    ("variables", "accumulation", "nodes", "gpus"),
    [
        ({"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "gpu:8"}, 32, "1", "8"),
        ({}, 4, "8", "8"),
        ({"NNODES": "2"}, 16, "2", "8"),
        ({"NNODES": "1", "GPUS_PER_NODE": "2", "PER_DEVICE": "4"}, 32, "1", "2"),
        ({"NNODES": "2", "GPUS": "4"}, 32, "2", "4"),
        ({"NNODES": "1", "SLURM_GPUS_ON_NODE": "8", "GPUS_PER_NODE": "1"}, 256, "1", "1"),
        ({"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8", "MASTER_ADDR": "10.0.0.1"}, 8, "4", "8"),
    ],
)
def test_tulu_recipe_makes_steps_of_256_pairs_on_any_number_of_devices(variables, accumulation, nodes, gpus):
    command = dry("tulu3/reward_modeling_8b.sh", **variables)
    args = recipe_args(command)
    assert args.gradient_accumulation_steps == accumulation
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * int(nodes) * int(gpus) == 256
    assert option(command, "--nnodes", "1") == nodes
    assert option(command, "--nproc_per_node", "1") == gpus
    assert option(command, "--node_rank", "0") == variables.get("SLURM_NODEID", "0")
    assert ("--standalone" in command) == (nodes == "1" and gpus != "1")


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


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"NNODES": "2", "NODE_RANK": "2"}, "2"),
        ({"NNODES": "2", "NODE_RANK": "-1"}, "-1"),
        ({"NNODES": "2", "NODE_RANK": "first"}, "first"),
        ({"NNODES": "1", "SLURM_NNODES": "4", "SLURM_NODEID": "3"}, "3"),  # every node would run the same alone
    ],
)
def test_a_node_that_is_none_of_the_nodes_is_refused(variables, rank):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry("tulu3/reward_modeling_8b.sh", **variables)
    last = int(variables["NNODES"]) - 1
    assert caught.value.stderr == f"error: NODE_RANK is a number from 0 to NNODES-1 = {last}, not '{rank}'\n"


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_NODELIST": "gpu[07-08]"}], ids=["no Slurm", "no scontrol"])
@pytest.mark.parametrize("script", ["tulu3/reward_modeling_8b.sh", "pythia/reward_modeling_1b_sentiment.sh"])
def test_several_nodes_without_an_address_are_refused(script, variables, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry(script, DRY="0", NNODES="2", PER_DEVICE="1", PATH=path, **variables)
    assert (caught.value.returncode, caught.value.stdout) == (1, "")
    sentence = "error: MASTER_ADDR is not set; export the address of the first of the 2 nodes on every node\n"
    assert caught.value.stderr == sentence


@pytest.mark.parametrize("script", ["tulu3/reward_modeling_8b.sh", "pythia/reward_modeling_1b_sentiment.sh"])
def test_slurms_variables_say_who_is_who(script, tmp_path):
    # more names than a pipe holds: taking the first must not break the others' way out
    answer = '[[ "$*" == "show hostnames gpu[00007-19999]" ]] && seq -f gpu%05g 7 19999'
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{answer}\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_JOB_NODELIST": "gpu[00007-19999]"}
    command = dry(script, PATH=f"{tmp_path}:{os.environ['PATH']}", PER_DEVICE="1", **slurm)
    expected = {"--nnodes": "4", "--node_rank": "3", "--master_addr": "gpu00007", "--master_port": "29500"}
    assert {name: option(command, name, "") for name in expected} == expected


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


@pytest.mark.parametrize("script", SINGLE_MACHINE)
@pytest.mark.parametrize("name", ["GPUS", "GPUS_PER_NODE"])
def test_a_step_is_the_same_pairs_on_two_nodes(script, name):
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    command = dry(script, "--seed", "7", PER_DEVICE="2", **{name: "4"}, **where)
    args = parse(Args, command[command.index("open_rm.reward_modeling") + 1 :])
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 2 * 4 == SINGLE_MACHINE[script]
    assert args.seed == 7
    assert launcher(command) == shlex.split(
        "python -m torch.distributed.run --nnodes 2 --node_rank 1 --nproc_per_node 4"
        " --rdzv_conf timeout=3600 --master_addr 10.0.0.1 --master_port 29501 -m"
    )


def test_a_recipe_for_one_device_stays_on_one_in_an_allocation_of_several():
    slurm = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "gpu07"}
    command = dry("pythia/reward_modeling_1b_sentiment.sh", **slurm)
    assert launcher(command) == ["python", "-m"]
    assert recipe_args(command).gradient_accumulation_steps == 1


def test_the_users_flags_override_those_of_the_launch():
    command = dry("pythia/reward_modeling_1b_sentiment.sh", "--per_device_train_batch_size", "3")
    assert recipe_args(command).per_device_train_batch_size == 3


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
    alone = {"NNODES": "1", "NODE_RANK": "0", "GPUS": "1"}  # also where the tests run in an allocation
    script = str(REPOSITORY / "scripts/train/minilm/reward_modeling.sh")
    flags = ["--output_dir", tmp_path / "out", "--total_episodes", "16", "--num_evals", "0"]
    done = subprocess.run(
        ["bash", script, *map(str, flags), "--dataset_local_cache_dir", str(tmp_path / "cache")],
        env={**os.environ, **data, **folders, **alone, "VARIANT": variant},
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


def test_the_container_has_what_nccl_and_triton_open_at_run_time():
    lines = (REPOSITORY / "Dockerfile").read_text().split("apt-get install --yes --no-install-recommends")[1]
    packages = lines.partition("&&")[0].replace("\\", " ").split()
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(packages)  # NCCL over InfiniBand
    assert {"gcc", "python3-dev"} <= set(packages)  # Triton
