"""Two hosts on one machine: each a network, a host's name and disks of its own (Linux namespaces).

Ranks are forked from one process and enter their host before they begin (test_slurm.py starts two nodes as users do). The Hub
is a stand-in.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import toy_flags
from forking import Nursery
from hub_standin import HubStandin
from killing import checkpoint_names, same_run
from test_many_ranks import same_within

STALLED = 76
HOSTS = ("host-a", "host-b")
SLOWER = "\nimport open_rm.training.engine as e, time; step = e.Engine.step; e.Engine.step = lambda *a, **k: (time.sleep(0.05), step(*a, **k))[1]"
# Into a host: its network where it has one, its name, and for each path the folder that its own disk has there.
ENTER = """
import ctypes, json, os, platform, subprocess
host = json.loads({host!r})
libc = ctypes.CDLL(None, use_errno=True)
def done(status):
    assert status == 0, os.strerror(ctypes.get_errno())
if host["network"]:
    done(libc.setns(os.open("/run/netns/" + host["network"], os.O_RDONLY), 0x40000000))
done(libc.unshare(0x00020000 | 0x04000000))  # mounts, and the name
done(libc.sethostname(host["name"].encode(), len(host["name"])))
platform._uname_cache = None
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
for path, own in host["disks"].items():
    subprocess.run(["mount", "--bind", own, path], check=True)
for path in host["read_only"]:
    subprocess.run(["mount", "--bind", "-o", "ro", path, path], check=True)
"""
# Notes what the clients ask, by rank.
ASKED = """
import huggingface_hub.utils._http as http, os
hook = http.hf_request_event_hook
def noted(request):
    with open({folder!r} + "/asked " + os.environ["RANK"], "a") as file:
        file.write(f"{{request.method}} {{request.url.path}}\\n")
    return hook(request)
http.hf_request_event_hook = noted
"""
OFFLINE = "\nimport datasets, huggingface_hub as h; h.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="mount namespaces need root and the command mount"
)

UPLOAD = """
import sys
from huggingface_hub import HfApi
api, folder = HfApi(), sys.argv[1]
for name in ("standin/toy", "standin/moves"):
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=f"{folder}/model")
api.create_repo("standin/prefs", repo_type="dataset")
api.upload_folder(repo_id="standin/prefs", folder_path=f"{folder}/data", repo_type="dataset")
"""


@pytest.fixture(scope="module")
def hub(toy):
    with HubStandin() as hub:
        subprocess.run([sys.executable, "-c", UPLOAD, str(toy)], env=hub.env(), check=True, capture_output=True)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """HF_HOME of all runs here: what a test puts there by a mount is a cache of its own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def nursery(hub, home):
    """As conftest's, with the stand-in in its environment, which clients read when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
            patch.delenv(name)
        for name, value in (hub.env() | {"HF_HOME": str(home)}).items():
            patch.setenv(name, value)
        with Nursery() as nursery:
            yield nursery


@pytest.fixture
def disks(tmp_path):
    """What makes a folder of each host for a path: {path: its own folder}, for two hosts."""

    def make(*paths: Path) -> list[dict[str, str]]:
        owned = [{str(path): str(tmp_path / f"disk of {host}" / path.name) for path in paths} for host in HOSTS]
        for own in owned:
            for path, folder in own.items():
                Path(path).mkdir(parents=True, exist_ok=True)
                Path(folder).mkdir(parents=True, exist_ok=True)
        return owned

    return make


@pytest.fixture
def start(nursery, tmp_path):
    """Starts a rank on each host; of: or ranks on the hosts of these numbers."""

    def call(
        flags, *, of=(0, 1), disks=({}, {}), read_only=((), ()), networks=(None, None), address="127.0.0.1", patch=""
    ):
        own = {}
        for rank, number in enumerate(of):
            host = {"name": HOSTS[number], "disks": disks[number], "read_only": read_only[number]}
            entered = ENTER.format(host=json.dumps(host | {"network": networks[number]}))
            own[rank] = {"TEST_PATCH": entered + patch, "LOCAL_RANK": str(of[:rank].count(number))}
        log = tmp_path / f"log {len(list(tmp_path.glob('log *')))}"
        return nursery.start(flags, log, processes=len(of), env={"MASTER_ADDR": address}, own=own)

    return call


def told(started) -> str:
    """The one sentence that a run ended with, which no rank was left waiting in."""
    assert started.statuses(timeout=120) == [1, 1], started.output
    assert "Traceback" not in started.output, started.output
    [sentence] = [line for line in started.output.splitlines() if line.startswith("error: ")]
    return sentence


def ten_steps(toy, folder, cache, **flags) -> list[str]:
    own = {"per_device_train_batch_size": 8, "total_episodes": 160, "dataset_local_cache_dir": cache}
    return toy_flags(toy, folder, **own | flags)


@pytest.fixture(scope="module")
def on_one(nursery, toy, tmp_path_factory):
    """Ten steps of 16 pairs in one process."""
    folder = tmp_path_factory.mktemp("one")
    flags = ten_steps(toy, folder / "run", folder / "cache", per_device_train_batch_size=16)
    nursery.start(flags, folder / "log").finish()
    return folder / "run"


# ---------------------------------------------------------------- training together


def test_two_hosts_with_disks_of_their_own_train_as_one_process_does(
    toy, tmp_path, two_hosts, start, disks, on_one, home
):
    """Output, tokenized data, model, data and the Hub's cache: nothing is shared. Checkpoints are off, and that is said."""
    names, addresses, _ = two_hosts
    output, cache, data = tmp_path / "output", tmp_path / "cache", tmp_path / "toy"
    owned = disks(output, cache, data, home)
    for own in owned:
        shutil.copytree(toy, own[str(data)], dirs_exist_ok=True)
    flags = ten_steps(data, output / "run", cache)
    said = start(flags, disks=owned, networks=names, address=addresses[0]).finish()
    assert (
        f"checkpoints: off, since --output_dir {output}/run is not seen by rank 1; a run that is killed begins anew"
        in said
    )
    folders = [Path(own[str(output)]) / "run" for own in owned]
    assert (folders[0] / "model.safetensors").is_file() and not list(folders[1].glob("*"))
    assert not list(output.iterdir()) and not list(cache.iterdir())
    same_within(on_one, folders[0])


def test_checkpoints_that_are_asked_for_are_refused_where_the_other_host_does_not_see_the_folder(
    toy, tmp_path, start, disks
):
    owned = disks(tmp_path / "output")
    flags = ten_steps(toy, tmp_path / "output/run", tmp_path / "cache", checkpointing_steps=2)
    assert told(start(flags, disks=owned)) == (
        f"error: --output_dir {tmp_path}/output/run is not seen by rank 1, and checkpoints need a folder that all nodes share; "
        "choose one"
    )


def test_a_link_that_goes_down_ends_both_hosts_and_the_same_command_goes_on_from_the_shared_folder(
    toy, tmp_path, two_hosts, start, on_one
):
    names, addresses, cut = two_hosts
    folder, how = tmp_path / "run", {"networks": names, "address": addresses[0]}
    flags = {"checkpointing_steps": 3, "stall_timeout": 0.2, "deepspeed": "configs/ds/zero2.json"}
    started = start(ten_steps(toy, folder, tmp_path / "cache", **flags), patch=SLOWER, **how)
    started.wait_for(lambda: checkpoint_names(folder), "a checkpoint")
    cut()
    asked = time.monotonic()
    assert started.statuses(timeout=60) == [STALLED, STALLED], started.output
    assert time.monotonic() - asked < 30
    assert "rank 1 on host-b" in started.output and f"rank 0 on {addresses[0]}" in started.output
    subprocess.run(["ip", "-n", names[1], "link", "set", names[1], "up"], check=True)
    assert "bit for bit" in start(ten_steps(toy, folder, tmp_path / "cache", **flags), **how).finish()
    same_within(on_one, folder)


# ---------------------------------------------------------------- what one host lacks


def test_data_that_the_main_host_alone_has_is_told_with_the_rank_and_the_host(toy, tmp_path, start, disks):
    owned = disks(tmp_path / "data")
    shutil.copy(toy / "data/train.jsonl", owned[0][str(tmp_path / "data")])
    file = tmp_path / "data/train.jsonl"
    flags = ten_steps(toy, tmp_path / "run", tmp_path / "cache", dataset_mixer_list=[file, "1.0"])
    missing = f"error: rank 1 on host-b: --dataset_mixer_list: there is no file or folder {file}"
    assert told(start(flags, disks=owned)) == missing


def test_data_that_differ_between_hosts_are_told_and_not_trained_on(toy, tmp_path, start, disks):
    owned = disks(tmp_path / "data", tmp_path / "cache")
    for rank, own in enumerate(owned):
        rows = (toy / "data/train.jsonl").read_text().splitlines(keepends=True)
        (Path(own[str(tmp_path / "data")]) / "train.jsonl").write_text("".join(rows[rank:]))
    flags = ten_steps(
        toy, tmp_path / "run", tmp_path / "cache", dataset_mixer_list=[tmp_path / "data/train.jsonl", "1.0"]
    )
    sentence = told(start(flags, disks=owned))
    assert sentence.startswith("error: rank 1 on host-b is not like the others: the training data is ")
    assert sentence.endswith(" on rank 0 on host-a; give every node the same files, or a folder that all see")


def test_a_model_whose_weights_the_main_host_alone_has_is_told_before_ranks_load_together(toy, tmp_path, start, disks):
    model = tmp_path / "model"
    owned = disks(model)
    for own in owned:
        shutil.copytree(toy / "model", own[str(model)], dirs_exist_ok=True)
    (Path(owned[1][str(model)]) / "model.safetensors").unlink()
    how = {"model_name_or_path": model, "deepspeed": "configs/ds/zero3.json"}
    sentence = told(start(ten_steps(toy, tmp_path / "run", tmp_path / "cache", **how), disks=owned))
    assert sentence.startswith(
        f"error: rank 1 on host-b: --model_name_or_path {model}: no weights are found here; every node"
    )


def test_a_cache_of_tokens_that_one_host_cannot_write_is_told_with_the_rank_and_the_host(toy, tmp_path, start, disks):
    cache = tmp_path / "cache"
    owned = disks(cache)
    sentence = told(start(ten_steps(toy, tmp_path / "run", cache), disks=owned, read_only=((), (str(cache),))))
    assert sentence == (
        f"error: rank 1 on host-b: --dataset_local_cache_dir {cache}: cannot be written (Read-only file system)"
    )


def test_hosts_that_are_not_started_alike_are_told_what_differs(toy, tmp_path, start):
    patch = """
import importlib.metadata, os, pathlib, sys
if os.environ["RANK"] == "1":
    sys.argv += ["--seed", "2"]
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "1.0" if name == "torch" else version(name)
    pathlib.Path.read_bytes = lambda path: b""
"""
    sentence = told(start(ten_steps(toy, tmp_path / "run", tmp_path / "cache"), patch=patch))
    assert sentence.startswith("error: rank 1 on host-b is not like the others: the code of open_rm is ")
    assert "; torch is '1.0' there and " in sentence and "; --seed is '2' there and '1' on rank 0 on host-a" in sentence
    assert sentence.endswith(
        "; give every node the same command, the same commit of this repository and the same packages"
    )
    assert not list(tmp_path.glob("cache/*"))  # before anything is read


# ---------------------------------------------------------------- the Hub


def of_hub(tmp_path, **flags) -> list[str]:
    prefs = ["standin/prefs", "1.0"]
    how = {"model_name_or_path": "standin/toy", "dataset_mixer_list": prefs, "dataset_mixer_eval_list": prefs}
    return ten_steps(tmp_path, tmp_path / "run", tmp_path / "cache", **how | {"total_episodes": 32} | flags)


def asked(folder) -> dict[str, int]:
    """Requests of each rank."""
    return {path.name.split()[1]: len(path.read_text().splitlines()) for path in folder.glob("asked *")}


def test_of_each_node_the_first_rank_alone_asks_the_hub_and_all_read_one_commit(hub, home, start, disks, tmp_path):
    """Two ranks on a node and one on another, with caches of their own; the branch moves while the second node waits."""
    before, owned = len(hub.requests()), disks(home, tmp_path / "cache")
    moves = """
import open_rm.reward_modeling as m, os, subprocess, sys
resolve = m.resolve
def and_the_branch_moves(*given, **named):
    done = resolve(*given, **named)
    if os.environ["RANK"] == "0":
        program = "from huggingface_hub import HfApi; HfApi().upload_file(path_or_fileobj=b'{}', path_in_repo='moved.json', repo_id='standin/toy')"
        subprocess.run([sys.executable, "-c", program], check=True)
    return done
m.resolve = and_the_branch_moves
"""
    patch = ASKED.format(folder=str(tmp_path)) + moves
    start(of_hub(tmp_path), of=(0, 0, 1), disks=owned, patch=patch).finish()
    requests = hub.requests()[before:]
    assert set(asked(tmp_path)) == {"0", "2"} and len(requests) > 20
    files = [path.rpartition("/")[2] for method, path, status in requests if method == "GET" and "/resolve/" in path]
    assert files.count("model.safetensors") == 2 and {files.count(name) for name in files} == {2}  # each once a node
    hubs = [Path(own[str(home)]) / "hub/models--standin--toy/snapshots" for own in owned]
    commits = [[path.name for path in folder.iterdir()] for folder in hubs]
    assert commits[0] == commits[1] and len(commits[0]) == 1


def test_a_run_that_goes_on_reads_the_commit_that_it_was_begun_with(nursery, toy, tmp_path, on_one):
    """The branch moves between two starts, to a config by which the same weights compute other rewards."""
    folder, log, cache = tmp_path / "run", tmp_path / "log", tmp_path / "cache"
    flags = {"model_name_or_path": "standin/moves", "checkpointing_steps": 3, "per_device_train_batch_size": 16}
    started = nursery.start(ten_steps(toy, folder, cache, **flags), log, env={"TEST_PATCH": SLOWER})
    started.wait_for(lambda: checkpoint_names(folder), "a checkpoint")
    started.kill()
    config = json.loads((toy / "model/config.json").read_text())
    assert "rms_norm_eps" in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    move = f"from huggingface_hub import HfApi; HfApi().upload_file(path_or_fileobj={str(tmp_path / 'config.json')!r}, "
    move += "path_in_repo='config.json', repo_id='standin/moves')"
    subprocess.run([sys.executable, "-c", move], check=True)
    begun = json.loads((folder / "run.json").read_text())
    nursery.start(ten_steps(toy, folder, cache, **flags), log).finish()
    same_run(on_one, folder)
    assert list(begun["commits"]) == ["standin/moves"]
    assert json.loads((folder / "run.json").read_text())["commits"] == begun["commits"]


def test_a_hub_cache_that_the_main_host_alone_has_is_told_where_the_hub_is_not_asked(
    hub, home, start, disks, nursery, tmp_path
):
    owned = disks(home, tmp_path / "cache")
    fill = ENTER.format(host=json.dumps({"name": "a", "network": None, "disks": owned[0], "read_only": []}))
    nursery.start(of_hub(tmp_path, cache_dataset_only=True), tmp_path / "log", env={"TEST_PATCH": fill}).finish()
    sentence = told(start(of_hub(tmp_path), disks=owned, patch=OFFLINE))
    assert sentence.startswith("error: rank 1 on host-b: --model_name_or_path standin/toy: no model could be found")
