"""Keeps a run's checkpoints: written behind the training, committed when every rank's file is hashed, and found again.

A rank copies what it holds into host memory, which training waits for, and a thread writes it. The ranks' threads tell the main
rank's through the store in which the ranks met, not through collectives, which training uses meanwhile. One checkpoint is
written at a time.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from open_rm import alive
from open_rm.errors import STOPPED, OneRanksError, UserError
from open_rm.flags import CheckpointFlags
from open_rm.manifest import commit, written
from open_rm.ranks import Ranks, all_reduce_sum
from open_rm.reliability import checkpoints
from open_rm.reliability.checkpoints import Checkpoint, gib
from open_rm.reliability.claim import CLAIM
from open_rm.reliability.random_states import random_states, set_random_states
from open_rm.reliability.shards import Shards, Snapshot
from open_rm.reliability.signals import Stop
from open_rm.training.engine import Engine
from open_rm.training.engine_state import trained_sizes
from open_rm.training.footprint import SAVED_MOMENT_BYTES
from open_rm.training.progress import Progress

DEFAULT_MINUTES = 30.0
LOOKS_A_SECOND = 20
CLOSING_SECONDS = 300.0  # most that a run which ends by a mistake waits for the checkpoint that is being written
SLOW_DISK_SECONDS = 3600.0  # a disk that takes longer counts as hanging
SEEN_AFTER = 10.0  # seconds after which a name that one node made is seen by all on a shared file system


def minutes_between(flags: CheckpointFlags) -> float:
    """Between checkpoints, by the clock; 0 for never."""
    if flags.checkpointing_minutes is None:
        return 0.0 if flags.checkpointing_steps else DEFAULT_MINUTES
    return flags.checkpointing_minutes


class Keeper:
    """The checkpoints of one run. Every rank has one; all calls but `figures` are collective."""

    def __init__(
        self, flags: CheckpointFlags, ranks: Ranks, folder: str, facts: dict, *, say: Callable, holds: Callable
    ):
        """Args:
        folder: the run's output_dir.
        facts: what state.json says besides: flags, marks of the data, the run's name and plan.
        say: takes a line for the log (main rank).  holds: whether the claim on the folder is still ours (main rank).
        """
        minutes = minutes_between(flags)
        self.every_steps, self.every_seconds = flags.checkpointing_steps, 60 * minutes
        self.enabled = bool(flags.checkpointing_steps or minutes)
        self._asked = bool(flags.checkpointing_steps or flags.checkpointing_minutes)
        self._keep, self._ranks, self._output_dir, self._facts = flags.keep_last_n_checkpoints, ranks, folder, facts
        self._say, self._holds = say, holds
        self._snapshot = Snapshot(pinned=ranks.on_gpu)
        self._store = ranks.store("checkpoints")
        self._thread: threading.Thread | None = None
        self._number, self._last_at = 0, time.monotonic()
        self._stall = self._seconds = 0.0
        self.committed_step: int | None = None  # main rank: of the newest that this process wrote or went on from
        self._lost = False  # main rank: another run has taken the folder over
        self._keeps_best = flags.metric_for_best_model is not None

    # ---------------------------------------------------------------- when

    def due(self, progress: Progress) -> bool:
        """Whether a checkpoint is to be written after this step; the main rank's clock decides for all."""
        if not self.enabled or progress.step == 0:
            return False
        if self.every_steps and progress.step % self.every_steps == 0:
            return True
        if not self.every_seconds:
            return False
        late = self._ranks.is_main and time.monotonic() - self._last_at >= self.every_seconds
        return all_reduce_sum(torch.tensor([float(late)], device=self._ranks.device)).item() > 0

    def figures(self) -> dict[str, float]:
        """perf/...: seconds that training waited for checkpoints since the last call, and that the last one took to write."""
        if not self.enabled:
            return {}
        stall, self._stall = self._stall, 0.0
        return {"perf/checkpoint_stall_seconds": stall, "perf/checkpoint_write_seconds": self._seconds}

    # ---------------------------------------------------------------- room

    def check_room(self, engine: Engine, optim: str) -> list[str]:
        """Refuse a disk that cannot hold what will be kept (before training); lines on what is planned.

        optim: the optimizer's flag, by which moments are counted that it makes with its first step only.
        """
        if not self.enabled:
            return ["checkpoints: off; a run that is killed begins anew"]
        blind = self._blind_ranks()
        if blind:
            where = f"--output_dir {self._output_dir} is not seen by rank {', '.join(map(str, blind))}"
            if self._asked:
                self._ranks.fail(f"{where}, and checkpoints need a folder that all nodes share; choose one")
            self.enabled = False
            return [f"checkpoints: off, since {where}; a run that is killed begins anew"]
        size = self._bytes(engine, moments=SAVED_MOMENT_BYTES[optim])

        def look() -> list[str]:
            there = checkpoints.committed(self._output_dir)
            have = sum(map(checkpoints.size_of, there))
            needed = (self._keep + 1 + self._keeps_best) * size - have
            free = checkpoints.free_bytes(Path(self._output_dir))
            if free < needed:
                raise UserError(
                    f"--output_dir {self._output_dir}: {gib(needed)} are needed for checkpoints of {gib(size)} each "
                    f"({self._keep} are kept while one is written) and {gib(free)} are free, {gib(needed - free)} too "
                    "little; free some, lower --keep_last_n_checkpoints, choose another folder, or switch checkpoints off "
                    "with --checkpointing_minutes 0"
                )
            often = [f"every {self.every_steps} steps"] if self.every_steps else []
            often += [f"every {self.every_seconds / 60:g} minutes"] if self.every_seconds else []
            return [
                f"checkpoints: {' and '.join(often)}, {gib(size)} each, the newest kept ({self._keep}) in "
                f"{checkpoints.folder_of(self._output_dir)}"
            ]

        return self._ranks.from_main(look)

    def _blind_ranks(self) -> list[int]:
        """Those that do not see the claim on the folder, which is on another node's disk then."""
        claim, patience = Path(self._output_dir) / CLAIM, time.monotonic() + SEEN_AFTER
        wanted = self._ranks.from_main(lambda: _content(claim))
        # Files spread slowly on a shared disk.
        while wanted and _content(claim) != wanted and time.monotonic() < patience:
            time.sleep(0.2)
        seen = self._ranks.gathered(_content(claim) == wanted)
        return [rank for rank, sees in enumerate(seen) if wanted and not sees]

    def _bytes(self, engine: Engine, moments: int = 0) -> float:
        own = 0
        for flat in engine.flats():
            if flat.written:
                tensors = [value for value in flat.state.values() if torch.is_tensor(value)]
                own += flat.weights.nbytes + (sum(t.nbytes for t in tensors) or moments * len(flat.weights))
        return all_reduce_sum(torch.tensor([float(own)], dtype=torch.float64, device=self._ranks.device)).item()

    # ---------------------------------------------------------------- writing

    def save(self, engine: Engine, progress: Progress, positions: Callable[[], dict], *, wait: bool = False) -> bool:
        """Begin a checkpoint of this step; `wait` for it to be committed. Whether one was begun, or committed.

        positions: of the records, on the disk up to there (Tracker.positions; called on the main rank).
        """
        started = time.perf_counter()
        with alive.phase("writing a checkpoint", alive.Kind.BUSY):
            self._join()
            if self._ranks.from_main(lambda: self.committed_step == progress.step):
                return True  # nothing that is committed is written over
            self._number += 1
            size = self._bytes(engine)
            state = self._facts | {"schedule": engine.schedule_state(), "world_size": self._ranks.world_size}
            building = self._ranks.from_main(lambda: self._begin(progress, size, state, positions))
            if building is not None:
                self._snapshot.take(engine.flats())
                work = (Path(building), state, random_states(self._ranks), time.perf_counter())
                self._thread = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
                self._thread.start()
            self._last_at = time.monotonic()
            self._stall += time.perf_counter() - started
            if building is not None and wait:
                self._join()
                return self._ranks.from_main(lambda: self.committed_step == progress.step)
        return building is not None

    def after_step(self, engine: Engine, progress: Progress, positions: Callable[[], dict], *, stop: Stop) -> None:
        """Write a checkpoint where one is due, where the evaluation of this step was the best, and before a stop.

        Raises:
            SystemExit: STOPPED, on all ranks, where one was asked to stop and the checkpoint is committed; 1 where it is not.
        """
        if self._lost:
            stop.asked = stop.asked or "a lost claim"
        stopping = stop.agreed(self._ranks)
        if not stopping:
            if self.enabled and (progress.best_step == progress.step or self.due(progress)):
                self.save(engine, progress, positions)
            return
        if self._ranks.from_main(lambda: self._lost):
            self._ranks.fail(
                f"another run has taken {self._output_dir} over while this one stood still; this one ends after step "
                f"{progress.step}"
            )
        saved = self.enabled and progress.step > 0 and self.save(engine, progress, positions, wait=True)
        where = f"stopped after step {progress.step} of {progress.total_steps}"
        if saved:
            self._say(f"{where}; give the same command again{stop.again} to go on from there")
            raise SystemExit(STOPPED)
        self._say(f"{where}; nothing was saved{'' if self.enabled else ', since checkpoints are off'}")
        raise SystemExit(STOPPED if progress.step == 0 else 1)

    def after_training(self, engine: Engine, progress: Progress, positions: Callable[[], dict]) -> None:
        """One of the last step, so that a kill while the model is saved, or a Hub that is gone, costs nothing; then wait until
        all is committed."""
        if self.enabled:
            self.save(engine, progress, positions, wait=True)

    def _join(self) -> None:
        if self._thread is not None:
            # A slow disk that takes long to have all of it shows neither processor time nor bytes.
            until = time.monotonic() + SLOW_DISK_SECONDS
            while self._thread.is_alive() and time.monotonic() < until:
                self._thread.join(1.0)
                alive.beat()
            self._thread.join()
            self._thread = None

    def _begin(self, progress: Progress, size: float, state: dict, positions: Callable[[], dict]) -> str | None:
        """The folder to write into, or None where nothing can be written: training goes on, and the last one is kept."""
        folder = checkpoints.folder_of(self._output_dir)
        building = folder / f"{checkpoints.name_of(progress.step)}.{self._number}{checkpoints.BUILDING}"
        try:
            free = checkpoints.free_bytes(folder)
            if free < size:
                self._say(self._failed(progress.step, f"{gib(size)} are needed and {gib(free)} are free in {folder}"))
                return None
            state |= {"progress": progress.saved(), "sinks": positions() | {"episode": progress.episode}}
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
        except OSError as error:
            self._say(self._failed(progress.step, f"{folder} cannot be written ({error.strerror or error})"))
            return None
        return str(building)

    def _failed(self, step: int, why: str) -> str:
        last = "there is none before it"
        if self.committed_step is not None:
            last = f"the last good one is of step {self.committed_step}"
        return f"no checkpoint at step {step}: {why}; {last}, and training goes on"

    def _write(self, building: Path, state: dict, others: dict, started: float) -> None:
        """In a thread of each rank: write, hash, tell; the main rank's waits for all and commits."""
        name = f"rank_{self._ranks.rank:05d}.safetensors"
        try:
            self._snapshot.write(building / name, others)
            _on_disk(building / name)
            report = {"name": name, "file": written(building / name)}
        except Exception as error:  # told by the main rank
            report = {"error": f"rank {self._ranks.rank} could not write ({_reason(error)})"}
        self._store.set(f"{self._number}/{self._ranks.rank}", json.dumps(report))
        if not self._ranks.is_main:
            return
        try:
            failure = self._commit(building, state, started)
        except Exception as error:
            failure = _reason(error)
        if failure is not None:
            shutil.rmtree(building, ignore_errors=True)
            self._say(self._failed(state["progress"]["step"], failure))

    def _commit(self, building: Path, state: dict, started: float) -> str | None:
        """What stood against it."""
        names = [f"{self._number}/{rank}" for rank in range(self._ranks.world_size)]
        while not self._store.check(names):
            time.sleep(1 / LOOKS_A_SECOND)
        reports = [json.loads(self._store.get(name)) for name in names]
        for report in reports:
            if "error" in report:
                return report["error"]
        path = building / checkpoints.STATE
        path.write_text(json.dumps(state), encoding="utf-8")
        _on_disk(path)
        files = {report["name"]: report["file"] for report in reports} | {path.name: written(path)}
        self._lost = not self._holds()
        if self._lost:
            return f"another run has taken {self._output_dir}"
        step = state["progress"]["step"]
        folder = building.with_name(checkpoints.name_of(step))
        if folder.exists():  # of this step too: one that was found damaged, or a stop at a step that was saved before
            shutil.rmtree(folder)
        commit(building, folder, files)
        self.committed_step, self._seconds = step, time.perf_counter() - started
        best_step = state["progress"]["best_step"]
        best = checkpoints.name_of(best_step) if best_step is not None else None
        for path in checkpoints.committed(self._output_dir)[self._keep :]:
            if path.name not in (best, folder.name):
                shutil.rmtree(path, ignore_errors=True)
        return None

    # ---------------------------------------------------------------- going on

    def resume(self, engine: Engine, found: Checkpoint | None, pairs: int, total_steps: int) -> Progress:
        """The progress to go on from: a new run's, or a checkpoint's, whose weights, moments, schedule and random states
        are then in `engine` and in this process."""
        if found is None:
            return Progress(pairs=pairs, total_steps=total_steps)
        with alive.phase("reading a checkpoint", alive.Kind.BUSY):
            shards, exact = self._fill(engine, found, moments=True)
        engine.set_schedule(found.state["schedule"])
        own = min(self._ranks.rank, len(shards.files) - 1)
        set_random_states(shards.files[own].others(), self._ranks)
        progress = Progress.continued(found.state["progress"])
        if found.path.resolve().parent == checkpoints.folder_of(self._output_dir).resolve():
            self.committed_step = progress.step
        elif progress.best_step is not None:  # another run's, which may go away
            self._ranks.from_main(lambda: self._bring(found, progress.best_step))
        if self._ranks.is_main:
            how = (
                "bit for bit"
                if exact
                else f"divided anew ({found.state['world_size']} -> {self._ranks.world_size} ranks)"
            )
            self._say(f"going on after step {progress.step} from {found.path}; weights and moments: {how}")
        return progress

    def _bring(self, found: Checkpoint, best_step: int) -> None:
        """Copy the best checkpoint of the run that this one goes on from."""
        name, folder = checkpoints.name_of(best_step), checkpoints.folder_of(self._output_dir)
        best = found.path.with_name(name)
        if best.exists() and not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            building = folder / f"{name}{checkpoints.BUILDING}"
            shutil.copytree(best, building, dirs_exist_ok=True)
            building.rename(folder / name)

    def load_best(self, engine: Engine, progress: Progress) -> None:
        """Put the weights of the best evaluation into `engine`; where its checkpoint is not whole (a disk was full then),
        the last ones stay, and the log says so."""
        path = checkpoints.folder_of(self._output_dir) / checkpoints.name_of(progress.best_step)
        with alive.phase("reading a checkpoint", alive.Kind.BUSY):
            damage = checkpoints.damage_by_all(path, self._ranks)
            if damage is not None:
                self._say(
                    f"the best evaluation was that of step {progress.best_step}, whose checkpoint is not whole ({damage}): the "
                    "last model is saved instead"
                )
                return
            self._fill(engine, self._ranks.from_main(lambda: checkpoints.read(path)), moments=False)
        progress.last_evaluation, progress.evaluated_step = progress.best_evaluation, progress.best_step
        self._say(f"the model of step {progress.best_step} is saved, whose evaluation was the best")

    def _fill(self, engine: Engine, found: Checkpoint, *, moments: bool) -> tuple[Shards | None, bool]:
        """Read a checkpoint into the engine; a rank that cannot ends all with its sentence."""
        shards, exact, mistake = None, False, None
        try:
            shards = Shards(found.shards(), trained_sizes(engine.module))
            exact = engine.fill(shards, moments=moments)
        except (UserError, OSError) as error:
            mistake = str(error)
        for one in self._ranks.gathered(mistake):
            if one is not None:
                self._ranks.fail(one)
        engine.weights_changed()
        return shards, exact

    # ---------------------------------------------------------------- the end

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """What is being written is finished where all ranks are well: they leave together, or were asked to."""
        together = isinstance(error, (UserError, SystemExit)) and not isinstance(error, OneRanksError)
        if together and self._thread is not None:
            with alive.phase("writing a checkpoint", alive.Kind.BUSY):
                self._thread.join(CLOSING_SECONDS)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _on_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror})"
    return " ".join(str(error).split())[:200] or type(error).__name__
