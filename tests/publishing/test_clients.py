"""Clients of a saved reward model: whoever opens the folder gets the rewards it was trained to give.

Covered: transformers' pipeline, TRL's GRPOTrainer, the model card's snippet, and what is in the files. Inference
servers are not: they need a GPU build, and read the same files.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import in_a_process, load_model, toy_flags
from pyarrow import parquet
from safetensors import safe_open
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from open_rm.data.encoding import encode
from open_rm.data.tokenizer import ending, load_tokenizer
from open_rm.errors import UserError
from open_rm.evaluation.held_out import Probe
from open_rm.model.contract import Contract
from open_rm.publishing.proof import check_reload, rehearse
from open_rm.publishing.saving import save_reward_model

# float32 on both sides and the same weights: only the order of sums differs, with the padding.
TOLERANCE = 1e-5
# A mean of rewards of a few units, logged in float32 after passing through padded batches.
GRPO_TOLERANCE = 1e-4
# What a client opens; the rest of the folder is for people.
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory, run_forked) -> Path:
    """A reward model as the recipe leaves it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    done = run_forked(*toy_flags(toy, out, total_episodes=80, dtype="float32"))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def conversations(toy) -> list[list[dict]]:
    rows = [json.loads(line) for line in (toy / "data" / "test.jsonl").read_text().splitlines()[:6]]
    return [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]


def plain_rewards(folder: Path, conversations: list[list[dict]]) -> list[float]:
    """The reference: the template's own ids, one conversation at a time, one forward without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rewards = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            rewards.append(model(**ids).logits[0, 0].item())
    return rewards


def rendered(folder: Path, conversations: list[list[dict]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]


def contract(tokenizer, *, chat: bool) -> Contract:
    """Of a whole model in float32."""
    return Contract(chat=chat, ending=ending(tokenizer))


# ---------------------------------------------------------------- clients


def test_a_pipeline_gives_the_raw_reward_unasked(folder, conversations):
    score = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    results = [score(text) for text in rendered(folder, conversations)]
    assert {result["label"] for [result] in results} == {"reward"}
    # No function_to_apply is passed: by default one label would mean sigmoid(reward).
    rewards = plain_rewards(folder, conversations)
    assert [result["score"] for [result] in results] == pytest.approx(rewards, rel=0, abs=TOLERANCE)
    assert min(rewards) < max(rewards) - 100 * TOLERANCE  # a constant would have been equal too


def test_a_pipeline_gives_the_same_rewards_in_a_padded_batch(folder, conversations):
    texts = rendered(folder, conversations)
    score = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    assert len({len(ids) for ids in score.tokenizer(texts)["input_ids"]}) > 3  # so there is padding
    results = score(texts, batch_size=len(texts))
    rewards = plain_rewards(folder, conversations)
    assert [result["score"] for result in results] == pytest.approx(rewards, rel=0, abs=TOLERANCE)


GRPO = """
import json, sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

policy, folder, rows, output_dir = sys.argv[1:]
prompts = [{"prompt": json.loads(line)["prompt"]} for line in open(rows)][:4]
trainer = GRPOTrainer(
    model=policy,
    reward_funcs=folder,
    train_dataset=Dataset.from_list(prompts),
    args=GRPOConfig(
        output_dir=output_dir, max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
        learning_rate=1e-4, logging_steps=1, log_completions=True, report_to="none", save_strategy="no", bf16=False,
        use_cpu=True, gradient_checkpointing=False,
    ),
)
trainer.train()
print(json.dumps(trainer.state.log_history))
"""


def test_grpo_with_the_folder_as_reward_function_logs_our_rewards(toy, folder, tmp_path):
    history = in_a_process(GRPO, toy / "model", folder, toy / "data" / "test.jsonl", tmp_path)
    logged = [entry for entry in history if "reward" in entry]
    tables = [parquet.read_table(path).to_pylist() for path in sorted((tmp_path / "completions").iterdir())]
    assert len(logged) == len(tables) == 2
    for entry, table in zip(logged, tables, strict=True):
        assert len(table) == 4
        rewards = plain_rewards(folder, [row["prompt"] + row["completion"] for row in table])
        assert [row[folder.name] for row in table] == pytest.approx(rewards, rel=0, abs=GRPO_TOLERANCE)
        assert entry["reward"] == pytest.approx(sum(rewards) / 4, rel=0, abs=GRPO_TOLERANCE)


def test_the_snippet_of_the_model_card_gives_the_reward(folder, conversations):
    snippet, *_ = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    rewards = []
    for messages in conversations[:2]:
        names = {"messages": messages}
        exec(snippet, names)
        rewards.append(names["reward"])
    assert rewards == pytest.approx(plain_rewards(folder, conversations[:2]), rel=0, abs=TOLERANCE)


# ---------------------------------------------------------------- the files


def test_the_config_says_one_raw_number_from_a_plain_class(folder):
    config = json.loads((folder / "config.json").read_text())
    [architecture] = config["architectures"]
    assert architecture.endswith("ForSequenceClassification")
    assert len(config["id2label"]) == len(config["label2id"]) == 1
    assert config["problem_type"] == "regression"  # else clients apply a sigmoid
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())  # it would ask for trust_remote_code
    assert not list(folder.glob("*.py"))


def test_the_pad_token_is_the_tokenizers_and_not_eos(folder):
    config, tokenizer = json.loads((folder / "config.json").read_text()), AutoTokenizer.from_pretrained(folder)
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_the_head_is_one_row_without_a_bias(folder):
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        heads = [name for name in weights.keys() if name.startswith("score")]  # noqa: SIM118 - not a dict
        assert heads == ["score.weight"]
        assert weights.get_slice("score.weight").get_shape() == [1, width]


def test_the_tokenizer_has_a_template_and_a_class_that_transformers_4_knows(folder):
    # transformers 5 writes TokenizersBackend, a name that is new in it.
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_files_are_readable_by_others(folder):
    for name in MODEL_FILES:
        assert (folder / name).stat().st_mode & 0o044 == 0o044, name


def test_encoding_the_rendered_text_gives_the_templates_ids(folder, conversations):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert_rendered_text_encodes_to_the_templates_ids(tokenizer, conversations)


def assert_rendered_text_encodes_to_the_templates_ids(tokenizer, conversations):
    """The default add_special_tokens is what pipelines and servers use."""
    for messages in conversations:
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids("<|bos|>")) <= 1


# ---------------------------------------------------------------- a tokenizer like Llama-3's


@pytest.fixture(scope="module")
def bos_tokenizer(toy):
    """Its template writes BOS and so does its encoder, from a TemplateProcessing inside a Sequence."""
    tokenizer = load_tokenizer(str(toy / "model"), chat_template_name="llama3")
    bos = tokenizer.bos_token
    adds_bos = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), adds_bos])
    return tokenizer


@pytest.fixture(scope="module")
def bos_folder(toy, bos_tokenizer, tmp_path_factory):
    """A function that saves a model trained on conversations (chat) or on plain text and returns its folder."""
    model = load_model(toy / "model", bos_tokenizer)

    def save(chat: bool) -> Path:
        out = tmp_path_factory.mktemp("bos") / "out"
        out.mkdir()
        save_reward_model(model, model.state_dict(), bos_tokenizer, str(out), contract(bos_tokenizer, chat=chat))
        return out

    return save


def test_bos_is_not_written_twice_where_template_and_encoder_both_write_it(bos_tokenizer, bos_folder, conversations):
    text = bos_tokenizer.apply_chat_template(conversations[0], tokenize=False)
    assert bos_tokenizer(text)["input_ids"][:2] == [bos_tokenizer.bos_token_id] * 2  # what the folder must mend
    tokenizer = AutoTokenizer.from_pretrained(bos_folder(chat=True))
    assert_rendered_text_encodes_to_the_templates_ids(tokenizer, conversations)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == bos_tokenizer.bos_token_id
    assert ids == encode(bos_tokenizer, [text], chat=True)[0]  # what the model is trained on


def test_a_pipeline_on_that_tokenizer_gives_the_reward_of_the_templates_ids(bos_folder, conversations):
    folder = bos_folder(chat=True)
    score = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu")
    results = score(rendered(folder, conversations), batch_size=4)
    rewards = plain_rewards(folder, conversations)
    assert [result["score"] for result in results] == pytest.approx(rewards, rel=0, abs=TOLERANCE)


def test_plain_text_is_encoded_as_in_training_where_template_and_encoder_both_write_bos(bos_tokenizer, bos_folder):
    text = f"Once more the lake looks glad.{bos_tokenizer.eos_token}"
    [trained_on] = encode(bos_tokenizer, [text], chat=False)
    assert AutoTokenizer.from_pretrained(bos_folder(chat=False))(text)["input_ids"] == trained_on


def test_settings_are_where_transformers_4_looks_for_them(bos_folder):
    """Read as JSON: transformers 4 takes rope_theta from the top level and its default where that is missing."""
    folder = bos_folder(chat=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["add_bos_token"] is False
    assert not isinstance(tokenizer_config.get("extra_special_tokens"), list)


def test_a_model_reloaded_in_a_fresh_process_gives_the_same_rewards(bos_folder, conversations):
    """The way the recipe checks where Liger has patched transformers in its own process."""
    folder = bos_folder(chat=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in conversations[:2]]
    rewards, expected = plain_rewards(folder, conversations[:2]), contract(tokenizer, chat=True)
    line = check_reload(str(folder), Probe(sequences, rewards), tokenizer, expected, fresh_process=True)
    assert "reload check: 2 rewards" in line
    with pytest.raises(UserError, match="do not use this model"):
        wrong = Probe(sequences, [reward + 0.1 for reward in rewards])
        check_reload(str(folder), wrong, tokenizer, expected, fresh_process=True)


def test_a_tokenizer_is_tried_before_training(toy):
    """The toy's passes, also where its template wants a system message first; one that takes no conversation does not."""
    tokenizer = load_tokenizer(str(toy / "model"))
    plain = tokenizer.chat_template
    rehearse(tokenizer, contract(tokenizer, chat=False))
    for start in ("", "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"):
        tokenizer.chat_template = start + plain
        rehearse(tokenizer, contract(tokenizer, chat=True))
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="never"):
        rehearse(tokenizer, contract(tokenizer, chat=True))


def test_reload_check_refuses_a_tokenizer_that_encodes_other_ids(bos_tokenizer, bos_folder):
    """The folder of a plain-text model keeps the encoder's BOS; for conversations it would come twice."""
    with pytest.raises(UserError, match="a client that encodes"):
        folder, expected = str(bos_folder(chat=False)), contract(bos_tokenizer, chat=True)
        check_reload(folder, Probe([], []), bos_tokenizer, expected, fresh_process=False)
