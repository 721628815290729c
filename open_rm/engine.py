"""DeepSpeed behind a few verbs, on one process or many, on CPU (gloo) or GPU (nccl).

What it adds to DeepSpeed is exactness: gradients are summed, not averaged, over ranks and micro-batches, so the loss
that the recipe divides by the pairs of the whole step is the loss that is stepped on.
What is not covered here: saving and resuming the engine's own state.
"""

import contextlib
import ctypes
import json
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

# DeepSpeed reads this when it is imported; without a GPU it would otherwise probe for one and warn.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from open_rm.errors import UserError

# Tokenizing a large data set on one rank may take long; the others wait for it in a collective.
COLLECTIVE_TIMEOUT = timedelta(hours=4)
WAITING_SECONDS = 60.0
GROUP_OF_ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
# Keys a DeepSpeed file may not decide, because a flag does.
OWNED_BY_FLAGS = {
    "optimizer": "--learning_rate, --eps and --weight_decay",
    "scheduler": "--lr_scheduler_type",
    "train_batch_size": "--per_device_train_batch_size and --gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "torch_autocast": "--dtype",
    "data_types": "--dtype",
}


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. device: the torch device it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment_rank() -> int:
    """This process's rank before any process group exists, as torchrun set it."""
    return int(os.environ.get("RANK", 0))


def start_ranks() -> Ranks:
    """Join the process group that torchrun described in the environment; alone, form a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(GROUP_OF_ONE, MASTER_PORT=str(port))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
        # DeepSpeed would compile a helper that only its inference calls, and wait for ever for the lock of a run that
        # was killed while it compiled.
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


def _keep_freed_memory() -> None:
    """Let glibc reuse the large blocks that each step frees, instead of giving them back and having them zeroed again.

    About a tenth of a CPU step was page faults. Elsewhere than under glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is kept


def stop_ranks() -> None:
    """Leave the process group. Exiting without it ends some runs with a signal on their way out."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    if os.environ.get("WORLD_SIZE") == "1":  # what start_ranks set would lead child processes to this group
        for name in (*GROUP_OF_ONE, "MASTER_PORT"):
            os.environ.pop(name, None)


def broadcast_object(value: Any) -> Any:
    """The main rank's value on every rank (it is pickled: small things only)."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main_rank(work: Callable[[], Any], ranks: Ranks) -> Any:
    """Run `work` on the main rank only; None elsewhere.

    A user's mistake found there is told once, by the main rank, and ends the others too instead of leaving them waiting.
    """
    result, mistake = None, None
    if ranks.is_main:
        try:
            result = work()
        except UserError as error:
            mistake = error
    with _said_while_waiting(ranks):
        failed = broadcast_object(mistake is not None)
    if failed:
        raise mistake or SystemExit(1)
    return result


@contextlib.contextmanager
def _said_while_waiting(ranks: Ranks):
    """Ranks that wait for the main one for long say so, every WAITING_SECONDS; COLLECTIVE_TIMEOUT ends it."""
    over = threading.Event()

    def say() -> None:
        started = time.monotonic()
        while not over.wait(WAITING_SECONDS):
            waited = time.monotonic() - started
            print(f"[rank {ranks.rank}] waiting for the main rank, {waited:.0f} s so far", file=sys.stderr, flush=True)

    if not ranks.is_main:
        threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def main_rank_first(build: Callable[[], Any], ranks: Ranks) -> Any:
    """Run `build` on the main rank, then on one rank of each other node, then on all: they find what it left in the cache."""
    result = on_main_rank(build, ranks)
    first_of_node = not ranks.is_main and ranks.local_rank == 0
    if first_of_node:
        result = build()
    with _said_while_waiting(ranks):
        dist.barrier()
    return result if ranks.is_main or first_of_node else build()


def fail_together(sentence: str, ranks: Ranks) -> NoReturn:
    """End the run for a reason that every rank knows; the main rank tells it."""
    raise UserError(sentence) if ranks.is_main else SystemExit(1)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held, in GiB: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def read_config(path: str | None) -> dict:
    """A DeepSpeed JSON file that decides memory layout only; None is ZeRO stage 0."""
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--deepspeed {path}: cannot be read ({error.strerror}); see configs/ds/ for examples"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed {path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(
            f"--deepspeed {path}: must hold a JSON object with zero_optimization; see configs/ds/ for examples"
        )
    for key, flags in OWNED_BY_FLAGS.items():
        if not _is_auto(config.pop(key, "auto")):
            raise UserError(
                f'--deepspeed {path}: "{key}" is decided by {flags}; remove it from the file or write "auto"'
            )
    zero = {name: value for name, value in config.get("zero_optimization", {}).items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValueError, TypeError) as error:
        what = " ".join(str(error).split())[:160]
        raise UserError(f"--deepspeed {path}: DeepSpeed refuses zero_optimization ({what})") from error
    return config | {"zero_optimization": {"stage": 0} | config.get("zero_optimization", {})}


def _is_auto(value: object) -> bool:
    """Whether a value is left to us: "auto", a block that is switched off, or a block in which all but its type is."""
    if not isinstance(value, dict):
        return value == "auto"
    if "enabled" in value:
        return value["enabled"] in ("auto", False)
    parts = [part for name, part in value.items() if name != "type"]
    return bool(parts) and all(map(_is_auto, parts))


def fill_config(
    config: dict, *, width: int, bf16: bool, per_device_train_batch_size: int, max_grad_norm: float
) -> dict:
    """The DeepSpeed config with what the flags decide.

    Args:
        config: from `read_config`; its "auto" bucket sizes follow the model's `width` (hidden size).
        bf16: bfloat16 weights and compute with float32 master weights; else everything in float32.
        max_grad_norm: clip the global gradient norm to this, 0 for never.
    """
    zero = dict(config.get("zero_optimization", {}))
    automatic = {  # the sizes that transformers' own DeepSpeed integration derives
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero.update({key: value for key, value in automatic.items() if zero.get(key) == "auto"})
    if bf16 and zero.get("stage", 0) == 0:
        # DeepSpeed's stage 0 would sum gradients and their norm in bfloat16; stage 1 on one rank holds the same bytes.
        zero["stage"] = 1
    return config | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # the loop accumulates itself: see Engine.backward
        "gradient_clipping": max_grad_norm,  # DeepSpeed clips to 1.0 where this is absent
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # with offload too: torch's fused AdamW is as fast on the CPU as DeepSpeed's own, which has to be compiled first
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def matmul_flops(ranks: Ranks, bf16: bool) -> float:
    """FLOPs a second of plain matrix products on all devices together: the peak that mfu is a share of.

    Measured, not looked up: the fastest of a few products of n x n matrices, n = 8192 on a GPU, 2048 on the CPU.
    """
    on_gpu, n = ranks.device.type == "cuda", 8192 if ranks.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=ranks.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    times = []
    while len(times) < 2 or (len(times) < 9 and sum(times[1:]) < 0.5):  # a slow machine shows its rate soon enough
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    rate = torch.tensor([2 * n**3 / min(times)], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(rate)
    return rate.item()


def describe(config: dict, ranks: Ranks) -> str:
    """One line on where and how the run computes; `config` is from `fill_config`."""
    dtype = "bfloat16 with float32 master weights" if config["bf16"]["enabled"] else "float32"
    stage = config["zero_optimization"].get("stage", 0)
    return f"{ranks.world_size} x {ranks.device.type}, {dtype}, ZeRO stage {stage}"


class Engine:
    """A model being trained. Call it for rewards; `backward` each micro-batch, then `step`."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        config: dict,
        ranks: Ranks,
        learning_rate: float,
        eps: float,
        weight_decay: float,
        optim: str = "adamw",
    ):
        """Wrap `model`; `config` is from `fill_config`. `optimizer` is the one whose learning rate a schedule sets."""
        self.ranks = ranks
        self.stage = config["zero_optimization"].get("stage", 0)
        self.optimizer = _optimizer(optim, model, learning_rate, eps, weight_decay)
        self._clip_to = config["gradient_clipping"] if self.stage == 0 else 0.0
        own = {"gradient_clipping": 0.0} if self.stage == 0 else {}
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config | own)
        if self.stage == 0 and ranks.world_size == 1:
            # One rank has nothing to sum, and DeepSpeed would copy all gradients into a buffer and back for it.
            self._engine.enable_backward_allreduce = False

    @property
    def module(self) -> torch.nn.Module:
        """The model inside."""
        return self._engine.module

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` to the step's. `last`: this is the step's last micro-batch.

        DeepSpeed averages gradients over ranks; multiplying by their number makes it the sum.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update the weights, clear the gradients. Returns the global gradient norm before clipping."""
        norm = self._clip() if self.stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _clip(self) -> float:
        # ZeRO's optimizers clip and report the norm; plain data-parallel training reports none, every rank has all
        # gradients, and the norm that is wanted anyway serves for clipping.
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if 0 < self._clip_to < norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_to, norm)
        return norm.item()

    @contextlib.contextmanager
    def evaluating(self):
        """Evaluation mode without gradients; back to training mode afterwards."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """The complete weights on the main rank's CPU, None elsewhere. A collective call."""
        if self.stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict()
        else:
            state = self.module.state_dict()
        if not self.ranks.is_main:
            return None
        return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _optimizer(optim: str, model, learning_rate, eps, weight_decay) -> torch.optim.Optimizer:
    """Biases and norms are not decayed (the field's convention, as in transformers).

    optim: adamw; adamw_8bit, bitsandbytes' with moments in blocks of 8 bits (https://arxiv.org/abs/2110.02861); adafactor,
        torch's with moments by rows and columns (https://arxiv.org/abs/1804.04235).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # ds_shape: under ZeRO-3 p itself is an empty stand-in
    decayed = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if optim == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, eps=eps)
    if optim == "adafactor":
        return torch.optim.Adafactor(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, eps=eps, fused=True)
