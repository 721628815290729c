"""What the inspection counts, says and draws: numbers by a plain count, findings, pictures, command line."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, alone, shared_data
from pairs_of_ids import as_data
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from open_rm.batching.feeding import Step
from open_rm.batching.layouts import lay_out
from open_rm.batching.steps import groups_of
from open_rm.batching.work import units_of, work_of
from open_rm.data.templates import read_template
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import Args, DataFlags
from open_rm.inspection import findings, look, sharing, views
from open_rm.inspection.__main__ import DEFAULT_FOLDER, main
from open_rm.inspection.findings import check_strict, find
from open_rm.inspection.report import first_with_same, inspect_data
from open_rm.training.metrics import Meter


def messages(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def clean_rows(count: int = 20, first: int = 0) -> list[dict]:
    """Rows in which there is nothing to find: chosen is the longer side every other time."""
    rows = []
    for i in range(first, first + count):
        long, short = f"answer {i} " + "under the old roof " * 3, f"line {i}"
        rows.append(messages(f"Write line {i} about the lake.", *((long, short) if i % 2 else (short, long))))
    return rows


@pytest.fixture
def load(load):
    """Read files into PreferenceData with the toy's tokenizer."""

    def call(*paths, amount: str = "1.0", split: str = "train", **flags):
        return load([part for path in paths for part in (path, amount)], splits=[split], **flags)

    return call


@pytest.fixture
def report_on(load, write_rows, tokenizer):
    """The report on some training rows, and perhaps held-out ones."""

    def call(rows, held_out=None, **changes) -> dict:
        train = load(write_rows(rows, "train.jsonl"), **changes)
        other = load(write_rows(held_out, "test.jsonl")) if held_out else None
        return inspect_data(train, other, changes.get("tokenizer", tokenizer))

    return call


# ---- numbers


def plain_count(data, indices) -> dict:
    """The same facts, pair by pair and token by token."""
    seen, duplicates, contradictory, tokens, shared, longer = set(), 0, 0, 0, 0, 0.0
    for chosen, rejected in data.pairs(indices):
        chosen, rejected = tuple(chosen.tolist()), tuple(rejected.tolist())
        if (chosen, rejected) in seen:
            duplicates += 1
        elif (rejected, chosen) in seen:
            contradictory += 1
        seen.add((chosen, rejected))
        tokens += len(chosen) + len(rejected)
        for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
            if a != b:
                break
            shared += 1
        longer += 1.0 if len(chosen) > len(rejected) else 0.5 * (len(chosen) == len(rejected))
    return {
        "duplicates": duplicates,
        "contradictory": contradictory,
        "tokens": tokens,
        "computed": tokens - shared,
        "longer": longer / len(indices),
    }


def check_against_plain_count(source: dict, data, indices) -> None:
    plain = plain_count(data, indices)
    assert source["duplicates"]["count"] == plain["duplicates"]
    assert source["contradictory"]["count"] == plain["contradictory"]
    assert source["shared"]["tokens"] == plain["tokens"]
    assert source["shared"]["by_pair"]["tokens"] == plain["computed"]
    assert source["length_baseline"]["longer_is_better"] == pytest.approx(plain["longer"])
    assert source["length_baseline"]["accuracy"] == pytest.approx(max(plain["longer"], 1 - plain["longer"]))


def messy_rows(toy) -> list[dict]:
    rows = [json.loads(line) for line in (toy / "data" / "train.jsonl").read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[5:9]]
    same_prompt = [messages(rows[0]["prompt"][0]["content"], f"Today {i}", f"Here {i}") for i in range(5)]
    return rows + rows[:3] + rows[:1] + swapped + swapped[:1] + same_prompt


def test_numbers_equal_a_plain_count(report_on, load, write_rows, toy):
    rows = messy_rows(toy)
    source = report_on(rows)["splits"]["train"]["sources"][0]
    data = load(write_rows(rows))
    check_against_plain_count(source, data, range(len(data)))
    assert (source["duplicates"]["count"], source["contradictory"]["count"]) == (5, 4)
    assert source["rows"] == source["pairs"] == len(rows)
    lengths = sorted(len(chosen) for chosen, _ in data.pairs(range(len(data))))
    assert source["lengths"]["chosen"]["max"] == lengths[-1]
    assert source["lengths"]["chosen"]["p50"] == lengths[(len(lengths) + 1) // 2 - 1]


def test_saved_tokens_are_those_of_the_layout(report_on, load, write_rows, toy):
    rows = messy_rows(toy)
    shared = report_on(rows)["splits"]["train"]["sources"][0]["shared"]
    data = load(write_rows(rows))
    table = data.table
    groups = groups_of(table.prompt_id)

    def computed(pairs) -> int:
        prompt_ids = table.prompt_id[pairs]
        return lay_out("shared_prefix", data.pairs(pairs), pad_token_id=2, prompt_ids=prompt_ids).computed

    assert shared["prompts"] == len(groups) < len(rows)
    units = units_of(np.arange(len(data)), table, "shared_prefix", len(data))
    assert shared["by_prompt"]["tokens"] == work_of(units, table, "shared_prefix").tokens.sum()
    # Where all answers to a prompt begin alike, the layout shares a few tokens more than the prompt.
    in_memory = sum(computed(group) for group in groups)
    assert in_memory <= shared["by_prompt"]["tokens"] < min(1.001 * in_memory, shared["by_pair"]["tokens"])
    for i in range(0, len(data), 25):
        assert computed([i]) == table.chosen_length[i] + table.rejected_length[i] - table.shared_length[i]


def test_every_source_is_counted_for_itself_and_all_together(load, write_rows, tokenizer, toy):
    rows = messy_rows(toy)
    data = load(write_rows(rows, "a.jsonl"), write_rows(clean_rows(), "b.jsonl"), write_rows(rows[:10], "c.jsonl"))
    split = inspect_data(data, None, tokenizer)["splits"]["train"]
    for number, source in enumerate(split["sources"]):
        check_against_plain_count(source, data, np.flatnonzero(data.source_ids() == number))
    check_against_plain_count(split["overall"], data, range(len(data)))
    assert split["overall"]["duplicates"]["count"] == split["sources"][0]["duplicates"]["count"] + 10
    assert split["overall"]["pairs"] == len(data)


def test_first_with_same_equals_a_dictionary():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-3, 3, (2, 200))
    seen = {}
    expected = [seen.setdefault(key, i) for i, key in enumerate(zip(a.tolist(), b.tolist(), strict=True))]
    assert first_with_same(a, b).tolist() == expected
    assert first_with_same(a[:0]).tolist() == []


def test_scored_token_is_the_last_of_every_side(report_on, tokenizer):
    scored = report_on(clean_rows())["splits"]["train"]["sources"][0]["scored"]
    (token,) = scored["tokens"]
    assert (token["id"], token["text"], token["sides"]) == (tokenizer.eos_token_id, tokenizer.eos_token, 40)
    assert token["first"].endswith("train.jsonl:1")
    assert scored["distinct"] == 1 and scored["first_other"] is None


def test_overlap_counts_held_out_prompts_and_sides(report_on):
    train, held_out = clean_rows(), clean_rows(6, first=100)
    held_out += [messages(train[3]["prompt"][0]["content"], f"new {i}", f"other {i}") for i in range(2)]
    held_out += [train[5]]
    (source,) = report_on(train, held_out)["overlap"]["sources"]
    assert (source["prompts"], source["of_prompts"], source["pairs"], source["pairs_with_a_side"]) == (2, 8, 3, 1)
    assert source["first"]["eval"].endswith("test.jsonl:7")
    assert source["first"]["train"].endswith("train.jsonl:4")


# ---- findings


def test_clean_rows_have_no_findings(report_on):
    assert report_on(clean_rows(), clean_rows(10, first=100))["findings"] == []


def one_finding(report: dict, *parts: str) -> None:
    assert len(report["findings"]) == 1, report["findings"]
    for part in parts:
        assert part in report["findings"][0]


def test_duplicates_are_found(report_on):
    one_finding(
        report_on(clean_rows() + clean_rows(2)),
        "train ",
        "2 duplicate pairs",
        "train.jsonl:21 (repeats",
        "train.jsonl:1)",
    )


def test_rows_repeated_by_the_amount_are_no_duplicates(report_on):
    assert report_on(clean_rows(), amount="50")["findings"] == []
    one_finding(report_on(clean_rows() + clean_rows(1), amount="2.0"), "duplicate pair", "train.jsonl:21")


def test_contradictory_pairs_are_found(report_on):
    row = clean_rows()[4]
    swapped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    one_finding(report_on([*clean_rows(), swapped]), "1 contradictory pair ", "train.jsonl:21 against", "train.jsonl:5")


def test_repeats_between_sources_are_found(load, write_rows, tokenizer):
    data = load(write_rows(clean_rows(), "a.jsonl"), write_rows(clean_rows(first=19), "b.jsonl"))
    one_finding(inspect_data(data, None, tokenizer), "1 duplicate pair between its sources", "b.jsonl:1")


def test_overlap_is_found(report_on):
    held_out = [*clean_rows(4, first=100), clean_rows()[7]]
    one_finding(report_on(clean_rows(), held_out), "eval ", "1 of 5 held-out prompts", "test.jsonl:5", "train.jsonl:8")


@pytest.mark.parametrize("rule", ["longer is better", "shorter is better"])
def test_length_that_gives_the_preference_away_is_found(report_on, rule):
    telling = clean_rows(40, first=20)[1::2]  # chosen is longer in all of them
    if rule == "shorter is better":
        telling = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in telling]
    one_finding(report_on(clean_rows() + telling), f'"{rule}" alone is right in 75.0%')


def test_a_few_pairs_say_nothing_about_length(report_on):
    assert report_on(clean_rows(8)[1::2])["findings"] == []


def test_prompts_that_were_cut_away_are_found(report_on):
    long = [messages(f"The lake {i}?", "yes " * 300, "no") for i in range(3)]
    report = report_on(clean_rows() + long, overlength="truncate")
    finding = next(finding for finding in report["findings"] if "lost the whole prompt" in finding)
    assert finding.startswith("train ") and "3 pairs" in finding and "--max_token_length" in finding
    assert not any("lost" in finding for finding in report_on(clean_rows(), overlength="truncate")["findings"])


def test_many_dropped_pairs_are_found(report_on):
    long = [messages(f"The lake {i} " * 300, "yes", "no") for i in range(3)]
    one_finding(
        report_on(clean_rows() + long), "13.0% of the pairs are dropped", "prompt > 256 tokens", "train.jsonl:21"
    )
    assert report_on(clean_rows(40) + long)["findings"] == []


def test_skipped_rows_are_found(report_on):
    one_finding(
        report_on([*clean_rows(), {"chosen": "a"}], skip_bad_rows=1), "1 row skipped", "train.jsonl:21", "rejected"
    )


def test_mixed_forms_are_found(report_on):
    rows = clean_rows()
    implied = {key: rows[0]["prompt"] + rows[0][key] for key in ("chosen", "rejected")}
    one_finding(report_on([*rows[1:], implied]), "several forms", "messages, prompt given (19 rows)")


def test_several_scored_tokens_are_found(report_on):
    rows = [{"chosen_input_ids": [0, 5, i, 9, 1], "rejected_input_ids": [0, 5, i, 8, 1]} for i in range(10, 20)]
    assert report_on(rows)["findings"] == []
    rows[6]["chosen_input_ids"][-1] = 7
    one_finding(report_on(rows), "2 different tokens ('<|eos|>' (id 1) in 19 sides", "train.jsonl:7")


def test_a_scored_newline_is_found(report_on, tokenizer):
    tokenizer.chat_template += "{{ '\\n' }}"
    one_finding(report_on(clean_rows()), "only whitespace", "in 40 sides", "train.jsonl:1")


def test_a_template_that_prints_the_date_is_found(report_on, toy, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + read_template("tulu"))
    dated = load_tokenizer(str(toy / "model"), chat_template_name=str(template))
    one_finding(report_on(clean_rows(), tokenizer=dated), "prints today's date")
    text = [{"prompt": f"Q {i}: ", "chosen": "yes", "rejected": "no"} for i in range(20)]
    assert not any("date" in finding for finding in report_on(text, tokenizer=dated)["findings"])


def test_strict_counts_the_findings_and_quotes_the_first(report_on):
    report = report_on(clean_rows() + clean_rows(2))
    with pytest.raises(UserError, match=r"--strict: 1 finding in the data, the first: train .*: 2 duplicate pairs"):
        check_strict(report)
    check_strict(report_on(clean_rows()))


def test_a_source_without_pairs_hides_no_finding_between_others():
    pairs = {"count": 20, "first": {"place": "a:1", "other": "b:1"}}
    none = {"count": 0}
    full = {"duplicates": none, "contradictory": none}
    found = {"overall": {"duplicates": pairs, "contradictory": none}, "sources": [full, full, {}]}
    assert len(findings._between_sources(found)) == 1


def test_findings_can_be_made_from_a_report_that_was_kept(report_on):
    report = report_on(clean_rows() + clean_rows(2), clean_rows(2))
    assert find(json.loads(json.dumps(report))) == report["findings"] != []


# ---- what one sees


def test_short_lines_are_one_per_source_and_finding(load, write_rows, tokenizer):
    train = load(
        write_rows(clean_rows(), "a.jsonl"), write_rows(clean_rows(first=50) + clean_rows(1, first=50), "b.jsonl")
    )
    lines = look.short_lines(inspect_data(train, load(write_rows(clean_rows(4, 90), "c.jsonl")), tokenizer))
    assert [line.split()[0] for line in lines] == ["train", "train", "eval", "finding:"]
    assert "20 pairs of 20 rows (messages, prompt given)" in lines[0]
    assert "scored token '<|eos|>' (id 1)" in lines[0]


class Spans(HTMLParser):
    """(classes, text) of every token of a page."""

    def __init__(self):
        super().__init__()
        self.found, self._open = [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "span" and "title" in attributes:
            self._open = (attributes["class"].split(), "")
        assert tag != "script"

    def handle_data(self, data):
        if self._open is not None:
            self._open = (self._open[0], self._open[1] + data)

    def handle_endtag(self, tag):
        if tag == "span" and self._open is not None:
            self.found.append(self._open)
            self._open = None


NASTY = '<script>alert("x")</script> & {braces} $math$ é 🙂 日本 ​'


def test_html_shows_every_token_escaped_and_marks_the_scored_one(load, write_rows, tokenizer):
    data = load(write_rows([messages("Q\n\n" + NASTY, "yes\tit is " + NASTY, "no")]))
    page = views.pairs_as_html(views.sample_views("train", data, tokenizer, 5))
    assert "<script" not in page
    spans = Spans()
    spans.feed(page)
    (chosen, rejected), shared = data.pairs([0])[0], data.table.shared_length[0]
    names = views.TokenNames(tokenizer)
    tokens = np.concatenate((chosen, rejected[shared:]))
    assert [text for _, text in spans.found] == [views.visible(names.raw(int(i))) for i in tokens]
    scored = [(classes[0], text) for classes, text in spans.found if "scored" in classes]
    assert scored == [("chosen", "<|eos|>"), ("rejected", "<|eos|>")]
    assert spans.found[shared - 1][0][0] == "shared" and spans.found[shared][0][0] == "chosen"
    assert all(("special" in classes) == (text in ("<|bos|>", "<|eos|>")) for classes, text in spans.found)


def test_tokens_are_visible_whatever_the_tokenizer(tokenizer):
    names = views.TokenNames(tokenizer)
    text = "The lake\n is glad"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(names.raw(i) for i in ids) == text
    assert views.visible(" a\n\tb​") == "·a⏎⇥b\\u200b"
    emoji = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert "".join(names.raw(i) for i in emoji) == "\\xf0\\x9f\\x99\\x82"
    assert names.raw(tokenizer.eos_token_id) == "<|eos|>" and tokenizer.eos_token_id in names.special
    pieces = Tokenizer(models.WordLevel({"▁the": 0, "<0xE2>": 1, "<unk>": 2}, unk_token="<unk>"))
    pieces = views.TokenNames(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"))
    assert [pieces.raw(i) for i in range(3)] == [" the", "<0xE2>", "<unk>"]


def test_lines_are_wrapped_between_tokens_and_after_newlines():
    def token(text):
        return views.Token(text, 7, 0, False, False, "⏎" in text)

    tokens = [token(text) for text in ("abc", "de⏎", "f", "ghij", "x" * 13, "y")]
    lines = views.wrapped(tokens, 5)
    assert [[text for text, _ in line] for line in lines] == [
        ["abc"],
        ["de⏎"],
        ["f", "ghij"],
        ["xxxxx"],
        ["xxxxx"],
        ["xxx", "y"],
    ]
    lines = views.wrapped([token("abc")] * 240, 100)
    assert max(sum(len(text) for text, _ in line) for line in lines) <= 100
    assert [text for line in lines for text, token in line if token is None] == [" [150 tokens] "]
    assert views.wrapped([], 5) == [[]]


def test_files_are_written_and_the_console_is_readable(load, write_rows, tokenizer, tmp_path):
    rows = [*clean_rows(), messages("Q " * 150, NASTY, "no"), *clean_rows(1)]
    train, held_out = load(write_rows(rows, "train.jsonl")), load(write_rows(clean_rows(6, 90), "test.jsonl"))
    report = inspect_data(train, held_out, tokenizer)
    paths = look.write_report(report, str(tmp_path / "new" / "out"), train, held_out, tokenizer)
    assert [path.rpartition("/")[2] for path in paths] == ["report.json", "lengths.png", "pairs.html", "pairs.png"]
    assert json.loads((tmp_path / "new" / "out" / "report.json").read_text()) == report
    for path in (paths[1], paths[3]):
        picture = plt.imread(path)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.01
    for colours in (None, "truecolor"):
        out = Console(width=150, record=True, file=io.StringIO(), color_system=colours, highlight=False)
        look.console(report, train, tokenizer, paths=paths, out=out)
        text = out.export_text()
        for part in ("duplicate pairs", "train.jsonl:22", "1.", "finding: train", "<|eos|>", "lake.⏎", "pairs.html"):
            assert part in text, part


def test_a_folder_that_cannot_be_written_is_a_sentence(load, write_rows, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    train = load(write_rows(clean_rows()))
    report = inspect_data(train, None, tokenizer)
    with pytest.raises(UserError, match="--output_dir .*cannot be written"):
        look.write_report(report, str(tmp_path / "file" / "out"), train, None, tokenizer)


# ---- before training


def test_before_training_the_log_gets_the_short_lines(load, write_rows, tokenizer):
    train = load(write_rows(clean_rows() + clean_rows(2), "a.jsonl"))
    held_out = load(write_rows(clean_rows(4, 90), "b.jsonl"))
    lines = look.before_training(train, held_out, tokenizer, DataFlags(), margin_loss=False)
    assert lines == look.short_lines(inspect_data(train, held_out, tokenizer))
    assert [line.split()[0] for line in lines] == ["train", "eval", "finding:"]


def test_strict_ends_before_training_only_where_there_are_findings(load, write_rows, tokenizer):
    clean, doubled = load(write_rows(clean_rows())), load(write_rows(clean_rows() + clean_rows(2), "b.jsonl"))
    lines = look.before_training(clean, None, tokenizer, DataFlags(strict=True), margin_loss=False)
    assert [line.split()[0] for line in lines] == ["train"]
    with pytest.raises(UserError, match="--strict: 1 finding in the data, the first: train .*: 2 duplicate pairs"):
        look.before_training(doubled, None, tokenizer, DataFlags(strict=True), margin_loss=False)
    with pytest.raises(UserError, match="--strict: .* held-out prompts"):
        look.before_training(clean, clean, tokenizer, DataFlags(strict=True), margin_loss=False)


@pytest.mark.parametrize(("with_margins", "hint"), [(0, False), (1, True), (20, True)])
def test_margins_are_told_where_the_loss_does_not_take_them(load, write_rows, tokenizer, with_margins, hint):
    rows = [row | {"margin": 1.0} if i < with_margins else row for i, row in enumerate(clean_rows())]
    lines = look.before_training(load(write_rows(rows)), None, tokenizer, DataFlags(), margin_loss=False)
    told = ["the data has margins; the loss takes them with --margin_loss"]
    assert lines[1:] == (told if hint else [])


def test_a_loss_with_margins_needs_one_for_every_pair(load, write_rows, tokenizer):
    rows = [row | {"margin": 1.0} for row in clean_rows()]
    lines = look.before_training(load(write_rows(rows)), None, tokenizer, DataFlags(), margin_loss=True)
    assert [line.split()[0] for line in lines] == ["train"]
    del rows[4]["margin"]
    with pytest.raises(UserError, match="rows.jsonl:5: no margin, and --margin_loss needs one for every pair"):
        look.before_training(load(write_rows(rows)), None, tokenizer, DataFlags(), margin_loss=True)


# ---- the command line


@pytest.fixture
def args(toy, write_rows, tmp_path):
    """Arguments of an inspection of clean rows, and of held-out ones."""
    return Args(
        model_name_or_path=str(toy / "model"),
        dataset_mixer_list=[str(write_rows(clean_rows(), "train.jsonl")), "1.0"],
        dataset_mixer_eval_list=[str(write_rows(clean_rows(4, 90), "test.jsonl")), "1.0"],
        dataset_local_cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
    )


def test_main_returns_the_report_that_it_writes_and_prints(args, tmp_path, capsys):
    report = main(args)
    assert {split: found["overall"]["pairs"] for split, found in report["splits"].items()} == {"train": 20, "eval": 4}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "no findings" in (printed := capsys.readouterr().out) and str(tmp_path / "out" / "report.json") in printed
    alone = main(dataclasses.replace(args, dataset_mixer_eval_list=[]))
    assert list(alone["splits"]) == ["train"]


def test_main_writes_beside_the_runs_where_no_folder_is_named(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(dataclasses.replace(args, output_dir=None))
    assert (tmp_path / DEFAULT_FOLDER / "report.json").is_file()


def test_main_writes_its_findings_also_where_strict_ends_it(args, tmp_path, write_rows):
    write_rows(clean_rows() + clean_rows(2), "train.jsonl")
    assert len(main(args)["findings"]) == 1
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="--strict: 1 finding in the data"):
        main(dataclasses.replace(args, strict=True))
    assert (tmp_path / "out" / "pairs.html").is_file()


def test_main_refuses_flags_that_cannot_work_before_it_reads(args):
    with pytest.raises(UserError, match="--num_proc 0: must be at least 1"):
        main(dataclasses.replace(args, num_proc=0, model_name_or_path="nowhere"))


def run_inspection(*flags) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "open_rm.inspection", *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line_of_a_training_run_works_and_strict_fails(toy, write_rows, tmp_path):
    flags = ["--model_name_or_path", toy / "model", "--dataset_local_cache_dir", tmp_path / "cache"]
    flags += ["--output_dir", tmp_path / "out", "--learning_rate", "1e-4"]
    clean = ["--dataset_mixer_list", write_rows(clean_rows(), "clean.jsonl"), "1.0"]
    done = run_inspection(*flags, *clean, "--strict")
    assert done.returncode == 0, done.stderr
    assert "no findings" in done.stdout
    assert (tmp_path / "out" / "pairs.html").is_file()
    doubled = ["--dataset_mixer_list", write_rows(clean_rows() + clean_rows(3), "double.jsonl"), "1.0"]
    done = run_inspection(*flags, *doubled)
    assert done.returncode == 0 and "3 duplicate pairs" in done.stdout
    done = run_inspection(*flags, *doubled, "--strict")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --strict: 1 finding in the data, the first: train ")
    assert "Traceback" not in done.stderr


def test_a_mistake_on_the_command_line_is_a_sentence():
    done = run_inspection("--dataset_mixer_list", "nowhere.jsonl", "1.0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --dataset_mixer_list: there is no file or folder")


# ---- real data


def test_hh_shares_long_prefixes(load, tokenizer, tmp_path):
    folder = shared_data("hh_harmless")
    train = load(folder, max_token_length=4096, max_prompt_token_length=4096)
    held_out = load(folder, split="test", max_token_length=4096, max_prompt_token_length=4096)
    report = inspect_data(train, held_out, tokenizer)
    source = report["splits"]["train"]["sources"][0]
    assert source["forms"] == {"HH text": 1700}
    assert 1.5 < source["shared"]["by_pair"]["ratio"] < 1.65
    check_against_plain_count(source, train, range(len(train)))
    look.write_report(report, str(tmp_path / "out"), train, held_out, tokenizer)


def test_alpaca_eval_duplicates_are_found(load, tokenizer):
    train = load(shared_data("alpaca_eval"), max_token_length=8192, max_prompt_token_length=8192)
    report = inspect_data(train, None, tokenizer)
    source = report["splits"]["train"]["sources"][0]
    check_against_plain_count(source, train, range(len(train)))
    assert source["duplicates"]["count"] > 0
    assert any("duplicate pair" in finding for finding in report["findings"])
    assert source["shared"]["by_prompt"]["ratio"] > 1.5 * source["shared"]["by_pair"]["ratio"]


# ---- headers


def test_a_header_is_told_with_what_it_saves(report_on, load, write_rows, tokenizer):
    rows = clean_rows(30)
    words = "The old roof of the house at the lake was built under the answer of a line and about the answer "
    for row in rows:
        row["prompt"].insert(0, {"role": "system", "content": words * 2})
    report = report_on(rows)
    step = report["splits"]["train"]["sources"][0]["shared"]["step"]
    data = load(write_rows(rows))
    batch = lay_out(
        "shared_prefix", data.pairs(range(30)), pad_token_id=2, prompt_ids=data.table.cut_prompt_ids(np.arange(30))
    )
    assert (step["pairs"], step["tokens"], step["by_prompt"]) == (30, batch.tokens, batch.per_prompt)
    # The layout sees also the few prompts that have more in common than all.
    assert batch.computed <= step["by_header"] < 1.02 * batch.computed < 0.7 * step["by_prompt"]
    headers = step["headers"]
    assert headers["prompts"] == headers["of_prompts"] == 30
    most = headers["most"][0]
    assert most["tokens"] >= len(tokenizer(words * 2)["input_ids"]) and "The old roof of the house" in most["begins"]
    [line] = [line for line in look.short_lines(report) if "begin with a header" in line]
    assert "30 of 30 prompts" in line and f"{step['by_header']} with headers shared too" in line


def test_what_sharing_saves_of_a_step_is_what_training_logs_of_it():
    header = [7] * 40
    pairs = [
        tuple([*header, 100 + i // 2, 200, 10 + 2 * (i % 2) + side, *[3] * (i % 5)] for side in (0, 1))
        for i in range(20)
    ]
    data = as_data(pairs, [42] * 20)
    tokens, by_prompt, by_header = sharing._tokens(np.arange(20), data)
    shape = SimpleNamespace(body_parameters=10, read_parameters=0, layers=2, attention_width=4, passes=3)
    meter, rewards = Meter(alone(), shape, torch.float32), torch.zeros(20)
    prompt_ids = data.table.cut_prompt_ids(np.arange(20))
    meter.add(
        rewards, rewards, {"ranking": rewards}, lay_out("shared_prefix", pairs, pad_token_id=0, prompt_ids=prompt_ids)
    )
    meter.reduce(20)
    step = Step(number=1, pairs=20, micro_batches=[], imbalance=1.0, indices=np.arange(20))
    perf = meter.performance(step, flops_before=0)
    assert perf["perf/distinct_token_fraction"] == pytest.approx(by_header / tokens)
    assert perf["perf/prompt_saving"] == pytest.approx(1 - by_prompt / tokens)
    assert perf["perf/header_saving"] == pytest.approx((by_prompt - by_header) / tokens)
    assert by_prompt - by_header == 9 * 40  # ten prompts, one header


def test_where_no_prompts_begin_alike_no_header_is_told(report_on):
    rows = [messages(f"{i} lake {i}", f"answer {i}", f"line {i}") for i in range(100, 140)]
    report = report_on(rows)
    step = report["splits"]["train"]["sources"][0]["shared"]["step"]
    assert step["headers"]["most"] == [] and step["by_header"] == step["by_prompt"] < step["tokens"]
    assert not any("header" in line for line in look.short_lines(report))


# ---- attributes


def rated(rows: list[dict], **values) -> list[dict]:
    return [row | {name: value(number) for name, value in values.items()} for number, row in enumerate(rows)]


def test_attributes_are_told_and_of_held_out_rows_no_finding(report_on):
    both = {"chosen_help": lambda n: n % 5, "rejected_help": lambda n: n % 3}
    train, held_out = rated(clean_rows(), **both), rated(clean_rows(first=100), **both)
    report = report_on(train, held_out, attributes=["help"])
    assert report["findings"] == []
    entry = report["splits"]["train"]["sources"][0]["attributes"]["help"]
    places = ["chosen_help", "rejected_help"]
    assert entry == {"places": places, "columns": places, "answers": 40, "known": 40, "least": 0, "most": 4}
    [table] = views.fact_tables("train", report["splits"]["train"])
    out = Console(file=io.StringIO(), width=200)
    out.print(table)
    assert "help (from chosen_help, rejected_help): known of 40 of 40 sides of pairs" in out.file.getvalue()
    told = report_on(train, held_out)["findings"]
    assert len(told) == 2 and all("chosen_help and rejected_help are not read" in finding for finding in told)
    assert "scores of each answer are taken with --attributes" in told[0]


@pytest.mark.parametrize(
    ("both", "says"),
    [
        (
            {"chosen_help": lambda n: n, "rejected_help": lambda n: None},
            r"train .*: 20 of 20 rows know help \(chosen_help, rejected_help\) of one of their two sides alone \(.*\), first .*train.jsonl:1",
        ),
        (
            {"chosen_help": lambda n: n if n % 2 else None, "rejected_help": lambda n: None if n % 2 else n},
            r"20 of 20 rows know help \(chosen_help, rejected_help\) of one of their two sides alone",
        ),
        (
            {"chosen_help": lambda n: 2, "rejected_help": lambda n: 2},
            "train: the attribute help is 2 wherever it is known, so nothing is learned from it; name another, or leave it out",
        ),
        ({"chosen_help": lambda n: n, "rejected_help": lambda n: n if n % 4 else None}, None),  # a few gaps
    ],
)
def test_attributes_of_which_nothing_is_learned_are_found(report_on, both, says):
    found = report_on(rated(clean_rows(), **both), attributes=["help"])["findings"]
    if says is None:
        assert found == []
        return
    [finding] = found
    assert re.search(says, finding), finding


def test_attributes_need_no_weights_to_be_looked_at(args, write_rows):
    path = str(write_rows(rated(clean_rows(), help_chosen=lambda n: n, help_rejected=lambda n: -n)))
    asked = dataclasses.replace(args, dataset_mixer_list=[path, "1.0"], dataset_mixer_eval_list=[], attributes=["help"])
    assert main(asked)["splits"]["train"]["sources"][0]["attributes"]["help"]["most"] == 19
    with pytest.raises(UserError, match="--attributes names 1 and --attribute_weights has 2"):
        main(dataclasses.replace(asked, attribute_weights=[1.0, 2.0]))


def test_columns_of_any_name_may_hold_attributes(report_on):
    both = {"chosen_score [1-5]": lambda n: n % 5, "rejected_score [1-5]": lambda n: n % 3}
    train, held_out = rated(clean_rows(), **both), rated(clean_rows(first=100), **both)
    assert report_on(train, held_out, attributes=["score [1-5]"])["findings"] == []
