"""Whatever a client sends becomes the token ids of training, or is refused; what was mended is counted."""

from collections import Counter

import pytest
from folders import Trained, turns

from open_rm.flags import OpeningFlags
from open_rm.scoring.opening import open_scorer
from open_rm.serving import texts
from open_rm.serving.limits import Refusal
from open_rm.serving.texts import Answered, Conversation, Ids, Reader, Text

TALK = ("How are you?", "Fine, thanks.", "And the lake?", "It looks golden.")
TEMPLATES = (
    "llama3",
    "chatml",
    "tulu",
    "zephyr",
    "simple_chat",
    "simple_concat",
    "simple_concat_with_space",
    "encoder",
)


class Opened:
    """A folder with its reader, and what that counted."""

    def __init__(self, trained: Trained, unfinished: str = "end"):
        self.trained = trained
        self.scorer = open_scorer(OpeningFlags(model=str(trained.folder)))
        self.reader = Reader(self.scorer, unfinished=unfinished)
        self.counted: Counter[str] = Counter()
        self.reader.count = lambda what, example: self.counted.update([what])

    def read(self, item) -> tuple[list[int], dict[str, int]]:
        """Its ids, and what was counted of it."""
        self.counted.clear()
        return self.reader.sequences([item])[0], dict(self.counted)


@pytest.fixture(scope="module")
def opened(toy, tmp_path_factory):
    """Folders of each template and of plain text, opened when asked for."""
    made = {}

    def get(name: str, **how) -> Opened:
        key = name, *how.values()
        if key not in made:
            folder = tmp_path_factory.mktemp("folder")
            template = None if name == "plain" else name
            made[key] = Opened(Trained(toy, folder, template=template, chat=name != "plain", **how))
        return made[key]

    return get


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_conversation_has_the_ids_of_training(opened, name):
    model = opened(name)
    assert model.read(Text(model.trained.rendered(turns(*TALK)))) == (model.trained.conversation(*TALK), {})
    assert model.read(Conversation(turns(*TALK))) == (model.trained.conversation(*TALK), {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_without_its_end_is_ended_as_in_training(opened, name):
    model = opened(name)
    text = model.trained.rendered(turns(*TALK))
    cut_off = text[: text.rindex(TALK[-1]) + len(TALK[-1])]
    assert model.read(Text(cut_off)) == (model.trained.conversation(*TALK), {"no end": 1})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plain_prompt_beside_its_answer_is_the_users_message(opened, name):
    model = opened(name)
    expected = model.trained.conversation(*TALK[:2])
    assert model.read(Answered(TALK[0], TALK[1], whole=True)) == (expected, {"plain prompt": 1})
    ended = TALK[1] + model.reader.ending
    assert model.read(Answered(TALK[0], ended)) == (expected, {"plain prompt": 1})
    assert model.read(Answered(turns(TALK[0]), ended)) == (expected, {})
    assert model.read(Answered(turns(TALK[0]), TALK[1])) == (expected, {"no end": 1})


@pytest.mark.parametrize("name", ["llama3", "chatml", "tulu", "zephyr"])
def test_a_rendered_prompt_goes_before_its_answer(opened, name):
    model = opened(name)
    prompt = model.trained.rendered(turns(*TALK[:3]), add_generation_prompt=True)
    expected = model.trained.conversation(*TALK)
    assert model.read(Answered(prompt, TALK[3] + model.reader.ending)) == (expected, {})
    assert model.read(Answered(prompt, TALK[3], whole=True)) == (expected, {})
    assert model.read(Answered(prompt, TALK[3])) == (expected, {"no end": 1})


def test_a_text_that_lost_its_bos_gets_it_back_and_a_second_one_is_taken_away(opened):
    model = opened("llama3")
    text, expected = model.trained.rendered(turns(*TALK)), model.trained.conversation(*TALK)
    assert text.startswith("<|bos|>")
    bare = text.removeprefix("<|bos|>")
    assert model.read(Text(bare)) == (expected, {"no BOS": 1})
    assert model.read(Text("<|bos|>" + text)) == (expected, {"two BOS": 1})
    prompt, answer = bare[: bare.rindex(TALK[-1])], bare[bare.rindex(TALK[-1]) :]
    assert model.read(Answered(prompt, answer)) == (expected, {"no BOS": 1})
    # An encoder's template writes nothing behind BOS, and every conversation has it.
    model = opened("encoder")
    text = model.trained.rendered(turns(*TALK)).removeprefix("<|bos|>")
    assert model.read(Text(text)) == (model.trained.conversation(*TALK), {"no BOS": 1})


def test_bos_is_given_to_no_template_that_writes_none(opened):
    model = opened("tulu")
    assert model.reader.bos == ""
    ids, _ = model.read(Text("Hello.<|eos|>"))
    assert ids == model.scorer.encode_texts(["Hello.<|eos|>"])[0]


def test_a_policys_end_becomes_the_templates(opened, toy, tmp_path):
    model = opened("chatml")
    text, expected = model.trained.rendered(turns(*TALK)), model.trained.conversation(*TALK)
    assert model.read(Text(text + "\n")) == (expected, {"part of the end": 1})
    with_line = tmp_path / "with_line.jinja"  # as Qwen writes it: a line break after the end of the last turn too
    with_line.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model = opened(str(with_line))
    text, expected = model.trained.rendered(turns(*TALK)), model.trained.conversation(*TALK)
    assert text.endswith("<|im_end|>\n")
    assert model.read(Text(text.rstrip())) == (expected, {"part of the end": 1})


def test_a_reward_token_is_part_of_the_end(opened):
    model = opened("tulu", reward_token="<|reward|>")
    text, expected = model.trained.rendered(turns(*TALK)), model.trained.conversation(*TALK)
    assert model.read(Text(text)) == (expected, {})
    assert model.read(Text(text.removesuffix("<|reward|>"))) == (expected, {"part of the end": 1})
    assert model.read(Text(text.removesuffix("<|eos|><|reward|>"))) == (expected, {"no end": 1})


def test_an_end_of_several_tokens_is_written_once_wherever_the_text_stops_in_it(opened, tmp_path):
    with_line = tmp_path / "with_line.jinja"
    with_line.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|eos|>\n' }}{% endfor %}"
    )
    model = opened(str(with_line), reward_token="<|reward|>")
    text, expected = model.trained.rendered(turns(*TALK)), model.trained.conversation(*TALK)
    bare = text.removesuffix("<|eos|>\n<|reward|>")
    assert bare != text
    for end in ("<|eos|>", "<|eos|>\n", "<|eos|>\n<|reward|>\n", "<|eos|>\n\n"):
        assert model.read(Text(bare + end)) == (expected, {"part of the end": 1})


def test_a_prompt_that_another_template_wrote_is_no_users_message(opened):
    model = opened("llama3")
    for prompt in ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "[INST] Hi [/INST]", "Hi<|eos|>"):
        expected = model.scorer.encode_texts([prompt + "Yes." + model.reader.ending])[0]
        assert model.read(Answered(prompt, "Yes.", whole=True)) == (expected, {"another template": 1})
    assert model.read(Answered("Think in <think> tags.", "Yes.", whole=True))[1] == {"plain prompt": 1}


def test_todays_date_is_the_one_of_training(opened, tmp_path):
    dated = tmp_path / "dated.jinja"
    dated.write_text(
        "{{ bos_token + '<|system|>\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% endfor %}"
    )
    model = opened(str(dated))
    text, expected = model.trained.rendered(turns(*TALK)), model.trained.conversation(*TALK)
    assert "Today Date: 26 Jul 2024\n" in text and model.read(Text(text)) == (expected, {})
    todays = text.replace("26 Jul 2024", "3 December 2026")
    assert model.read(Text(todays)) == (expected, {"another date": 1})
    bare = todays.removeprefix("<|bos|>")
    assert model.read(Text(bare)) == (expected, {"another date": 1, "no BOS": 1})
    prompt = todays.removesuffix(TALK[-1] + "<|eos|>")
    assert model.read(Answered(prompt, TALK[-1], whole=True)) == (expected, {"another date": 1})


def test_what_is_too_long_is_refused_before_the_rest_is_encoded(opened, monkeypatch):
    model = opened("llama3")
    encode, encoded = model.scorer.encode_texts, []
    monkeypatch.setattr(model.scorer, "encode_texts", lambda texts: encoded.extend(texts) or encode(texts))
    with pytest.raises(Refusal, match="text 0: has 100001 characters"):
        model.reader.sequences([Answered("word " * 20000, "a", whole=True)] * 1000)
    with pytest.raises(Refusal, match="text 0: has .* characters"):
        model.reader.sequences([Conversation([*turns("word " * 20000), *turns("a", "b")[1:]])])
    assert encoded == []
    monkeypatch.setattr(texts, "SLICE", 10**5)
    prompt = model.trained.rendered(turns("word " * 6000), add_generation_prompt=True)
    with pytest.raises(Refusal, match="text 1 has .* tokens, and the model takes at most 2048"):
        model.reader.sequences([Text("a"), *[Answered(prompt, "a", whole=True)] * 1000])
    assert len(encoded) < 10
    counted = [Text("a"), *[Text("word " * 300)] * 100, Text("")]  # in several slices
    with pytest.raises(Refusal, match="text 101: is empty"):
        model.reader.sequences(counted)


def test_what_would_fail_the_others_texts_is_refused_alone(opened, monkeypatch):
    model = opened("tulu", reward_token="<|reward|>")
    text = model.trained.rendered(turns(*TALK))
    pad = model.scorer.tokenizer.pad_token
    for bad, sentence in (
        (Text(text.replace("Fine", pad)), "contains the pad token"),
        (Conversation(turns("a", pad)), "contains the pad token"),
        (Text(text.replace("Fine", "<|reward|>")), "contains the reward token"),
        (Conversation(turns("<|reward|>", "b")), "contains the reward token"),
    ):
        with pytest.raises(Refusal, match=f"text 1: .*{sentence}"):
            model.reader.sequences([Text(text), bad])
    monkeypatch.setattr(model.scorer, "rows", 5)
    with pytest.raises(Refusal, match="text 0: has the token id .* below 5"):
        model.read(Text(text))
    monkeypatch.setattr(model.scorer, "encode_texts", lambda texts: [[] for _ in texts])
    with pytest.raises(Refusal, match="text 0: has no tokens"):
        model.read(Text(text))


def test_plain_text_has_the_ids_of_training(opened):
    model = opened("plain")
    expected = model.trained.ids("Say: ", "yes")
    assert model.read(Text("Say: yes<|eos|>")) == (expected, {})
    assert model.read(Text("Say: yes")) == (expected, {"no end": 1})
    assert model.read(Answered("Say: ", "yes", whole=True)) == (expected, {})
    assert model.read(Answered("Say: ", "yes<|eos|>")) == (expected, {})
    with pytest.raises(Refusal, match="plain text and has no chat template"):
        model.read(Conversation(turns("a", "b")))


def test_another_templates_text_is_scored_as_it_is_and_counted(opened):
    model, other = opened("llama3"), opened("tulu")
    text = other.trained.rendered(turns(*TALK)).removesuffix("<|eos|>") + "<|eot_id|>"
    assert model.read(Text(text)) == (model.scorer.encode_texts([text])[0], {"another template": 1})


def test_an_empty_answer_is_scored(opened):
    """A policy that stops at once is no reason to stop its training."""
    model = opened("llama3")
    expected = model.scorer.encode_texts([model.trained.rendered(turns("Hi", ""))])[0]
    assert model.read(Answered(turns("Hi"), model.reader.ending)) == (expected, {})
    assert model.read(Conversation(turns("Hi", ""))) == (expected, {})


def test_token_ids_are_scored_as_they_are_or_refused(opened):
    model = opened("llama3")
    ids = model.trained.conversation(*TALK)
    assert model.read(Ids(ids)) == (ids, {})
    assert model.read(Ids(ids[1:])) == (ids[1:], {"other ids": 1})
    assert model.read(Ids(ids[:-1])) == (ids[:-1], {"other ids": 1})
    for wrong in ([*ids, 10**6], [-1, *ids], [*ids, model.scorer.tokenizer.pad_token_id]):
        with pytest.raises(Refusal, match="text 0: (token id|holds the padding token)"):
            model.read(Ids(wrong))


def test_what_cannot_be_scored_is_refused_by_its_number(opened):
    model = opened("llama3")
    good = Conversation(turns("a", "b"))
    for bad, sentence in (
        (Text(""), "is empty"),
        (Text("\ud800"), "surrogate"),
        (Answered("a", "\udfff"), "surrogate"),
        (Answered("", "a"), "empty prompt"),
        (Conversation([]), "empty"),
        (Conversation(turns("\ud800", "b")), "surrogate"),
        (Conversation(turns("a", "b"), {"documents": [{"text": "\ud800"}]}), "surrogate"),
        (Conversation(turns("a")), "ends with a message of user"),
        (Conversation([{"role": "user"}]), "not a message"),
        (Conversation([{"role": "wizard", "content": "a"}]), "wizard"),
    ):
        with pytest.raises(Refusal, match=f"text 1: .*{sentence}") as caught:
            model.reader.sequences([good, bad])
        assert caught.value.status == 400


def test_unfinished_texts_are_refused_where_that_was_asked_for(opened):
    model = Opened(opened("llama3").trained, unfinished="refuse")
    text = model.trained.rendered(turns(*TALK))
    assert model.read(Text(text)) == (model.trained.conversation(*TALK), {})
    for bad in (Text(text.removesuffix("<|eot_id|>")), Answered(turns("a"), "b"), Ids([5, 6])):
        with pytest.raises(Refusal, match="text 0: (does not end|ends) with"):
            model.read(bad)
    assert model.read(Answered(turns("a"), "b", whole=True))[0] == model.trained.conversation("a", "b")
