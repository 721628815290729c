"""Attributes in training: their loss by its definition, and whole runs on answers that have five of them."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, flags_of_a_long_run, load_model, read_metrics, read_pairs
from killing import checkpoint_names, same_run
from transformers import AutoModelForSequenceClassification, BertConfig

from open_rm.batching.targets import Targets
from open_rm.checks import check_args
from open_rm.data.tokenizer import load_tokenizer
from open_rm.dry_run import sizes
from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, Args, ModelFlags, ObjectiveFlags
from open_rm.reliability import comparing
from open_rm.reward_modeling import main
from open_rm.training import footprint
from open_rm.training.losses import attribute_loss, loss_terms

NAN = math.nan
FIVE = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
WEIGHTS = [0.3, 0.74, 0.46, 0.47, -0.33]
# Float32 sums in another order, nine AdamW steps apart.
TOLERANCE = 1e-5
SLOWER = "import open_rm.training.engine as e, time; step = e.Engine.step; e.Engine.step = lambda *a, **k: (time.sleep(0.2), step(*a, **k))[1]"


# ---------------------------------------------------------------- the loss


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """[6, 2, 3] predicted and known: of the third pair one side alone, of the last nothing."""
    predicted, known = torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    known[1, 0, 2] = known[2, 1] = known[5] = NAN
    return predicted, known


def test_it_is_the_mean_squared_error_of_what_is_known_and_so_are_its_gradients():
    predicted, known = numbers()
    predicted.requires_grad_()
    losses = attribute_loss(predicted, known)
    losses.sum().backward()
    expected, gradient = [], np.zeros((6, 2, 3))
    for pair in range(6):
        there = [(side, k) for side in range(2) for k in range(3) if not math.isnan(known[pair, side, k])]
        apart = {place: (predicted[pair][place] - known[pair][place]).item() for place in there}
        expected.append(sum(one**2 for one in apart.values()) / max(1, len(there)))
        for place, one in apart.items():
            gradient[pair][place] = 2 * one / len(there)
    assert losses.dtype == torch.float32 and losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[5] == 0 and min(expected[:5]) > 0
    assert predicted.grad.flatten().tolist() == pytest.approx(gradient.flatten().tolist(), abs=1e-6)


def test_where_all_are_known_it_is_the_mean_of_both_answers_losses():
    predicted, known = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    of_answers = torch.nn.functional.mse_loss(predicted, known, reduction="none").mean(-1)
    torch.testing.assert_close(attribute_loss(predicted, known), of_answers.mean(-1))


def test_no_pairs_have_no_loss_and_other_shapes_are_refused():
    predicted = torch.zeros(0, 2, 3, requires_grad=True)
    attribute_loss(predicted, torch.zeros(0, 2, 3)).sum().backward()
    assert predicted.grad.shape == (0, 2, 3)
    with pytest.raises(ValueError, match="differ in shape"):
        attribute_loss(torch.zeros(4, 2, 3), torch.zeros(4, 2, 1))


def test_it_is_one_more_term_and_the_others_are_of_the_rewards():
    predicted, known = numbers()
    rewards = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    flags = ObjectiveFlags(attribute_coefficient=0.25, penalty_type="L2", center_rewards_coefficient=0.1)
    plain = loss_terms(*rewards, Targets(), flags)
    terms = loss_terms(*rewards, Targets(attributes=known), flags, predicted)
    torch.testing.assert_close(terms.pop("attributes"), 0.25 * attribute_loss(predicted, known))
    assert list(terms) == list(plain) and all(torch.equal(terms[name], plain[name]) for name in plain)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def answers(toy, tmp_path_factory):
    """A folder with 96 rows as HelpSteer2's, two answers to a prompt side by side."""
    folder, drawn, rows = tmp_path_factory.mktemp("answers"), np.random.default_rng(0), []
    for line in (toy / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:48]:
        pair = json.loads(line)
        for side, helpfulness in (("rejected", 1), ("chosen", 4)):
            prompt, text = (message["content"] for message in pair["prompt"] + pair[side])
            row = {
                "prompt": prompt,
                "response": text,
                "helpfulness": helpfulness,
                "correctness": int(drawn.integers(0, 5)),
            }
            row |= {"coherence": 4 - text.count("."), "complexity": None if drawn.random() < 0.3 else text.count(".")}
            rows.append(row | {"verbosity": min(4, len(text.split()) // 8)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def flags_with(toy, answers):
    """Flags of a run of nine steps of all 48 pairs, which writes a checkpoint every other step."""

    def flags(output_dir, processes: int = 1, **overrides) -> list[str]:
        own = {
            "dataset_mixer_list": [answers / "train.jsonl", "1.0"],
            "dataset_mixer_eval_list": [toy / "data" / "test.jsonl", "1.0"],
            "attributes": FIVE,
            "attribute_weights": WEIGHTS,
            "per_device_train_batch_size": 48 // processes,
            "total_episodes": 432,
            "learning_rate": "1e-3",
            "warm_up_steps": 1,
            "checkpointing_steps": 2,
            "batching": "padded",
        }
        return flags_of_a_long_run(toy, answers / "cache", output_dir, processes, **own | overrides)

    return flags


@pytest.fixture(scope="module")
def whole(nursery, flags_with, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    nursery.start(flags_with(folder), folder.with_name("log")).finish()
    return folder


def test_the_log_has_their_loss_which_falls_and_run_json_and_card_their_means(whole, answers):
    rows = [row for row in read_metrics(whole) if "train/rm/loss" in row]
    losses = [row["train/rm/loss_attributes"] for row in rows]
    for row in rows:
        both = row["train/rm/loss_ranking"] + row["train/rm/loss_attributes"]
        assert row["train/rm/loss"] == pytest.approx(both, abs=1e-5)
    table = [json.loads(line) for line in (answers / "train.jsonl").read_text().splitlines()]
    columns = np.array([[NAN if row[name] is None else row[name] for name in FIVE] for row in table])
    assert np.isnan(columns).any()
    apart = (columns - np.nanmean(columns, 0)).reshape(48, 2 * 5)  # their heads begin with zeros
    assert losses[0] == pytest.approx(np.nanmean(apart**2, 1).mean(), abs=1e-5)
    assert len(losses) == 9 and losses[-1] < 0.95 * losses[0]
    facts = json.loads((whole / "run.json").read_text())
    assert facts["attribute_means"] == pytest.approx(np.nanmean(columns, 0).tolist(), abs=1e-6)  # each in one pair
    assert "helpfulness (weight 0.3, mean 2.5 in the training data), correctness" in (whole / "README.md").read_text()


@pytest.mark.parametrize(
    ("processes", "how"),
    [
        (1, {"batching": "packed", "max_tokens_per_micro_batch": 150}),
        (2, {"batching": "shared_prefix", "deepspeed": "configs/ds/zero2.json", "find_batch_size": True}),
    ],
    ids=["packed, cut small", "shared_prefix, two ranks, tried"],
)
def test_layouts_micro_batches_and_ranks_give_the_same_run(nursery, flags_with, tmp_path, whole, processes, how):
    folder = tmp_path / "run"
    nursery.start(flags_with(folder, processes, **how), tmp_path / "log", processes=processes).finish()
    rows, others = read_metrics(whole), read_metrics(folder)
    for row, own in zip(rows, others, strict=True):
        same = {key for key in row if "/rm/" in key}
        assert same == {key for key in own if "/rm/" in key}
        for key in same:
            assert own[key] == pytest.approx(row[key], abs=TOLERANCE, rel=1e-4), key


def test_a_client_without_our_code_gets_the_rewards_of_the_last_evaluation(whole, toy, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(whole).eval()
    assert model.config.num_labels == 1 and model.score.weight.shape == (1, 128)
    tokenizer = load_tokenizer(str(whole))
    data = read_pairs([toy / "data" / "test.jsonl", "1.0"], tokenizer, dataset_local_cache_dir=str(tmp_path))
    with torch.no_grad():
        rewards = np.array(
            [
                [model(torch.as_tensor(np.array(side))[None].long()).logits.item() for side in pair]
                for pair in data.pairs(range(60))
            ]
        )
    last = [row for row in read_metrics(whole) if "eval/rm/loss" in row][-1]
    assert rewards.mean(0).tolist() == pytest.approx(
        [last["eval/rm/chosen_rewards"], last["eval/rm/rejected_rewards"]], abs=TOLERANCE
    )
    assert last["eval/rm/accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()


def test_the_export_of_a_checkpoint_says_the_same_of_them(whole, tmp_path):
    command = [sys.executable, "-m", "open_rm.export", str(whole), str(tmp_path / "exported")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    cards = [(folder / "README.md").read_text() for folder in (whole, tmp_path / "exported")]
    said = [[line for line in card.splitlines() if "attributes of an answer" in line] for card in cards]
    assert len(said[0]) == 1 and "mean 2.5 in the training data" in said[0][0] and said[0] == said[1]


def test_killed_and_started_again_it_ends_as_an_undisturbed_run(nursery, flags_with, tmp_path, whole):
    folder = tmp_path / "run"
    started = nursery.start(flags_with(folder), tmp_path / "log", env={"TEST_PATCH": SLOWER})
    started.wait_for(lambda: len(checkpoint_names(folder)) == 2, "two checkpoints")
    started.kill()
    output = nursery.start(flags_with(folder), tmp_path / "again").finish()
    assert "going on after step" in output and "bit for bit" in output
    same_run(whole, folder)


def test_a_run_from_the_merged_folder_begins_with_its_rewards(nursery, flags_with, tmp_path, whole):
    flags = flags_with(tmp_path / "run", model_name_or_path=whole, total_episodes=96, attribute_weights=WEIGHTS[::-1])
    output = nursery.start(flags, tmp_path / "log").finish()
    assert "the checkpoint already is a reward model: its score head is kept" in output
    last = [row for row in read_metrics(whole) if "eval/rm/loss" in row][-1]
    begin = next(row for row in read_metrics(tmp_path / "run") if "eval/rm/loss" in row)
    names = [name for name in last if name.startswith("eval/rm/")]
    assert {name: begin[name] for name in names} == {name: last[name] for name in names}  # bit for bit


def test_a_dry_run_counts_their_rows_among_what_is_trained_and_not_in_what_is_saved(toy, tokenizer):
    plain, known = (
        sizes.planned(flags, tokenizer, adapter=AdapterFlags(), dtype=torch.float32, on_gpu=False)
        for flags in (
            ModelFlags(model_name_or_path=str(toy / "model"), attribute_weights=weights) for weights in ([], WEIGHTS)
        )
    )
    model = load_model(toy / "model", tokenizer, attribute_weights=WEIGHTS)
    assert known.sizes == footprint.sizes_of(model) and known.sizes.trained == plain.sizes.trained + 5 * 128
    assert known.saved == plain.saved


# ---------------------------------------------------------------- refusals


def test_an_encoder_is_refused_before_any_data_is_read(tmp_path, write_rows):
    BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    unreadable = str(write_rows(["{"]))
    known = {"attributes": FIVE, "attribute_weights": WEIGHTS, "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="--attributes: .* is an encoder"):
        main(Args(model_name_or_path=str(tmp_path), dataset_mixer_list=[unreadable, "1.0"], **known))


@pytest.mark.parametrize(
    ("asked", "weights", "says"),
    [
        (["a", "b"], [1.0], "--attributes names 2 and --attribute_weights has 1; pass one weight for each"),
        (["a", "a=b"], [1.0, 2.0], "--attributes names a twice"),
        (["a"], [NAN], "--attribute_weights nan: must be a number between -1e[+]06 and 1e[+]06"),
        (["a"], [1e39], "--attribute_weights 1e[+]39: must be a number between"),
        ([], [1.0], "--attribute_weights does nothing without --attributes; add or remove it"),
        (["a"], 1.0, "--attribute_weights 1.0: must be a list of numbers"),
        (["a"], ["1"], r"--attribute_weights \['1'\]: must be a list of numbers"),
        ("a", [1.0], "--attributes 'a': must be a list of texts"),
        (["=x"], [1.0], "--attributes =x: write a name"),
        (["a="], [1.0], "--attributes a=: write a name"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anything_is_read(asked, weights, says):
    with pytest.raises(UserError, match=says):
        check_args(Args(attributes=asked, attribute_weights=weights))


def test_a_coefficient_of_no_attributes_is_refused():
    with pytest.raises(UserError, match="--attribute_coefficient does nothing without --attributes; add or remove it"):
        check_args(Args(attribute_coefficient=2.0))


@pytest.mark.parametrize(
    "other",
    [{"attribute_weights": [1.0, 3.0]}, {"attributes": ["a", "c"]}, {"attribute_coefficient": 2.0}],
    ids=lambda other: next(iter(other)),
)
def test_a_run_cannot_be_gone_on_with_by_other_ones(other):
    known = {"attributes": ["a", "b"], "attribute_weights": [1.0, 2.0]}
    begun, now = (comparing.plain(Args(**known | changed)) for changed in ({}, other))
    with pytest.raises(UserError, match=f"would train another model: --{next(iter(other))}"):
        comparing.changed(begun, now, where="the run")
    assert comparing.changed(begun, begun, where="the run") == []
