"""Checkpoints on the disk: <output_dir>/checkpoints/step_00000120, whole or not there.

rank_00000.safetensors ...   each rank's weights, moments and random states (shards.py)
state.json                   how far the run is, its flags, marks of its data, positions in its records
manifest.json                sizes and sha256 of these
"""

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from open_rm.errors import UserError, quote_error
from open_rm.manifest import MANIFEST, damage_of
from open_rm.ranks import Ranks

FOLDER = "checkpoints"
STATE = "state.json"
BUILDING = ".tmp"


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole. state: of state.json."""

    path: Path
    state: dict

    @property
    def step(self) -> int:
        return self.state["progress"]["step"]

    def shards(self) -> list[Path]:
        """The ranks' files, in their order."""
        return sorted(self.path.glob("rank_*.safetensors"))


def folder_of(output_dir: str) -> Path:
    return Path(output_dir) / FOLDER


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def committed(output_dir: str) -> list[Path]:
    """The checkpoints of a run, the newest first, whole or damaged since."""
    folders = [path for path in folder_of(output_dir).glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(folders, reverse=True)


def remove_unfinished(output_dir: str) -> None:
    """What killed processes left. The caller holds the claim on the folder."""
    for left in folder_of(output_dir).glob(f"*{BUILDING}"):
        shutil.rmtree(left, ignore_errors=True)


def candidates(wanted: str, output_dir: str, *, flag: str = "--resume_from_checkpoint ") -> list[Path]:
    """The checkpoints to go on from, the newest first: those of the output folder, or what a path names.

    wanted: auto, never, a checkpoint, or the folder of a run or of its checkpoints.  flag: what names it in errors.

    Raises:
        UserError: the path that was named holds none.
    """
    if wanted == "auto":
        return committed(output_dir)
    if wanted == "never":
        return []
    path = Path(wanted).expanduser().resolve()
    if (path / STATE).exists() or (path / MANIFEST).exists():
        return [path]
    found = committed(str(path)) or (committed(str(path.parent)) if path.name == FOLDER else [])
    if not found:
        raise UserError(f"{flag}{wanted}: holds no checkpoint; name a folder step_..., or the --output_dir of a run")
    return found


def read(path: Path) -> Checkpoint:
    """One whose files are as they were written.

    Raises:
        UserError: its state is none.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state["progress"]["step"], int):
            raise TypeError("its step is no number")
        return Checkpoint(path, state)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / STATE}: cannot be read ({quote_error(error)}); name another checkpoint") from error


def damage_by_all(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint. A collective call: the ranks read a share of the files each."""
    damages = ranks.gathered(damage_of(path, share=(ranks.rank, ranks.world_size)))
    return next((found for found in damages if found), None)


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint, so that it counts as one no more."""
    aside = path.with_name(f"{path.name}.{why}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{number}")
    return path.rename(aside)


def first_whole(paths: list[Path], ranks: Ranks, *, named: bool) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The first of `paths` that is as it was written, and those before it with what is wrong. A collective call.

    named: the user named one, so that no other is taken in its place.

    Raises:
        UserError: there are some, and none is whole.
    """
    damaged = []
    for path in paths:
        damage = damage_by_all(path, ranks)
        if damage is None:
            return ranks.from_main(functools.partial(read, path)), damaged
        if named:
            break
        damaged.append((path, damage))
    if not paths:
        return None, damaged
    way_on = "name another one" if named else "move that folder away to begin anew"
    ranks.fail(f"no checkpoint in {paths[0].parent} is whole ({path.name}: {damage}); {way_on}")


def free_bytes(folder: Path) -> int:
    """Of the file system that the folder is in, or will be."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def gib(size: float) -> str:
    """A size as a person reads it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
