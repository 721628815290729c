"""Which file of scores a user means who names a folder, and what is said of a folder that has none."""

import json
import shlex
from pathlib import Path

from open_rm.evaluation.scored import SCORES

REPORT = "report.json"
OF_A_RUN = "evaluation"  # where a training run has the report of its own model


def scores_path(name: str | Path, *, of_runs: bool = True) -> Path:
    """The scores file that a user named, or that of a folder, there or not.

    of_runs: of a training run's folder, too, whose scores are in OF_A_RUN.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return path
    run = path / OF_A_RUN / SCORES
    return run if of_runs and run.is_file() and not (path / SCORES).is_file() else path / SCORES


def says_which(name: str | Path) -> str | None:
    """What has to be said of a training run's folder: which of its files is taken."""
    path = scores_path(name)
    is_of_a_run = path.parent.name == OF_A_RUN and Path(name).expanduser().resolve() == path.parent.parent.resolve()
    return f"{name} is a training run's folder: its {OF_A_RUN}/{SCORES} is read" if is_of_a_run else None


def is_report_alone(folder: Path) -> bool:
    """Whether it holds a report of scores that are elsewhere, and no model."""
    return (folder / REPORT).is_file() and not (folder / SCORES).is_file() and not any(folder.glob("*config.json"))


def why_none(folder: Path) -> str:
    """Of a folder without scores, and what to name instead."""
    if not is_report_alone(folder):
        return f"no {SCORES} in this folder; name a folder that the evaluation wrote, or a scores file"
    try:
        words = shlex.split(json.loads((folder / REPORT).read_text(encoding="utf-8"))["command"])
        scores = words[words.index("--scores") + 1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"this folder holds a report alone, without {SCORES}; name the scores file that the report was made of"
    return f"this folder holds a report alone, of scores that are elsewhere; name the scores file, {scores}"
