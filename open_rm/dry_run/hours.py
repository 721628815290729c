"""How long a run takes, from a rate that was given or that an earlier run measured. No rate is made up."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from open_rm.dry_run.sizes import Planned
from open_rm.dry_run.steps import Dealt
from open_rm.dry_run.target import Target
from open_rm.dry_run.told import Told, thousands
from open_rm.errors import UserError
from open_rm.flags import DryRunFlags
from open_rm.publishing.run_folder import FACTS, RECORD
from open_rm.training.metrics import training_flops
from open_rm.training.plan import Plan
from open_rm.training.tracking import read_metrics

NOT_TYPICAL = 2  # steps at the start of a run, which set things up
SAME_MODEL = 0.03  # FLOPs of a token that differ by less are of one model


@dataclass(frozen=True)
class Rate:
    """tokens: distinct ones that a device computes in a second, forward and backward, while it has work.  flops: that each of
    them took where it was measured; None: not known.  said: where it is from."""

    tokens: float
    flops: float | None
    said: str


def rate_of(flags: DryRunFlags) -> Rate | None:
    """What --tokens_per_second says; None where it says nothing.

    Raises:
        UserError: it is neither a number nor the folder of a run that measured it.
    """
    given = flags.tokens_per_second
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        return _measured(given)
    if not 0 < number < math.inf:
        raise UserError(f"--tokens_per_second {given}: must be above 0, and finite, or the folder of an earlier run")
    return Rate(number, None, "--tokens_per_second")


def _measured(given: str) -> Rate:
    folder = Path(given).expanduser()
    where = f"--tokens_per_second {given}"
    if not (folder / RECORD).is_file():
        raise UserError(
            f"{where}: neither a number nor the folder of a run, which would hold {RECORD}; give one of them"
        )
    try:
        world_size = json.loads((folder / FACTS).read_text(encoding="utf-8"))["world_size"]
        rows = [row for row in read_metrics(folder / RECORD) if row.get("perf/tokens_per_second")][NOT_TYPICAL:]
        distinct = [row["perf/tokens_per_second"] * row["perf/distinct_token_fraction"] for row in rows]
        # A step takes as long as its slowest device; a device with the mean's work would have waited for that one.
        rates = [count * row["perf/rank_imbalance"] / world_size for count, row in zip(distinct, rows, strict=True)]
        flops = [
            (after["perf/total_flops"] - row["perf/total_flops"]) / (count * after["perf/step_seconds"])
            for row, after, count in zip(rows, rows[1:], distinct[1:], strict=False)
            if after["step"] == row["step"] + 1
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{where}: {RECORD} and {FACTS} there are not those of a run ({error}); give a number"
        ) from error
    if not rates:
        raise UserError(
            f"{where}: its {RECORD} has no more than {NOT_TYPICAL} steps that measured perf/tokens_per_second; give a longer "
            "run, or a number"
        )
    said = f"measured by {given} on {world_size} devices, median of {len(rates)} steps"
    return Rate(statistics.median(rates), statistics.median(flops) if flops else None, said)


def told(rate: Rate | None, plan: Plan, dealt: Dealt, model: Planned, target: Target, *, evaluated: int) -> Told:
    """evaluated: tokens of all evaluations together."""
    distinct = sum(dealt.distinct)
    steps = plan.total_steps / len(dealt.numbers)
    flops = training_flops(distinct, sum(dealt.area), model.shape, read=sum(dealt.read)) / max(distinct, 1)
    numbers = {"distinct_tokens": distinct * steps, "evaluated_tokens": evaluated, "flops_per_token": flops}
    numbers |= dict.fromkeys(("hours", "training_hours", "evaluation_hours", "tokens_per_second_per_device"))
    total = f"{distinct * steps:.3g} distinct tokens to train on, {flops * distinct * steps:.3g} FLOPs"
    if rate is None:
        return Told(
            "hours",
            [f"not known: pass --tokens_per_second (distinct tokens of a device, or the folder of a run); {total}"],
            numbers,
        )
    tokens, said = rate.tokens, rate.said
    if rate.flops is not None and abs(flops / rate.flops - 1) > SAME_MODEL:
        tokens *= rate.flops / flops
        said += f"; scaled by {rate.flops / flops:.2g}, since a token takes {flops:.2g} FLOPs here and {rate.flops:.2g} there"
    balance = statistics.median(dealt.imbalance)
    training = distinct * steps / (tokens * target.world_size) * balance / 3600
    evaluation = evaluated / (tokens * target.world_size * model.shape.passes) / 3600
    hours = training + evaluation
    lines = [
        f"{_duration(hours)} at {thousands(tokens)} tokens a second and device ({said})",
        f"training {_duration(training)}, evaluation {_duration(evaluation)}; starting and saving are not in it; {total}",
    ]
    numbers |= {"hours": hours, "training_hours": training, "evaluation_hours": evaluation}
    return Told("hours", lines, numbers | {"tokens_per_second_per_device": tokens})


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
