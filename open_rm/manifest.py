"""Folders that are whole or not there: sizes and sha256 of their files in a manifest, and one rename.

What is killed while it writes leaves no folder under the final name; what is damaged later is told from what was written.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from open_rm.errors import UserError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which appears as `folder`, with its manifest, when the block ends; on an error it is removed.

    What killed processes left beside it is removed first, so the caller has to hold a lock.
    """
    for left_behind in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(left_behind, ignore_errors=True)
    building = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        building.mkdir()
        yield building
        (building / MANIFEST).write_text(json.dumps({path.name: written(path) for path in sorted(building.iterdir())}))
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def written(path: Path) -> list:
    """What the manifest says of a file: size and sha256."""
    return [path.stat().st_size, content_hash([path])]


def commit(building: Path, folder: Path, files: dict[str, list]) -> None:
    """Let `building`, whose files are on the disk and described by `written`, appear as `folder`, which a power cut keeps."""
    with (building / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(files, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(building)
    os.rename(building, folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def damage_of(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a folder that was made here; None where every file is as it was written.

    share: (k, n): of every n files the content of one alone is read, so that n processes together read all.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())
        if not files:
            return f"{MANIFEST} names no file"
        for number, (name, (size, content)) in enumerate(files.items()):
            if (folder / name).stat().st_size != size:
                return f"{name} has another size than written"
            if number % share[1] == share[0] and content_hash([folder / name]) != content:
                return f"{name} has another content than written"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError, UserError):
        return f"{MANIFEST} cannot be read"
    return None


def content_hash(paths: Iterable[Path]) -> str:
    """sha256 over the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
