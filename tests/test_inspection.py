"""What the inspection counts, says and draws: numbers by a plain count, findings, pictures, command line."""

import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import REPOSITORY, shared_data
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from open_rm import inspection, inspection_views, steps
from open_rm.batching import lay_out
from open_rm.data import load_preference_data
from open_rm.errors import UserError
from open_rm.inspection_findings import check_strict, find
from open_rm.tokenization import load_tokenizer, read_template


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
def load(tokenizer, tmp_path):
    """Read files into PreferenceData with the toy's tokenizer."""

    def call(*paths, amount: str = "1.0", split: str = "train", **changes):
        options = dict(
            flag="dataset_mixer_list",
            tokenizer=tokenizer,
            max_token_length=512,
            max_prompt_token_length=256,
            cache_dir=str(tmp_path / "cache"),
            seed=1,
        )
        mixer = [text for path in paths for text in (str(path), amount)]
        return load_preference_data(mixer, [split], **(options | changes))

    return call


@pytest.fixture
def look(load, write_rows, tokenizer):
    """The report on some training rows, and perhaps held-out ones."""

    def call(rows, held_out=None, **changes) -> dict:
        train = load(write_rows(rows, "train.jsonl"), **changes)
        other = load(write_rows(held_out, "test.jsonl")) if held_out else None
        return inspection.inspect_data(train, other, changes.get("tokenizer", tokenizer))

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


def test_numbers_equal_a_plain_count(look, load, write_rows, toy):
    rows = messy_rows(toy)
    source = look(rows)["splits"]["train"]["sources"][0]
    data = load(write_rows(rows))
    check_against_plain_count(source, data, range(len(data)))
    assert (source["duplicates"]["count"], source["contradictory"]["count"]) == (5, 4)
    assert source["rows"] == source["pairs"] == len(rows)
    lengths = sorted(len(chosen) for chosen, _ in data.pairs(range(len(data))))
    assert source["lengths"]["chosen"]["max"] == lengths[-1]
    assert source["lengths"]["chosen"]["p50"] == lengths[(len(lengths) + 1) // 2 - 1]


def test_saved_tokens_are_those_of_the_layout(look, load, write_rows, toy):
    rows = messy_rows(toy)
    shared = look(rows)["splits"]["train"]["sources"][0]["shared"]
    data = load(write_rows(rows))
    table = data.table
    groups = steps.groups_of(table.prompt_id)
    assert shared["prompts"] == len(groups) < len(rows)
    assert shared["by_prompt"]["tokens"] == sum(steps._work(group, table, "shared_prefix").tokens for group in groups)
    assert shared["by_prompt"]["tokens"] < shared["by_pair"]["tokens"]
    for i in range(0, len(data), 25):
        alone = lay_out("shared_prefix", data.pairs([i]), pad_token_id=2, prompt_ids=table.prompt_id[[i]])
        assert alone.computed == table.chosen_length[i] + table.rejected_length[i] - table.shared_length[i]


def test_every_source_is_counted_for_itself_and_all_together(load, write_rows, tokenizer, toy):
    rows = messy_rows(toy)
    data = load(write_rows(rows, "a.jsonl"), write_rows(clean_rows(), "b.jsonl"), write_rows(rows[:10], "c.jsonl"))
    split = inspection.inspect_data(data, None, tokenizer)["splits"]["train"]
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
    assert inspection.first_with_same(a, b).tolist() == expected
    assert inspection.first_with_same(a[:0]).tolist() == []


def test_scored_token_is_the_last_of_every_side(look, tokenizer):
    scored = look(clean_rows())["splits"]["train"]["sources"][0]["scored"]
    (token,) = scored["tokens"]
    assert (token["id"], token["text"], token["sides"]) == (tokenizer.eos_token_id, tokenizer.eos_token, 40)
    assert token["first"].endswith("train.jsonl:1")
    assert scored["distinct"] == 1 and scored["first_other"] is None


def test_overlap_counts_held_out_prompts_and_sides(look):
    train, held_out = clean_rows(), clean_rows(6, first=100)
    held_out += [messages(train[3]["prompt"][0]["content"], f"new {i}", f"other {i}") for i in range(2)]
    held_out += [train[5]]
    (source,) = look(train, held_out)["overlap"]["sources"]
    assert (source["prompts"], source["of_prompts"], source["pairs"], source["pairs_with_a_side"]) == (2, 8, 3, 1)
    assert source["first"]["eval"].endswith("test.jsonl:7")
    assert source["first"]["train"].endswith("train.jsonl:4")


# ---- findings


def test_clean_rows_have_no_findings(look):
    assert look(clean_rows(), clean_rows(10, first=100))["findings"] == []


def one_finding(report: dict, *parts: str) -> None:
    assert len(report["findings"]) == 1, report["findings"]
    for part in parts:
        assert part in report["findings"][0]


def test_duplicates_are_found(look):
    one_finding(
        look(clean_rows() + clean_rows(2)), "train ", "2 duplicate pairs", "train.jsonl:21 (repeats", "train.jsonl:1)"
    )


def test_rows_repeated_by_the_amount_are_no_duplicates(look):
    assert look(clean_rows(), amount="50")["findings"] == []
    one_finding(look(clean_rows() + clean_rows(1), amount="2.0"), "duplicate pair", "train.jsonl:21")


def test_contradictory_pairs_are_found(look):
    row = clean_rows()[4]
    swapped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    one_finding(look([*clean_rows(), swapped]), "1 contradictory pair ", "train.jsonl:21 against", "train.jsonl:5")


def test_repeats_between_sources_are_found(load, write_rows, tokenizer):
    data = load(write_rows(clean_rows(), "a.jsonl"), write_rows(clean_rows(first=19), "b.jsonl"))
    one_finding(inspection.inspect_data(data, None, tokenizer), "1 duplicate pair between its sources", "b.jsonl:1")


def test_overlap_is_found(look):
    held_out = [*clean_rows(4, first=100), clean_rows()[7]]
    one_finding(look(clean_rows(), held_out), "eval ", "1 of 5 held-out prompts", "test.jsonl:5", "train.jsonl:8")


@pytest.mark.parametrize("rule", ["longer is better", "shorter is better"])
def test_length_that_gives_the_preference_away_is_found(look, rule):
    telling = clean_rows(40, first=20)[1::2]  # chosen is longer in all of them
    if rule == "shorter is better":
        telling = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in telling]
    one_finding(look(clean_rows() + telling), f'"{rule}" alone is right in 75.0%')


def test_a_few_pairs_say_nothing_about_length(look):
    assert look(clean_rows(8)[1::2])["findings"] == []


def test_prompts_that_were_cut_away_are_found(look):
    long = [messages(f"The lake {i}?", "yes " * 300, "no") for i in range(3)]
    report = look(clean_rows() + long, overlength="truncate")
    finding = next(finding for finding in report["findings"] if "lost the whole prompt" in finding)
    assert finding.startswith("train ") and "3 pairs" in finding and "--max_token_length" in finding
    assert not any("lost" in finding for finding in look(clean_rows(), overlength="truncate")["findings"])


def test_many_dropped_pairs_are_found(look):
    long = [messages(f"The lake {i} " * 300, "yes", "no") for i in range(3)]
    one_finding(look(clean_rows() + long), "13.0% of the pairs are dropped", "prompt > 256 tokens", "train.jsonl:21")
    assert look(clean_rows(40) + long)["findings"] == []


def test_skipped_rows_are_found(look):
    one_finding(look([*clean_rows(), {"chosen": "a"}], skip_bad_rows=1), "1 row skipped", "train.jsonl:21", "rejected")


def test_mixed_forms_are_found(look):
    rows = clean_rows()
    implied = {key: rows[0]["prompt"] + rows[0][key] for key in ("chosen", "rejected")}
    one_finding(look([*rows[1:], implied]), "several forms", "messages, prompt given (19 rows)")


def test_several_scored_tokens_are_found(look):
    rows = [{"chosen_input_ids": [0, 5, i, 9, 1], "rejected_input_ids": [0, 5, i, 8, 1]} for i in range(10, 20)]
    assert look(rows)["findings"] == []
    rows[6]["chosen_input_ids"][-1] = 7
    one_finding(look(rows), "2 different tokens ('<|eos|>' (id 1) in 19 sides", "train.jsonl:7")


def test_a_scored_newline_is_found(look, tokenizer):
    tokenizer.chat_template += "{{ '\\n' }}"
    one_finding(look(clean_rows()), "only whitespace", "in 40 sides", "train.jsonl:1")


def test_a_template_that_prints_the_date_is_found(look, toy, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + read_template("tulu"))
    dated = load_tokenizer(str(toy / "model"), chat_template_name=str(template))
    one_finding(look(clean_rows(), tokenizer=dated), "prints today's date")
    text = [{"prompt": f"Q {i}: ", "chosen": "yes", "rejected": "no"} for i in range(20)]
    assert not any("date" in finding for finding in look(text, tokenizer=dated)["findings"])


def test_strict_counts_the_findings_and_quotes_the_first(look):
    report = look(clean_rows() + clean_rows(2))
    with pytest.raises(UserError, match=r"--strict: 1 finding in the data, the first: train .*: 2 duplicate pairs"):
        check_strict(report)
    check_strict(look(clean_rows()))


def test_findings_can_be_made_from_a_report_that_was_kept(look):
    report = look(clean_rows() + clean_rows(2), clean_rows(2))
    assert find(json.loads(json.dumps(report))) == report["findings"] != []


# ---- what one sees


def test_short_lines_are_one_per_source_and_finding(load, write_rows, tokenizer):
    train = load(
        write_rows(clean_rows(), "a.jsonl"), write_rows(clean_rows(first=50) + clean_rows(1, first=50), "b.jsonl")
    )
    lines = inspection.short_lines(
        inspection.inspect_data(train, load(write_rows(clean_rows(4, 90), "c.jsonl")), tokenizer)
    )
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
    page = inspection_views.pairs_as_html(inspection_views.sample_views("train", data, tokenizer, 5))
    assert "<script" not in page
    spans = Spans()
    spans.feed(page)
    (chosen, rejected), shared = data.pairs([0])[0], data.table.shared_length[0]
    names = inspection_views.TokenNames(tokenizer)
    tokens = np.concatenate((chosen, rejected[shared:]))
    assert [text for _, text in spans.found] == [inspection_views.visible(names.raw(int(i))) for i in tokens]
    scored = [(classes[0], text) for classes, text in spans.found if "scored" in classes]
    assert scored == [("chosen", "<|eos|>"), ("rejected", "<|eos|>")]
    assert spans.found[shared - 1][0][0] == "shared" and spans.found[shared][0][0] == "chosen"
    assert all(("special" in classes) == (text in ("<|bos|>", "<|eos|>")) for classes, text in spans.found)


def test_tokens_are_visible_whatever_the_tokenizer(tokenizer):
    names = inspection_views.TokenNames(tokenizer)
    text = "The lake\n is glad"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(names.raw(i) for i in ids) == text
    assert inspection_views.visible(" a\n\tb​") == "·a⏎⇥b\\u200b"
    emoji = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert "".join(names.raw(i) for i in emoji) == "\\xf0\\x9f\\x99\\x82"
    assert names.raw(tokenizer.eos_token_id) == "<|eos|>" and tokenizer.eos_token_id in names.special
    pieces = Tokenizer(models.WordLevel({"▁the": 0, "<0xE2>": 1, "<unk>": 2}, unk_token="<unk>"))
    pieces = inspection_views.TokenNames(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"))
    assert [pieces.raw(i) for i in range(3)] == [" the", "<0xE2>", "<unk>"]


def test_lines_are_wrapped_between_tokens_and_after_newlines():
    def token(text):
        return inspection_views.Token(text, 7, 0, False, False, "⏎" in text)

    tokens = [token(text) for text in ("abc", "de⏎", "f", "ghij", "x" * 13, "y")]
    lines = inspection_views.wrapped(tokens, 5)
    assert [[text for text, _ in line] for line in lines] == [
        ["abc"],
        ["de⏎"],
        ["f", "ghij"],
        ["xxxxx"],
        ["xxxxx"],
        ["xxx", "y"],
    ]
    lines = inspection_views.wrapped([token("abc")] * 240, 100)
    assert max(sum(len(text) for text, _ in line) for line in lines) <= 100
    assert [text for line in lines for text, token in line if token is None] == [" [150 tokens] "]
    assert inspection_views.wrapped([], 5) == [[]]


def test_files_are_written_and_the_console_is_readable(load, write_rows, tokenizer, tmp_path):
    rows = [*clean_rows(), messages("Q " * 150, NASTY, "no"), *clean_rows(1)]
    train, held_out = load(write_rows(rows, "train.jsonl")), load(write_rows(clean_rows(6, 90), "test.jsonl"))
    report = inspection.inspect_data(train, held_out, tokenizer)
    paths = inspection.write_report(report, str(tmp_path / "new" / "out"), train, held_out, tokenizer)
    assert [path.rpartition("/")[2] for path in paths] == ["report.json", "lengths.png", "pairs.html", "pairs.png"]
    assert json.loads((tmp_path / "new" / "out" / "report.json").read_text()) == report
    for path in (paths[1], paths[3]):
        picture = plt.imread(path)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.01
    for colours in (None, "truecolor"):
        out = Console(width=150, record=True, file=io.StringIO(), color_system=colours, highlight=False)
        inspection.console(report, train, tokenizer, paths=paths, out=out)
        text = out.export_text()
        for part in ("duplicate pairs", "train.jsonl:22", "1.", "finding: train", "<|eos|>", "lake.⏎", "pairs.html"):
            assert part in text, part


def test_a_folder_that_cannot_be_written_is_a_sentence(load, write_rows, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    train = load(write_rows(clean_rows()))
    report = inspection.inspect_data(train, None, tokenizer)
    with pytest.raises(UserError, match="--output_dir .*cannot be written"):
        inspection.write_report(report, str(tmp_path / "file" / "out"), train, None, tokenizer)


# ---- the command line


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
    report = inspection.inspect_data(train, held_out, tokenizer)
    source = report["splits"]["train"]["sources"][0]
    assert source["forms"] == {"HH text": 1700}
    assert 1.5 < source["shared"]["by_pair"]["ratio"] < 1.65
    check_against_plain_count(source, train, range(len(train)))
    inspection.write_report(report, str(tmp_path / "out"), train, held_out, tokenizer)


def test_alpaca_eval_duplicates_are_found(load, tokenizer):
    train = load(shared_data("alpaca_eval"), max_token_length=8192, max_prompt_token_length=8192)
    report = inspection.inspect_data(train, None, tokenizer)
    source = report["splits"]["train"]["sources"][0]
    check_against_plain_count(source, train, range(len(train)))
    assert source["duplicates"]["count"] > 0
    assert any("duplicate pair" in finding for finding in report["findings"])
    assert source["shared"]["by_prompt"]["ratio"] > 1.5 * source["shared"]["by_pair"]["ratio"]
