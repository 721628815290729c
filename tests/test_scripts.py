"""The bash recipes resolve to the command that they promise."""

import json
import os
import re
import shlex
import string
import subprocess
import sys

import pytest
import transformers
import yaml
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
    "debug/reward_modeling.sh": 16,
}


@pytest.mark.parametrize("script", SINGLE_MACHINE)
@pytest.mark.parametrize("gpus", ["1", "2", "8"])
def test_a_step_is_the_same_pairs_on_any_number_of_devices(script, gpus):
    command = dry(script, GPUS=gpus)
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


@pytest.mark.parametrize("script", [*SINGLE_MACHINE, "tulu3/reward_modeling_8b.sh"])
def test_a_dry_run_of_any_recipe_is_one_process_for_all_devices(script):
    command = dry(
        script, "--dry_run", NNODES="2", GPUS="4", SLURM_NODEID="7"
    )  # no MASTER_ADDR; who is who is no matter
    args = parse(Args, command[command.index("open_rm.reward_modeling") + 1 :])
    assert launcher(command) == ["python", "-m"] and args.dry_run and args.world_size == 8
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * 8
    assert step == SINGLE_MACHINE.get(script, 256)


def test_a_dry_run_for_another_number_of_devices_keeps_the_step():
    args = recipe_args(dry("tulu3/reward_modeling_8b.sh", "--dry_run", "--world_size", "16"))
    assert (args.world_size, args.per_device_train_batch_size * args.gradient_accumulation_steps) == (16, 16)


PYTORCHJOB = REPOSITORY / "scripts/train/kubernetes/pytorchjob.yaml"


def of_a_pod(node: int, nodes: int = 2, per_node: str = "8") -> dict[str, str]:
    """What Kubeflow's training operator puts into the environment of a pod of the job open-rm: setPodEnv in
    pkg/controller.v1/pytorch/envvar.go and master.go of kubeflow/training-operator, release 1.9, with DefaultNprocPerNode
    "auto" and PyTorchJobDefaultPort 23456 of pkg/apis/kubeflow.org/v1."""
    processes = int(per_node) if per_node.isdigit() else 1
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_PORT": "23456",
        "PET_MASTER_PORT": "23456",
        "MASTER_ADDR": "open-rm-master-0",
        "PET_MASTER_ADDR": "open-rm-master-0",
        "WORLD_SIZE": str(nodes * processes),
        "RANK": str(node),
        "PET_NODE_RANK": str(node),
        "PET_NPROC_PER_NODE": per_node,
        "PET_NNODES": str(nodes),
    }


@pytest.mark.parametrize("node", [0, 1])
def test_each_pod_of_the_pytorchjob_starts_its_own_ranks(node):
    replicas = yaml.safe_load(PYTORCHJOB.read_text())["spec"]["pytorchReplicaSpecs"]
    [container] = replicas["Worker" if node else "Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch" and container["command"][0] == "bash"
    own = {each["name"]: each["value"] for each in container["env"]}
    script = container["command"][1].removeprefix("scripts/train/")
    command = dry(script, *container["command"][2:], **own, **of_a_pod(node))
    assert launcher(command)[:12] == shlex.split(
        f"python -m torch.distributed.run --nnodes 2 --node_rank {node} --nproc_per_node 8 --rdzv_conf timeout=3600"
        " --master_addr"
    )
    assert (
        option(command, "--master_addr", "") == "open-rm-master-0" and option(command, "--master_port", "") == "23456"
    )
    assert option(command, "--log_dir", "").startswith(f"/output/tulu3.logs/node_{node}/")
    args = recipe_args(command)
    assert (args.gradient_accumulation_steps, args.output_dir) == (16, "/output/tulu3")


def test_a_pod_whose_job_names_no_count_of_processes_has_the_recipes():
    command = dry("pythia/reward_modeling_1b_sentiment.sh", **of_a_pod(1, per_node="auto"))
    assert (option(command, "--nproc_per_node", ""), option(command, "--node_rank", "")) == ("1", "1")
    command = dry("tulu3/reward_modeling_8b.sh", **of_a_pod(0, nodes=1, per_node="auto"))
    assert launcher(command) == shlex.split("python -m torch.distributed.run --standalone --nproc_per_node 8 -m")


def test_an_elastic_job_is_refused():
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry("pythia/reward_modeling_1b_sentiment.sh", PET_NNODES="1:4")
    assert caught.value.stderr.endswith("NNODES and GPUS are counts of 1 or more, not '1:4'\n")


def test_pods_of_the_pytorchjob_start_again_share_memory_and_take_tokens_from_a_secret():
    job = yaml.safe_load(PYTORCHJOB.read_text())
    for name, replica in job["spec"]["pytorchReplicaSpecs"].items():
        pod = replica["template"]["spec"]
        [container] = pod["containers"]
        assert (replica["replicas"], replica["restartPolicy"]) == (1, "OnFailure"), name
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["open-rm-tokens"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        labels, annotations = (replica["template"]["metadata"][part] for part in ("labels", "annotations"))
        assert labels["sidecar.istio.io/inject"] == annotations["sidecar.istio.io/inject"] == "false"
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory" and "persistentVolumeClaim" in mounted["/output"]


def test_pairs_for_a_forward_are_at_most_a_devices_share_of_the_step():
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "DRY": "1", "GPUS": "4"}
    command = ["bash", str(REPOSITORY / "scripts/train/debug/reward_modeling.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.stderr == "PER_DEVICE=4 in place of 16: each of 4 devices has 4 of the 16 pairs of a step\n"
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 1" in done.stdout


def test_the_debug_recipe_on_one_device_makes_steps_of_16_pairs_by_one_python():
    command = dry("debug/reward_modeling.sh")
    args = recipe_args(command)
    assert launcher(command) == ["python", "-m"]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.seed) == (16, 1, 1)


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


def commands_of_the_docs() -> list:
    """Those of recipes, each with its place: what stands in a container included, and what Slurm is given, by bash."""
    found = []
    for page in [
        REPOSITORY / "README.md",
        *sorted(REPOSITORY.glob("docs/*.md")),
        REPOSITORY / "scripts/train/README.md",
    ]:
        in_code = False
        for line in page.read_text().replace("\\\n", " ").splitlines():
            if line.startswith("```"):
                in_code = not in_code
            elif (in_code or line.startswith("    ")) and re.search(r"scripts/train/\S+\.sh\b", line):
                command = re.sub(r"sbatch .*?(?=scripts/train/slurm)", "bash ", line.partition("#")[0]).strip()
                if " open_rm " in command:  # the image
                    command = command.partition(" open_rm ")[2].strip()
                found.append(pytest.param(command, id=f"{page.relative_to(REPOSITORY)}:{len(found)}"))
    return found


@pytest.mark.parametrize("command", commands_of_the_docs())
def test_every_command_of_the_docs_is_one(command):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "DRY": "1", "NNODES": "2"}
    done = subprocess.run(
        command, shell=True, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    words = shlex.split(done.stdout, comments=True)
    args = parse(Args, words[words.index("open_rm.reward_modeling") + 1 :])
    if "DATASET=" not in command:  # the reader's own file
        check_args(args)


def test_the_docs_have_a_command_for_each_way():
    pages = [command.id.partition(":")[0] for command in commands_of_the_docs()]
    assert pages.count("docs/cluster.md") == 9
    assert {"README.md", "docs/dry_run.md", "docs/long_sequences.md"} < set(pages)


def test_every_script_that_a_page_names_is_there():
    for page in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), REPOSITORY / "scripts/train/README.md"]:
        for name in re.findall(r"\bscripts/[\w./-]+\.(?:sh|sbatch|yaml)\b", page.read_text()):
            assert (REPOSITORY / name).is_file(), f"{page.name}: {name}"


def test_an_image_is_not_built_for_root():
    """The number of whoever builds it may be 0, and a run of the image's must not be root's."""
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    first = next(line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN "))
    for number, status in (("0", 1), ("1000", 0)):
        done = subprocess.run(["sh", "-c", first], env={"USER_ID": number}, capture_output=True, text=True, timeout=30)
        assert done.returncode == status and done.stderr.startswith("error: USER_ID=0 is root") == bool(status)
