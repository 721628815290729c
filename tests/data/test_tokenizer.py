"""Pad, BOS and EOS rules, templates, and hand-written token ids."""

import pytest
from word_level import BOS, BOT, EOS, HI, NO, TEMPLATE, USER, YES, YOU, ids, load, make

from open_rm.data.encoding import render_pair
from open_rm.data.templates import read_template, template_names
from open_rm.data.tokenizer import DATE, PAD_TOKEN, fingerprint, load_tokenizer, prints_date, tokenizer_of
from open_rm.errors import UserError
from open_rm.flags import ModelFlags


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("written", ["", " </s>"])
def test_plain_text_has_the_tokenizers_own_bos_and_exactly_one_eos(tmp_path, adds_bos, adds_eos, written):
    tokenizer = load(tmp_path, make(adds_bos, adds_eos))
    bos = [BOS] if adds_bos else []
    chosen, rejected, _ = ids(tokenizer, "hi ", "you yes " + written, "no " + written)
    assert chosen == [*bos, HI, YOU, YES, EOS]
    assert rejected == [*bos, HI, NO, EOS]


def test_text_that_names_bos_itself_has_it_once(tmp_path):
    chosen, _, _ = ids(load(tmp_path, make(adds_bos=True)), "<s> hi ", "yes ", "no ")
    assert chosen == [BOS, HI, YES, EOS]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_messages_get_exactly_what_the_template_writes(tmp_path, adds_bos):
    tokenizer = load(tmp_path, make(adds_bos, chat_template=TEMPLATE))
    prompt = [{"role": "user", "content": "hi you"}]
    chosen, rejected, prompt_length = ids(
        tokenizer, prompt, [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no no"}]
    )
    assert chosen == [USER, HI, YOU, BOT, YES, EOS]
    assert rejected == [USER, HI, YOU, BOT, NO, NO, EOS]
    assert prompt_length == 4
    expected = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "yes"}], return_dict=False)
    assert chosen == expected


def test_implicit_prompt_of_text_is_the_shared_prefix(tmp_path):
    assert ids(load(tmp_path, make(False)), "", "hi you yes ", "hi you no ")[2] == 2


@pytest.mark.parametrize("pad_token", [None, "</s>", "<s>", "<unk>"])
def test_pad_token_is_its_own_and_on_the_right(tmp_path, pad_token):
    tokenizer = load(tmp_path, make(False, **({"pad_token": pad_token} if pad_token else {})))
    assert tokenizer.pad_token == PAD_TOKEN
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert tokenizer.padding_side == "right"


def test_a_pad_token_that_is_no_other_is_kept(tmp_path):
    tokenizer = load(tmp_path, make(False, pad_token="no"))
    assert tokenizer.pad_token_id == NO


def test_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(UserError, match="no eos token"):
        load(tmp_path, make(False, eos_token=None))


def test_missing_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="--tokenizer_name"):
        load_tokenizer(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("flags", "name", "revision"),
    [
        ({}, "model", None),
        ({"model_revision": "r"}, "model", "r"),
        ({"model_revision": "r", "tokenizer_name": "model"}, "model", "r"),
        ({"model_revision": "r", "tokenizer_name": "other"}, "other", None),
        ({"model_revision": "r", "tokenizer_name": "other", "tokenizer_revision": "t"}, "other", "t"),
        ({"model_revision": "r", "tokenizer_revision": "t"}, "model", "t"),
    ],
)
def test_the_models_revision_is_only_for_the_models_own_tokenizer(monkeypatch, flags, name, revision):
    monkeypatch.setattr("open_rm.data.tokenizer.load_tokenizer", lambda name, **how: (name, how))
    more = {"chat_template_name": "tulu", "reward_token": "<r>", "trust_remote_code": True}
    flags = ModelFlags(model_name_or_path="model", **flags, **more)
    assert tokenizer_of(flags) == (name, {"revision": revision, **more})


def test_messages_without_a_template_name_the_templates_to_choose_from(tmp_path):
    message = [{"role": "assistant", "content": "x"}]
    with pytest.raises(UserError, match="--chat_template_name.*chatml.*tulu.*zephyr"):
        render_pair(load(tmp_path, make(False)), [], message, message)


def test_a_template_that_refuses_messages_gives_one_sentence(tmp_path):
    tokenizer = load(tmp_path, make(False, chat_template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UserError, match="template refuses these messages: roles must alternate"):
        render_pair(tokenizer, [], [{"role": "assistant", "content": "x"}], [])


def test_unknown_template_name_lists_the_names():
    with pytest.raises(UserError, match="llama3"):
        read_template("lama3")


EXPECTED_TEXT = {
    "encoder": "<s>Q</s>A</s>",
    "simple_concat": "QA</s>",
    "simple_concat_with_space": "Q A</s>",
    "simple_chat": "User: Q\n\nAssistant: A</s>",
    "tulu": "<|user|>\nQ\n<|assistant|>\nA</s>",
    "zephyr": "<|user|>\nQ</s>\n<|assistant|>\nA</s>",
    "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
}


@pytest.mark.parametrize("name", template_names())
def test_named_templates_render_as_written_and_end_with_the_end_token(tmp_path, name):
    tokenizer = load(tmp_path, make(False), chat_template_name=name)
    conversation = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == EXPECTED_TEXT[name]
    prompt = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    assert EXPECTED_TEXT[name].startswith(prompt)  # else the prompt's length would be measured on other text


def test_a_template_file_is_read(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}!\n")
    tokenizer = load(tmp_path, make(False), chat_template_name=str(tmp_path / "mine.jinja"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False) == "Q!"


def test_fingerprint_sees_template_and_vocabulary(tmp_path):
    one = load(tmp_path, make(False))
    before = fingerprint(one)
    one.chat_template = TEMPLATE
    with_template = fingerprint(one)
    one.add_tokens(["new"])
    assert len({before, with_template, fingerprint(one)}) == 3


def test_a_template_that_prints_todays_date_prints_a_fixed_one(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tokenizer = load(tmp_path, make(False, chat_template=template))
    assert prints_date(tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == f"{DATE} hi"
    # saved and loaded again, by anyone, it stays that date
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.chat_template == tokenizer.chat_template
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == text


def test_a_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        read_template(str(tmp_path / "latin.jinja"))
