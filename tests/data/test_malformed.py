"""Malformed rows and files: one sentence that names the place, whatever is wrong; or skipped, listed, and the rest loaded.

The corpus is generated here, byte by byte where that is the point. Random rows then look for what no list thought of.
"""

import copy
import dataclasses
import gzip
import io
import json
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from conftest import in_a_process, read_pairs, toy_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from open_rm.data.public_sets import PUBLIC_FORMS
from open_rm.data.reading import make_reading
from open_rm.data.rows import Row, read_row
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import DataFlags

HANG_SECONDS = 60.0  # no speed limit: a file that is slow by its size stays far below, a quadratic one does not
LONGEST_SENTENCE = 1200  # with a long path in it
PUBLIC = {form.says or form.name for form in PUBLIC_FORMS}
FORMS = {
    "messages + chosen_response + rejected_response",
    "text, prompt given",
    "text, prompt implied",
    "HH text",
    "messages, prompt given",
    "messages, prompt implied",
    "messages + rejected_messages",
    "messages + rejected_response",
    "ranked responses",
    "labelled A/B",
    "token ids",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
TEXT = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}
CHAT = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
IDS = {"chosen_input_ids": [7, 8, 1], "rejected_input_ids": [7, 9, 1]}
RANKED = {"prompt": "Q: ", "responses": ["yes", "no", "perhaps"]}
LABELLED = {"prompt": "Q: ", "response_a": "yes", "response_b": "no", "winner": "a"}
SPLIT = {"messages": [user("hi"), assistant("yes")], "rejected_response": "no"}


@pytest.fixture
def load(load):
    """All rows of one source."""
    return lambda source, **flags: load([source, "1.0"], **flags)


def sentence(call: Callable[[], object]) -> str:
    """What the UserError says that `call` must raise, in time and on one line that any terminal can show."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        call()
    assert time.monotonic() - started < HANG_SECONDS
    return checked(caught.value)


def checked(error: UserError) -> str:
    text = str(error)
    assert text.strip() and len(text.splitlines()) == 1, text
    assert len(text) < LONGEST_SENTENCE
    text.encode()
    return text


def in_order(ids) -> list:
    return [(chosen.tolist(), rejected.tolist()) for chosen, rejected in ids]


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# ---- rows, each between two good ones
# name: (row, or the bytes of its line; what the sentence says)

TEXT_ROWS = {
    "broken JSON": (b'{"chosen": "a", "rejected": ', "not valid JSON"),
    "two objects on a line": (b'{"chosen": "a"} {"rejected": "b"}', "not valid JSON"),
    "single quotes": (b"{'chosen': 'a', 'rejected': 'b'}", "not valid JSON"),
    "invalid UTF-8": (b'{"chosen": "caf\xe9", "rejected": "b"}', "not UTF-8"),
    "an overlong UTF-8 sequence": (b'{"chosen": "\xc0\xaf", "rejected": "b"}', "not UTF-8"),
    "NUL inside text": (b'{"chosen": "a\x00b", "rejected": "b"}', "not valid JSON"),
    "a line of NULs": (b"\x00" * 100, "not valid JSON|not UTF-8"),
    "a BOM in the middle": (b'{"chosen": "a", \xef\xbb\xbf"rejected": "b"}', "not valid JSON"),
    "nested without end": (b'{"chosen": ' + b"[" * 100_000, "nested too deeply|not valid JSON"),
    "nested deeply and closed": (b'{"chosen": ' + nested(100_000) + b', "rejected": "b"}', "nested too deeply"),
    "an integer of 5000 digits": (b'{"chosen": "a", "rejected": "b", "margin": 1' + b"0" * 5000 + b"}", "margin|JSON"),
    "a key that stands twice": (b'{"chosen": "a", "chosen": "b", "rejected": "c"}', "twice"),
    "100 000 keys, one of them twice": (
        b'{"chosen": "a", "rejected": "b", ' + b"".join(b'"k%d": 1, ' % i for i in range(100_000)) + b'"k9": 1}',
        "twice",
    ),
    "a list": ([1, 2], "a row is an object"),
    "a string": ("chosen", "a row is an object"),
    "a number": (3, "a row is an object"),
    "null": (None, "a row is an object"),
    "an empty object": ({}, "no value for chosen and rejected"),
    "no rejected": ({"prompt": "Q: ", "chosen": "a"}, "no value for rejected"),
    "rejected null": (TEXT | {"rejected": None}, "no value for rejected"),
    "other columns": ({"question": "a", "answer": "b"}, "no value for chosen and rejected.*answer, question"),
    "a column name of two lines": ({"good\nbad": "a", "x\u2028y": "b"}, "no value for chosen and rejected"),
    "a column name of half a character": ({"\ud83d": "a"}, "no value for chosen and rejected"),
    "a column name of 10 000 letters": ({"a" * 10_000: "a"}, "no value for chosen and rejected"),
    "chosen a number": (TEXT | {"chosen": 3}, "chosen must be text or a list of messages, not int"),
    "rejected a number": (TEXT | {"rejected": 3.5}, "rejected must be text or a list of messages, not float"),
    "chosen true": (TEXT | {"chosen": True}, "chosen must be text or a list of messages, not bool"),
    "chosen an object": (TEXT | {"chosen": {"text": "a"}}, "chosen must be text or a list of messages, not dict"),
    "prompt a number": (TEXT | {"prompt": 3}, "prompt must be text or a list of messages"),
    "prompt 0": (TEXT | {"prompt": 0}, "prompt must be text or a list of messages"),
    "prompt false": (TEXT | {"prompt": False}, "prompt must be text or a list of messages"),
    "prompt an object": (TEXT | {"prompt": {}}, "prompt must be text or a list of messages"),
    "chosen empty": (TEXT | {"chosen": ""}, "chosen is empty"),
    "rejected only spaces": (TEXT | {"rejected": " \n\t"}, "rejected is empty"),
    "identical sides": (TEXT | {"chosen": "no"}, "identical"),
    "sides that become identical": ({"chosen": "Q: a<|eos|>", "rejected": "Q: a"}, "identical as tokens"),
    "half a surrogate pair": (TEXT | {"rejected": "\ud83d"}, "half a surrogate pair"),
    "half a surrogate pair in the prompt": (TEXT | {"prompt": "\udc00"}, "half a surrogate pair"),
    "the pad token": (TEXT | {"chosen": "x<|pad|>"}, "pad token"),
    "margin negative": (TEXT | {"margin": -2}, "the margin is -2, which says that rejected is the better one"),
    "margin of letters": (TEXT | {"margin": "abc"}, "margin.*not a finite number"),
    "margin NaN": (TEXT | {"margin": math.nan}, "margin.*not a finite number"),
    "margin the text nan": (TEXT | {"margin": "NaN"}, "margin.*not a finite number"),
    "margin infinite": (TEXT | {"margin": -math.inf}, "margin.*not a finite number"),
    "margin 1e400": (b'{"chosen": "a", "rejected": "b", "margin": 1e400}', "margin.*not a finite number"),
    "margin of 400 digits": (TEXT | {"margin": 10**400}, "margin.*not a finite number"),
    "margin true": (TEXT | {"margin": True}, "margin.*not a finite number"),
    "margin a list": (TEXT | {"margin": [1.0]}, "margin.*not a finite number"),
    "tools beside text": (TEXT | {"tools": [{"type": "function"}]}, "tools and chat_template_kwargs are for message"),
    "keywords beside text": (TEXT | {"chat_template_kwargs": {"a": 1}}, "tools and chat_template_kwargs are for"),
    "messages between text": (CHAT, "the rows before are text and this one is messages"),
    "token ids between text": (IDS, "the rows before are text and this one is token ids"),
    "no responses": (RANKED | {"responses": []}, "at least 2 responses, not 0"),
    "one response": (RANKED | {"responses": ["a"]}, "at least 2 responses, not 1"),
    "responses as text": (RANKED | {"responses": "yes, no"}, "responses must be a list.*not str"),
    "responses an object": (RANKED | {"responses": {"a": "b"}}, "responses must be a list.*not dict"),
    "a response null": (RANKED | {"responses": ["a", None]}, "must be text or a list of messages"),
    "a response a number": (RANKED | {"responses": ["a", 3]}, "must be text or a list of messages"),
    "a response empty": (RANKED | {"responses": ["a", "", "b"]}, "is empty"),
    "text and messages together": (RANKED | {"responses": ["a", "b", [assistant("c")]]}, "text|messages"),
    "scores too few": (RANKED | {"scores": [1, 2]}, "a number for each of the 3 responses, not 2"),
    "scores too many": (RANKED | {"scores": [1, 2, 3, 4]}, "a number for each of the 3 responses, not 4"),
    "scores a number": (RANKED | {"scores": 1.0}, "scores must be a list.*not float"),
    "a score NaN": (RANKED | {"scores": [1, math.nan, 2]}, "scores.*not a finite number"),
    "a score infinite": (RANKED | {"scores": [1, math.inf, 2]}, "scores.*not a finite number"),
    "a score null": (RANKED | {"scores": [1, None, 2]}, "scores.*not a finite number"),
    "a score in words": (RANKED | {"scores": [1, "high", 2]}, "scores.*not a finite number"),
    "winner unknown": (LABELLED | {"winner": "c"}, "winner is 'c'"),
    "winner of 10 000 letters": (LABELLED | {"winner": "c\n" * 5000}, "winner is"),
    "winner a number": (LABELLED | {"winner": 1}, "winner is 1"),
    "winner empty": (LABELLED | {"winner": ""}, "winner is ''"),
    "winner null": (LABELLED | {"winner": None}, "no value for"),
    "response_b missing": ({"response_a": "yes", "winner": "a"}, "no value for"),
    "response_a empty": (LABELLED | {"response_a": " "}, "is empty"),
    "labelled alike": (LABELLED | {"response_b": "yes"}, "identical"),
}

CHAT_ROWS = {
    "text between messages": (TEXT, "the rows before are messages and this one is text"),
    "an unknown role": (CHAT | {"rejected": [{"role": "bot", "content": "x"}]}, "role 'bot'; the roles are"),
    "a role of two lines": (CHAT | {"rejected": [{"role": "bot\nuser", "content": "x"}]}, "role .*; the roles are"),
    "a role of half a character": (CHAT | {"rejected": [{"role": "\ud83d", "content": "x"}]}, "role .*; the roles"),
    "a role null": (CHAT | {"chosen": [{"role": None, "content": "x"}]}, "role None; the roles are"),
    "a role a list": (CHAT | {"chosen": [{"role": ["user"], "content": "x"}]}, "role .*; the roles are"),
    "no role": (CHAT | {"chosen": [{"content": "x"}]}, "not a message with role and content"),
    "no content": (CHAT | {"chosen": [{"role": "assistant"}]}, "not a message with role and content"),
    "content null": (
        CHAT | {"chosen": [{"role": "assistant", "content": None}]},
        "not a message with role and content",
    ),
    "content a number": (CHAT | {"chosen": [{"role": "assistant", "content": 3}]}, "not a message with role and"),
    "an image in parts": (
        CHAT | {"chosen": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
        "a part of type image",
    ),
    "an audio url in parts": (
        CHAT | {"prompt": [{"role": "user", "content": [{"text": "a"}, {"type": "audio_url", "audio_url": {}}]}]},
        "a part of type audio_url",
    ),
    "an empty list of parts": (CHAT | {"chosen": [{"role": "assistant", "content": []}]}, "not a message with role"),
    "a tool call that is no JSON": (
        CHAT | {"chosen": [{"role": "tool_call", "content": "sum(1)"}]},
        'a tool call that is not JSON with a "name"',
    ),
    "content only spaces": (CHAT | {"chosen": [assistant(" \n")]}, "chosen is empty"),
    "content half a surrogate pair": (CHAT | {"chosen": [assistant("\udfff")]}, "half a surrogate pair"),
    "content with the pad token": (CHAT | {"chosen": [assistant("<|pad|>")]}, "pad token"),
    "a message as text in a list": (CHAT | {"rejected": ["no", 3]}, "not a message with role and content"),
    "a list in a list": (CHAT | {"rejected": [[[assistant("no")]]]}, "not a message with role and content"),
    "a message null": (CHAT | {"rejected": [None]}, "not a message with role and content"),
    "a message of 1 MB": (CHAT | {"rejected": [{"role": "x" * 10**6}]}, "not a message with role and content"),
    "prompt an empty list": (CHAT | {"prompt": []}, "prompt must be text or a list of messages"),
    "prompt half a message": (
        CHAT | {"prompt": {"role": "user"}},
        "prompt must be text or a list of messages, not dict",
    ),
    "chosen an empty list": (CHAT | {"chosen": []}, "chosen must be text or a list of messages, not empty"),
    "chosen half a message": (
        CHAT | {"chosen": {"role": "assistant"}},
        "chosen must be text or a list of messages, not dict",
    ),
    "only a system message": ({"chosen": [SYSTEM], "rejected": [SYSTEM]}, "end with an assistant message"),
    "only a user's message": ({"chosen": [user("a")], "rejected": [user("b")]}, "end with an assistant message"),
    "the answer before the question": (
        {"chosen": [assistant("yes"), user("hi")], "rejected": [assistant("no"), user("hi")]},
        "end with an assistant message",
    ),
    "chosen ends with the user": (CHAT | {"chosen": [assistant("yes"), user("thanks")]}, "end with an assistant"),
    "different questions": (
        {"chosen": [user("a"), assistant("yes")], "rejected": [user("b"), assistant("no")]},
        "same prompt",
    ),
    "system prompt on one side only": (
        {"chosen": [SYSTEM, user("a"), assistant("yes")], "rejected": [user("a"), assistant("no")]},
        "same prompt",
    ),
    "prompt repeated on one side": (CHAT | {"chosen": [user("hi"), assistant("a")]}, "chosen begins with the prompt"),
    "prompt that is no turn": (
        {"prompt": "other", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        "no turn of both",
    ),
    "identical messages": (CHAT | {"rejected": [assistant("yes")]}, "identical"),
    "messages without an answer": (SPLIT | {"messages": [user("hi")]}, "messages must end with an assistant message"),
    "messages empty": (SPLIT | {"messages": []}, "messages must be text or a list of messages|messages must be a list"),
    "rejected_response empty": (SPLIT | {"rejected_response": ""}, "is empty"),
    "rejected_response a number": (SPLIT | {"rejected_response": 3}, "rejected_response must be text"),
    "rejected_messages null": ({"messages": SPLIT["messages"], "rejected_messages": None}, "no value for"),
    "rejected_messages of another prompt": (
        {"messages": SPLIT["messages"], "rejected_messages": [user("ho"), assistant("no")]},
        "same prompt",
    ),
    "keywords a list": (CHAT | {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
    "keywords text that is no JSON": (CHAT | {"chat_template_kwargs": "a=1"}, "chat_template_kwargs.*not JSON"),
    "keywords that are ours": (CHAT | {"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    "keywords that collide": (CHAT | {"chat_template_kwargs": {"messages": []}}, "messages"),
    "keywords nested deeply": (
        b'{"chat_template_kwargs": {"a": ' + nested(900) + b"}, " + json.dumps(CHAT).encode()[1:],
        "nested too deeply",
    ),
    "tool calls nested deeply": (
        b'{"chosen": [{"role": "assistant", "tool_calls": ' + nested(900) + b'}], "rejected": "b"}',
        "nested too deeply",
    ),
    "tools an object": (CHAT | {"tools": {"type": "function"}}, "tools must be a list"),
    "tools of numbers": (CHAT | {"tools": [1]}, "tools must be a list"),
    "tools a number": (CHAT | {"tools": 7}, "tools must be a list"),
}

ID_ROWS = {
    "negative": (IDS | {"chosen_input_ids": [7, -1]}, "chosen_input_ids must be a list of token ids"),
    "floats": (IDS | {"chosen_input_ids": [7.0, 8.0]}, "chosen_input_ids must be a list of token ids"),
    "booleans": (IDS | {"rejected_input_ids": [True, False]}, "rejected_input_ids must be a list of token ids"),
    "text": (IDS | {"rejected_input_ids": "7 8 9"}, "rejected_input_ids must be a list of token ids"),
    "texts": (IDS | {"rejected_input_ids": ["7", "8"]}, "rejected_input_ids must be a list of token ids"),
    "nested": (IDS | {"rejected_input_ids": [[7, 8]]}, "rejected_input_ids must be a list of token ids"),
    "null inside": (IDS | {"rejected_input_ids": [7, None]}, "rejected_input_ids must be a list of token ids"),
    "beyond 64 bits": (IDS | {"rejected_input_ids": [7, 2**70]}, "rejected_input_ids must be a list of token ids"),
    "beyond the vocabulary": (IDS | {"rejected_input_ids": [7, 2**30]}, f"token id {2**30} is beyond"),
    "one beyond the vocabulary": (IDS | {"rejected_input_ids": [7, 1024]}, "token id 1024 is beyond"),
    "empty": (IDS | {"chosen_input_ids": []}, "chosen_input_ids is empty"),
    "identical": (IDS | {"chosen_input_ids": [7, 9, 1]}, "identical"),
    "pad": (IDS | {"chosen_input_ids": [7, 2, 1]}, "pad token"),
    "another prompt": (IDS | {"prompt_input_ids": [8]}, "must both begin with prompt_input_ids"),
    "the prompt alone": (
        {"prompt_input_ids": [7, 8], "chosen_input_ids": [7, 8], "rejected_input_ids": [7, 8, 9]},
        "empty|begin with|response",
    ),
    "prompt of text": (IDS | {"prompt_input_ids": "7"}, "prompt_input_ids must be a list of token ids"),
    "rejected missing": ({"chosen_input_ids": [7, 8]}, "no value for"),
}

ROWS = [
    pytest.param(good, *case, id=f"{kind}: {name}")
    for kind, good, cases in (("text", TEXT, TEXT_ROWS), ("chat", CHAT, CHAT_ROWS), ("ids", IDS, ID_ROWS))
    for name, case in cases.items()
]


def line_of(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.mark.parametrize(("good", "bad", "says"), ROWS)
def test_a_malformed_row_is_named_and_can_be_skipped(load, tmp_path, good, bad, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(line_of, (good, bad, good))) + b"\n")
    text = sentence(lambda: load(path))
    assert f"{path}:2: " in text
    assert_says(text, says)

    data = load(path, skip_bad_rows=1)
    assert in_order(data.pairs(range(len(data)))) == in_order(load_good(load, tmp_path, good).pairs([0, 1]))
    [facts] = data.facts
    [skipped] = facts["skipped"]
    assert skipped["place"] == f"{path}:2"
    assert_says(skipped["what"], says)
    assert (facts["rows"], facts["taken"], facts["kept"]) == (3, 3, 2)
    assert sum(facts["forms"].values()) == 2, "the skipped row counts in no form"
    assert data.places([0, 1]) == [f"{path}:1", f"{path}:3"]
    line = data.lines[0]
    assert "1 bad rows skipped" in line and len(line.splitlines()) == 1
    line.encode()


def load_good(load, tmp_path, good):
    path = tmp_path / "good.jsonl"
    path.write_bytes((line_of(good) + b"\n") * 2)
    return load(path)


def assert_says(text: str, pattern: str):
    assert re.search(pattern, text), f"{text!r} does not say {pattern!r}"


@pytest.mark.parametrize(
    ("good", "bad", "says"), [case for case in ROWS if isinstance(case.values[1], dict)][::3]
)  # fmt: skip
def test_a_malformed_row_of_an_array_is_named_by_its_number(load, tmp_path, good, bad, says):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([good, bad, good]))
    assert f"{path}: row 2: " in sentence(lambda: load(path))
    data = load(path, skip_bad_rows=3)
    assert data.places([0, 1]) == [f"{path}: row 1", f"{path}: row 3"]
    assert [row["place"] for row in data.facts[0]["skipped"]] == [f"{path}: row 2"]


def test_skipped_rows_are_listed_in_order_and_one_more_stops(load, tmp_path):
    """Some are malformed as rows, some only as tokens; the first of all is the one to name."""
    path = tmp_path / "rows.jsonl"
    bad = [TEXT | {"chosen": "x<|pad|>"}, b"{", TEXT | {"chosen": "Q: no", "rejected": "Q: no<|eos|>"}, {"chosen": "a"}]
    path.write_bytes(b"\n".join(line_of(row) for i in range(4) for row in (TEXT, bad[i])) + b"\n")
    places = [f"{path}:{2 * i + 2}" for i in range(4)]
    data = load(path, skip_bad_rows=4)
    assert [row["place"] for row in data.facts[0]["skipped"]] == places
    assert len(data) == 4
    assert f"{places[0]}: " in sentence(lambda: load(path))
    for allowed in (1, 2, 3):
        text = sentence(lambda allowed=allowed: load(path, skip_bad_rows=allowed))
        assert f"{places[allowed]}: " in text and "skip_bad_rows" in text


def test_the_limit_of_skipped_rows_is_one_for_all_sources(tokenizer, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join([line_of(TEXT), b"{", line_of(TEXT)]))

    def both(skip_bad_rows):
        mixer = [tmp_path / "a.jsonl", "1.0", tmp_path / "b.jsonl", "1.0"]
        cache = str(tmp_path / "cache")
        return read_pairs(mixer, tokenizer, dataset_local_cache_dir=cache, skip_bad_rows=skip_bad_rows)

    assert "b.jsonl:2: " in sentence(lambda: both(1))
    assert [len(facts["skipped"]) for facts in both(2).facts] == [1, 1]


def test_a_file_of_bad_rows_only_says_so(load, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" * 3)
    text = sentence(lambda: load(path, skip_bad_rows=10))
    assert "rows.jsonl" in text and "no pairs" in text


@pytest.mark.parametrize("column", ["chosen", "prompt", "responses", "scores", "winner", "margin", "tools", "messages"])
def test_no_depth_of_nesting_is_too_much(load, tmp_path, column):
    """Every reader gives up at a depth of its own: JSON, comparing, printing, walking."""
    depths = list(range(40, 1040, 20))
    base = {
        "responses": {"prompt": "Q: "},
        "scores": RANKED,
        "winner": LABELLED,
        "messages": SPLIT,
        "tools": CHAT,
    }.get(column, TEXT)
    good = CHAT if base in (CHAT, SPLIT) else TEXT
    rest = json.dumps({name: value for name, value in base.items() if name != column}).encode()[1:]
    lines = [b'{"%s": %s, %s' % (column.encode(), nested(depth), rest) for depth in depths]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line_of(good), *lines, line_of(good)]))
    started = time.monotonic()
    data = load(path, skip_bad_rows=len(depths))
    assert time.monotonic() - started < HANG_SECONDS
    for skipped in data.facts[0]["skipped"]:
        assert len(skipped["what"].splitlines()) == 1
    assert len(data.facts[0]["skipped"]) == len(depths)
    assert len(data) == 2


@pytest.mark.parametrize(
    "value", ["{{ n + 'x' }}", "{{ 1 // n }}", "{{ range(n).__len__() }}", "{{ n.missing.part }}", "{{ 1 / n | int }}"]
)
@pytest.mark.parametrize("n", [0, 10**9, "x", None])
def test_a_template_that_fails_on_a_row_names_the_row(tokenizer, load, tmp_path, value, n):
    """What a row hands to the template decides whether it divides by zero or adds numbers to words."""
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{% if n is defined %}" + value + "{% endif %}" + plain
    path = tmp_path / "rows.jsonl"
    bad = CHAT | {"chat_template_kwargs": {"n": n}}
    path.write_bytes(b"\n".join(map(line_of, (CHAT, bad, CHAT))))
    try:
        data = load(path)
    except UserError as error:
        assert f"{path}:2: " in checked(error)
        assert len(load(path, skip_bad_rows=1)) == 2
    else:
        assert len(data) == 3


# ---- files


def table_bytes(rows, **options) -> bytes:
    out = io.BytesIO()
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    parquet.write_table(table, out, **options)
    return out.getvalue()


def arrow_bytes(rows, *, stream: bool = True) -> bytes:
    out = io.BytesIO()
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def lines(*rows) -> bytes:
    return b"".join(line_of(row) + b"\n" for row in rows)


def not_utf8_table() -> pa.Table:
    """A text column whose second value is no UTF-8, as a careless writer leaves it."""
    chosen = pa.array([b"yes", b"caf\xe9", b"yes"], pa.binary())
    chosen = pa.Array.from_buffers(pa.string(), 3, chosen.buffers())
    return pa.table({"chosen": chosen, "rejected": ["no"] * 3})


def many(count: int) -> list[dict]:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(500)]
    return [{"chosen": " ".join(rng.choices(words, k=30)), "rejected": "no"} for _ in range(count)]


def flipped(content: bytes, start: int, count: int) -> bytes:
    return content[:start] + bytes(255 - byte for byte in content[start : start + count]) + content[start + count :]


def wide(count: int, width: int) -> pa.Table:
    """Token ids of 64 bits, as other tools write them, one row of them out of range."""
    chosen = [[3] * width] * (count - 1) + [[2**40]]
    return pa.table({"chosen_input_ids": chosen, "rejected_input_ids": [[4] * width] * count})


GZ = gzip.compress(lines(*many(2000)))
PARQUET = table_bytes(many(2000), compression="zstd")
NULL_COLUMN = [{"chosen": "yes", "rejected": None}] * 3
# name: (file name, content, what the sentence says); none of them can be skipped
FILES = {
    "an empty file": ("a.jsonl", b"", "no rows at all"),
    "only white space": ("a.jsonl", b" \n\t\n\r\n  ", "no rows at all"),
    "only a BOM": ("a.jsonl", b"\xef\xbb\xbf", "no rows at all"),
    "an empty json": ("a.json", b"", "no rows at all"),
    "an empty array": ("a.json", b"[]", "no rows at all"),
    "an array that does not end": ("a.json", b"[" + line_of(TEXT) + b",", "a.json: not valid JSON"),
    "an array and more": ("a.json", b"[" + line_of(TEXT) + b"] x", "a.json: not valid JSON"),
    "an array with a comma at its end": ("a.json", b"[" + line_of(TEXT) + b",]", "a.json: not valid JSON"),
    "an array with latin-1": ("a.json", b'[{"chosen": "caf\xe9", "rejected": "b"}]', "a.json: not valid JSON"),
    "an array nested without end": ("a.json", b"[" * 200_000, "a.json: not valid JSON"),
    "an array with a huge integer": ("a.json", b"[1" + b"0" * 5000 + b"]", "a.json: not valid JSON"),
    "an array of lists": ("a.json", b"[[1, 2], [3]]", "a.json: row 1: a row is an object"),
    "an array of text": ("a.json", b'["a", "b"]', "a.json: row 1: a row is an object"),
    "rows inside an object": ("a.json", json.dumps({"data": [TEXT]}).encode(), "a.json:1: no value for chosen"),
    "one object over several lines": ("a.json", json.dumps(TEXT, indent=1).encode(), "a.json:1: not valid JSON"),
    "UTF-16": ("a.jsonl", lines(TEXT, TEXT).decode().encode("utf-16"), "a.jsonl:1: not UTF-8|a.jsonl:1: not valid"),
    "old line ends": ("a.jsonl", lines(TEXT, TEXT).replace(b"\n", b"\r"), "a.jsonl:1: not valid JSON"),
    "a zip file": ("a.jsonl", b"PK\x03\x04" + bytes(range(256)), "a.jsonl:1: "),
    "a gzip file without its ending": ("a.jsonl", GZ, "a.jsonl: packed.*rename it to a.jsonl.gz"),
    "a truncated gzip": ("a.jsonl.gz", GZ[:-1000], "a.jsonl.gz: not a complete gzip file"),
    "a gzip without its checksum": ("a.jsonl.gz", GZ[:-8], "a.jsonl.gz: not a complete gzip file"),
    "a gzip of four bytes": ("a.jsonl.gz", GZ[:4], "a.jsonl.gz: not a complete gzip file"),
    "a gzip with flipped bytes": ("a.jsonl.gz", flipped(GZ, len(GZ) // 2, 20), "a.jsonl.gz: not a complete gzip file"),
    "a gzip with something behind": ("a.jsonl.gz", GZ + b"more", "a.jsonl.gz: not a complete gzip file"),
    "no gzip": ("a.jsonl.gz", lines(TEXT), "a.jsonl.gz: not a complete gzip file"),
    "an empty gzip": ("a.jsonl.gz", gzip.compress(b""), "no rows at all"),
    "an empty csv": ("a.csv", b"", "no rows at all"),
    "a csv of a header": ("a.csv", b"chosen,rejected\n", "no rows at all"),
    "a csv without the columns": ("a.csv", b"question,answer\na,b\n", "a.csv:2: no value for chosen and rejected"),
    "a csv without a header": ("a.csv", b"yes,no\nja,nein\n", "a.csv:2: no value for chosen and rejected"),
    "a csv with a quote that stays open": (
        "a.csv",
        b'chosen,rejected\nyes,no\n"yes,no\nyes,no\n',
        "a.csv:[234]: not valid CSV",
    ),
    "a csv with text after a quote": ("a.csv", b'chosen,rejected\n"yes"x,no\n', "a.csv:[12]: not valid CSV"),
    "a csv with latin-1": ("a.csv", b"chosen,rejected\nyes,no\ncaf\xe9,no\n", "a.csv:[123]: not UTF-8"),
    "a csv in UTF-16": ("a.csv", "chosen,rejected\nyes,no\n".encode("utf-16"), "a.csv:1: not UTF-8"),
    "a csv with a column twice": ("a.csv", b"chosen,chosen,rejected\na,b,c\n", "a.csv:1: .*twice"),
    "a parquet without a column": ("a.parquet", table_bytes([{"chosen": "a"}]), "a.parquet: row 1: no value for rej"),
    "a parquet of nulls": ("a.parquet", table_bytes(NULL_COLUMN), "a.parquet: row 1: no value for rejected"),
    "a parquet of bytes": (
        "a.parquet",
        table_bytes([{"chosen": b"a", "rejected": b"b"}]),
        "a.parquet: row 1: chosen must be text or a list of messages, not bytes",
    ),
    "a truncated parquet": ("a.parquet", PARQUET[:-30], "a.parquet: not a readable parquet file"),
    "the second half of a parquet": ("a.parquet", PARQUET[len(PARQUET) // 2 :], "a.parquet: .*(readable|read)"),
    "a parquet with flipped pages": ("a.parquet", flipped(PARQUET, 200, 400), "a.parquet: .*(readable|read)"),
    "an empty parquet": ("a.parquet", b"", "a.parquet: not a readable parquet file"),
    "json named parquet": ("a.parquet", lines(TEXT), "a.parquet: not a readable parquet file"),
    "a parquet without rows": ("a.parquet", table_bytes(pa.table({"chosen": pa.array([], "string")})), "no rows at"),
    "a parquet of text that is no UTF-8": ("a.parquet", table_bytes(not_utf8_table()), "a.parquet: .*"),
    "a parquet of dates beyond Python's": (
        "a.parquet",
        table_bytes(pa.table({"when": pa.array([2**40], pa.timestamp("s")), "chosen": ["a"]})),
        "a.parquet: ",
    ),
    "a parquet of days beyond Python's": (
        "a.parquet",
        table_bytes(pa.table({"when": pa.array([2**30], pa.date32()), "chosen": ["a"]})),
        "a.parquet: ",
    ),
    "a truncated arrow stream": ("a.arrow", arrow_bytes(many(500))[:-5000], "a.arrow: not a readable arrow file"),
    "a truncated arrow file": (
        "a.arrow",
        arrow_bytes(many(500), stream=False)[:-300],
        "a.arrow: not a readable arrow file",
    ),
    "an empty arrow": ("a.arrow", b"", "a.arrow: not a readable arrow file"),
    "json named arrow": ("a.arrow", lines(TEXT), "a.arrow: not a readable arrow file"),
    "an arrow without a column": ("a.arrow", arrow_bytes([{"chosen": "a"}]), "a.arrow: row 1: no value for rejected"),
    "an arrow of text that is no UTF-8": ("a.arrow", arrow_bytes(not_utf8_table()), "a.arrow: "),
    "a pointer of Git LFS": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS pointer",
    ),
    "a file of no kind": ("a", b"chosen, rejected", "neither its name nor its content says what it is"),
    "an unknown ending": ("a.txt", lines(TEXT), "a.txt is not a .jsonl"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_is_named(load, tmp_path, case):
    name, content, says = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    text = sentence(lambda: load(path))
    assert name in text
    assert_says(text, says)
    assert not list((tmp_path / "cache").glob("*.tmp"))


@dataclasses.dataclass(frozen=True)
class Middle:
    """A file whose second row of three is malformed."""

    name: str
    content: bytes
    place: str
    says: str


UNEVEN = b"chosen,rejected\nyes,no\n%s\nyes,no\n"
MIDDLES = {
    "gzip": Middle("a.jsonl.gz", gzip.compress(lines(TEXT, b"{", TEXT)), "a.jsonl.gz:2", "not valid JSON"),
    "array": Middle("a.json", b"[%s, 3, %s]" % ((line_of(TEXT),) * 2), "a.json: row 2", "a row is an object"),
    "array with null": Middle("a.json", b"[%s, null, %s]" % ((line_of(TEXT),) * 2), "a.json: row 2", "an object"),
    "json lines with empty ones": Middle("a.jsonl", b"\n%s\n \n{\n%s" % ((line_of(TEXT),) * 2), "a.jsonl:4", "JSON"),
    "csv, a cell too many": Middle("a.csv", UNEVEN % b"a,b,c", "a.csv:3", "3 cells"),
    "csv, a cell too few": Middle("a.csv", UNEVEN % b"a", "a.csv:3", "1 cells|1 cell"),
    "csv, an empty cell": Middle("a.csv", UNEVEN % b"a,", "a.csv:3", "no value for rejected|rejected is empty"),
    "csv, NUL": Middle("a.csv", UNEVEN % b"a\x00,b", "a.csv:3", "NUL|not valid"),
    "csv, a margin of letters": Middle(
        "a.csv", b"chosen,rejected,margin\na,b,1\na,b,much\na,b,\n", "a.csv:3", "margin.*not a finite number"
    ),
    "parquet": Middle(
        "a.parquet", table_bytes([TEXT, TEXT | {"rejected": None}, TEXT]), "a.parquet: row 2", "no value"
    ),
    "parquet, a list with null": Middle(
        "a.parquet", table_bytes([CHAT, CHAT | {"chosen": [None]}, CHAT]), "a.parquet: row 2", "not a message"
    ),
    "parquet, ids of 64 bits": Middle(
        "a.parquet", table_bytes(wide(3, 5).take([0, 2, 1])), "a.parquet: row 2", "must be a list of token ids"
    ),
    "arrow": Middle("a.arrow", arrow_bytes([TEXT, TEXT | {"chosen": ""}, TEXT]), "a.arrow: row 2", "chosen is empty"),
    "arrow file": Middle(
        "a.arrow", arrow_bytes([TEXT, TEXT | {"chosen": " "}, TEXT], stream=False), "a.arrow: row 2", "chosen is empty"
    ),
}


@pytest.mark.parametrize("case", MIDDLES)
def test_a_malformed_row_of_any_file_is_named_and_can_be_skipped(load, tmp_path, case):
    case = MIDDLES[case]
    (tmp_path / case.name).write_bytes(case.content)
    text = sentence(lambda: load(tmp_path / case.name))
    assert f"{tmp_path}/{case.place}: " in text
    assert_says(text, case.says)
    data = load(tmp_path / case.name, skip_bad_rows=2)
    assert len(data) == 2
    [skipped] = data.facts[0]["skipped"]
    assert skipped["place"] == f"{tmp_path}/{case.place}"
    assert_says(skipped["what"], case.says)


@pytest.mark.parametrize("good", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("overlength", ["filter", "truncate"])
def test_a_row_of_megabytes_is_dropped_and_counted_at_once(load, tmp_path, good, overlength):
    path = tmp_path / "rows.jsonl"
    huge = "ab cd" * 10**6
    bad = good | {"chosen": huge if isinstance(good["chosen"], str) else [assistant(huge)]}
    path.write_bytes(lines(good, bad, good))
    started = time.monotonic()
    data = load(path, overlength=overlength)
    assert time.monotonic() - started < HANG_SECONDS
    [facts] = data.facts
    if facts["kept"] == 2:
        [(_, entry)] = facts["dropped"].items()
        assert entry == {"count": 1, "first": f"{path}:2"}
    else:
        assert (facts["kept"], facts["truncated"]) == (3, 1)
        assert data.table.chosen_length.max() <= 512


def test_a_megabyte_without_a_space_takes_no_minutes(load, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(TEXT, TEXT | {"chosen": "ab" * 450_000}, TEXT))
    started = time.monotonic()
    assert len(load(path)) == 2
    assert time.monotonic() - started < HANG_SECONDS


# ---- folders and names


def test_a_folder_where_a_file_is_expected(load, tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    assert_says(sentence(lambda: load(tmp_path / "rows.jsonl")), "rows.jsonl has no split 'train'; .*no data file")
    (tmp_path / "set" / "train.jsonl").mkdir(parents=True)
    assert "train" in sentence(lambda: load(tmp_path / "set"))


def test_names_that_lead_nowhere(load, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("missing.jsonl", "link.jsonl", "loop.jsonl", "*.parquet", "none-?.jsonl.gz", "gone/train.jsonl"):
        assert name in sentence(lambda name=name: load(tmp_path / name))


def break_saved(folder: Path, name: str, content: bytes | None):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data-00000-of-00001.arrow", None),
        ("data-00000-of-00001.arrow", b""),
        ("data-00000-of-00001.arrow", b"half"),
        ("data-00000-of-00001.arrow", arrow_bytes(many(200))[:-9000]),
        ("data-00000-of-00001.arrow", arrow_bytes(not_utf8_table())),
        ("state.json", b"{"),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b"null"),
        ("state.json", b"\xff"),
        ("dataset_info.json", b"{"),
        ("dataset_info.json", b"[]"),
        ("dataset_info.json", b"null"),
        ("dataset_info.json", b'{"features": {"chosen": {"_type": "Unknown"}}}'),
        ("dataset_info.json", b'{"features": 3}'),
        ("dataset_info.json", None),
    ],
)
def test_a_damaged_folder_of_datasets_is_named(load, tmp_path, name, content):
    datasets.Dataset.from_list(many(200)).save_to_disk(tmp_path / "saved")
    break_saved(tmp_path / "saved", name, content)
    try:
        assert len(load(tmp_path / "saved")) == 200  # what is missing was not needed
    except UserError as error:
        text = checked(error)
        assert str(tmp_path / "saved") in text
        assert "dataset_local_cache_dir" not in text


def test_a_file_name_that_is_no_utf8(load, tmp_path):
    """Linux allows any bytes in a name; what is printed and stored is text."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    Path(os.fsdecode(path)).write_bytes(lines(TEXT, TEXT))
    try:
        assert len(load(os.fsdecode(path))) == 2
    except UserError as error:
        assert "caf" in checked(error)


CORRUPT = """
import json, sys
from open_rm.data.building import load_preference_data
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import DataFlags
source, model, cache = sys.argv[1:]
try:
    flags = DataFlags(dataset_mixer_list=[source, "1.0"], skip_bad_rows=10**6, dataset_local_cache_dir=cache)
    load_preference_data(flags, load_tokenizer(model))
except UserError as error:
    print(json.dumps(str(error)))
"""


def test_an_arrow_file_with_wild_offsets_does_not_end_the_process(toy, tmp_path):
    """Arrow reads lengths from the file without looking; a flipped bit then points anywhere in memory."""
    content = bytearray(arrow_bytes(many(50)))
    table = pa.ipc.open_stream(bytes(content)).read_all()
    offsets = table.column("chosen").chunk(0).buffers()[1].to_pybytes()[: 4 * 51]
    where = bytes(content).index(offsets)
    content[where + 40 : where + 44] = (2**31 - 1).to_bytes(4, "little")
    path = tmp_path / "a.arrow"
    path.write_bytes(bytes(content))
    assert "a.arrow" in in_a_process(CORRUPT, path, toy / "model", tmp_path / "cache")


# ---- the command line


@pytest.mark.parametrize("case", ["truncated gzip", "csv with an open quote", "bad row"])
def test_the_command_line_ends_with_one_sentence(toy, tmp_path, case, run_forked):
    name, content = {
        "truncated gzip": ("a.jsonl.gz", GZ[:-1000]),
        "csv with an open quote": ("a.csv", FILES["a csv with a quote that stays open"][1]),
        "bad row": ("a.jsonl", lines(TEXT, {"\u2028\ud83d\n": "\x1b[31m"}, TEXT)),
    }[case]
    (tmp_path / name).write_bytes(content)
    done = run_forked(*toy_flags(toy, tmp_path / "out", dataset_mixer_list=[tmp_path / name, "1.0"]))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.split("\n") if line.startswith("error:")]
    assert len(errors) == 1 and name in errors[0]
    assert done.stderr.rstrip("\n").endswith(errors[0])  # and nothing after it


# ---- random rows

COLUMNS = ["prompt", "chosen", "rejected", "messages", "rejected_messages", "rejected_response", "responses", "scores"]
COLUMNS += ["response_a", "response_b", "winner", "chosen_input_ids", "rejected_input_ids", "prompt_input_ids"]
COLUMNS += ["margin", "tools", "chat_template_kwargs"]
WORDS = ["", " ", "a", "yes", "user", "assistant", "system", "tool", "tie", "A", "model_b", "<|eos|>", "<|pad|>", "nan"]
WORDS += ["Q: ", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "\x00", "\ud83d", "a\nb", "[]", "{}", "1e400", "-0"]
KEYS = ["role", "content", "name", "tool_calls", "tool_call_id", "tools", "messages", "tokenize", "documents", "self"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Zl"]), max_size=3),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4),
        st.fixed_dictionaries({"role": st.sampled_from(WORDS), "content": inner}),
    ),
    max_leaves=10,
)
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "sum"}}]}
VALID = [
    TEXT,
    {"chosen": "Q: yes", "rejected": "Q: no", "margin": 0.5},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    CHAT,
    CHAT | {"tools": [TOOL], "chat_template_kwargs": {"mood": "kind"}},
    {"chosen": [SYSTEM, user("a"), assistant("b")], "rejected": [SYSTEM, user("a"), assistant("c")], "prompt": "a"},
    {"chosen": [user("a"), CALL, {"role": "tool", "content": "3"}, assistant("b")], "rejected": [user("a"), CALL]},
    {"messages": [user("a"), assistant("b")], "rejected_messages": [user("a"), assistant("c")]},
    SPLIT,
    RANKED | {"scores": [1, 2, 2.5]},
    {"prompt": [user("a")], "responses": [[assistant("b")], [assistant("c")]], "margin": "1"},
    LABELLED,
    LABELLED | {"winner": "tie (both bad)"},
    IDS,
    IDS | {"prompt_input_ids": [7]},
]
READINGS = [  # the data flags that decide them
    {},
    {"parse_hh": True},
    {"column_map": ["prompt=messages", "chosen=response_a"]},
    {"margin_from": ["margin", "winner"]},
    {"margin_from": ["scores", "margin"], "parse_hh": True},
]


@st.composite
def mutated(draw):
    """A valid row of which one to three parts, at any depth, are replaced, removed or repeated."""
    row = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 3))):
        parent = row
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(parent[key], dict | list) and draw(st.booleans()):
                parent = parent[key]
                continue
            change = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
            if change == "remove":
                del parent[key]
            elif change == "repeat" and isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            else:
                parent[key] = draw(VALUES)
            break
    return row


@st.composite
def reworded(draw):
    """A valid row whose texts and numbers are others: most are read, and what they say may still be odd."""

    def other(value, key):
        if isinstance(value, dict):
            return {name: other(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [other(item, key) for item in value]
        if key in ("role", "type", "winner") or value is None:
            return value
        if isinstance(value, str):
            return draw(st.sampled_from([value, value + value, *WORDS]) | st.text(min_size=1, max_size=8))
        return draw(st.integers(0, 12) if isinstance(value, int) else st.floats(-9, 9))

    return other(draw(st.sampled_from(VALID)), None)


RANDOM_ROWS = st.integers(0, 9).flatmap(
    lambda i: (
        reworded()
        if i < 5
        else mutated()
        if i < 8
        else st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=3), VALUES, max_size=8)
        if i < 9
        else VALUES
    )
)


def kind(pair) -> str:
    """What a pair is made of; fails where its parts do not agree."""
    if isinstance(pair.chosen, str):
        assert isinstance(pair.rejected, str) and isinstance(pair.prompt, str)
        return "text"
    parts = (pair.prompt, pair.chosen, pair.rejected)
    assert all(isinstance(part, list) for part in parts) and pair.chosen and pair.rejected
    element = dict if isinstance(pair.chosen[0], dict) else int
    assert all(type(item) is element for part in parts for item in part)
    return "messages" if element is dict else "token ids"


def read(row, reading: dict) -> Row | None:
    try:
        return read_row(row, make_reading(DataFlags(**reading)))
    except UserError as error:
        checked(error)
        return None


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(row=RANDOM_ROWS, reading=st.sampled_from(READINGS))
def test_random_rows_are_read_or_refused_in_one_sentence(row, reading):
    before = repr(row)
    result = read(row, reading)
    assert repr(row) == before
    if result is None:
        return
    assert result.form in FORMS or result.form in PUBLIC
    assert result.ties >= 0 and len(result.pairs) + result.ties >= 1
    assert len({kind(pair) for pair in result.pairs}) <= 1
    for pair in result.pairs:
        assert pair.chosen != pair.rejected
        assert pair.margin is None or (type(pair.margin) is float and math.isfinite(pair.margin))
        assert isinstance(pair.template, dict) and all(isinstance(key, str) for key in pair.template)
        assert not pair.template or kind(pair) == "messages"
        if kind(pair) == "messages":
            assert pair.chosen[-1]["role"] == pair.rejected[-1]["role"] == "assistant"


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(RANDOM_ROWS, min_size=1, max_size=25),
    reading=st.sampled_from(READINGS[:2]),
    overlength=st.sampled_from(["filter", "truncate"]),
    max_token_length=st.sampled_from([4, 24, 512]),
)
def test_random_files_are_loaded_and_every_row_is_accounted_for(toy, rows, reading, overlength, max_token_length):
    tokenizer = load_tokenizer(str(toy / "model"))
    results = [read(row, reading) for row in rows]
    for wanted in ("text", "messages", "token ids"):
        # rows of one kind, those that are refused, and one good row so that there always is something
        picked = [i for i, r in enumerate(results) if r is None or {kind(p) for p in r.pairs} <= {wanted}]
        good = {"text": {"chosen": "a", "rejected": "b"}, "token ids": IDS}.get(wanted, CHAT)
        written = [good, *(rows[i] for i in picked)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.write_bytes(lines(*written))
            try:
                data = read_pairs(
                    [path, "1.0"],
                    tokenizer,
                    max_token_length=max_token_length,
                    max_prompt_token_length=max_token_length,
                    dataset_local_cache_dir=folder,
                    overlength=overlength,
                    skip_bad_rows=len(written),
                    **reading,
                )
            except UserError as error:
                assert "no pairs" in checked(error)
                continue
            skipped = {entry["place"]: entry["what"] for entry in data.facts[0]["skipped"]}
            places, sides = data.places(range(len(data))), in_order(data.pairs(range(len(data))))
        assert all(len(what.splitlines()) == 1 for what in skipped.values())
        refused = {f"{path}:{number}" for number, i in enumerate(picked, start=2) if results[i] is None}
        assert refused <= skipped.keys()
        assert not refused & set(places)
        pairs = 1 + sum(
            len(results[i].pairs) for number, i in enumerate(picked, start=2) if f"{path}:{number}" not in skipped
        )
        facts = data.facts[0]
        assert facts["kept"] + sum(entry["count"] for entry in facts["dropped"].values()) == pairs
        for chosen, rejected in sides:
            assert chosen != rejected and min(len(chosen), len(rejected)) > 0
            assert max(len(chosen), len(rejected)) <= max_token_length
            assert tokenizer.pad_token_id not in chosen + rejected
