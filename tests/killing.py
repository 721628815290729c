"""What a folder holds of a run, and what two runs must have in common at the end."""

import hashlib
import json
from pathlib import Path


def lines_of(folder: Path, name: str = "metrics.jsonl") -> int:
    try:
        return (folder / name).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def checkpoint_names(folder: Path) -> list[str]:
    """Committed ones."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def weights_hash(folder: Path) -> str:
    [file] = [path for path in folder.glob("*.safetensors")]
    return hashlib.sha256(file.read_bytes()).hexdigest()


TIMES = ("hours", "perf/", "eval/samples_per_second")


def record(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """A record's whole rows without what the clock decides; a run may be writing the next one."""
    *lines, _ = (folder / name).read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def same_run(one: Path, other: Path) -> None:
    """Two folders hold one and the same run, bit for bit: weights, metrics, samples."""
    assert all((folder / "metrics.jsonl").read_bytes().endswith(b"\n") for folder in (one, other))
    assert record(one) == record(other)
    assert record(one, "samples.jsonl") == record(other, "samples.jsonl")
    assert weights_hash(one) == weights_hash(other)
