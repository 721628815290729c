"""What a user names is opened as what it is: ours, an adapter, somebody's classifier; or one sentence says why not."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import REPOSITORY
from hub_standin import HubStandin
from safetensors.torch import load_file, save_file
from test_scorer import GQA, SMALL, classifier, plain
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from open_rm.batching.layouts import lay_out_sequences
from open_rm.data.encoding import encode, render_pair
from open_rm.data.templates import read_template
from open_rm.data.tokenizer import FIXED_DATE, ending, load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, DataFlags, ModelFlags, OpeningFlags
from open_rm.model import adapters
from open_rm.model.contract import Contract
from open_rm.model.loading import load_reward_model
from open_rm.publishing.saving import save_reward_model
from open_rm.scoring import folders
from open_rm.scoring.opening import open_scorer

# float32 sums in another order, at rewards of about 1; plain peft on 4 bits, which some CPUs compute in bfloat16
TOLERANCE, PACKED_TOLERANCE = 1e-5, 5e-2
CONVERSATIONS = [
    [{"role": "user", "content": "Write a line about the lake."}, {"role": "assistant", "content": answer}]
    for answer in ("Today the lake looks golden.", "At noon the lake grows cold.", "No.")
]


def opened(folder, **flags):
    return open_scorer(OpeningFlags(model=str(folder), **flags))


def trained(toy, folder, *, chat: bool = True, dtype: str = "float32", **adapter):
    """A reward model of ours, saved as the recipe saves it, its head and adapter of order one; returns it and its tokenizer."""
    tokenizer, flags = load_tokenizer(str(toy / "model")), AdapterFlags(**adapter)
    named = ModelFlags(model_name_or_path=str(toy / "model"))
    model, _ = load_reward_model(named, tokenizer, adapter=flags, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.head.weight.normal_(std=0.1, generator=generator)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    contract = Contract.of(flags, DataFlags(), tokenizer, chat=chat, dtype=getattr(torch, dtype), code=False)
    save_reward_model(model, model.state_dict(), tokenizer, str(folder), contract)
    return model.eval(), tokenizer


@torch.no_grad()
def of_training(model, sequences) -> list[float]:
    batch = lay_out_sequences("padded", sequences, pad_token_id=0, prompt_of=range(len(sequences)))
    return model(**batch.inputs(torch.device("cpu"))).tolist()


@pytest.fixture(scope="module")
def ours(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "chat"
    return folder, *trained(toy, folder)


@pytest.fixture(scope="module")
def theirs(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    classifier(folder, load_tokenizer(str(toy / "model")), **GQA)
    return folder


# ---------------------------------------------------------------- ours


def test_a_model_of_ours_reads_conversations_as_in_training_and_gives_trainings_rewards(ours):
    folder, model, tokenizer = ours
    with opened(folder) as scorer:
        assert scorer.name == str(folder) and scorer.chat and scorer.tokenizer.padding_side == "right"
        assert scorer.lines[0].startswith(f"{folder}: a reward model of ours (llama); it scores conversations")
        texts = [render_pair(tokenizer, turns[:1], turns[1:], turns[1:]).chosen for turns in CONVERSATIONS]
        expected = encode(tokenizer, texts, chat=True)
        ids = scorer.encode_conversations(CONVERSATIONS)
        assert ids == expected == scorer.encode_texts(texts)
        assert scorer.rewards(ids) == pytest.approx(of_training(model, ids), abs=TOLERANCE)
        assert scorer.rewards(ids) == pytest.approx(plain(folder, ids), abs=TOLERANCE)
        with pytest.raises(UserError, match="scores conversations, and this is plain text"):
            scorer.complete("1 + 1 =", " 2")
        with pytest.raises(UserError, match="the chat template refuses these messages"):
            scorer.encode_conversations([*CONVERSATIONS, [{"role": "user"}]])
        assert scorer.encode_conversations([]) == scorer.encode_texts([]) == []


def test_a_model_of_ours_completes_plain_text_as_in_training(toy, tmp_path):
    _, tokenizer = trained(toy, tmp_path / "plain", chat=False)
    scorer = opened(tmp_path / "plain")
    assert not scorer.chat and scorer.ending == ending(tokenizer)
    text = scorer.complete("The lake", " looks golden.")
    assert text == render_pair(tokenizer, "The lake", " looks golden.", " looks golden.").chosen
    assert text == scorer.complete("The lake", f" looks golden.{tokenizer.eos_token}")
    assert scorer.encode_texts([text, f"{text}{tokenizer.eos_token}"]) == encode(tokenizer, [text] * 2, chat=False)
    for known, most, cut_to in (
        ((None, None), 32, (32, 32)),  # of a contract of an older version
        ((64, 16), None, (64, 16)),
        ((64, 16), 8, (8, 8)),
        ((64, 16), 32, (32, 16)),
    ):
        limits = dict(zip(("max_token_length", "max_prompt_token_length"), known, strict=True))
        dataclasses.replace(Contract.read(tmp_path / "plain"), **limits).write(tmp_path / "plain")
        scorer = opened(tmp_path / "plain", max_token_length=most)
        assert scorer.cut_to == cut_to
    assert "trained on at most 64 tokens a side, 16 of them its prompt" in scorer.lines


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("held_in", ["float32", "bfloat16", "4 bits"])
def test_an_adapter_gives_what_peft_gives_on_its_base(held_in, toy, tmp_path):
    packed = held_in == "4 bits"
    flags = {"use_peft": True, "lora_r": 4, "load_in_4bit": packed}
    model, tokenizer = trained(toy, tmp_path, dtype="float32" if packed else held_in, **flags)
    scorer = opened(tmp_path, dtype="float32")
    assert "an adapter of ours, beside its base" in scorer.lines[0] and "batching: shared_prefix" in scorer.lines[1]
    ids = scorer.encode_conversations(CONVERSATIONS)
    rewards = scorer.rewards(ids)
    contract = Contract.read(tmp_path)
    peft = adapters.load(str(tmp_path), pad_token_id=tokenizer.pad_token_id, **contract.base())
    if not packed:
        peft.float()  # of the base's bfloat16 weights, computed in float32 as here
    with torch.no_grad():
        expected = [peft(input_ids=torch.tensor([one])).logits.item() for one in ids]
    assert np.ptp(expected) > 0.05
    assert rewards == pytest.approx(expected, abs=PACKED_TOLERANCE if packed else TOLERANCE)
    if held_in != "bfloat16":  # training computes in the dtype of the base
        assert rewards == pytest.approx(of_training(model, ids), abs=TOLERANCE)


def test_a_merged_adapter_is_a_model_like_any_other(toy, tmp_path):
    model, _ = trained(toy, tmp_path, use_peft=True, lora_r=4, merge_adapter=True)
    scorer = opened(tmp_path)
    assert "a reward model of ours (llama)" in scorer.lines[0]
    ids = scorer.encode_conversations(CONVERSATIONS)
    assert scorer.rewards(ids) == pytest.approx(of_training(model, ids), abs=TOLERANCE)


def test_what_4_bits_compute_in_cannot_be_chosen(toy, tmp_path):
    trained(toy, tmp_path, use_peft=True, load_in_4bit=True)
    with pytest.raises(
        UserError, match="--dtype bfloat16: the adapter's base is held in 4 bits that compute in float32"
    ):
        opened(tmp_path, dtype="bfloat16")


def test_an_adapter_whose_base_has_gone_is_one_sentence(toy, tmp_path):
    shutil.copytree(toy / "model", tmp_path / "toy" / "model")
    trained(tmp_path / "toy", tmp_path / "adapter", use_peft=True)
    shutil.rmtree(tmp_path / "toy")
    with pytest.raises(UserError, match="--model .*model: no model could be found"):
        opened(tmp_path / "adapter")


# ---------------------------------------------------------------- others'


def test_somebodys_model_reads_what_its_own_tokenizer_gives(theirs):
    scorer = opened(theirs)
    assert scorer.chat and scorer.ending == ""
    assert scorer.lines[0].startswith(f"{theirs}: somebody's LlamaForSequenceClassification with one label")
    saved = AutoTokenizer.from_pretrained(theirs)
    assert scorer.encode_conversations(CONVERSATIONS) == saved.apply_chat_template(CONVERSATIONS)["input_ids"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT with a bias in its head, and a tokenizer that puts a text between [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["the", "lake", "looks", "golden", "cold", "today"]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    classifier(folder, tokenizer, "BertConfig", **SMALL | {"pad_token_id": 0})
    return folder


def test_an_encoder_scores_plain_text_as_its_tokenizer_encodes_it(encoder):
    scorer = opened(encoder)
    assert not scorer.chat and "it scores plain text" in scorer.lines[0]
    texts = [scorer.complete("the lake looks", " golden"), "today", "the lake"]
    assert texts[0] == "the lake looks golden"
    ids = scorer.encode_texts(texts)
    assert ids == AutoTokenizer.from_pretrained(encoder)(texts)["input_ids"]
    assert ids[1][0] == 2 and ids[1][-1] == 3
    assert scorer.rewards(ids) == pytest.approx(plain(encoder, ids), abs=TOLERANCE)


def test_messages_without_a_chat_template_are_refused_and_one_can_be_named(encoder):
    with pytest.raises(UserError, match="the tokenizer has no chat template; choose one with --chat_template_name"):
        opened(encoder).encode_conversations(CONVERSATIONS)
    assert opened(encoder, chat_template_name="tulu").chat


def test_a_template_that_prints_todays_date_prints_a_fixed_one_and_the_log_says_so(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + read_template("tulu"))
    scorer = opened(folder)
    assert any("prints today's date; here it is always 26 Jul 2024" in line for line in scorer.lines)
    assert scorer.tokenizer.chat_template.startswith(FIXED_DATE)


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---------------------------------------------------------------- what is refused


def two_labels(theirs, ours, tmp_path):
    config = AutoModelForSequenceClassification.from_pretrained(theirs).config
    config.num_labels = 2
    config.save_pretrained(tmp_path)
    return tmp_path


def language_model(theirs, ours, tmp_path):
    config = transformers.LlamaConfig(**GQA, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    return tmp_path


def no_head(theirs, ours, tmp_path):
    folder = copied(theirs, tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, folder / "model.safetensors", {"format": "pt"})
    return folder


def a_layer_less(theirs, ours, tmp_path):
    folder = copied(theirs, tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    return folder


def torn(theirs, ours, tmp_path):
    folder = copied(theirs, tmp_path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    return folder


def no_tokenizer(theirs, ours, tmp_path):
    folder = copied(theirs, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def adapter_of_others(theirs, ours, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(theirs)}))
    return tmp_path


def newer_contract(theirs, ours, tmp_path):
    folder = copied(ours[0], tmp_path)
    (folder / "contract.json").write_text('{"chat": true, "ending": "", "unknown": 1}')
    return folder


def code_of_its_own(theirs, ours, tmp_path):
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('the code ran')")
    return tmp_path


def nothing(theirs, ours, tmp_path):
    return tmp_path


def gone(theirs, ours, tmp_path):
    return tmp_path / "gone"


def on_the_hub(theirs, ours, tmp_path):
    return "somebody/reward-model"


def whole(theirs, ours, tmp_path):
    return theirs


def of_ours(theirs, ours, tmp_path):
    return ours[0]


@pytest.mark.parametrize(
    ("made", "flags", "said"),
    [
        (two_labels, {}, "LlamaForSequenceClassification has 2 labels, and a reward model has one; name a model with"),
        (
            language_model,
            {},
            "LlamaForCausalLM is no `...ForSequenceClassification` .* rewards would be random; train it",
        ),
        (no_head, {}, "holds no weights for score.weight, so its rewards would be random; .* train it with"),
        (a_layer_less, {}, r"the checkpoint lacks weights such as model.layers.1.\S+; download it again"),
        (torn, {}, r"cannot be loaded as a classifier with one label \("),
        (no_tokenizer, {}, "--model .*no tokenizer could be loaded"),
        (adapter_of_others, {}, "an adapter without our contract.json, .* merge the two"),
        (newer_contract, {}, "contract.json in it cannot be read .*save the model again, or open it with the version"),
        (code_of_its_own, {}, "needs Python code that it brings along; read that code, then pass --trust_remote_code"),
        (nothing, {}, "--model .*: no model could be found"),
        (gone, {}, "--model .*gone: there is no such folder"),
        (on_the_hub, {}, "--model somebody/reward-model: neither a folder nor a model that the Hub gives .*HF_TOKEN"),
        (
            whole,
            {"model_revision": "v2"},
            "--model_revision v2: .* is a local folder, which has no revisions; leave it out",
        ),
        (
            whole,
            {"max_token_length": 129},
            "--max_token_length 129 is beyond the 128 positions of .*; pass 128 or less",
        ),
        (
            of_ours,
            {"chat_template_name": "tulu"},
            "--chat_template_name tulu: .* the one it was trained with; leave it out",
        ),
        (whole, {"chat_template_name": "tullu"}, "--chat_template_name tullu: neither a file nor a known name"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_sentence(made, flags, said, theirs, ours, tmp_path):
    with pytest.raises(UserError, match=said) as refused:
        opened(made(theirs, ours, tmp_path), **flags)
    assert "model_name_or_path" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_layout_that_is_not_exact_is_refused_by_name(encoder):
    with pytest.raises(
        UserError, match="--batching packed is not possible: packed rows are not known to be exact for bert"
    ):
        opened(encoder, batching="packed")


def test_a_process_takes_a_gpu_of_its_own(theirs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--num_processes 3: a process takes a GPU, and there are 2; pass 2 or less"):
        opened(theirs, num_processes=3)


def test_lengths_are_limited_where_the_user_says_or_the_model_ends(theirs):
    assert opened(theirs).max_token_length == 128
    assert opened(theirs, max_token_length=20).max_token_length == 20


def test_positions_of_a_roberta_begin_behind_its_pads(toy, tmp_path):
    classifier(tmp_path, load_tokenizer(str(toy / "model")), "RobertaConfig", **SMALL)
    scorer = opened(tmp_path)
    assert scorer.max_token_length == 128 - 3 - 1
    longest = [[5] * scorer.max_token_length]
    assert scorer.rewards(longest) == pytest.approx(plain(tmp_path, longest), abs=TOLERANCE)


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_changes_with_what_decides_a_reward_and_with_nothing_else(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    first = opened(theirs).fingerprint
    assert opened(folder, num_processes=1, max_tokens_per_micro_batch=9, batching="padded").fingerprint == first
    (folder / "README.md").write_text("a card")
    (folder / "run.json").write_text("{}")
    assert opened(folder).fingerprint == first
    found = [first, opened(folder, dtype="bfloat16").fingerprint]
    (folder / "chat_template.jinja").write_text(read_template("zephyr"))
    found.append(opened(folder).fingerprint)
    (folder / "modeling.py").write_text("")
    found.append(opened(folder).fingerprint)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 7] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found.append(opened(folder).fingerprint)
    assert len(set(found)) == len(found)


def test_large_weights_are_sampled_and_training_shows_in_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "WHOLE", 1000)
    monkeypatch.setattr(folders, "STRETCH", 64)
    file = tmp_path / "model.safetensors"
    marks = []
    for seed in (0, 0, 1):
        file.write_bytes(np.random.default_rng(seed).bytes(200_000))
        marks.append(folders.fingerprint(tmp_path))
    file.write_bytes(file.read_bytes() + b"x")
    marks.append(folders.fingerprint(tmp_path))
    assert marks[0] == marks[1] and len(set(marks)) == 3


# ---------------------------------------------------------------- the Hub, and what is not imported

OPEN = """
import json, sys
from open_rm.flags import OpeningFlags
from open_rm.errors import UserError
from open_rm.scoring import folders
from open_rm.scoring.opening import open_scorer
before = "deepspeed" in sys.modules
scorer = open_scorer(OpeningFlags(model="standin/rm", model_revision="v1"))
ids = scorer.encode_conversations(json.loads(sys.argv[1]))
rewards = scorer.rewards(ids).tolist()
try:
    open_scorer(OpeningFlags(model="standin/rm", model_revision="v2"))
except UserError as error:
    refused = str(error)
found = {"deepspeed": [before, "deepspeed" in sys.modules], "rewards": rewards, "line": scorer.lines[0], "refused": refused}
print(json.dumps(found))
"""
PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("standin/rm")
api.create_branch("standin/rm", branch="v1")
api.upload_folder(repo_id="standin/rm", folder_path=sys.argv[1], revision="v1")
"""


def test_a_model_on_the_hub_is_opened_by_name_and_revision_without_deepspeed(ours):
    folder, model, _ = ours
    with HubStandin() as hub:
        env = hub.env() | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "0", "DS_ACCELERATOR": "cpu"}
        for script, argument in ((PUSH, folder), (OPEN, json.dumps(CONVERSATIONS))):
            command = [sys.executable, "-c", script, str(argument)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["deepspeed"] == [False, False]
    assert found["line"].startswith("standin/rm: a reward model of ours (llama)")
    assert found["rewards"] == pytest.approx(of_training(model, ids_of(ours)), abs=TOLERANCE)
    assert found["refused"].startswith("--model standin/rm: neither a folder nor a model that the Hub gives")


def ids_of(ours) -> list[list[int]]:
    texts = [render_pair(ours[2], turns[:1], turns[1:], turns[1:]).chosen for turns in CONVERSATIONS]
    return encode(ours[2], texts, chat=True)
