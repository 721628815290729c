"""Killed with -9 at any moment and started again by the same command, a run ends as if nothing had happened: bit for bit."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import checkpoint_names, lines_of, record, same_run
from safetensors.torch import load_file

ZERO = {0: None, 2: "configs/ds/zero2.json", 3: "configs/ds/zero3.json"}
ROWS = 45  # of metrics.jsonl: 40 steps or more, 5 evaluations


def kill_at_a_row(started, folder, rows: int, delay: float = 0.0) -> None:
    started.wait_for(lambda: lines_of(folder) >= rows, f"row {rows}")
    time.sleep(delay)
    started.kill()


def kill_in_a_save(started, folder, after: int) -> None:
    """While a checkpoint behind step `after` is being written."""

    def writing() -> bool:
        found = [path.name for path in (folder / "checkpoints").glob("step_*.tmp")]
        return any(int(name[5:13]) > after for name in found)

    started.wait_for(writing, f"a save after step {after}")
    started.kill()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_and_inside_a_save_a_run_ends_as_an_undisturbed_one(
    nursery, flags_for, tmp_path, processes, stage
):
    chance = random.Random(10 * processes + stage)
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    nursery.start(flags_for(whole, processes, deepspeed=ZERO[stage]), log, processes=processes).finish()
    flags = flags_for(killed, processes, deepspeed=ZERO[stage])
    for low, high in ((1, 18), (18, 34)):
        started = nursery.start(flags, log, processes=processes)
        kill_at_a_row(started, killed, chance.randint(low, high), chance.random() / 50)
    kill_in_a_save(nursery.start(flags, log, processes=processes), killed, after=24)
    assert not (killed / "config.json").exists()
    output = nursery.start(flags, log, processes=processes).finish()
    assert "going on after step" in output and "bit for bit" in output
    same_run(whole, killed)
    assert not list((killed / "checkpoints").glob("*.tmp")) and not list(killed.glob(".claim*"))
    assert checkpoint_names(killed) == checkpoint_names(whole)  # the last two


KINDS = {
    "lora": {"use_peft": True, "lora_dropout": 0.1},
    "qlora": {"use_peft": True, "load_in_4bit": True},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "adafactor": {"optim": "adafactor"},
    "recomputed": {"gradient_checkpointing": True, "batching": "padded"},
    "grouped": {"group_by_prompt": True, "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    "bfloat16": {"dtype": "bfloat16", "deepspeed": ZERO[2]},
    "offload": {"deepspeed": "configs/ds/zero3_offload.json"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_trained_goes_on_bit_for_bit(nursery, flags_for, tmp_path, kind):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    rest = {"total_episodes": None, "num_train_epochs": 2, **KINDS[kind]}
    nursery.start(flags_for(whole, **rest), log).finish()
    kill_at_a_row(nursery.start(flags_for(killed, **rest), log), killed, 21)  # in the second epoch
    assert checkpoint_names(killed)
    assert "bit for bit" in nursery.start(flags_for(killed, **rest), log).finish()
    same_run(whole, killed)


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew(nursery, flags_for, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    nursery.start(flags_for(whole), log).finish()
    kill_at_a_row(nursery.start(flags_for(killed, checkpointing_steps=1000), log), killed, 9)
    output = nursery.start(flags_for(killed), log).finish()
    assert "ended before its first checkpoint; it begins anew" in output
    same_run(whole, killed)


def test_a_run_that_is_killed_while_its_model_is_saved_saves_it_again(nursery, flags_for, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    nursery.start(flags_for(whole), log).finish()
    started = nursery.start(flags_for(killed), log)
    started.wait_for(lambda: (killed / "config.json").exists(), "the model")
    started.kill()
    assert not json.loads((killed / "run.json").read_text())["finished"]
    assert "going on after step" in nursery.start(flags_for(killed), log).finish()
    same_run(whole, killed)


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(nursery, flags_for, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    nursery.start(flags_for(folder), log).finish()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert "is finished, there is nothing to do" in nursery.start(flags_for(folder), tmp_path / "again").finish()
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_steps(nursery, flags_for, tmp_path, sizes, stage):
    """Sums in another order: 1e-5 of the loss. The flags stay as they were, so the step has to be the checkpoint's."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    first, second = sizes
    nursery.start(flags_for(whole, first, deepspeed=ZERO[stage]), log, processes=first).finish()
    flags = flags_for(killed, first, deepspeed=ZERO[stage])
    kill_at_a_row(nursery.start(flags, log, processes=first), killed, 20)  # in the middle of the first epoch
    output = nursery.start(flags, log, processes=second).finish()
    assert "steps of 16 pairs as before" in output and f"divided anew ({first} -> {second} ranks)" in output
    ours, theirs = record(killed), record(whole)
    assert [(row["step"], row["episode"]) for row in ours] == [(row["step"], row["episode"]) for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            if name.endswith(("/loss", "/lr")):
                assert one[name] == pytest.approx(other[name], abs=1e-5), (one["step"], name)


def test_a_run_that_goes_on_on_fewer_ranks_does_so_again_and_again(nursery, flags_for, tmp_path):
    """The step stays what it was, though the flags make another one on each number of ranks."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    nursery.start(flags_for(whole, 2), log, processes=2).finish()
    flags = flags_for(killed, 2)
    for processes, rows in ((2, 10), (1, 18), (1, 26), (2, 34)):
        kill_at_a_row(nursery.start(flags, log, processes=processes), killed, rows)
    nursery.start(flags, log).finish()
    assert [row["step"] for row in record(killed)] == [row["step"] for row in record(whole)]
    for one, other in zip(record(killed), record(whole), strict=True):
        assert one.get("train/rm/loss") == pytest.approx(other.get("train/rm/loss"), abs=1e-5), one["step"]


def test_a_finished_run_does_not_swallow_what_it_was_not_asked_before(nursery, flags_for, tmp_path):
    folder = tmp_path / "run"
    nursery.start(flags_for(folder), tmp_path / "log").finish()
    started = nursery.start(flags_for(folder, push_to_hub=True), tmp_path / "again", env={"HF_TOKEN": "hf_none"})
    assert started.statuses() == [1]
    assert "is finished, without --push_to_hub" in started.output and "python -m open_rm.hub" in started.output


@pytest.mark.parametrize(
    ("stages", "processes"), [((0, 3), (1, 1)), ((2, 0), (2, 1)), ((3, 0), (2, 2)), ((2, 3), (1, 2))]
)
def test_another_zero_stage_goes_on_too(nursery, flags_for, tmp_path, stages, processes):
    """The state is kept by parameters, not by ranks or stages."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    first, second = ({"deepspeed": ZERO[stage]} for stage in stages)
    nursery.start(flags_for(whole, processes[0], **first), log, processes=processes[0]).finish()
    flags = flags_for(killed, processes[0], **first)
    kill_at_a_row(nursery.start(flags, log, processes=processes[0]), killed, 20)
    flags = flags_for(killed, processes[0], **second)
    output = nursery.start(flags, log, processes=processes[1]).finish()
    assert f"--deepspeed {ZERO[stages[0]]} -> {ZERO[stages[1]]}" in output
    for one, other in zip(record(killed), record(whole), strict=True):
        assert one.get("train/rm/loss") == pytest.approx(other.get("train/rm/loss"), abs=1e-5), one["step"]


@pytest.mark.parametrize(("stages", "processes"), [((2, 2), (2, 1)), ((0, 2), (1, 2)), ((2, 0), (1, 1))])
def test_eight_bit_moments_go_on_elsewhere_within_their_precision(nursery, flags_for, tmp_path, stages, processes):
    """Blocks of 256 lie elsewhere then, so that moments are turned into numbers and back: a few thousandths of the loss."""
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    first, second = ({"deepspeed": ZERO[stage], "optim": "adamw_8bit"} for stage in stages)
    nursery.start(flags_for(whole, processes[0], **first), log, processes=processes[0]).finish()
    flags = flags_for(killed, processes[0], **first)
    kill_at_a_row(nursery.start(flags, log, processes=processes[0]), killed, 20)
    nursery.start(flags_for(killed, processes[0], **second), log, processes=processes[1]).finish()
    for one, other in zip(record(killed), record(whole), strict=True):
        assert one.get("train/rm/loss") == pytest.approx(other.get("train/rm/loss"), abs=2e-2), one["step"]


def test_under_zero_3_each_rank_writes_its_own_part_alone(nursery, flags_for, tmp_path):
    folder = tmp_path / "run"
    nursery.start(flags_for(folder, 2, deepspeed=ZERO[3]), tmp_path / "log", processes=2).finish()
    newest = folder / "checkpoints" / checkpoint_names(folder)[-1]
    sizes = [file.stat().st_size for file in sorted(newest.glob("rank_*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)
    parameters = 4 * sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert sum(sizes) < 1.1 * 3 * parameters  # weights and two moments, once in all


def test_one_wandb_run_holds_all_of_a_run_that_was_killed_twice(nursery, flags_for, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    env, flags = {"WANDB_MODE": "offline"}, flags_for(folder, with_tracking=True)
    for rows in (12, 26):
        kill_at_a_row(nursery.start(flags, log, env=env), folder, rows)
    nursery.start(flags, log, env=env).finish()
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [entry["history"]["item"] for entry in entries if entry["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(39))
