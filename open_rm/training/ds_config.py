"""DeepSpeed's own settings: a JSON file that decides memory layout only, and what the flags decide, in one dict.

DeepSpeed is imported only to have a named file checked, since that takes seconds.
"""

import json
import os
from pathlib import Path

from open_rm.errors import UserError
from open_rm.flags import BatchFlags

# Keys that a file may not decide, because a flag does.
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
HPZ = "zero_hpz_partition_size"
# Those whose "auto" follows from the model's width, and from the devices of a node.
FILLED = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", HPZ)
# The other parts of ZeRO++.
ROUNDING = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
USUAL_NODE = 8  # devices, where no launcher says how many a node has


def read_config(path: str | None) -> dict:
    """The file's settings; None is ZeRO stage 0.

    Raises:
        UserError: the file cannot be read, decides what a flag decides, or is refused by DeepSpeed.
    """
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
    _check_values(path, config.get("zero_optimization", {}))
    _check_with_deepspeed(path, config.get("zero_optimization", {}))
    return config | {"zero_optimization": {"stage": 0} | config.get("zero_optimization", {})}


def _check_values(path: str, zero: dict) -> None:
    """Values that DeepSpeed takes now and trips over later."""
    if zero.get("stage", 0) not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        raise UserError(f'--deepspeed {path}: "stage" is {zero["stage"]!r}; it must be a number, 0, 1, 2 or 3')
    for key in ROUNDING:
        if zero.get(key):
            raise UserError(
                f'--deepspeed {path}: "{key}" rounds numbers to 8 bits or fewer, so that rewards and gradients would not be those '
                f"of the flags; remove it ({HPZ}, which rounds nothing, may stay)"
            )
    node = zero.get(HPZ, 1)
    if node != "auto" and (not isinstance(node, int) or isinstance(node, bool) or node < 0):
        raise UserError(f'--deepspeed {path}: "{HPZ}" is {node!r}; it must be a number of devices, or "auto"')
    if node not in (0, 1) and zero.get("stage", 0) != 3:
        raise UserError(
            f'--deepspeed {path}: "{HPZ}" is of ZeRO stage 3, and stage {zero.get("stage", 0)} divides no weights; set "stage" '
            "to 3, or remove it"
        )
    for key, value in zero.items():
        inside = value.values() if isinstance(value, dict) else ()
        if "auto" in (value, *inside) and key not in FILLED:
            raise UserError(
                f'--deepspeed {path}: "{key}" is "auto", which only {", ".join(FILLED)} can be; give a value, or leave it out'
            )


def _is_auto(value: object) -> bool:
    """Whether a value is left to us: "auto", a block that is switched off, or a block in which all but its type is."""
    if not isinstance(value, dict):
        return value == "auto"
    if "enabled" in value:
        return value["enabled"] in ("auto", False)
    parts = [part for name, part in value.items() if name != "type"]
    return bool(parts) and all(map(_is_auto, parts))


def _check_with_deepspeed(path: str, zero: dict) -> None:
    from open_rm import ranks  # noqa: F401 - says which device DeepSpeed is for, before it is imported

    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # isort: skip

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except (ValueError, TypeError) as error:
        what = " ".join(str(error).split())[:160]
        raise UserError(f"--deepspeed {path}: DeepSpeed refuses zero_optimization ({what})") from error


def node_partition(path: str | None, zero: dict, world_size: int) -> int:
    """Devices that hold a second copy of all weights among them (ZeRO++'s hierarchical partitioning,
    https://arxiv.org/abs/2306.10209, section 4.2); 1 for none.

    Weights are then gathered over the network once a step, in its first forward pass, and from then on inside a node.
    "auto" is the devices of a node. Where that is all of them the copy would be what each device holds anyway.

    Args:
        zero: zero_optimization of the file `path`.

    Raises:
        UserError: the nodes do not divide so.
    """
    wanted, node = zero.get(HPZ) or 1, int(os.environ.get("LOCAL_WORLD_SIZE", min(USUAL_NODE, world_size)))
    size = node if wanted == "auto" else wanted
    if world_size % size:
        raise UserError(
            f'--deepspeed {path}: "{HPZ}" is {size}, which does not divide the {world_size} devices of the run; give the number '
            "of devices on a node"
        )
    if size % node and node % size:
        raise UserError(
            f'--deepspeed {path}: "{HPZ}" is {size}, and nodes have {node} devices: some copies would lie across two nodes; give '
            f"{node}"
        )
    return 1 if size == world_size else size


def fill_config(flags: BatchFlags, *, width: int, bf16: bool, max_grad_norm: float, world_size: int = 1) -> dict:
    """All of DeepSpeed's settings: those of the file `flags.deepspeed`, and what flags decide.

    Args:
        width: the model's hidden size, which "auto" bucket sizes follow.
        bf16: bfloat16 weights and compute with float32 master weights; else everything in float32.
        max_grad_norm: clip the global gradient norm to this, 0 for never.
        world_size: number of devices.
    """
    config = read_config(flags.deepspeed)
    zero = dict(config["zero_optimization"])
    layer = 12 * width * width  # about the weights of one decoder layer
    automatic = {
        # transformers derives width^2, less than a third of an MLP matrix: many small messages, and the next layer's weights
        # would not be on their way while this one computes
        "reduce_bucket_size": layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": 10 * width,
    }
    if HPZ in zero:
        zero[HPZ] = node_partition(flags.deepspeed, zero, world_size)
    zero.update({key: value for key, value in automatic.items() if zero.get(key) == "auto"})
    if bf16 and zero["stage"] == 0:
        # DeepSpeed's stage 0 would sum gradients and their norm in bfloat16. Stage 1 on one rank holds the same bytes; on
        # several it would keep all gradients in float32 on each (8B: 30 GiB) and send them after the backward pass.
        zero = {"contiguous_gradients": True, "overlap_comm": True, "reduce_bucket_size": layer} | zero
        zero["stage"] = 1 if world_size == 1 else 2
    return config | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": flags.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,  # the loop accumulates itself: see Engine.backward
        "gradient_clipping": max_grad_norm,  # DeepSpeed clips to 1.0 where this is absent
        # immediate: stage 1 adds each gradient to the float32 sum as it comes, and keeps no bfloat16 one beside it
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # with offload too: torch's fused AdamW is as fast on the CPU as DeepSpeed's own, which has to be compiled first
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before every forward
    }


def describe(config: dict, device_type: str, world_size: int) -> str:
    """One line on where and how the run computes; `config` is from `fill_config`."""
    dtype = "bfloat16 with float32 master weights" if config["bf16"]["enabled"] else "float32"
    zero = config["zero_optimization"]
    line = f"{world_size} x {device_type}, {dtype}, ZeRO stage {zero['stage']}"
    if zero.get(HPZ, 1) > 1:
        line += f", a copy of the weights on every {zero[HPZ]} devices"
    return line
