"""One torchrun makes several runs, one after another, and each is what it would have been alone."""

import pytest
from conftest import REPOSITORY, launch, read_metrics

SCRIPT = """
import faulthandler, os, time
from open_rm.errors import UserError
from open_rm.reward_modeling import Args, main

faulthandler.dump_traceback_later({limit}, exit=True)  # a run that hangs says where
rank = int(os.environ["RANK"])
data = ["{toy}/data", "1.0"]

def run(name, stage, **changes):
    main(Args(model_name_or_path="{toy}/model", dataset_mixer_list=data, dataset_mixer_eval_list=data, num_evals=1,
              dataset_local_cache_dir="{folder}/cache", output_dir="{folder}/" + name, total_episodes=16,
              per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3, num_sample_pairs=0,
              deepspeed=f"{repository}/configs/ds/zero{{stage}}.json", **changes))

run("first", 3)
for number in range(6):
    time.sleep(0.3 * (rank == number % 2))
    try:
        run(f"mistake_{{number}}", 0, margin_loss=True)
    except (UserError, SystemExit):
        continue
    raise AssertionError("the data has no margins")
run("between", 0)
run("second", 3)
"""
LIMIT = 600


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    (folder / "several.py").write_text(SCRIPT.format(toy=toy, folder=folder, repository=REPOSITORY, limit=LIMIT))
    done = launch(folder / "several.py", processes=2, timeout=LIMIT + 30)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def rewards_of(folder) -> list[dict]:
    return [
        {key: value for key, value in line.items() if "/rm/" in key or key == "episode"}
        for line in read_metrics(folder)
    ]


def test_a_run_after_mistakes_and_another_run_is_what_it_was_as_the_first(runs):
    """torchrun's store keeps the addresses of groups that are gone, and a late rank would make the other read them."""
    assert len(rewards_of(runs / "first")) > 2
    assert rewards_of(runs / "first") == rewards_of(runs / "second")


def test_a_run_in_between_under_another_zero_stage_is_made(runs):
    assert (runs / "between" / "model.safetensors").is_file()
