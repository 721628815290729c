"""A claim on an output folder: two runs never write into one, and the claim of a dead run is taken over.

`.claim.json` says whose the folder is, `.claim.beat` is rewritten every BEAT_SECONDS by a holder that lives,
`.claim.lock` is locked while somebody decides, never for a run's length. A process that can be seen from here is looked
up; one on another host or in another container is judged by its beat.

What a beat cannot tell: a holder elsewhere that is suspended for longer than `patience` counts as dead. So does one
whose clock is behind by that much, on a file system that takes times from its clients' clocks instead of a server's.
Either notices before it writes, because `held` is false then.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from open_rm.errors import UserError

CLAIM, BEAT, LOCK = ".claim.json", ".claim.beat", ".claim.lock"
BEAT_SECONDS = 10.0
POLL_SECONDS = 0.5  # between looks at somebody else's beat
SETTLE_SECONDS = 1.0  # without locks: until what another newcomer wrote in the same moment is seen
LOCK_SECONDS = 30.0  # most that is waited for another newcomer's decision, which takes milliseconds
RETRY_SECONDS = 0.02
VANISHINGS = 100  # how often a folder is made again that others, on their way out, remove
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
LARGEST = 1 << 16  # bytes of a claim or beat that are read; a real one has a few hundred


class Claim:
    """A folder that is this process's until `release`; made by `take`, and a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.id = uuid.uuid4().hex
        self.taken_over: dict | None = None  # the dead run's claim, {} where it could not be read
        self._made: list[Path] = []  # folders that were missing, outermost first
        self._pid = os.getpid()
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="claim beat", daemon=True)

    @classmethod
    def take(cls, folder: Path, patience: float = 60.0, flag: str = "output_dir") -> "Claim":
        """Claim the folder, which is created where it is missing.

        Args:
            patience: seconds without a beat after which a holder that cannot be seen is dead; several beats.
            flag: what names the folder in errors.

        Raises:
            UserError: a run that lives has the folder, or it cannot be written. Nothing is left behind then.
        """
        where = f"--{flag} {folder}"
        claim = cls(Path(folder).absolute())
        try:
            claim._take(patience, where)
        except OSError as error:
            _remove_empty(claim._made)
            what = error.strerror or error
            raise UserError(f"{where}: cannot be written ({what}); choose another folder") from error
        except BaseException:
            _remove_empty(claim._made)
            raise
        claim._thread.start()
        return claim

    def held(self) -> bool:
        """Whether the folder is still ours: no when it is gone or carries another id, yes when nobody can say.

        Not knowing is not losing: a file system that fails for a moment must not end a run, and who takes over always
        leaves an id that can be read.
        """
        try:
            found = _find(self.folder)
        except OSError:
            return True
        return found is not None and (found.claim is None or found.claim["id"] == self.id)

    def release(self) -> None:
        """Give the folder back, and remove it, with its parents, where `take` made them and nothing came into them.

        It raises nothing, so that it never hides how the run ended. Another run's claim stays, and so does everything
        in a forked child.
        """
        if self._over.is_set() or os.getpid() != self._pid:
            return
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=BEAT_SECONDS)  # a beat after the removal would leave its file behind
        with contextlib.suppress(OSError), _locked(self.folder) as locked:
            found = _find(self.folder)
            if found and found.claim and found.claim["id"] == self.id:
                # The beat goes last: a claim without one would look older than it is. Somebody else's lock stays.
                _remove(self.folder, CLAIM, BEAT, *([] if locked is None else [LOCK]))
        _remove_empty(self._made)  # after the lock is closed: NFS keeps open files under another name

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _take(self, patience: float, where: str) -> None:
        """Decide and write under the lock, watch without it, until the folder is ours or somebody else's."""
        still, said = None, False
        while True:
            with _locked(self.folder, self._made) as locked:
                if locked is None:
                    raise UserError(
                        f"{where}: another process has held {self.folder / LOCK} for {LOCK_SECONDS:.0f} s; end it, or "
                        "choose another folder"
                    )
                found = _find(self.folder)
                lives = _lives(found, self.folder, patience) if found and found != still else False
                if lives:
                    raise _taken(found, where)
                if lives is False:
                    self._write(found, locked)
            if lives is None:
                if not said:
                    print(_waiting(found, where, patience), file=sys.stderr, flush=True)
                said, still = True, _watch(found, self.folder, patience, where)
            elif locked or self._settled():
                return

    def _settled(self) -> bool:
        """Without locks: whether the claim is still ours after a moment, or another newcomer wrote after us."""
        time.sleep(SETTLE_SECONDS)
        found = _find(self.folder)
        return bool(found and found.claim and found.claim["id"] == self.id)

    def _write(self, old: "_Found | None", locked: bool) -> None:
        """Put our claim in the old one's place. Our beat comes first, so that it is never seen with an old beat."""
        own = {"id": self.id, "host": socket.gethostname(), "pid": self._pid, **_here()}
        own["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            if locked:  # what newcomers left that were killed: nobody else writes now
                _remove(self.folder, *(path.name for path in self.folder.glob(".claim.*.tmp")))
            self._beat()
            with _temporary(self.folder, json.dumps(own, indent=2) + "\n") as (path, _):
                os.replace(path, self.folder / CLAIM)
        except OSError:
            if old is None:
                _remove(self.folder, BEAT, LOCK)
            raise
        self.taken_over = None if old is None else old.claim or {}

    def _beat(self) -> None:
        self._beats += 1
        (self.folder / BEAT).write_text(f"{self.id} {self._beats}\n")

    def _keep_beating(self) -> None:
        """Beat while the folder is ours. A beat that cannot be written is left out: it must not end a run."""
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self.held():  # else a run that has lost its claim would keep another one's alive
                    self._beat()


# ---------------------------------------------------------------- what is found, and whether it lives


@dataclass(frozen=True)
class _Found:
    """A claim and its beat as they lie in the folder; equal to a later look where nothing moved."""

    text: bytes
    beat: bytes
    changed_ns: int  # when the newer of both was written, by the file system's clock

    @property
    def claim(self) -> dict | None:
        """The claim, or None where it is not one that `take` wrote."""
        try:
            claim = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        kinds = {"id": str, "host": str, "pid": int, "started": str}
        whole = isinstance(claim, dict) and all(isinstance(claim.get(key), kind) for key, kind in kinds.items())
        return claim if whole else None


def _find(folder: Path) -> _Found | None:
    """What lies in the folder; None where there is no claim (or no folder)."""
    text, claimed_ns = _read(folder / CLAIM)
    beat, beaten_ns = _read(folder / BEAT)
    return None if text is None else _Found(text, beat or b"", max(claimed_ns, beaten_ns))


def _read(path: Path) -> tuple[bytes | None, int]:
    """Content and time of change. Opened for both, because NFS answers a mere stat from memory, up to a minute old."""
    try:
        with path.open("rb") as file:
            return file.read(LARGEST), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None, 0


def _lives(found: _Found, folder: Path, patience: float) -> bool | None:
    """Whether the holder lives; None: only time can tell.

    How old a beat is, is told by a file that is written now beside it: the clocks of hosts may differ.
    """
    seen = _process_lives(found.claim) if found.claim else None
    if seen is not None:
        return seen
    with _temporary(folder, "now\n") as (_, now_ns):
        return False if now_ns - found.changed_ns > patience * 1e9 else None


def _process_lives(claim: dict) -> bool | None:
    """Whether the claim's process runs; None where it cannot be seen from here.

    A pid is used again after a while, so that the time of its start has to fit too.
    """
    here = _here()
    same = all(here[key] is not None and claim.get(key) == here[key] for key in ("boot_id", "pid_namespace"))
    if not same or not isinstance(claim.get("start_time"), int) or claim["pid"] <= 0:
        return None
    try:
        state, start_time = _state_of(claim["pid"])
    except OSError:
        with contextlib.suppress(PermissionError):
            try:
                os.kill(claim["pid"], 0)
            except (ProcessLookupError, OverflowError):
                return False
        return None  # it runs, but /proc does not show other users' processes
    return state not in "ZX" and start_time == claim["start_time"]


def _state_of(pid: int) -> tuple[str, int]:
    """State (Z: a zombie) and time of start, in ticks since boot. The name in front may hold spaces and brackets."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _here() -> dict:
    """Our own time of start, and what says which processes can be seen from here; None where the system has none."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            raise OSError("/proc is another namespace's")
        return {
            "start_time": _state_of(os.getpid())[1],
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
        }
    except OSError:
        return {"start_time": None, "boot_id": None, "pid_namespace": None}


def _watch(found: _Found, folder: Path, patience: float, where: str) -> _Found | None:
    """`found` when it has been still for `patience`, by our own clock; None when it is no longer there: decide again.

    Raises:
        UserError: it moved, so the holder lives.
    """
    started = time.monotonic()
    while time.monotonic() - started < patience:
        time.sleep(POLL_SECONDS)
        now = _find(folder)
        if now is None or now.text != found.text:
            return None
        if now != found:
            raise _taken(now, where)
    return found


def _taken(found: _Found, where: str) -> UserError:
    return UserError(f"{where}: run by {_holder(found)}; wait for it, end it, or choose another folder")


def _waiting(found: _Found, where: str, patience: float) -> str:
    return (
        f"{where}: claimed by {_holder(found)}, not seen from here; waiting up to {patience:.0f} s for a sign of life"
    )


def _holder(found: _Found) -> str:
    claim = found.claim
    if claim is None:
        return f"a process that is not known ({CLAIM} cannot be read)"
    return f"process {claim['pid']} on {claim['host']} since {claim['started']}"


# ---------------------------------------------------------------- files and the lock


@contextlib.contextmanager
def _locked(folder: Path, made: list[Path] | None = None) -> Iterator[bool | None]:
    """Hold the folder's lock; gives True, False where the file system has no locks, None where others kept it too long.

    made: where what is missing of the folder and is made now is noted; None: a missing folder is an error.
    Who held the lock before may have removed its file; then the lock is worth nothing, and a new file is made.
    """
    started, vanished, file, locked = time.monotonic(), 0, -1, None
    try:
        while locked is None and time.monotonic() - started < LOCK_SECONDS:
            try:
                if made is not None:
                    _make(folder, made)
                file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                locked = _try_lock(file, folder / LOCK)
            except FileNotFoundError:
                vanished += 1
                if made is None or vanished > VANISHINGS:
                    raise
            if locked is None:
                file = _close(file)
                time.sleep(RETRY_SECONDS)
        yield locked
    finally:
        if locked:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile would keep it
        _close(file)


def _try_lock(file: int, path: Path) -> bool | None:
    """True: locked; False: there are no locks here; None: somebody else's, or no longer the file of that name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return False
        raise
    try:
        return True if os.path.samestat(os.fstat(file), os.stat(path)) else None
    except FileNotFoundError:
        return None


def _close(file: int) -> int:
    if file >= 0:
        os.close(file)
    return -1


@contextlib.contextmanager
def _temporary(folder: Path, text: str) -> Iterator[tuple[Path, int]]:
    """A file of its own beside the claim, on disk, and when it was written; removed unless it was renamed."""
    path = folder / f".claim.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            written_ns = os.fstat(file.fileno()).st_mtime_ns
        yield path, written_ns
    finally:
        _remove(folder, path.name)


def _make(folder: Path, made: list[Path]) -> None:
    """Make the folder and its parents; what was missing is added to `made`, outermost first."""
    for path in [*reversed(folder.parents), folder]:
        if path.is_dir():
            continue
        try:
            path.mkdir()
        except FileExistsError:  # made by another process meanwhile, or a file
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        else:
            made.append(path)


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders from the innermost on, up to the first that holds something."""
    for path in reversed(folders):
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
