"""`python -m open_rm.scoring`: rows come back in order with their rewards, to the same bytes whatever was killed in between."""

import csv
import datetime
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import REPOSITORY, environment_of_a_process, read_pairs
from pyarrow import parquet
from scorer_standin import StandIn, reward_of, words
from transformers import AutoConfig, LlamaForSequenceClassification

from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.model.contract import Contract
from open_rm.scoring import __main__ as command
from open_rm.scoring import output
from open_rm.scoring.arguments import BestOfNArgs, PairsArgs, ScoreArgs

LISTS = [{"id": i, "prompt": words(i), "responses": [words(i + k, 1 + k) for k in range(1, 4)]} for i in range(70)]
SINGLES = [{"id": i, "prompt": words(i), "response": words(i + 1, 1 + i % 5)} for i in range(70)]


@pytest.fixture
def standin(tokenizer, monkeypatch):
    """What the command opens: a stand-in for each name, made with the keywords that are put in here."""
    how = {"chat": True}
    monkeypatch.setattr(command, "open_scorer", lambda flags: StandIn(tokenizer, name=flags.model, **how))
    return how


def score(rows_or_path, folder: Path, name: str = "out", kind=ScoreArgs, **flags) -> list[dict]:
    """Score rows, or a file, with blocks of 8 rows; returns the output's rows."""
    path = rows_or_path
    if isinstance(rows_or_path, list):
        path = folder / "in.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows_or_path))
    args = kind(**{"model": "m", "input": str(path), "output": str(folder / f"{name}.jsonl"), "block_rows": 8} | flags)
    command.main(args)
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def expected(tokenizer, row: dict) -> list[float]:
    """Rewards of a row of prompt and answers, by plain transformers."""
    answers = row.get("responses") or [row["response"]]
    turns = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}] for text in answers]
    return [float(reward_of(tokenizer.apply_chat_template(turn, tokenize=True)["input_ids"])) for turn in turns]


# ---- what comes out


def test_rows_come_back_in_order_with_their_rewards_and_all_their_columns(standin, tokenizer, tmp_path):
    for rows, name, several in ((LISTS, "scores", True), (SINGLES, "score", False)):
        found = score(rows, tmp_path, name)
        assert [{key: value for key, value in row.items() if key not in (name, "overlength")} for row in found] == rows
        for row in found:
            values = row[name] if several else [row[name]]
            assert [float(np.float32(value)) for value in values] == expected(tokenizer, row)
            assert row["overlength"] == ([False] * 3 if several else False)


def test_a_reward_is_written_as_the_shortest_decimal_that_is_its_float32(standin, tmp_path):
    score(SINGLES, tmp_path)
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        text = line.partition('"score": ')[2].partition(",")[0]
        value = np.float32(text)
        assert float(text) == float(str(value)) and len(text.strip("-")) <= 12
        digits = text.strip("-").replace(".", "").lstrip("0")
        assert np.float32(f"{value:.{max(len(digits) - 2, 0)}e}") != value or len(digits) < 2


def test_pairs_are_scored_chosen_first_and_conversations_alone(standin, tmp_path):
    user, good, bad = ({"role": role, "content": role[0]} for role in ("user", "assistant", "assistant"))
    bad = bad | {"content": "z"}
    pair = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    [scored, alone, swapped] = score(
        [pair, {"messages": [user, good]}, {**pair, "chosen": [bad], "rejected": [good]}], tmp_path
    )
    assert scored["scores"] == swapped["scores"][::-1] and scored["scores"][0] == alone["score"]


def test_columns_of_the_same_name_are_kept_under_another_one_and_said(standin, tmp_path, capsys):
    row = {"prompt": "Q", "responses": ["a", "b"], "scores": [2, 1], "input_scores": "x", "overlength": 7}
    [found] = score([row], tmp_path)
    assert (found["input_input_scores"], found["input_scores"], found["input_overlength"]) == ([2, 1], "x", 7)
    assert list(found)[-2:] == ["scores", "overlength"] and len(set(found["scores"])) == 2
    assert "column scores is now called input_input_scores" in capsys.readouterr().out


@pytest.mark.parametrize("overlength", ["null", "truncate"])
def test_overlength_answers_are_marked_and_counted_and_never_silently_cut(standin, tmp_path, capsys, overlength):
    standin["max_token_length"] = 60
    rows = [{"prompt": "Q", "responses": ["a", "b " * 100]}, {"prompt": "Q", "response": "b " * 100}, SINGLES[0]]
    first, second, third = score(rows, tmp_path, overlength=overlength)
    assert (second["overlength"], third["overlength"]) == (True, False) and third["score"] is not None
    assert first["overlength"][1] and (overlength == "truncate" or not first["overlength"][0])
    unscored = [first["scores"][1] is None, second["score"] is None]
    assert unscored == [overlength == "null"] * 2
    assert (
        "2 answers are over-length, marked and not scored" in (said := capsys.readouterr().out) or overlength != "null"
    )
    assert "over-length; 3 rows written" in said


def test_a_text_of_too_many_characters_is_not_counted_as_cut(standin, tmp_path, capsys):
    standin["max_token_length"] = 60
    rows = [{"prompt": "Q", "responses": ["a", "b " * 100]}, {"prompt": "Q", "response": "b " * 600_000}]
    scored, unread = score(rows, tmp_path, overlength="truncate")
    assert None not in scored["scores"] and (unread["score"], unread["overlength"]) == (None, True)
    said = capsys.readouterr().out
    assert "1 answers are over-length, marked and not scored" in said and "2 of 3 answers scored" in said


def test_pairs_are_cut_to_the_two_limits_of_training(standin, tokenizer, tmp_path, write_rows):
    asked, scored, user = {"max_token_length": 34, "max_prompt_token_length": 12}, [], "words " * 20
    prompts = [user, "Q", user, "Q"]
    answers = [("a", "b"), ("long " * 40, "b"), ("long " * 40, "b"), ("a", "b")]
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]
    standin |= {"cut_to": tuple(asked.values()), "before": lambda sequences: scored.extend(sequences)}
    found = score(rows, tmp_path, overlength="truncate")
    cache = {"dataset_local_cache_dir": str(tmp_path / "cache")}
    data = read_pairs([write_rows(rows), "1.0"], tokenizer, overlength="truncate", **asked, **cache)
    assert scored == [side.tolist() for pair in data.pairs(range(len(data))) for side in pair]
    assert [row["overlength"] for row in found] == [[True, True]] * 3 + [[False, False]]


FILES = {
    "jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "parquet": lambda path, rows: parquet.write_table(pa.Table.from_pylist(rows), path),
    "csv": None,
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_rewards(standin, tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt", "responses"])
            writer.writeheader()
            writer.writerows(row | {"responses": json.dumps(row["responses"])} for row in LISTS[:20])
    else:
        FILES[kind](path, LISTS[:20])
    rewards = [row["scores"] for row in score(LISTS[:20], tmp_path)]
    assert [row["scores"] for row in score(path, tmp_path, "other")] == rewards


def test_what_json_cannot_hold_is_written_as_the_nearest_and_said(standin, tmp_path, capsys):
    odd = {
        "when": datetime.datetime(2024, 7, 26, 1, 2),
        "raw": b"\xff\x00",
        "price": Decimal("1.50"),
        "x": float("nan"),
    }
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([SINGLES[0] | odd, SINGLES[1] | odd | {"x": 1.5}]), path)
    first, second = score(path, tmp_path)
    assert (first["when"], first["raw"], first["price"], first["x"]) == ("2024-07-26T01:02:00", "/wA=", "1.50", None)
    assert second["x"] == 1.5 and "not finite are written as null" in capsys.readouterr().out
    column = pa.array([[("a", float("nan")), ("b", 1.0)]], pa.map_(pa.string(), pa.float64()))
    parquet.write_table(pa.Table.from_pylist(SINGLES[:1]).append_column("map", column), path)
    assert score(path, tmp_path, "map")[0]["map"] == [["a", None], ["b", 1.0]]
    half = '{"prompt": "Q", "response": "a", "note": "\\ud83d"}'
    (tmp_path / "half.jsonl").write_text(half + "\n")
    score(tmp_path / "half.jsonl", tmp_path, "half_scored")
    assert (tmp_path / "half_scored.jsonl").read_text().startswith(half[:-1])


def test_a_judge_scores_beside_the_model_and_their_agreement_is_said(standin, tmp_path, capsys, monkeypatch, tokenizer):
    def opened(flags):
        return StandIn(
            tokenizer,
            chat=True,
            name=flags.model,
            reward=lambda ids: np.float32({"m": 1, "j": -1}[flags.model] * len(ids)),
        )

    monkeypatch.setattr(command, "open_scorer", opened)
    found = score(LISTS, tmp_path, judge="j")
    assert all(row["judge_scores"] == [-score for score in row["scores"]] for row in found)
    assert "m and j prefer the same answer in 0 of" in capsys.readouterr().out
    said = json.loads((tmp_path / "out.agreement.json").read_text())
    assert said["agreement"] == 0 and said["kendall_tau_b"] == -1 and said["prompts"] == len(LISTS)


def test_the_agreement_appears_before_the_output_and_is_not_overwritten_silently(standin, tmp_path, monkeypatch):
    replace, report = os.replace, tmp_path / "out.agreement.json"

    def die_at_the_output(source, to):
        if Path(to).name == "out.jsonl":
            die()
        replace(source, to)

    def killed():
        monkeypatch.setattr(output.os, "replace", die_at_the_output)
        score(LISTS, tmp_path, judge="j")

    assert in_a_child(killed) == signal.SIGKILL
    whole = report.read_bytes()
    report.write_text("torn")
    score(LISTS, tmp_path, judge="j")
    assert report.read_bytes() == whole
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(UserError, match="out.agreement.json is there already"):
        score(LISTS, tmp_path, judge="j")
    score(LISTS, tmp_path, judge="j", overwrite=True)


def test_best_of_n_and_pairs_come_from_the_same_scores(standin, tmp_path):
    scores = {row["id"]: row["scores"] for row in score(LISTS, tmp_path)}
    best = score(LISTS, tmp_path, "best", BestOfNArgs, n=1)
    assert [row["score"] for row in best] == [max(scores[row["id"]]) for row in best] and len(best) == len(LISTS)
    pairs = score(LISTS, tmp_path, "pairs", PairsArgs)
    for row in pairs:
        values = scores[row["id"]]
        assert (values[row["chosen_index"]], values[row["rejected_index"]]) == (max(values), min(values))
        assert row["margin"] == max(values) - min(values)
    assert len(pairs) == len(LISTS)


# ---- killed, and given again


def in_a_child(work) -> int:
    """Run in a forked process; the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["scoring", "rows written, not yet counted", "counted, not yet renamed", "renamed"])
@pytest.mark.parametrize("kind", [ScoreArgs, PairsArgs])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(
    standin, tmp_path, monkeypatch, moment, kind, capsys
):
    more = {"length_balanced": True} if kind is PairsArgs else {}
    score(LISTS, tmp_path, "whole", kind, **more)
    calls = {"fsync": 0, "replace": 0, "rewards": 0}

    def killing(name: str, at: int, function, before=lambda *_: None):
        def called(*arguments):
            calls[name] += 1
            if calls[name] == at:
                before(*arguments)
                die()
            return function(*arguments)

        return called

    def killed():
        monkeypatch.setattr(output, "COMMIT_SECONDS", 0.0)
        if moment == "scoring":
            standin["before"] = killing("rewards", 4, lambda sequences: None)
        elif moment == "rows written, not yet counted":  # with half a line behind them
            monkeypatch.setattr(
                output.os, "fsync", killing("fsync", 7, os.fsync, lambda number: os.write(number, b'{"id": 1'))
            )
        elif moment == "counted, not yet renamed":
            monkeypatch.setattr(output.os, "replace", killing("replace", 4, os.replace))
        else:  # OUT is there already
            monkeypatch.setattr(output, "sync_folder", lambda folder: die())
        score(LISTS, tmp_path, "killed", kind, **more)

    assert in_a_child(killed) == signal.SIGKILL
    if moment == "renamed":
        assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        return
    assert not (tmp_path / "killed.jsonl").exists()
    capsys.readouterr()
    score(LISTS, tmp_path, "killed", kind, **more)
    assert "going on after row" in capsys.readouterr().out
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("killed.jsonl.*"))


def begin(folder: Path, standin: dict, rows=LISTS, calls: int = 4, **flags) -> None:
    """A run that ends in the middle by a mistake, with three blocks written."""
    count = iter(range(100))

    def stop(sequences):
        if next(count) == calls - 1:
            raise UserError("stopped")

    standin["before"] = stop
    with pytest.raises(UserError, match=r"^stopped. The 24 rows before are kept in .*out.jsonl.partial"):
        score(rows, folder, **flags)
    standin["before"] = lambda sequences: None


def test_another_model_or_flag_is_refused_in_a_sentence_and_overwrite_begins_anew(standin, tmp_path):
    begin(tmp_path, standin)
    with pytest.raises(
        UserError, match=r"holds rows of a run with another model \(weights of m then\); give that command again"
    ):
        score(LISTS, tmp_path, model="n")
    with pytest.raises(UserError, match=r"with another --block_rows \(8 then\);"):
        score(LISTS, tmp_path, block_rows=4)
    with pytest.raises(UserError, match="another command"):
        score(LISTS, tmp_path, kind=BestOfNArgs)
    partial = (tmp_path / "out.jsonl.partial").read_bytes()
    assert partial.count(b"\n") == 24
    score(LISTS, tmp_path, model="n", overwrite=True)
    score(LISTS, tmp_path, "whole", model="n")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_rows_before_are_refused_and_corrected_ones_behind_are_taken(standin, tmp_path):
    begin(tmp_path, standin)
    with pytest.raises(UserError, match="the first 24 rows of --input are not those that were read before"):
        score([{"prompt": "Q", "responses": ["x"]}, *LISTS[1:]], tmp_path)
    partial = (tmp_path / "out.jsonl.partial").read_bytes()
    assert partial.count(b"\n") == 24  # a refusal loses nothing
    changed = [*LISTS[:40], {"id": 40, "prompt": "other", "responses": ["x", "y"]}, *LISTS[41:]]
    found = score(changed, tmp_path)
    assert found == score(changed, tmp_path, "whole")


def test_overwrite_begins_anew_with_another_input_and_the_refusal_names_it(standin, tmp_path, capsys):
    begin(tmp_path, standin)
    with pytest.raises(UserError, match=r"the first 24 rows .* or pass --overwrite to begin anew$"):
        score(LISTS[1:], tmp_path)
    found = score(LISTS[1:], tmp_path, overwrite=True)
    assert "are not those that were read before: begun anew" in capsys.readouterr().out
    assert found == score(LISTS[1:], tmp_path, "whole")


def test_a_run_that_fails_at_its_first_block_does_not_refuse_its_correction(standin, tmp_path):
    rows = [{"id": row["id"], "prompt": row["prompt"], "text": row["response"]} for row in SINGLES]
    with pytest.raises(UserError):
        score(rows, tmp_path)
    found = score(rows, tmp_path, column_map=["response=text"])
    assert len(found) == len(SINGLES)
    (tmp_path / "out.jsonl").unlink()
    state = {"facts": {"model": "other"}, "bytes": 0, "progress": None}  # as older versions left it
    (tmp_path / "out.jsonl.progress").write_text(json.dumps(state))
    assert score(rows, tmp_path, column_map=["response=text"]) == found


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_stops_in_a_row_goes_on_to_the_same_bytes(standin, tmp_path, monkeypatch, error):
    score(LISTS, tmp_path, "whole")
    opened = output.Output._locked

    class Torn:
        """A file whose fourth write ends in the middle."""

        def __init__(self, file):
            self.file, self.writes = file, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            self.writes += 1
            if self.writes == 4:
                self.file.write(data[: len(data) // 2])
                raise error("stopped")
            self.file.write(data)

    monkeypatch.setattr(output.Output, "_locked", lambda self: Torn(opened(self)))
    with pytest.raises(error):
        score(LISTS, tmp_path)
    monkeypatch.setattr(output.Output, "_locked", opened)
    score(LISTS, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_output_that_is_finished_while_another_process_opens_it_is_not_emptied(tmp_path, monkeypatch):
    """A finishes between B's open and B's lock; B then holds the lock of the finished file."""
    path, lock = tmp_path / "out.jsonl", output.fcntl.flock
    first = output.Output(path, {}, overwrite=False)
    first.write(b"{}\n", {"rows": 1}, now=True)

    def late(file, how):
        monkeypatch.setattr(output.fcntl, "flock", lock)
        first.finish()
        lock(file, how)

    monkeypatch.setattr(output.fcntl, "flock", late)
    with pytest.raises(UserError, match="out.jsonl is there already"):
        output.Output(path, {}, overwrite=False)
    assert path.read_bytes() == b"{}\n"


@pytest.mark.parametrize("what", ["device", "number of threads", "--max_tokens_per_micro_batch"])
def test_on_another_machine_a_run_does_not_go_on_to_other_bytes(standin, tmp_path, what):
    standin["machine"] = {what: "A"}
    begin(tmp_path, standin)
    standin["machine"] = {what: "B"}
    with pytest.raises(UserError, match=rf"with another {what} \(A then\); give that command again, on such a device"):
        score(LISTS, tmp_path)
    standin["machine"] = {what: "A"}
    score(LISTS, tmp_path)


def test_a_finished_output_is_not_overwritten_silently(standin, tmp_path):
    score(LISTS, tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="out.jsonl is there already; name another file, or pass --overwrite"):
        score(SINGLES, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_two_processes_do_not_write_one_output(standin, tmp_path):
    facts = {"model": 1}
    held = output.Output(tmp_path / "out.jsonl", facts, overwrite=False)
    with pytest.raises(UserError, match="another process is making"):
        output.Output(tmp_path / "out.jsonl", facts, overwrite=False)
    held.close()
    output.Output(tmp_path / "out.jsonl", facts, overwrite=False).close()


def test_a_full_disk_is_a_sentence_and_what_was_written_is_kept(standin, tmp_path):
    """The limit of a file's size takes the disk's place; the write fails in the kernel."""
    score(LISTS, tmp_path, "whole")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))
        try:
            score(tmp_path / "in.jsonl", tmp_path)
        except UserError as error:
            (tmp_path / "said").write_text(str(error))

    assert in_a_child(limited) == 0
    said = (tmp_path / "said").read_text()
    assert "cannot be written (" in said and "what was written until then is kept" in said
    assert (tmp_path / "out.jsonl.partial").exists()
    score(LISTS, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("shards", [2, 3, 12])
def test_shards_joined_are_one_run(standin, tmp_path, shards):
    score(LISTS, tmp_path, "whole")
    for shard in range(shards):
        score(LISTS, tmp_path, f"part{shard}", num_shards=shards, shard=shard)
    joined = b"".join((tmp_path / f"part{shard}.jsonl").read_bytes() for shard in range(shards))
    assert joined == (tmp_path / "whole.jsonl").read_bytes()


# ---- rows that cannot be scored


BAD = {"prompt": "Q", "response": " "}


def test_a_bad_row_names_its_place_and_loses_nothing_that_was_written(standin, tmp_path):
    rows = [*SINGLES[:30], BAD, *SINGLES[30:]]
    with pytest.raises(UserError) as caught:
        score(rows, tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path / 'in.jsonl'}:31: response is empty; remove the row or fill it in (--skip"
    )
    assert "The 24 rows before are kept" in str(caught.value)
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 24
    corrected = [*SINGLES[:30], {"prompt": "Q", "response": "now"}, *SINGLES[30:]]
    found = score(corrected, tmp_path)
    assert found == score(corrected, tmp_path, "whole")


def test_bad_rows_that_may_be_skipped_are_listed_and_counted(standin, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    half, pad = (
        json.dumps({"prompt": "Q", "response": "\ud83d"}),
        json.dumps({"prompt": "Q", "response": "a <|pad|> b"}),
    )
    lines = [json.dumps(row) for row in SINGLES[:10]] + ["{", json.dumps(BAD), half, pad, json.dumps(SINGLES[10])]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="in.jsonl:13: the text holds half a surrogate pair.*2 are used up"):
        score(path, tmp_path, skip_bad_rows=2)
    found = score(path, tmp_path, skip_bad_rows=4)
    assert [row["id"] for row in found] == list(range(11))
    said = capsys.readouterr().out
    assert "15 rows read, 4 of them skipped as bad; 11 of 11 answers scored" in said
    assert [said.count(f"skipped {path}:{line}: ") for line in (11, 12, 13, 14)] == [1, 1, 1, 1] or said.count(
        "skipped /"
    ) >= 4


def test_a_model_of_conversations_says_what_to_do_with_text_and_one_of_text_with_messages(standin, tmp_path):
    with pytest.raises(UserError, match="pass --as_messages False where the text is a conversation that was rendered"):
        score([{"response": "text"}], tmp_path)
    standin["chat"] = False
    with pytest.raises(UserError, match="the row is messages, and m scores plain text"):
        score([{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}], tmp_path, "b")


def test_a_conversation_that_was_rendered_is_scored_as_it_stands(standin, tokenizer, tmp_path):
    turn = [{"role": "user", "content": SINGLES[0]["prompt"]}, {"role": "assistant", "content": SINGLES[0]["response"]}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    [rendered] = score([{"response": text}], tmp_path, as_messages=["False"])
    assert rendered["score"] == score(SINGLES[:1], tmp_path, "b")[0]["score"]


def test_a_reward_that_is_no_number_is_refused_with_its_row(standin, tmp_path):
    standin["reward"] = lambda ids: np.float32("nan")
    with pytest.raises(UserError, match="in.jsonl:1: the reward that m gives is no finite number"):
        score(SINGLES, tmp_path)


MISTAKES = {
    "is not below num_shards": (
        {"num_shards": 2, "shard": 2},
        "--shard 2: must be from 0 to num_shards - 1, which is 1",
    ),
    "is no jsonl": ({"output": "out.csv"}, "--output out.csv: must be a file that ends in .jsonl"),
    "is not there": ({"input": "nowhere.jsonl"}, "--input: there is no file or folder nowhere.jsonl"),
    "is the input itself": ({"output": "rows.jsonl", "overwrite": True}, "--output rows.jsonl is the input itself"),
    "is no column": ({"column_map": ["a"]}, "--column_map a: write our column"),
    "is not a number of rows": ({"block_rows": 0}, "--block_rows 0: must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(tmp_path, name, write_rows, monkeypatch):
    flags, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    given = {"model": "m", "input": str(write_rows(SINGLES)), "output": str(tmp_path / "o.jsonl")} | flags
    with pytest.raises(UserError) as caught:
        command.check_args(ScoreArgs(**given))
    assert str(caught.value).startswith(said)


def test_memory_does_not_grow_with_the_rows(standin, tmp_path):
    standin["reward"] = lambda ids: np.float32(len(ids))
    row = {
        "chosen_input_ids": [5, 6],
        "rejected_input_ids": [5, 7],
        "note": "n" * 8_000,
    }  # both files above 1 MiB, which is read at once
    peaks = []
    for count in (150, 900):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f"{json.dumps(row | {'id': i})}\n" for i in range(count)))
        args = ScoreArgs(model="m", input=str(path), output=str(tmp_path / f"out{count}.jsonl"), block_rows=8)
        tracemalloc.start()
        command.main(args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]  # the larger file alone has six times the smaller one's bytes


# ---- the real command


@pytest.fixture(scope="module")
def tiny(toy, tmp_path_factory) -> Path:
    """A reward model of ours that a CPU computes in no time."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(str(toy / "model"))
    config = AutoConfig.from_pretrained(toy / "model")
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 1})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16})
    config.update({"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Contract(chat=True, ending=tokenizer.eos_token).write(folder)
    return folder


def test_the_command_killed_with_9_goes_on_to_the_bytes_of_an_undisturbed_run(tiny, tmp_path):
    rows = [row | {"id": n} for n in range(12) for row in SINGLES]
    whole = score(rows, tmp_path, "whole", model=str(tiny), block_rows=16)
    flags = [
        "--model",
        tiny,
        "--input",
        tmp_path / "in.jsonl",
        "--output",
        tmp_path / "killed.jsonl",
        "--block_rows",
        "16",
    ]
    started = subprocess.Popen(
        [sys.executable, "-m", "open_rm.scoring", "score", *map(str, flags)],
        env=environment_of_a_process() | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    counted = tmp_path / "killed.jsonl.progress"
    while not counted.exists() and started.poll() is None:
        time.sleep(0.005)
    started.kill()
    assert started.wait() == -signal.SIGKILL, started.stderr.read()
    assert 0 < json.loads(counted.read_text())["progress"]["rows"] < len(rows)
    assert score(tmp_path / "in.jsonl", tmp_path, "killed", model=str(tiny), block_rows=16) == whole
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert all(np.isfinite(row["score"]) for row in whole)
