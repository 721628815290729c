"""The flags: published command lines, YAML underneath, nearest names, and no flag that nobody reads."""

import ast
import dataclasses
import re
import shlex

import pytest
from conftest import REPOSITORY, in_a_process, run_recipe

from open_rm import flags as flag_module
from open_rm.checks import check_args
from open_rm.command_line import parse
from open_rm.errors import UserError
from open_rm.flags import Args
from open_rm.model.recompute import every_how_many

PYTHIA = """
    --dataset_mixer_list trl-internal-testing/sentiment-trl-style 400 --model_name_or_path EleutherAI/pythia-14m
    --tokenizer_name EleutherAI/pythia-14m --learning_rate 3e-6 --per_device_train_batch_size 1
    --per_device_eval_batch_size 1 --gradient_accumulation_steps 32 --max_token_length 1024
    --max_prompt_token_length 1024 --num_train_epochs 1 --push_to_hub
"""
TULU = """
    --exp_name tulu3_8b_rm --model_name_or_path allenai/Llama-3.1-Tulu-3-8B-SFT --model_revision main
    --tokenizer_name allenai/Llama-3.1-Tulu-3-8B-SFT --tokenizer_revision main --use_slow_tokenizer
    --dataset_mixer_list allenai/llama-3.1-tulu-3-8b-preference-mixture 1.0 --max_token_length 4096
    --max_prompt_token_length 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 4
    --learning_rate 3e-6 --lr_scheduler_type linear --num_train_epochs 1 --gradient_checkpointing --with_tracking
    --seed 8
"""


def test_published_debug_command_line_parses_unchanged():
    args = parse(Args, shlex.split(PYTHIA))
    check_args(args)
    assert args == Args(
        dataset_mixer_list=["trl-internal-testing/sentiment-trl-style", "400"],
        model_name_or_path="EleutherAI/pythia-14m",
        tokenizer_name="EleutherAI/pythia-14m",
        learning_rate=3e-6,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=32,
        max_token_length=1024,
        max_prompt_token_length=1024,
        num_train_epochs=1,
        push_to_hub=True,
    )


def test_published_tulu_command_line_parses_unchanged():
    args = parse(Args, shlex.split(TULU))
    check_args(args)
    assert (args.exp_name, args.seed, args.use_slow_tokenizer, args.gradient_checkpointing) == (
        "tulu3_8b_rm",
        8,
        True,
        "True",
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 4)
    assert args.with_tracking and args.model_revision == args.tokenizer_revision == "main"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--learnin_rate 3e-6", "unknown flag --learnin_rate; did you mean learning_rate?"),
        ("--lora_rank=4", "unknown flag --lora_rank"),
        ("--per-device-train-batch-sice 4", "did you mean per_device_train_batch_size?"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_name(flags, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        parse(Args, shlex.split(flags))


def test_yaml_lies_under_the_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 3e-6\nseed: 4\ndataset_mixer_list: [a/b, 0.5]\npush_to_hub: false\nwith_tracking: true\n"
    )
    args = parse(Args, ["--seed", "5", "--config", str(path), "--no_with_tracking"])
    assert args.learning_rate == 3e-6  # YAML alone reads 3e-6 as text
    assert (args.seed, args.dataset_mixer_list, args.with_tracking) == (5, ["a/b", "0.5"], False)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("learning_rat: 1", r"learning_rat; did you mean learning_rate\?"),
        ("- 1", "must hold flag names"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_yaml_gets_one_sentence(tmp_path, content, sentence):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=sentence):
        parse(Args, ["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(UserError, match="cannot be read"):
        parse(Args, [f"--config={tmp_path}/none.yaml"])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("--push_to_hub", True),
        ("--push_to_hub True", True),
        ("--push_to_hub false", False),
        ("--no_push_to_hub", False),
    ],
)
def test_booleans_may_be_written_as_other_trainers_do(written, value):
    assert parse(Args, [*shlex.split(written), "--seed", "3"]).push_to_hub is value


def test_dashes_and_underscores_are_the_same():
    assert parse(Args, ["--learning-rate", "0.5", "--no-hf-repo-private"]) == Args(
        learning_rate=0.5, hf_repo_private=False
    )


CONTRADICTIONS = [
    ("--warm_up_steps 3 --warmup_ratio 0.1", "--warm_up_steps and --warmup_ratio"),
    ("--lr_scheduler_type constant --warm_up_steps 3", "--lr_scheduler_type constant has no warm-up"),
    (
        "--max_token_length 10 --max_prompt_token_length 20",
        "--max_prompt_token_length 20 is above --max_token_length 10",
    ),
    ("--num_evals 3 --eval_steps 4 --dataset_mixer_eval_list a/b 1.0", "--num_evals and --eval_steps"),
    ("--eval_steps 4", "--eval_steps needs held-out data"),
    ("--num_evals 4", "--num_evals needs held-out data"),
    ("--total_episodes 10 --num_train_epochs 2", "--total_episodes and --num_train_epochs"),
    ("--seed 99999999999999999999999", "must be from 0 to below 2"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-8", "polynomial decay ends at 1e-7"),
    ("--batching packed --attn_implementation eager", "--attn_implementation chooses attention for padded rows"),
    ("--hf_repo_id me/it", "do nothing without --push_to_hub"),
    ("--push_to_hub --hf_entity me --hf_repo_id you/it", "both name the owner"),
    ("--push_to_hub --hf_repo_id a/b/c", "--hf_repo_id a/b/c: a repository of the Hub is NAME or OWNER/NAME"),
    ("--wandb_entity me", "--wandb_entity does nothing without --with_tracking"),
    ("--push_to_hub --cache_dataset_only", "--cache_dataset_only trains no model"),
    ("--dataset_mixer_list", "--dataset_mixer_list is empty"),
    ("--find_batch_size --max_tokens_per_micro_batch 512", "--find_batch_size looks for --max_tokens_per_micro_batch"),
    ("--world_size 64", "--world_size is what --dry_run plans for"),
    ("--device_memory_gib 80", "--device_memory_gib is what --dry_run plans for"),
    ("--tokens_per_second 1000", "--tokens_per_second is what --dry_run plans for"),
    ("--dry_run --cache_dataset_only", "--dry_run describes a training"),
    ("--dry_run --device_memory_gib 0", "--device_memory_gib 0.0: must be above 0"),
    ("--sequence_parallel_size 0", "--sequence_parallel_size 0: must be at least 1"),
    ("--learning_rate 0", "--learning_rate 0.0: must be above 0, and finite"),
    ("--learning_rate nan", "--learning_rate nan: must be above 0, and finite"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be at least 1"),
    ("--max_grad_norm -1", "--max_grad_norm -1.0: must be at least 0"),
    ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be from 0 to below 1"),
    ("--deepspeed none.json", "--deepspeed none.json: cannot be read"),
    ("--chat_template_name lama3", "--chat_template_name lama3: neither a file nor a known name"),
]


@pytest.mark.parametrize(("flags", "sentence"), CONTRADICTIONS, ids=[flags for flags, _ in CONTRADICTIONS])
def test_values_that_cannot_work_are_refused_before_anything_is_read(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        check_args(parse(Args, shlex.split(flags)))


def test_values_given_from_python_are_checked_like_flags():
    with pytest.raises(UserError, match="--dtype float16: must be one of auto, float32, bfloat16"):
        check_args(Args(dtype="float16"))


def test_a_config_that_is_no_text_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"exp_name: caf\xe9")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        parse(Args, ["--config", str(tmp_path / "latin.yaml")])


# ---------------------------------------------------------------- groups

# OpeningFlags are those of scoring and serving; ReadingFlags are a part of DataFlags.
GROUPS = {name: group for name, group in vars(flag_module).items() if name.endswith("Flags") and name != "OpeningFlags"}
BASES = {group for name, group in GROUPS.items() if name != "ReadingFlags"}


def own_names(group) -> list[str]:
    inherited = {
        field.name
        for base in group.__bases__
        if base is not object and group is not Args
        for field in dataclasses.fields(base)
    }
    return [field.name for field in dataclasses.fields(group) if field.name not in inherited]


def test_the_groups_have_104_flags_together_and_share_none():
    assert len(BASES) == 13 and set(Args.__bases__) == BASES
    names = [name for group in GROUPS.values() for name in own_names(group)]
    assert len(names) == len(set(names)) == 104
    assert set(own_names(Args)) == set(names)


def test_arguments_are_read_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Args().seed = 3


def sentences() -> list[str]:
    """Those under the fields of the groups."""
    tree = ast.parse((REPOSITORY / "open_rm/flags.py").read_text())
    groups = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in GROUPS]
    return [node.value.value for body in groups for node in body[1:] if isinstance(node, ast.Expr)]


def test_help_shows_a_sentence_for_every_flag():
    done = run_recipe("--help", env={"COLUMNS": "200"})
    assert done.returncode == 0
    assert len(sentences()) == len(dataclasses.fields(Args))
    shown = " ".join(done.stdout.replace("│", " ").split())
    for sentence in sentences():
        assert " ".join(sentence.split())[:40] in shown, sentence


# ---------------------------------------------------------------- answered at once

AT_ONCE = """
import contextlib, io, json, runpy, sys
module, sys.argv = sys.argv[1], sys.argv[1:]
said = io.StringIO()
try:
    with contextlib.redirect_stdout(said):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    end = "no end"
except SystemExit as exit:
    end = exit.code
slow = [name for name in ("torch", "transformers", "datasets", "deepspeed") if name in sys.modules]
print(json.dumps({"end": end, "said": said.getvalue(), "slow": slow}))
"""
RECIPE, LOOK = "open_rm.reward_modeling", "open_rm.inspection"


@pytest.mark.parametrize("module", [RECIPE, LOOK])
def test_help_is_shown_before_anything_slow_is_imported(module):
    answer = in_a_process(AT_ONCE, module, "--help")
    assert (answer["end"], answer["slow"]) == (0, [])
    assert f"usage: python -m {module} " in answer["said"] and "--learning_rate" in answer["said"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--learnin_rate 3e-6", "error: unknown flag --learnin_rate; did you mean learning_rate?"),
        ("--warm_up_steps 2 --warmup_ratio 0.1", "error: --warm_up_steps and --warmup_ratio both set the warm-up; "),
        ("--penalty_bound 3", "error: --penalty_bound does nothing without --penalty_type log_barrier; "),
        ("--penalty_type log_barrier --penalty_bound 0", "error: --penalty_bound 0.0: must be above 0.001, and finite"),
        ("--column_map chosen", "error: --column_map chosen: write our column, an equals sign and the file's column"),
        ("--dataset_mixer_list my/data much", "error: --dataset_mixer_list: "),
        ("--chat_template_name lama3", "error: --chat_template_name lama3: neither a file nor a known name"),
        ("--deepspeed none.json", "error: --deepspeed none.json: cannot be read"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_slow_is_imported(flags, sentence):
    answer = in_a_process(AT_ONCE, RECIPE, *shlex.split(flags))
    assert answer["end"].startswith(sentence), answer["end"]
    assert (answer["said"], answer["slow"]) == ("", [])


def test_the_look_at_the_data_refuses_a_wrong_command_line_as_the_recipe_does():
    answer = in_a_process(AT_ONCE, LOOK, "--warm_up_steps", "2", "--warmup_ratio", "0.1")
    assert answer["end"].startswith("error: --warm_up_steps and --warmup_ratio") and answer["slow"] == []


def test_what_tells_slow_from_quick_would_notice_a_slow_one():
    answer = in_a_process(AT_ONCE, "open_rm.ranks")
    assert "torch" in answer["slow"]


@pytest.mark.parametrize("written", ["no", "0", "off", ""])
def test_a_boolean_with_another_value_than_true_or_false_is_refused_and_not_taken_as_true(written):
    with pytest.raises(UserError, match="--trust_remote_code .*: write --trust_remote_code or --no_trust_remote_code"):
        parse(Args, [f"--trust_remote_code={written}"])
    assert parse(Args, ["--trust_remote_code=True"]).trust_remote_code
    assert not parse(Args, ["--trust_remote_code=false"]).trust_remote_code


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_peft": "False"}, "--use_peft 'False': must be True or False"),
        ({"learning_rate": None}, "--learning_rate None: must be above 0, and finite"),
        ({"learning_rate": "1e-3"}, "--learning_rate 1e-3: must be above 0, and finite"),
        ({"total_episodes": 0}, "--total_episodes 0: must be at least 1"),
    ],
)
def test_a_value_of_another_type_from_python_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_args(Args(**changes))


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("", None),
        ("--gradient_checkpointing", 1),
        ("--gradient_checkpointing --seed 3", 1),
        ("--no_gradient_checkpointing", 0),
        ("--gradient_checkpointing True", 1),
        ("--gradient_checkpointing=false", 0),
        ("--gradient_checkpointing on", 1),
        ("--gradient_checkpointing off", 0),
        ("--gradient_checkpointing auto", None),
        ("--gradient_checkpointing 3", 3),
    ],
)
def test_gradient_checkpointing_takes_words_numbers_and_the_old_switch(given, means):
    args = parse(Args, shlex.split(given))
    check_args(args)
    assert every_how_many(args.gradient_checkpointing) == means


@pytest.mark.parametrize("word", ["0", "-1", "some", "1.5"])
def test_another_word_for_gradient_checkpointing_is_refused(word):
    with pytest.raises(UserError, match="auto, on, off, or every how many layers"):
        check_args(Args(gradient_checkpointing=word))


@pytest.mark.parametrize(("value", "means"), [(True, 1), (False, 0), (2, 2), ("auto", None)])
def test_gradient_checkpointing_from_python(value, means):
    check_args(Args(gradient_checkpointing=value))
    assert every_how_many(value) == means
