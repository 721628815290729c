"""The same run under each DeepSpeed file of configs/ds: whether it fits, and which one to take."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from open_rm.dry_run.memory import Fitted, Needs, fitted
from open_rm.dry_run.sizes import Planned
from open_rm.dry_run.target import Target
from open_rm.dry_run.told import Told, size, thousands
from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, BatchFlags
from open_rm.training import ds_config, footprint

FOLDER = Path("configs/ds")
# From what sends least to what sends most; of those that fit, an earlier one is faster.
FILES = ("zero0.json", "zero2.json", "zero3_hpz.json", "zero3.json", "zero3_offload.json")
MASTER_AND_GRADIENT = 4 + 4  # bytes of a trained weight on the host, beside moments and the weight itself
OFFLOADED = "zero3_offload.json"


@dataclass(frozen=True)
class Alternative:
    """file: below configs/ds.  found: None where the run cannot have it, and why_not says it.  node: devices that hold a copy of
    all weights among them (ds_config.node_partition)."""

    file: str
    found: Fitted | None
    why_not: str = ""
    node: int = 1


def alternatives(
    flags: BatchFlags, needs: Needs, model: Planned, optim: str, target: Target, *, share: int, adapter: AdapterFlags
) -> list[Alternative]:
    """All files. share: most positions that a device has in a step."""
    where = Path(__file__).parents[2] / FOLDER
    done: list[Alternative] = []
    for file in FILES:
        how = {"width": model.model.width, "bf16": target.bf16, "max_grad_norm": 1.0, "world_size": target.world_size}
        try:
            config = ds_config.fill_config(dataclasses.replace(flags, deepspeed=str(where / file)), **how)
        except UserError as error:  # of this file alone, which the run need not take
            why = str(error).partition(f"{where / file}: ")[2]
            done.append(Alternative(file, None, why or str(error)))
            continue
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
        done.append(Alternative(file, found, why_not, node=zero.get(ds_config.HPZ, 1)))
    return done


def recommended(options: list[Alternative]) -> Alternative | None:
    """Of those that fit the one with least to compute again, the earliest of equal ones; one that offloads only where no other
    fits."""
    fit = [option for option in options if option.found is not None and option.found.fits]
    on_device = [option for option in fit if option.file != OFFLOADED]
    return min(on_device or fit, key=lambda option: option.found.recomputed, default=None)


def host_bytes(model: Planned, optim: str) -> float:
    """What zero3_offload.json moves to the CPU, of all devices together."""
    sizes = model.sizes
    return sizes.frozen + (MASTER_AND_GRADIENT + footprint.MOMENT_BYTES[optim] + sizes.itemsize) * sizes.trained


def told(options: list[Alternative], model: Planned, optim: str) -> Told:
    """A table, and the one to take. limit: --max_tokens_per_micro_batch as the run would choose it."""
    lines = [f"{'configs/ds/':20s}{'fits':6s}{'peak':>10s}{'of positions':>14s}{'computed again':>16s}{'limit':>9s}"]
    for option in options:
        found = option.found
        if found is None:
            lines.append(f"{option.file:20s}-     {option.why_not}")
            continue
        again = f"{found.recomputed}/{found.layers} layers"
        lines.append(
            f"{option.file:20s}{_word(found):6s}{size(found.peak):>10s}{thousands(found.positions):>14s}"
            f"{again:>16s}{thousands(found.fit.max_tokens):>9s}"
            + (f"  nodes of {option.node}" if option.node > 1 else "")
        )
    best = recommended(options)
    tried = [option.file for option in options if option.found is not None]
    if not tried:
        lines.append("none goes with these flags")
    elif best is None:
        surely = "surely " if any(option.found.at_most for option in options if option.found is not None) else ""
        lines.append(f"none {surely}fits: take more devices, a smaller model, --use_peft, or shorter sequences")
    else:
        why = "; nothing else fits, and it is much slower" if best.file == OFFLOADED else ""
        lines.append(f"take --deepspeed {FOLDER / best.file}{why}")
    if OFFLOADED in tried:
        lines.append(f"{OFFLOADED} takes {size(host_bytes(model, optim))} of the hosts' memory, all together")
    rows = [_row(option) | {"recommended": option is best} for option in options]
    return Told("alternatives", lines, rows)


def _word(found: Fitted) -> str:
    return "yes" if found.fits else "maybe" if found.at_most else "no"


def _row(option: Alternative) -> dict:
    found, row = option.found, {"file": str(FOLDER / option.file), "why_not": option.why_not or None}
    row |= {"node": option.node}
    if found is None:
        names = ("stage", "fits", "peak_bytes", "positions", "recompute_every", "recomputed_layers")
        return row | dict.fromkeys((*names, "max_tokens_per_micro_batch"))
    row |= {"positions": found.positions}
    row |= {"stage": found.stage, "fits": found.fits, "peak_bytes": found.peak, "recompute_every": found.fit.every}
    return row | {"recomputed_layers": found.recomputed, "max_tokens_per_micro_batch": found.fit.max_tokens}
