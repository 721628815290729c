"""The GPU profile of the benchmark, in small on a CPU: every contestant takes the same pairs, nothing measured is lost."""

import functools
import json
import math
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, environment_of_a_process, in_a_process

from benchmarks import (
    agreement,
    attention_cost,
    card,
    contestants,
    gpu_profile,
    gpu_report,
    headers,
    judging,
    step_trace,
    toy_runs,
)
from benchmarks import workloads as loads
from benchmarks.throughput import BenchmarkArgs
from open_rm.errors import UserError

OURS = ("shared_prefix", "packed", "padded")
THEIRS = ("TRL", "TRL bfloat16")
LEFT_OUT = ("shared_prefix, float8", "TRL bfloat16, flash attention")


def smoke(output, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.throughput", "--profile", "gpu", "--smoke", "--output", str(output)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *flags], cwd=REPOSITORY, env=environment_of_a_process(), **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A smoke run to its end: folder, results.json, what was printed."""
    output = tmp_path_factory.mktemp("smoke")
    process = smoke(output)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    return output, json.loads((output / "results.json").read_text()), printed


def measured(results: dict) -> dict[tuple, dict[str, dict]]:
    """By what was measured in which round, the lines of the contestants."""
    found = defaultdict(dict)
    for row in results["lines"]:
        if row["kind"] == "measured":
            found[row["workload"], row["pairs_per_step"], row["recompute"], row["round"]][row["contestant"]] = row
    return found


def test_every_contestant_is_measured_in_every_setting_and_round_or_left_out_by_name(whole):
    _, results, printed = whole
    [settings] = gpu_profile.SMOKE.shapes.values()
    wanted = {(s.workload, s.pairs_per_step, s.recompute, number) for s in settings for number in (1, 2)}
    assert {setting[2] for setting in wanted} == {True, False}
    found = measured(results)
    assert set(found) == wanted
    assert all(set(rows) == {*OURS, *THEIRS} for rows in found.values())
    assert results["errors"] == []
    assert {row["contestant"]: row["why"] for row in results["left_out"]} == {
        name: contestants.why_not(name) for name in LEFT_OUT
    }
    assert all(f"left out: tiny, {name}" in printed for name in LEFT_OUT)


def test_all_take_the_same_pairs_and_shared_prefix_computes_the_distinct_tokens_alone(whole):
    for rows in measured(whole[1]).values():
        assert len({(row["tokens"], row["distinct"], row["steps"]) for row in rows.values()}) == 1
        for name, row in rows.items():
            assert row["computed"] == row["distinct" if name == "shared_prefix" else "tokens"], name
            assert 0 < row["distinct"] < row["tokens"]


def test_layouts_have_equal_losses_at_every_step_and_trl_begins_where_they_do(whole):
    rounds = measured(whole[1])
    for rows in rounds.values():
        for name in OURS:
            assert rows[name]["losses"] == pytest.approx(rows["padded"]["losses"], abs=1e-4)
    first = rounds["conversations", 8, False, 1]  # before anybody's first update: the same model
    assert first["TRL"]["losses"][0] == pytest.approx(first["padded"]["losses"][0], abs=1e-2)  # autocast rounds
    assert first["TRL bfloat16"]["losses"][0] == pytest.approx(first["padded"]["losses"][0], abs=1e-2)


def test_figures_of_a_line_fit_together(whole):
    for rows in measured(whole[1]).values():
        for row in rows.values():
            seconds = row["seconds"]
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / seconds)
            assert row["distinct_tokens_per_second"] == pytest.approx(row["distinct"] / seconds)
            assert row["pairs_per_second"] == pytest.approx(row["steps"] * row["pairs_per_step"] / seconds)
            assert row["mfu"] == pytest.approx(row["flops_per_second"] / row["matmul_flops"])
            assert row["peak_gib"] > 0.1 and row["reserved_gib"] is None
        # what is needed is equal for all who share nothing; a shared prefix needs less
        flops = {name: row["flops_per_second"] * row["seconds"] for name, row in rows.items()}
        assert flops["packed"] == pytest.approx(flops["padded"]) == pytest.approx(flops["TRL"])
        assert flops["shared_prefix"] < flops["padded"]


def test_it_ends_with_a_table_a_picture_and_the_shares_of_a_step(whole):
    output, results, printed = whole
    assert (output / "throughput.png").stat().st_size > 10_000
    assert len(results["summary"]) == 4 * len((*OURS, *THEIRS))
    assert printed.count("| shared_prefix | ") == 4
    assert results["machine"]["smoke"] and "no measurement" in printed
    # a wheel for CUDA from the package index says +cu130 of itself, and its metadata do not
    assert results["machine"]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    [trace] = results["traces"]
    assert set(trace["shares"]) == set(step_trace.KINDS)  # gaps are a GPU's
    assert sum(trace["shares"].values()) == pytest.approx(1)
    assert all(share > 0 for share in trace["shares"].values())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_measured_survives_a_kill(tmp_path, number):
    process = smoke(tmp_path, "--contestants", "shared_prefix", "packed")
    lines = tmp_path / gpu_report.LINES
    started = time.monotonic()
    while not (lines.exists() and '"measured"' in lines.read_text()):
        assert process.poll() is None and time.monotonic() - started < 600
        time.sleep(0.01)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=600)  # at its end nobody holds its output: the contestants have ended too
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGTERM:  # it still draws by itself
        assert "| shared_prefix | " in printed and (tmp_path / "throughput.png").exists()
    with lines.open("a") as file:
        file.write('{"kind": "meas')  # what a kill in the middle of a line leaves
    (tmp_path / "throughput.png").unlink(missing_ok=True)
    rows = gpu_report.report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summary"] and {row["kind"] for row in rows} >= {"machine", "agreement", "measured"}
    assert (tmp_path / "throughput.png").exists()


def test_a_report_of_nothing_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="name a folder that --profile gpu wrote to"):
        gpu_report.report(tmp_path)
    (tmp_path / gpu_report.LINES).write_text('{"kind": "mach')
    with pytest.raises(UserError, match="names no machine"):
        gpu_report.report(tmp_path)


def test_without_a_gpu_the_profile_says_so(tmp_path, capsys):
    assert gpu_profile.run(SimpleNamespace(smoke=False, trace=False), tmp_path) == 1
    assert "--smoke" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_the_minutes_do_not_suffice_for_is_left_out_by_name(tmp_path, capsys):
    args = BenchmarkArgs(smoke=True, minutes=0.0, contestants=("packed", "TRL"))
    assert gpu_profile.run(args, tmp_path) == 0
    printed = capsys.readouterr().out
    for name in ("packed", "TRL"):
        assert f"left out: tiny, {name}, all of it: the 0 minutes were used up" in printed
    with pytest.raises(UserError, match="--contestants bagged: there is none of that name"):
        gpu_profile.run(BenchmarkArgs(smoke=True, contestants=("bagged",)), tmp_path)


def test_medians_and_ratios_of_a_report():
    machine = {"peak_tflops": 2.0}
    line = {
        "kind": "measured", "shape": "1B", "workload": "w", "pairs_per_step": 4, "recompute": False, "tokens_per_second": 1.0,
        "distinct_tokens_per_second": 1.0, "step_seconds": 1.0, "padding": 0.0, "mfu": 0.5, "peak_gib": 1.0,
        "reserved_gib": None, "flops_per_second": 1e12,
    }  # fmt: skip
    rows = [
        line | {"contestant": name, "pairs_per_second": speed}
        for name, speeds in (("TRL", (1.0, 3.0)), ("packed", (4.0, 5.0, 9.0)))
        for speed in speeds
    ]
    packed, trl = gpu_report.summarise(rows, machine)
    assert (packed["contestant"], packed["pairs_per_second"], packed["rounds"]) == ("packed", 5.0, 3)
    assert (packed["slowest"], packed["fastest"], packed["over TRL"]) == (4.0, 9.0, 2.5)
    assert packed["over TRL bfloat16"] is None and packed["reserved_gib"] is None
    assert trl["mfu_of_card"] == 0.5
    assert gpu_report.summarise(rows, {"peak_tflops": None})[0]["mfu_of_card"] is None


# ---------------------------------------------------------------- TRL on a GPU

LIGER_OF_TRL = """
import json, os
os.environ.pop("DS_ACCELERATOR", None)
from benchmarks.contestant import LIGER
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.integrations.liger import apply_liger_kernel

def keeps_forward(config):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_key_value_heads=2, num_labels=1))
    apply_liger_kernel(model, config)
    layer = model.model.layers[0]
    assert "Liger" in type(layer.mlp).__name__ or "liger" in layer.mlp.forward.__func__.__module__
    return model.forward.__func__ is LlamaForSequenceClassification.forward

ours, default = keeps_forward(LIGER), keeps_forward(None)
import benchmarks.throughput
print(json.dumps([ours, default, os.environ["DS_ACCELERATOR"]]))
"""


def test_liger_in_trl_keeps_the_classifiers_forward_and_the_accelerator_is_what_torch_has(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")  # a driver without a GPU that torch could use
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert in_a_process(LIGER_OF_TRL) == [True, False, "cpu"]


# ---------------------------------------------------------------- what the figures rest on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_agree_or_it_is_an_error(tmp_path, monkeypatch, dtype):
    made = [loads.conversations(8, seed=1)]
    tokenizer = loads.make_tokenizer(made)
    differences = agreement.check_layouts(made, tokenizer, tmp_path, dtype)
    assert differences["conversations"] <= agreement.TOLERANCE[dtype]
    for wrong in (1.1 * agreement.TOLERANCE[dtype], math.nan):
        rewards = {"padded": torch.zeros(2), "packed": torch.zeros(2), "shared_prefix": torch.tensor([0.0, wrong])}
        monkeypatch.setattr(agreement, "_rewards", lambda layout, *_, rewards=rewards: rewards[layout])
        with pytest.raises(agreement.LayoutsDiffer, match="apart"):
            agreement.check_layouts(made, tokenizer, tmp_path, dtype)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("Intel(R) Xeon(R) Processor, 2 cores", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name_or_absent(name, tflops):
    assert card.peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def event(name: str, start: float, end: float, *, gpu: bool, is_range: bool = False):
    device = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=is_range)


def test_shares_of_a_step_on_a_gpu_count_overlapping_kernels_once_and_gaps():
    on_cpu = [event(step_trace.STEP, 0, 1000, gpu=False), event(step_trace.UPDATE, 700, 1000, gpu=False)]
    on_gpu = [
        event(step_trace.STEP, 0, 1000, gpu=True, is_range=True),  # drawn over the device too, and no work
        event("Optimizer.step#AdamW.step", 700, 900, gpu=True, is_range=True),
        event("sm90_xmma_gemm_bf16", 100, 300, gpu=True),
        event("nvjet_hsh_128x256", 250, 400, gpu=True),  # 50 at the same time as the first
        event("pytorch_flash::flash_bwd_kernel<cutlass...>", 400, 500, gpu=True),
        event("_rms_norm_forward_kernel", 500, 550, gpu=True),
        event("multi_tensor_apply_kernel", 700, 900, gpu=True),
        event("sm90_xmma_gemm_bf16", 1200, 1300, gpu=True),  # after the step
    ]
    work = step_trace.work_in([*on_cpu, *on_gpu], on_gpu=True)
    shares = step_trace.shares_of(work, 1e-3, on_gpu=True)
    expected = {
        "matrix products": 0.35,
        "attention": 0.1,
        "optimizer": 0.2,
        "elementwise and the rest": 0.05,
        "gaps": 0.35,
    }
    assert shares == pytest.approx(expected)


def test_the_cost_of_attention_is_measured_at_every_length():
    [(name, factors)] = attention_cost.main(attention_cost.AttentionCostArgs(smoke=True)).items()
    assert name == "tiny" and list(factors) == [16, 64, 256]
    assert all(0 < factor < math.inf for factor in factors.values())


def test_toy_runs_judge_by_losses_and_by_the_reload_check():
    right = {"name": "x", "why": None, "losses": [0.7, 0.6], "reload": "reload check: ..."}
    assert toy_runs.judged(right | {"losses": [0.69, 0.62]}, right)["why"] is None
    assert "in float32 on the CPU" in toy_runs.judged(right | {"losses": [0.7, 0.64]}, right)["why"]
    assert "in float32 on the CPU" in toy_runs.judged(right | {"losses": [0.7, math.nan]}, right)["why"]
    assert "1 losses" in toy_runs.judged(right | {"losses": [0.7]}, right)["why"]
    assert toy_runs.judged(right | {"why": "ended with status 1"}, right)["why"] == "ended with status 1"


def test_judging_is_measured_in_a_process_of_its_own():
    [(pairs, seconds, memory)] = judging.main(judging.JudgingArgs(pairs=(200,), characters=60))
    assert pairs == 200 and seconds > 0 and 50 < memory < 2_000


# ---------------------------------------------------------------- scripts/gpu_check.sh


def gpu_check(folder, **variables: str) -> subprocess.CompletedProcess:
    environment = environment_of_a_process() | {"PYTHON": sys.executable, "OUT": str(folder / "out")} | variables
    command = ["bash", str(REPOSITORY / "scripts" / "gpu_check.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_gpu_check_refuses_a_machine_without_a_gpu_in_one_sentence(tmp_path):
    done = gpu_check(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "sees no GPU" in done.stderr and "SMOKE=1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gpu_check_lists_its_parts_in_order_and_within_14_minutes(tmp_path):
    done = gpu_check(tmp_path, DRY="1")
    names = [line.split(",")[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and names == ["tests", "recipe", "profile", "attention"]
    seconds = [int(line.split(" s: ")[0].rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert sum(seconds) <= 14 * 60
    assert "-m pytest -m gpu" in done.stdout and "--smoke" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_gpu_check_goes_on_after_a_failure_and_ends_with_its_status(tmp_path):
    python = tmp_path / "python"  # fails as `-m pytest`, is well in all else
    python.write_text('#!/bin/sh\n[ "$2" = pytest ] && echo "2 failed" && exit 1\necho "ran $*"\n')
    python.chmod(0o755)
    done = gpu_check(tmp_path, PYTHON=str(python), SMOKE="1")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    verdicts = [line.split()[:2] for line in summary.splitlines() if line.startswith(("passed", "FAILED"))]
    assert verdicts == [["FAILED", "tests:"], ["passed", "recipe"], ["passed", "profile"], ["passed", "attention"]]
    assert "2 failed" in (tmp_path / "out" / "tests.log").read_text()
    assert "ran -m benchmarks.throughput --profile gpu" in (tmp_path / "out" / "profile.log").read_text()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP])
def test_gpu_check_that_is_interrupted_leaves_nothing_running(tmp_path, signal_number):
    """`timeout` has a group of its own; what it started would keep the GPU."""
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = pytest ] || exit 0\necho $$ > {pid}.new && mv {pid}.new {pid}\nexec sleep 300\n'
    )
    python.chmod(0o755)
    environment = environment_of_a_process() | {"PYTHON": str(python), "SMOKE": "1", "OUT": str(tmp_path / "out")}
    command = ["bash", REPOSITORY / "scripts" / "gpu_check.sh"]
    heard = functools.partial(signal.signal, signal_number, signal.SIG_DFL)  # bash cannot trap what nohup has it ignore
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, preexec_fn=heard)
    while not pid.exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal_number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and b"interrupted; what was measured is in" in said
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ONLY": "nonsense"}, "the parts are tests, recipe, profile and attention"),
        ({"PROFILE_SECONDS": "abc"}, "seconds of a part are a number of 1 or more, not 'abc'"),
        ({"PYTHON": "/no/such"}, "PYTHON=/no/such cannot import torch"),
    ],
)
def test_gpu_check_refuses_what_it_cannot_do(tmp_path, variables, sentence):
    done = gpu_check(tmp_path, **variables)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and sentence in done.stderr


def test_pairs_behind_a_header_begin_with_it_and_are_the_same_behind_it():
    plain = [loads.conversations(4, seed=1), loads.many_answers(4, seed=1)]
    tokenizer = loads.make_tokenizer([*plain, loads.Workload("header", [{"text": headers.POLICY}], False)])
    for load, field in zip(plain, ("chosen", "prompt"), strict=True):
        behind = loads.behind(load, headers.POLICY, 100, tokenizer)
        for row, before in zip(behind.rows, load.rows, strict=True):
            header = row[field].removesuffix(before[field])
            assert len(tokenizer(header, add_special_tokens=False)["input_ids"]) == 100
            assert headers.POLICY.startswith(header)
