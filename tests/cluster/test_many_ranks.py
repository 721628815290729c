"""The same steps on many processes: equal metrics and weights whatever their number, and the usual accuracy on eight."""

import numpy as np
import pytest
from conftest import read_metrics, toy_flags
from safetensors.numpy import load_file

from open_rm import toy

# Sums over ranks come in another order, in float32; AdamW's eps of 1e-5 keeps the first steps from blowing that up (with 1e-8
# it would reach 1e-4).
TOLERANCE = 1e-5
OF_THE_CLOCK = ("hours", "perf/", "eval/samples_per_second")


def numbers(folder) -> list[dict]:
    """The record of a run without what the clock or the count of ranks decides."""
    rows = read_metrics(folder)
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_CLOCK)} for row in rows]


def same_within(one, other, tolerance: float = TOLERANCE) -> None:
    """Two folders hold the same run up to rounding: metrics and weights."""
    rows = list(zip(numbers(one), numbers(other), strict=True))
    for a, b in rows:
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert np.abs(value - weights[1][name]).max() <= tolerance, name


@pytest.fixture(scope="module")
def by_ranks(nursery, toy, pairs_cache, tmp_path_factory):
    """Ten steps of 16 pairs on 1, 2 and 4 ranks, the last under ZeRO-2: folder of each."""
    folder, made = tmp_path_factory.mktemp("ranks"), {}
    for ranks in (1, 2, 4):
        made[ranks] = folder / str(ranks)
        flags = {
            "per_device_train_batch_size": 16 // ranks,
            "total_episodes": 160,
            "dataset_local_cache_dir": pairs_cache,
        }
        flags |= {"deepspeed": "configs/ds/zero2.json"} if ranks == 4 else {}
        started = nursery.start(toy_flags(toy, made[ranks], **flags), folder / f"{ranks}.log", processes=ranks)
        started.finish()
    return made


@pytest.mark.parametrize("ranks", [2, 4])
def test_ten_steps_on_several_ranks_are_those_of_one(by_ranks, ranks):
    same_within(by_ranks[1], by_ranks[ranks])
    assert numbers(by_ranks[1])[-1]["step"] == 10


def test_eight_processes_on_a_small_machine_learn_the_toy_to_its_usual_accuracy(nursery, tmp_path):
    """Half of the debug recipe's steps, with its flags, dealt to eight: 0.9 is what it asks on one."""
    toy.main(toy.ToyArgs(folder=str(tmp_path / "toy"), train_pairs=3200, test_pairs=200, seed=3))
    flags = {"per_device_train_batch_size": 2, "total_episodes": None, "learning_rate": "5e-4", "warmup_ratio": 0.05}
    flags |= {"per_device_eval_batch_size": 32, "checkpointing_minutes": 0, "num_sample_pairs": 0}
    nursery.start(toy_flags(tmp_path / "toy", tmp_path / "run", **flags), tmp_path / "log", processes=8).finish()
    last = numbers(tmp_path / "run")[-1]
    assert last["step"] == 200 and last["eval/rm/accuracy"] >= 0.9
