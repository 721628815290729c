"""The flags: published command lines, YAML underneath, nearest names, and no flag that nobody reads."""

import ast
import dataclasses
import itertools
import shlex

import pytest
from conftest import REPOSITORY, run_recipe

from open_rm.arguments import Args, check_args
from open_rm.command_line import parse
from open_rm.errors import UserError

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
        True,
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
    ("--seed 99999999999999999999999", "must be below"),
    ("--lr_scheduler_type polynomial --learning_rate 1e-8", "polynomial decay ends at 1e-7"),
    ("--batching packed --attn_implementation eager", "--attn_implementation chooses attention for padded rows"),
    ("--hf_repo_id me/it", "do nothing without --push_to_hub"),
    ("--push_to_hub --hf_entity me --hf_repo_id you/it", "both name the owner"),
    ("--wandb_entity me", "--wandb_entity does nothing without --with_tracking"),
    ("--push_to_hub --cache_dataset_only", "--cache_dataset_only trains no model"),
    ("--dataset_mixer_list", "--dataset_mixer_list is empty"),
    ("--learning_rate 0", "--learning_rate 0.0: must be above 0"),
    ("--learning_rate nan", "--learning_rate nan"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be at least 1"),
    ("--max_grad_norm -1", "--max_grad_norm -1.0: must be at least 0"),
    ("--warmup_ratio 1.5", "--warmup_ratio 1.5"),
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


def test_every_flag_is_read_by_the_recipe():
    trees = [ast.parse((REPOSITORY / f"open_rm/{name}.py").read_text()) for name in ("reward_modeling", "adapters")]
    read = {
        node.attr
        for node in itertools.chain(*map(ast.walk, trees))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert {field.name for field in dataclasses.fields(Args)} - read == set()


def test_arguments_are_read_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Args().seed = 3


def test_help_shows_a_sentence_for_every_flag():
    done = run_recipe("--help", env={"COLUMNS": "200"})
    assert done.returncode == 0
    source = (REPOSITORY / "open_rm/arguments.py").read_text()
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    sentences = [node.value.value for node in body[1:] if isinstance(node, ast.Expr)]
    assert len(sentences) == len(dataclasses.fields(Args))
    shown = " ".join(done.stdout.replace("│", " ").split())
    for sentence in sentences:
        assert " ".join(sentence.split())[:40] in shown, sentence
