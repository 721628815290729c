"""Packed rows on a GPU: what flash attention is told there, checked without one; and where there is one, what it computes."""

import importlib
import inspect
import random
import sys

import pytest
import torch
import transformers
import varlen_reference
from conftest import on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    GRADIENT_TOLERANCE,
    KINDS,
    OUTPUT_TOLERANCE,
    ROWS,
    output_and_gradients,
    random_qkv,
    trees,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import attention as of_torch
from torch.nn.attention import _registry, varlen

from open_rm.batching import attention
from open_rm.batching.attention import dense_attention, make_segments, segment_attention
from open_rm.model import flash as newer_flash

SIGNATURES = {"torch 2.11": varlen_reference.of_torch_2_11, "this torch": varlen_reference.of_this_torch}


def flash(module, query, key, value, mask, *, segments, scaling=None, sliding_window=None):
    return attention._flash(query, key, value, segments, scaling, sliding_window), None


def assert_flash_is_the_reference(monkeypatch, signature, bounds, heads, key_heads, kind, seed=0):
    inputs, upstream = random_qkv(bounds, heads, key_heads, seed)
    with monkeypatch.context() as patched:
        patched.setattr(varlen, "varlen_attn", SIGNATURES[signature])
        out, gradients = output_and_gradients(flash, bounds, inputs, upstream, kind)
    reference, reference_gradients = output_and_gradients(dense_attention, bounds, inputs, upstream, kind)
    torch.testing.assert_close(out, reference, rtol=0, atol=OUTPUT_TOLERANCE)
    for name, ours, theirs in zip("qkv", gradients, reference_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=GRADIENT_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "softcap" not in KINDS[kind]])
@pytest.mark.parametrize("row", ROWS)
def test_flash_attention_is_told_what_the_reference_computes(monkeypatch, row, kind, key_heads, signature):
    assert_flash_is_the_reference(monkeypatch, signature, ROWS[row], 4, key_heads, KINDS[kind])


@pytest.mark.parametrize("signature", SIGNATURES)
def test_it_is_told_so_of_random_trees_of_segments(monkeypatch, signature):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        bounds=trees(),
        key_heads=st.sampled_from([4, 2, 1]),
        window=st.none() | st.integers(1, 12),
        seed=st.integers(0, 99),
    )
    def of_a_tree(bounds, key_heads, window, seed):
        kind = {"sliding_window": window, "scaling": 0.9 if seed % 2 else None}
        assert_flash_is_the_reference(monkeypatch, signature, bounds, 4, key_heads, kind, seed)

    of_a_tree()


def test_the_reference_has_the_signature_of_the_torch_that_is_installed():
    installed = inspect.signature(varlen_reference.INSTALLED)
    assert inspect.signature(varlen_reference.of_this_torch) == installed
    before = inspect.signature(varlen_reference.of_torch_2_11)
    assert set(before.parameters) <= set(installed.parameters)
    assert [attention._asks_for_gqa(function) for function in SIGNATURES.values()] == [False, True]


def test_the_demands_of_the_kernel_are_held_by_the_reference():
    """The reference notices: int64 starts, a wrong total, a wrong maximum, heads of 4, and grouped heads not asked for."""
    bounds = ROWS["packed"]
    starts = make_segments(bounds).query_starts
    q, k = torch.randn(21, 4, 8), torch.randn(21, 2, 8)
    right = (q, k, k, starts, starts, 13, 13)
    how = {"window_size": (-1, 0), "enable_gqa": True}
    assert varlen_reference.of_this_torch(*right, **how).shape == q.shape
    for place, wrong in ((3, starts.long()), (3, starts[:-1]), (5, 12), (0, q[..., :4]), (0, q.mT.contiguous().mT)):
        with pytest.raises(AssertionError):
            varlen_reference.of_this_torch(*right[:place], wrong, *right[place + 1 :], **how)
    with pytest.raises(ValueError, match="number of heads"):
        varlen_reference.of_this_torch(*right, window_size=(-1, 0))
    with pytest.raises(TypeError, match="enable_gqa"):
        varlen_reference.of_torch_2_11(*right, **how)


def test_keys_and_values_are_gathered_by_one_index_select():
    """And summed by one index_add in backward; indexing with [] would be two, each of which sorts the index on a GPU."""
    bounds = ROWS["several groups"]
    inputs, _ = random_qkv(bounds, 4, 2)
    called = []

    class Named(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function._schema.name.removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patched, Named():
        patched.setattr(varlen, "varlen_attn", lambda query, key, *_, scale, window_size: query * key.sum())
        flash(None, *inputs, None, segments=make_segments(bounds))[0].sum().backward()
    counts = {name: called.count(name) for name in ("index_select", "index_add", "index_add_", "index", "index_put_")}
    assert counts.pop("index_add") + counts.pop("index_add_") == 1
    assert counts == {"index_select": 1, "index": 0, "index_put_": 0}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("row", ["packed", "shared prefix", "a header of two prompts"])
def test_shapes_dtypes_and_devices_of_a_gpus_forward_fit_together(row, window):
    """Fake tensors have these alone; no GPU is needed, and varlen_attn is torch's own."""
    bounds = ROWS[row]
    tokens, device = bounds[-1][1], torch.device("cuda:0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        segments = make_segments(bounds).to(device)
        moved = (segments.query_starts, segments.key_starts, *([] if row == "packed" else [segments.key_index]))
        assert {tensor.device for tensor in moved} == {device}
        assert segments.to(device) is segments
        q, k, v = (torch.empty(1, heads, tokens, 64, dtype=torch.bfloat16, device=device) for heads in (8, 2, 2))
        out, weights = segment_attention(None, q, k, v, None, segments=segments, sliding_window=window)
        assert (out.shape, out.dtype, out.device) == ((1, tokens, 8, 64), torch.bfloat16, device)
        assert weights is None
        with pytest.raises(RuntimeError, match="device"):  # the check itself: an index that stayed behind is noticed
            flash(None, q, k, v, None, segments=make_segments(ROWS["shared prefix"]))


# ---------------------------------------------------------------- newer ones

PACKAGES = {"FA3": "flash_attn_interface.py", "FA4": "flash_attn/cute/interface.py"}
CHOICE = {"layout": "packed", "device": torch.device("cpu"), "capability": (9, 0)}
PLAIN = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
WINDOWED = transformers.MistralConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, sliding_window=50)


def forget_packages() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs packages that torch would import, in whose place stand kernels that compute densely, with a fault or not.

    Activating and restoring are torch's own. Faults: None, an error that every call raises, one of windows, a wrong window.
    """
    faults = {}

    class Handle:
        def remove(self):
            pass

    def make(name: str, fault: str | None = None) -> None:
        file = tmp_path / PACKAGES[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        faults[name] = fault
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, Handle)

    def kernel(module, *qkv, segments, sliding_window=None):
        fault = faults.get(of_torch.current_flash_attention_impl())
        if fault == "raises" or (fault == "refuses windows" and sliding_window is not None):
            raise ValueError("too many values to unpack (expected 2)\nand a second line")
        if fault == "wrong window" and sliding_window is not None:
            sliding_window += 1
        out, weights = dense_attention(module, *qkv, segments=segments, sliding_window=sliding_window)
        return out * (float("nan") if fault == "no number" else 1), weights

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(newer_flash, "segment_attention", kernel)
    yield make
    forget_packages()
    if of_torch.current_flash_attention_impl() is not None:
        of_torch.restore_flash_attention_impl()


FA3, FA4 = "flash attention 3 (flash_attn_interface)", "flash attention 4 (flash-attn-4)"
OWN, TRIED = "torch's own flash attention 2", "which was tried against torch's own"
OTHERS = "newer ones are for GPUs of compute capability 9 and 10, and this one has"
RAISES = "is installed and not used: too many values to unpack (expected 2)"
EMPTY = "Module 'flash_attn.cute.interface' does not expose FA4 kernels"
DIFFERS = "is installed and not used: its results differ from those of torch's own"


@pytest.mark.parametrize(
    ("installed", "config", "capability", "active", "said"),
    [
        ({}, PLAIN, (9, 0), None, f"{OWN}; {FA3} is not installed; {FA4} is not installed"),
        ({"FA3": None}, PLAIN, (9, 0), "FA3", f"{FA3}, {TRIED}"),
        ({"FA4": None}, WINDOWED, (9, 0), "FA4", f"{FA4}, {TRIED}"),
        ({"FA3": None, "FA4": None}, WINDOWED, (9, 0), "FA3", f"{FA3}, {TRIED}"),
        ({"FA3": None, "FA4": None}, WINDOWED, (10, 3), "FA4", f"{FA4}, {TRIED}"),
        ({"FA3": None}, PLAIN, (10, 0), None, f"{OWN}; {FA4} is not installed"),
        ({"FA3": None, "FA4": None}, PLAIN, (8, 9), None, f"{OWN}; {OTHERS} 8"),
        ({"FA3": None, "FA4": None}, PLAIN, (12, 0), None, f"{OWN}; {OTHERS} 12"),
        ({"FA4": "raises"}, PLAIN, (10, 0), None, f"{OWN}; {FA4} {RAISES}"),
        ({"FA3": "raises", "FA4": None}, PLAIN, (9, 0), "FA4", f"{FA4}, {TRIED}; {FA3} {RAISES}"),
        ({"FA4": "refuses windows"}, WINDOWED, (10, 0), None, f"{OWN}; {FA4} {RAISES}"),
        ({"FA4": "refuses windows"}, PLAIN, (10, 0), "FA4", f"{FA4}, {TRIED}"),
        ({"FA4": "wrong window"}, WINDOWED, (10, 0), None, f"{OWN}; {FA4} {DIFFERS}"),
        ({"FA4": "no number"}, PLAIN, (10, 0), None, f"{OWN}; {FA4} {DIFFERS}"),
    ],
)
def test_the_newest_that_is_installed_and_right_is_used_and_said(install, installed, config, capability, active, said):
    for name, fault in installed.items():
        install(name, fault)
    line = newer_flash.activate(config, **CHOICE | {"capability": capability})
    assert line == f"attention over packed rows: {said}"
    assert of_torch.current_flash_attention_impl() == active


def test_nothing_is_tried_or_said_off_a_gpu_or_for_padded_rows(install):
    install("FA3")
    for other in ({"layout": "padded"}, {"capability": None}):
        assert newer_flash.activate(PLAIN, **CHOICE | other) is None
    assert of_torch.current_flash_attention_impl() is None


def test_packages_that_cannot_be_imported_or_hold_no_kernels_leave_torchs_own(install, tmp_path, monkeypatch):
    """A flash_attn that was built for another torch; and torch's own way to version 4, which looks into the package."""
    own_way = _registry._FLASH_ATTENTION_IMPLS["FA4"]
    install("FA4")
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", own_way)
    line = newer_flash.activate(PLAIN, **CHOICE | {"capability": (10, 0)})
    assert line.endswith(f"{OWN}; {FA4} is installed and not used: {EMPTY}")
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    forget_packages()
    assert newer_flash.activate(PLAIN, **CHOICE | {"capability": (10, 0)}).endswith(f"{OWN}; {FA4} is not installed")
    assert of_torch.current_flash_attention_impl() is None


def test_a_torch_without_newer_ones_says_so(install, monkeypatch):
    monkeypatch.delattr(of_torch, "activate_flash_attention_impl")
    assert newer_flash.activate(PLAIN, **CHOICE).endswith(f"{OWN}; torch {torch.__version__} knows no other")


# ---------------------------------------------------------------- on a GPU

# Norm of the difference over the norm, and largest difference over the largest entry; of the output and the gradients of q, k
# and v. The same bfloat16 inputs, computed in float32 by the path of a CPU. Rounding to 8 bits, weights and results alike,
# gives some 5e-3 and 7e-3; a window that is one token off gives 6e-2 and 1e-1.
BF16_TOLERANCE = 2e-2
LONG_ROW = [(0, 300, ()), (300, 430, ((0, 150),)), (430, 431, ((0, 150),)), (431, 600, ()), (600, 700, ((431, 500),))]
LONG_ROW += [(700, 900, ((0, 140),)), (900, 960, ((0, 140), (700, 771)))]  # a header
WIDTHS, GROUPS, WINDOWS = (8, 64, 96, 128, 256), (1, 4, 8), (None, 1, 100)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The larger of the two measures; below a root mean square of 0.05, and a largest entry of 1, in units of these."""
    apart = ours - theirs
    by_norm = apart.norm() / theirs.norm().clamp(min=0.05 * theirs.numel() ** 0.5)
    return max(by_norm, apart.abs().max() / theirs.abs().max().clamp(min=1)).item()


def apart(device: str, bounds, width: int, key_heads: int, window: int | None, seed: int = 0) -> float:
    """How far 8 heads in bfloat16 on a device are from float32; on the CPU, by `_flash` itself."""
    tokens, generator = bounds[-1][1], torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, heads, tokens, width, generator=generator).bfloat16() for heads in (8, key_heads, key_heads)
    )
    upstream = torch.randn(1, tokens, 8, width, generator=generator).bfloat16()
    results = []
    for place, dtype in ((device, torch.bfloat16), ("cpu", torch.float32)):
        inputs = [tensor.to(place, dtype).requires_grad_() for tensor in (q, k, v)]
        segments = make_segments(bounds).to(torch.device(place))
        function = flash if (place, dtype) == ("cpu", torch.bfloat16) else segment_attention
        out, _ = function(None, *inputs, None, segments=segments, sliding_window=window)
        gradients = torch.autograd.grad(out, inputs, upstream.to(place, dtype))
        results.append([tensor.detach().float().cpu() for tensor in (out, *gradients)])
    return max(difference(ours, theirs) for ours, theirs in zip(*results, strict=True))


def apart_by_shape(device: str, widths=WIDTHS) -> dict[str, float]:
    """Of a row that crosses the kernel's tiles, by head width, query heads for each key head, and window."""
    return {
        f"D = {width}, H / G = {group}, window {window}": apart(device, LONG_ROW, width, 8 // group, window)
        for width in widths
        for group in GROUPS
        for window in WINDOWS
    }


def apart_by_tree(device: str, count: int = 200) -> dict[str, float]:
    """Of random trees of up to eight segments of up to 200 tokens."""
    found = {}
    for seed in range(count):
        draw = random.Random(seed)
        bounds, used = [], 0
        for _ in range(draw.randint(1, 8)):
            length = draw.choice((1, draw.randint(1, 20), draw.randint(1, 200)))
            prefix = ()
            if used and draw.random() < 0.6:  # one stretch of the row before it, or two
                ends = sorted(draw.sample(range(used + 1), 4 if used > 2 and draw.random() < 0.5 else 2))
                prefix = tuple(zip(ends[::2], ends[1::2], strict=True))
            bounds.append((used, used + length, prefix))
            used += length
        window, key_heads = draw.choice((None, draw.randint(1, 150))), draw.choice((8, 2, 1))
        found[f"seed {seed}: {bounds}, G = {key_heads}, window {window}"] = apart(
            device, bounds, 64, key_heads, window, seed
        )
    return found


COMPARE = """
import json, sys, torch
torch.zeros(1, device=sys.argv[1])  # CUDA starts before conftest hides the GPU from this process
import test_flash
print(json.dumps(getattr(test_flash, sys.argv[2])(sys.argv[1])))
"""


def assert_within_bfloat16(found: dict[str, float]) -> None:
    wrong = {what: value for what, value in found.items() if not value < BF16_TOLERANCE}
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["apart_by_shape", "apart_by_tree"])
def test_flash_attention_on_a_gpu_is_the_path_of_a_cpu_in_bfloat16(what):
    found = on_gpu(COMPARE, "cuda", what)
    assert len(found) == (len(WIDTHS) * len(GROUPS) * len(WINDOWS) if what == "apart_by_shape" else 200)
    assert_within_bfloat16(found)


ACTIVATE = """
import json, torch
capability = torch.cuda.get_device_capability()  # CUDA starts before conftest hides the GPU from this process
import test_flash
line = test_flash.newer_flash.activate(test_flash.WINDOWED, "packed", torch.device("cuda", 0), capability)
print(json.dumps([line, test_flash.apart_by_tree("cuda", count=20)]))
"""


@pytest.mark.gpu
def test_what_is_activated_on_a_gpu_is_the_path_of_a_cpu_in_bfloat16():
    line, found = on_gpu(ACTIVATE)
    print(line)
    assert line.startswith("attention over packed rows: ")
    assert_within_bfloat16(found)


def test_that_comparison_passes_bfloat16_and_notices_a_window_that_is_one_token_off(monkeypatch):
    """The same code with a dense kernel on a CPU."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference.of_this_torch)
    found = apart_by_shape("cpu", widths=(8, 64)) | apart_by_tree("cpu", count=20)
    assert_within_bfloat16(found)
    assert max(found.values()) > BF16_TOLERANCE / 10
    honest = attention._flash
    monkeypatch.setattr(attention, "_flash", lambda *a: honest(*a[:5], a[5] and a[5] + 1))
    off = [value for what, value in apart_by_shape("cpu", widths=(64,)).items() if "None" not in what]
    assert min(off) > 2 * BF16_TOLERANCE
