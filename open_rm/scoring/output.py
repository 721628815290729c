"""A file of rows that appears whole or not at all, and whose making goes on where it was killed.

    OUT.partial     the rows so far, locked by the process that makes them
    OUT.progress    how many of its bytes count, and what they were made of and from: one small file, replaced by one rename

Rows are written first, then the progress that counts them, so what lies behind the counted bytes (a torn line) is cut when
the same command goes on. OUT itself appears by one rename at the end, and just before it what stands beside it.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO

from open_rm.errors import UserError, quote_error
from open_rm.manifest import sync_folder

COMMIT_SECONDS = 2.0  # rows of so long may have to be made again after a power cut or kill -9
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # a file system without locks
EXPLAINED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPERM, errno.EACCES, errno.EIO, errno.ESTALE)
EXPLAINED += (errno.ENOENT, errno.ENAMETOOLONG)  # a folder that takes no files, such as one of /proc


class Output:
    """Open with the facts that decide the bytes; then `write` and `commit`, and `finish` or `close`.

    overwrite: whether what another command began may be begun anew.
    """

    def __init__(self, path: Path, facts: dict[str, object], *, overwrite: bool):
        """facts: name, as a sentence says it -> value, for everything that decides the bytes and that the progress has not.

        Raises:
            UserError: OUT is there already, another process makes it, or it was begun with other facts.
        """
        self.path, self.facts, self.overwrite = path, facts, overwrite
        self._counted: tuple[int, dict | None] = (0, None)
        self.partial = path.with_name(path.name + ".partial")
        self._state = path.with_name(path.name + ".progress")
        self._committed = time.monotonic()
        self._check_not_there()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked()
        except OSError as error:
            raise self._explained(error) from error
        try:
            self._check_not_there()  # another process may have finished it meanwhile
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    @property
    def progress(self) -> dict | None:
        """Of the rows so far, by this process or by the one that was killed; None at the beginning."""
        return self._counted[1]

    def _check_not_there(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise UserError(
                f"--output {self.path} is there already; name another file, or pass --overwrite to make it anew"
            )

    def _locked(self) -> IO[bytes]:
        while True:
            file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                said = f"another process is making {self.path}; wait for it, or name another --output"
                raise UserError(said) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.partial)):
                    return file
            file.close()  # renamed between the opening and the lock: it is another process's OUT by now

    def _go_on(self) -> None:
        state = self._read_state()
        size = os.fstat(self._file.fileno()).st_size
        if state and state["bytes"] <= size:
            then = state["facts"]
            other = [_named(name, then.get(name)) for name, now in self.facts.items() if then.get(name) != now]
            if not other:
                self._counted = (state["bytes"], state["progress"])
                self._file.truncate(state["bytes"])
                self._file.seek(state["bytes"])
                return
            if not self.overwrite:
                raise UserError(
                    f"{self.partial} holds rows of a run with another {' and another '.join(other)}; give that command again, on "
                    "such a device, to go on with it, name another --output, or pass --overwrite to begin anew"
                )
        self.begin_anew()

    def begin_anew(self) -> None:
        """Drop the rows so far."""
        self._state.unlink(missing_ok=True)  # first: what it counts would be taken for rows to come
        self._file.seek(0)
        self._file.truncate(0)
        self._counted = (0, None)

    def _read_state(self) -> dict | None:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            return state if {"facts", "bytes", "progress"} <= state.keys() and state["progress"] else None
        except (OSError, ValueError, AttributeError):
            return None  # never written, or no file of ours: nothing counts

    def write(self, data: bytes, progress: dict, *, now: bool = False) -> None:
        """Rows behind those that are there, and how far they bring it; counted at once, or when it is time to.

        Raises:
            UserError: the disk takes no more.
        """
        try:
            self._file.write(data)
            # one assignment: whatever stops us before it, the file's position is not asked, which may be in a row
            self._counted = (self._counted[0] + len(data), progress)
            if now or time.monotonic() - self._committed >= COMMIT_SECONDS:
                self.commit()
        except OSError as error:
            raise self._explained(error) from error

    def commit(self) -> None:
        """Have the rows so far on the disk, and count them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        count, progress = self._counted
        if progress is None:
            return  # a state without rows would only refuse other flags
        state = {"facts": self.facts, "bytes": count, "progress": progress}
        new = self._state.with_name(self._state.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._state)
        self._committed = time.monotonic()

    def finish(self, beside: dict[Path, str] | None = None) -> None:
        """OUT appears, whole. beside: texts of the files that belong to it and appear before it."""
        try:
            self.commit()
            for path, text in (beside or {}).items():
                new = path.with_name(path.name + ".new")
                new.write_text(text, encoding="utf-8")
                os.replace(new, path)
            os.replace(self.partial, self.path)
            self._state.unlink(missing_ok=True)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._explained(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file; what was counted stays."""
        with contextlib.suppress(OSError):  # rows that were never counted found no place
            self._file.close()

    def _explained(self, error: OSError) -> Exception:
        if error.errno not in EXPLAINED:
            return error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else quote_error(error)
        kept = (
            "; what was written until then is kept: mend that and give the same command again" if self.progress else ""
        )
        return UserError(f"{self.path} cannot be written ({why}){kept}")


def _named(name: str, then: object) -> str:
    """A fact that differs, with what it was unless that is a fingerprint."""
    return f"{name} ({then} then)" if len(str(then)) <= 40 else name
