"""Rows of every accepted form, mixing, filtering, cache, and one sentence for everything that is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import shared_data
from pyarrow import parquet

from open_rm.batching.dealing import deal_step
from open_rm.batching.feeding import micro_batches
from open_rm.batching.rules import BatchRules
from open_rm.data.building import read_both
from open_rm.data.mixer import label_of, parse_mixer
from open_rm.data.readers import open_source
from open_rm.data.reading import Reading
from open_rm.data.rows import read_row
from open_rm.errors import UserError
from open_rm.flags import DataFlags


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PROMPT = [user("Write a happy line about the lake.")]
GOOD, BAD = [assistant("The lake is glad.")], [assistant("The lake is grey.")]
NORMAL = (PROMPT, GOOD, BAD)
SYSTEM = [{"role": "system", "content": "Be kind."}]
TEXT = {"prompt": "Q: ", "chosen": "yes", "rejected": "no"}


def normalise_row(row):
    [pair] = read_row(row).pairs
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": PROMPT, "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": PROMPT[0]["content"], "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": PROMPT[0]["content"], "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": GOOD[0]["content"], "rejected": BAD[0]["content"]},
    ],
    ids=["explicit", "implicit", "repeated", "text beside messages", "text prompt", "text answers"],
)
def test_all_forms_of_a_conversation_are_the_same_row(row):
    assert normalise_row(row) == NORMAL


def test_empty_keys_that_a_table_file_adds_to_one_side_change_nothing():
    """Parquet gives every message all keys; compared whole, the prompt would be found in one side only."""
    padded = [{**message, "name": None} for message in PROMPT + GOOD]
    assert normalise_row({"prompt": PROMPT, "chosen": padded, "rejected": PROMPT + BAD}) == NORMAL


def test_conversations_may_part_before_the_last_turn():
    row = {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("x")]}
    prompt, chosen, rejected = normalise_row(row)
    assert (prompt, len(chosen), len(rejected)) == ([user("a")], 3, 1)


@pytest.mark.parametrize(
    "row",
    [
        TEXT,
        {"prompt": "Q: ", "chosen": "Q: yes", "rejected": "Q: no"},
        {"chosen": "Q: yes", "rejected": "Q: no"},
    ],
)
def test_text_prompt_is_counted_once(row):
    prompt, chosen, rejected = normalise_row(row)
    assert (prompt + chosen, prompt + rejected) == ("Q: yes", "Q: no")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([1, 2], "a row is an object"),
        ({"chosen": "a"}, "no value for rejected; the row has the columns chosen"),
        (
            {"question": "a", "answer": "b"},
            "no value for chosen and rejected; the row has the columns answer, question",
        ),
        ({"chosen": None, "rejected": "b"}, "no value for chosen"),
        ({"chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"chosen": "a", "rejected": " \n"}, "rejected is empty"),
        ({"chosen": "a", "rejected": "a"}, "identical"),
        ({"prompt": PROMPT, "chosen": GOOD, "rejected": GOOD}, "identical"),
        ({"prompt": PROMPT, "chosen": [assistant(" ")], "rejected": BAD}, "chosen is empty"),
        ({"prompt": PROMPT, "chosen": [], "rejected": BAD}, "chosen must be text or a list of messages, not empty"),
        (
            {"prompt": PROMPT, "chosen": GOOD, "rejected": [{"role": "bot", "content": "x"}]},
            "role 'bot'; the roles are",
        ),
        ({"prompt": PROMPT, "chosen": GOOD, "rejected": [user("x")]}, "rejected must end with an assistant message"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "must end with an assistant message"),
        ({"chosen": GOOD, "rejected": [{"role": "assistant", "content": None}]}, "not a message with role and content"),
        ({"chosen": GOOD, "rejected": ["x", 3]}, "not a message with role and content"),
        (
            {"prompt": PROMPT, "chosen": PROMPT + GOOD, "rejected": BAD},
            "chosen begins with the prompt and rejected does not",
        ),
        ({"prompt": PROMPT, "chosen": SYSTEM + PROMPT + GOOD, "rejected": SYSTEM + PROMPT + BAD}, "same prompt"),
        ({"prompt": "Other", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}, "prompt column is no turn"),
        ({"prompt": "Q", "chosen": SYSTEM + GOOD, "rejected": SYSTEM + BAD}, "prompt column is no turn"),
        ({"chosen": [*PROMPT, *GOOD, user("a"), *GOOD], "rejected": [*PROMPT, *GOOD, user("b"), *BAD]}, "same prompt"),
        ({"chosen": 3, "rejected": 4}, "must be text or a list of messages, not int"),
    ],
)
def test_a_bad_row_gets_one_sentence(row, sentence):
    with pytest.raises(UserError, match=sentence):
        normalise_row(row)


def rows(count):
    return [{"prompt": "Q: ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


def decoded(data, tokenizer):
    return [tokenizer.decode(chosen) for chosen, _ in data.pairs(range(len(data)))]


def test_jsonl_json_and_parquet_hold_the_same_pairs(load, write_rows, tmp_path, tokenizer):
    content = rows(5)
    (tmp_path / "array.json").write_text(json.dumps(content))
    parquet.write_table(pa.Table.from_pylist(content), tmp_path / "table.parquet")
    paths = [
        write_rows(content),
        write_rows(content, "lines.json"),
        tmp_path / "array.json",
        tmp_path / "table.parquet",
    ]
    results = [decoded(load([path, "1.0"]), tokenizer) for path in paths]
    assert results[0] == [f"Q: yes {i}<|eos|>" for i in range(5)]
    assert all(result == results[0] for result in results)


def test_conversations_survive_parquet(load, tmp_path, tokenizer):
    parquet.write_table(
        pa.Table.from_pylist([{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}] * 2), tmp_path / "chat.parquet"
    )
    data = load([tmp_path / "chat.parquet", "1.0"])
    assert data.chat
    assert decoded(data, tokenizer)[0] == tokenizer.apply_chat_template(PROMPT + GOOD, tokenize=False)


def test_counts_fractions_and_repeats_are_exact_and_seeded(load, write_rows, tokenizer):
    path = write_rows(rows(10))
    assert len(load([path, "4"])) == 4
    assert len(load([path, "0.3"])) == 3
    assert decoded(load([path, "4"]), tokenizer) == decoded(load([path, "4"]), tokenizer)
    assert decoded(load([path, "4"]), tokenizer) != decoded(load([path, "4"], seed=2), tokenizer)
    repeated = decoded(load([path, "25"]), tokenizer)
    assert len(repeated) == 25
    assert {repeated.count(text) for text in repeated} == {2, 3}


def test_sources_are_told_apart(load, write_rows):
    data = load([write_rows(rows(3), "a.jsonl"), "1.0", write_rows(rows(2), "b.jsonl"), "1.0"])
    assert data.source_ids().tolist() == [0, 0, 0, 1, 1]
    assert [label.rpartition("_")[2] for label in data.labels] == ["a", "b"]


def test_overlength_pairs_are_filtered_and_counted(load, write_rows, tokenizer):
    content = rows(3) + [
        {"prompt": "Q " * 50, "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "y " * 80, "rejected": "n"},
    ]
    data = load([write_rows(content), "1.0"], max_token_length=70, max_prompt_token_length=40)
    assert len(data) == 3
    assert max(data.table.chosen_length.max(), data.table.rejected_length.max()) <= 70
    line = data.lines[0]
    assert (
        "5 rows (4 text, prompt given; 1 text, prompt implied), 5 taken, 1 filtered (prompt > 40 tokens; first " in line
    )
    assert "1 filtered (a side > 70 tokens; first " in line and line.endswith("3 pairs kept")
    assert data.facts[0]["dropped"]["prompt > 40 tokens"]["first"].endswith("rows.jsonl:4")


def test_the_table_says_of_each_pair_what_its_tokens_say(load, write_rows):
    """Lengths, the tokens both sides start with (short of the last), and equal ids exactly where tokens are equal."""
    answers = [" yes", " yes indeed", " no", " no", " never"]
    content = [
        {"prompt": prompt, "chosen": a, "rejected": b}
        for prompt in ("Q:", "Another question:")
        for a in answers
        for b in answers
        if a != b
    ]
    data = load([write_rows(content), "1.0"])
    table, pairs = data.table, data.pairs(range(len(data)))
    assert len(table) == len(pairs) == len(content)
    for i, (chosen, rejected) in enumerate(pairs):
        shortest = min(len(chosen), len(rejected))
        same = np.cumprod(chosen[:shortest] == rejected[:shortest]).sum()
        assert (table.chosen_length[i], table.rejected_length[i]) == (len(chosen), len(rejected))
        assert table.shared_length[i] == min(same, shortest - 1)
    prompts = [tuple(chosen[:length]) for (chosen, _), length in zip(pairs, table.prompt_length, strict=True)]
    sides = [tuple(side) for pair in zip(*pairs, strict=True) for side in pair]
    for ids, tokens in ((table.prompt_id, prompts), (np.concatenate((table.chosen_id, table.rejected_id)), sides)):
        assert len(set(ids.tolist())) == len(set(tokens)) == len(set(zip(ids.tolist(), tokens, strict=True)))
    assert len(set(table.prompt_id.tolist())) == 2


def test_filtering_everything_says_what_was_filtered(load, write_rows):
    with pytest.raises(UserError, match="no pairs are left.*3 filtered.*raise --max_token_length"):
        load([write_rows(rows(3)), "1.0"], max_token_length=2, max_prompt_token_length=2)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"chosen": "a", "rejected": "b"}', '{"chosen": '], r"rows.jsonl:2: not valid JSON"),
        (['{"chosen": "a", "rejected": "b"}', "", '{"chosen": ""}'], r"rows.jsonl:3: no value for rejected"),
        (['{"chosen": "a", "rejected": "a"}'], r"rows.jsonl:1: .*identical"),
        (['{"chosen": "x<|pad|>", "rejected": "a"}'], r"rows.jsonl:1: the text contains the pad token"),
        (['{"chosen": "a", "rejected": "\\ud83d"}'], r"rows.jsonl:1: the text holds half a surrogate pair"),
        (['{"chosen": "\x00'], r"rows.jsonl:1: not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(load, write_rows, lines, sentence):
    with pytest.raises(UserError, match=sentence):
        load([write_rows(lines), "1.0"])


def test_bytes_that_are_not_utf8_are_named_by_file_and_line(load, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"chosen": "caf\xe9", "rejected": "b"}\n')
    with pytest.raises(UserError, match="latin.jsonl:1: not UTF-8"):
        load([tmp_path / "latin.jsonl", "1.0"])


@pytest.mark.parametrize(
    ("mixer", "splits", "sentence"),
    [
        (["a.jsonl"], ["train"], "alternates name and amount"),
        (["no/such/file.jsonl", "1.0"], ["train"], "no file or folder"),
        (["a/b", "half"], ["train"], "write a count"),
        (["a/b", "0"], ["train"], "write a count"),
        (["a/b", "1.0"], ["train", "test"], "2 values for 1 sources"),
    ],
)
def test_a_bad_mixer_names_its_flag(mixer, splits, sentence):
    with pytest.raises(UserError, match=f"--dataset_mixer_list.*{sentence}"):
        parse_mixer(mixer, splits, "dataset_mixer_list")


def test_unknown_split_of_a_folder_names_the_splits_there_are(toy):
    with pytest.raises(UserError, match="no split 'validation'; it has test, train"):
        parse_mixer([str(toy / "data"), "1.0"], ["validation"], "dataset_mixer_list")


def test_text_and_messages_are_not_mixed(load, write_rows):
    rows = [TEXT, {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}]
    with pytest.raises(UserError, match="rows.jsonl:2: the rows before are text and this one is messages"):
        load([write_rows(rows), "1.0"])


def test_a_source_without_rows_says_so(load, write_rows, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows at all"):
        load([tmp_path / "empty.jsonl", "1.0"])
    with pytest.raises(UserError, match="no rows at all"):
        load([write_rows(rows(3)), "0.001"])


def test_pairs_of_one_prompt_have_one_id_also_where_its_last_token_merges_with_the_answer(load, write_rows):
    content = [{"prompt": "Q: ", "chosen": f"{a} it is", "rejected": f"{b} it is"} for a, b in ("xy", "yz", "xz")]
    data = load([write_rows(content), "1.0"])
    assert len(set(data.table.prompt_id.tolist())) == 1


def answered(prompt: str, chosen: int, rejected: int) -> dict:
    """A row whose answers have about so many tokens."""
    return {"prompt": prompt, "chosen": "yes " * chosen, "rejected": "no " * rejected}


def test_a_prompt_is_the_same_however_its_answers_cut_it(load, write_rows):
    content = [answered("one two three four ", *sizes) for sizes in ((2, 4), (4, 2), (8, 4), (90, 4), (80, 4))]
    content += [answered("five six seven eight ", 90, 4)]
    content += [{"chosen": f"I {a} it", "rejected": f"I {b} it"} for a, b in ("xy", "yz")]  # alike, but no prompt
    data = load([write_rows(content), "1.0"], max_token_length=32, overlength="truncate")
    ids, cut = data.table.prompt_id.tolist(), data.table.cut_prompt_ids(np.arange(8)).tolist()
    assert len(set(ids[:5])) == 1
    assert len({ids[0], *ids[5:]}) == 4
    prompts = [tuple(chosen[:n]) for (chosen, _), n in zip(data.pairs(range(8)), data.table.prompt_length, strict=True)]
    assert 2 < len(set(prompts[:5])) < 5
    assert [cut.index(one) for one in cut[:5]] == [prompts.index(one) for one in prompts[:5]]
    assert data.facts[0]["promptless"] == sum(len(prompt) < 2 for prompt in prompts[:6]) == 3
    assert f"{data.facts[0]['truncated']} truncated (3 lost their whole prompt)" in data.lines[0]


def test_pairs_without_a_prompt_are_not_of_one_prompt(load, write_rows):
    """What the template writes before an answer, or both texts' first word, is no prompt; what HH text shares is."""
    alone = [
        {"chosen": [assistant(f"{a} it is")], "rejected": [assistant(f"{b} it is")]} for a, b in ("xy", "yz", "xz")
    ]
    assert len(set(load([write_rows(alone), "1.0"]).table.prompt_id.tolist())) == 3
    start = "\n\nHuman: Tell me something about the lake.\n\nAssistant: "
    hh = [{"chosen": start + a, "rejected": start + b} for a, b in (("yes", "no"), ("glad", "sad"))]
    assert len(set(load([write_rows(hh), "1.0"]).table.prompt_id.tolist())) == 1


def test_micro_batches_of_cut_prompts_hold_what_was_planned(load, write_rows):
    rng = np.random.default_rng(0)
    content = [answered(f"{i % 8} and " * 9, *rng.integers(1, 50, 2).tolist()) for i in range(64)]
    data = load([write_rows(content), "1.0"], max_token_length=64, overlength="truncate")
    assert len(set(data.table.prompt_id.tolist())) < len(set(data.table.cut_prompt_ids(np.arange(len(data))).tolist()))
    rules = BatchRules("shared_prefix", pad_token_id=2, max_tokens=300, evaluation_tokens=300)
    deal = deal_step(np.arange(len(data)), data.table, rules, world_size=2)
    for parts in deal.ranks:
        for part, micro in zip(parts, micro_batches(parts, data, rules), strict=True):
            assert micro.batch.computed <= 300 or len(part.indices) == 1


def test_labels_of_sources_are_unique(write_rows, tmp_path):
    for folder in ("b/x", "c/x", "d"):
        (tmp_path / folder).mkdir(parents=True)
    names = ["b/x/t.jsonl", "c/x/t.jsonl", "d/x_t_2.jsonl"]
    for name in names:
        (tmp_path / name).write_text("{}")
    mixer = [part for name in names for part in (str(tmp_path / name), "1.0")]
    labels = [source.label for source in parse_mixer(mixer, ["train"], "dataset_mixer_list")]
    assert labels == ["x_t", "x_t_2", "d_x_t_2"]


@pytest.mark.parametrize(
    ("name", "split", "files", "label"),
    [
        ("my/pairs.jsonl", "train", ["my/pairs.jsonl"], "my_pairs"),
        ("my", "train", ["my/train.jsonl", "my/test.jsonl"], "my_train"),
        ("sets/my", "train", ["sets/my/train-0-of-2.csv", "sets/my/train-1-of-2.csv"], "sets_my_train"),
        ("my/*.jsonl", "train", ["my/a.jsonl", "my/b.jsonl"], "my"),
        ("org/name:config", "train", [], "nameconfig"),
    ],
)
def test_metrics_call_a_source_by_its_files_or_its_name(tmp_path, monkeypatch, name, split, files, label):
    monkeypatch.chdir(tmp_path)
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    [source] = parse_mixer([name, "1.0"], [split], "dataset_mixer_list")
    assert source.label == label_of(name, split, source.paths) == label


def test_an_opened_source_knows_its_rows_before_they_are_read_and_is_read_as_often_as_asked(write_rows, tmp_path):
    """Of several files the rows follow each other; the fingerprint is that of the content, wherever it lies."""

    def opened(pattern):
        return open_source(parse_mixer([str(pattern), "1.0"], ["train"], "dataset_mixer_list")[0])

    first, second = write_rows(rows(2), "x-1.jsonl"), write_rows([*rows(3)[2:], "{"], "x-2.jsonl")
    both = opened(tmp_path / "x-*.jsonl")
    assert both.size == 4
    for _ in range(2):
        found = list(both.rows())
        assert [place for place, _ in found] == [f"{path}:{line}" for path in (first, second) for line in (1, 2)]
        assert [row for _, row in found[:3]] == rows(3)
        assert isinstance(found[3][1], UserError)
    (tmp_path / "copy").mkdir()
    for path in (first, second):
        shutil.copy(path, tmp_path / "copy")
    assert opened(tmp_path / "copy" / "x-*.jsonl").fingerprint == both.fingerprint
    write_rows(rows(1), "x-2.jsonl")
    assert opened(tmp_path / "x-*.jsonl").fingerprint != both.fingerprint


def test_lines_for_the_log_say_of_which_split_they_are(write_rows, tokenizer, tmp_path):
    train, test = write_rows([{}, *rows(3), {}], "train.jsonl"), write_rows(rows(2), "test.jsonl")
    flags = DataFlags(
        dataset_mixer_list=[str(train), "1.0"],
        dataset_mixer_eval_list=[str(test), "1.0"],
        skip_bad_rows=2,
        dataset_local_cache_dir=str(tmp_path / "cache"),
    )
    pairs, held_out = read_both(flags, tokenizer, seed=1)
    assert (len(pairs), len(held_out)) == (3, 2)
    assert [line.partition(":")[0] for line in pairs.lines + held_out.lines] == ["train"] * 3 + ["eval"] * 2
    assert pairs.lines[0].startswith(f"train: {train}: 5 rows") and f"skipped {train}:5: " in pairs.lines[2]
    assert pairs.lines[1] == "train:   columns read: prompt, chosen, rejected; not read: none"
    assert held_out.lines[0].startswith(f"eval: {test}: 2 rows")
    alone = dataclasses.replace(flags, dataset_mixer_eval_list=[])
    assert read_both(alone, tokenizer, seed=1)[1] is None


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json"])
def test_a_byte_order_mark_is_read_over(load, tmp_path, name):
    content = json.dumps(rows(1)) if name == "array.json" else json.dumps(rows(1)[0])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert len(load([tmp_path / name, "1.0"])) == 1


def test_a_line_nested_without_end_is_named(load, write_rows):
    with pytest.raises(UserError, match="rows.jsonl:1: (nested too deeply|not valid JSON)"):
        load([write_rows(['{"chosen": ' + "[" * 100_000]), "1.0"])


def test_unreadable_parquet_is_named(load, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="broken.parquet: not a readable parquet file"):
        load([tmp_path / "broken.parquet", "1.0"])


def caches(tmp_path):
    return sorted(path.parent for path in (tmp_path / "cache").glob("*/manifest.json"))


def test_cache_is_found_again_and_knows_content_lengths_and_tokenizer(load, write_rows, tmp_path, tokenizer):
    path = write_rows(rows(4))
    load([path, "1.0"])
    [made] = caches(tmp_path)
    stamp = made.stat().st_mtime_ns
    load([path, "1.0"])
    assert [folder.stat().st_mtime_ns for folder in caches(tmp_path)] == [stamp]
    load([path, "1.0"], max_token_length=100, max_prompt_token_length=100)
    load([path, "1.0"], overlength="truncate")
    load([path, "1.0"], skip_bad_rows=1)
    load([path, "1.0"], column_map=["prompt=prompt"])
    write_rows(rows(5))
    load([path, "1.0"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    load([path, "1.0"])
    assert len(caches(tmp_path)) == 7
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_several_processes_make_the_same_cache_as_one(load, write_rows, tmp_path):
    path = write_rows(rows(2500) + [{"prompt": "Q", "chosen": "a" * 600, "rejected": "b"}] + rows(700))
    one = load([path, "1.0"], dataset_local_cache_dir=str(tmp_path / "one"))
    two = load([path, "1.0"], dataset_local_cache_dir=str(tmp_path / "two"), num_proc=2)
    assert one.facts == two.facts
    assert one.dataset.remove_columns("margin").to_dict() == two.dataset.remove_columns("margin").to_dict()
    with pytest.raises(UserError, match="rows.jsonl:3: .*identical"):
        write_rows([*rows(2), {"chosen": "a", "rejected": "a"}])
        load([path, "1.0"], num_proc=2)


def test_a_failed_build_leaves_nothing_in_the_cache(load, write_rows, tmp_path):
    with pytest.raises(UserError):
        load([write_rows(["{"]), "1.0"])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


@pytest.mark.parametrize(("name", "chat", "pairs"), [("hh_harmless", False, 300), ("alpaca_eval", True, 233)])
def test_real_data_is_read_whole(load, name, chat, pairs, tokenizer):
    data = load([shared_data(name), "1.0"], splits=["test"], max_token_length=100_000, max_prompt_token_length=100_000)
    assert (len(data), data.chat) == (pairs, chat)
    first = json.loads((shared_data(name) / "test.jsonl").open().readline())
    text = tokenizer.decode(data.pairs([0])[0][0])
    answer = first["chosen"] if isinstance(first["chosen"], str) else first["chosen"][-1]["content"]
    assert text.rstrip().endswith(answer[-40:] + tokenizer.eos_token)


READ = [
    (
        "b wins",
        {"response_a": "x", "response_b": "y", "winner": "b", "sa": 1, "sb": 5},
        {"margin_from": ("sa", "sb")},
        4.0,
    ),
    (
        "a wins",
        {"response_a": "x", "response_b": "y", "winner": "a", "sa": 5, "sb": 1},
        {"margin_from": ("sa", "sb")},
        4.0,
    ),
]


@pytest.mark.parametrize(("row", "reading", "margin"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_the_margin_of_a_labelled_row_is_that_of_its_winner(row, reading, margin):
    assert read_row(row, Reading(**reading)).pairs[0].margin == margin


def test_hh_text_with_a_prompt_column_is_parsed_and_other_text_is_refused_with_parse_hh():
    hh = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " x", "rejected": " y"}
    [pair] = read_row(hh, Reading(parse_hh=True)).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("hi")], [assistant("x")], [assistant("y")])
    assert read_row(hh).pairs[0].kind == "text"
    with pytest.raises(UserError, match="--parse_hh reads nothing else"):
        read_row(TEXT, Reading(parse_hh=True))


def test_a_row_of_two_forms_is_refused_unless_the_columns_are_mapped():
    both = {"prompt": "p", "chosen": "a", "rejected": "b", "responses": ["c", "d"]}
    with pytest.raises(UserError, match="chosen and rejected and also responses; say which are meant"):
        read_row(both)
    mapped = read_row(both, Reading(column_map={"chosen": "chosen", "rejected": "rejected"}))
    assert (mapped.pairs[0].chosen, mapped.pairs[0].rejected) == ("a", "b")
    assert read_row(both, Reading(column_map={"responses": "responses"})).pairs[0].chosen == "c"


def test_columns_of_the_form_that_is_mapped_are_read_although_another_form_is_there_too():
    row = {"asked": "q", "better": "a", "worse": "b", "messages": PROMPT + GOOD, "rejected_messages": PROMPT + BAD}
    [pair] = read_row(row, Reading({"prompt": "asked", "chosen": "better", "rejected": "worse"})).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "a", "b")
    assert normalise_row(row) == NORMAL
    with pytest.raises(UserError, match="no prompt, and its column messages looks like one"):
        read_row(row, Reading({"chosen": "better", "rejected": "worse"}))


def test_files_that_could_all_be_a_split_are_refused_and_shards_are_one(load, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        (folder / f"train-0000{i}-of-00002.jsonl").write_text(json.dumps(rows(2)[i]))
    (folder / "train-prefs.jsonl").write_text(json.dumps(rows(3)[2]))
    assert len(load([folder, "1.0"])) == 2
    (folder / "train.csv").write_text("chosen,rejected\na,b\n")
    with pytest.raises(UserError, match="several files of .* could be its split 'train'"):
        load([folder, "1.0"])
