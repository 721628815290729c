"""Liger's kernels compute what the plain model does; without a GPU, by Triton's interpreter."""

import json
import os
import re
import shutil
import sysconfig

import pytest
import torch
from conftest import REPOSITORY, in_a_process, load_model, on_gpu
from liger_kernel.ops import swiglu
from triton.runtime import build

from open_rm.model import kernels

CASES = [
    ("llama", "padded", False),
    ("llama", "packed", False),
    ("llama", "shared_prefix", True),
    ("mistral", "shared_prefix", False),
    ("qwen2", "shared_prefix", False),
    ("qwen3", "shared_prefix", False),
    ("gemma2", "padded", False),  # soft-capped: on a GPU never packed
    ("gemma3_text", "shared_prefix", False),
    ("phi3", "shared_prefix", False),
    ("phi3 rotated in part", "packed", False),
    ("olmo2", "shared_prefix", False),
]
# Rewards are up to 2. Measured: 5e-7 apart, gradients 2e-6 of a parameter's norm.
TOLERANCE = 1e-5

COMPARE = """
import json, os, sys
folders, cases, tokenizer, device, dtype = sys.argv[1:]
sys.path[:0] = folders.split(os.pathsep)
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
torch.zeros(1, device=device)  # CUDA starts before conftest hides the GPU from this process
import liger_compared
if device == "cpu":
    liger_compared.interpret()
print(json.dumps(liger_compared.compared(list(map(tuple, json.loads(cases))), tokenizer, device, getattr(torch, dtype))))
"""


def compared(run, toy, cases, device: str, dtype: str) -> dict:
    folders = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests/model")))
    return run(COMPARE, folders, json.dumps(cases), toy / "model", device, dtype)


@pytest.fixture(scope="module")
def interpreted(toy):
    """All cases in one process: it takes its imports once, and changes transformers for good."""
    return compared(in_a_process, toy, CASES, "cpu", "float32")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewards_and_gradients_are_those_of_the_plain_model(interpreted, case):
    found = interpreted[", ".join(map(str, case))]
    assert found["line"].startswith("Liger kernels on: fused norm, rotary embedding and MLP")
    assert found["plain"] == [0, 0]
    assert max(found["fused"]) < TOLERANCE


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_is_no_further_from_float32_than_the_plain_model_is(toy):
    """Rewards and gradients, in all layouts; twice as far and a little more are allowed, since roundings are luck."""
    for case, found in compared(on_gpu, toy, CASES, "cuda", "bfloat16").items():
        assert found["line"].startswith("Liger kernels on"), case
        for fused, plain in zip(found["fused"], found["plain"], strict=True):
            assert fused < 2 * plain + 1e-2, (case, found)


@pytest.mark.gpu
def test_on_a_gpu_float32_is_the_plain_model(toy):
    """In padded rows, since flash attention has no float32; fused kernels and a GPU's products add in another order."""
    cases = sorted({(family, "padded", False) for family, *_ in CASES})
    for case, found in compared(on_gpu, toy, cases, "cuda", "float32").items():
        assert found["line"].startswith("Liger kernels on"), case
        assert max(found["fused"]) < 1e-4, (case, found)


# ---------------------------------------------------------------- where Triton cannot compile


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Liger's first kernel goes as far as Triton's own call of the C compiler, which is as far as a CPU comes."""
    (tmp_path / "launcher.c").write_text("#include <Python.h>\n")
    tried = kernels._why_triton_fails
    monkeypatch.setattr(kernels, "_why_triton_fails", lambda _: tried(torch.device("cpu")))
    found = getattr(build, "_find_compiler", None)  # is kept by Triton 3.9, and 3.7 looks each time
    forget = found.cache_clear if found else lambda: None
    forget()
    yield lambda *_: build._build("launcher", str(tmp_path / "launcher.c"), str(tmp_path), [], [], [], [])
    forget()


@pytest.mark.parametrize("lacks", ["compiler", "headers"])
def test_without_a_compiler_or_pythons_headers_the_plain_model_is_used_and_the_log_says_why(
    toy, tokenizer, tmp_path, monkeypatch, builds, lacks
):
    if lacks == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        why = "Failed to find C compiler"
    else:
        if not shutil.which("gcc"):
            pytest.skip("no gcc here")
        monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})
        why = "Command .*gcc"
    monkeypatch.setattr(swiglu.LigerSiLUMulFunction, "apply", builds)
    reward_model = load_model(toy / "model", tokenizer)
    line = kernels.apply_fused_kernels(reward_model, torch.device("cuda"))
    assert re.fullmatch(rf"Liger kernels off: Triton cannot compile here \({why}.*\); install gcc and .*headers", line)
    assert not any("forward" in vars(module) for module in reward_model.modules())  # Liger's are bound to instances
