"""What a room of the dry run has to say, twice: in lines for people, in numbers for plan.json."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from open_rm.errors import UserError

PLAN = "plan.json"
COLUMNS = 14  # of the names on the left
GIB = 2**30


@dataclass(frozen=True)
class Told:
    """name: of the section, and its key in plan.json.  lines: text.  numbers: what JSON can hold; docs/dry_run.md says what each
    is.  refused: sentences by which the run would end."""

    name: str
    lines: list[str]
    numbers: dict | list
    refused: tuple[str, ...] = ()


def as_text(sections: Iterable[Told]) -> str:
    """All sections, the name of each beside its first line."""
    rows = []
    for section in sections:
        for number, line in enumerate(section.lines):
            rows.append(f"{section.name.replace('_', ' ') if number == 0 else '':{COLUMNS}s}{line}")
    return "\n".join(rows)


def write(folder: str, sections: Iterable[Told]) -> Path:
    """plan.json in a folder, which may hold a run: nothing else there is touched, and half a file is never seen.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(folder) / PLAN
    text = json.dumps({section.name: plain(section.numbers) for section in sections}, indent=2, allow_nan=False)
    beside = path.with_name(f".{PLAN}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: {PLAN} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return path


def plain(value):
    """The same in what JSON has: numbers of numpy as Python's, paths as text, null for what is no number."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def size(count: float) -> str:
    """Bytes as a person reads them, with as many digits as count."""
    unit, name = (GIB, "GiB") if count >= GIB else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:.{1 if count >= 10 * unit else 2}f} {name}"


def thousands(number: float) -> str:
    return f"{round(number):,}"


def counted(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{thousands(number)} {what}{'' if number == 1 else 's'}"
