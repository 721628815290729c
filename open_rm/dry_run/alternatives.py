"""The same run under each DeepSpeed file of configs/ds: whether it fits, and which one to take."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from open_rm.dry_run.memory import Fitted, Needs, fitted
from open_rm.dry_run.sizes import Planned
from open_rm.dry_run.target import Target
from open_rm.dry_run.told import Told, size, thousands
from open_rm.flags import AdapterFlags, BatchFlags
from open_rm.training import ds_config

FOLDER = Path("configs/ds")
# From what sends least to what sends most; of those that fit, an earlier one is faster.
FILES = ("zero0.json", "zero2.json", "zero3_hpz.json", "zero3.json", "zero3_offload.json")
HOST_BYTES = 16  # of a weight: float32 masters, gradients and moments
OFFLOADED = "zero3_offload.json"


@dataclass(frozen=True)
class Alternative:
    """file: below configs/ds.  found: None where the run cannot have it, and why_not says it."""

    file: str
    found: Fitted | None
    why_not: str = ""


def alternatives(
    flags: BatchFlags, needs: Needs, model: Planned, optim: str, target: Target, *, share: int, adapter: AdapterFlags
) -> list[Alternative]:
    """All files. share: most positions that a device has in a step."""
    where = Path(__file__).parents[2] / FOLDER
    done: list[Alternative] = []
    for file in FILES:
        if not (where / file).is_file():
            continue
        how = {"width": model.model.width, "bf16": target.bf16, "max_grad_norm": 1.0, "world_size": target.world_size}
        config = ds_config.fill_config(dataclasses.replace(flags, deepspeed=str(where / file)), **how)
        zero, why_not = config["zero_optimization"], ""
        if adapter.load_in_4bit and zero["stage"] == 3:
            why_not = "4-bit weights cannot be divided"
        elif optim == "adafactor" and zero["stage"]:
            why_not = "Adafactor needs whole matrices"
        elif file == "zero3_hpz.json" and zero.get(ds_config.HPZ, 1) == 1:
            why_not = "one node: the same as zero3.json"
        elif file == "zero0.json" and target.bf16 and target.world_size > 1:
            why_not = "bfloat16 on several devices: the same as zero2.json"
        found = None if why_not else fitted(needs, model, config, optim, target, share=share)
        done.append(Alternative(file, found, why_not))
    return done


def recommended(options: list[Alternative]) -> Alternative | None:
    """Of those that fit the one with least to compute again, the earliest of equal ones; one that offloads only where no other
    fits."""
    fit = [option for option in options if option.found is not None and option.found.fits]
    on_device = [option for option in fit if option.file != OFFLOADED]
    return min(on_device or fit, key=lambda option: option.found.recomputed, default=None)


def told(options: list[Alternative], model: Planned) -> Told:
    """A table, and the one to take."""
    lines = [f"{'configs/ds/':20s}{'fits':6s}{'at the peak':>12s}{'computed again':>16s}{'positions':>11s}"]
    for option in options:
        found = option.found
        if found is None:
            lines.append(f"{option.file:20s}-     {option.why_not}")
            continue
        again = f"{found.recomputed}/{found.layers} layers"
        lines.append(
            f"{option.file:20s}{'yes' if found.fits else 'no':6s}{size(found.peak):>12s}{again:>16s}"
            f"{thousands(found.fit.max_tokens):>11s}"
        )
    best = recommended(options)
    if best is None:
        lines.append("none fits: take more devices, a smaller model, --use_peft, or shorter sequences")
    else:
        why = "; nothing else fits, and it is much slower" if best.file == OFFLOADED else ""
        lines.append(f"take --deepspeed {FOLDER / best.file}{why}")
    host = (HOST_BYTES + model.sizes.itemsize) * model.sizes.trained
    lines.append(f"{OFFLOADED} takes {size(host)} of the hosts' memory, all together")
    rows = [_row(option) | {"recommended": option is best} for option in options]
    return Told("alternatives", lines, rows)


def _row(option: Alternative) -> dict:
    found, row = option.found, {"file": str(FOLDER / option.file), "why_not": option.why_not or None}
    if found is None:
        return row | {"fits": None}
    row |= {"stage": found.stage, "fits": found.fits, "peak_bytes": found.peak, "recompute_every": found.fit.every}
    return row | {"recomputed_layers": found.recomputed, "max_tokens_per_micro_batch": found.fit.max_tokens}
