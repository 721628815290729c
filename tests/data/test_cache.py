"""A cache that several build at once, that is killed in the middle, or that is damaged, is right afterwards."""

import os
import signal
import subprocess
import sys
import time

import pytest

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
    (tmp_path / "made.0123abcd.tmp").mkdir()  # what a killed process left
    with appearing(folder) as building:
        (building / "a.txt").write_text("a")
        assert not folder.exists()
        assert [path.name for path in tmp_path.iterdir()] == [building.name] != ["made.0123abcd.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", MANIFEST]
    assert damage_of(folder) is None
    (folder / "a.txt").write_text("b")
    assert damage_of(folder) == "a.txt has another content than written"


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
