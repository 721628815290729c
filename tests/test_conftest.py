"""Tests that are not marked gpu compute on the CPU wherever they run; those that are marked see the GPU, or are skipped."""

import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, environment_of_a_process, in_a_process

# Stands for torch on a machine with GPUs.
TORCH = """\
import os
from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "")
"""

TESTS = """\
import json
import os
import pytest
import torch
from conftest import launch, on_gpu

LOOK = "import json, os; print(json.dumps([os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'DS_ACCELERATOR')]))"

def test_unmarked():
    assert not torch.cuda.is_available()

@pytest.fixture
def made_for_it():
    print("FIXTURE")

@pytest.mark.gpu
def test_marked(made_for_it):
    assert not torch.cuda.is_available()
    assert on_gpu(LOOK) == json.loads(launch("-c", LOOK, gpu=True).stdout) == [json.loads(os.environ["EXPECTED"]), None]
"""


def run_pytest(folder, *flags: str, **variables: str | None) -> str:
    """The report of pytest on TESTS, with this repository's conftest; `nvidia-smi` is there."""
    (folder / "test_both.py").write_text(TESTS)
    (folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "nvidia-smi").chmod(0o755)
    environment = environment_of_a_process() | {"PYTHONPATH": str(REPOSITORY / "tests")}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    for name, value in variables.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [sys.executable, "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(folder)]
    command += ["-p", "conftest", "-p", "no:cacheprovider", "-rsfE", *flags, str(folder / "test_both.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_no_gpu_is_seen_by_an_unmarked_test_and_what_it_starts():
    assert not torch.cuda.is_available()
    script = "import json, os, torch; print(json.dumps([torch.cuda.is_available(), os.environ['DS_ACCELERATOR']]))"
    assert in_a_process(script) == [False, "cpu"]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "pytest-xdist"])
@pytest.mark.parametrize(("before", "expected"), [(None, "null"), ("3,5", '"3,5"')])
def test_a_test_marked_gpu_sees_what_was_visible_before(tmp_path, workers, before, expected):
    (tmp_path / "torch.py").write_text(TORCH)
    at_first = {"CUDA_VISIBLE_DEVICES_AT_FIRST": None, "CUDA_VISIBLE_DEVICES": before, "DS_ACCELERATOR": "cuda"}
    report = run_pytest(tmp_path, *workers, EXPECTED=expected, **at_first)
    assert "2 passed" in report, report


def test_a_test_marked_gpu_is_skipped_with_the_reason_where_there_is_none(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES_AT_FIRST": None, "CUDA_VISIBLE_DEVICES": ""}  # as on a machine without one
    report = run_pytest(tmp_path, "-s", EXPECTED="null", **hidden)
    assert "1 passed, 1 skipped" in report, report
    assert "no CUDA device: torch.cuda.is_available() is False" in report and "FIXTURE" not in report
