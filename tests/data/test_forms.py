"""One set of preferences in every accepted form, file and folder: the same token ids, written here by hand.

Also what belongs to a form: margins, ties, how many rows a mixture takes, truncation, what the chat template is given.
"""

import csv
import dataclasses
import functools
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import load_model, read_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from open_rm.batching.layouts import lay_out
from open_rm.data.reading import make_reading
from open_rm.data.rows import read_row
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import DataFlags

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<user>",
    "<bot>",
    "<sys>",
    "hi",
    "you",
    "why",
    "rain",
    "yes",
    "no",
    "clouds",
    "Human:",
]
WORDS += ["Assistant:", "kind", "<tool>", "sums"]
UNK, BOS, EOS, USER, BOT, SYS, HI, YOU, WHY, RAIN, YES, NO, CLOUDS, HUMAN, ASSISTANT, KIND, TOOL, SUMS = range(18)
# One end token, after the answer that is scored; BOS where the tokenizer has one.
TEMPLATE = (
    "{% if bos_token %}{{ bos_token + ' ' }}{% endif %}"
    "{% if mood is defined %}{{ mood + ' ' }}{% endif %}"
    "{% for tool in tools or [] %}{{ '<tool> ' + tool['function']['name'] + ' ' }}{% endfor %}"
    "{% for m in messages %}{{ {'user': '<user>', 'assistant': '<bot>', 'system': '<sys>'}[m['role']] + ' ' }}"
    "{{ m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said before the answer (user and assistant in turn), the two answers, and the ids, without BOS.

    The ids of a conversation are those of TEMPLATE, those of the text those of "Human: ... Assistant: ...".
    """

    said: tuple[str, ...]
    chosen: str
    rejected: str
    chat_ids: tuple[list[int], list[int]]
    text_ids: tuple[list[int], list[int]]

    @property
    def context(self) -> list[dict]:
        roles = ("user", "assistant") * len(self.said)
        return [{"role": role, "content": said} for role, said in zip(roles, self.said, strict=False)]

    @property
    def better(self) -> list[dict]:
        return [{"role": "assistant", "content": self.chosen}]

    @property
    def worse(self) -> list[dict]:
        return [{"role": "assistant", "content": self.rejected}]

    def text(self, lead: str) -> tuple[str, str, str]:
        """(prompt, chosen, rejected); a lead of two newlines makes it HH's own form."""
        names = ("Human", "Assistant") * len(self.said)
        turns = [f"{name}: {said}" for name, said in zip(names, self.said, strict=False)]
        return lead + "\n\n".join([*turns, "Assistant:"]), f" {self.chosen}", f" {self.rejected}"


CONVERSATIONS = [
    Conversation(
        ("hi you",),
        "yes yes",
        "no",
        ([USER, HI, YOU, BOT, YES, YES, EOS], [USER, HI, YOU, BOT, NO, EOS]),
        ([HUMAN, HI, YOU, ASSISTANT, YES, YES, EOS], [HUMAN, HI, YOU, ASSISTANT, NO, EOS]),
    ),
    Conversation(
        ("hi", "hi you", "why"),
        "yes",
        "no clouds",
        (
            [USER, HI, BOT, HI, YOU, USER, WHY, BOT, YES, EOS],
            [USER, HI, BOT, HI, YOU, USER, WHY, BOT, NO, CLOUDS, EOS],
        ),
        (
            [HUMAN, HI, ASSISTANT, HI, YOU, HUMAN, WHY, ASSISTANT, YES, EOS],
            [HUMAN, HI, ASSISTANT, HI, YOU, HUMAN, WHY, ASSISTANT, NO, CLOUDS, EOS],
        ),
    ),
    Conversation(  # the answers begin alike
        ("rain",),
        "yes clouds",
        "yes no",
        ([USER, RAIN, BOT, YES, CLOUDS, EOS], [USER, RAIN, BOT, YES, NO, EOS]),
        ([HUMAN, RAIN, ASSISTANT, YES, CLOUDS, EOS], [HUMAN, RAIN, ASSISTANT, YES, NO, EOS]),
    ),
    Conversation(  # one answer begins the other
        ("why rain",),
        "clouds",
        "clouds why",
        ([USER, WHY, RAIN, BOT, CLOUDS, EOS], [USER, WHY, RAIN, BOT, CLOUDS, WHY, EOS]),
        ([HUMAN, WHY, RAIN, ASSISTANT, CLOUDS, EOS], [HUMAN, WHY, RAIN, ASSISTANT, CLOUDS, WHY, EOS]),
    ),
]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a conversation is written as a row, the form's name in the report, and the data flags that read it.

    row: (number of the row, context, chosen, rejected) for messages, (number, prompt, chosen, rejected) for text.
    """

    name: str
    row: Callable[..., dict]
    flags: dict = dataclasses.field(default_factory=dict)
    lead: str = ""


def both(context, *sides):
    return [context + side for side in sides]


def labelled(i, prompt, first, second, name="response_{}"):
    """The better one is a in even rows and b in odd ones."""
    a, b = (first, second) if i % 2 == 0 else (second, first)
    winner = (name.format("ab"[i % 2])).upper() if i > 1 else name.format("ab"[i % 2])
    return {"prompt": prompt, "response_a": a, "response_b": b, "winner": winner}


def ultra_feedback(_, context, better, worse):
    """The columns of UltraFeedback, binarized: `messages` is there too, and repeats chosen."""
    chosen, rejected = both(context, better, worse)
    prompt = context[-1]["content"]
    scores = {"score_chosen": 8.5, "score_rejected": 3.0}
    return {"prompt": prompt, "prompt_id": "f0", "chosen": chosen, "rejected": rejected, "messages": chosen, **scores}


CHAT_FORMS = {
    "prompt given": Form(
        "messages, prompt given", lambda _, c, a, b: {"prompt": c, "chosen": a, "rejected": b}
    ),
    "prompt given, answers as text": Form(
        "messages, prompt given",
        lambda _, c, a, b: {"prompt": c, "chosen": a[0]["content"], "rejected": b[0]["content"]},
    ),
    "prompt given and repeated": Form(
        "messages, prompt given", lambda _, c, a, b: {"prompt": c, "chosen": c + a, "rejected": c + b}
    ),
    "prompt implied": Form("messages, prompt implied", lambda _, c, a, b: {"chosen": c + a, "rejected": c + b}),
    "prompt null": Form(
        "messages, prompt implied", lambda _, c, a, b: {"prompt": None, "chosen": c + a, "rejected": c + b}
    ),
    "rejected_messages": Form(
        "messages + rejected_messages", lambda _, c, a, b: {"messages": c + a, "rejected_messages": c + b}
    ),
    "rejected_response": Form(
        "messages + rejected_response",
        lambda _, c, a, b: {"messages": c + a, "rejected_response": b[0]["content"]},
    ),
    "UltraFeedback": Form("ultrafeedback_binarized", ultra_feedback),
    "ranked with scores": Form(
        "ranked responses", lambda i, c, a, b: {"prompt": c, "responses": [b, a], "scores": [-1.5, i]}
    ),
    "ranked in order": Form("ranked responses", lambda _, c, a, b: {"prompt": c, "responses": [a, b]}),
    "ranked, answers as text": Form(
        "ranked responses",
        lambda _, c, a, b: {"prompt": c, "responses": [b[0]["content"], a[0]["content"]], "scores": [1, 2]},
    ),
    "ranked, whole conversations": Form(
        "ranked responses", lambda _, c, a, b: {"responses": both(c, b, a), "scores": [0.1, 0.2]}
    ),
    "labelled": Form("labelled A/B", labelled),
    "labelled, answers as text": Form(
        "labelled A/B", lambda i, c, a, b: labelled(i, c, a[0]["content"], b[0]["content"], "model_{}")
    ),
    "labelled, whole conversations": Form(
        "labelled A/B", lambda i, c, a, b: labelled(i, None, *both(c, a, b), "{}")
    ),
    "other columns": Form(
        "messages, prompt given",
        lambda _, c, a, b: {"question": c, "better": a, "worse": b, "chosen_by": "me"},
        {"column_map": ["prompt=question", "chosen=better", "rejected=worse"]},
    ),
}  # fmt: skip

TEXT_FORMS = {
    "prompt given": Form(
        "text, prompt given", lambda _, p, a, b: {"prompt": p, "chosen": a, "rejected": b}
    ),
    "prompt given and repeated": Form(
        "text, prompt given", lambda _, p, a, b: {"prompt": p, "chosen": p + a, "rejected": p + b}
    ),
    "prompt implied": Form("text, prompt implied", lambda _, p, a, b: {"chosen": p + a, "rejected": p + b}),
    "prompt empty": Form(
        "text, prompt implied", lambda _, p, a, b: {"prompt": "", "chosen": p + a, "rejected": p + b}
    ),
    "ranked with scores": Form(
        "ranked responses", lambda i, p, a, b: {"prompt": p, "responses": [b, a], "scores": [0, i + 1]}
    ),
    "ranked in order": Form("ranked responses", lambda _, p, a, b: {"prompt": p, "responses": [a, b]}),
    "ranked, whole texts": Form("ranked responses", lambda _, p, a, b: {"responses": [p + a, p + b]}),
    "labelled": Form("labelled A/B", labelled),
    "labelled, whole texts": Form("labelled A/B", lambda i, p, a, b: labelled(i, None, p + a, p + b, "{}")),
    "other columns": Form(
        "text, prompt given",
        lambda _, p, a, b: {"question": p, "better": a, "worse": b},
        {"column_map": ["prompt=question", "chosen=better", "rejected=worse"]},
    ),
    "HH": Form("HH text", lambda _, p, a, b: {"chosen": p + a, "rejected": p + b}, lead="\n\n"),
    "HH, prompt given": Form(
        "text, prompt given", lambda _, p, a, b: {"prompt": p, "chosen": a, "rejected": b}, lead="\n\n"
    ),
}  # fmt: skip

HH_AS_MESSAGES = Form("HH text", TEXT_FORMS["HH"].row, {"parse_hh": True}, lead="\n\n")


def chat_rows(form: Form) -> list[dict]:
    return [form.row(i, c.context, c.better, c.worse) for i, c in enumerate(CONVERSATIONS)]


def text_rows(form: Form) -> list[dict]:
    return [form.row(i, *c.text(form.lead)) for i, c in enumerate(CONVERSATIONS)]


@functools.cache
def words_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """A word is a token. With BOS, the template writes it in conversations and the post-processor adds it to text."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "unk_token": "<unk>"}
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        special["bos_token"] = "<s>"
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special).save_pretrained(folder)
        return load_tokenizer(folder)


def load(source, tokenizer, cache_dir, *, amount="1.0", split="train", **flags):
    mixer = source if isinstance(source, list) else [source, amount]
    return read_pairs(mixer, tokenizer, splits=[split], dataset_local_cache_dir=str(cache_dir), **flags)


def ids(data) -> list[tuple[list[int], list[int]]]:
    return [(chosen.tolist(), rejected.tolist()) for chosen, rejected in data.pairs(range(len(data)))]


def expected(name: str, adds_bos: bool = False) -> list[tuple[list[int], list[int]]]:
    """The hand-written ids; name: chat_ids or text_ids."""
    bos = [BOS] if adds_bos else []
    return [tuple(bos + side for side in getattr(conversation, name)) for conversation in CONVERSATIONS]


def clean_facts(form: str, rows: int) -> dict:
    """What the facts of a source say where nothing is lost."""
    counts = {"rows": rows, "taken": rows, "kept": rows, "ties": 0, "truncated": 0, "promptless": 0}
    return counts | {"forms": {form: rows}, "dropped": {}, "skipped": []}


def assert_facts(data, wanted: dict):
    [facts] = data.facts
    assert {name: facts[name] for name in wanted} == wanted


# ---- forms


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("form", [*CHAT_FORMS, "HH parsed"])
def test_messages_in_every_form_give_the_ids_written_by_hand(write_rows, tmp_path, form, adds_bos):
    form = CHAT_FORMS.get(form, HH_AS_MESSAGES)
    rows = text_rows(form) if form is HH_AS_MESSAGES else chat_rows(form)
    data = load(write_rows(rows), words_tokenizer(adds_bos), tmp_path / "cache", **form.flags)
    assert ids(data) == expected("chat_ids", adds_bos)
    for side in (side for pair in ids(data) for side in pair):
        assert (side.count(BOS), side.count(EOS), side[-1]) == (int(adds_bos), 1, EOS)
    assert data.chat
    assert_facts(data, clean_facts(form.name, 4))
    # what both sides answer, with the answer's own opening: <user> ... <bot>
    assert data.table.prompt_length.tolist() == [adds_bos + n for n in (4, 8, 3, 4)]
    assert np.isnan(data.dataset["margin"][:]).all()


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("form", TEXT_FORMS)
def test_text_in_every_form_gives_the_ids_written_by_hand(write_rows, tmp_path, form, adds_bos):
    form = TEXT_FORMS[form]
    data = load(write_rows(text_rows(form)), words_tokenizer(adds_bos), tmp_path / "cache", **form.flags)
    assert ids(data) == expected("text_ids", adds_bos)
    for side in (side for pair in ids(data) for side in pair):
        assert (side.count(BOS), side.count(EOS), side[-1]) == (int(adds_bos), 1, EOS)
    assert not data.chat
    assert_facts(data, clean_facts(form.name, 4))


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("prompt_given", [False, True])
@pytest.mark.parametrize("name", ["chat_ids", "text_ids"])
def test_token_ids_are_taken_as_they_are(write_rows, tmp_path, name, prompt_given, adds_bos):
    rows = [{"chosen_input_ids": a, "rejected_input_ids": b} for a, b in expected(name, adds_bos)]
    lengths = [adds_bos + n for n in (4, 8, 3, 4)]
    if prompt_given:
        rows = [row | {"prompt_input_ids": row["chosen_input_ids"][:n]} for row, n in zip(rows, lengths, strict=True)]
    data = load(write_rows(rows), words_tokenizer(adds_bos), tmp_path / "cache")
    assert ids(data) == expected(name, adds_bos)
    assert_facts(data, clean_facts("token ids", 4))
    if prompt_given:
        assert data.table.prompt_length.tolist() == lengths


def test_all_columns_of_the_cache_are_the_same_whatever_the_form(write_rows, tmp_path):
    """Lengths and content ids decide how steps are planned: also they must not depend on how rows are written."""
    tables = []
    for name, form in CHAT_FORMS.items():
        data = load(write_rows(chat_rows(form), f"{name}.jsonl"), words_tokenizer(True), tmp_path, **form.flags)
        tables.append(data.table)
    names = {field.name for field in dataclasses.fields(tables[0])}
    for name in names - {"list_id", "prompt_order"}:  # a list is known by its place, and the order is found later
        columns = [getattr(table, name).tolist() for table in tables]
        assert all(column == columns[0] for column in columns), name


def test_system_prompt_and_a_prompt_of_text_beside_it(write_rows, tmp_path):
    system = [{"role": "system", "content": "kind"}]
    row = {"chosen": system + CONVERSATIONS[0].context + CONVERSATIONS[0].better}
    row["rejected"] = system + CONVERSATIONS[0].context + CONVERSATIONS[0].worse
    rows = [row, row | {"prompt": "hi you"}, row | {"prompt": system + CONVERSATIONS[0].context}]
    data = load(write_rows(rows), words_tokenizer(False), tmp_path / "cache")
    pair = ([SYS, KIND, USER, HI, YOU, BOT, YES, YES, EOS], [SYS, KIND, USER, HI, YOU, BOT, NO, EOS])
    assert ids(data) == [pair] * 3
    assert_facts(data, {"forms": {"messages, prompt implied": 1, "messages, prompt given": 2}})


def test_rewards_are_equal_whatever_the_form(toy, tokenizer, write_rows, tmp_path):
    """The toy's tokenizer knows bytes, so here the forms are told apart by every space and newline they would add."""
    reward_model = load_model(toy / "model", tokenizer)

    def rewards(rows, flags):
        data = load(write_rows(rows), tokenizer, tmp_path / "cache", **flags)
        pairs = data.pairs(range(len(data)))
        batch = lay_out("padded", pairs, pad_token_id=tokenizer.pad_token_id, prompt_ids=range(len(pairs)))
        with torch.no_grad():
            return ids(data), reward_model(**batch.inputs(torch.device("cpu")))

    leads = {lead: [form for form in TEXT_FORMS.values() if form.lead == lead] for lead in ("", "\n\n")}
    families = [
        [(chat_rows(form), form.flags) for form in CHAT_FORMS.values()],
        *([(text_rows(form), form.flags) for form in forms] for forms in leads.values()),
    ]
    families[0].append((text_rows(HH_AS_MESSAGES), HH_AS_MESSAGES.flags))
    for family in families:
        pairs, reference = rewards(*family[0])
        family.append(([{"chosen_input_ids": a, "rejected_input_ids": b} for a, b in pairs], {}))
        assert len(set(reference.tolist())) == 8
        for rows, flags in family[1:]:
            same, result = rewards(rows, flags)
            assert same == pairs, rows[0]
            assert torch.equal(result, reference), rows[0]


def test_ranked_responses_give_all_pairs_and_equal_scores_are_ties(write_rows, tmp_path):
    row = {"prompt": "hi ", "responses": ["yes", "no", "clouds", "rain"], "scores": [3, 1, 3, 2.5]}
    data = load(write_rows([row]), words_tokenizer(False), tmp_path / "cache")
    better = [(YES, RAIN), (YES, NO), (CLOUDS, RAIN), (CLOUDS, NO), (RAIN, NO)]
    assert sorted(ids(data)) == sorted(([HI, a, EOS], [HI, b, EOS]) for a, b in better)
    assert_facts(data, {"rows": 1, "taken": 1, "kept": 5, "ties": 1, "forms": {"ranked responses": 1}})
    del row["scores"]
    in_order = load(write_rows([row]), words_tokenizer(False), tmp_path / "cache")
    order = [(YES, NO), (YES, CLOUDS), (YES, RAIN), (NO, CLOUDS), (NO, RAIN), (CLOUDS, RAIN)]
    assert sorted(ids(in_order)) == sorted(([HI, a, EOS], [HI, b, EOS]) for a, b in order)


def test_ties_of_labelled_rows_are_counted(write_rows, tmp_path):
    row = {"prompt": "hi ", "response_a": "yes", "response_b": "no"}
    winners = ["tie", "model_b", "TIE", "tie (bothbad)", "A", "Response_A", "Tie"]
    data = load(write_rows([row | {"winner": winner} for winner in winners]), words_tokenizer(False), tmp_path)
    yes, no = [HI, YES, EOS], [HI, NO, EOS]
    assert ids(data) == [(no, yes), (yes, no), (yes, no)]
    assert_facts(data, {"rows": 7, "taken": 7, "kept": 3, "ties": 4, "forms": {"labelled A/B": 7}})
    with pytest.raises(UserError, match="no pairs"):
        load(write_rows([row | {"winner": "tie"}] * 2), words_tokenizer(False), tmp_path)


def test_read_row_says_the_form_and_keeps_the_row_as_it_was():
    for form in [*CHAT_FORMS.values(), *TEXT_FORMS.values()]:
        for row in chat_rows(form) if form in CHAT_FORMS.values() else text_rows(form):
            before = json.dumps(row)
            result = read_row(row, make_reading(DataFlags(**form.flags)))
            assert (result.form, len(result.pairs), result.ties) == (form.name, 1, 0)
            assert json.dumps(row) == before


# ---- sources


def write_lines(path: Path, rows) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_array(path: Path, rows) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_csv(path: Path, rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def write_arrow(path: Path, rows, *, stream: bool = True) -> Path:
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def save_dataset(path: Path, rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    return path


def save_dataset_dict(path: Path, rows) -> Path:
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[::-1])}
    datasets.DatasetDict(parts).save_to_disk(path)
    return path


def shards(writer, folder: Path, names: list[str], rows) -> Path:
    half = len(rows) // 2
    writer(folder / names[0], rows[:half])
    writer(folder / names[1], rows[half:])
    return folder


def split_files(folder: Path, rows) -> Path:
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "test.jsonl", rows[::-1])
    return folder


PARQUET_SHARDS = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
# name: (function that writes the rows into a folder and returns the mixer's name, rows' places inside it)
SOURCES = {
    "json": (lambda folder, rows: write_array(folder / "a.json", rows), "a.json: row {}"),
    "json lines named json": (lambda folder, rows: write_lines(folder / "a.json", rows), "a.json:{}"),
    "jsonl": (lambda folder, rows: write_lines(folder / "a.jsonl", rows), "a.jsonl:{}"),
    "jsonl.gz": (lambda folder, rows: write_lines(folder / "a.jsonl.gz", rows), "a.jsonl.gz:{}"),
    "csv": (lambda folder, rows: write_csv(folder / "a.csv", rows), None),
    "parquet": (lambda folder, rows: write_parquet(folder / "a.parquet", rows), "a.parquet: row {}"),
    "arrow stream": (lambda folder, rows: write_arrow(folder / "a.arrow", rows), "a.arrow: row {}"),
    "arrow file": (lambda folder, rows: write_arrow(folder / "a.arrow", rows, stream=False), "a.arrow: row {}"),
    "saved dataset": (lambda folder, rows: save_dataset(folder / "saved", rows), None),
    "saved datasets": (lambda folder, rows: save_dataset_dict(folder / "saved", rows), None),
    "glob": (lambda folder, rows: shards(write_lines, folder, ["x-1.jsonl", "x-2.jsonl"], rows) / "x-*.jsonl", None),
    "glob of gz": (lambda folder, rows: shards(write_lines, folder, ["1.jsonl.gz", "2.jsonl.gz"], rows) / "*.gz", None),
    "folder of a split": (lambda folder, rows: split_files(folder / "set", rows), "train.jsonl:{}"),
    "folder of shards": (lambda folder, rows: shards(write_parquet, folder / "set", PARQUET_SHARDS, rows), None),
}


@pytest.mark.parametrize("form", ["prompt given", "HH"])
@pytest.mark.parametrize("source", SOURCES)
def test_text_comes_the_same_from_every_source(tmp_path, source, form):
    write, place = SOURCES[source]
    data = load(write(tmp_path, text_rows(TEXT_FORMS[form])), words_tokenizer(True), tmp_path / "cache")
    assert ids(data) == expected("text_ids", adds_bos=True)
    assert_facts(data, clean_facts(TEXT_FORMS[form].name, 4))
    if place:
        for row, found in enumerate(data.places(range(4)), start=1):
            assert found.endswith(place.format(row))


@pytest.mark.parametrize("form", ["prompt given", "UltraFeedback", "ranked with scores"])
@pytest.mark.parametrize("source", [name for name in SOURCES if name != "csv"])
def test_messages_come_the_same_from_every_source(tmp_path, source, form):
    write, _ = SOURCES[source]
    data = load(write(tmp_path, chat_rows(CHAT_FORMS[form])), words_tokenizer(False), tmp_path / "cache")
    assert ids(data) == expected("chat_ids")
    assert_facts(data, clean_facts(CHAT_FORMS[form].name, 4))


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "csv"])
def test_token_ids_come_the_same_from_every_source(tmp_path, source):
    rows = [{"chosen_input_ids": a, "rejected_input_ids": b} for a, b in expected("chat_ids")]
    data = load(SOURCES[source][0](tmp_path, rows), words_tokenizer(False), tmp_path / "cache")
    assert ids(data) == expected("chat_ids")


@pytest.mark.parametrize("source", ["saved datasets", "folder of a split"])
def test_a_folder_gives_the_split_that_is_asked_for(tmp_path, source):
    source = SOURCES[source][0](tmp_path, chat_rows(CHAT_FORMS["prompt given"]))
    data = load(source, words_tokenizer(False), tmp_path / "cache", split="test")
    assert ids(data) == expected("chat_ids")[::-1]


def test_places_of_shards_name_the_shard(tmp_path):
    rows = chat_rows(CHAT_FORMS["prompt given"])
    data = load(SOURCES["glob"][0](tmp_path, rows), words_tokenizer(False), tmp_path / "cache")
    assert [place.rpartition("/")[2] for place in data.places([0, 1, 2, 3])] == [
        "x-1.jsonl:1", "x-1.jsonl:2", "x-2.jsonl:1", "x-2.jsonl:2"
    ]  # fmt: skip
    data = load(SOURCES["folder of shards"][0](tmp_path, rows), words_tokenizer(False), tmp_path / "cache")
    first, second = PARQUET_SHARDS
    assert [place.rpartition("/")[2] for place in data.places([3, 0])] == [f"{second}: row 2", f"{first}: row 1"]


def test_a_csv_field_may_hold_commas_quotes_and_newlines(write_rows, tmp_path, tokenizer):
    rows = [
        {"chosen": 'He said, "well";\nand left,', "rejected": ""},
        {"chosen": "été, plain", "rejected": "x" * 200_000},
        {"chosen": "kept", "rejected": "for its line"},
    ]
    rows[0]["rejected"] = rows[0]["chosen"] + "\r\nnot"
    from_csv = load(write_csv(tmp_path / "a.csv", rows), tokenizer, tmp_path / "cache", max_token_length=300_000)
    from_lines = load(write_rows(rows), tokenizer, tmp_path / "cache", max_token_length=300_000)
    assert ids(from_csv) == ids(from_lines)
    simple = load(write_csv(tmp_path / "b.csv", rows[2:] * 2), tokenizer, tmp_path / "cache")
    assert [place.rpartition("/")[2] for place in simple.places([0, 1])] == ["b.csv:2", "b.csv:3"]


def test_processes_and_blocks_change_nothing(tmp_path):
    """More rows than one block holds, some malformed, some long, over two files; one process or two."""
    good = chat_rows(CHAT_FORMS["prompt given"])
    rows = [good[i % 4] for i in range(2503)]
    rows[7] = rows[1500] = {"chosen": "lonely"}
    rows[1200] = good[0] | {"chosen": [{"role": "assistant", "content": "why " * 600}]}
    source = shards(write_lines, tmp_path, ["x-1.jsonl", "x-2.jsonl"], rows) / "x-*.jsonl"
    results = [load(source, words_tokenizer(True), tmp_path / f"cache{n}", num_proc=n, skip_bad_rows=2) for n in (1, 2)]
    one = results[0]
    assert len(one) == 2500
    for other in results[1:]:
        assert ids(other) == ids(one)
        assert other.places(range(len(other))) == one.places(range(len(one)))
        assert other.facts == one.facts
        assert other.lines == one.lines
    assert [row["place"].rpartition("/")[2] for row in one.facts[0]["skipped"]] == ["x-1.jsonl:8", "x-2.jsonl:250"]
    assert one.facts[0]["dropped"]["a side > 512 tokens"]["first"].endswith("x-1.jsonl:1201")


# ---- margins and mixing


def margins(data) -> list[float | None]:
    values = np.array(data.dataset["margin"][:], dtype=np.float32)
    return [None if np.isnan(value) else float(value) for value in values]


def test_margins_of_a_column(write_rows, tmp_path):
    row = {"prompt": "hi ", "chosen": "yes", "rejected": "no"}
    rows = [row | {"margin": 1.5}, row, row | {"margin": None}, row | {"margin": 2}, row | {"margin": 0}]
    data = load(write_rows(rows), words_tokenizer(False), tmp_path / "cache")
    assert margins(data) == [1.5, None, None, 2.0, 0.0]
    mapped = [{"better_by": 0.25, **row}] * 2
    data = load(write_rows(mapped), words_tokenizer(False), tmp_path / "cache", column_map=["margin=better_by"])
    assert margins(data) == [0.25] * 2


def test_margins_of_a_csv_column(tmp_path):
    row = {"prompt": "hi ", "chosen": "yes", "rejected": "no"}
    path = write_csv(tmp_path / "a.csv", [row | {"margin": "0.5"}, row | {"margin": ""}])
    assert margins(load(path, words_tokenizer(False), tmp_path / "cache")) == [0.5, None]


def test_margins_from_two_columns(write_rows, tmp_path):
    columns = ["score_chosen", "score_rejected"]
    path = write_rows(chat_rows(CHAT_FORMS["UltraFeedback"]))
    assert margins(load(path, words_tokenizer(False), tmp_path, margin_from=columns)) == [5.5] * 4
    assert margins(load(path, words_tokenizer(False), tmp_path)) == [None] * 4  # the cache tells the readings apart
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*\bbest\b"):
        load(path, words_tokenizer(False), tmp_path, margin_from=["best", "score_rejected"])


def numbered(count: int) -> list[dict]:
    """Rows that are told apart by their margin."""
    return [{"prompt": "hi ", "chosen": "yes", "rejected": "no", "margin": i} for i in range(count)]


def test_mixtures_take_exactly_the_rows_asked_for_and_the_seed_says_which(tmp_path):
    a, b = write_lines(tmp_path / "a.jsonl", numbered(40)), write_lines(tmp_path / "b.jsonl", numbered(30))
    mixer = [str(a), "7", str(b), "0.5"]

    def taken(mixer, seed=1):
        data = load(mixer, words_tokenizer(False), tmp_path / "cache", seed=seed)
        return data, margins(data), data.source_ids().tolist()

    data, rows, sources = taken(mixer)
    assert [(facts["rows"], facts["taken"], facts["kept"]) for facts in data.facts] == [(40, 7, 7), (30, 15, 15)]
    assert sources == [0] * 7 + [1] * 15
    assert len(set(rows[:7])) == 7 and len(set(rows[7:])) == 15
    assert rows[:7] == sorted(rows[:7])  # in the file's order
    assert (rows, sources) == taken(mixer)[1:]
    assert rows != taken(mixer, seed=2)[1]
    data, rows, _ = taken([str(a), "2.25"])
    assert data.facts[0]["taken"] == len(data) == 90
    assert {rows.count(i) for i in rows} == {2, 3} and len(set(rows)) == 40


def test_a_count_is_of_rows_not_of_pairs(tmp_path):
    rows = [{"prompt": "hi ", "responses": ["yes", "no", "why"]}] * 10
    ranked = write_lines(tmp_path / "ranked.jsonl", rows)
    plain = write_lines(tmp_path / "plain.jsonl", numbered(5))
    data = load([str(ranked), "4", str(plain), "3"], words_tokenizer(False), tmp_path / "cache")
    assert [(facts["taken"], facts["kept"]) for facts in data.facts] == [(4, 12), (3, 3)]
    assert np.bincount(data.source_ids()).tolist() == [12, 3]


@pytest.mark.parametrize("amount", ["11", "0.3", "57"])
def test_the_same_rows_are_taken_from_every_source(tmp_path, amount):
    taken = {}
    for name, (write, _) in SOURCES.items():
        (tmp_path / name).mkdir()
        source = write(tmp_path / name, numbered(40))
        taken[name] = margins(load(source, words_tokenizer(False), tmp_path / "cache", amount=amount))
    assert all(rows == taken["jsonl"] for rows in taken.values()), taken


# ---- what the template is given


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


@pytest.mark.parametrize("form", CHAT_FORMS)
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_keywords_reach_the_template(write_rows, tmp_path, form, as_text):
    form = CHAT_FORMS[form]
    write = json.dumps if as_text else lambda value: value
    given = [
        {"tools": write([tool("sums")])},
        {"chat_template_kwargs": write({"mood": "kind"})},
        {"tools": write([tool("sums"), tool("rain")]), "chat_template_kwargs": write({"mood": "kind", "other": 1})},
        {"tools": None, "chat_template_kwargs": None},
    ]
    rows = [row | more for row, more in zip(chat_rows(form), given, strict=True)]
    before = [[TOOL, SUMS], [KIND], [KIND, TOOL, SUMS, TOOL, RAIN], []]
    wanted = [tuple(more + side for side in pair) for more, pair in zip(before, expected("chat_ids"), strict=True)]
    data = load(write_rows(rows), words_tokenizer(False), tmp_path / "cache", **form.flags)
    assert ids(data) == wanted
    if form is not CHAT_FORMS["rejected_messages"]:
        assert data.table.prompt_length.tolist() == [len(b) + n for b, n in zip(before, (4, 8, 3, 4), strict=True)]


def test_tools_survive_a_parquet_file(tmp_path):
    """Rows of other tools leave null keys in a table file, and a row without tools a null."""
    rows = chat_rows(CHAT_FORMS["prompt given"])
    rows[0]["tools"] = [tool("sums")]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "rain", "description": "falls"}}]
    rows = [{"tools": None, **row} for row in rows]
    data = load(write_parquet(tmp_path / "a.parquet", rows), words_tokenizer(False), tmp_path / "cache")
    from_lines = load(write_lines(tmp_path / "a.jsonl", rows), words_tokenizer(False), tmp_path / "cache")
    assert ids(data) == ids(from_lines)
    assert ids(data)[1][0][:2] == [TOOL, RAIN]


# ---- limits


def test_long_pairs_are_filtered_and_counted(write_rows, tmp_path):
    rows = [
        {"prompt": "hi ", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi you why rain hi ", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi ", "chosen": "yes " * 7, "rejected": "no"},
        {"prompt": "hi you why rain hi ", "chosen": "no", "rejected": "yes"},
    ]
    data = load(write_rows(rows), words_tokenizer(True), tmp_path, max_prompt_token_length=5, max_token_length=8)
    assert ids(data) == [([BOS, HI, YES, EOS], [BOS, HI, NO, EOS])]
    dropped = data.facts[0]["dropped"]
    assert {reason: entry["count"] for reason, entry in dropped.items()} == {
        "prompt > 5 tokens": 2,
        "a side > 8 tokens": 1,
    }
    assert dropped["prompt > 5 tokens"]["first"].endswith("rows.jsonl:2")
    assert dropped["a side > 8 tokens"]["first"].endswith("rows.jsonl:3")
    assert data.facts[0]["truncated"] == 0


@pytest.mark.parametrize("name", ["chat_ids", "text_ids"])
def test_truncation_by_hand(write_rows, tmp_path, name):
    """The second conversation: BOS, eight tokens of prompt, two and three of answer."""
    rows = (chat_rows(CHAT_FORMS["prompt given"]), text_rows(TEXT_FORMS["prompt given"]))[name == "text_ids"]
    data = load(
        write_rows(rows[1:2]),
        words_tokenizer(True),
        tmp_path / "cache",
        max_token_length=8,
        max_prompt_token_length=8,
        overlength="truncate",
    )
    chosen, rejected = expected(name)[1]
    remainder = [BOS, *chosen[4:8]]  # with the longer answer of three tokens, eight in all
    assert ids(data) == [(remainder + chosen[8:], remainder + rejected[8:])]
    assert data.facts[0]["truncated"] == 1
    assert data.table.prompt_length.tolist() == [5]
    short_prompt = load(
        write_rows(rows[1:2]),
        words_tokenizer(True),
        tmp_path / "cache",
        max_token_length=8,
        max_prompt_token_length=3,
        overlength="truncate",
    )
    remainder = [BOS, *chosen[6:8]]
    assert ids(short_prompt) == [(remainder + chosen[8:], remainder + rejected[8:])]


# Few different tokens, so that what is left of two sides is now and then the same.
TOKENS = st.integers(HI, RAIN)
PAIRS = st.tuples(
    st.booleans(), st.lists(TOKENS, max_size=14), st.lists(TOKENS, max_size=16), st.lists(TOKENS, max_size=16)
).filter(lambda pair: pair[2] != pair[3])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    pairs=st.lists(PAIRS, min_size=1, max_size=12),
    max_token_length=st.integers(2, 20),
    max_prompt_token_length=st.integers(1, 20),
)
def test_truncation_keeps_what_decides_the_reward(pairs, max_token_length, max_prompt_token_length):
    max_prompt_token_length = min(max_prompt_token_length, max_token_length)
    rows = []
    for has_bos, prompt, chosen, rejected in pairs:
        prompt = [BOS] * has_bos + prompt
        sides = {"chosen_input_ids": prompt + chosen + [EOS], "rejected_input_ids": prompt + rejected + [EOS]}
        rows.append({"prompt_input_ids": prompt or None, **sides, "margin": len(rows)})
    # this one always fits, so that something is left
    rows.append({"chosen_input_ids": [YES, EOS], "rejected_input_ids": [NO, EOS], "margin": len(rows)})
    with tempfile.TemporaryDirectory() as folder:
        data = load(
            write_lines(Path(folder) / "a.jsonl", rows),
            words_tokenizer(True),
            folder,
            max_token_length=max_token_length,
            max_prompt_token_length=max_prompt_token_length,
            overlength="truncate",
        )
        kept = dict(zip(map(int, margins(data)), zip(ids(data), data.table.prompt_length, strict=True), strict=True))
        table, facts = data.table, data.facts[0]
    changed = 0
    for number, row in enumerate(rows):
        old = row["chosen_input_ids"], row["rejected_input_ids"]
        prompt = row["prompt_input_ids"] if row.get("prompt_input_ids") else common(*old)
        fits = len(prompt) <= max_prompt_token_length and max(map(len, old)) <= max_token_length
        if number not in kept:
            assert not fits
            continue
        new, size = kept[number]
        assert new[0] != new[1]
        if fits:
            assert new == old and size == len(prompt)
            continue
        changed += 1
        has_bos = old[0][0] == BOS
        longest = max(map(len, old)) - len(prompt)
        room = min(max_prompt_token_length, max(max_token_length - longest, int(has_bos)))
        assert size == min(len(prompt), room)
        remainder = prompt if size == len(prompt) else [BOS] * has_bos + prompt[len(prompt) - (size - has_bos) :]
        for before, after in zip(old, new, strict=True):
            response = before[len(prompt) :]
            assert len(after) <= max_token_length
            assert after[-1] == before[-1]  # the scored token
            assert after[:size] == remainder
            if len(response) <= max_token_length - size:
                assert after[size:] == response
            else:  # the beginning of the answer, and the token that is scored
                assert after[size:-1] == response[: max_token_length - size - 1]
    dropped = {reason: entry["count"] for reason, entry in facts["dropped"].items()}
    assert dropped == ({"identical after truncation": len(rows) - len(kept)} if len(kept) < len(rows) else {})
    assert facts["truncated"] == changed
    assert table.chosen_length.tolist() == [len(pair[0]) for pair, _ in kept.values()]
    assert table.rejected_length.tolist() == [len(pair[1]) for pair, _ in kept.values()]
    for (chosen, rejected), shared in zip((pair for pair, _ in kept.values()), table.shared_length, strict=True):
        shortest = min(len(chosen), len(rejected))
        assert shared == min(len(common(chosen, rejected)), shortest - 1)


def common(a: list[int], b: list[int]) -> list[int]:
    """What both begin with."""
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]
