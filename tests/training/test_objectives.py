"""Every objective through the recipe, on real rows, in every layout: the same numbers, and each term among the metrics."""

import json
import math

import pytest
from conftest import read_metrics, shared_data, toy_flags

from open_rm.batching.rules import LAYOUTS
from open_rm.checks import check_args
from open_rm.errors import UserError
from open_rm.flags import Args
from open_rm.reward_modeling import main

pytestmark = pytest.mark.usefixtures("without_pictures")

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
    "soft labels and ties, smoothed": {"label_smoothing": 0.1},
    "lists by Plackett-Luce": {"list_loss": "plackett_luce"},
    "lists by their best, with centering": {"list_loss": "best_of_k", "center_rewards_coefficient": 0.01},
}
TERMS = {
    "focal with barrier": {"penalty"},
    "ranking with L2 and centering": {"penalty", "centering"},
    "lists by their best, with centering": {"centering"},
}
# As in test_engine.py: float32 sums in another order, five AdamW steps apart.
TOLERANCE = 1e-5


def short_rows(name: str, length: int) -> list[dict]:
    lines = (shared_data("alpaca_eval") / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if len(line) < length]


@pytest.fixture(scope="module")
def real_rows(tmp_path_factory):
    """By what an objective's name begins with: 40 short pairs of alpaca_eval with scores, the same with a probability each, some
    of them ties; and lists of four answers, some of them tied."""
    pairs, folder = short_rows("train.jsonl", 2500)[:40], tmp_path_factory.mktemp("rows")
    probs = [1.0, 0.5, 0.8, 0.3, 0.65]
    kinds = {
        "": pairs,
        "soft": [
            {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"label_prob": probs[i % 5]}
            for i, row in enumerate(pairs)
        ],
        "lists": short_rows("ranked.jsonl", 1500)[:9],
    }
    for kind, rows in kinds.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    return lambda name: str(folder / f"{next(kind for kind in reversed(kinds) if name.startswith(kind))}.jsonl")


@pytest.fixture(scope="module")
def runs(toy, real_rows, tmp_path_factory):
    """Metrics of a run of five steps or so, by (objective, layout)."""
    folder, found = tmp_path_factory.mktemp("objectives"), {}

    def run(name: str, layout: str) -> list[dict]:
        if (name, layout) not in found:
            output = folder / f"{len(found)}"
            main(
                Args(
                    model_name_or_path=str(toy / "model"),
                    dataset_mixer_list=[real_rows(name), "1.0"],
                    dataset_mixer_eval_list=[real_rows(name), "1.0"],
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
    steps = len([row for row in reference if "train/rm/loss" in row])
    assert 5 <= steps <= 8 if name.startswith("lists") else steps == 5
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
    if "margin" not in name:  # the evaluation's loss is Bradley-Terry's with the pairs' labels, without margins
        assert evaluations[-1] < evaluations[0]


@pytest.mark.parametrize("list_loss", ["plackett_luce", "best_of_k"])
def test_on_pairs_alone_the_losses_of_lists_are_that_of_pairs(runs, monkeypatch, list_loss):
    """The same steps, losses, norms and evaluations."""
    for name, how in (("plain pairs", {}), (list_loss, {"list_loss": list_loss})):
        monkeypatch.setitem(OBJECTIVES, name, how)
    of_pairs, of_lists = runs("plain pairs", "padded"), runs(list_loss, "padded")
    assert len(of_pairs) == len(of_lists)
    for row, own in zip(of_pairs, of_lists, strict=True):
        same = {key: value for key, value in row.items() if "/rm/" in key}
        assert {key: own[key] for key in own if "/rm/" in key} == pytest.approx(same, abs=1e-6, rel=1e-5)


def test_a_list_that_no_step_holds_is_refused_before_training_with_its_row(toy, real_rows, tmp_path):
    flags = {
        "model_name_or_path": str(toy / "model"),
        "output_dir": str(tmp_path / "out"),
        "list_loss": "plackett_luce",
    }
    flags |= {"dataset_mixer_list": [real_rows("lists"), "1.0"], "dataset_local_cache_dir": str(tmp_path / "cache")}
    with pytest.raises(
        UserError, match=r"lists.jsonl.* a list of \d pairs, which is trained in one step, and a step has 2"
    ):
        main(Args(**flags, max_token_length=1024, per_device_train_batch_size=2, gradient_accumulation_steps=1))


def test_the_first_loss_with_a_zero_head_is_xtuners_published_one(toy, tmp_path, run_forked):
    flags = toy_flags(
        toy, tmp_path / "out", score_init="zeros", loss_type="focal", penalty_type="log_barrier", total_episodes=8
    )
    done = run_forked(*flags)
    assert done.returncode == 0, done.stderr[-3000:]
    first = next(row for row in read_metrics(tmp_path / "out") if "train/rm/loss" in row)
    assert first["train/rm/loss"] == pytest.approx(0.628770, abs=1e-6)
    assert first["train/rm/loss_ranking"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["train/rm/grad_norm"] > 0


def test_continuing_from_a_saved_reward_model_starts_at_its_last_evaluation(toy, tmp_path, run_forked):
    """With a reward token: nothing about the rewards is lost in the folder."""
    first = run_forked(*toy_flags(toy, tmp_path / "first", reward_token="<|reward|>", total_episodes=40))
    assert first.returncode == 0, first.stderr[-3000:]
    again = toy_flags(toy, tmp_path / "second", model_name_or_path=tmp_path / "first", total_episodes=16)
    second = run_forked(*again)
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
        ({"list_loss": "listnet"}, "--list_loss listnet: must be one of pairs, plackett_luce, best_of_k"),
        (
            {"list_loss": "best_of_k", "loss_type": "focal"},
            "--loss_type focal is defined for pairs alone, not for --list_loss best_of_k",
        ),
        ({"list_loss": "plackett_luce", "label_smoothing": 0.1}, "--label_smoothing is defined for pairs alone"),
        ({"list_loss": "plackett_luce", "margin_loss": True}, "--margin_loss is defined for pairs alone"),
        ({"list_loss": "best_of_k", "keep_ties": True}, "--keep_ties is defined for pairs alone"),
        ({"list_loss": "best_of_k", "overlength": "truncate"}, "--overlength truncate cuts each pair by itself, and"),
    ],
)
def test_objectives_that_cannot_be_are_refused_by_name(wrong, sentence):
    with pytest.raises(UserError, match=sentence.replace("+", r"\+")):
        check_args(Args(**wrong))
