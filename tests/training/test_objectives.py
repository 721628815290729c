"""Every objective through the recipe, on real rows, in every layout: the same numbers, and each term among the metrics."""

import json
import math

import pytest
from conftest import read_metrics, run_recipe, shared_data, toy_flags

from open_rm.batching.rules import LAYOUTS
from open_rm.checks import check_args
from open_rm.errors import UserError
from open_rm.flags import Args
from open_rm.reward_modeling import main

OBJECTIVES = {
    "ranking with margin and smoothing": {
        "margin_loss": True,
        "margin_from": ["score_chosen", "score_rejected"],
        "label_smoothing": 0.1,
    },
    "focal with barrier": {"loss_type": "focal", "penalty_type": "log_barrier", "penalty_weight": 0.02},
    "ranking with L2 and centering": {"penalty_type": "L2", "center_rewards_coefficient": 0.01},
    "focal with margin and a reward token": {
        "loss_type": "focal",
        "focal_gamma": 1.0,
        "margin_loss": True,
        "margin_from": ["score_chosen", "score_rejected"],
        "reward_token": "<|reward|>",
        "score_init": "zeros",
    },
    "ranking with a frozen backbone": {"freeze_backbone": True},
}
TERMS = {"focal with barrier": {"penalty"}, "ranking with L2 and centering": {"penalty", "centering"}}
# As in test_engine.py: float32 sums in another order, five AdamW steps apart.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def real_rows(tmp_path_factory):
    """40 short rows of alpaca_eval, with scores."""
    rows = []
    for line in (shared_data("alpaca_eval") / "train.jsonl").read_text(encoding="utf-8").splitlines():
        if len(line) < 2500:
            rows.append(line)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(rows[:40]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(toy, real_rows, tmp_path_factory):
    """Metrics of a run of five steps, by (objective, layout)."""
    folder, found = tmp_path_factory.mktemp("objectives"), {}

    def run(name: str, layout: str) -> list[dict]:
        if (name, layout) not in found:
            output = folder / f"{len(found)}"
            main(
                Args(
                    model_name_or_path=str(toy / "model"),
                    dataset_mixer_list=[str(real_rows), "1.0"],
                    dataset_mixer_eval_list=[str(real_rows), "1.0"],
                    dataset_local_cache_dir=str(folder / "cache"),
                    output_dir=str(output),
                    max_token_length=1024,
                    per_device_train_batch_size=8,
                    gradient_accumulation_steps=1,
                    learning_rate=3e-4,
                    num_evals=0,
                    num_sample_pairs=0,
                    dtype="float32",
                    batching=layout,
                    **OBJECTIVES[name],
                )
            )
            found[name, layout] = read_metrics(output)
        return found[name, layout]

    return run


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "padded"])
def test_every_objective_gives_the_same_run_in_every_layout(runs, name, layout):
    reference, other = runs(name, "padded"), runs(name, layout)
    assert len([row for row in reference if "train/rm/loss" in row]) == 5
    for row, own in zip(reference, other, strict=True):
        same = {key for key in row if "/rm/" in key}
        assert same == {key for key in own if "/rm/" in key}
        for key in same:
            assert own[key] == pytest.approx(row[key], abs=TOLERANCE, rel=1e-4 if "norm" in key else 0), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_logged_terms_add_up_to_the_loss_which_falls(runs, name):
    rows = [row for row in runs(name, "shared_prefix") if "train/rm/loss" in row]
    terms = {"ranking"} | TERMS.get(name, set())
    for row in rows:
        assert {key for key in row if key.startswith("train/rm/loss_")} == {f"train/rm/loss_{term}" for term in terms}
        assert row["train/rm/loss"] == pytest.approx(sum(row[f"train/rm/loss_{term}"] for term in terms), abs=1e-6)
    evaluations = [row["eval/rm/loss"] for row in runs(name, "shared_prefix") if "eval/rm/loss" in row]
    if "margin" not in name:  # the evaluation's loss is Bradley-Terry's own, without margins
        assert evaluations[-1] < evaluations[0]


def test_the_first_loss_with_a_zero_head_is_xtuners_published_one(toy, tmp_path):
    flags = toy_flags(
        toy, tmp_path / "out", score_init="zeros", loss_type="focal", penalty_type="log_barrier", total_episodes=8
    )
    done = run_recipe(*flags)
    assert done.returncode == 0, done.stderr[-3000:]
    first = next(row for row in read_metrics(tmp_path / "out") if "train/rm/loss" in row)
    assert first["train/rm/loss"] == pytest.approx(0.628770, abs=1e-6)
    assert first["train/rm/loss_ranking"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["train/rm/grad_norm"] > 0


def test_continuing_from_a_saved_reward_model_starts_at_its_last_evaluation(toy, tmp_path):
    """With a reward token: nothing about the rewards is lost in the folder."""
    first = run_recipe(*toy_flags(toy, tmp_path / "first", reward_token="<|reward|>", total_episodes=40))
    assert first.returncode == 0, first.stderr[-3000:]
    again = toy_flags(toy, tmp_path / "second", model_name_or_path=tmp_path / "first", total_episodes=16)
    second = run_recipe(*again)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "the checkpoint already is a reward model: its score head is kept" in second.stdout
    last = [row for row in read_metrics(tmp_path / "first") if "eval/rm/loss" in row][-1]
    start = next(row for row in read_metrics(tmp_path / "second") if "eval/rm/loss" in row)
    names = [name for name in last if name.startswith("eval/rm/")]
    assert len(names) >= 5
    assert {name: start[name] for name in names} == {name: last[name] for name in names}  # bit for bit
    config = json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    assert config["reward_token"] == "<|reward|>"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"focal_gamma": 1.0}, "--focal_gamma does nothing without --loss_type focal"),
        ({"focal_gamma": -1.0, "loss_type": "focal"}, "--focal_gamma -1.0: must be at least 0, and finite"),
        ({"label_smoothing": 0.1, "loss_type": "focal"}, "--label_smoothing is defined for --loss_type ranking"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5: must be from 0 to below 0.5"),
        ({"penalty_weight": 0.5}, "--penalty_weight does nothing without --penalty_type"),
        (
            {"penalty_type": "L2", "penalty_bound": 3.0},
            "--penalty_bound does nothing without --penalty_type log_barrier",
        ),
        (
            {"penalty_type": "log_barrier", "penalty_bound": 0.001},
            "--penalty_bound 0.001: must be above 0.001, and finite",
        ),
        (
            {"penalty_type": "log_barrier", "penalty_bound": math.nan},
            "--penalty_bound nan: must be above 0.001, and finite",
        ),
        ({"center_rewards_coefficient": math.inf}, "--center_rewards_coefficient inf: must be at least 0, and finite"),
        ({"loss_type": "hinge"}, "--loss_type hinge: must be one of ranking, focal"),
        ({"score_init": "ones"}, "--score_init ones: must be one of default, zeros"),
    ],
)
def test_objectives_that_cannot_be_are_refused_by_name(wrong, sentence):
    with pytest.raises(UserError, match=sentence.replace("+", r"\+")):
        check_args(Args(**wrong))
