"""What a run says and records: the log on the console, metrics.jsonl, samples.jsonl, TensorBoard, wandb.

metrics.jsonl is the record: one JSON object per line, flushed at once, so that a killed run keeps it. The others are
views. Only floats and sample tables come here; averages over ranks are made before (see metrics.py). A run that is resumed
goes on with the record of its checkpoint, without a gap or a repeat; no sink that fails ends the training.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_rm.flags import TrackingFlags
from open_rm.training.progress import Progress
from open_rm.training.sinks import Board, RowFile, copy_start, read_rows
from open_rm.training.wandb_run import WandbRun, offline_folders, start_wandb

BAR_CELLS = 20
LOG_COLUMNS = 170
SECONDS_BETWEEN_LINES = 0.5
ROW_FILES = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more. rich would end the process, in the middle of a step that other ranks wait for."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Log:
    """Lines for the person who watches, from the main rank; on other ranks every call does nothing."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.lines: list[str] = []
        # In a log file there is no terminal to ask for a width, and 80 columns would break tables apart.
        self._console = _Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else LOG_COLUMNS)

    def say(self, *lines: str) -> None:
        """Print at once, and remember for run.json: what was read, dropped, chosen, switched off, and why."""
        self.lines += lines
        for line in lines:
            self.show(line)

    def show(self, what: str | Table) -> None:
        """Print a line of progress or a table, which are not worth remembering."""
        if not self.enabled:
            return
        with contextlib.suppress(OSError):  # of a console that is a file on a full disk
            if isinstance(what, Table):
                self._console.print(what, markup=False)
            else:
                self._console.print(what, markup=False, soft_wrap=True)
            self._console.file.flush()


class Tracker:
    """The sinks of the main rank, open for the length of a `with`; where the log is off every call does nothing."""

    def __init__(
        self,
        output_dir: str,
        log: Log,
        settings: dict,
        flags: TrackingFlags,
        resumed: dict | None = None,
        positions_from: str | Path | None = None,
    ):
        """Open the sinks.

        Args:
            output_dir: metrics.jsonl, samples.jsonl, skipped.jsonl, tensorboard/ and wandb/ are written here.
            settings: the run's flags and derived numbers, run_name among them, shown by wandb and TensorBoard. No secrets.
            resumed: what `positions` gave for a checkpoint, and its "episode"; None for a new run.
            positions_from: the folder in which they were, where that is another one.
        """
        self.log = log
        self.record = Path(output_dir) / "metrics.jsonl"
        self._resumed, self._wandb = resumed, None
        self._wandb_id = resumed and resumed.get("wandb_run")
        self._older_wandb: list[Path] = []
        self._last_line = 0.0
        if not log.enabled:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(positions_from or folder)
        moved = resumed is not None and source.resolve() != folder.resolve()
        with contextlib.ExitStack() as opened:  # what was opened is closed again where a later sink cannot be
            self._files = {name: self._row_file(opened, folder, name, source if moved else None) for name in ROW_FILES}
            self._board = self._open_board(opened, folder, moved, settings)
            if flags.with_tracking:
                self._open_wandb(folder, settings, flags)
            self._opened = opened.pop_all()

    def _row_file(self, opened: contextlib.ExitStack, folder: Path, name: str, source: Path | None) -> RowFile:
        """Open a row file where the checkpoint left it, or from its start."""
        position = None if self._resumed is None else self._resumed["files"].get(name, 0)
        if source is not None:
            copy_start(source / name, folder / name, position)
        file = RowFile(folder / name, self.log.say, position=position, lazy=name == "skipped.jsonl")
        opened.callback(file.close)
        if not file.whole:
            rows = file.rows()
            start = f"after step {rows[-1]['step']}" if rows else "from the start"
            self.log.say(
                f"{(source or folder) / name} is shorter than its checkpoint says, or missing: the record {start} up to "
                f"the checkpoint (episode {self._resumed['episode']}) is lost; what comes now is appended"
            )
        return file

    def _open_board(self, opened: contextlib.ExitStack, folder: Path, moved: bool, settings: dict) -> Board:
        """Open TensorBoard, without what was shown behind the checkpoint; in another folder with what was shown before."""
        episode = self._resumed["episode"] if self._resumed else 0
        start = 0 if moved else episode
        board = Board(folder / "tensorboard", self.log.say, purge_from=start if self._resumed else None)
        opened.callback(board.close)
        board.note("settings", [f"{key}: {value}" for key, value in settings.items()], episode)
        # Purging takes the checkpoint's own episode too, because an evaluation behind it has the same one.
        rows = [row for row in self._files["metrics.jsonl"].rows() if row["episode"] >= start] if self._resumed else []
        for row in rows:
            values = {name: value for name, value in row.items() if name != "step"}
            ago = 3600 * (rows[-1]["hours"] - row["hours"])
            board.scalars(values, row["episode"], seconds_ago=ago)
        return board

    def _open_wandb(self, folder: Path, settings: dict, flags: TrackingFlags) -> None:
        """Start wandb, or go on with the checkpoint's run and send what it has not got."""
        known = {"run_id": self._wandb_id} if self._wandb_id else {}
        older = offline_folders(folder, self._wandb_id) if known else []
        run, line = start_wandb(folder, settings, flags, **known)
        self.log.say(line)
        self._wandb = WandbRun(run, folder, self.log.say)
        if getattr(run, "disabled", False):  # wandb takes everything and keeps nothing
            return
        self._wandb_id = getattr(run, "id", None)
        if self._resumed is not None:
            metrics, samples, _ = self._files.values()
            self._wandb.replay(metrics.rows(), samples.rows())
            if getattr(run, "offline", False) and metrics.whole and samples.whole:
                self._older_wandb = older

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Flush and close every sink, however the run ends; wandb is told whether it failed."""
        if not self.log.enabled:
            return
        with self._opened:
            # Only now is the last offline folder on the disk to its end, and the older ones hold nothing that it has not.
            if self._wandb is not None and self._wandb.finish(exit_code=0 if kind is None else 1):
                for older in self._older_wandb:
                    shutil.rmtree(older, ignore_errors=True)

    def positions(self) -> dict:
        """Where the record stands, for a checkpoint: what is counted here is safe on the disk. The main rank's alone.

        Raises:
            OSError: rows wait that could not be written, and a run that went on from here would have a gap there.
        """
        files = {name: file.position() for name, file in self._files.items()} if self.log.enabled else {}
        for file in self._files.values() if self.log.enabled else ():
            if file.waiting:
                raise OSError(f"{file.waiting} rows of {file.path} wait to be written")
        return {"files": files, "wandb_run": self._wandb_id}

    def training(self, progress: Progress) -> None:
        """A step was made: record it, and show a line, at most two a second."""
        self._record(progress, progress.last_train)
        is_edge = progress.step in (1, progress.total_steps)
        if time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES and not is_edge:
            return
        self._last_line = time.monotonic()
        done = round(BAR_CELLS * progress.step / progress.total_steps)
        m = _shown(progress.last_train)
        self.log.show(
            f"[{'#' * done}{'.' * (BAR_CELLS - done)}] step {progress.step}/{progress.total_steps}  "
            f"episode {progress.episode}  loss {m['loss']:.4f}  accuracy {m['accuracy']:.3f}  "
            f"margin {m['reward_margin']:+.3f}  lr {m['lr']:.2e}  grad_norm {m['grad_norm']:.2f}  "
            f"{m['pairs_per_second']:.1f} pairs/s  {m['tokens_per_second']:.0f} tokens/s  "
            f"ETA {timedelta(seconds=round(progress.eta_seconds))}"
        )

    def evaluation(self, progress: Progress) -> None:
        """Held-out pairs were scored: record it, and show a line overall, a line per source and a line per benchmark."""
        self._record(progress, progress.last_evaluation)
        groups: dict[str, dict[str, float]] = {}
        benchmarks: dict[str, dict[str, float]] = {}
        for name, value in progress.last_evaluation.items():
            group, _, metric = name.removeprefix("eval/").rpartition("/")
            if group == "rm" or group.startswith("rm/"):
                groups.setdefault(group[3:] or "all", {})[metric] = value
            elif group:
                benchmarks.setdefault(group, {})[metric] = value
        for group, metrics in groups.items():
            m = _shown(metrics)
            self.log.show(
                f"evaluation at step {progress.step}, {group}: accuracy {m['accuracy']:.3f}  loss {m['loss']:.4f}  "
                f"margin {m['reward_margin']:+.3f}  chosen {m['chosen_rewards']:+.3f}  "
                f"rejected {m['rejected_rewards']:+.3f}"
            )
        for name, lines in benchmarks.items():
            shown = "  ".join(f"{line} {value:.3f}" for line, value in lines.items())
            self.log.show(f"evaluation at step {progress.step}, {name}: {shown}")

    def _record(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Metrics at an optimizer step, in every sink."""
        if not self.log.enabled:
            return
        row = progress.position() | metrics
        self._files["metrics.jsonl"].write({"step": progress.step, **row})
        self._board.scalars(row, progress.episode)
        if self._wandb is not None:
            self._wandb.log(row, progress.step)

    def samples(self, progress: Progress, rows: list[dict]) -> None:
        """Sample pairs with their rewards: whole in samples.jsonl and wandb; shortened on the console, where the table
        stands at the first and the last evaluation."""
        if not self.log.enabled:
            return
        self._files["samples.jsonl"].write(*({"step": progress.step, **row} for row in rows))
        if progress.step in (0, progress.total_steps):
            self.log.show(_sample_table(rows, title=f"sample pairs at step {progress.step}"))
        if self._wandb is not None:
            self._wandb.table(rows, progress.step)

    def skipped(self, progress: Progress, row: dict) -> None:
        """A step was left out: what is known of it in skipped.jsonl, and a line."""
        if not self.log.enabled:
            return
        row = {"step": progress.step, **row}  # a row may name the step that was left out, which is not made yet
        self._files["skipped.jsonl"].write(row)
        facts = "  ".join(f"{name} {_shorten(str(value))}" for name, value in row.items() if name != "step")
        self.log.show(f"skipped at step {row['step']}: {facts}")

    def figure(self, path: Path, progress: Progress) -> None:
        """Show a picture that was written to `path` in wandb."""
        if self._wandb is not None:
            self._wandb.picture(path, progress.step)


def _shown(metrics: dict[str, float | None]) -> dict[str, float]:
    """By the last part of their names; what is not there is shown as nan."""
    return {name.rpartition("/")[2]: math.nan if value is None else value for name, value in metrics.items()}


def _sample_table(rows: list[dict], title: str) -> Table:
    table = Table("prompt", "chosen", "rejected", "rewards", "right", title=title)
    for row in rows:
        texts = [_shorten(row[key]) for key in ("prompt", "chosen", "rejected")]
        rewards = f"{row['chosen_reward']:+.3f} {row['rejected_reward']:+.3f}"
        table.add_row(*texts, rewards, "tie" if row["right"] is None else "yes" if row["right"] else "NO")
    return table


def _shorten(text: str, limit: int = 160) -> str:
    printable = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is not
    text = " ".join(printable.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl, None for a number that was not finite; a last line cut off by a kill is left out."""
    return read_rows(path)
