"""Messages as JSON text, HH text in every form, and other ways in which a row says more than its columns' names."""

import json
import os
import subprocess
import sys

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from conftest import REPOSITORY
from pyarrow import parquet
from word_level import load as load_made
from word_level import make

from open_rm.data import building, preparation
from open_rm.data.encoding import encode_pairs, render_pair
from open_rm.data.mixer import parse_mixer
from open_rm.data.readers import open_source
from open_rm.data.reading import Reading
from open_rm.data.rows import most_pairs, read_row
from open_rm.data.tokenizer import DATE, prints_date
from open_rm.errors import UserError

Q = [{"role": "user", "content": "q"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": Q + YES, "rejected": Q + NO},
        {"prompt": Q, "chosen": YES, "rejected": NO},
        {"messages": Q + YES, "rejected_messages": Q + NO},
        {"prompt": Q, "response_a": NO, "response_b": YES, "winner": "b"},
    ],
)
def test_messages_as_json_text_in_a_table_are_read_as_messages(row, load, write_rows, tmp_path):
    as_text = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
    assert read_row(as_text).pairs == read_row(row).pairs
    csv = tmp_path / "rows.csv"
    pd.DataFrame([as_text]).to_csv(csv, index=False)
    found = load([csv, "1.0"])
    assert found.chat
    assert found.pairs([0])[0][0].tolist() == load([write_rows([row]), "1.0"]).pairs([0])[0][0].tolist()


def test_text_that_only_looks_like_messages_stays_text_and_pythons_own_print_is_refused():
    row = {"chosen": '[{"a": 1}]', "rejected": '[{"role": "x"}, 3]'}
    assert read_row(row).pairs[0].kind == "text"
    with pytest.raises(UserError, match="chosen is a list of messages as Python prints it; write it as JSON"):
        read_row({"chosen": str(Q + YES), "rejected": str(Q + NO)})


HH = ("\n\nHuman: q\n\nAssistant: yes", "\n\nHuman: q\n\nAssistant: no")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HH[0], "rejected": HH[1]},
        {"responses": list(HH)},
        {"response_a": HH[1], "response_b": HH[0], "winner": "b"},
        {"prompt": "\n\nHuman: q", "responses": ["\n\nAssistant: no", "\n\nAssistant: yes"], "scores": [1, 2]},
    ],
)
def test_parse_hh_reads_every_form_of_text(row):
    [pair] = read_row(row, Reading(parse_hh=True)).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (Q, YES, NO)


def test_parse_hh_refuses_other_text_in_every_form():
    for row in ({"responses": ["a", "b"]}, {"response_a": "a", "response_b": "b", "winner": "a"}):
        with pytest.raises(UserError, match="--parse_hh reads nothing else"):
            read_row(row, Reading(parse_hh=True))


def test_trls_names_for_token_ids_are_read():
    [pair] = read_row({"chosen_ids": [1, 2], "rejected_ids": [1, 3]}).pairs
    assert (pair.kind, pair.chosen) == ("token ids", [1, 2])


def test_a_mapping_of_two_columns_outweighs_a_third():
    row = {"conv": Q + YES, "bad": "no", "rejected_messages": Q + YES}
    [pair] = read_row(row, Reading({"messages": "conv", "rejected_response": "bad"})).pairs
    assert (pair.chosen, pair.rejected) == (YES, NO)


# ---- sources


def test_a_column_that_stands_twice_is_refused_by_file(tmp_path):
    table = pa.table([pa.array([text]) for text in ("good", "bad", "better")], names=["chosen", "rejected", "chosen"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=f"{name}: the column 'chosen' stands twice"):
            open_source(parse_mixer([str(tmp_path / name), "1.0"], ["train"], "f")[0])


def test_a_shard_that_is_missing_is_told(tmp_path):
    (tmp_path / "train-00000-of-00003.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    (tmp_path / "train-00002-of-00003.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match="1 of 3 files are missing, the first number 1"):
        parse_mixer([str(tmp_path), "1.0"], ["train"], "f")


@pytest.mark.parametrize("how", ["pandas", "arrow", "numpy", "columns"])
def test_a_saved_data_set_is_read_whatever_format_it_was_saved_in(how, load, tmp_path):
    rows = datasets.Dataset.from_dict({"chosen": ["a b"], "rejected": ["c"], "prompt": ["q "]})
    rows = rows.with_format(None, columns=["chosen", "rejected"]) if how == "columns" else rows.with_format(how)
    rows.save_to_disk(tmp_path / "saved")
    found = load([tmp_path / "saved", "1.0"])
    assert found.lines[0].count("text, prompt given") == 1


def test_a_csv_record_is_named_by_its_first_line(load, tmp_path):
    (tmp_path / "a.csv").write_text('chosen,rejected\n"a\nb",c\n"d\ne\nf",d\n"g\nh","g\nh"\n')
    with pytest.raises(UserError, match=r"a.csv:7: chosen and rejected are identical"):
        load([tmp_path / "a.csv", "1.0"])


@pytest.mark.parametrize("amount", ["1.0e999", "9" * 30])
def test_an_amount_beyond_reason_is_refused(amount):
    with pytest.raises(UserError, match="the amount after x is"):
        parse_mixer(["x", amount], ["train"], "f")


# ---- preparation


def test_a_row_too_deep_to_be_sent_to_another_process_is_prepared_in_this_one(load, write_rows):
    deep = "[" * 900 + "]" * 900
    rows = [{"chosen": "a b", "rejected": "c"}] * 5 + [f'{{"chosen": "d", "rejected": "e", "extra": {deep}}}']
    found = load([write_rows(rows), "1.0"], num_proc=2)
    assert len(found) == 6


def test_memory_is_bounded_by_pairs_and_not_by_rows(load, write_rows, monkeypatch):
    sizes = []
    original = preparation.record_batch

    def watched(pairs, source):
        sizes.append(len(pairs))
        return original(pairs, source)

    monkeypatch.setattr(preparation, "record_batch", watched)
    ranked = {"prompt": "q ", "responses": [f"answer {i}" for i in range(20)]}  # 190 pairs
    found = load([write_rows([ranked] * 40), "1.0"])
    assert (len(found), max(sizes)) == (40 * 190, 6 * 190)
    sizes.clear()
    plain = write_rows([{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}], "plain.jsonl")
    monkeypatch.setattr(building, "MOST_PASSES", 10_000)
    assert len(load([plain, "5001"])) == 5001
    assert max(sizes) <= 2000


def test_all_skipped_rows_are_listed(load, write_rows):
    good = {"chosen": "a", "rejected": "b"}
    found = load([write_rows([good, {}, good, {"chosen": 3}, {}]), "1.0"], skip_bad_rows=3)
    assert len(found.lines) == 4, "rows, columns, and the second and third bad row"
    assert all(f"rows.jsonl:{number}" in " ".join(found.lines) for number in (2, 4, 5))


def test_a_tokenizer_that_would_spell_its_end_token_out_is_kept_from_it(tmp_path):
    made = make(True)
    made.split_special_tokens = True
    tokenizer = load_made(tmp_path, made)
    [pair] = encode_pairs(tokenizer, [render_pair(tokenizer, "hi ", "yes ", "no ")])
    assert (pair.chosen[-1], pair.prompt) == (tokenizer.eos_token_id, [1, 3])


def test_the_prompts_length_leaves_out_the_end_token_that_the_encoder_adds(tmp_path):
    tokenizer = load_made(tmp_path, make(True, adds_eos=True))
    [pair] = encode_pairs(tokenizer, [render_pair(tokenizer, "hi ", "yes ", "no ")])
    assert pair.prompt == [1, 3]


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now ('%Y') }}{{ messages[0]['content'] }}",
        "{% set f = strftime_now %}{{ f('%Y') }}{{ messages[0]['content'] }}",
        {"default": "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}", "tool_use": "x"},
    ],
)
def test_todays_date_is_found_and_fixed_however_it_is_written(tmp_path, template):
    made = make(True)
    made.chat_template = template
    tokenizer = load_made(tmp_path, made)
    assert prints_date(tokenizer)
    assert tokenizer.apply_chat_template(Q, tokenize=False) == f"{DATE}q"


def test_a_script_without_a_guard_is_told_instead_of_waiting_for_itself(toy, write_rows, tmp_path):
    script = tmp_path / "script.py"
    rows = write_rows([{"chosen": "a", "rejected": "b"}])
    script.write_text(
        f"""
from open_rm.data.building import load_preference_data
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import DataFlags
flags = DataFlags(dataset_mixer_list=[{str(rows)!r}, "1.0"], num_proc=2, dataset_local_cache_dir={str(tmp_path / "cache")!r})
load_preference_data(flags, load_tokenizer({str(toy / "model")!r}))
"""
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode != 0
    assert 'under `if __name__ == "__main__":`' in done.stderr


def test_a_ranked_list_is_counted_by_its_pairs_before_it_is_read():
    assert most_pairs({"responses": ["a"] * 5}, Reading()) == 10
    assert most_pairs({"chosen": ["a"] * 5, "rejected": ["b"] * 2}, Reading()) == 10
    assert most_pairs({"completions": [{"response": "a"}] * 4, "instruction": "q"}, Reading()) == 6
    assert most_pairs({"chosen": "a", "rejected": "b"}, Reading()) == most_pairs(None, Reading()) == 1
