"""Where a run's numbers go: metrics.jsonl, TensorBoard, wandb, the console, samples and curves; and where no token goes.

Three runs serve all tests: one tracked without a key, one that cannot reach its tracking server and pushes to a
stand-in for the Hub, one started from Python.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from conftest import REPOSITORY, read_metrics, run_recipe, toy_flags
from hub_standin import HubStandin

from open_rm import command_line
from open_rm.errors import UserError
from open_rm.flags import Args, TrackingFlags
from open_rm.toy import make_pairs
from open_rm.training import plots, tracking
from open_rm.training.progress import Progress

PAIR_METRICS = ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin")
OVERALL_ALONE = ("reward_mean", "reward_std", "ece", "length_accuracy", "length_matched_accuracy")
POSITION = {"step", "episode", "epoch", "hours"}
TRAIN = {f"train/rm/{name}" for name in (*PAIR_METRICS, "loss_ranking", "lr", "grad_norm")} | {
    f"perf/{name}"
    for name in (
        "pairs_per_second",
        "tokens_per_second",
        "step_seconds",
        "data_seconds",
        "memory_gib",
        "padding_fraction",
        "distinct_token_fraction",
        "prompt_saving",
        "header_saving",
        "rank_imbalance",
        "rank_seconds_max",
        "slowest_rank",
        "mfu",
        "total_flops",
        "checkpoint_stall_seconds",
        "checkpoint_write_seconds",
    )
}
# Of the toy's 240 training pairs, 80 in steps of 8; evaluated at steps 0, 3, 7 (num_evals 2, evenly spaced) and 10.
TRAIN_PAIRS, STEPS, PAIRS_PER_STEP, EVALUATED = 240, 10, 8, [0, 3, 7, 10]
SOURCES = {"data_test": 60, "other_test": 20}
WANDB_KEY = "0123456789abcdef0123deadbeef0123456789ab"
HUB_TOKEN = "hf_planted_secret_that_nobody_may_read"


@pytest.fixture(scope="module", autouse=True)
def no_wandb_settings_of_the_person_who_tests():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all output folders; everything else that the runs write lies beside them."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_sources(toy, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("held-out") / "other"
    folder.mkdir()
    rows = [json.dumps(row) for row in make_pairs(SOURCES["other_test"], seed=9)]
    (folder / "test.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return [str(toy / "data"), "1.0", str(folder), "1.0"]


def homes(runs: Path) -> dict:
    """wandb's own folders below `runs`, and no password file of the person who tests."""
    folders = {name: str(runs / name.lower()) for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    return {"NETRC": str(runs / "no-netrc"), **folders}


@pytest.fixture(scope="module")
def tracked(toy, runs, two_sources):
    """A run with --with_tracking and no key: (its folder, the finished process)."""
    folder = runs / "tracked"
    flags = toy_flags(
        toy, folder, dataset_mixer_eval_list=two_sources, num_evals=2, run_name="tracked-run", with_tracking=True
    )
    done = run_recipe(*flags, env=homes(runs))
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def unreachable(toy, runs):
    """A run with a key for a wandb server that is not there, pushed to the stand-in: (its folder, the process)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    folder = runs / "unreachable"
    flags = toy_flags(
        toy,
        folder,
        run_name="unreachable-run",
        with_tracking=True,
        push_to_hub=True,
        total_episodes=16,
        per_device_eval_batch_size=32,
    )
    secrets = {"WANDB_API_KEY": WANDB_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{closed_port}"}
    with HubStandin(token=HUB_TOKEN, root=runs / "hub") as hub:
        env = {**hub.env(HUB_TOKEN), "HF_HUB_OFFLINE": "0", **homes(runs), **secrets}
        return folder, run_recipe(*flags, env=env)


@pytest.fixture(scope="module")
def from_python(toy, runs, two_sources):
    """`main(Args(...))` with the flags of `tracked` in a fresh interpreter: (its folder, what main returned)."""
    flags = toy_flags(toy, runs / "python", dataset_mixer_eval_list=two_sources, num_evals=2)
    script = "\n".join(
        [
            "import json",
            "from open_rm.flags import Args",
            "from open_rm.reward_modeling import main",
            f"print('returned', json.dumps(main({command_line.parse(Args, flags)!r})))",
        ]
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return runs / "python", json.loads(done.stdout.splitlines()[-1].removeprefix("returned "))


def wandb_records(folder: Path) -> list[dict]:
    """The records of the run's .wandb file, read by wandb itself."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def lines_starting(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# ---------------------------------------------------------------- metrics.jsonl


def rows_with(folder: Path, name: str) -> list[dict]:
    return [row for row in read_metrics(folder) if name in row]


def test_every_line_of_metrics_says_where_the_run_stands(tracked):
    rows = read_metrics(tracked[0])
    assert len(rows) == STEPS + len(EVALUATED)
    for row in rows:
        assert row["episode"] == row["step"] * PAIRS_PER_STEP
        assert row["epoch"] == pytest.approx(row["episode"] / TRAIN_PAIRS)
    hours = [row["hours"] for row in rows]
    assert hours == sorted(hours) and hours[0] >= 0


def test_every_step_logs_training_and_performance(tracked):
    rows = rows_with(tracked[0], "train/rm/loss")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(row) == POSITION | TRAIN for row in rows)


def test_training_metrics_agree_with_each_other(tracked):
    for row in rows_with(tracked[0], "train/rm/loss"):
        m = {name.rpartition("/")[2]: value for name, value in row.items()}
        assert m["reward_margin"] == pytest.approx(m["chosen_rewards"] - m["rejected_rewards"], abs=1e-6)
        assert (m["accuracy"] * PAIRS_PER_STEP).is_integer() and 0 <= m["accuracy"] <= 1
        assert m["loss"] > 0 and m["grad_norm"] > 0
        assert m["lr"] == pytest.approx(1e-3 * (1 - (m["step"] - 1) / STEPS))


def test_performance_metrics_agree_with_each_other(tracked):
    rows = rows_with(tracked[0], "train/rm/loss")
    for row in rows:
        m = {name.removeprefix("perf/"): value for name, value in row.items()}
        assert m["pairs_per_second"] * m["step_seconds"] == pytest.approx(PAIRS_PER_STEP)
        tokens = m["tokens_per_second"] * m["step_seconds"]
        assert tokens == pytest.approx(round(tokens)) and tokens > 2 * PAIRS_PER_STEP
        assert 0 <= m["data_seconds"] <= m["step_seconds"]
        assert 0 <= m["padding_fraction"] < 1
        assert m["distinct_token_fraction"] + m["prompt_saving"] + m["header_saving"] == pytest.approx(1)
        assert 0.05 < m["memory_gib"] < 100
    flops = [row["perf/total_flops"] for row in rows]
    assert flops == sorted(set(flops)) and flops[0] > 0


def test_evaluations_are_logged_before_during_and_after_training(tracked):
    rows = rows_with(tracked[0], "eval/rm/loss")
    assert [row["step"] for row in rows] == EVALUATED
    names = {f"eval/rm/{prefix}{name}" for prefix in ("", "data_test/", "other_test/") for name in PAIR_METRICS}
    names |= {f"eval/rm/{name}" for name in OVERALL_ALONE} | {"eval/samples_per_second"}
    # where no temperature fits there is none
    assert all(set(row) - {"eval/rm/temperature"} == POSITION | names for row in rows)
    assert any("eval/rm/temperature" in row for row in rows)
    assert all(row["eval/samples_per_second"] > 0 for row in rows)


def test_the_overall_evaluation_is_the_mean_over_pairs_of_all_sources(tracked):
    for row in rows_with(tracked[0], "eval/rm/loss"):
        for name in PAIR_METRICS:
            total = sum(row[f"eval/rm/{source}/{name}"] * pairs for source, pairs in SOURCES.items())
            assert row[f"eval/rm/{name}"] == pytest.approx(total / sum(SOURCES.values()))


def test_a_single_held_out_source_is_not_reported_twice(unreachable):
    names = {name for row in read_metrics(unreachable[0]) for name in row if name.startswith("eval/rm/")}
    assert names - {"eval/rm/temperature"} == {f"eval/rm/{name}" for name in (*PAIR_METRICS, *OVERALL_ALONE)}


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path):
    whole = [{"step": 1, "train/rm/loss": 0.5}, {"step": 2, "train/rm/loss": 0.25}]
    text = "\n".join(json.dumps(row) for row in whole) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "train/rm/lo')
    assert tracking.read_metrics(tmp_path / "metrics.jsonl") == whole
    (tmp_path / "metrics.jsonl").write_text("")
    assert tracking.read_metrics(tmp_path / "metrics.jsonl") == []


# ---------------------------------------------------------------- TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By name: the episode and the value of each entry in the folder's tensorboard/."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_tensorboard_holds_the_values_of_metrics_jsonl_over_episodes(tracked):
    folder, _ = tracked
    rows, found = read_metrics(folder), scalars(folder)
    names = {name for row in rows for name in row} - {"step"}
    assert set(found) == names
    for name in names:
        expected = [(row["episode"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert found[name] == expected, name


# ---------------------------------------------------------------- wandb


def test_tracking_without_a_key_runs_offline_and_says_so_once(tracked):
    folder, done = tracked
    (line,) = lines_starting(done.stdout, "wandb:")
    assert line.startswith("wandb: offline, because there is no API key (set WANDB_API_KEY)")
    assert f"wandb sync {folder}/wandb/offline-run-*" in line
    assert "wandb" not in done.stderr


def test_the_wandb_file_holds_every_metric_of_every_step(tracked):
    folder, _ = tracked
    history = [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]
    expected = {}  # an evaluation and the step before it have a line each in metrics.jsonl, and one record in wandb
    for row in read_metrics(folder):
        expected.setdefault(row["step"], {}).update(row)
    assert [item["_step"] for item in history] == list(expected)
    for item in history:
        row = {name: value for name, value in expected[item["_step"]].items() if name != "step"}
        assert {name: item[name] for name in row} == pytest.approx(row)
    last = [row["train/rm/loss"] for row in rows_with(folder, "train/rm/loss")][-1]
    assert history[-1]["train/rm/loss"] == pytest.approx(last)
    assert 0 <= history[-1]["eval/rm/accuracy"] <= 1


def test_the_wandb_file_holds_the_settings_of_the_run(tracked):
    (run,) = [record["run"] for record in wandb_records(tracked[0]) if record["type"] == "run"]
    config = run["config"]["update"]
    assert set(config) >= {field.name for field in dataclasses.fields(Args)} | {"world_size", "plan"}
    assert config["learning_rate"] == 1e-3
    assert config["run_name"] == "tracked-run"
    assert config["plan"]["total_steps"] == STEPS


def test_wandb_gets_the_sample_tables_and_the_curves(tracked):
    folder, _ = tracked
    history = [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]
    tables = [item for item in history if any(name.startswith("preference_samples") for name in item)]
    assert [item["_step"] for item in tables] == EVALUATED
    assert any(name.startswith("curves") for name in history[-1])


def test_a_server_that_does_not_answer_makes_the_run_offline_and_says_so_once(unreachable):
    folder, done = unreachable
    assert done.returncode == 0, done.stderr
    (line,) = lines_starting(done.stdout, "wandb:")
    assert line.startswith("wandb: offline, because the server does not answer")
    assert "Traceback" not in done.stderr
    history = [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]
    assert history[-1]["train/rm/loss"] == pytest.approx(rows_with(folder, "train/rm/loss")[-1]["train/rm/loss"])


# ---------------------------------------------------------------- secrets


def test_no_token_is_written_anywhere(runs, unreachable):
    folder, done = unreachable
    assert "pushed to http" in done.stdout  # both tokens were in use
    written = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    written |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    # The same search finds what is meant to be there, in every sink.
    found = [str(path) for path, content in written.items() if b"unreachable-run" in content]
    for part in ("/wandb/", "/tensorboard/", "/run.json", "/README.md"):
        assert any(path.startswith(str(folder)) and part in path for path in found), part
    for token in (WANDB_KEY, HUB_TOKEN):
        assert [path for path, content in written.items() if token.encode() in content] == []


# ---------------------------------------------------------------- console and samples


def test_samples_are_written_at_each_evaluation_and_are_the_same_pairs(tracked):
    rows = [json.loads(line) for line in (tracked[0] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [step for step in EVALUATED for _ in range(2)]
    for row in rows:
        assert set(row) == {"step", "prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "right"}
        assert row["right"] is (row["chosen_reward"] > row["rejected_reward"])
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    assert texts == texts[:2] * len(EVALUATED) and texts[0] != texts[1]
    rewards = {row["chosen_reward"] for row in rows}
    assert len(rewards) == len(rows), "a reward did not move between evaluations"


def test_the_console_shows_a_table_of_samples_at_the_first_and_the_last_evaluation(tracked):
    """samples.jsonl has one at each: the test above."""
    folder, done = tracked
    shown = [EVALUATED[0], EVALUATED[-1]]
    assert [int(step) for step in re.findall(r"sample pairs at step (\d+)", done.stdout)] == shown != EVALUATED
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        rewards = f"{row['chosen_reward']:+.3f} {row['rejected_reward']:+.3f}"
        assert (rewards in done.stdout) is (row["step"] in shown), rewards


def test_the_console_shows_evaluations_overall_and_per_source(tracked):
    folder, done = tracked
    lines = lines_starting(done.stdout, "evaluation at step ")
    expected = []
    for row in rows_with(folder, "eval/rm/loss"):
        for group, prefix in (("all", ""), *((source, f"{source}/") for source in SOURCES)):
            accuracy = f"accuracy {row[f'eval/rm/{prefix}accuracy']:.3f}"
            expected.append(f"evaluation at step {row['step']}, {group}: {accuracy}  ")
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_the_console_shows_the_first_and_the_last_step(tracked):
    lines = lines_starting(tracked[1].stdout, "[#")
    assert "] step 1/10  episode 8  loss " in lines[0] and "ETA " in lines[0]
    assert lines[-1].startswith("[####################] step 10/10  episode 80  loss ")


SAMPLE = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": 1.0, "rejected_reward": 0.0, "right": True}
NO_TRACKING = TrackingFlags()


def make_tracker(tmp_path: Path, *, enabled: bool = True, flags: TrackingFlags = NO_TRACKING) -> tracking.Tracker:
    return tracking.Tracker(str(tmp_path / "run"), tracking.Log(enabled=enabled), {"run_name": "r"}, flags)


@pytest.fixture
def tracker(tmp_path):
    with make_tracker(tmp_path) as tracker:
        yield tracker


def progress_at(step: int, **metrics: float) -> Progress:
    """Of 30 pairs in 10 steps of 8, with these metrics of training and of evaluation."""
    names = [name for name in TRAIN if name not in metrics]
    train = dict.fromkeys(names, 0.25) | {name: value for name, value in metrics.items() if name in TRAIN}
    evaluation = {f"eval/rm/{name}": 0.5 for name in PAIR_METRICS}
    return Progress(30, 10, step=step, episode=8 * step, last_train=train, last_evaluation=evaluation)


def test_sample_texts_are_shown_as_they_are(tracker, tmp_path, capsys):
    text = "[/bold] [red]not markup[/red] [link]"
    tracker.samples(progress_at(0), [SAMPLE | {"prompt": text}])
    assert text in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text())["prompt"] == text


def test_a_tie_is_shown_as_one_and_is_null_in_the_file(tracker, tmp_path, capsys):
    tracker.samples(progress_at(0), [SAMPLE | {"right": right} for right in (None, False, True)])
    shown = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if "+1.000" in line]
    assert shown == ["tie", "NO", "yes"]
    written = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in written] == [None, False, True]


def test_colons_in_what_is_shown_are_no_emoji(capsys):
    tracking.Log(enabled=True).say("train: data:dog:1.jsonl")
    assert "data:dog:1.jsonl" in capsys.readouterr().out


def test_long_sample_texts_are_short_on_the_console_and_whole_in_the_file(tracker, tmp_path, capsys):
    text = "begin " + "word " * 500 + "end"
    tracker.samples(progress_at(10), [SAMPLE | {"chosen": text}])
    shown = capsys.readouterr().out
    assert "begin" in shown and " ... " in shown and "end" in shown and shown.count("word") < 60
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text())["chosen"] == text


def test_metrics_are_on_the_disk_before_the_run_ends(tracker, tmp_path):
    tracker.training(progress_at(1, **{"train/rm/loss": 0.5}))
    [row] = tracking.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (row["step"], row["episode"], row["epoch"]) == (1, 8, pytest.approx(8 / 30))
    assert set(row) == POSITION | TRAIN and row["train/rm/loss"] == 0.5


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    with make_tracker(tmp_path, enabled=False, flags=TrackingFlags(with_tracking=True)) as other:
        other.log.say("hello")
        other.log.show("hello")
        other.training(progress_at(1))
        other.evaluation(progress_at(1))
        other.samples(progress_at(0), [SAMPLE])
        other.figure(tmp_path / "curves.png", progress_at(1))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_what_is_said_is_printed_at_once_and_remembered_and_what_is_shown_is_not_remembered():
    """At once: in a process that is killed before it could end, through a pipe, which Python itself would buffer."""
    script = """
import os, signal
from open_rm.training.tracking import Log
log = Log(enabled=True)
log.say("train: read", "eval: read")
log.show("step 1")
log.say("saved")
assert log.lines == ["train: read", "eval: read", "saved"]
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.splitlines() == ["train: read", "eval: read", "step 1", "saved"]


# ---------------------------------------------------------------- however the run ends


class FakeWandb:
    """A wandb run that notes what it is told."""

    def __init__(self):
        self.logged, self.exit_codes = [], []

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self, exit_code=None):
        self.exit_codes.append(exit_code)


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(tracking, "start_wandb", lambda folder, settings, flags: (fake, "wandb: a fake"))
    return fake


def open_files_below(folder: Path) -> list[str]:
    """Of this process."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(folder))]


@pytest.mark.parametrize("ending", [None, UserError("diverged"), KeyError("a bug"), KeyboardInterrupt(), SystemExit(1)])
def test_every_sink_is_closed_however_the_run_ends_and_wandb_is_told(tmp_path, fake_wandb, ending):
    caught = None
    try:
        with make_tracker(tmp_path, flags=TrackingFlags(with_tracking=True)) as tracker:
            tracker.training(progress_at(1))
            opened = open_files_below(tmp_path / "run")
            if ending is not None:
                raise ending
    except BaseException as raised:
        caught = raised
    assert caught is ending  # nothing is swallowed
    assert {Path(path).name for path in opened} >= {"metrics.jsonl", "samples.jsonl"}
    assert open_files_below(tmp_path / "run") == []
    assert scalars(tmp_path / "run")["train/rm/loss"] == [
        (8, 0.25)
    ]  # TensorBoard writes when it is closed, or each 2 min
    assert fake_wandb.exit_codes == [0 if ending is None else 1]
    assert [step for step, _ in fake_wandb.logged] == [1]
    assert tracker.log.lines == ["wandb: a fake"]


def test_a_sink_that_cannot_be_opened_leaves_the_others_closed(tmp_path, monkeypatch):
    def refuse(folder, settings, flags):
        raise OSError("no room")

    monkeypatch.setattr(tracking, "start_wandb", refuse)
    with pytest.raises(OSError, match="no room"):
        make_tracker(tmp_path, flags=TrackingFlags(with_tracking=True))
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert open_files_below(tmp_path / "run") == []


def test_what_was_read_is_told_before_anything_of_the_model_and_also_where_that_cannot_be_loaded(
    toy, tmp_path, run_forked
):
    damaged = tmp_path / "damaged"
    shutil.copytree(toy / "model", damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = run_forked(*toy_flags(toy, tmp_path / "out", model_name_or_path=damaged))
    assert done.returncode == 1
    assert f"error: --model_name_or_path {damaged}: cannot be loaded as a reward model" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"train: {toy}/data: 240 rows") and lines[2].startswith(f"eval: {toy}/data: 60 rows")
    assert [line for line in lines if line.startswith("10 steps of 8 pairs")]
    assert "score head" not in done.stdout


def test_the_lines_on_what_was_read_stand_first_and_in_run_json(tracked):
    folder, done = tracked
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith("train: ")
        and lines[1].startswith("train:   columns read: ")
        and lines[2].startswith("eval: ")
    )
    read = max(number for number, line in enumerate(lines) if line.startswith(("train: ", "eval: ")))
    model = next(number for number, line in enumerate(lines) if "score head" in line)
    assert read < model
    notes = json.loads((folder / "run.json").read_text())["notes"]
    assert notes[: read + 1] == lines[: read + 1]


# ---------------------------------------------------------------- curves


def assert_is_a_picture(path: Path):
    assert path.name == "curves.png" and path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert 1000 <= width <= 4000 and 400 <= height <= 2000
    assert pixels[..., :3].std() > 0.01, "the picture is blank"


def test_a_run_leaves_a_picture_of_its_curves(tracked):
    folder, done = tracked
    assert_is_a_picture(folder / "curves.png")
    assert f"curves: {folder}/curves.png" in done.stdout


def metrics_row(step: int, group: str) -> dict:
    values = {f"{group}/rm/{name}": 0.5 / (step + 1) for name in PAIR_METRICS}
    values |= {"train/rm/lr": 1e-3} if group == "train" else {}
    return {"step": step, "episode": 8 * step, "epoch": 0.1, "hours": 0.01 * step, **values}


@pytest.mark.parametrize(
    "rows",
    [[metrics_row(step, "train") for step in range(1, 50)], [metrics_row(0, "eval")], []],
    ids=["without_evaluation", "only_evaluation", "empty"],
)
def test_curves_are_drawn_from_whatever_was_logged(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = plots.draw_curves(tmp_path / "metrics.jsonl", title="a run")
    assert path == tmp_path / "curves.png"
    assert_is_a_picture(path)


# ---------------------------------------------------------------- from Python


def test_main_called_from_python_does_what_the_command_line_does(tracked, from_python):
    def numbers(folder):
        return [
            {name: value for name, value in row.items() if name in ("step", "episode") or "/rm/" in name}
            for row in read_metrics(folder)
        ]

    for ours, theirs in zip(numbers(from_python[0]), numbers(tracked[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert (from_python[0] / "model.safetensors").is_file()


def test_main_returns_the_last_metrics_of_training_and_evaluation(from_python):
    folder, returned = from_python
    last = rows_with(folder, "train/rm/loss")[-1] | rows_with(folder, "eval/rm/loss")[-1]
    assert returned == {name: value for name, value in last.items() if name not in POSITION}


def test_a_run_without_tracking_has_no_wandb_folder(from_python):
    assert not (from_python[0] / "wandb").exists()
    assert (from_python[0] / "tensorboard").is_dir()
