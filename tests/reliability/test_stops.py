"""Signals, stopped and dead ranks: a run ends as it promises, in time, and the same command goes on."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import OF_A_GROUP, REPOSITORY
from killing import checkpoint_names, lines_of, record, same_run

STOPPED, STALLED = 75, 76
SLOWER = "import open_rm.training.engine as e, time; step = e.Engine.step; e.Engine.step = lambda *a, **k: (time.sleep(0.05), step(*a, **k))[1]"


@pytest.fixture
def whole(nursery, flags_for, tmp_path):
    """An undisturbed run; returns its folder."""

    def run(processes: int = 1, **flags):
        folder = tmp_path / f"whole {processes}"
        nursery.start(flags_for(folder, processes, **flags), tmp_path / "whole.log", processes=processes).finish()
        return folder

    return run


@pytest.mark.parametrize(
    ("number", "to"), [("SIGTERM", [0]), ("SIGTERM", [1]), ("SIGTERM", [0, 1]), ("SIGINT", [0, 1]), ("SIGUSR1", [1])]
)
def test_a_signal_to_one_rank_or_to_all_saves_and_leaves_with_75(nursery, flags_for, tmp_path, whole, number, to):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = flags_for(folder, 2, checkpointing_steps=None, deepspeed="configs/ds/zero2.json")
    started = nursery.start(flags, log, processes=2, env={"TEST_PATCH": SLOWER})
    started.wait_for(lambda: lines_of(folder) >= 9, "row 9")
    asked = time.monotonic()
    started.send(getattr(signal, number), *to)
    assert started.statuses() == [STOPPED, STOPPED], started.output
    assert time.monotonic() - asked < 30
    assert "give the same command again" in started.output and f"{number}: stopping after this step" in started.output
    [name] = checkpoint_names(folder)
    assert record(folder)[-1]["step"] == int(name[5:])  # the very step
    assert "Traceback" not in started.output
    if number == "SIGTERM" and to == [1]:
        assert "bit for bit" in nursery.start(flags, log, processes=2).finish()
        same_run(whole(2, checkpointing_steps=None, deepspeed="configs/ds/zero2.json"), folder)


def test_a_second_signal_ends_the_run_at_once_and_loses_nothing_that_was_committed(nursery, flags_for, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    frozen = "import open_rm.training.engine as e, time; e.Engine.step = lambda *a, **k: time.sleep(0.02) or 1.0"
    hang = frozen.replace("0.02", f"(600 if __import__('pathlib').Path({str(tmp_path / 'hang')!r}).exists() else 0.02)")
    started = nursery.start(flags_for(folder), log, env={"TEST_PATCH": hang})
    started.wait_for(lambda: len(checkpoint_names(folder)) == 2, "two checkpoints")
    (tmp_path / "hang").touch()  # the step that is being made never ends
    time.sleep(0.5)
    kept = checkpoint_names(folder)
    started.send(signal.SIGTERM)
    time.sleep(1.5)
    assert started.running()
    asked = time.monotonic()
    started.send(signal.SIGTERM)
    assert started.statuses() == [128 + signal.SIGTERM]
    assert time.monotonic() - asked < 5 and checkpoint_names(folder)[-1] >= kept[-1]


def test_several_signals_within_a_moment_are_one_request(nursery, flags_for, tmp_path):
    """torchrun passes a Ctrl-C on to ranks that got it themselves."""
    folder = tmp_path / "run"
    started = nursery.start(flags_for(folder), tmp_path / "log", env={"TEST_PATCH": SLOWER})
    started.wait_for(lambda: lines_of(folder) >= 6, "row 6")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        started.send(number)
    assert started.statuses() == [STOPPED]


def slow_evaluations(while_there) -> str:
    """Half a second a forward while a file is there, and ranks ask each other after each."""
    return f"""
import open_rm.evaluation.held_out as h, open_rm.reliability.signals as s, time, pathlib
score, s.FORWARDS_BETWEEN = h.score_pairs, 1
def slower(rewards_of, *rest):
    def call(**inputs):
        if pathlib.Path({str(while_there)!r}).exists(): time.sleep(0.5)
        return rewards_of(**inputs)
    return score(call, *rest)
h.score_pairs = slower
"""


def test_a_stop_during_the_first_evaluation_begins_anew_and_the_record_is_the_same(nursery, flags_for, tmp_path, whole):
    folder, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "slow").touch()
    started = nursery.start(flags_for(folder), log, env={"TEST_PATCH": slow_evaluations(tmp_path / "slow")})
    started.wait_for(lambda: (folder / "metrics.jsonl").exists(), "the first evaluation")
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED] and lines_of(folder) == 0
    nursery.start(flags_for(folder), log).finish()
    same_run(whole(), folder)


def test_a_stop_during_the_best_evaluation_keeps_its_checkpoint(nursery, flags_for, tmp_path, whole):
    """It is made when the run goes on, and is the best: later ones are worse."""
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "keep_last_n_checkpoints": 1}
    worse = (
        "\nimport open_rm.training.best as b; judge = b.judge\n"
        "def worse(flags, progress):\n"
        "    if progress.step > 10: progress.last_evaluation['eval/rm/loss'] += 1.0\n"
        "    return judge(flags, progress)\n"
        "b.judge = worse"
    )
    slow = tmp_path / "slow"
    started = nursery.start(flags_for(folder, **flags), log, env={"TEST_PATCH": slow_evaluations(slow) + worse})
    started.wait_for(lambda: lines_of(folder) >= 5, "row 5")
    slow.touch()
    started.wait_for(lambda: record(folder)[-1]["step"] == 10, "the evaluation at step 10")
    time.sleep(0.3)
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED]
    output = nursery.start(flags_for(folder, **flags), log, env={"TEST_PATCH": worse}).finish()
    assert "the model of step 10 is saved" in output
    undisturbed = tmp_path / "undisturbed"
    nursery.start(flags_for(undisturbed, **flags), log, env={"TEST_PATCH": worse}).finish()
    same_run(undisturbed, folder)


def test_a_stop_during_an_evaluation_breaks_it_off_and_it_is_made_when_the_run_goes_on(
    nursery, flags_for, tmp_path, whole
):
    folder, log = tmp_path / "run", tmp_path / "log"
    small = {"per_device_eval_batch_size": 1, "max_tokens_per_micro_batch": 60}  # many forwards
    slow = slow_evaluations(tmp_path / "slow")
    started = nursery.start(flags_for(folder, **small), log, env={"TEST_PATCH": slow})
    started.wait_for(lambda: lines_of(folder) >= 5, "row 5")
    (tmp_path / "slow").touch()
    started.wait_for(lambda: record(folder)[-1]["step"] == 10, "the evaluation at step 10")
    time.sleep(0.5)
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED]
    assert checkpoint_names(folder)[-1] == "step_00000010" and "train/rm/loss" in record(folder)[-1]
    (tmp_path / "slow").unlink()
    nursery.start(flags_for(folder, **small), log).finish()
    same_run(whole(**small), folder)


def test_a_stop_before_the_first_step_leaves_nothing_behind(nursery, flags_for, tmp_path):
    folder = tmp_path / "run"
    waits = "import open_rm.reward_modeling as r, time; r.load_reward_model = lambda *a, **k: time.sleep(600)"
    started = nursery.start(flags_for(folder), tmp_path / "log", env={"TEST_PATCH": waits})
    started.wait_for(lambda: "steps of 16 pairs" in started.output, "the model's turn")
    asked = time.monotonic()
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED] and time.monotonic() - asked < 10
    assert not folder.exists() and "Traceback" not in started.output


def test_all_ranks_that_are_stopped_while_they_load_leave_nothing_behind(nursery, flags_for, tmp_path):
    folder = tmp_path / "run"
    waits = "import open_rm.reward_modeling as r, time; r.load_reward_model = lambda *a, **k: time.sleep(600)"
    started = nursery.start(flags_for(folder, 2), tmp_path / "log", processes=2, env={"TEST_PATCH": waits})
    started.wait_for(lambda: "steps of 16 pairs" in started.output, "the model's turn")
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED] * 2
    assert not folder.exists() and "Traceback" not in started.output and "error" not in started.output


def test_the_main_rank_that_is_stopped_while_it_works_for_all_takes_the_others_with_it(nursery, flags_for, tmp_path):
    waits = "import open_rm.reward_modeling as r, time; r.fetch = lambda args: time.sleep(600)"
    started = nursery.start(flags_for(tmp_path / "run", 2), tmp_path / "log", processes=2, env={"TEST_PATCH": waits})
    started.wait_for(lambda: "steps of 16 pairs" in started.output, "the weights' turn")
    started.send(signal.SIGTERM, 0)
    assert started.statuses() == [STOPPED] * 2, started.output


@pytest.mark.parametrize("asked", [0, 1])
def test_one_rank_that_is_stopped_while_all_load_takes_the_others_with_it(nursery, flags_for, tmp_path, asked):
    waits = (
        "import open_rm.reward_modeling as r, os, pathlib, time\n"
        f"mark = pathlib.Path({str(tmp_path)!r}) / ('loads_' + os.environ['RANK'])\n"
        "r.load_reward_model = lambda *a, **k: (mark.touch(), time.sleep(600))"
    )
    started = nursery.start(flags_for(tmp_path / "run", 2), tmp_path / "log", processes=2, env={"TEST_PATCH": waits})
    started.wait_for(lambda: len(list(tmp_path.glob("loads_*"))) == 2, "both ranks' turn to load")
    sent = time.monotonic()
    started.send(signal.SIGTERM, asked)
    assert started.statuses() == [STOPPED] * 2, started.output
    assert time.monotonic() - sent < 30 and "Traceback" not in started.output


def test_a_stop_while_the_last_checkpoint_is_written_waits_for_it(nursery, flags_for, tmp_path):
    folder = tmp_path / "run"
    slow = (
        "import open_rm.reliability.shards as s, time; write = s.Snapshot.write\n"
        "s.Snapshot.write = lambda *a: (time.sleep(2.5), write(*a))[1]"
    )
    started = nursery.start(flags_for(folder, checkpointing_steps=30), tmp_path / "log", env={"TEST_PATCH": slow})
    started.wait_for(lambda: list((folder / "checkpoints").glob("step_00000038*.tmp")), "the last save")
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED]
    assert checkpoint_names(folder)[-1] == "step_00000038" and not (folder / "config.json").exists()


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_that_takes_longer_than_a_moment_closes_everything(nursery, flags_for, tmp_path, asked):
    """Real models take minutes to save; the process was once ended five seconds after the signal."""
    folder = tmp_path / "run"
    slow = (
        SLOWER + "\nimport open_rm.reliability.shards as s\nwrite = s.Snapshot.write\n"
        "s.Snapshot.write = lambda *a: (time.sleep(7), write(*a))[1]\n"
        "import open_rm.training.tracking as t\nleave = t.Tracker.__exit__\n"
        "t.Tracker.__exit__ = lambda *a: (time.sleep(1), leave(*a), print('CLOSED', flush=True))[1]"
    )
    flags = flags_for(folder, 2, checkpointing_steps=1000)
    started = nursery.start(flags, tmp_path / "log", processes=2, env={"TEST_PATCH": slow})
    started.wait_for(lambda: lines_of(folder) > 4, "steps")
    started.send(signal.SIGTERM, asked)
    assert started.statuses() == [STOPPED] * 2, started.output
    assert started.output.count("CLOSED") == 2 and "ended without a word" not in started.output
    assert len(checkpoint_names(folder)) == 1 and not list(folder.glob(".claim*"))


def test_without_an_output_dir_the_sentence_says_which_one_to_give(nursery, flags_for, tmp_path):
    flags = [
        flag for flag in flags_for(tmp_path / "unused") if flag != "--output_dir" and flag != str(tmp_path / "unused")
    ]
    elsewhere = f"import os; os.chdir({str(tmp_path)!r})\n" + SLOWER
    started = nursery.start(flags, tmp_path / "log", env={"TEST_PATCH": elsewhere})
    started.wait_for(lambda: "step 1/38" in started.output, "steps")
    started.send(signal.SIGTERM)
    assert started.statuses() == [STOPPED]
    said = next(line for line in started.output.splitlines() if "give the same command again" in line)
    folder = said.rpartition("with --output_dir ")[2].split()[0]
    assert checkpoint_names(tmp_path / folder)
    again = nursery.start([*flags, "--output_dir", folder], tmp_path / "log2", env={"TEST_PATCH": elsewhere})
    assert "going on after step" in again.finish()


def test_under_torchrun_a_run_stops_and_goes_on(nursery, flags_for, tmp_path, whole):
    """As users start it, imports and all."""
    folder = tmp_path / "run"
    flags = [str(flag) for flag in flags_for(folder, 2, total_episodes=6000, checkpointing_steps=None)]
    environment = {name: value for name, value in __import__("os").environ.items() if name not in OF_A_GROUP}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "open_rm.reward_modeling", *flags]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while lines_of(folder) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0  # torchrun's own; the committed checkpoint is what tells
    [name] = checkpoint_names(folder)
    assert record(folder)[-1]["step"] == int(name[5:]), output


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run_in_time(nursery, flags_for, tmp_path, stopped):
    folder = tmp_path / "run"
    flags = flags_for(folder, 2, stall_timeout=0.1, total_episodes=60000, deepspeed="configs/ds/zero2.json")
    started = nursery.start(flags, tmp_path / "log", processes=2)
    started.wait_for(lambda: checkpoint_names(folder), "a checkpoint")
    started.send(signal.SIGSTOP, stopped)
    asked = time.monotonic()
    other = started.pids[1 - stopped]
    while started.alive(other):
        assert time.monotonic() - asked < 60, started.output
        time.sleep(0.1)
    started.send(signal.SIGKILL, stopped)
    assert started.statuses()[1 - stopped] == STALLED
    assert "Traceback" not in started.output.replace("Traceback (most recent call first)", "")
    said = "rank 1" if stopped else "main rank"
    assert said in started.output and "give the same command again" in started.output
    assert "training step" in (folder / "stalled" / f"rank_{1 - stopped:05d}.txt").read_text() + started.output


def test_a_dead_rank_ends_the_run_at_once(nursery, flags_for, tmp_path, whole):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = flags_for(folder, 2)
    started = nursery.start(flags, log, processes=2, env={"TEST_PATCH": SLOWER})
    started.wait_for(lambda: len(checkpoint_names(folder)) >= 2, "checkpoints")
    started.send(signal.SIGKILL, 1)
    asked = time.monotonic()
    statuses = started.statuses()
    assert statuses[1] == -9 and statuses[0] != 0 and time.monotonic() - asked < 30, started.output
    nursery.start(flags, log, processes=2).finish()
    same_run(whole(2), folder)
