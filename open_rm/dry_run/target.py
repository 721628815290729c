"""Which devices a dry run plans for: those that the flags name, or this machine's own."""

import os
from dataclasses import dataclass

import torch

from open_rm.dry_run.told import GIB, Told, size
from open_rm.flags import DryRunFlags
from open_rm.model.kernels import capability_of
from open_rm.model.loading import compute_dtype
from open_rm.training.memory import limits_of_control_groups

# Beside tensors. A GPU: CUDA's context and libraries, and NCCL's buffers where there are several. A process on a CPU: Python and
# all imports, and what DeepSpeed and gloo take when they start; benchmarks/memory_estimate.py prints both.
CUDA, NCCL = int(0.6 * GIB), int(0.9 * GIB)
PROCESS = int(0.5 * GIB)


@dataclass(frozen=True)
class Target:
    """world_size: devices.  group: of sequence_parallel_size.  memory: bytes of each.  capability: a GPU's, where one is here.
    framework: bytes that are taken before there is a tensor."""

    world_size: int
    group: int
    on_gpu: bool
    dtype: torch.dtype
    memory: int
    capability: tuple[int, int] | None
    lines: list[str]

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    @property
    def framework(self) -> int:
        return (CUDA + NCCL * (self.world_size > 1)) if self.on_gpu else PROCESS

    def told(self) -> Told:
        kind = "GPU" if self.on_gpu else "CPU"
        numbers = {"devices": self.world_size, "device": kind, "memory_bytes_per_device": self.memory}
        numbers |= {"dtype": str(self.dtype).removeprefix("torch."), "sequence_parallel_size": self.group}
        return Told("planned_for", self.lines, numbers)


def target_of(flags: DryRunFlags, *, dtype: str, group: int) -> Target:
    """The devices that are planned for. dtype: --dtype.  group: --sequence_parallel_size."""
    world_size = flags.world_size or int(os.environ.get("WORLD_SIZE", 1))
    given = flags.device_memory_gib
    gpu_here = torch.cuda.is_available()
    device = torch.device("cuda" if given is not None or gpu_here else "cpu")
    capability = capability_of(device) if given is None and gpu_here else None
    if given is not None:
        memory, where = int(given * GIB), "--device_memory_gib"
    elif gpu_here:
        memory, where = torch.cuda.mem_get_info(device)[1], f"this machine's {torch.cuda.get_device_name(device)}"
    else:
        memory, where = _memory_of_machine() // world_size, "this machine has no GPU"
    computed = compute_dtype(dtype, device)
    name = "bfloat16 with float32 masters" if computed == torch.bfloat16 else "float32"
    kind = "GPU" if device.type == "cuda" else "CPU process"
    plural = ("es" if kind == "CPU process" else "s") if world_size > 1 else ""
    lines = [f"{world_size} {kind}{plural} of {size(memory)} each ({where}), {name}"]
    if group > 1:
        lines.append(f"{group} devices compute a sequence together: {world_size // group} groups")
    if given is None:
        what = "GPUs" if device.type == "cpu" else "others"
        lines.append(f"for {what}: --device_memory_gib 80, and --world_size N for N of them")
    return Target(world_size, group, device.type == "cuda", computed, memory, capability, lines)


def _memory_of_machine() -> int:
    """Bytes of this machine, or of the container that this process is in."""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits_of_control_groups())
