"""Pad, BOS and EOS rules, templates, and hand-written token ids."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from open_rm import tokenization
from open_rm.errors import UserError

WORDS = ["<unk>", "<s>", "</s>", "hi", "you", "yes", "no", "user:", "bot:"]
UNK, BOS, EOS, HI, YOU, YES, NO, USER, BOT = range(9)
TEMPLATE = (
    "{% for m in messages %}{{ 'user: ' if m['role'] == 'user' else 'bot: ' }}{{ m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
)


def make(adds_bos: bool, adds_eos: bool = False, **special) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose post-processor adds BOS (and EOS) or not."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if adds_eos else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def load(tmp_path, tokenizer, **kwargs):
    tokenizer.save_pretrained(tmp_path)
    return tokenization.load_tokenizer(str(tmp_path), **kwargs)


def ids(tokenizer, prompt, chosen, rejected):
    [pair] = tokenization.encode_pairs(tokenizer, [tokenization.render_pair(tokenizer, prompt, chosen, rejected)])
    return pair.chosen, pair.rejected, len(pair.prompt)


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
    assert tokenizer.pad_token == tokenization.PAD_TOKEN
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
        tokenization.load_tokenizer(str(tmp_path / "nothing"))


def test_messages_without_a_template_name_the_templates_to_choose_from(tmp_path):
    message = [{"role": "assistant", "content": "x"}]
    with pytest.raises(UserError, match="--chat_template_name.*chatml.*tulu.*zephyr"):
        tokenization.render_pair(load(tmp_path, make(False)), [], message, message)


def test_a_template_that_refuses_messages_gives_one_sentence(tmp_path):
    tokenizer = load(tmp_path, make(False, chat_template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UserError, match="template refuses these messages: roles must alternate"):
        tokenization.render_pair(tokenizer, [], [{"role": "assistant", "content": "x"}], [])


def test_unknown_template_name_lists_the_names():
    with pytest.raises(UserError, match="llama3"):
        tokenization.read_template("lama3")


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


@pytest.mark.parametrize("name", tokenization.template_names())
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
    before = tokenization.fingerprint(one)
    one.chat_template = TEMPLATE
    with_template = tokenization.fingerprint(one)
    one.add_tokens(["new"])
    assert len({before, with_template, tokenization.fingerprint(one)}) == 3


def test_a_template_that_prints_todays_date_prints_a_fixed_one(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tokenizer = load(tmp_path, make(False, chat_template=template))
    assert tokenization.prints_date(tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == f"{tokenization.DATE} hi"
    # saved and loaded again, by anyone, it stays that date
    tokenizer.save_pretrained(tmp_path / "saved")
    again = tokenization.load_tokenizer(str(tmp_path / "saved"))
    assert again.chat_template == tokenizer.chat_template
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == text


def test_a_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        tokenization.read_template(str(tmp_path / "latin.jinja"))
