"""How far a run is: with the engine's state and the random states, all that a checkpoint has to keep."""

import dataclasses
import time
from dataclasses import dataclass, field

from open_rm.batching.feeding import Step


@dataclass
class Progress:
    """Where a run stands; the one object that changes while it trains.

    pairs: of an epoch.  episode: pairs seen.  training_seconds: of the loop, evaluations aside.  flops: that the model needed.
    last_train, last_evaluation: metrics by the names under which they are logged.
    evaluated_step: that of last_evaluation.
    skipped: steps that were no numbers and were not applied.  evaluation_due: the evaluation at this step is still to be made.
    best_step, best_value, best_evaluation: of the best evaluation so far.  worse: evaluations since then.
    """

    pairs: int
    total_steps: int
    step: int = 0
    episode: int = 0
    training_seconds: float = 0.0
    flops: float = 0.0
    last_train: dict[str, float] = field(default_factory=dict)
    last_evaluation: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    evaluation_due: bool = True
    best_step: int | None = None
    best_value: float | None = None
    best_evaluation: dict[str, float] = field(default_factory=dict)
    worse: int = 0
    evaluated_step: int | None = None
    started: float = field(default_factory=time.perf_counter)

    def advance(self, step: Step, means: dict[str, float], performance: dict[str, float]) -> None:
        """A step was made. means: its metrics without their prefix.  performance: from metrics.Meter."""
        self.step, self.episode = step.number, self.episode + step.pairs
        self.training_seconds += performance["perf/step_seconds"]
        self.flops = performance["perf/total_flops"]
        self.last_train = {f"train/rm/{name}": value for name, value in means.items()} | performance

    def evaluated(self, metrics: dict[str, float]) -> None:
        """An evaluation was made at this step."""
        self.evaluation_due, self.last_evaluation, self.evaluated_step = False, metrics, self.step

    @property
    def metrics(self) -> dict[str, float]:
        """The last of training and of evaluation."""
        return self.last_train | self.last_evaluation

    @property
    def results(self) -> dict[str, float]:
        """What the model card shows: metrics of rewards, evaluation first."""
        return {name: value for name, value in (self.last_evaluation | self.last_train).items() if "/rm/" in name}

    @property
    def hours(self) -> float:
        """Since the run started."""
        return (time.perf_counter() - self.started) / 3600

    @property
    def eta_seconds(self) -> float:
        """Until the last step, evaluations aside."""
        return self.training_seconds / max(1, self.step) * (self.total_steps - self.step)

    def saved(self) -> dict:
        """All of it but the clock, for a checkpoint; `continued` is the way back."""
        kept = {name: value for name, value in dataclasses.asdict(self).items() if name != "started"}
        return kept | {"hours": self.hours}

    @classmethod
    def continued(cls, saved: dict) -> "Progress":
        """Where a checkpoint stood; the hours go on from there."""
        rest = {name: value for name, value in saved.items() if name != "hours"}
        return cls(**rest, started=time.perf_counter() - 3600 * saved["hours"])

    def position(self) -> dict[str, float]:
        """What every line of metrics says about when it was written."""
        return {"episode": self.episode, "epoch": self.episode / self.pairs, "hours": self.hours}
