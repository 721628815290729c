"""Sinks of a run that is resumed, and sinks that fail: a full disk, a folder that cannot be written, wandb gone.

On the Tracker itself, with real files, TensorBoard's own reader and wandb offline.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY

from open_rm.flags import TrackingFlags
from open_rm.training import plots, tracking, wandb_run
from open_rm.training.sinks import Board, RowFile

TRACKED = TrackingFlags(with_tracking=True)
NAMES = ("accuracy", "loss", "reward_margin", "chosen_rewards", "rejected_rewards", "lr", "grad_norm")
ROW_FILES = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl")
STEPS = 8


@pytest.fixture(autouse=True)
def wandb_offline(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))


@dataclass
class FakeProgress:
    """As Progress, with hours that follow from the step, so that two runs can be compared byte for byte."""

    step: int
    loss: float | None = 0.5
    total_steps: int = STEPS
    eta_seconds: float = 1.0
    last_train: dict = field(default_factory=dict)
    last_evaluation: dict = field(default_factory=dict)

    def __post_init__(self):
        values = dict.fromkeys(NAMES, 0.1 * self.step) | {"loss": self.loss}
        rates = {"perf/pairs_per_second": 1.0, "perf/tokens_per_second": 10.0}
        self.last_train = {f"train/rm/{name}": value for name, value in values.items()} | rates
        self.last_evaluation = {f"eval/rm/{name}": value for name, value in values.items()}

    @property
    def episode(self) -> int:
        return 4 * self.step

    def position(self) -> dict:
        return {"episode": self.episode, "epoch": self.episode / 100, "hours": self.step / 100}


def sample(step: int) -> dict:
    text = {"prompt": f"p {step} \u2028 é", "chosen": "c", "rejected": "r"}
    return text | {"chosen_reward": 0.5 * step, "rejected_reward": 0.0, "right": True}


def open_tracker(folder: Path, flags: TrackingFlags = TRACKED, **resuming) -> tracking.Tracker:
    return tracking.Tracker(str(folder), tracking.Log(enabled=True), {"run_name": "a run"}, flags, **resuming)


def steps(tracker: tracking.Tracker, first: int, last: int) -> None:
    """What a run records at each of these steps: the even ones are evaluated, 3 and 7 are skipped."""
    for step in range(first, last + 1):
        progress = FakeProgress(step)
        tracker.training(progress)
        if step in (3, 7):
            tracker.skipped(progress, {"reason": "no number", "loss": math.nan})
        if step % 2 == 0:
            tracker.evaluation(progress)
            tracker.samples(progress, [sample(step), sample(step + 100)])


def resumed(tracker: tracking.Tracker, step: int) -> dict:
    """What a checkpoint at this step keeps, through JSON as there."""
    return json.loads(json.dumps(tracker.positions() | {"episode": 4 * step}))


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ROW_FILES if (folder / name).exists()}


def lost(tracker: tracking.Tracker) -> list[str]:
    return [line for line in tracker.log.lines if not line.startswith("wandb: offline")]


def killed(folder: Path, *, checkpoint: int, until: int, flags: TrackingFlags = TRACKED) -> dict:
    """A run in a process of its own that is killed behind its checkpoint; returns what the checkpoint kept."""
    script = f"""
import json, os, signal, sys
from pathlib import Path
import test_sinks
tracker = test_sinks.open_tracker(Path({str(folder)!r}), test_sinks.TrackingFlags(with_tracking={flags.with_tracking}))
test_sinks.steps(tracker, 1, {checkpoint})
kept = test_sinks.resumed(tracker, {checkpoint})
test_sinks.steps(tracker, {checkpoint + 1}, {until})
print("kept", json.dumps(kept), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", Path(__file__).parent)))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return json.loads(done.stdout.splitlines()[-1].removeprefix("kept "))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with open_tracker(folder, TrackingFlags()) as tracker:
        steps(tracker, 1, STEPS)
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}


def wandb_history(folder: Path) -> list[dict]:
    """The rows of the one offline folder, read by wandb itself."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


# ---------------------------------------------------------------- resuming


def test_a_killed_run_that_goes_on_has_the_record_of_an_undisturbed_one(tmp_path, undisturbed):
    kept = killed(tmp_path, checkpoint=4, until=7)
    with open_tracker(tmp_path, resumed=kept) as tracker:
        assert {name: (tmp_path / name).stat().st_size for name in ROW_FILES} == kept["files"]
        steps(tracker, 5, 5)
        kept = resumed(tracker, 5)
        steps(tracker, 6, 6)
    with open_tracker(tmp_path, resumed=kept) as tracker:
        steps(tracker, 6, STEPS)
    assert content(tmp_path) == content(undisturbed) and len(content(tmp_path)) == 3
    assert lost(tracker) == []
    assert scalars(tmp_path) == scalars(undisturbed)
    assert len(scalars(tmp_path)["train/rm/loss"]) == STEPS
    # one wandb folder, of the first start's id, with every row and every table
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert kept["wandb_run"] and kept["wandb_run"] in folder.name
    history = wandb_history(tmp_path)
    assert [row["_step"] for row in history] == list(range(1, STEPS + 1))
    assert [row["train/rm/accuracy"] for row in history] == pytest.approx([0.1 * s for s in range(1, STEPS + 1)])
    tables = [row["_step"] for row in history if any(name.startswith("preference_samples") for name in row)]
    assert tables == [step for step in range(1, STEPS + 1) if step % 2 == 0]


def test_a_run_that_goes_on_in_another_folder_takes_the_record_with_it(tmp_path, undisturbed):
    with open_tracker(tmp_path / "old", TrackingFlags()) as tracker:
        steps(tracker, 1, 4)
        kept = resumed(tracker, 4)
        steps(tracker, 5, 6)
    before = content(tmp_path / "old")
    with open_tracker(tmp_path / "new", resumed=kept, positions_from=tmp_path / "old") as tracker:
        steps(tracker, 5, STEPS)
    assert content(tmp_path / "new") == content(undisturbed)
    assert content(tmp_path / "old") == before
    assert scalars(tmp_path / "new") == scalars(undisturbed)
    # tracking begins here, and has the whole run nevertheless
    assert [row["_step"] for row in wandb_history(tmp_path / "new")] == list(range(1, STEPS + 1))
    assert lost(tracker) == []


@pytest.mark.parametrize("source", [None, "old"])
def test_a_record_that_is_shorter_than_its_checkpoint_is_said_and_goes_on(tmp_path, source):
    folder = tmp_path / "old"
    with open_tracker(folder, TrackingFlags()) as tracker:
        steps(tracker, 1, 4)
        kept = resumed(tracker, 4)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    (folder / "samples.jsonl").unlink()
    target, how = (folder, {}) if source is None else (tmp_path / "new", {"positions_from": str(folder)})
    with open_tracker(target, TrackingFlags(), resumed=kept, **how) as tracker:
        steps(tracker, 5, 5)
        tracker.samples(FakeProgress(5), [sample(5)])
    assert [row["step"] for row in tracking.read_metrics(target / "metrics.jsonl")] == [1, 2, 5]
    assert [row["step"] for row in tracking.read_metrics(target / "samples.jsonl")] == [5]
    metrics, samples = tracker.log.lines
    assert metrics.startswith(f"{folder}/metrics.jsonl is shorter") and "after step 2 up to" in metrics
    assert samples.startswith(f"{folder}/samples.jsonl is shorter") and "from the start up to" in samples
    assert "episode 16" in metrics


def test_a_new_run_in_a_used_folder_begins_anew(tmp_path):
    for last in (8, 2):
        with open_tracker(tmp_path, TrackingFlags()) as tracker:
            assert tracker.positions() == {"files": dict.fromkeys(ROW_FILES, 0), "wandb_run": None}
            steps(tracker, 1, last)
    assert [row["step"] for row in tracking.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2]
    assert not (tmp_path / "skipped.jsonl").exists()


def test_other_ranks_have_no_positions(tmp_path):
    other = tracking.Tracker(str(tmp_path / "run"), tracking.Log(enabled=False), {}, TRACKED)
    other.skipped(FakeProgress(1), {"loss": 1.0})
    assert other.positions() == {"files": {}, "wandb_run": None}
    assert not (tmp_path / "run").exists()


def test_a_clock_that_went_back_puts_no_event_file_before_the_others(tmp_path, monkeypatch):
    for episode, now in ((0, 2_000_000_000), (4, 1_000_000_000), (8, 1_000_000_000)):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        board = Board(tmp_path / "tensorboard", print, purge_from=episode or None)
        for later in range(episode, episode + 12, 4):  # one that is kept, and two behind the checkpoint
            board.scalars({"loss": float(episode)}, later)
        board.close()
    assert scalars(tmp_path)["loss"] == [(0, 0.0), (4, 4.0), (8, 8.0), (12, 8.0), (16, 8.0)]


class ServedWandb:
    """An online run whose server has every step before `step`."""

    id, offline, disabled, step = "served", False, False, 3

    def __init__(self):
        self.logged = []

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self, exit_code):
        pass


def test_an_online_run_gets_what_its_server_has_not_and_nothing_twice(tmp_path, monkeypatch):
    kept, run, asked = killed(tmp_path, checkpoint=4, until=4), ServedWandb(), []
    monkeypatch.setattr(tracking, "start_wandb", lambda *a, **known: asked.append(known) or (run, "wandb: online"))
    with open_tracker(tmp_path, resumed=kept) as tracker:
        steps(tracker, 5, 6)
    assert asked == [{"run_id": kept["wandb_run"]}]
    assert [step for step, _ in run.logged] == [3, 4, 4, 4, 5, 6, 6, 6]  # training, evaluation, table
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1  # is not ours to remove: the server is not asked here
    run.logged.clear()
    run.step = 100
    with open_tracker(tmp_path, resumed=kept) as tracker:
        steps(tracker, 5, 6)
    assert run.logged == []


# ---------------------------------------------------------------- numbers that are none


def test_what_is_no_number_is_null_in_the_record_and_nan_in_the_views(tmp_path, capsys):
    with open_tracker(tmp_path) as tracker:
        tracker.training(FakeProgress(1, loss=math.nan))
        kept = resumed(tracker, 1)
        tracker._last_line = 0.0
        tracker.training(FakeProgress(2, loss=None))
        tracker.training(FakeProgress(3, loss=-math.inf))
        tracker.evaluation(FakeProgress(3, loss=None))
        half_an_emoji = "\ud83d \u2028"
        tracker.skipped(FakeProgress(4), {"loss": math.nan, "pairs": [1, math.inf], "text": half_an_emoji})
        tracker.training(FakeProgress(STEPS, loss=0.25))
    raw = [*(tmp_path / "metrics.jsonl").read_bytes().splitlines(), (tmp_path / "skipped.jsonl").read_bytes()]
    for line in raw:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = tracking.read_metrics(tmp_path / "metrics.jsonl")
    assert [row.get("train/rm/loss", "none") for row in rows] == [None, None, None, "none", 0.25]
    assert json.loads(raw[-1]) == {"step": 4, "loss": None, "pairs": [1, None], "text": half_an_emoji}
    out = capsys.readouterr().out
    assert "loss nan" in out and out.count("skipped at step 4: loss nan  pairs [1, inf]") == 1
    shown = [value for _, value in scalars(tmp_path)["train/rm/loss"]]
    assert math.isnan(shown[0]) and math.isnan(shown[1]) and shown[2:] == [-math.inf, 0.25]
    assert [row["train/rm/loss"] for row in wandb_history(tmp_path)][0] in ("NaN", pytest.approx(math.nan, nan_ok=True))
    assert plots.draw_curves(tmp_path / "metrics.jsonl", title="a run").is_file()
    # and the same again where a resumed run reads them back
    with open_tracker(tmp_path / "other", resumed=kept, positions_from=tmp_path):
        pass
    assert math.isnan(scalars(tmp_path / "other")["train/rm/loss"][0][1])


def test_a_console_on_a_full_disk_does_not_end_the_training(monkeypatch):
    """As where the output goes to a file there."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        log = tracking.Log(enabled=True)
        log.say("a line")
        log.show("another")
        monkeypatch.undo()
        assert log.lines == ["a line"]
        with contextlib.suppress(OSError):
            full.close()


def test_a_pipe_that_nobody_reads_does_not_end_the_training(monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        log = tracking.Log(enabled=True)
        log.say("a line", "and another")
        monkeypatch.undo()
    assert log.lines == ["a line", "and another"]


# ---------------------------------------------------------------- sinks that fail


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Fill a disk to the last byte; a page of tmpfs that a file has begun is still its own."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def long_sample(step: int) -> dict:
    return sample(step) | {"chosen": "long " * 3000}


def test_rows_wait_for_a_full_disk_and_are_written_in_order(small_disk, tmp_path, capfd):
    with open_tracker(tmp_path / "reference", TrackingFlags()) as reference:
        steps(reference, 1, 60)
    with open_tracker(small_disk / "run", TrackingFlags()) as tracker:
        steps(tracker, 1, 2)
        ballast = fill(small_disk)
        steps(tracker, 3, 40)
        files = content(small_disk / "run")
        assert all(text.endswith(b"\n") for text in files.values() if text), "a torn line"
        assert len(files["metrics.jsonl"]) < len(content(tmp_path / "reference")["metrics.jsonl"]) / 2
        with pytest.raises(OSError, match="rows of .* wait to be written"):  # a checkpoint would have a gap here
            tracker.positions()
        ballast.unlink()
        steps(tracker, 41, 60)
    assert content(small_disk / "run") == content(tmp_path / "reference")
    said = sorted(line.split(" (No space")[0].removeprefix(f"{small_disk}/run/") for line in tracker.log.lines)
    *files, board = [line for line in said if "cannot be written" in line] + [said[0]]
    assert files == [f"{name} cannot be written" for name in sorted(ROW_FILES)]
    assert len(said) == 4 and board.startswith("TensorBoard is off from episode ")
    assert "Traceback" not in capfd.readouterr().err


def test_rows_that_cannot_be_written_to_the_end_are_counted(small_disk):
    with open_tracker(small_disk / "run", TrackingFlags()) as tracker:
        steps(tracker, 1, 2)
        fill(small_disk)
        for step in range(3, 7):
            tracker.samples(FakeProgress(step), [long_sample(step)])
    assert tracker.log.lines[-1] == f"4 rows of {small_disk}/run/samples.jsonl could not be written and are lost"
    rows = tracking.read_metrics(small_disk / "run" / "samples.jsonl")
    assert [row["step"] for row in rows] == [2, 2]


def test_a_row_of_which_the_disk_took_a_part_is_not_torn(tmp_path):
    """A limit on the size of files, as of a quota: part of a row fits."""
    said, path = [], tmp_path / "rows.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = RowFile(path, said.append)
    try:
        file.write({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        file.write({"step": 2, "text": "long " * 10})
        file.write({"step": 3})
        assert path.read_bytes() == b'{"step": 1}\n'
        assert file.position() == path.stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    file.write({"step": 4})
    file.close()
    assert [row["step"] for row in tracking.read_metrics(path)] == [1, 2, 3, 4]
    assert len(said) == 1 and "File too large" in said[0]


def test_a_folder_that_becomes_read_only_and_writable_again_loses_nothing(small_disk, undisturbed):
    with open_tracker(small_disk / "run", TrackingFlags()) as tracker:
        steps(tracker, 1, 2)
        # As after an error of the disk: the handles are dead, and a new one is refused.
        dead = os.open(os.devnull, os.O_RDONLY)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(str(small_disk)):
                    os.dup2(dead, int(name))
        os.close(dead)
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        steps(tracker, 3, 6)
        with pytest.raises(OSError, match="wait to be written"):
            tracker.positions()
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        steps(tracker, 7, STEPS)
    assert content(small_disk / "run") == content(undisturbed)
    assert len(tracker.log.lines) == 4  # each file and TensorBoard, once
    assert any("skipped.jsonl cannot be written (Read-only file system)" in line for line in tracker.log.lines)


def test_wandb_that_raises_is_switched_off_and_said_once(tmp_path, undisturbed, monkeypatch):
    with open_tracker(tmp_path) as tracker:
        steps(tracker, 1, 2)
        with monkeypatch.context() as patch:
            patch.setattr(tracker._wandb._run, "log", lambda *a, **k: 1 / 0)
            steps(tracker, 3, 4)
        steps(tracker, 5, STEPS)
        tracker.figure(tmp_path / "is-not-there.png", FakeProgress(STEPS))
    (line,) = lost(tracker)
    assert line.startswith("wandb is off from step 3 on (ZeroDivisionError")
    assert f"wandb sync {tmp_path}/wandb/offline-run-*-{tracker.positions()['wandb_run']}*" in line
    assert content(tmp_path) == content(undisturbed)
    assert [row["_step"] for row in wandb_history(tmp_path)] == [1, 2]


def test_wandb_whose_service_is_killed_is_switched_off_and_said_once(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
import test_sinks
with test_sinks.open_tracker(Path({str(tmp_path)!r})) as tracker:
    test_sinks.steps(tracker, 1, 2)
    children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    [service] = [pid for pid in children if "wandb-core" in Path(f"/proc/{{pid}}/cmdline").read_text()]
    os.kill(int(service), signal.SIGKILL)
    os.waitid(os.P_PID, int(service), os.WEXITED | os.WNOWAIT)
    import time; time.sleep(0.2)
    test_sinks.steps(tracker, 3, 8)
print("said", len(test_sinks.lost(tracker)), tracker.positions()["wandb_run"])
"""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", Path(__file__).parent)))
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("wandb is off")]
    assert "ConnectionResetError" in line or "Connection" in line
    assert done.stdout.splitlines()[-1].startswith("said 1 ")
    assert len(tracking.read_metrics(tmp_path / "metrics.jsonl")) == STEPS + STEPS // 2


def test_a_finish_that_hangs_is_left_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.3)
    released, forever = [], threading.Event()
    monkeypatch.setattr(wandb_run, "_release", lambda: released.append(True))
    run = ServedWandb()
    run.finish = lambda exit_code: forever.wait()
    monkeypatch.setattr(tracking, "start_wandb", lambda *a: (run, "wandb: online"))
    before = time.monotonic()
    with open_tracker(tmp_path) as tracker:
        steps(tracker, 1, 2)
    assert time.monotonic() - before < 5
    line = tracker.log.lines[-1]
    assert line.startswith("wandb could not finish within 0.3 s; send the rest with: wandb sync ")
    assert released == [True]
    forever.set()


def test_a_process_ends_although_wandbs_service_does_not_answer(tmp_path):
    """A service that is stopped stands for one whose server has gone: wandb would wait for it at the end, twice."""
    script = f"""
import os, signal
from pathlib import Path
import test_sinks
from open_rm.training import wandb_run
wandb_run.FINISH_SECONDS = wandb_run.TEARDOWN_SECONDS = 1
with test_sinks.open_tracker(Path({str(tmp_path)!r})) as tracker:
    test_sinks.steps(tracker, 1, 2)
    children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    [service] = [pid for pid in children if "wandb-core" in Path(f"/proc/{{pid}}/cmdline").read_text()]
    os.kill(int(service), signal.SIGSTOP)
    print("service", service)
"""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", Path(__file__).parent)))
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": paths}
    with (tmp_path / "out").open("w+") as out:  # no pipe: the service that is stopped would hold it open
        done = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=60)
        out.seek(0)
        text = out.read()
    (service,) = [line.split()[1] for line in text.splitlines() if line.startswith("service ")]
    os.kill(int(service), signal.SIGKILL)
    assert done.returncode == 0, text
    assert text.count("wandb could not finish within 1 s") == 1
    assert "Traceback" not in text
