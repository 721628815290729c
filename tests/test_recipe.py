"""The recipe as a user runs it: bad input ends with one sentence, and good input learns."""

import json
import math
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, read_metrics, run_recipe, shared_data, toy_flags
from transformers import LlamaForCausalLM
from word_level import make

from open_rm.errors import UserError
from open_rm.flags import Args
from open_rm.reward_modeling import main

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def run(toy, tmp_path):
    """main(Args(...)) on the toy, with changes."""

    def call(**changes):
        options = dict(
            model_name_or_path=str(toy / "model"),
            dataset_mixer_list=[str(toy / "data"), "1.0"],
            dataset_local_cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / "out"),
            total_episodes=16,
        )
        return main(Args(**(options | changes)))

    return call


@pytest.fixture
def no_model(run, tmp_path, monkeypatch):
    """A run that loads the model raises what no test expects; it is shown here that a good one does."""
    loading = AssertionError("the model was loaded")

    def load(*args, **how):
        raise loading

    monkeypatch.setattr("open_rm.reward_modeling.load_reward_model", load)
    with pytest.raises(AssertionError, match="the model was loaded"):
        run(output_dir=str(tmp_path / "good"))


BAD_ROWS = {
    "malformed JSON": ('{"chosen": "a"', r"bad.jsonl:1: not valid JSON"),
    "missing column": ({"chosen": "a"}, r"bad.jsonl:1: no value for rejected"),
    "empty chosen": ({"chosen": "", "rejected": "b"}, r"bad.jsonl:1: chosen is empty"),
    "identical sides": ({"chosen": "a", "rejected": "a"}, r"bad.jsonl:1: .*identical"),
    "wrong roles": (
        {"chosen": [{"role": "bot", "content": "a"}], "rejected": [{"role": "gpt", "content": "b"}]},
        r"bad.jsonl:1: chosen has a message of role 'bot'",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_stops_the_run_before_the_model_is_loaded(run, no_model, write_rows, case):
    row, sentence = BAD_ROWS[case]
    with pytest.raises(UserError, match=sentence):
        run(dataset_mixer_list=[str(write_rows([row], "bad.jsonl")), "1.0"])


def test_no_rows_left_is_said_before_the_model_is_loaded(run, no_model):
    with pytest.raises(UserError, match="no pairs are left "):
        run(max_token_length=3, max_prompt_token_length=3)


def test_unknown_split_names_those_there_are(run):
    with pytest.raises(UserError, match="no split 'dev'; it has test, train"):
        run(dataset_mixer_list_splits=["dev"])


def test_messages_without_a_chat_template_name_the_templates(run, tmp_path):
    make(adds_bos=False).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="--chat_template_name.*chatml, encoder, llama3, simple_chat"):
        run(tokenizer_name=str(tmp_path / "tokenizer"))


def test_a_tokenizer_without_eos_is_refused(run, tmp_path):
    make(adds_bos=False, eos_token=None).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no eos token"):
        run(tokenizer_name=str(tmp_path / "tokenizer"))


def test_an_output_dir_that_cannot_be_written_is_refused_first(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir .*cannot be written"):
        run(output_dir=str(tmp_path / "file" / "out"))


def test_a_model_is_never_overwritten(run, toy):
    with pytest.raises(UserError, match="already holds a model"):
        run(output_dir=str(toy / "model"))


def test_the_record_of_an_interrupted_run_is_never_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="already holds the record of a run"):
        run()
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_refused_run_leaves_no_folder_behind(run, tmp_path):
    with pytest.raises(UserError):
        run(dataset_mixer_list_splits=["dev"])
    with pytest.raises(UserError):
        run(max_token_length=3, max_prompt_token_length=3)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run_before_the_step(run, toy, tmp_path):
    model = LlamaForCausalLM.from_pretrained(toy / "model")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.inf
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"diverged at step 1, after episode 0: loss nan.*--learning_rate"):
        run(model_name_or_path=str(tmp_path / "broken"), tokenizer_name=str(toy / "model"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_is_one_sentence_on_stderr_with_exit_status_1(toy, tmp_path, write_rows, processes):
    bad = write_rows(["{"], "bad.jsonl")
    flags = toy_flags(toy, tmp_path / "out", dataset_mixer_list=[bad, "1.0"])
    done = run_recipe(*flags, processes=processes)
    assert done.returncode == 1
    assert done.stderr.count(f"error: {bad}:1: not valid JSON") == 1
    assert "open_rm/" not in done.stderr.replace(str(bad), "")  # torchrun shows its own traceback, the recipe none


@pytest.mark.parametrize("flags", [["--unknown_flag", "3"], ["--warm_up_steps", "2", "--warmup_ratio", "0.1"]])
def test_a_bad_command_line_ends_at_once(flags):
    done = run_recipe(*flags)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_cache_dataset_only_tokenizes_and_stops(run, tmp_path, capfd):
    assert run(cache_dataset_only=True) == {}
    assert "stopping (--cache_dataset_only)" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


def with_margins(toy, margins):
    lines = (toy / "data" / "train.jsonl").read_text().splitlines()[: len(margins)]
    return [json.loads(line) | {"margin": margin} for line, margin in zip(lines, margins, strict=True)]


def test_margin_loss_is_the_ranking_loss_of_rewards_less_the_margin(run, toy, write_rows, tmp_path):
    """One pair a step, all of margin 1.5, so that the logged means are of that pair."""
    data = [str(write_rows(with_margins(toy, [1.5] * 8))), "1.0"]
    one = {"dataset_mixer_list": data, "gradient_accumulation_steps": 1, "total_episodes": 8, "learning_rate": 1e-3}
    run(margin_loss=True, **one)
    steps = [line for line in read_metrics(tmp_path / "out") if "train/rm/loss" in line]
    assert len(steps) == 8
    for line in steps:
        expected = math.log1p(math.exp(1.5 - line["train/rm/reward_margin"]))
        assert line["train/rm/loss"] == pytest.approx(expected, rel=1e-5)


def test_margin_loss_without_a_margin_names_the_row_and_margins_without_it_are_told(run, toy, write_rows, capfd):
    data = [str(write_rows(with_margins(toy, [1.0, None, 2.0]))), "1.0"]
    with pytest.raises(UserError, match=r"rows.jsonl:2: no margin, and --margin_loss needs one for every pair"):
        run(margin_loss=True, dataset_mixer_list=data)
    run(dataset_mixer_list=data, total_episodes=3)
    assert "the data has margins; the loss takes them with --margin_loss" in capfd.readouterr().out


def test_strict_stops_before_the_model_is_loaded_where_the_data_has_findings(run, no_model, toy, write_rows):
    rows = with_margins(toy, [1.0, 2.0])
    with pytest.raises(UserError, match="--strict: .* in the data, the first: .*duplicate"):
        run(strict=True, dataset_mixer_list=[str(write_rows([rows[0], rows[0], rows[1]])), "1.0"])


def test_use_slow_tokenizer_is_answered_by_one_line(run, capfd):
    run(cache_dataset_only=True, use_slow_tokenizer=True)
    assert "--use_slow_tokenizer has no effect: transformers 5 has no slow tokenizers" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("hh_harmless", {"max_token_length": 512, "max_prompt_token_length": 512}),
        ("alpaca_eval", {"max_token_length": 1024, "max_prompt_token_length": 512}),
    ],
)
def test_real_data_is_trained_on_evaluated_saved_and_reloaded(toy, tmp_path, name, flags, run_forked):
    folder = shared_data(name)
    done = run_forked(
        *toy_flags(
            toy,
            tmp_path / "out",
            dataset_mixer_list=[folder, "64"],
            dataset_mixer_eval_list=[folder, "24"],
            total_episodes=32,
            **flags,
        )
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check: 8 rewards" in done.stdout
    assert "eval/rm/accuracy" in json.dumps(read_metrics(tmp_path / "out")[-1])


def test_debug_recipe_reaches_90_percent_on_held_out_pairs(tmp_path):
    environment = {**os.environ, "TOY": str(tmp_path / "toy"), "PYTHON": sys.executable}
    command = [
        "bash",
        str(REPOSITORY / "scripts/train/debug/reward_modeling.sh"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    command += ["--dataset_local_cache_dir", str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = [row for row in read_metrics(tmp_path / "out") if "eval/rm/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 62, 125, 188, 250, 312, 375]
    assert evaluations[-1]["eval/rm/accuracy"] >= 0.9
    assert (tmp_path / "out" / "curves.png").stat().st_size > 20_000
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000
