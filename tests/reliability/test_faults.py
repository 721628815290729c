"""What breaks from inside or around a run: not-a-numbers, memory, disks, the Hub and wandb."""

import json
import os
import shutil
import subprocess
import time

import pytest
from conftest import in_a_process, launch, toy_flags
from hub_standin import HubStandin
from killing import checkpoint_names, lines_of, record, same_run, weights_hash

ZERO = {0: None, 2: "configs/ds/zero2.json", 3: "configs/ds/zero3.json"}
SLOW = """
import open_rm.training.engine as e, time
step = e.Engine.step
e.Engine.step = lambda *a, **k: (time.sleep(0.1), step(*a, **k))[1]
"""
# On rank 1 the loss of step 7 is no number; elsewhere nothing is wrong.
NAN = """
import open_rm.reward_modeling as r, open_rm.training.progress as p
made = [0]
advance, terms = p.Progress.advance, r.loss_terms
def counted(self, *rest):
    made[0] = rest[0].number
    return advance(self, *rest)
def broken(*args):
    return {name: term * (float("nan") if made[0] + 1 in STEPS else 1) for name, term in terms(*args).items()}
p.Progress.advance, r.loss_terms = counted, broken
"""


def nan_at(*steps: int) -> dict:
    return {"TEST_PATCH": NAN.replace("STEPS", repr(steps))}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_that_is_no_number_on_one_rank_is_not_applied_and_ends_the_run(nursery, flags_for, tmp_path, stage):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = flags_for(folder, 2, deepspeed=ZERO[stage])
    started = nursery.start(flags, log, processes=2, own={1: nan_at(7)})
    assert started.statuses() == [1, 1]
    assert "training diverged at step 7" in started.output and "was not applied" in started.output
    assert "Traceback" not in started.output
    assert checkpoint_names(folder)[-1] == "step_00000004" and record(folder)[-1]["step"] == 6
    nursery.start(flags, log, processes=2).finish()  # the machine that broke it is mended
    whole = tmp_path / "whole"
    nursery.start(flags_for(whole, 2, deepspeed=ZERO[stage]), log, processes=2).finish()
    same_run(whole, folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_diverges_finishes_the_checkpoint_that_is_being_written(nursery, flags_for, tmp_path, processes):
    slow = (
        "\nimport open_rm.reliability.shards as s, time; write = s.Snapshot.write\n"
        "s.Snapshot.write = lambda *a: (time.sleep(2), write(*a))[1]"
    )
    folder, env = tmp_path / "run", {"TEST_PATCH": nan_at(6)["TEST_PATCH"] + slow}
    started = nursery.start(flags_for(folder, processes), tmp_path / "log", processes=processes, env=env)
    assert started.statuses() == [1] * processes, started.output
    assert checkpoint_names(folder) == ["step_00000004"] and not list((folder / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_skipped_steps_are_counted_shown_and_written_with_the_places_of_their_pairs(
    nursery, flags_for, tmp_path, stage
):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = flags_for(folder, deepspeed=ZERO[stage], max_skipped_steps=2)
    output = nursery.start(flags, log, env=nan_at(7, 20)).finish()
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [7, 20] and all(len(row["pairs"]) == 16 for row in rows)
    assert "train.jsonl:" in rows[0]["pairs"][0] and "skipped at step 7" in output
    assert [row["train/rm/loss"] is None for row in record(folder) if row["step"] in (7, 20)].count(True) == 2
    assert all(
        row["train/rm/loss"] is not None for row in record(folder) if row["step"] == 8 and "train/rm/loss" in row
    )
    started = nursery.start(flags_for(tmp_path / "three", max_skipped_steps=2), log, env=nan_at(7, 20, 21))
    assert started.statuses() == [1] and "training diverged at step 21" in started.output


DROPS = """
import json, sys, torch
import numpy as np
from open_rm.batching.layouts import lay_out
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import BatchFlags, ModelFlags, OptimizerFlags
from open_rm.model.loading import load_reward_model
from open_rm.ranks import joined_ranks
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine

model, file = sys.argv[1], sys.argv[2]
results = {}
for stage, bf16 in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)):
    json.dump({"zero_optimization": {"stage": stage}}, open(file, "w"))
    for drops in ("", "drop", "nan"):
        with joined_ranks() as ranks:
            config = fill_config(BatchFlags(deepspeed=file), width=128, bf16=bf16, max_grad_norm=1.0)
            dtype = torch.bfloat16 if bf16 else torch.float32
            tokenizer, how = load_tokenizer(model), {"dtype": dtype, "deepspeed_config": config, "seed": 1}
            flags = OptimizerFlags(learning_rate=1e-2, lr_scheduler_type="constant")
            reward_model, _ = load_reward_model(ModelFlags(model_name_or_path=model), tokenizer, **how)
            engine = Engine(reward_model, flags, config, ranks)
            norms = []
            for step in range(4):
                if step == 2 and not drops:
                    continue
                pair = (np.arange(5 + step, 25), np.arange(6 + step, 30))
                batch = lay_out("padded", [pair], pad_token_id=tokenizer.pad_token_id, prompt_ids=[0])
                chosen, rejected = engine(**batch.inputs(ranks.device)).chunk(2)
                loss = (rejected - chosen).sum()
                engine.backward(loss * float("nan") if step == 2 and drops == "nan" else loss, last=True)
                norms.append(engine.step(drop=step == 2 and drops == "drop"))
            state = engine.gathered_state()
            key = f"{stage} {bf16} {drops}"
            results[key] = {name: value.double().sum().item() for name, value in state.items()}
            results[key + " norms"] = [str(norm) for norm in norms]
print(json.dumps(results))
"""


def test_a_dropped_step_leaves_weights_and_moments_as_if_it_had_not_been(toy, tmp_path):
    """Under every stage, in float32 and bfloat16; asked for, or because the gradient was no number."""
    results = in_a_process(DROPS, toy / "model", tmp_path / "ds.json")
    for key in [key for key in results if key.endswith(("drop", "nan"))]:
        plain = key.rpartition(" ")[0] + " "
        assert results[key] == results[plain], key
        norms = results[f"{key} norms"]
        assert norms[2] in ("inf", "nan") and [*norms[:2], norms[3]] == results[f"{plain} norms"], key


OUT_OF_MEMORY = """
import open_rm.training.engine as e, torch
call, made = e.Engine.__call__, [0]
def full(self, **inputs):
    made[0] += 1
    if made[0] == 12: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return call(self, **inputs)
e.Engine.__call__ = full
"""


def test_out_of_memory_names_the_longest_pair_and_the_flag(nursery, flags_for, tmp_path):
    """On one of two ranks: the other one learns of it at once."""
    folder = tmp_path / "run"
    flags = flags_for(folder, 2, max_tokens_per_micro_batch=800)
    started = nursery.start(flags, tmp_path / "log", processes=2, own={1: {"TEST_PATCH": OUT_OF_MEMORY}})
    asked = time.monotonic()
    statuses = started.statuses()
    assert statuses == [76, 1] and time.monotonic() - asked < 60 and "Traceback" not in started.output, started.output
    assert "rank 1 on" in started.output and "its own output says why" in started.output
    assert "out of memory in a micro-batch of" in started.output and "tokens" in started.output
    assert "train.jsonl" in started.output and "--max_tokens_per_micro_batch 400 (it is 800)" in started.output


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 MiB: a checkpoint of the toy has 4.4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave: int) -> None:
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - leave))


def test_a_disk_that_fills_keeps_the_last_good_checkpoint_and_the_run_goes_on(nursery, flags_for, tmp_path, small_disk):
    folder, log = small_disk / "run", tmp_path / "log"
    started = nursery.start(flags_for(folder), log, env={"TEST_PATCH": SLOW})
    started.wait_for(lambda: len(checkpoint_names(folder)) == 2, "two checkpoints")
    fill(small_disk, leave=600_000)  # the records fit still
    started.wait_for(lambda: "no checkpoint at step" in started.output, "the sentence")
    kept = checkpoint_names(folder)
    assert started.statuses() == [1]  # the model does not fit
    said = next(line for line in started.output.splitlines() if line.startswith("no checkpoint at step"))
    assert "are needed and" in said and f"the last good one is of step {int(kept[-1][5:])}" in said
    sentence = next(line for line in started.output.splitlines() if line.startswith("error: "))
    assert "the model cannot be saved (the disk is full" in sentence and "Traceback" not in started.output
    (small_disk / "ballast").unlink()  # what the sentence says
    output = nursery.start(flags_for(folder), log).finish()
    assert "going on after step" in output
    nursery.start(flags_for(tmp_path / "whole"), log).finish()
    same_run(tmp_path / "whole", folder)


def test_a_disk_without_room_is_refused_before_training(nursery, flags_for, tmp_path, small_disk):
    fill(small_disk, leave=6_000_000)
    started = nursery.start(flags_for(small_disk / "run"), tmp_path / "log")
    assert started.statuses() == [1]
    sentence = next(line for line in started.output.splitlines() if line.startswith("error: "))
    assert "too little" in sentence and "--checkpointing_minutes 0" in sentence
    assert not (small_disk / "run").exists()
    flags = flags_for(small_disk / "run", checkpointing_steps=None, checkpointing_minutes=0)
    assert "checkpoints: off" in nursery.start(flags, tmp_path / "log").finish()


@pytest.fixture
def immutable():
    """Makes folders immutable, as an administrator may: what is open goes on, nothing new can be made."""
    made = []

    def make(*folders):
        for folder in folders:
            if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
                pytest.skip("the file system knows no immutable folders")
            made.append(folder)

    def unmake():
        while made:
            subprocess.run(["chattr", "-i", made.pop()], check=True)

    yield make, unmake
    unmake()


def test_a_folder_that_becomes_read_only_does_not_end_the_training(nursery, flags_for, tmp_path, immutable):
    folder, log = tmp_path / "run", tmp_path / "log"
    started = nursery.start(flags_for(folder), log, env={"TEST_PATCH": SLOW})
    started.wait_for(lambda: len(checkpoint_names(folder)) == 2, "two checkpoints")
    make, unmake = immutable
    make(folder, folder / "checkpoints")
    started.wait_for(lambda: "no checkpoint at step" in started.output, "the sentence")
    assert started.statuses() == [1], started.output  # the model cannot be saved there
    assert "step 38/38" in started.output and "Traceback" not in started.output
    assert "the model cannot be saved" in started.output
    unmake()
    assert "going on after step" in nursery.start(flags_for(folder), log).finish()
    nursery.start(flags_for(tmp_path / "whole"), log).finish()
    same_run(tmp_path / "whole", folder)


def test_the_hub_gone_at_the_end_loses_nothing_and_the_same_command_pushes(toy, tmp_path):
    """The run is not finished until it is pushed. A process with imports of its own: the Hub's client reads its address then."""
    folder, quick = tmp_path / "run", tmp_path / "quick.py"
    quick.write_text(
        "import sys; from open_rm.publishing import hub_calls; hub_calls.FIRST_PAUSE_SECONDS = 0.01\n"
        "from open_rm import reward_modeling as r; from open_rm import command_line\n"
        "command_line.run(r.main, command_line.read(r.Args, r.check_args))\n"
    )
    flags = toy_flags(toy, folder, push_to_hub=True, hf_repo_id="rm", checkpointing_steps=4)
    with HubStandin() as hub:
        hub.fault("/commit/", method="POST", status=503, times=-1)
        done = launch(quick, *flags, env=hub.env() | {"HF_HUB_OFFLINE": "0"})
        assert done.returncode == 1 and "The model is safe in" in done.stderr, done.stderr
        kept = weights_hash(folder)
    with HubStandin() as hub:
        done = launch(quick, *flags, env=hub.env() | {"HF_HUB_OFFLINE": "0"})
        assert done.returncode == 0 and "pushed to" in done.stdout, done.stderr
        assert "going on after step 10" in done.stdout and weights_hash(folder) == kept
        pushed = [path for _, path, _ in hub.requests()]
        assert not any("checkpoints" in path or ".claim" in path for path in pushed)


def test_wandbs_service_killed_in_mid_run_does_not_end_the_training(nursery, flags_for, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    env = {"WANDB_MODE": "offline", "TEST_PATCH": SLOW}
    started = nursery.start(flags_for(folder, with_tracking=True), log, env=env)
    started.wait_for(lambda: lines_of(folder) > 6, "training")
    children = subprocess.run(["pgrep", "-f", "wandb-core"], capture_output=True, text=True).stdout.split()
    family = [pid for pid in children if ancestor(int(pid), started.pids[0])]
    assert family
    subprocess.run(["kill", "-9", *family], check=True)
    output = started.finish()
    assert output.count("wandb is off") == 1 or "wandb" in output
    shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    nursery.start(flags_for(tmp_path / "whole"), log).finish()
    same_run(tmp_path / "whole", folder)


def ancestor(pid: int, of: int) -> bool:
    """Whether `of` started the process, or one that did."""
    while pid > 1:
        if pid == of:
            return True
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
