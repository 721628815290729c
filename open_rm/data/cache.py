"""A folder that is built once and found again by its key, whoever asks, however often, whatever was killed meanwhile.

A folder is whole or not there (manifest.py). A lock, which the system releases when its holder dies, keeps others waiting
for the result instead of building it too; a damaged folder is built again. On a file system without flock the lock is a file
that a killed process of another host leaves behind; who waits for it is told to remove it.
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from open_rm import alive
from open_rm.errors import UserError
from open_rm.manifest import appearing, damage_of

LOCKS = ".locks"  # empty files that stay: removing one would part those who wait for it
PATIENCE_SECONDS = 4 * 3600.0  # most that is waited for another process's build
MESSAGE_SECONDS = 30.0


def find_or_build(cache_dir: str, key: str, build: Callable[[Path], None], *, flag: str) -> Path:
    """The folder `key` in `cache_dir`, filled by `build` unless it is there and whole.

    Args:
        build: fills the empty folder it is given; what it raises leaves nothing behind.
        flag: what names `cache_dir` in errors.

    Raises:
        UserError: the folder cannot be written, or another process builds for longer than PATIENCE_SECONDS.
    """
    parent = Path(cache_dir).expanduser()
    folder = parent / key
    if damage_of(folder) is None:
        return folder
    try:
        (parent / LOCKS).mkdir(parents=True, exist_ok=True)
        lock = _locked(parent / LOCKS / key, flag)
    except OSError as error:
        raise UserError(f"--{flag} {cache_dir}: cannot be written ({error.strerror})") from error
    with lock:
        damage = damage_of(folder)
        if damage is None:  # the process that held the lock built it
            return folder
        if folder.exists():
            print(f"{folder} is damaged ({damage}); it is built again", file=sys.stderr, flush=True)
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        try:
            with appearing(folder) as building:
                build(building)
        except OSError as error:
            if damage_of(folder) is not None:
                raise UserError(f"--{flag} {cache_dir}: cannot be written ({error.strerror or error})") from error
    return folder


def _locked(path: Path, flag: str):
    """Holds the lock; a context manager that lets it go."""
    lock, started = FileLock(path), time.monotonic()
    while True:
        try:
            return lock.acquire(timeout=min(MESSAGE_SECONDS, PATIENCE_SECONDS))
        except Timeout:
            alive.beat()  # it waits for a process that works, for hours perhaps
            waited = time.monotonic() - started
            if waited >= PATIENCE_SECONDS:
                raise UserError(
                    f"--{flag}: another process has held {path} for {waited / 3600:.1f} hours; end it if it hangs, or "
                    f"name another folder{_left_behind(path)}"
                ) from None
            message = f"waiting for another process that tokenizes the same data ({path}), {waited:.0f} s so far"
            print(f"{message}{_left_behind(path)}", file=sys.stderr, flush=True)


def _left_behind(path: Path) -> str:
    """What to do where there is no flock: filelock then writes its holder into the file, and finds a dead one of this host."""
    try:
        process, host = path.read_text().split()[:2]
    except (OSError, ValueError):
        return ""
    return f"; there is no flock here: if process {process} on {host} is dead, remove that file"
