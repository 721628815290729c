"""A folder has one run: real processes race for it, die, stop and are taken over; other hosts are claims edited to be."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from open_rm.errors import UserError
from open_rm.reliability import claim as module
from open_rm.reliability.claim import BEAT, CLAIM, LOCK, Claim

# A process that takes and releases as it is told, a line each; it answers in JSON.
WORKER = """
import json, sys, time
from pathlib import Path
from open_rm.errors import UserError
from open_rm.reliability.claim import Claim

claim = None
for line in sys.stdin:
    word, folder, at = json.loads(line)
    answer = None
    if word == "take":
        while time.time() < at:
            pass
        try:
            claim = Claim.take(Path(folder))
            answer = {"id": claim.id, "taken_over": claim.taken_over}
        except UserError as error:
            claim, answer = None, str(error)
    elif word == "release" and claim:
        claim.release()
    print(json.dumps(answer), flush=True)
"""

# Takes and releases as fast as it can for a while; says how often two had the folder at once, and how often it had it.
CONTENDER = """
import os, sys, time
from pathlib import Path
from open_rm.errors import UserError
from open_rm.reliability.claim import Claim

folder, witness, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
both = had = 0
end = time.monotonic() + seconds
while time.monotonic() < end:
    try:
        claim = Claim.take(folder)
    except UserError as error:
        assert "run by process" in str(error), error
        continue
    try:
        os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
        both += not claim.held()
        os.unlink(witness)
    except FileExistsError:
        both += 1
    had += 1
    claim.release()
print(both, had)
"""


def start(script: str, *arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


class Worker:
    def __init__(self):
        self.process = start(WORKER)

    def tell(self, word: str, folder: Path, at: float = 0.0) -> None:
        self.process.stdin.write(json.dumps([word, str(folder), at]) + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def take(self, folder: Path):
        self.tell("take", folder)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def workers():
    made = [Worker(), Worker()]
    yield made
    for worker in made:
        worker.end()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def quick(monkeypatch):
    """Beats and looks in tenths of their times."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.2)


def edit(folder: Path, **changes) -> dict:
    claim = json.loads((folder / CLAIM).read_text()) | changes
    (folder / CLAIM).write_text(json.dumps(claim))
    return claim


def left_by_a_dead_run(folder: Path, **changes) -> dict:
    """The files of a run that was killed, by default on another host."""
    with Claim.take(folder):
        elsewhere = {"id": "0" * 32, "host": "host-b", "boot_id": "another boot", "pid": 4321}
        return edit(folder, **(elsewhere | changes))  # the release finds another id and leaves it


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for name in (CLAIM, BEAT):
        os.utime(folder / name, (then, then))


def wait_until(happens, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.05)


def replace_by_a_folder(path: Path) -> bool:
    """False where a beat came in between."""
    path.unlink()
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Beating:
    """Another host's holder, whose clock is wrong by `skew` seconds on a file system that takes times from clients."""

    def __init__(self, folder: Path, skew: float = 0.0):
        self.folder, self.skew, self.over = folder, skew, threading.Event()
        self.beat(0)
        self.thread = threading.Thread(target=self.keep_beating)

    def beat(self, number: int) -> None:
        (self.folder / BEAT).write_text(f"{'0' * 32} {number}\n")
        then = time.time() + self.skew
        for name in (CLAIM, BEAT):
            os.utime(self.folder / name, (then, then))

    def keep_beating(self) -> None:
        number = 1
        while not self.over.wait(0.2):
            self.beat(number)
            number += 1

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


# ---------------------------------------------------------------- one process


def test_a_claim_says_whose_the_folder_is_and_leaves_nothing(folder):
    folder.mkdir()
    with Claim.take(folder) as claim:
        written = json.loads((folder / CLAIM).read_text())
        assert written["id"] == claim.id and written["pid"] == os.getpid() and written["host"]
        assert written["start_time"] and written["boot_id"] and written["pid_namespace"].startswith("pid:")
        assert names(folder) == {CLAIM, BEAT, LOCK}
        assert claim.held() and claim.taken_over is None
    assert names(folder) == set() and not claim.held()
    claim.release()
    assert folder.is_dir()


def test_what_take_made_goes_unless_something_came_into_it(tmp_path):
    deep = tmp_path / "a" / "b" / "out"
    Claim.take(deep).release()
    assert names(tmp_path) == set()
    with Claim.take(deep):
        (tmp_path / "a" / "kept.txt").touch()
    assert names(tmp_path / "a") == {"kept.txt"}
    with Claim.take(deep):
        (deep / "config.json").touch()
    assert names(deep) == {"config.json"}


def test_the_same_process_cannot_take_it_twice(folder):
    with Claim.take(folder):
        with pytest.raises(UserError, match=f"--output_dir .*out: run by process {os.getpid()} on .* since 20"):
            Claim.take(folder)
        assert names(folder) == {CLAIM, BEAT, LOCK}
    assert not folder.exists()


def test_the_holder_beats_and_goes_on_when_it_cannot(folder, quick):
    with Claim.take(folder) as claim:
        beats = set()
        wait_until(lambda: beats.add((folder / BEAT).read_text()) or len(beats) > 3)
        wait_until(lambda: replace_by_a_folder(folder / BEAT))  # cannot be written
        time.sleep(0.5)
        assert claim._thread.is_alive() and claim.held()
        (folder / BEAT).rmdir()
        wait_until((folder / BEAT).is_file)
    assert not claim._thread.is_alive()


def test_a_claim_that_was_lost_is_not_held_and_not_removed(folder, quick):
    with Claim.take(folder) as claim:
        edit(folder, id="f" * 32)
        assert not claim.held()
        time.sleep(0.3)
        beat = (folder / BEAT).read_text()
        time.sleep(0.5)
        assert (folder / BEAT).read_text() == beat, "keeps another run's claim alive"
    assert json.loads((folder / CLAIM).read_text())["id"] == "f" * 32


def test_a_folder_that_was_removed_is_not_held(folder):
    with Claim.take(folder) as claim:
        for name in names(folder):
            (folder / name).unlink()
        folder.rmdir()
        assert not claim.held()
    assert not folder.exists()


def test_not_knowing_is_not_losing(folder, monkeypatch):
    with Claim.take(folder) as claim:

        def fails(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        monkeypatch.setattr(module, "_read", fails)
        assert claim.held()
        monkeypatch.undo()
        (folder / CLAIM).write_text("{")
        assert claim.held()


def test_a_forked_child_gives_nothing_back(folder):
    with Claim.take(folder) as claim:
        child = os.fork()
        if child == 0:
            claim.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert claim.held()


# ---------------------------------------------------------------- several processes


def test_of_two_at_once_one_wins(tmp_path, workers):
    """On folders that are missing, and on those of dead runs."""
    gone = workers[0].process.pid  # lives, with another start time than the claim's
    for number in range(20):
        folder = tmp_path / f"round_{number}"
        if number % 2:
            left_by_a_dead_run(folder, boot_id=module._here()["boot_id"], pid=gone, start_time=1)
        at = time.time() + 0.03
        for worker in workers:
            worker.tell("take", folder, at)
        answers = [worker.answer() for worker in workers]
        [won] = [answer for answer in answers if isinstance(answer, dict)]
        [lost] = [answer for answer in answers if isinstance(answer, str)]
        assert json.loads((folder / CLAIM).read_text())["id"] == won["id"]
        assert (won["taken_over"] or {}).get("pid") == (gone if number % 2 else None)
        assert "run by process" in lost
        for worker in workers:
            worker.tell("release", folder)
            worker.answer()
        assert not folder.exists() or names(folder) == set()


def test_never_two_at_once_while_the_folder_comes_and_goes(tmp_path):
    """Each release removes the folder and the lock that others are about to take."""
    contenders = [start(CONTENDER, tmp_path / "a" / "out", tmp_path / "witness", 2.5) for _ in range(4)]
    counts = [list(map(int, contender.communicate(timeout=60)[0].split())) for contender in contenders]
    assert all(contender.returncode == 0 for contender in contenders)
    assert sum(both for both, _ in counts) == 0 and sum(had for _, had in counts) > 20, counts


def test_a_lock_that_was_removed_before_it_was_locked_is_worth_nothing(folder, monkeypatch):
    """The last holder's release may fall between a newcomer's opening and locking; a third one would lock a new file."""
    real, calls = fcntl.flock, []

    def late(file, how):
        if not calls:
            (folder / LOCK).unlink()
            (folder / LOCK).touch()
        calls.append(how)
        real(file, how)

    def write(self, old, locked, real_write=Claim._write):
        with (folder / LOCK).open("r+") as third, pytest.raises(BlockingIOError):
            real(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        real_write(self, old, locked)

    monkeypatch.setattr(module.fcntl, "flock", late)
    monkeypatch.setattr(Claim, "_write", write)
    Claim.take(folder).release()
    assert len(calls) >= 4


def test_a_killed_run_is_taken_over_at_once(folder, workers):
    won = workers[0].take(folder)
    os.kill(workers[0].process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, workers[0].process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie
    started = time.monotonic()
    with Claim.take(folder) as claim:
        assert time.monotonic() - started < 1
        assert claim.taken_over["id"] == won["id"] and claim.taken_over["pid"] == workers[0].process.pid
    workers[0].process.wait()
    workers[1].take(folder)
    workers[1].end()  # no zombie either
    assert Claim.take(folder).taken_over["pid"] == workers[1].process.pid


def test_a_stopped_run_lives(folder, workers):
    workers[0].take(folder)
    os.kill(workers[0].process.pid, signal.SIGSTOP)
    age(folder, 3600)
    assert f"run by process {workers[0].process.pid} on" in workers[1].take(folder)


def test_a_pid_that_is_used_again_is_another_process(folder, workers):
    workers[0].take(folder)
    edit(folder, start_time=1)
    with Claim.take(folder) as claim:
        assert claim.taken_over["pid"] == workers[0].process.pid


def test_a_lock_that_is_never_given_back_is_not_waited_for_forever(folder, monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    folder.mkdir()
    with (folder / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process has held .*claim.lock"):
            Claim.take(folder)
    Claim.take(folder).release()


# ---------------------------------------------------------------- processes that cannot be seen


@pytest.mark.parametrize("skew", [0, 3600, -3])
def test_another_host_whose_beat_moves_lives_whatever_its_clock_says(folder, quick, capsys, skew):
    left_by_a_dead_run(folder)
    started = time.monotonic()
    with Beating(folder, skew), pytest.raises(UserError, match="--out .*: run by process 4321 on host-b since"):
        Claim.take(folder, patience=5.0, flag="out")
    assert time.monotonic() - started < 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "process 4321 on host-b" in said and "up to 5 s" in said


@pytest.mark.parametrize("skew", [0, 3600])
def test_another_host_whose_beat_is_still_is_dead_after_patience(folder, quick, capsys, skew):
    old = left_by_a_dead_run(folder)
    age(folder, -skew)
    started = time.monotonic()
    with Claim.take(folder, patience=1.0) as claim:
        assert 1 <= time.monotonic() - started < 4
        assert claim.taken_over == old and claim.held()
    assert capsys.readouterr().err.count("\n") == 1


def test_another_host_whose_beat_is_old_is_dead_at_once(folder, capsys):
    old = left_by_a_dead_run(folder)
    age(folder, 120)
    with Claim.take(folder) as claim:
        assert claim.taken_over == old
    assert capsys.readouterr().err == ""


def test_another_container_on_this_host_is_judged_by_its_beat(folder, quick):
    left_by_a_dead_run(folder, boot_id=module._here()["boot_id"], pid_namespace="pid:[1]", pid=os.getpid())
    with Claim.take(folder, patience=0.5) as claim:
        assert claim.taken_over["pid_namespace"] == "pid:[1]"


def test_a_host_that_lets_go_while_it_is_watched(folder, quick):
    left_by_a_dead_run(folder)
    timer = threading.Timer(0.4, (folder / CLAIM).unlink)
    timer.start()
    with Claim.take(folder, patience=30.0) as claim:
        assert claim.taken_over is None
    timer.join()


def test_a_process_that_proc_hides_is_judged_by_its_beat(folder, quick, monkeypatch):
    """As /proc mounted with hidepid hides those of other users."""
    real = module._state_of

    def hidden(pid):
        if pid != os.getpid():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(pid)

    left_by_a_dead_run(folder, boot_id=module._here()["boot_id"], pid=os.getppid())
    monkeypatch.setattr(module, "_state_of", hidden)
    with Beating(folder), pytest.raises(UserError, match="run by process"):
        Claim.take(folder, patience=5.0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "x", "pid": 1}', "\x00" * 100, "[" * 60_000], ids=str.__len__)
def test_a_damaged_claim_is_judged_by_its_beat(folder, quick, text):
    left_by_a_dead_run(folder)
    (folder / CLAIM).write_text(text)
    with Beating(folder), pytest.raises(UserError, match="run by a process that is not known .* cannot be read"):
        Claim.take(folder, patience=5.0)
    age(folder, 10)
    with Claim.take(folder, patience=5.0) as claim:
        assert claim.taken_over == {} and claim.held()


def test_a_claim_that_was_killed_before_its_first_beat(folder, quick):
    left_by_a_dead_run(folder)
    (folder / BEAT).unlink()
    (folder / ".claim.1234abcd.tmp").touch()
    started = time.monotonic()
    with Claim.take(folder, patience=0.5) as claim:
        assert time.monotonic() - started >= 0.5  # its claim is new, so that it may be about to beat
        assert claim.taken_over["host"] == "host-b"
        assert names(folder) == {CLAIM, BEAT, LOCK}


# ---------------------------------------------------------------- file systems


@pytest.fixture
def without_locks(monkeypatch, quick):
    def fails(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", fails)


def test_a_file_system_without_locks(folder, without_locks):
    with Claim.take(folder) as claim:
        assert claim.held()
        with pytest.raises(UserError, match="run by process"):
            Claim.take(folder)
    assert not folder.exists()


def test_without_locks_who_wrote_last_wins(folder, without_locks, workers):
    """Another newcomer writes over the claim in the moment before it is read back."""
    won = []

    def write(self, old, locked, real=Claim._write):
        real(self, old, locked)
        (folder / CLAIM).unlink()  # as if the other had looked before this was written
        won.append(workers[0].take(folder))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="run by process"):
        patch.setattr(Claim, "_write", write)
        Claim.take(folder)
    assert json.loads((folder / CLAIM).read_text())["id"] == won[0]["id"]


def test_a_path_below_a_file_and_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "out"):
        with pytest.raises(UserError, match=r"--output_dir .*: cannot be written \(Not a directory\); choose another"):
            Claim.take(path)
    assert names(tmp_path) == {"file"}


def test_a_folder_that_cannot_be_made():
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\)"):
        Claim.take(Path("/proc/open_rm/out"))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of its own, which can be full or read-only even for root."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mounted)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def test_a_folder_that_becomes_read_only(small_disk, quick):
    old = Claim.take(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    time.sleep(0.5)
    assert old.held() and old._thread.is_alive()
    for path in (small_disk / "out", small_disk / "new"):
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); choose another folder"):
            Claim.take(path)
    old.release()
    assert not old._thread.is_alive()


def test_a_full_disk(small_disk):
    with (small_disk / "filler").open("wb") as filler, pytest.raises(OSError):
        while True:
            os.write(filler.fileno(), bytes(4096))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        Claim.take(small_disk / "a" / "out")
    assert names(small_disk) == {"filler"}
