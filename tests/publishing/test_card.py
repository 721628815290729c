"""The model card as its readers use it: the Hub its head, people its code, which runs as it stands, and its tables."""

import dataclasses
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import load_model
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from open_rm.data.tokenizer import ending, load_tokenizer
from open_rm.flags import Args, OpeningFlags
from open_rm.model.contract import Contract, RewardStatistics
from open_rm.publishing.card import write_card
from open_rm.publishing.run_folder import Place
from open_rm.publishing.saving import save_reward_model

STATISTICS = RewardStatistics(mean=-1.25, std=2.5, temperature=0.75, pairs=60)
UNFITTED = dataclasses.replace(STATISTICS, temperature=None, no_temperature="every pair is ranked right")
MESSAGES = [
    {"role": "user", "content": "Write a line."},
    {"role": "assistant", "content": "Today the lake looks golden."},
]
CLIENTS = [
    {"client": "TRL", "reads_the_same": True, "why_not": "", "how": "reward_funcs=[FOLDER]"},
    {
        "client": "NeMo-RL",
        "reads_the_same": False,
        "why_not": "it adds '<|eos|>'\nat the end",
        "how": "model_name=FOLDER",
    },
]


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory) -> tuple[Path, str]:
    """A folder that holds a model, and how its texts end."""
    tokenizer, folder = load_tokenizer(str(toy / "model")), tmp_path_factory.mktemp("card")
    model = load_model(toy / "model", tokenizer)
    contract = Contract(chat=True, ending=ending(tokenizer))
    save_reward_model(model, model.state_dict(), tokenizer, str(folder), contract)
    return folder, contract.ending


@pytest.fixture
def card(tmp_path):
    """The text of a card of the run "a-run"."""

    def write(folder=tmp_path, *, repo_id=None, facts=None, base="Qwen/Qwen3-0.6B", **contract) -> str:
        place = Place("a-run", str(folder), repo_id, "a-run")
        facts = dataclasses.asdict(Args(model_name_or_path=base)) | {"plan": {"total_steps": 3}} | (facts or {})
        contract = Contract(**{"chat": True, "ending": "<|eos|>"} | contract)
        write_card(place, contract, facts, {"eval/rm/accuracy": 0.912345}, data=["prefs_train"])
        return (Path(folder) / "README.md").read_text(encoding="utf-8")

    return write


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(f"```{language}\n(.*?)```", text, re.DOTALL)


def plain_reward(folder: Path, text: str) -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()


@pytest.mark.parametrize("chat", [True, False], ids=["conversation", "text"])
def test_all_its_code_runs_as_it_stands_and_means_what_it_says(card, saved, chat):
    folder, end = saved
    names = {"messages": MESSAGES, "prompt": "Write a line. ", "answer": "Today the lake looks golden."}
    code = blocks(card(folder, chat=chat, ending=end, statistics=STATISTICS))
    for block in code:
        exec(block, names)
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False)
    expected = plain_reward(folder, text if chat else f"Write a line. Today the lake looks golden.{end}")
    assert names["reward"] == pytest.approx(expected, abs=1e-5)  # float32; the same order of sums but for the padding
    assert names["normalised"] == pytest.approx((expected + 1.25) / 2.5, abs=1e-5)
    for a, b in ((2.0, 0.5), (-3.0, 4.0), (1e6, 0.0)):
        by_hand = 1 / (1 + math.exp(-max((a - b) / 0.75, -700)))
        assert names["preferred"](a, b) == pytest.approx(by_hand, abs=1e-7)  # float32's


def test_what_is_not_known_of_rewards_is_said_and_no_code_is_given_for_it(card):
    text = card()
    assert len(blocks(text)) == 1 and "no held-out pairs were scored" in text
    text = card(statistics=UNFITTED)
    assert len(blocks(text)) == 2 and "normalised = " in text
    assert "No temperature makes the probabilities fit those pairs better: every pair is ranked right." in text


def test_attributes_are_named_with_weights_and_means_and_that_the_model_gives_none(card):
    assert "attributes of an answer" not in card()
    known = {"attributes": ["helpfulness", "verbosity=scores.length"], "attribute_weights": [0.65, -0.4]}
    text = card(facts=known | {"attribute_means": [2.86541, 1.5]})
    assert "helpfulness (weight 0.65, mean 2.865 in the training data), verbosity (weight -0.4, mean 1.5 in" in text
    assert "The saved model gives this one number\nalone, and no attributes." in text
    assert ": helpfulness (weight 0.65), verbosity (weight -0.4).\n" in card(facts=known)  # of an older checkpoint


def test_where_the_numbers_stand_is_said(card):
    assert "(`mean` and `std` in config.json" in card(statistics=STATISTICS)
    assert "(`statistics` in contract.json)" in card(statistics=STATISTICS, adapter=True)
    assert "(`mean` and `std` in config.json" in card(statistics=STATISTICS, adapter=True, merged=True)


@pytest.mark.parametrize("repo_id", [None, "entity/name"])
def test_its_commands_name_the_model_by_flags_that_there_are(card, tmp_path, repo_id):
    folder = tmp_path / "my runs"
    folder.mkdir()
    text = card(folder, repo_id=repo_id, trust_remote_code=True)
    [block] = blocks(text, "bash")
    commands = [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]
    assert [command[2] for command in commands] == ["open_rm.scoring", "open_rm.serve"]
    known = {f"--{field.name}" for field in dataclasses.fields(OpeningFlags)} | {"--input", "--output"}
    for command in commands:
        assert {word for word in command if word.startswith("--")} <= known
        assert command[command.index("--model") + 1] == (repo_id or str(folder))
        assert ("--model_revision" in command) == (repo_id is not None)
    assert "where = {'pretrained_model_name_or_path': " in text and "'trust_remote_code': True" in text


def test_code_that_the_folder_brings_is_named_and_needs_trust_but_of_our_commands_only_where_training_did(
    card, tmp_path
):
    assert "trust" not in card(facts={"trust_remote_code": None})
    (tmp_path / "modeling_reward.py").write_text("")
    for trusted in (False, True):
        text = card(trust_remote_code=trusted)
        assert "Loading runs Python code (modeling_reward.py): read it first." in text
        assert "'trust_remote_code': True" in text and text.count(" --trust_remote_code") == 2 * trusted


def tables(text: str) -> list[list[list[str]]]:
    """Cells of the rows of its tables, as a reader of Markdown shows them."""
    found: list[list[list[str]]] = []
    for token, inline in itertools.pairwise(MarkdownIt("commonmark").enable("table").parse(text)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            assert {part.type for part in inline.children} <= {"text"}, inline.content  # no HTML, no code
            found[-1][-1].append("".join(part.content for part in inline.children))
    return found


def test_its_tables_show_what_was_given_whatever_stands_in_it(card):
    told = {
        "clients": CLIENTS,
        "chat_template_name": "a|b\nc",
        "reward_token": "<s>",
        "dataset_mixer_list": ["x|y", "1.0"],
    }
    clients, results, settings = tables(card(facts=told))
    assert clients[1:] == [
        ["TRL", "yes", "reward_funcs=[FOLDER]"],
        ["NeMo-RL", "no: it adds '<|eos|>' at the end", "model_name=FOLDER"],
    ]
    assert results[1:] == [["eval/rm/accuracy", "0.9123"]]
    shown = dict(settings[1:])
    assert (shown["chat_template_name"], shown["reward_token"]) == ("a|b c", "<s>")
    assert shown["dataset_mixer_list"] == "['x|y', '1.0']"
    assert "clients" not in shown and "hf_entity" not in shown  # one is a table of its own, the other None


CAPPED = {"model_type": "gemma2", "attn_logit_softcapping": 50.0}
EAGER = """`model_kwargs={"attn_implementation": "eager"}`; `rewardbench` needs `--attn_implementation eager`."""


@pytest.mark.parametrize("config", [CAPPED, {"model_type": "gemma3", "text_config": CAPPED}, {"model_type": "llama"}])
def test_clients_that_would_leave_out_a_soft_cap_are_told_below_the_table(card, tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = card(facts={"clients": CLIENTS})
    capped = "llama" not in config.values()
    below = text.split("## Who reads this folder the same")[1].split("## Results")[0]
    assert (EAGER in below) == capped and ("transformers 4" in text) == capped


OF_TRANSFORMERS_5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (OF_TRANSFORMERS_5, True),
        ({"text_config": OF_TRANSFORMERS_5}, True),
        (OF_TRANSFORMERS_5 | {"rope_theta": 300.0}, False),
        ({"rope_theta": 300.0, "rope_scaling": None}, False),
        (None, False),  # not on this machine
    ],
)
def test_an_adapter_says_where_an_old_peft_would_read_its_base_wrong(card, tmp_path, config, told):
    base = tmp_path / "base"
    base.mkdir()
    if config is not None:
        (base / "config.json").write_text(json.dumps(config))
    adapter = {"base_model_name_or_path": str(base), "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    text = card(facts={"clients": CLIENTS}, adapter=True)
    below = text.split("## Who reads this folder the same")[1].split("## Results")[0]
    assert (f"rotary settings of `{base}`" in below and "this adapter needs transformers 5" in below) == told
    assert "transformers 4" in text if told else "transformers 4" not in text


def test_clients_that_were_not_tried_are_not_spoken_of(card):
    assert "## Who reads this folder the same" not in card()


BASES = {"Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B", "/moved/away/model": None, "../model": None, "gpt2": None}


@pytest.mark.parametrize("base", BASES)
def test_the_hub_can_read_its_head(card, tmp_path, base):
    card(base=base)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == BASES[base]
    if data.base_model:
        validate_repo_id(data.base_model)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.tags == ["reward-model", "open_rm"]
