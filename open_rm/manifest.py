"""Folders that are whole or not there: sizes and sha256 of their files in a manifest, and one rename.

What is killed while it writes leaves no folder under the final name; what is damaged later is told from what was written.
"""

import contextlib
import glob
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from open_rm.errors import UserError

MANIFEST = "manifest.json"
ABANDONED_SECONDS = 24 * 3600.0  # far above what a builder takes between two blocks that it writes


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which appears as `folder`, with its manifest, when the block ends; on an error it is removed.

    What killed processes left beside it is removed first. Where locks do not reach from node to node (NFS with
    local_lock), two may be filled at once: the first that ends appears, the other one's rename is an OSError.
    """
    building = folder.with_name(f"{folder.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        building.mkdir()
        for other in folder.parent.glob(f"{glob.escape(folder.name)}.*.tmp"):
            if other != building and _is_abandoned(other, folder.name, now=building.stat().st_mtime):
                shutil.rmtree(other, ignore_errors=True)
        yield building
        (building / MANIFEST).write_text(json.dumps({path.name: written(path) for path in sorted(building.iterdir())}))
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _is_abandoned(building: Path, name: str, *, now: float) -> bool:
    """Is the process that fills it dead? Where that is one of another host: was nothing written to it for a day?

    now: seconds, by the clock that stamps the files there; hosts may have other ones.
    """
    host, *process = building.name.removeprefix(f"{name}.").rsplit(".", 3)
    if host == _host() and len(process) == 3:
        try:
            os.kill(int(process[0]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, ValueError):
            pass  # somebody else's, or no name of ours
        return False
    try:
        return now - max(path.stat().st_mtime for path in (building, *building.rglob("*"))) > ABANDONED_SECONDS
    except OSError:  # renamed or removed just now
        return False


def _host() -> str:
    """Where a process number means the same process: this machine, since it booted, in this container."""
    place = platform.node()
    with contextlib.suppress(OSError):  # Linux tells; names alone may be the same in many containers
        place += Path("/proc/sys/kernel/random/boot_id").read_text() + str(os.stat("/proc/self/ns/pid").st_ino)
    return f"{platform.node()}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


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
