"""Old clients to test folders with: packages of earlier days beside this Python's torch, numpy and safetensors.

Each environment is a folder that stands first on the path of a process of its own. It is installed once into a cache
(~/.cache/open_rm_test_clients, or below XDG_CACHE_HOME) and kept; a test that needs one is skipped where it is not there and
cannot be installed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment_of_a_process
from filelock import FileLock

# Without their dependencies: those that fit are here already (torch above all), the others are named.
TRANSFORMERS_4_57 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0", "peft==0.18.0")
# 4.51.0 is what RewardBench pins.
TRANSFORMERS_4_51 = ("transformers==4.51.0", "tokenizers==0.21.4", "huggingface_hub==0.36.0", "peft==0.15.2")
# It imports classes of every reward model it knows, and with them TRL; 80.9 is among the last setuptools with pkg_resources.
REWARDBENCH = (
    *TRANSFORMERS_4_51,
    "rewardbench==0.1.4",
    "fschat==0.2.36",
    "trl==0.16.1",
    "datasets==3.5.0",
    "accelerate==1.6.0",
    "sentencepiece==0.2.1",
    "setuptools==80.9.0",
)
# What pip says where no index answers, or one that has nothing.
UNREACHABLE = ("(from versions: none)", "connection", "timed out", "No module named pip")


def environment(packages: tuple[str, ...]) -> Path:
    """The folder that holds these packages; installed where it is missing, else the test is skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "open_rm_test_clients"
    cache.mkdir(parents=True, exist_ok=True)
    named = json.dumps([packages, sys.version_info[:2]])
    folder = cache / hashlib.sha256(named.encode()).hexdigest()[:16]
    with FileLock(f"{folder}.lock"):  # for two workers that want the same one
        if not folder.is_dir():
            _install(packages, folder)
    return folder


def _install(packages: tuple[str, ...], folder: Path) -> None:
    """Into a folder that appears when all of it is there."""
    parts = folder.with_suffix(".parts")
    shutil.rmtree(parts, ignore_errors=True)  # of an installation that was killed
    try:
        # a client imports a part of it, and compiles that part then
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--retries", "1"]
        command += ["--quiet", "--disable-pip-version-check", "--target", str(parts), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and any(said in done.stderr for said in UNREACHABLE):
            pytest.skip(
                f"no old clients here: {packages[0]} cannot be installed ({done.stderr.strip().splitlines()[-1]})"
            )
        assert done.returncode == 0, done.stderr
        parts.rename(folder)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def run(packages: tuple[str, ...], program: str, *arguments, cwd: Path):
    """Run a program with these packages; returns what it printed in its last line, JSON."""
    own = {"PYTHONPATH": str(environment(packages)), "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    own |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}
    own["HF_DATASETS_CACHE"] = str(cwd / "datasets")  # RewardBench reads its rows through it
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment_of_a_process() | own, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])
