"""Every client's own way from a conversation to token ids, beside training's, over every kind of chat template.

The templates of Llama 3, Qwen, Gemma and Phi-3 are the models' own, as TRL keeps them; those of Mistral, OLMo 2 and Tulu 3 are
written here to print what the models' own print. Vocabularies are the toy's with the special tokens that a template writes.
"""

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, load_model, read_pairs
from tokenizers.processors import BertProcessing, ByteLevel, RobertaProcessing, Sequence, TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from open_rm.data.encoding import encode, render_pair
from open_rm.data.templates import template_names
from open_rm.data.tokenizer import ending, fingerprint, load_tokenizer
from open_rm.evaluation.held_out import Probe
from open_rm.flags import OpeningFlags
from open_rm.model.contract import Contract
from open_rm.publishing import clients, proof
from open_rm.publishing.clients import CLIENTS, CONVERSATIONS, Saved, check_clients
from open_rm.publishing.proof import ClientRewards, check_reload, rehearse
from open_rm.publishing.saving import save_reward_model
from open_rm.publishing.tokenizer_files import save_tokenizer
from open_rm.scoring.opening import open_scorer
from open_rm.serving.texts import Reader, Text

REWARD = "<|reward|>"
# float32 on both sides and the same weights: only the order of sums differs, with the padding.
TOLERANCE = 1e-5
ALL = {client.name for client in CLIENTS}


@dataclasses.dataclass(frozen=True)
class Real:
    """A model's template and the special tokens that matter to it. adds_bos: its encoder does so by itself."""

    template: str
    bos: str | None
    eos: str
    others: tuple[str, ...] = ()
    adds_bos: bool = False
    # Who cannot read it, and why.
    not_read_by: frozenset[str] = frozenset()


def of_trl(name: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('a user and an assistant take turns') }}{% endif %}{% endfor %}"
)
TULU_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if message['role'] != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_3 = {
    "bos": "<|begin_of_text|>",
    "others": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "adds_bos": True,
}
QWEN = {"bos": None, "eos": "<|im_end|>", "others": ("<|im_start|>", "<|endoftext|>")}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "others": ("<start_of_turn>", "<end_of_turn>"), "adds_bos": True}
# A policy stops at the end of the turn, and these templates write a newline, or EOS too, behind it: that is scored.
AFTER_THE_TURN = frozenset({"OpenRLHF"})
NEMO = frozenset({"NeMo-RL"})
REAL = {
    "Llama 3": Real(of_trl("llama3"), eos="<|eot_id|>", **LLAMA_3),
    "Llama 3.1": Real(of_trl("llama3_1"), eos="<|eot_id|>", **LLAMA_3),
    "Llama 3's template on its base model": Real(of_trl("llama3"), eos="<|end_of_text|>", **LLAMA_3),
    "Qwen 2.5": Real(of_trl("qwen2_5"), not_read_by=AFTER_THE_TURN, **QWEN),
    # It writes an empty thought into the last answer alone, so what NeMo-RL keeps of earlier turns is not in the text.
    "Qwen 3": Real(of_trl("qwen3"), not_read_by=AFTER_THE_TURN | NEMO, **QWEN),
    "Gemma 2": Real(of_trl("gemma"), not_read_by=AFTER_THE_TURN, **GEMMA),
    "Gemma 3": Real(of_trl("gemma3"), not_read_by=AFTER_THE_TURN, **GEMMA),
    "Mistral": Real(MISTRAL, "<s>", "</s>", adds_bos=True),
    "OLMo 2": Real("{{ bos_token }}" + TULU_3, "<|endoftext|>", "<|endoftext|>"),
    "Phi-3": Real(
        of_trl("phi3"),
        "<s>",
        "<|endoftext|>",
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        not_read_by=AFTER_THE_TURN | NEMO,
    ),
    "Tulu 3": Real(TULU_3, "<|begin_of_text|>", "<|end_of_text|>", adds_bos=True),
}
# What the named templates write besides BOS and EOS.
WRITTEN = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# They end the last turn alone, or nothing but the text: NeMo-RL keeps the end that it saw after the first message.
END_ONLY_THE_LAST = {"simple_chat", "simple_concat", "simple_concat_with_space"}


@pytest.fixture(scope="module")
def make(toy, tmp_path_factory):
    """A function from a `Real` to training's tokenizer."""

    def made(real: Real, **how):
        tokenizer = AutoTokenizer.from_pretrained(toy / "model")
        special = {"bos_token": real.bos, "eos_token": real.eos}
        tokenizer.add_special_tokens({name: token for name, token in special.items() if token is not None})
        if real.bos is None:
            tokenizer.bos_token = None
        tokenizer.add_special_tokens({"additional_special_tokens": list(real.others)})
        if real.adds_bos:
            add_bos(tokenizer)
        tokenizer.chat_template = real.template
        folder = tmp_path_factory.mktemp("base")
        tokenizer.save_pretrained(folder)
        return load_tokenizer(str(folder), **how)

    return made


def add_bos(tokenizer) -> None:
    """As Llama 3's encoder: a TemplateProcessing inside a Sequence."""
    bos = tokenizer.bos_token
    adds = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), adds])


def contract_of(tokenizer, *, chat: bool) -> Contract:
    return Contract(chat=chat, ending=ending(tokenizer))


def saved(tokenizer, folder: Path, *, chat: bool = True):
    """The tokenizer as a client loads it."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder, tokenizer, contract_of(tokenizer, chat=chat))
    return AutoTokenizer.from_pretrained(folder)


def not_read_by(tokenizer, folder: Path, *, chat: bool = True) -> dict[str, str]:
    """Clients that read other ids than training has, and why."""
    checks = check_clients(saved(tokenizer, folder, chat=chat), tokenizer, contract_of(tokenizer, chat=chat))
    assert {check.client for check in checks} == ALL
    return {check.client: check.why_not for check in checks if not check.reads_the_same}


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", template_names())
def test_every_client_reads_a_named_templates_ids(make, tmp_path, name, adds_bos):
    tokenizer = make(Real("", "<|bos|>", "<|eos|>", WRITTEN, adds_bos), chat_template_name=name)
    assert set(not_read_by(tokenizer, tmp_path / "out")) == ({"NeMo-RL"} if name in END_ONLY_THE_LAST else set())


@pytest.mark.parametrize("name", REAL)
def test_every_client_reads_a_real_templates_ids(make, tmp_path, name):
    wrong = not_read_by(make(REAL[name]), tmp_path / "out")
    assert set(wrong) == REAL[name].not_read_by, wrong


@pytest.mark.parametrize("name", ["llama3", "chatml", "tulu", "simple_chat"])
def test_a_reward_token_is_read_by_whoever_renders_the_whole_conversation(make, tmp_path, name):
    """NeMo-RL sees it after the first message already; OpenRLHF has a policy's text alone."""
    tokenizer = make(Real("", "<|bos|>", "<|eos|>", WRITTEN, True), chat_template_name=name, reward_token=REWARD)
    wrong = not_read_by(tokenizer, tmp_path / "out")
    assert set(wrong) == {"NeMo-RL", "OpenRLHF"}
    assert wrong["OpenRLHF"] == f"one turn: its text ends before {REWARD!r}, where the reward is read"


PLAIN_CANNOT = {"chat template's ids", "RewardBench", "verl, vLLM", "verl, SGLang", "vLLM, messages", "NeMo-RL", "TRL"}


@pytest.mark.parametrize("reward_token", [None, REWARD])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_is_read_by_who_sends_it_whole(make, tmp_path, adds_bos, reward_token):
    """OpenRLHF adds neither the BOS that the encoder wrote in training nor a reward token."""
    tokenizer = make(Real(TULU_3, "<|bos|>", "<|eos|>", (), adds_bos), reward_token=reward_token)
    wrong = not_read_by(tokenizer, tmp_path / "out", chat=False)
    assert set(wrong) == PLAIN_CANNOT | ({"OpenRLHF"} if adds_bos or reward_token else set())
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|bos|>", "<|eos|>")  # as they were
    assert config["add_bos_token"] is adds_bos


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama3", {"verl, vLLM", "verl, SGLang", "NeMo-RL"}),
        ("chatml", {"NeMo-RL"}),
        ("tulu", {"NeMo-RL"}),
        ("zephyr", {"NeMo-RL"}),
    ],
)
def test_a_folder_that_names_the_base_models_tokens_is_read_otherwise(make, tmp_path, name, wrong):
    """What is saved here, but for the two names: so the table can say no."""
    tokenizer = make(Real("", "<|bos|>", "<|eos|>", WRITTEN, True), chat_template_name=name)
    client = saved(tokenizer, tmp_path / "out")
    client.bos_token, client.eos_token = "<|bos|>", "<|eos|>"
    checks = check_clients(client, tokenizer, contract_of(tokenizer, chat=True))
    found = {check.client: check.why_not for check in checks if not check.reads_the_same}
    assert set(found) == wrong
    if name == "llama3":
        assert found["verl, vLLM"] == "one turn: it leaves out '<|bos|>' in front"
        assert found["NeMo-RL"] == "one turn: it adds '<|eos|>' at the end, where the reward is read"
    else:
        assert "NeMo-RL" in found


@pytest.mark.parametrize("processor", [BertProcessing, RobertaProcessing])
def test_an_encoders_own_way_to_add_its_tokens_is_taken_out(toy, tmp_path, processor):
    base = AutoTokenizer.from_pretrained(toy / "model")
    base.backend_tokenizer.post_processor = processor(("<|eos|>", base.eos_token_id), ("<|bos|>", base.bos_token_id))
    base.save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"), chat_template_name="encoder")
    first, letter, last = tokenizer("a")["input_ids"]
    assert (first, last) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not_read_by(tokenizer, tmp_path / "chat") == {}
    assert AutoTokenizer.from_pretrained(tmp_path / "chat")("a")["input_ids"] == [letter]
    assert set(not_read_by(tokenizer, tmp_path / "text", chat=False)) == PLAIN_CANNOT | {"OpenRLHF"}
    assert AutoTokenizer.from_pretrained(tmp_path / "text")("a")["input_ids"] == [first, letter]


def test_a_class_that_has_a_bos_by_default_is_not_written(toy, tmp_path):
    """GPT2Tokenizer's is <|endoftext|>, where its file names none."""
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    client = saved(tokenizer, tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert client.bos_token is None


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_the_user_does_not_trust_is_not_named(toy, tmp_path, trusted):
    """Named and absent, it would keep everybody who trusts code from the folder."""
    base, out = shutil.copytree(toy / "model", tmp_path / "base"), tmp_path / "out"
    file = base / "tokenizer_config.json"
    named = {"AutoTokenizer": [None, "own.OwnTokenizerFast"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": named}))
    (base / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizerFast(PreTrainedTokenizerFast): pass\n"
    )
    tokenizer = load_tokenizer(str(base), trust_remote_code=trusted)
    assert (type(tokenizer).__name__ == "OwnTokenizerFast") is trusted
    out.mkdir()
    save_tokenizer(out, tokenizer, dataclasses.replace(contract_of(tokenizer, chat=True), trust_remote_code=trusted))
    assert ("auto_map" in json.loads((out / "tokenizer_config.json").read_text())) is trusted
    assert (type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)).__name__ == "OwnTokenizerFast") is trusted


def test_an_adapter_is_read_by_peft_and_our_server_alone(make, tmp_path):
    tokenizer = make(REAL["Llama 3"])
    contract = dataclasses.replace(contract_of(tokenizer, chat=True), adapter=True)
    for merged, read_by in (
        (False, {"transformers", "chat template's ids", "OpenRLHF, our server", "slime, our server"}),
        (True, ALL),
    ):
        checks = rehearse(tokenizer, dataclasses.replace(contract, merged=merged))
        assert {check.client for check in checks if check.reads_the_same} == read_by


def test_an_end_that_the_vocabulary_spells_out_is_not_named(toy, tmp_path):
    """Named EOS, its last letter would be cut out of every text."""
    tokenizer = load_tokenizer(str(toy / "model"), chat_template_name="chatml")
    assert set(not_read_by(tokenizer, tmp_path / "out")) == {"NeMo-RL"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == tokenizer.eos_token


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{% for m in messages %}{% for part in m.content %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for part in m['content'][1:] | list %}{% endfor %}{% endfor %}", True),
        (
            "{% set rest = messages[1:] %}{% set last = rest %}{% for m in last | reverse %}"
            "{% for part in m.content %}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% macro say(content) %}{% for part in content %}{% endfor %}{% endmacro %}", True),
        ("{% for tool in tools %}{% for part in tool.content %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for part in m.parts %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% set own = m %}{% for part in own.content %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for part in content | list %}{% endfor %}{% endfor %}", False),
        (
            "{% set ns.number = messages | length %}{% for m in messages %}{% for part in m.content %}{% endfor %}{% endfor %}",
            False,
        ),
    ],
)
def test_a_template_loops_over_contents_where_vllm_says_so(toy, template, parts):
    """By vllm/renderers/hf.py: names are followed from `messages`, and where it cannot follow them contents stay text."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    tokenizer.chat_template = template
    assert clients._loops_over_content(tokenizer) is parts


# ---------------------------------------------------------------- our readings of clients against the clients


@pytest.fixture(scope="module")
def trained(make, toy, tmp_path_factory):
    """A function to training's tokenizer and model, and the folder that it left."""

    def of(name: str, **how):
        tokenizer = make(REAL[name], **how)
        model, out = load_model(toy / "model", tokenizer), tmp_path_factory.mktemp("trained") / "out"
        out.mkdir()
        save_reward_model(model, model.state_dict(), tokenizer, str(out), contract_of(tokenizer, chat=True))
        return tokenizer, model, out

    return of


@pytest.fixture(scope="module")
def llama3(trained):
    return trained("Llama 3's template on its base model")


def turns(contents: list[str]) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


SOME = [turns(contents) for name, contents in CONVERSATIONS.items() if name != clients.WITH_SYSTEM]


def trained_on(tokenizer, conversation: list[dict]) -> list[int]:
    text = render_pair(tokenizer, conversation[:-1], conversation[-1:], conversation[-1:]).chosen
    return encode(tokenizer, [text], chat=True)[0]


def test_the_replayed_ids_are_those_of_transformers_and_trl(llama3):
    from trl.data_utils import apply_chat_template

    tokenizer, _, out = llama3
    score = pipeline("text-classification", model=str(out), device="cpu")
    seen = Saved.of(AutoTokenizer.from_pretrained(out), tokenizer, chat=True)
    for conversation in SOME:
        text = apply_chat_template({"messages": conversation}, seen.tokenizer)["text"]
        batch = seen.tokenizer(text=[text], padding=True, padding_side="right", add_special_tokens=False)
        assert clients.text_without_special(seen, conversation) == batch["input_ids"][0]
        assert clients.text_with_special(seen, conversation) == score.preprocess(text)["input_ids"][0].tolist()


@pytest.mark.parametrize(("name", "how"), [("Llama 3", {}), ("Qwen 2.5", {"reward_token": REWARD}), ("Phi-3", {})])
def test_our_server_reads_what_a_policy_wrote_as_it_is_replayed(trained, name, how):
    tokenizer, _, out = trained(name, **how)
    seen = Saved.of(AutoTokenizer.from_pretrained(out), tokenizer, chat=True)
    with open_scorer(OpeningFlags(model=str(out), num_processes=1)) as scorer:
        reader = Reader(scorer, unfinished="end")
        queries = [Text(seen.written_by_a_policy(conversation)) for conversation in SOME]
        expected = [trained_on(tokenizer, conversation) for conversation in SOME]
        assert reader.sequences(queries) == [clients.our_server(seen, c) for c in SOME] == expected


def test_rewards_that_follow_equal_trainings(llama3):
    """Each client's ids in plain transformers, in a batch padded on the right, and as OpenRLHF's: on the left, with positions
    from the mask and the reward read at the last token."""
    tokenizer, ours, out = llama3
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    seen = Saved.of(AutoTokenizer.from_pretrained(out), tokenizer, chat=True)
    with torch.no_grad():
        expected = [ours_of(ours, trained_on(tokenizer, conversation)) for conversation in SOME]
        for client in CLIENTS:
            ids = [client.conversation(seen, conversation) for conversation in SOME]
            batch = seen.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            assert theirs(**batch).logits[:, 0].tolist() == pytest.approx(expected, rel=0, abs=TOLERANCE), client.name
            batch = seen.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
            positions = (batch["attention_mask"].cumsum(-1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
            hidden = theirs.model(**batch, position_ids=positions).last_hidden_state[:, -1]
            assert theirs.score(hidden)[:, 0].tolist() == pytest.approx(expected, rel=0, abs=TOLERANCE), client.name
    assert max(expected) - min(expected) > 100 * TOLERANCE  # a constant would have been equal too


def ours_of(model, ids: list[int]) -> float:
    from open_rm.batching.layouts import lay_out_sequences

    batch = lay_out_sequences("padded", [torch.tensor(ids).numpy()], pad_token_id=0, prompt_of=[0])
    return model(**batch.inputs(torch.device("cpu"))).item()


# ---------------------------------------------------------------- going on from the folder

AGAIN = [
    (None, {}),
    (None, {"chat_template_name": "llama3"}),
    (REWARD, {}),
    (REWARD, {"reward_token": REWARD}),
    (REWARD, {"chat_template_name": "llama3"}),
]


@pytest.mark.parametrize(("reward_token", "again"), AGAIN)
def test_who_goes_on_from_a_saved_folder_has_the_tokenizer_of_its_training(make, tmp_path, toy, reward_token, again):
    real = Real("", "<|bos|>", "<|eos|>", WRITTEN, True)
    first = make(real, chat_template_name="llama3", reward_token=reward_token)
    saved(first, tmp_path / "one")
    second = load_tokenizer(str(tmp_path / "one"), **again)
    assert (second.bos_token, second.eos_token, ending(second)) == (first.bos_token, first.eos_token, ending(first))
    assert second.chat_template == first.chat_template
    assert [trained_on(second, c) for c in SOME] == [trained_on(first, c) for c in SOME]
    saved(second, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert fingerprint(load_tokenizer(str(tmp_path / "two"))) == fingerprint(second)
    # Pairs that are cut, from which BOS is not lost.
    limits = {"max_token_length": 40, "max_prompt_token_length": 16, "overlength": "truncate"}
    mixer, cache = [toy / "data" / "test.jsonl", "24"], str(tmp_path / "cache")
    sets = [read_pairs(mixer, t, dataset_local_cache_dir=cache, **limits) for t in (first, second)]
    ids = [[[side.tolist() for side in pair] for pair in data.pairs(list(range(len(data))))] for data in sets]
    assert ids[0] == ids[1] and {side[0] for pair in ids[1] for side in pair} == {first.bos_token_id}
    assert max(len(side) for pair in ids[1] for side in pair) == 40


def test_a_date_and_several_templates_are_mended_once_however_often_it_is_saved(make, tmp_path):
    dated = (
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    first = make(Real(dated, "<|bos|>", "<|eos|>"), reward_token=REWARD)
    first.chat_template = {"default": first.chat_template, "tool_use": first.chat_template + "!"}
    client = saved(first, tmp_path / "one")
    assert client.bos_token is None and client.eos_token == REWARD
    assert all(template.startswith('{% set bos_token = "<|bos|>" %}') for template in client.chat_template.values())
    second = load_tokenizer(str(tmp_path / "one"))
    assert second.chat_template["default"] == first.chat_template["default"]
    saved(second, tmp_path / "two")
    third = load_tokenizer(str(tmp_path / "two"))
    assert third.chat_template == second.chat_template
    assert trained_on(third, SOME[0]) == trained_on(first, SOME[0])


@pytest.mark.parametrize(
    "start", ["\n", "  ", "  {% if true %}x{% endif %}", "\n\n  {{ 'x' }}", '{% set a = "é\\"" %}\n']
)
def test_a_templates_first_characters_are_printed_as_before(make, tmp_path, start):
    tokenizer = make(Real(start + TULU_3, '<b"\\>', "<|eos|>"))
    client = saved(tokenizer, tmp_path / "out")
    for conversation in SOME:
        assert clients.template_ids(Saved(client, "", ""), conversation) == trained_on(tokenizer, conversation)
    assert load_tokenizer(str(tmp_path / "out")).chat_template == tokenizer.chat_template


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- the files, and what is said


def test_no_token_type_ids_are_returned_by_any_version(make, tmp_path):
    """transformers 4 returns them unless the file says otherwise, and decoders refuse them."""
    for chat in (True, False):
        client = saved(make(REAL["Tulu 3"]), tmp_path / f"{chat}", chat=chat)
        config = json.loads((tmp_path / f"{chat}" / "tokenizer_config.json").read_text())
        assert config["model_input_names"] == client.model_input_names == ["input_ids", "attention_mask"]


def test_the_rehearsal_says_who_reads_the_folder_for_the_log_the_card_and_run_json(make):
    tokenizer = make(REAL["Qwen 2.5"])
    checks = rehearse(tokenizer, contract_of(tokenizer, chat=True))
    assert json.loads(json.dumps([dataclasses.asdict(check) for check in checks]))[0] == {
        "client": "transformers",
        "reads_the_same": True,
        "why_not": "",
        "how": "the lines of the model card",
    }
    first, second = clients.lines(checks)
    assert first.startswith("clients that read the folder as it was trained: transformers; transformers pipeline; ")
    assert second == r"OpenRLHF reads it otherwise: one turn: its text ends before '\n', where the reward is read"


def test_after_training_the_folder_is_tried_with_plain_transformers_alone(make, tmp_path, monkeypatch):
    """Who else reads it was said before training, and nobody reads it again. Who is required is no matter of order."""
    tokenizer = make(REAL["Qwen 3"])
    saved(tokenizer, tmp_path / "out")
    monkeypatch.setattr(clients, "CLIENTS", CLIENTS[::-1])  # those of the others who read it otherwise come first
    monkeypatch.setattr(proof, "check_clients", lambda *_: pytest.fail("all clients were tried"))
    monkeypatch.setattr(proof, "_in_this_process", lambda *_: ClientRewards([], [], "float32"))
    line = check_reload(
        str(tmp_path / "out"), Probe([], []), tokenizer, contract_of(tokenizer, chat=True), fresh_process=False
    )
    assert line.startswith("reload check: ")


def test_the_documented_table_is_the_one_that_is_tested():
    text = (REPOSITORY / "docs" / "clients.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    said = {name: tuple(cells) for row in rows for name, *cells in [row] if len(row) == 5}
    verdicts = {
        name: (
            "yes",
            "no (1)" if "NeMo-RL" in real.not_read_by else "yes",
            "no (2)" if "OpenRLHF" in real.not_read_by else "yes",
        )
        for name, real in REAL.items()
    }
    verdicts |= {
        ", ".join(sorted(END_ONLY_THE_LAST)): ("yes", "no (1)", "yes"),
        "a reward token": ("yes", "no (1)", "no (2)"),
    }
    assert {name: (*verdict, "yes") for name, verdict in verdicts.items()}.items() <= said.items()
    named = {name for row in said for name in row.split(", ")} & set(template_names())
    assert named == set(template_names())
