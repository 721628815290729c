"""What a measurement was made on: the device, what it may draw, the versions of what ran, and what its maker promises."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

# Dense bfloat16 TFLOP/s with float32 sums, by what torch.cuda.get_device_name says; a longer name goes before a shorter one.
# NVIDIA's data sheets (H100, H200, A100, GH200, L40S, L4, Ada for the RTX 4090; B200 from the HGX page), half of the figures
# that they give "with sparsity".
PEAK_TFLOPS = {
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200 NVL": 835.5,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "trl",
    "liger-kernel",
    "accelerate",
    "triton",
    "flash-attn",
    "torchao",
)


def name() -> str:
    """The device's name; of a CPU with its cores and torch's version."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models_of_cpu = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models_of_cpu[0] if models_of_cpu else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}"


def peak_flops(card: str) -> float | None:
    """FLOP/s of dense bfloat16 products that the maker states; None for a card that PEAK_TFLOPS does not know."""
    words = card.split()
    for known, tflops in PEAK_TFLOPS.items():
        # as whole words, so that an L4 is no L40; "A100-SXM4-80GB" begins with its name
        first, *rest = known.split()
        for start, word in enumerate(words):
            if word.partition("-")[0] == first and words[start + 1 : start + 1 + len(rest)] == rest:
                return tflops * 1e12
    return None


def facts() -> dict:
    """Card, memory, power cap and driver (nvidia-smi), versions. What is not there is None."""
    on_gpu = torch.cuda.is_available()
    smi = _nvidia_smi() if on_gpu else {}
    return {
        "name": name(),
        "peak_tflops": (peak_flops(name()) or 0) / 1e12 or None,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
        "power_cap_watts": smi.get("power.limit"),
        "driver": smi.get("driver_version"),
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def describe(known: dict) -> str:
    """One line."""
    parts = [known["name"]]
    if known["power_cap_watts"]:
        parts.append(f"power cap {known['power_cap_watts']}")
    if known["driver"]:
        parts.append(f"driver {known['driver']}")
    versions = [f"{package} {version}" for package, version in known["versions"].items() if version]
    return ", ".join(parts + [version for version in versions if version not in known["name"]])


def _nvidia_smi() -> dict[str, str]:
    fields = ("power.limit", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = done.stdout.strip().splitlines()[:1]
    return dict(zip(fields, (part.strip() for part in first[0].split(",")), strict=True)) if first else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
