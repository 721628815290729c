"""What a run says and records: the log on the console, metrics.jsonl, samples.jsonl, TensorBoard, wandb.

metrics.jsonl is the record: one JSON object per line, flushed at once, so that a killed run keeps it. The others are
views. Only floats and sample tables come here; averages over ranks are made before (see metrics.py).
"""

import contextlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from open_rm.flags import TrackingFlags
from open_rm.training.progress import Progress

BAR_CELLS = 20
LOG_COLUMNS = 170
SECONDS_BETWEEN_LINES = 0.5


class Log:
    """Lines for the person who watches, from the main rank; on other ranks every call does nothing."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.lines: list[str] = []
        # In a log file there is no terminal to ask for a width, and 80 columns would break tables apart.
        self._console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else LOG_COLUMNS)

    def say(self, *lines: str) -> None:
        """Print at once, and remember for run.json: what was read, dropped, chosen, switched off, and why."""
        self.lines += lines
        for line in lines:
            self.show(line)

    def show(self, what: str | Table) -> None:
        """Print a line of progress or a table, which are not worth remembering."""
        if not self.enabled:
            return
        if isinstance(what, Table):
            self._console.print(what, markup=False)
        else:
            self._console.print(what, markup=False, soft_wrap=True)
        self._console.file.flush()


class Tracker:
    """The sinks of the main rank, open for the length of a `with`; where the log is off every call does nothing."""

    def __init__(self, output_dir: str, log: Log, settings: dict, flags: TrackingFlags):
        """Open the sinks.

        Args:
            output_dir: metrics.jsonl, samples.jsonl, tensorboard/ and wandb/ are written here.
            settings: the run's flags and derived numbers, run_name among them, shown by wandb and TensorBoard. No secrets.
        """
        self.log = log
        self.record = Path(output_dir) / "metrics.jsonl"
        self._wandb = None
        self._last_line = 0.0
        if not log.enabled:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:  # what was opened is closed again where a later sink cannot be
            self._metrics = opened.enter_context(self.record.open("w", encoding="utf-8"))
            self._samples = opened.enter_context((folder / "samples.jsonl").open("w", encoding="utf-8"))
            self._board = opened.enter_context(SummaryWriter(str(folder / "tensorboard")))
            self._board.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
            if flags.with_tracking:
                self._wandb, line = start_wandb(folder, settings, flags)
                log.say(line)
            self._opened = opened.pop_all()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Flush and close every sink, however the run ends; wandb is told whether it failed."""
        if not self.log.enabled:
            return
        with self._opened:
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)

    def training(self, progress: Progress) -> None:
        """A step was made: record it, and show a line, at most two a second."""
        self._record(progress, progress.last_train)
        is_edge = progress.step in (1, progress.total_steps)
        if time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES and not is_edge:
            return
        self._last_line = time.monotonic()
        done = round(BAR_CELLS * progress.step / progress.total_steps)
        m = {name.rpartition("/")[2]: value for name, value in progress.last_train.items()}
        self.log.show(
            f"[{'#' * done}{'.' * (BAR_CELLS - done)}] step {progress.step}/{progress.total_steps}  "
            f"episode {progress.episode}  loss {m['loss']:.4f}  accuracy {m['accuracy']:.3f}  "
            f"margin {m['reward_margin']:+.3f}  lr {m['lr']:.2e}  grad_norm {m['grad_norm']:.2f}  "
            f"{m['pairs_per_second']:.1f} pairs/s  {m['tokens_per_second']:.0f} tokens/s  "
            f"ETA {timedelta(seconds=round(progress.eta_seconds))}"
        )

    def evaluation(self, progress: Progress) -> None:
        """Held-out pairs were scored: record it, and show a line overall and a line per source."""
        self._record(progress, progress.last_evaluation)
        groups: dict[str, dict[str, float]] = {}
        for name, value in progress.last_evaluation.items():
            if name.startswith("eval/rm/"):
                group, _, metric = name.removeprefix("eval/rm/").rpartition("/")
                groups.setdefault(group or "all", {})[metric] = value
        for group, m in groups.items():
            self.log.show(
                f"evaluation at step {progress.step}, {group}: accuracy {m['accuracy']:.3f}  loss {m['loss']:.4f}  "
                f"margin {m['reward_margin']:+.3f}  chosen {m['chosen_rewards']:+.3f}  "
                f"rejected {m['rejected_rewards']:+.3f}"
            )

    def _record(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Metrics at an optimizer step, in every sink."""
        if not self.log.enabled:
            return
        row = progress.position() | metrics
        self._metrics.write(json.dumps({"step": progress.step, **row}) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, progress.episode)
        if self._wandb is not None:
            self._wandb.log(row, step=progress.step)

    def samples(self, progress: Progress, rows: list[dict]) -> None:
        """Sample pairs with their rewards: whole in samples.jsonl and wandb; shortened on the console, where the table
        stands at the first and the last evaluation."""
        if not self.log.enabled:
            return
        for row in rows:
            self._samples.write(json.dumps({"step": progress.step, **row}, ensure_ascii=False) + "\n")
        self._samples.flush()
        if progress.step in (0, progress.total_steps):
            self.log.show(_sample_table(rows, title=f"sample pairs at step {progress.step}"))
        if self._wandb is not None:
            import wandb

            columns = list(rows[0])
            data = [[row[column] for column in columns] for row in rows]
            self._wandb.log({"preference_samples": wandb.Table(columns=columns, data=data)}, step=progress.step)

    def figure(self, path: Path, progress: Progress) -> None:
        """Show a picture that was written to `path` in wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({path.stem: wandb.Image(str(path))}, step=progress.step)


def _sample_table(rows: list[dict], title: str) -> Table:
    table = Table("prompt", "chosen", "rejected", "rewards", "right", title=title)
    for row in rows:
        texts = [_shorten(row[key]) for key in ("prompt", "chosen", "rejected")]
        rewards = f"{row['chosen_reward']:+.3f} {row['rejected_reward']:+.3f}"
        table.add_row(*texts, rewards, "yes" if row["right"] else "NO")
    return table


def start_wandb(folder: Path, settings: dict, flags: TrackingFlags):
    """Start a wandb run; offline where there is no key or no server. Returns (run, line for the log)."""
    import wandb

    # Its own console capture would copy everything printed into the run file.
    options = dict(project=flags.wandb_project_name, entity=flags.wandb_entity, name=settings["run_name"])
    options |= dict(config=settings, dir=str(folder))
    quiet = {"console": "off", "silent": True}
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not _has_wandb_key():
        mode, reason = "offline", "there is no API key (set WANDB_API_KEY)"
    elif mode in ("offline", "disabled"):
        reason = f"WANDB_MODE={mode}"
    else:
        try:
            run = wandb.init(**options, settings=wandb.Settings(**quiet, init_timeout=30))
            return run, f"wandb: online, {run.url}"
        except Exception as error:  # whatever a tracking server does, the run goes on
            mode, reason = "offline", f"the server does not answer ({type(error).__name__})"
    run = wandb.init(**options, mode=mode, settings=wandb.Settings(**quiet))
    if mode == "disabled":
        return run, f"wandb: disabled, because {reason}"
    return run, f"wandb: {mode}, because {reason}; send it later with: wandb sync {folder}/wandb/offline-run-*"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")


def _shorten(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
