"""Where a run's numbers go: console, metrics.jsonl, TensorBoard, wandb.

metrics.jsonl is the record: one JSON object per line, flushed at once, so that a killed run keeps it. The others are
views. Only floats and sample tables come here; averages over ranks are made before (see metrics.py).
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

BAR_CELLS = 20
LOG_COLUMNS = 170


class Tracker:
    """Sinks of the main rank; on other ranks every call does nothing.

    Args:
        output_dir: metrics.jsonl, samples.jsonl, tensorboard/ and wandb/ are written here.
        settings: the run's flags and derived numbers, shown by wandb and TensorBoard. No secrets.
    """

    def __init__(
        self,
        output_dir: str,
        *,
        enabled: bool,
        run_name: str,
        settings: dict,
        with_tracking: bool = False,
        wandb_project_name: str | None = None,
        wandb_entity: str | None = None,
    ):
        self.enabled = enabled
        self._wandb = None
        if not enabled:
            return
        # In a log file there is no terminal to ask for a width, and 80 columns would break tables apart.
        self.console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else LOG_COLUMNS)
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._samples = (folder / "samples.jsonl").open("w", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._board.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
        self._last_line = 0.0
        if with_tracking:
            self._wandb, line = start_wandb(folder, run_name, settings, wandb_project_name, wandb_entity)
            self.say(line)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.enabled:
            self.console.print(text, markup=False, soft_wrap=True)

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        """Record metrics at an optimizer step in every sink."""
        if not self.enabled:
            return
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, int(metrics["episode"]))
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def train_line(self, metrics: dict[str, float], *, step: int, total_steps: int, eta_seconds: float) -> None:
        """The console's line for a step, at most two a second."""
        if not self.enabled or (time.monotonic() - self._last_line < 0.5 and step not in (1, total_steps)):
            return
        self._last_line = time.monotonic()
        done = round(BAR_CELLS * step / total_steps)
        m = {name.rpartition("/")[2]: value for name, value in metrics.items()}
        self.say(
            f"[{'#' * done}{'.' * (BAR_CELLS - done)}] step {step}/{total_steps}  episode {m['episode']}  "
            f"loss {m['loss']:.4f}  accuracy {m['accuracy']:.3f}  margin {m['reward_margin']:+.3f}  lr {m['lr']:.2e}  "
            f"grad_norm {m['grad_norm']:.2f}  {m['pairs_per_second']:.1f} pairs/s  "
            f"{m['tokens_per_second']:.0f} tokens/s  ETA {timedelta(seconds=round(eta_seconds))}"
        )

    def evaluation_line(self, metrics: dict[str, float], *, step: int) -> None:
        """The console's lines for an evaluation: overall, then per source."""
        groups: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            if name.startswith("eval/rm/"):
                group, _, metric = name.removeprefix("eval/rm/").rpartition("/")
                groups.setdefault(group or "all", {})[metric] = value
        for group, m in groups.items():
            self.say(
                f"evaluation at step {step}, {group}: accuracy {m['accuracy']:.3f}  loss {m['loss']:.4f}  "
                f"margin {m['reward_margin']:+.3f}  chosen {m['chosen_rewards']:+.3f}  "
                f"rejected {m['rejected_rewards']:+.3f}"
            )

    def log_samples(self, rows: list[dict], *, step: int) -> None:
        """A table of sample pairs with their rewards, shortened on the console, whole in samples.jsonl and wandb."""
        if not self.enabled:
            return
        table = Table("prompt", "chosen", "rejected", "rewards", "right", title=f"sample pairs at step {step}")
        for row in rows:
            texts = [_shorten(row[key]) for key in ("prompt", "chosen", "rejected")]
            rewards = f"{row['chosen_reward']:+.3f} {row['rejected_reward']:+.3f}"
            table.add_row(*texts, rewards, "yes" if row["right"] else "NO")
            self._samples.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        self._samples.flush()
        self.console.print(table, markup=False)
        if self._wandb is not None:
            import wandb

            columns = list(rows[0])
            data = [[row[column] for column in columns] for row in rows]
            self._wandb.log({"preference_samples": wandb.Table(columns=columns, data=data)}, step=step)

    def log_figure(self, path: Path, *, step: int) -> None:
        """Show a picture that was written to `path` in wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({path.stem: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush and close every sink."""
        if not self.enabled:
            return
        self._metrics.close()
        self._samples.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(folder: Path, run_name: str, settings: dict, project: str | None, entity: str | None):
    """Start a wandb run; offline where there is no key or no server. Returns (run, line for the log)."""
    import wandb

    # Its own console capture would copy everything printed into the run file.
    options = dict(project=project, entity=entity, name=run_name, config=settings, dir=str(folder))
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
