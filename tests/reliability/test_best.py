"""The best evaluation, early stopping, and the published folder of any checkpoint."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from killing import checkpoint_names, lines_of, record, same_run, weights_hash

from open_rm.errors import UserError
from open_rm.flags import Args, CheckpointFlags
from open_rm.training import best
from open_rm.training.progress import Progress

# A rate at which the held-out loss rises again.
OVERFITS = {
    "learning_rate": "1e-2",
    "total_episodes": None,
    "num_train_epochs": 4,
    "num_evals": 1,
    "eval_steps": 5,
    "metric_for_best_model": "loss",
}


def export(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "open_rm.export", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def evaluations(folder) -> dict[int, float]:
    return {row["step"]: row["eval/rm/loss"] for row in record(folder) if "eval/rm/loss" in row}


def flags_of(overfits, flags_for, folder, **more):
    rest = {**overfits, **more}
    if "num_evals" in rest:
        rest["num_evals"] = None
    return flags_for(folder, **rest)


def test_the_best_checkpoint_is_kept_saved_at_the_end_and_the_same_after_a_kill(nursery, flags_for, tmp_path):
    more = {"load_best_model_at_end": True, "keep_last_n_checkpoints": 1, "checkpointing_steps": 8}
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    nursery.start(flags_of(OVERFITS, flags_for, whole, **more), log).finish()
    losses = {step: loss for step, loss in evaluations(whole).items() if step}
    best_step = min(losses, key=losses.get)
    assert 0 < best_step < max(losses), f"nothing overfits: {losses}"
    names = checkpoint_names(whole)
    assert names == sorted({f"step_{best_step:08d}", f"step_{max(losses):08d}"})
    card = (whole / "README.md").read_text()
    assert f"{losses[best_step]:.4g}" in card

    started = nursery.start(flags_of(OVERFITS, flags_for, killed, **more), log)
    started.wait_for(lambda: (evaluations(killed) if lines_of(killed) else {}).keys() > {best_step}, "the best")
    started.kill()
    nursery.start(flags_of(OVERFITS, flags_for, killed, **more), log).finish()
    same_run(whole, killed)

    done = export(whole / "checkpoints" / f"step_{best_step:08d}", tmp_path / "exported")
    assert done.returncode == 0 and "reload check" in done.stdout, done.stderr
    assert weights_hash(tmp_path / "exported") == weights_hash(whole)


def test_patience_ends_the_run_and_the_same_command_says_that_it_is_finished(nursery, flags_for, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = flags_of(OVERFITS, flags_for, folder, early_stopping_patience=2)
    output = nursery.start(flags, log).finish()
    losses = {step: loss for step, loss in evaluations(folder).items() if step}
    steps, worse, lowest = sorted(losses), 0, float("inf")
    for step in steps:
        worse = 0 if losses[step] < lowest else worse + 1
        lowest = min(lowest, losses[step])
    assert worse == 2 and steps[-1] < 60 and record(folder)[-1]["step"] == steps[-1]
    assert f"ending at step {steps[-1]}" in output
    assert "nothing to do" in nursery.start(flags, tmp_path / "again").finish()


def test_a_metric_that_evaluations_do_not_have_is_refused_before_the_first_step(nursery, flags_for, tmp_path):
    started = nursery.start(flags_for(tmp_path / "run", metric_for_best_model="acuracy"), tmp_path / "log")
    assert started.statuses() == [1] and "step 1/" not in started.output
    assert "have no such metric, but accuracy" in started.output and "Traceback" not in started.output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"load_best_model_at_end": True}, "say by what"),
        ({"early_stopping_patience": 2}, "say by what"),
        ({"metric_for_best_model": "loss"}, "needs held-out data"),
        ({"checkpointing_minutes": -1.0}, "at least 0"),
        ({"keep_last_n_checkpoints": 0}, "at least 1"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, sentence):
    from open_rm.checks import check_args

    with pytest.raises(UserError, match=sentence):
        check_args(Args(dataset_mixer_list=["x", "1.0"], **flags))


@pytest.mark.parametrize(("metric", "values", "best_at"), [("loss", [3, 1, 1, 2], 2), ("accuracy", [1, 3, 3, 2], 2)])
def test_equal_is_not_better_and_the_first_evaluation_does_not_count(metric, values, best_at):
    flags, progress = CheckpointFlags(metric_for_best_model=metric, early_stopping_patience=2), Progress(10, 4)
    progress.last_evaluation = {f"eval/rm/{metric}": 100.0 if metric == "accuracy" else -100.0}
    assert not best.judge(flags, progress) and progress.worse == 0
    for step, value in enumerate(values, start=1):
        progress.step, progress.last_evaluation = step, {f"eval/rm/{metric}": float(value)}
        assert best.judge(flags, progress) == (step <= best_at)
        assert best.out_of_patience(flags, progress) == (step == 4)
    assert progress.best_step == best_at and progress.worse == 2


def test_not_a_number_is_never_the_best():
    flags, progress = CheckpointFlags(metric_for_best_model="loss"), Progress(10, 4, step=1)
    progress.last_evaluation = {"eval/rm/loss": float("nan")}
    assert not best.judge(flags, progress) and progress.best_step is None


KINDS = {
    "zero 3 of two ranks": (2, {"deepspeed": "configs/ds/zero3.json"}),
    "bfloat16 zero 2 of two ranks": (2, {"deepspeed": "configs/ds/zero2.json", "dtype": "bfloat16"}),
    "bfloat16": (1, {"dtype": "bfloat16"}),
    "lora": (1, {"use_peft": True}),
    "merged": (1, {"use_peft": True, "merge_adapter": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_of_the_last_checkpoint_is_the_model_that_the_run_saved(nursery, flags_for, tmp_path, kind):
    processes, more = KINDS[kind]
    folder = tmp_path / "run"
    nursery.start(flags_for(folder, processes, **more), tmp_path / "log", processes=processes).finish()
    done = export(folder, tmp_path / "exported")
    assert done.returncode == 0 and "reload check" in done.stdout and "saved step 38" in done.stdout, done.stderr
    assert weights_hash(tmp_path / "exported") == weights_hash(folder)
    same = {path.name for path in folder.iterdir() if path.is_file()} - {"run.json", "samples.jsonl", "reliability.png"}
    assert same == {path.name for path in (tmp_path / "exported").iterdir()}
    for name in ("contract.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()


def test_an_export_says_what_is_wrong_in_one_sentence(nursery, flags_for, toy, tmp_path):
    folder = tmp_path / "run"
    nursery.start(
        flags_for(folder, model_name_or_path=shutil.copytree(toy / "model", tmp_path / "base")), tmp_path / "log"
    ).finish()
    for arguments, sentence in (
        ((tmp_path / "nothing", tmp_path / "out"), "holds no checkpoint"),
        ((folder, folder), "already holds a model"),
    ):
        done = export(*arguments)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(tmp_path / "base")
    done = export(folder, tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--model_name_or_path" in done.stderr
    assert export(folder, tmp_path / "out", "--model_name_or_path", toy / "model").returncode == 0


def test_an_export_onto_another_base_is_refused(nursery, flags_for, toy, tmp_path):
    import safetensors.torch

    folder, other = tmp_path / "run", shutil.copytree(toy / "model", tmp_path / "other")
    nursery.start(flags_for(folder, use_peft=True), tmp_path / "log").finish()
    weights = safetensors.torch.load_file(other / "model.safetensors")
    safetensors.torch.save_file(
        {name: 1.5 * value for name, value in weights.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    done = export(folder, tmp_path / "out", "--model_name_or_path", other)
    assert done.returncode == 1 and "frozen weights differ" in done.stderr and "Traceback" not in done.stderr


def test_run_json_says_how_to_repeat_the_run_from_its_first_step_on(nursery, flags_for, tmp_path):
    folder = tmp_path / "run"
    started = nursery.start(flags_for(folder), tmp_path / "log")
    started.wait_for(lambda: lines_of(folder) > 3, "steps")
    facts = json.loads((folder / "run.json").read_text())
    started.kill()
    assert facts["learning_rate"] == 1e-3 and facts["plan"]["total_steps"] == 38 and not facts["finished"]
