"""A model pulled from the Hub: whole or not there, as the Hub has it, whatever happens on the way."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hub_standin import TOKEN, HubStandin

LARGE = "model.safetensors"
SIZE = 2_000_000
OF_A_MODEL = ["README.md", "config.json", "contract.json", LARGE, "tokenizer.json", "vocab.txt"]
COMMAND = [sys.executable, "-m", "open_rm.hub", "pull"]


@pytest.fixture(scope="module")
def standin():
    with HubStandin() as hub:
        yield hub


@pytest.fixture
def hub(standin):
    yield standin
    standin.clear()


UPLOAD = """
import sys
from huggingface_hub import HfApi
api, (large, small) = HfApi(), sys.argv[1:]
for name, folder, branch in (("standin/large", large, "main"), ("standin/small", small, "a-run")):
    api.create_repo(name, private=True)
    if branch != "main":
        api.create_branch(name, branch=branch)
    api.upload_folder(repo_id=name, folder_path=folder, revision=branch)
api.create_tag("standin/small", tag="v1", revision="a-run")
for name, files in {"standin/pickles": ["config.json", "pytorch_model.bin"], "standin/other": ["config.json", "a.safetensors"]}.items():
    api.create_repo(name, private=True)
    for file in files:
        api.upload_file(path_or_fileobj=name.encode(), path_in_repo=file, repo_id=name)
"""


@pytest.fixture(scope="module")
def uploaded(standin, tmp_path_factory) -> Path:
    """What the repositories standin/large (main) and standin/small (a-run) hold, in folders of these names, and more."""
    where = tmp_path_factory.mktemp("uploaded")
    noise = np.random.default_rng(0)
    for name, size in {"large": SIZE, "small": 10_000}.items():
        (where / name / "checkpoints" / "step_1").mkdir(parents=True)
        for file in OF_A_MODEL:
            (where / name / file).write_text(json.dumps({"repository": name, "file": file}))
        (where / name / LARGE).write_bytes(noise.bytes(size))
        for file in ("samples.jsonl", "notes.txt", "checkpoints/step_1/state.safetensors"):
            (where / name / file).write_text("stays at home")
    command = [sys.executable, "-c", UPLOAD, str(where / "large"), str(where / "small")]
    subprocess.run(command, env=environment(standin), check=True, capture_output=True)
    return where


def environment(hub, token=TOKEN) -> dict:
    return {"HF_TOKEN": "", **hub.env(token), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(REPOSITORY)}


def pull(hub, repository, folder, *flags, token=TOKEN) -> subprocess.CompletedProcess:
    command = [*COMMAND, repository, "--folder", str(folder), *flags]
    return subprocess.run(
        command, env=environment(hub, token), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


# Several pulls in one process, which takes a second to start; each line of a job is repository, folder, revision. Without pauses.
PULLS = """
import json, sys
from open_rm.errors import UserError
from open_rm.publishing import hub_calls, pulling
hub_calls.FIRST_PAUSE_SECONDS = 0.0
{before}
said = []
for repository, folder, revision in json.loads(sys.argv[1]):
    try:
        said.append(pulling.pull_model(repository, folder, revision=revision))
    except UserError as error:
        said.append(f"error: {{error}}")
print(json.dumps(said))
"""


def pulls(hub, *jobs, token=TOKEN, before="", env=None) -> list[str]:
    """What each says, or "error: " and its sentence."""
    command = [sys.executable, "-c", PULLS.format(before=before), json.dumps([list(map(str, job)) for job in jobs])]
    done = subprocess.run(
        command, env=environment(hub, token) | (env or {}), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def holds(folder: Path, original: Path) -> bool:
    """Whether the folder holds the files of the model in the original, byte for byte, and nothing else."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return found == OF_A_MODEL and all((folder / name).read_bytes() == (original / name).read_bytes() for name in found)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- a pull that works


def test_a_pulled_model_is_what_was_pushed_and_the_command_says_what_it_is(hub, uploaded, tmp_path):
    done = pull(hub, "standin/small", tmp_path / "models" / "small", "--revision", "a-run")
    assert done.returncode == 0, done.stderr
    assert holds(tmp_path / "models" / "small", uploaded / "small")
    assert left_in(tmp_path / "models") == ["small"]
    first, *files = done.stdout.splitlines()
    commit = hub.requests()[-1][1].split("/resolve/")[1].split("/")[0]
    assert first.startswith(f"{tmp_path}/models/small holds standin/small (a-run, commit {commit}): 6 files, ")
    assert [line.split()[0] for line in files] == OF_A_MODEL and f"  {LARGE}  10,000 bytes" in files


def test_a_model_that_is_there_is_not_downloaded_again_and_another_ones_folder_is_left_alone(hub, uploaded, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    [first] = pulls(hub, ("standin/small", tmp_path / "a", "v1"))
    start = len(hub.requests())
    again, other, notes, empty = pulls(
        hub,
        ("standin/small", tmp_path / "a", "a-run"),
        ("standin/other", tmp_path / "a", "main"),
        ("standin/small", tmp_path / "notes", "a-run"),
        ("standin/small", tmp_path / "empty", "a-run"),
    )
    assert again.replace("holds already", "holds").replace("(a-run,", "(v1,") == first
    assert f"--folder {tmp_path}/a holds another model" in other and holds(tmp_path / "a", uploaded / "small")
    assert f"--folder {tmp_path}/notes holds other files" in notes and left_in(tmp_path / "notes") == ["mine.txt"]
    assert "empty holds standin/small" in empty and holds(tmp_path / "empty", uploaded / "small")
    downloaded = [path for verb, path, _ in hub.requests()[start:] if verb == "GET" and "/resolve/" in path]
    assert len(downloaded) == len(OF_A_MODEL)  # into the empty folder alone
    (tmp_path / "a" / LARGE).write_bytes(bytes(10_000))
    [damaged] = pulls(hub, ("standin/small", tmp_path / "a", "a-run"))
    assert "holds another model" in damaged


def test_a_folder_with_more_of_a_model_than_the_hub_has_is_not_called_whole(hub, uploaded, tmp_path):
    """Such a file of another commit would change how the folder is read."""
    shutil.copytree(uploaded / "small", tmp_path / "a")  # with files that no pull brings
    job = ("standin/small", tmp_path / "a", "a-run")
    for name in ("chat_template.jinja", "adapter_config.json"):
        (tmp_path / "a" / name).write_text("{}")
    mixed, *_ = pulls(hub, job)
    assert f"--folder {tmp_path}/a holds adapter_config.json, which standin/small does not have at a-run" in mixed
    for name in ("chat_template.jinja", "adapter_config.json"):
        (tmp_path / "a" / name).unlink()
    assert "a holds already standin/small" in pulls(hub, job)[0]


def test_a_folder_that_no_pull_has_made_is_never_cleared(hub, uploaded, tmp_path):
    names = (".model.pulling", "model.pulled")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    job = ("standin/small", tmp_path / "model", "a-run")
    [refused] = pulls(hub, job)
    assert f"error: {tmp_path}/.model.pulling holds files that no pull has put there; move it away" in refused
    assert [left_in(tmp_path / name) for name in names] == [["thesis.txt"]] * 2
    (tmp_path / ".model.pulling" / "thesis.txt").unlink()
    [pulled] = pulls(hub, job)
    assert "model holds standin/small" in pulled and holds(tmp_path / "model", uploaded / "small")
    assert left_in(tmp_path) == ["model", "model.pulled"] and left_in(tmp_path / "model.pulled") == ["thesis.txt"]


# Killed where the folder beside becomes the model's: just before, or just behind.
KILLED = """
import os
rename = os.rename
def killed(source, target, **how):
    if str(target) == {target!r}:
        {behind} and rename(source, target)
        os._exit(0)
    rename(source, target, **how)
os.rename = killed
"""


@pytest.mark.parametrize("behind", [False, True])
def test_a_pull_that_is_killed_at_its_rename_is_finished_by_the_next(hub, uploaded, tmp_path, behind):
    job = ("standin/small", tmp_path / "model", "a-run")
    with pytest.raises(IndexError):  # it says nothing more
        pulls(hub, job, before=KILLED.format(target=str(tmp_path / "model"), behind=behind))
    assert (tmp_path / "model").exists() == behind
    said = "model holds already standin/small" if behind else "model holds standin/small"
    assert said in pulls(hub, job)[0] and holds(tmp_path / "model", uploaded / "small")
    assert [name for name in left_in(tmp_path) if not name.endswith(".lock")] == ["model"]


# ---------------------------------------------------------------- faults that pass


@contextlib.contextmanager
def pulling_the_large_one(hub, folder):
    """A pull that has all but the weights, and waits for the second half of these; killed afterwards."""
    hub.fault(LARGE, method="GET", cut=SIZE // 2, hang=600, times=-1)
    start, beside = len(hub.requests()), folder.with_name(f".{folder.name}.pulling")
    command = [*COMMAND, "standin/large", "--folder", str(folder)]
    process = subprocess.Popen(command, env=environment(hub), cwd=REPOSITORY, stderr=subprocess.PIPE)

    def waits() -> bool:
        begun = any(verb == "GET" and path.endswith(LARGE) for verb, path, _ in hub.requests()[start:])
        return begun and all((beside / name).exists() for name in OF_A_MODEL if name != LARGE)

    try:
        deadline = time.monotonic() + 120
        while not waits():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_killed_pull_leaves_no_model_and_the_same_command_goes_on_with_what_arrived(hub, uploaded, tmp_path):
    with pulling_the_large_one(hub, tmp_path / "model"):
        [second] = pulls(hub, ("standin/large", tmp_path / "model", "main"))
        assert "another process is pulling into" in second
    hub.clear()
    hub.fault(LARGE, method="GET", status=403)
    assert "the Hub refuses access (403)" in pulls(hub, ("standin/large", tmp_path / "model", "main"))[0]
    assert not list((tmp_path / ".model.pulling").rglob("*.incomplete"))  # many kills would fill the disk with them
    assert not (tmp_path / "model").exists()
    start = len(hub.requests())
    done = pull(hub, "standin/large", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert holds(tmp_path / "model", uploaded / "large")
    assert [
        path.split("/")[-1] for verb, path, _ in hub.requests()[start:] if "/resolve/" in path and verb == "GET"
    ] == [LARGE]
    assert left_in(tmp_path) == ["model"]


def test_a_pull_survives_503s_a_broken_connection_and_a_file_that_arrives_damaged(hub, uploaded, tmp_path):
    hub.fault("/api/models/standin/small/revision", status=503)
    hub.fault("/tree/", status=429)
    hub.fault(LARGE, method="GET", status=503, times=2)
    hub.fault(LARGE, method="GET", spoil=True)
    hub.fault("tokenizer.json", method="GET", cut=5)
    [said] = pulls(
        hub, ("standin/small", tmp_path / "model", "a-run"), before="import time; time.sleep = lambda seconds: None"
    )
    assert "holds standin/small" in said and holds(tmp_path / "model", uploaded / "small")


# ---------------------------------------------------------------- faults that stay, each one sentence


def test_files_that_are_not_what_the_hub_says_of_them_never_appear(hub, uploaded, tmp_path):
    hub.fault(LARGE, method="GET", spoil=True, times=-1)
    [said] = pulls(hub, ("standin/small", tmp_path / "model", "a-run"))
    assert said.startswith(
        "error: standin/small cannot be pulled: model.safetensors: not what the Hub says of it. What has "
    )
    assert left_in(tmp_path) == [".model.pulling"] and not (tmp_path / ".model.pulling" / LARGE).exists()
    hub.clear()
    [said] = pulls(hub, ("standin/other", tmp_path / "model", "main"))  # what waits there is of no use to another model
    assert "holds standin/other" in said and left_in(tmp_path / "model") == ["a.safetensors", "config.json"]


def test_what_cannot_be_pulled_is_said_in_one_sentence(hub, uploaded, tmp_path):
    folder = tmp_path / "none"
    jobs = {
        (
            "standin/small",
            "main",
        ): "there is no model in standin/small at main (no config.json and no adapter_config.json); it has "
        "the branches main, a-run and the tags v1: name one by --revision",
        ("standin/small", "nope"): "standin/small has no branch, tag or commit nope; it has the branches main, a-run",
        (
            "standin/missing",
            "main",
        ): "standin/missing cannot be pulled: there is no model of this name that the token may read",
        ("standin/pickles", "main"): "weights are pickles (pytorch_model.bin), which can run code when they are read",
        ("two words", "main"): "two words cannot be pulled: Repo id must use",
    }
    said = pulls(hub, *((name, folder, revision) for name, revision in jobs))
    for line, expected in zip(said, jobs.values(), strict=True):
        assert line.startswith("error: ") and expected in line and "\n" not in line, line
    hub.fault("/resolve/", status=403, code="GatedRepo", times=-1)
    [gated] = pulls(hub, ("standin/small", folder, "a-run"))
    assert f"it is gated; accept its conditions on {hub.endpoint}/standin/small with the account" in gated
    assert not folder.exists()


def test_without_a_token_or_with_a_wrong_one_a_private_model_is_one_sentence(hub, uploaded, tmp_path):
    [none] = pulls(hub, ("standin/small", tmp_path / "a", "a-run"), token=None)
    assert "there is no public model of this name; if it is private, set HF_TOKEN" in none
    done = pull(hub, "standin/small", tmp_path / "a", "--revision", "a-run", token="hf_wrong")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip() == "error: standin/small cannot be pulled: the Hub refuses the token (401); check HF_TOKEN"
    )
    assert left_in(tmp_path) == []


def test_no_network_is_one_sentence(hub, tmp_path):
    job = ("standin/small", tmp_path / "a", "a-run")
    [away] = pulls(hub, job, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "standin/small cannot be pulled: the Hub cannot be reached (ConnectError)" in away
    [offline] = pulls(
        hub, job, env={"HF_HUB_OFFLINE": "1"}, before="hub_calls.FIRST_PAUSE_SECONDS = 1000"
    )  # asked once
    assert "HF_HUB_OFFLINE is set; unset it" in offline


def test_a_folder_that_cannot_be_written_is_one_sentence(hub, uploaded, tmp_path):
    (tmp_path / "file").write_text("no folder")
    [said] = pulls(hub, ("standin/small", tmp_path / "file" / "model", "a-run"))
    assert (
        said == f"error: standin/small cannot be pulled: [Errno 20] Not a directory: '{tmp_path}/file/.model.pulling'"
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a MiB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root and the command mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_without_room_is_said_before_the_download_or_when_it_fills(hub, uploaded, small_disk):
    job = ("standin/large", small_disk / "model", "main")
    start = len(hub.requests())
    before, mounted = pulls(hub, job, ("standin/large", small_disk, "main"))
    assert "it needs 1.9 MiB more on the disk, 1.0 MiB are free" in before
    assert "is where a file system is mounted; name a folder inside it" in mounted
    assert not [path for _, path, _ in hub.requests()[start:] if "/resolve/" in path]
    [full] = pulls(hub, job, before="pulling._free = lambda folder: 1 << 40")  # as if others had filled it meanwhile
    assert (
        full.startswith("error: standin/large cannot be pulled: the disk is full, ")
        and "What has arrived waits in" in full
    )
    assert not (small_disk / "model").exists()
    assert len([path for verb, path, _ in hub.requests()[start:] if verb == "GET" and path.endswith(LARGE)]) == 1
