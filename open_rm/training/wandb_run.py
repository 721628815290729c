"""wandb, a view of the record: started online or offline, resumed as one run, switched off where it fails.

Whatever a tracking server or wandb's own service process does, the training goes on, and the process ends.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from open_rm.flags import TrackingFlags
from open_rm.training.sinks import as_float

# A server that has gone would be waited for without an end.
FINISH_SECONDS = 60
TEARDOWN_SECONDS = 5


class WandbRun:
    """A wandb run that may fail."""

    def __init__(self, run, folder: Path, say: Callable[[str], None]):
        """Take a run that was started; wandb/ lies in `folder`."""
        self._run, self._say = run, say
        self._from_step = 0
        self._failure: Exception | None = None
        kind = "offline-run" if getattr(run, "offline", False) else "run"
        self._way_on = f"wandb sync {folder}/wandb/{kind}-*-{getattr(run, 'id', '')}*"

    def replay(self, metrics: Iterable[dict], samples: Iterable[dict]) -> None:
        """Send the record's rows that a resumed run has not got: all to a new offline run, and those that a kill took.

        What it has already is not sent again, now or later.
        """
        with self._guarded(0) as run:
            self._from_step = run.step
        tables: dict[int, list[dict]] = {}
        for row in samples:
            tables.setdefault(row["step"], []).append({name: row[name] for name in row if name != "step"})
        for row in metrics:
            step = row["step"]
            for earlier in [earlier for earlier in tables if earlier < step]:
                self.table(tables.pop(earlier), earlier)
            self.log({name: as_float(value) for name, value in row.items() if name != "step"}, step)
        for step, rows in tables.items():
            self.table(rows, step)

    def log(self, row: dict, step: int) -> None:
        """Numbers at a step; those of one step become one row."""
        with self._guarded(step) as run:
            if run:
                run.log(row, step=step)

    def table(self, rows: list[dict], step: int) -> None:
        """Sample pairs."""
        with self._guarded(step) as run:
            if run and rows:
                import wandb

                columns = list(rows[0])
                data = [[row[column] for column in columns] for row in rows]
                run.log({"preference_samples": wandb.Table(columns=columns, data=data)}, step=step)

    def picture(self, path: Path, step: int) -> None:
        """A picture from a file."""
        with self._guarded(step) as run:
            if run:
                import wandb

                run.log({path.stem: wandb.Image(str(path))}, step=step)

    @contextlib.contextmanager
    def _guarded(self, step: int) -> Iterator:
        """The run, or None where there is nothing to be sent; the first failure switches off."""
        try:
            yield None if self._failure or step < self._from_step else self._run
        except Exception as error:
            self._failure = error
            self._say(
                f"wandb is off from step {step} on ({_reason(error)}); metrics.jsonl has every number, and what wandb "
                f"has is sent with: {self._way_on}"
            )

    def finish(self, exit_code: int) -> bool:
        """End the run; returns whether wandb has all of it. In a thread of its own, which nobody has to wait for."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self._run.finish(exit_code=exit_code)
            except BaseException as error:  # out of a thread it would be a traceback on the console
                errors.append(error)

        gone = isinstance(self._failure, ConnectionError)  # the service process; there is nobody to talk to
        ended = not gone and _within(FINISH_SECONDS, work)
        if ended and not errors:
            return self._failure is None
        if self._failure is None:
            timed_out = not ended or isinstance(errors[0], TimeoutError)
            problem = f"within {FINISH_SECONDS} s" if timed_out else f"({_reason(errors[0])})"
            self._say(f"wandb could not finish {problem}; send the rest with: {self._way_on}")
        _release()
        return False


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Whether the work was done in that time; else it goes on in a thread that does not keep the process."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _release() -> None:
    """Let go of wandb's service: it would be waited for, or cause a traceback, when the process ends."""
    import wandb

    def work() -> None:
        with contextlib.suppress(BaseException):
            wandb.teardown(exit_code=1)

    _within(TEARDOWN_SECONDS, work)


def offline_folders(folder: Path, run_id: str) -> list[Path]:
    """Of a run: each offline start makes one. wandb numbers those of the same second."""
    found = {path for end in ("", "-[0-9]*") for path in (folder / "wandb").glob(f"offline-run-*-{run_id}{end}")}
    return sorted(path for path in found if path.is_dir())


def start_wandb(folder: Path, settings: dict, flags: TrackingFlags, run_id: str | None = None):
    """Start a wandb run, or go on with `run_id`; offline where there is no key or no server.

    Returns (run, line for the log).
    """
    import wandb

    # The id is made here, so that a checkpoint can name the run before wandb has sent a byte. A sweep has made one.
    name = run_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    options = dict(project=flags.wandb_project_name, entity=flags.wandb_entity, name=settings["run_name"])
    options |= dict(config=settings, dir=str(folder), id=name)
    resume = {"resume": "allow"} if run_id else {}
    # Its own console capture would copy everything printed into the run file. It gives up a little before we do.
    quiet = {"console": "off", "silent": True, "finish_timeout": 0.9 * FINISH_SECONDS, "finish_timeout_raises": True}
    mode, reason = wanted_mode()
    if mode == "online":
        try:
            run = wandb.init(**options, **resume, settings=wandb.Settings(**quiet, init_timeout=30))
            return run, f"wandb: online, {run.url}"
        except Exception as error:  # whatever a tracking server does, the run goes on
            mode, reason = "offline", f"the server does not answer ({type(error).__name__})"
            _release()  # the service holds the id for the start that failed
    run = wandb.init(**options, mode=mode, settings=wandb.Settings(**quiet))
    if mode == "disabled":
        return run, f"wandb: disabled, because {reason}"
    return run, f"wandb: {mode}, because {reason}; send it later with: wandb sync {folder}/wandb/offline-run-*"


def wanted_mode() -> tuple[str, str]:
    """online, offline or disabled, by the environment alone, and why it is not online."""
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not has_wandb_key():
        return "offline", "there is no API key (set WANDB_API_KEY)"
    return (mode, f"WANDB_MODE={mode}") if mode in ("offline", "disabled") else ("online", "")


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
