"""A cache that several build at once, that is killed in the middle, or that is damaged, is right afterwards."""

import contextlib
import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from open_rm import manifest
from open_rm.data import cache
from open_rm.errors import UserError
from open_rm.manifest import MANIFEST, appearing, damage_of

# Builds the cache of argv[1] from the rows of argv[2] and prints what is in it; argv[3] seconds pass at each block.
BUILD = """
import sys, time
from open_rm.data import preparation
from open_rm.data.building import load_preference_data
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import DataFlags
folder, rows, pause, model = sys.argv[1:]
plain = preparation.prepare_block
def slow(*args):
    print("block", flush=True)
    time.sleep(float(pause))
    return plain(*args)
preparation.prepare_block = slow
flags = DataFlags(dataset_mixer_list=[rows, "1.0"], dataset_local_cache_dir=folder)
made = load_preference_data(flags, load_tokenizer(model))
print("pairs", len(made), made.table.chosen_id.sum(), flush=True)
"""


@pytest.fixture
def start(toy, tmp_path, write_rows):
    """Starts a process that builds; the rows are three blocks."""
    path = write_rows([{"prompt": "Q: ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(2500)])
    processes = []

    def call(pause=0.0):
        command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(path), str(pause), str(toy / "model")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.wait()


def result(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_two_jobs_and_four_ranks_build_one_cache_at_once(start, tmp_path):
    results = [result(process) for process in [start(pause=0.3) for _ in range(6)]]
    assert sum("block" in out for out in results) == 1, "one builds, the others wait"
    assert len({out.splitlines()[-1] for out in results}) == 1
    [folder] = [path.parent for path in (tmp_path / "cache").glob("*/manifest.json")]
    assert damage_of(folder) is None
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_builder_killed_in_the_middle_leaves_its_place_to_the_next(start, tmp_path):
    killed = start(pause=30)
    assert killed.stdout.readline().startswith("block")  # two threads write, and their lines may run together
    waiting = start()
    time.sleep(1)
    assert waiting.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()  # else its number is still taken
    assert "pairs 2500" in result(waiting)
    assert not list((tmp_path / "cache").glob("*.tmp")), "what the killed process left behind is gone"
    assert result(start()).startswith("pairs 2500"), "found, not built again"


DAMAGES = {
    "a byte is flipped": lambda folder: flip(folder / "pairs.arrow"),
    "the file is cut short": lambda folder: os.truncate(folder / "pairs.arrow", 1000),
    "a file is missing": lambda folder: (folder / "facts.json").unlink(),
    "the manifest is missing": lambda folder: (folder / "manifest.json").unlink(),
    "the manifest is no JSON": lambda folder: (folder / "manifest.json").write_text("{"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def built(tmp_path):
    """(folder, function that finds or builds it and returns how often it was built by now)"""
    times = []

    def build(folder):
        times.append(1)
        (folder / "pairs.arrow").write_bytes(bytes(range(256)) * 100)
        (folder / "facts.json").write_text("{}")

    def call():
        folder = cache.find_or_build(str(tmp_path / "cache"), "key", build, flag="dataset_local_cache_dir")
        assert damage_of(folder) is None
        return len(times)

    assert call() == call() == 1
    return tmp_path / "cache" / "key", call


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_again_and_says_so(built, damage, capsys):
    folder, call = built
    DAMAGES[damage](folder)
    assert call() == call() == 2
    assert "is damaged (" in capsys.readouterr().err


def test_what_fails_while_building_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise UserError("rows.jsonl:3: bad")

    with pytest.raises(UserError, match="rows.jsonl:3"):
        cache.find_or_build(str(tmp_path / "cache"), "key", build, flag="dataset_local_cache_dir")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.LOCKS]


def test_a_folder_appears_whole_when_it_is_filled_and_not_before(tmp_path):
    folder = tmp_path / "made"
    with appearing(folder) as building:
        (building / "a.txt").write_text("a")
        assert not folder.exists()
        assert [path.name for path in tmp_path.iterdir()] == [building.name]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", MANIFEST]
    assert damage_of(folder) is None
    (folder / "a.txt").write_text("b")
    assert damage_of(folder) == "a.txt has another content than written"


def test_unfinished_folders_of_dead_processes_of_this_host_go_and_those_of_others_after_a_day(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    here = manifest._host()

    def leave(name: str, folder_hours: float, file_hours: float) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").touch()
        for path, hours in ((tmp_path / name / "a.txt", file_hours), (tmp_path / name, folder_hours)):
            os.utime(path, (time.time() - hours * 3600,) * 2)
        return name

    for name in (f"made.{here}.{process.pid}.0123abcd.tmp", "made.other.host-1.1.0123abcd.tmp", "made.0123abcd.tmp"):
        leave(name, 25, 25 if "other" in name or name == "made.0123abcd.tmp" else 0)
    kept = {
        leave(f"made.{here}.{os.getppid()}.0123abcd.tmp", 99, 99),  # who fills it lives
        leave(f"made.other.host-1.{process.pid}.0123abcd.tmp", 23, 23),
        leave("made.other.host-1.2.0123abcd.tmp", 25, 0),  # a file in it grows
        leave(f"another.{here}.{process.pid}.0123abcd.tmp", 99, 99),
    }
    with appearing(tmp_path / "made") as building:
        (building / "a.txt").write_text("a")
        assert {path.name for path in tmp_path.iterdir()} == kept | {building.name}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"made"}


def test_a_day_is_one_of_the_file_servers_clock(tmp_path, monkeypatch):
    other = tmp_path / "made.other.1.0123abcd.tmp"
    other.mkdir()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10**6)  # this host is eleven days ahead
    with appearing(tmp_path / "made"):
        assert other.is_dir()


def test_two_hosts_without_common_locks_that_build_at_once_both_get_the_folder(tmp_path, monkeypatch, capsys):
    """The second one starts, and ends, while the first one builds; neither takes the other's lock or folder."""
    monkeypatch.setattr(cache, "_locked", lambda path, flag: contextlib.nullcontext())
    built = []

    def build(folder, host):
        (folder / "a.txt").write_text("a")
        if host == "first":
            monkeypatch.setattr(manifest, "_host", lambda: "second")
            monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # a number that no process of this host has
            find("second")
        assert (folder / "a.txt").exists()
        built.append(host)

    def find(host):
        return cache.find_or_build(str(tmp_path), "key", lambda folder: build(folder, host), flag="cache")

    monkeypatch.setattr(manifest, "_host", lambda: "first")
    assert find("first") == tmp_path / "key" and built == ["second", "first"]
    assert damage_of(tmp_path / "key") is None and not list(tmp_path.glob("*.tmp"))


def test_the_host_is_named_and_told_from_a_container_of_the_same_name(monkeypatch):
    here = manifest._host()
    assert here.startswith(f"{platform.node()}-") and here == manifest._host()
    plain = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: plain("/", **kwargs))
    assert manifest._host() != here


def test_where_there_is_no_flock_who_waits_is_told_whose_lock_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "MESSAGE_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(fcntl, "flock", no_flock)
    (tmp_path / cache.LOCKS).mkdir()
    lock = tmp_path / cache.LOCKS / "key"
    lock.write_text("77\nanother_host\n")
    told = "if process 77 on another_host is dead, remove that file"
    with pytest.warns(UserWarning, match="flock"), pytest.raises(UserError, match=told):
        cache.find_or_build(str(tmp_path), "key", lambda folder: None, flag="dataset_local_cache_dir")
    assert f"({lock}), 0 s so far; there is no flock here: {told}" in capsys.readouterr().err
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock.write_text(f"{dead.pid}\n{platform.node()}\n")  # of this host: filelock sees to it
    with pytest.warns(UserWarning, match="flock"):
        cache.find_or_build(str(tmp_path), "key", lambda folder: (folder / "a").touch(), flag="dataset_local_cache_dir")
    assert damage_of(tmp_path / "key") is None


def no_flock(number, kind):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_a_folder_whose_filling_fails_does_not_appear_and_the_error_is_kept(tmp_path):
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "made") as building:
        (building / "half").write_text("x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    assert damage_of(tmp_path / "made") == f"{MANIFEST} is missing"


def test_waiting_is_told_and_ends(tmp_path, monkeypatch, capsys):
    from filelock import FileLock

    monkeypatch.setattr(cache, "MESSAGE_SECONDS", 0.2)
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.5)
    (tmp_path / cache.LOCKS).mkdir()
    with (
        FileLock(tmp_path / cache.LOCKS / "key"),
        pytest.raises(UserError, match="--dataset_local_cache_dir: another process has held .* end it if it hangs"),
    ):
        cache.find_or_build(str(tmp_path), "key", lambda folder: None, flag="dataset_local_cache_dir")
    assert "waiting for another process that tokenizes the same data" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_names_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--dataset_local_cache_dir .*file: cannot be written"):
        cache.find_or_build(str(tmp_path / "file"), "key", lambda folder: None, flag="dataset_local_cache_dir")
