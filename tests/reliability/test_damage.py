"""Damaged and foreign checkpoints: fallen back from or refused in one sentence, and nothing in them is run."""

import fcntl
import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from killing import checkpoint_names, lines_of, record, same_run

from open_rm.flags import Args
from open_rm.reliability import comparing


@pytest.fixture(scope="module")
def runs(nursery, toy, pairs_cache, tmp_path_factory):
    """A run that was killed with three checkpoints, and the same one undisturbed."""
    from conftest import flags_of_a_long_run

    folder = tmp_path_factory.mktemp("runs")
    flags = {"keep_last_n_checkpoints": 3}
    whole = flags_of_a_long_run(toy, pairs_cache, folder / "whole", **flags)
    nursery.start(whole, folder / "whole.log").finish()
    started = nursery.start(flags_of_a_long_run(toy, pairs_cache, folder / "killed", **flags), folder / "killed.log")
    started.wait_for(
        lambda: len(checkpoint_names(folder / "killed")) == 3 and lines_of(folder / "killed") > 20, "three"
    )
    started.kill()
    return folder


@pytest.fixture
def killed(runs, tmp_path):
    shutil.copytree(runs / "killed", tmp_path / "killed")
    for file in (tmp_path / "killed").glob(".claim*"):
        file.unlink()
    return tmp_path / "killed"


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / checkpoint_names(folder)[-1]


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "rank_00000.safetensors").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


class Code:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def put_code_in(checkpoint: Path) -> None:
    """A pickle that runs code, with a manifest that says it was written so."""
    code = Code()
    code.path = str(checkpoint.parent.parent.parent / "it ran")
    put_in(checkpoint, "rank_00000.safetensors", pickle.dumps(code))


def put_nonsense_in_the_state(checkpoint: Path) -> None:
    put_in(checkpoint, "state.json", b'{"progress": []}')


def put_in(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    truncate: "another size",
    flip_a_bit: "another content",
    lose_a_file: "rank_00000.safetensors is missing",
    lose_the_manifest: "manifest.json is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(nursery, flags_for, runs, killed, damage, tmp_path):
    names = checkpoint_names(killed)
    damage(newest(killed))
    output = nursery.start(flags_for(killed, keep_last_n_checkpoints=3), tmp_path / "log").finish()
    [said] = [line for line in output.splitlines() if "is damaged" in line]
    assert names[-1] in said and DAMAGES[damage] in said and said.endswith("the one before it is taken")
    assert (killed / "checkpoints" / f"{names[-1]}.damaged").exists()
    assert f"going on after step {int(names[-2][5:])}" in output
    same_run(runs / "whole", killed)


def refused(nursery, flags, tmp_path) -> str:
    """The sentence that ends a run at once, of which nothing is a traceback."""
    started = nursery.start(flags, tmp_path / f"refused {len(list(tmp_path.iterdir()))}")
    assert started.statuses() == [1]
    assert "Traceback" not in started.output
    return next(line for line in started.output.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("tamper", [put_code_in, put_nonsense_in_the_state], ids=lambda tamper: tamper.__name__)
def test_a_tampered_checkpoint_is_refused_and_nothing_in_it_runs(nursery, flags_for, killed, tamper, tmp_path):
    tamper(newest(killed))
    before = sorted(killed.rglob("*"))
    assert str(newest(killed)) in refused(nursery, flags_for(killed, keep_last_n_checkpoints=3), tmp_path)
    assert not (tmp_path / "it ran").exists() and before == sorted(killed.rglob("*"))
    exported = export(newest(killed), tmp_path / "out")
    assert exported.returncode == 1 and exported.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "it ran").exists()


def export(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "open_rm.export", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_code_that_a_checkpoint_says_to_trust_is_not_run_by_an_export(killed, toy, tmp_path):
    model = shutil.copytree(toy / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "code.Model", "AutoConfig": "code.Config"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'it ran')!r}).touch()")
    state = json.loads((newest(killed) / "state.json").read_text())
    state["flags"] |= {"trust_remote_code": True, "model_name_or_path": str(model)}
    state["contract"]["trust_remote_code"] = True
    put_in(newest(killed), "state.json", json.dumps(state).encode())
    exported = export(newest(killed), tmp_path / "out")
    assert exported.returncode == 1 and "--trust_remote_code" in exported.stderr and "Traceback" not in exported.stderr
    assert not (tmp_path / "it ran").exists()


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_they_are_kept(nursery, flags_for, killed, tmp_path):
    names = checkpoint_names(killed)
    for name in names:
        flip_a_bit(killed / "checkpoints" / name)
    sentence = refused(nursery, flags_for(killed), tmp_path)
    assert "no checkpoint in" in sentence and "move that folder away to begin anew" in sentence
    assert checkpoint_names(killed) == names
    shutil.move(killed / "checkpoints", tmp_path / "away")  # what the sentence says
    assert "it begins anew" in nursery.start(flags_for(killed), tmp_path / "log 2").finish()


def test_a_checkpoint_that_is_named_is_taken_or_refused_but_no_other(nursery, flags_for, runs, killed, tmp_path):
    middle = killed / "checkpoints" / checkpoint_names(killed)[1]
    flags = flags_for(tmp_path / "elsewhere", resume_from_checkpoint=middle, keep_last_n_checkpoints=3)
    nursery.start(flags, tmp_path / "log").finish()  # in another folder, with the record from the start
    same_run(runs / "whole", tmp_path / "elsewhere")
    flip_a_bit(middle)
    sentence = refused(nursery, flags_for(tmp_path / "third", resume_from_checkpoint=middle), tmp_path)
    assert "another content" in sentence and not (tmp_path / "third").exists()
    sentence = refused(nursery, flags_for(tmp_path / "third", resume_from_checkpoint=tmp_path / "nothing"), tmp_path)
    assert "holds no checkpoint" in sentence


def test_a_folder_that_holds_a_run_is_not_gone_on_with_from_another_runs_checkpoint(
    nursery, flags_for, runs, killed, tmp_path
):
    other = runs / "whole"
    before = (killed / "metrics.jsonl").read_bytes()
    assert "holds a run, and" in refused(nursery, flags_for(killed, resume_from_checkpoint=other), tmp_path)
    assert (killed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": "5e-4"}, "--learning_rate 0.001 -> 0.0005"),
        ({"seed": 2}, "--seed 1 -> 2"),
        ({"total_episodes": 500}, "--total_episodes 600 -> 500"),
        ({"loss_type": "focal"}, "--loss_type ranking -> focal"),
        ({"per_device_train_batch_size": 8}, "steps of 16 pairs and the flags make 8"),
        ({"max_token_length": 40, "max_prompt_token_length": 40}, "training data differ"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(nursery, flags_for, killed, tmp_path, changed, named):
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    assert named in refused(nursery, flags_for(killed, **changed), tmp_path)
    after = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    assert before == after, "a refused command has changed the run"


def test_what_does_not_change_it_is_allowed_and_said(nursery, flags_for, runs, killed, tmp_path):
    moved = killed.rename(tmp_path / "moved")
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_tokens_per_micro_batch": 500}
    changes |= {"exp_name": "other", "keep_last_n_checkpoints": 1, "checkpointing_steps": 7}
    output = nursery.start(flags_for(moved, **changes), tmp_path / "log").finish()
    [said] = [line for line in output.splitlines() if line.startswith("changed since")]
    for name, value in changes.items():
        assert f"--{name} " in said and f"-> {value}" in said
    for one, other in zip(record(moved), record(runs / "whole"), strict=True):
        assert one.get("train/rm/loss") == pytest.approx(other.get("train/rm/loss"), abs=1e-5)
    assert len(checkpoint_names(moved)) == 1


def test_a_damaged_newest_checkpoint_does_not_cost_the_good_ones(nursery, flags_for, killed, tmp_path):
    """With one kept, the damaged one counted as the newest, and the one just written was removed."""
    names = checkpoint_names(killed)
    flip_a_bit(newest(killed))
    flags = flags_for(killed, keep_last_n_checkpoints=1, checkpointing_steps=None)
    slow = "import open_rm.training.engine as e, time; s = e.Engine.step; e.Engine.step = lambda *a, **k: (time.sleep(0.1), s(*a, **k))[1]"
    before = int(names[-2][5:])
    started = nursery.start(flags, tmp_path / "log", env={"TEST_PATCH": slow})
    started.wait_for(lambda: record(killed)[-1]["step"] == before + 1, "a step")
    started.send(signal.SIGTERM)
    assert started.statuses() == [75]
    [name] = checkpoint_names(killed)
    assert before < int(name[5:]) <= int(names[-1][5:])


def test_a_run_from_a_named_checkpoint_goes_on_by_the_same_command(nursery, flags_for, runs, killed, tmp_path):
    middle = killed / "checkpoints" / checkpoint_names(killed)[1]
    for folder in (tmp_path / "elsewhere", killed):  # in a folder of its own; back in its run's
        flags = flags_for(folder, resume_from_checkpoint=middle, keep_last_n_checkpoints=2)
        started = nursery.start(flags, tmp_path / "log")
        later = f"step_{int(middle.name[5:]) + 8:08d}"
        started.wait_for(lambda f=folder, name=later: name in checkpoint_names(f), "two more checkpoints")
        started.kill()
        output = nursery.start(flags, tmp_path / f"{folder.name}.log").finish()
        assert f"going on after step {int(middle.name[5:])} " not in output and "going on after step" in output
        same_run(runs / "whole", folder)


def test_tokenizing_alone_leaves_a_run_in_its_folder_alone(nursery, flags_for, killed, tmp_path):
    building = killed / "checkpoints" / "step_00000099.1.tmp"
    building.mkdir()
    before = sorted(killed.rglob("*"))
    flags = flags_for(killed, cache_dataset_only=True, learning_rate="5e-4")
    assert "stopping (--cache_dataset_only)" in nursery.start(flags, tmp_path / "log").finish()
    assert sorted(killed.rglob("*")) == before


def test_a_path_from_python_is_text_in_a_checkpoint(tmp_path):
    flags = comparing.plain(Args(output_dir=tmp_path, dataset_mixer_list=["x", "1.0"]))
    assert flags["output_dir"] == str(tmp_path) and not comparing.changed(
        flags, json.loads(json.dumps(flags)), where=""
    )


def test_what_may_change_are_flags():
    names = set(Args.__dataclass_fields__)
    assert names >= comparing.FREE and comparing.FREE >= comparing.DECIDE_THE_BEST
    assert not {"learning_rate", "seed", "optim", "dtype", "num_train_epochs"} & comparing.FREE


def test_never_refuses_a_folder_that_holds_a_run(nursery, flags_for, killed, tmp_path):
    assert "already holds the record of a run" in refused(
        nursery, flags_for(killed, resume_from_checkpoint="never"), tmp_path
    )


def is_locked(folder) -> bool:
    """Whether somebody decides about the folder: one who is stopped then is not known by name yet."""
    with (folder / ".claim.lock").open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_two_runs_on_one_folder_the_second_names_the_first(nursery, flags_for, killed, tmp_path):
    first = nursery.start(flags_for(killed, keep_last_n_checkpoints=3), tmp_path / "first")
    first.wait_for(lambda: (killed / ".claim.json").exists() and not is_locked(killed), "its claim")
    first.send(signal.SIGSTOP)
    sentence = refused(nursery, flags_for(killed), tmp_path)
    assert f"process {first.pids[0]} on" in sentence and "choose another folder" in sentence
    first.send(signal.SIGCONT)
    first.finish()
