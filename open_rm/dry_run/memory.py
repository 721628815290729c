"""A device's memory at the peak of a step, by part; and which recomputation and micro-batch the run would choose.

    state        weights, masters, gradients, moments, buckets: training/footprint.py
    activations  of the largest micro-batch: training/activations.py and fitting.bytes_of_position
    passing      what the optimizer's step holds for a moment, when the activations are gone: footprint.passing_bytes
    framework    what is taken before there is a tensor

The peak is framework + state + the largest of activations (with the new gradients beside them) and of each part that passes; in a
process on a CPU, which keeps what it has freed (process_group.py), it is the sum of all.
"""

from dataclasses import dataclass

from open_rm.dry_run.sizes import Planned
from open_rm.dry_run.target import Target
from open_rm.dry_run.told import Told, size, thousands
from open_rm.flags import BatchFlags
from open_rm.model import recompute
from open_rm.training import activations, fitting, footprint
from open_rm.training.fitting import Fit, Memory

FLAT_AGAIN = 1.0  # of a step's flat gradients: freed ones leave holes that small tensors lie in when the next are made


@dataclass(frozen=True)
class Needs:
    """What a forward needs, whatever the DeepSpeed file.

    kept: by a position.  every: --gradient_checkpointing as a number.  asked: --max_tokens_per_micro_batch.
    at_least: positions that --per_device_train_batch_size asks for.
    largest: positions of a device in the largest pair or whole list.
    at_most: whether kept is a bound, since on a CPU long beginnings are not copied (activations.py).
    """

    kept: activations.Kept
    every: int | None
    asked: int | None
    at_least: int
    largest: int
    at_most: bool


@dataclass(frozen=True)
class Fitted:
    """A device under one DeepSpeed file. state, passing: bytes by part.  fit: what the run would choose.  position: bytes that a
    position takes at the peak.  positions: of the largest micro-batch, as far as is known.  at_most: as in Needs."""

    target: Target
    stage: int
    state: dict[str, float]
    passing: dict[str, float]
    fit: Fit
    position: float
    positions: int
    layers: int
    at_most: bool

    @property
    def activations(self) -> float:
        return self.position * self.positions

    @property
    def tensors(self) -> float:
        """Bytes of tensors at the peak: at the end of a backward pass, or in the optimizer's step."""
        backward = self.activations + self.passing["new gradients"]
        return sum(self.state.values()) + max(backward, *self.passing.values())

    @property
    def step(self) -> float:
        """What passes, all of it together."""
        return sum(self.passing.values())

    @property
    def peak(self) -> float:
        if self.target.on_gpu:
            return self.target.framework + self.tensors
        return self.target.framework + sum(self.state.values()) + self.activations + self.step + self.freed

    @property
    def freed(self) -> float:
        """What a process on a CPU keeps of what it has freed: holes, where flat gradients were, in which small tensors lie."""
        return 0.0 if self.target.on_gpu else FLAT_AGAIN * self.passing["flat"]

    @property
    def fits(self) -> bool:
        return self.fit.fits and self.peak <= self.target.memory

    @property
    def recomputed(self) -> int:
        """Layers that are computed again."""
        return -(-(self.layers - 1) // self.fit.every) if self.fit.every else 0


def needs(
    flags: BatchFlags, model: Planned, layout: str, target: Target, *, keys: float, budget: int, largest: int
) -> Needs:
    """keys: that are gathered for a position, at most.  budget: of the flags (feeding.rules_of).
    largest: positions of the largest pair or whole list."""
    how = {"itemsize": target.dtype.itemsize, "on_gpu": target.on_gpu, "keys": keys}
    reads_last = bool(model.model.read_only_parameters)
    kept = activations.of_model(model.model.classifier, layout, **how, reads_last=reads_last)
    every = recompute.every_how_many(flags.gradient_checkpointing)
    asked = flags.max_tokens_per_micro_batch
    at_most = keys > 1 and not target.on_gpu
    return Needs(kept, every, asked, budget, -(-largest // target.group), at_most)


def fitted(
    needs: Needs, model: Planned, config: dict, optim: str, target: Target, *, share: int | None = None
) -> Fitted:
    """What the run would choose under a DeepSpeed config (ds_config.fill_config), and what that takes.

    share: most positions that a device has in one step; None: not known yet.
    """
    state = footprint.state_bytes(model.sizes, config, optim, target.world_size)
    passing = footprint.passing_bytes(model.sizes, config, target.world_size, gloo=not target.on_gpu)
    left = target.memory - target.framework - sum(state.values())
    memory = Memory(left, needs.kept.kept, needs.kept.passed)
    if target.on_gpu:
        how = {"every": needs.every, "asked": needs.asked, "at_least": needs.at_least, "largest": needs.largest}
        fit = fitting.choose(memory, needs.kept.layers, **how)
    else:  # the flags alone decide
        fit = Fit(needs.every or 0, needs.asked or needs.at_least, fits=True)
    position = fitting.bytes_of_position(memory, needs.kept.layers, fit.every)
    positions = max(fit.max_tokens if share is None else min(fit.max_tokens, share), needs.largest)
    stage = config["zero_optimization"]["stage"]
    return Fitted(target, stage, state, passing, fit, position, positions, needs.kept.layers, needs.at_most)


def told(found: Fitted, needs: Needs) -> Told:
    """By part."""
    parts = {name: count for name, count in found.state.items() if count} | {"activations": found.activations}
    said = " + ".join(f"{name} {size(count)}" for name, count in parts.items())
    again = f"{found.recomputed} of {found.layers} layers are" if found.recomputed else "nothing is"
    guess = "" if needs.kept.known else "; this family's layers are not known here, so this is a guess"
    when = ", when the activations are gone" if found.target.on_gpu else ""
    at_most = " at most" if found.at_most else ""
    lines = [
        f"ZeRO stage {found.stage}: {size(found.peak)} of {size(found.target.memory)} on a device at the peak{at_most}: "
        + ("fits" if found.fits else "MAY NOT FIT" if found.at_most else "DOES NOT FIT"),
        said,
        f"about {size(found.target.framework)} for the framework itself; the optimizer's step holds "
        f"{size(found.step + found.freed)} for a moment{when}",
        f"activations: {size(needs.kept.kept)} a position{at_most}, {thousands(found.positions)} positions, {again} computed "
        f"again{guess}",
    ]
    numbers = {"stage": found.stage, "fits": found.fits, "peak_bytes": found.peak, "limit_bytes": found.target.memory}
    numbers |= {
        "parts": parts | {"framework": found.target.framework},
        "passing": found.passing | {"freed": found.freed},
    }
    numbers |= {"kept_bytes_per_position": needs.kept.kept, "peak_bytes_per_position": found.position}
    numbers |= {"positions": found.positions, "max_tokens_per_micro_batch": found.fit.max_tokens}
    numbers |= {"recompute_every": found.fit.every, "recomputed_layers": found.recomputed, "layers": found.layers}
    return Told("memory", lines, numbers | {"family_known": needs.kept.known, "at_most": found.at_most})
