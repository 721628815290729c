"""`python -m open_rm.evaluation`: every row scored once as training's evaluation scores it, kept over kills, judged, and refused in
one sentence where it cannot be."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, environment_of_a_process, shared_data
from sample_report import sample_report
from scorer_standin import StandIn, reward_of, words
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForSequenceClassification

from open_rm import command_line
from open_rm.data import readers
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.evaluation import __main__ as command
from open_rm.evaluation import keeping, scoring
from open_rm.evaluation.arguments import EvaluationArgs, command_of
from open_rm.evaluation.page import document
from open_rm.evaluation.sets import open_sets
from open_rm.model.contract import Contract
from open_rm.scoring import computing, open_model
from open_rm.scoring.opening import open_scorer


def llmbar_rows(count: int, first: int = 0) -> list[dict]:
    """Rows as RewardBench has them."""
    subsets = ["llmbar-natural", "llmbar-adver-manual"]
    return [
        {"id": i, "subset": subsets[i % 2], "prompt": words(i), "chosen": words(i + 1), "rejected": words(i + 2, 6)}
        for i in range(first, first + count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


class Opened(StandIn):
    """The stand-in, with what the command says of a model."""

    layout, dtype, folder = "shared_prefix", "float32", "/models/m"

    def rewards(self, sequences, prompt_of=None, *, max_tokens=None, padded=False):
        return super().rewards(sequences, prompt_of)


@pytest.fixture
def standin(tokenizer, monkeypatch):
    """What the command opens: a stand-in for each name, made with the keywords that are put in here."""
    how = {"chat": True, "machine": {"--max_tokens_per_micro_batch": 1536}}
    monkeypatch.setattr(keeping, "open_scorer", lambda flags: Opened(tokenizer, name=flags.model, **how))
    monkeypatch.setattr(keeping, "look", lambda flags: True)
    monkeypatch.setattr(keeping, "identify", lambda flags: Opened(tokenizer, name=flags.model, **how))
    return how


def evaluate(folder: Path, **flags) -> dict:
    """Run the command on the stand-in; returns the report."""
    return command.main(EvaluationArgs(**{"model": "m", "output_dir": str(folder)} | flags))


@pytest.fixture(scope="module")
def tiny(toy, tmp_path_factory) -> Path:
    """A reward model of ours that a CPU computes in no time, with rewards of order one."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(toy, folder)
    Contract(chat=True, ending=load_tokenizer(str(folder)).eos_token).write(folder)
    return folder


def save_tiny(toy: Path, folder: Path, *, template: bool = True, **config) -> None:
    tokenizer = load_tokenizer(str(toy / "model"))
    made = AutoConfig.from_pretrained(toy / "model")
    made.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 1})
    made.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16})
    made.update({"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)} | config)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(made)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


# ---- what comes out


def test_scores_are_those_of_plain_transformers_and_the_report_counts_them(tiny, tmp_path, capsys):
    """Tolerance: float32 sums in another order, at rewards of up to 3. The strict wins are counted here from scores.jsonl."""
    source = shared_data("rewardbench_llmbar") / "test.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()][::8]
    path = write(tmp_path / "llmbar" / "test.jsonl", rows)
    report = evaluate(tmp_path / "out", model=str(tiny), benchmark=[f"reward_bench={path.parent}"])
    made = rows_of(tmp_path / "out")
    assert [row["id"] for row in made] == [f"{row['subset']}/{row['id']}" for row in rows]
    assert [row["answers"] for row in made] == [[row["chosen"], row["rejected"]] for row in rows]
    assert [row["characters"] for row in made] == [[len(row["chosen"]), len(row["rejected"])] for row in rows]
    tokenizer, model = load_tokenizer(str(tiny)), AutoModelForSequenceClassification.from_pretrained(tiny)
    for row, scored in list(zip(rows, made, strict=True))[:6]:
        for answer, score in zip((row["chosen"], row["rejected"]), scored["scores"], strict=True):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)
    wins = {row["id"]: row["scores"][0] > row["scores"][1] for row in made}
    [found] = report["sets"]
    by_name = {line["name"]: line["value"] for line in found["lines"]}
    for subset in {row["subset"] for row in rows}:
        assert by_name[subset] == pytest.approx(np.mean([win for name, win in wins.items() if name.startswith(subset)]))
    assert found["rows"] == len(rows) and "math-prm" in found["missing"]
    assert report["invariance"]["rows"] == len(rows) and all(check["exact"] for check in report["invariance"]["checks"])
    assert {check["what"].split(" of ")[0] for check in report["invariance"]["checks"]} == {
        "one sequence at a time",
        "micro-batches",
        "answers in the other order",
        "padded rows",
        "these rows alone",
    }
    labels = dict(report["made"])
    assert labels["dtype"] == "float32" and labels["truncation length"].startswith("2048 tokens")
    assert {"chat template", "over-length answers", "device", "versions", "fingerprint", "date"} <= labels.keys()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert f"{found['headline']['value']:.4f} (95 % interval" in said and "report.html" in said
    assert not (tmp_path / "out" / "parts").exists()


def test_rm_bench_takes_its_domains_from_the_files_and_names_what_is_missing(standin, tmp_path):
    shared = shared_data("rm_bench")
    for name in ("chat", "safety-refuse"):
        rows = json.loads((shared / f"{name}.json").read_text())[:20]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(rows))
    report = evaluate(tmp_path / "out", benchmark=[f"rm_bench={tmp_path / 'data'}"])
    made = rows_of(tmp_path / "out")
    assert [row["subset"] for row in made] == ["chat"] * 20 + ["safety-refuse"] * 20
    assert all(row["gold"] == [1, 1, 1, 0, 0, 0] for row in made)
    own = np.array([row["scores"] for row in made])
    wins = (own[:, :3, None] > own[:, None, 3:]).mean((1, 2))
    [found] = report["sets"]
    # its domain is the mean of hard, normal and easy, which three cells each make up
    lines = {line["name"]: line["value"] for line in found["lines"]}
    assert lines["chat"] == pytest.approx(wins[:20].mean()) and lines["safety"] == pytest.approx(wins[20:].mean())
    assert found["headline"]["value"] == pytest.approx((lines["chat"] + lines["safety"]) / 2)
    assert found["missing"] == ["math", "code"]


def test_ranked_lists_and_single_answers_bring_their_gold_scores(standin, tmp_path):
    lists = [
        {"prompt": words(i), "responses": [words(i + k, k) for k in (1, 2, 3)], "scores": [3, 1, 2]} for i in range(9)
    ]
    single = [
        {"prompt": words(i), "response": words(i + k, k), "score": k, "source": "abc"[k - 1]}
        for i in range(5)
        for k in (1, 2)
    ]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("lists", lists), ("single", single))]
    report = evaluate(tmp_path / "out", dataset=[str(path) for path in paths])
    made = rows_of(tmp_path / "out")
    assert [row["gold"] for row in made] == [[3, 1, 2]] * 9 + [[1, 2]] * 5
    assert len({row["id"] for row in made}) == 14
    assert [found["pairs"] for found in report["sets"]] == [27, 5]
    assert made[0]["answers"] == lists[0]["responses"] and made[-1]["subset"] == "a"


def test_token_ids_are_scored_as_they_are_and_shown_as_text(standin, tokenizer, tmp_path):
    prompt, better, worse = (tokenizer.encode(words(i), add_special_tokens=False) for i in range(3))
    row = {"prompt_input_ids": prompt, "chosen_input_ids": prompt + better, "rejected_input_ids": prompt + worse}
    evaluate(tmp_path / "out", dataset=[str(write(tmp_path / "ids.jsonl", [row]))])
    [made] = rows_of(tmp_path / "out")
    assert made["scores"] == [float(str(reward_of(prompt + ids))) for ids in (better, worse)]
    assert made["answers"] == [tokenizer.decode(ids) for ids in (better, worse)]
    assert made["characters"] == [len(text) for text in made["answers"]] and made["prompt"] == tokenizer.decode(prompt)


@pytest.mark.parametrize("how", ["truncate", "null"])
def test_over_length_answers_are_cut_or_left_out_and_counted(standin, tmp_path, how):
    standin["max_token_length"] = 60
    rows = llmbar_rows(4)
    rows[1]["rejected"] = "long " * 100
    path = write(tmp_path / "rows.jsonl", rows)
    report = evaluate(tmp_path / "out", benchmark=[f"reward_bench={path}"], overlength=how)
    made = rows_of(tmp_path / "out")
    # where an answer is cut, the other one's prompt is cut to be the same
    marked = [how == "truncate", True]
    assert [row["overlength"] for row in made] == [[False, False], marked, [False, False], [False, False]]
    assert (made[1]["scores"][1] is None) == (how == "null") and made[1]["scores"][0] is not None
    [found] = report["sets"]
    assert found["overlength"] == sum(marked) and found["unscored"] == (how == "null")
    assert dict(report["made"])["over-length answers"].startswith(f"{sum(marked)} of 8: ")


def test_a_prompt_loses_its_start_so_that_both_answers_stay(standin, tokenizer, tmp_path):
    scored = []
    # cut_to, what it was trained with, is no limit
    standin |= {"max_token_length": 60, "cut_to": (40, 10), "before": scored.extend}
    row = llmbar_rows(1)[0] | {"prompt": "start " + "word " * 100}
    evaluate(tmp_path / "out", benchmark=[f"reward_bench={write(tmp_path / 'rows.jsonl', [row])}"])
    chosen, rejected = (tokenizer.decode(ids) for ids in scored[:2])
    assert len(scored[0]) <= 60 and len(scored[1]) == 60
    assert row["chosen"] in chosen and row["rejected"] in rejected and "start" not in chosen


# ---- kept, gone on with, not computed again


def test_killed_with_9_the_same_command_goes_on_to_the_bytes_of_an_undisturbed_run(standin, tmp_path):
    flags = {
        "benchmark": [f"reward_bench={write(tmp_path / 'rb.jsonl', llmbar_rows(20))}"],
        "dataset": [str(write(tmp_path / "more.jsonl", llmbar_rows(400, first=1000)))],
    }
    evaluate(tmp_path / "whole", **flags)
    calls = []

    def die_in_the_second_set(sequences):
        calls.append(sequences)
        if len(calls) == 4:  # one call was the first set's, two are blocks of the second
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            standin["before"] = die_in_the_second_set
            evaluate(tmp_path / "killed", **flags)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    parts = tmp_path / "killed" / "parts"
    [counted] = parts.glob("*more.jsonl.progress")
    assert 0 < json.loads(counted.read_text())["progress"]["rows"] < 400
    assert (parts / "reward_bench.jsonl").exists() and not (tmp_path / "killed" / "scores.jsonl").exists()
    evaluate(tmp_path / "killed", **flags)
    assert (tmp_path / "killed" / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


def test_a_set_that_was_whole_when_the_command_was_stopped_is_not_scored_again(standin, tmp_path, capsys):
    first = write(tmp_path / "first.jsonl", llmbar_rows(20))
    second = write(tmp_path / "second.jsonl", llmbar_rows(30, first=50))
    bad = second.read_text()
    second.write_text(bad + '{"prompt": "p", "chosen": "a", "rejected": " "}\n')
    data = [str(first), str(second)]
    with pytest.raises(UserError, match="second.jsonl:31: .*--skip_bad_rows 1 would leave out"):
        evaluate(tmp_path / "out", dataset=data)
    texts = []
    standin["before"] = texts.extend
    evaluate(tmp_path / "out", dataset=data, skip_bad_rows=1)
    assert "first: scored already" in capsys.readouterr().out.replace(f"{tmp_path.name}_", "")
    made = rows_of(tmp_path / "out")
    assert len(made) == 50
    # the checks of invariance ask for both sets' rows again, scoring for the second one's alone
    assert len(texts) == 2 * 30 + 5 * 2 * 50


def test_the_same_command_again_judges_the_scores_that_are_there(standin, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", llmbar_rows(20))
    first = evaluate(tmp_path / "out", benchmark=[f"reward_bench={path}"])
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()

    def refuse(sequences):
        raise AssertionError("computed again")

    standin["before"] = refuse
    again = evaluate(tmp_path / "out", benchmark=[f"reward_bench={path}"])
    assert "judged again, not computed again" in capsys.readouterr().out
    assert again | {"created": 0} == first | {"created": 0}
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before


OTHERS = {
    "another model": ({"model": "n"}, "another model"),
    "another limit": ({"overlength": "null"}, "another --overlength"),
    "other rows": ({"benchmark": ["reward_bench={folder}/other.jsonl"]}, "another set reward_bench"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_scores_of_other_facts_are_refused_and_with_overwrite_made_anew(standin, tmp_path, name):
    changed, said = OTHERS[name]
    changed = {k: [v[0].format(folder=tmp_path)] if k == "benchmark" else v for k, v in changed.items()}
    path = write(tmp_path / "rows.jsonl", llmbar_rows(10))
    write(tmp_path / "other.jsonl", llmbar_rows(11))
    evaluate(tmp_path / "out", benchmark=[f"reward_bench={path}"])
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    flags = {"benchmark": [f"reward_bench={path}"]} | changed
    with pytest.raises(UserError, match=f"made with {said}; name another --output_dir, or pass --overwrite"):
        evaluate(tmp_path / "out", **flags)
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before
    evaluate(tmp_path / "out", overwrite=True, **flags)
    assert len(rows_of(tmp_path / "out")) == (11 if name == "other rows" else 10)


# ---- scores alone, and two models


def test_scores_alone_give_the_report_of_the_model_without_torch(standin, tmp_path):
    path = write(tmp_path / "rows.jsonl", llmbar_rows(20))
    first = evaluate(tmp_path / "out", benchmark=[f"reward_bench={path}"])
    program = (
        "import sys, runpy; runpy.run_module('open_rm.evaluation', run_name='__main__', alter_sys=True); "
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules), 'a model was prepared for'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--scores", str(tmp_path / "out"), "--output_dir", str(tmp_path / "alone")],
        env=environment_of_a_process() | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "alone" / "report.json").read_text())
    here = {"created": 0, "command": 0}
    assert report | here == first | here


def test_another_model_is_scored_on_the_same_rows_and_compared(standin, tmp_path, monkeypatch, tokenizer):
    """The other's rewards have the opposite sign, so where the one is right, the other is wrong."""

    def opened(flags):
        sign = np.float32({"m": 1, "other": -1}[flags.model])
        return Opened(tokenizer, name=flags.model, **standin, reward=lambda ids: sign * reward_of(ids))

    monkeypatch.setattr(keeping, "open_scorer", opened)
    benchmark = [f"reward_bench={write(tmp_path / 'rows.jsonl', llmbar_rows(20))}"]
    report = evaluate(tmp_path / "out", benchmark=benchmark, against="other")
    assert [row["scores"] for row in rows_of(tmp_path / "out" / "against")] == [
        [-score for score in row["scores"]] for row in rows_of(tmp_path / "out")
    ]
    assert report["against"]["model"] == "other"
    [line, *_] = report["against"]["sets"][0]["lines"]
    assert line["own"] == report["sets"][0]["headline"]["value"]
    again = evaluate(tmp_path / "out", benchmark=benchmark, against=str(tmp_path / "out" / "against"))
    assert again["against"] == report["against"]
    alone = evaluate(
        tmp_path / "o", model=None, scores=str(tmp_path / "out"), against=str(tmp_path / "out" / "against")
    )
    assert alone["against"] == report["against"]


def test_models_that_were_not_scored_alike_are_warned_of(standin, tmp_path):
    benchmark = [f"reward_bench={write(tmp_path / 'rows.jsonl', llmbar_rows(20))}"]
    evaluate(tmp_path / "other", model="other", benchmark=benchmark)
    standin["max_token_length"] = 90
    report = evaluate(tmp_path / "out", benchmark=benchmark, against=str(tmp_path / "other"))
    [said] = [sentence for sentence in report["warnings"] if "not scored alike" in sentence]
    assert "truncation length: 90 tokens of prompt and answer and 100000 tokens" in said
    assert ["model", "other"] in report["against"]["made"]


def test_folders_compared_are_a_table_on_the_console_and_in_three_files(standin, tmp_path, capsys):
    benchmark = [f"reward_bench={write(tmp_path / 'rows.jsonl', llmbar_rows(20))}"]
    value = {
        name: evaluate(tmp_path / name, model=name, benchmark=benchmark)["sets"][0]["headline"]["value"]
        for name in "mn"
    }
    capsys.readouterr()
    evaluate(tmp_path / "table", model=None, compare=[str(tmp_path / name) for name in "mn"])
    said = capsys.readouterr().out
    assert (tmp_path / "table" / "leaderboard.md").read_text() in said
    assert all(f"| {name} |" in said and f"{100 * value[name]:.1f}" in said for name in "mn")
    assert sorted(path.name for path in (tmp_path / "table").iterdir()) == [
        f"leaderboard.{ending}" for ending in ("csv", "html", "md")
    ]


SCORED_ROWS = [
    {"subset": "llmbar-natural", "id": n, "chosen_score": float(n % 3), "rejected_score": 0.5} for n in range(30)
]


def test_the_benchmark_that_judges_scores_judges_those_of_the_other_model(tmp_path):
    """Neither file says whose rows it holds, and their ids are unique within a subset alone."""
    rows = [*SCORED_ROWS, *(row | {"subset": "llmbar-adver-manual"} for row in SCORED_ROWS[:5])]
    paths = [write(tmp_path / name / "scores.jsonl", rows) for name in ("own", "other")]
    for own, other in (paths, [path.parent for path in paths]):
        flags = {"model": None, "scores": str(own), "benchmark": ["reward_bench"], "against": str(other)}
        report = evaluate(tmp_path / "out", **flags)
        assert report["against"]["sets"][0]["same"] == 35
        assert not [said for said in report["warnings"] if "no ids" in said]


def test_a_model_is_compared_with_scores_made_elsewhere_of_the_same_benchmark(standin, tmp_path):
    rows = llmbar_rows(20)
    scored = [row | {"chosen_score": 1.0, "rejected_score": 0.0} for row in rows]
    other = write(tmp_path / "other.jsonl", scored[::-1])
    benchmark = [f"reward_bench={write(tmp_path / 'rows.jsonl', rows)}"]
    report = evaluate(tmp_path / "out", benchmark=benchmark, against=str(other))
    [found] = report["against"]["sets"]
    assert found["won"] + found["lost"] + found["same"] == 20 and found["won"] == 0


def test_scores_without_ids_are_compared_with_a_warning(tmp_path):
    rows = [{name: row[name] for name in ("chosen_score", "rejected_score")} for row in SCORED_ROWS]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name in ("own", "other")]
    report = evaluate(tmp_path / "out", model=None, scores=str(paths[0]), against=str(paths[1]))
    [said] = [said for said in report["warnings"] if "no ids" in said]
    assert said.startswith("own: the files give no ids, so row n of one is taken to be row n of the other;")


# ---- invariance


def test_rewards_that_depend_on_their_company_are_found_out(standin, tmp_path):
    """A batch size moves each reward here by a known amount, as in the complaint that scores change with it."""
    sizes = []
    standin |= {"before": lambda sequences: sizes.append(len(sequences))}
    standin["reward"] = lambda ids: np.float32(reward_of(ids) / 1000 + 0.01 * (len(sizes) % 2) * (len(ids) % 3))
    path = write(tmp_path / "rows.jsonl", llmbar_rows(20))
    report = evaluate(tmp_path / "out", benchmark=[f"reward_bench={path}"])
    found = report["invariance"]
    assert not all(check["exact"] for check in found["checks"]) and any(check["flips"] for check in found["checks"])
    assert max(check["largest"] for check in found["checks"]) == pytest.approx(0.02, rel=1e-3)
    assert "preferences change" in found["says"] and "the same" not in found["says"]


def test_invariance_is_bit_for_bit_where_nothing_differs_and_its_rows_follow_from_the_seed(
    standin, tokenizer, tmp_path
):
    paths = [write(tmp_path / f"{name}.jsonl", llmbar_rows(60, first)) for name, first in (("a", 0), ("b", 60))]
    sets = open_sets([f"reward_bench={paths[0]}"], [str(paths[1])])
    asked = []
    scorer = Opened(tokenizer, **standin, before=lambda sequences: asked.append([tuple(ids) for ids in sequences]))
    encoder = scoring.encoder_for(scorer, sets[0], "truncate")
    found = [scoring.check_invariance(sets, encoder, rows=10, seed=seed) for seed in (3, 3, 4)]
    assert [check["largest"] for check in found[0]["checks"]] == [0] * 4 and "bit for bit the same" in found[0]["says"]
    base = asked[::5]  # of each check the rewards that the others are compared with, and four kinds of company
    assert base[0] == base[1] != base[2] and len(base[0]) == 20


def test_what_the_checks_ask_for_is_computed_in_other_micro_batches_and_layouts(tiny, monkeypatch, tmp_path):
    asked = []
    compute, lay_out = computing.Computer.rewards, open_model.lay_out_sequences

    def rewards(self, batches):
        asked.append([])
        return compute(self, batches)

    def laid_out(layout, sequences, **how):
        asked[-1].append((len(sequences), layout))
        return lay_out(layout, sequences, **how)

    monkeypatch.setattr(computing.Computer, "rewards", rewards)
    monkeypatch.setattr(open_model, "lay_out_sequences", laid_out)
    rows = [row | {"prompt": f"{row['prompt']} {number}"} for number, row in enumerate(llmbar_rows(40))]
    sets = open_sets([f"reward_bench={write(tmp_path / 'rows.jsonl', rows)}"])
    with open_scorer(EvaluationArgs(model=str(tiny))) as scorer:
        encoder = scoring.encoder_for(scorer, sets[0], "truncate")
        found = scoring.check_invariance(sets, encoder, rows=40)
    base, alone, smaller, turned, padded = asked
    assert all(check["exact"] for check in found["checks"]) and len(found["checks"]) == 4
    assert {layout for batches in (base, alone, smaller, turned) for _, layout in batches} == {"shared_prefix"}
    assert {size for size, _ in alone} == {1} and len(alone) == 80
    assert len(base) < len(smaller) < len(alone) and {layout for _, layout in padded} == {"padded"}


def test_answers_in_the_other_order_are_read_anew_and_put_back(tiny, tmp_path, toy):
    """RM-Bench's six answers, lists and labelled pairs: what was swapped comes back to its own place."""
    rows = [
        {"prompt": words(i), "responses": [words(i + k, k) for k in (1, 2, 3, 4)], "scores": [1, 2, 3, 4]}
        for i in range(4)
    ]
    six = [row | {"id": i, "domain": "chat", "chosen": [words(i, k) for k in (2, 4, 6)]} for i, row in enumerate(rows)]
    six = [{k: v for k, v in row.items() if k not in ("responses", "scores")} for row in six]
    six = [row | {"rejected": [words(i + 50, k) for k in (1, 3, 5)]} for i, row in enumerate(six)]
    two = [
        {"prompt": words(i), "response_a": words(i, 3), "response_b": words(i + 9, 5), "winner": "ab"[i % 2]}
        for i in range(4)
    ]
    paths = [write(tmp_path / f"{name}.jsonl", made) for name, made in (("lists", rows), ("two", two), ("six", six))]
    sets = open_sets([f"rm_bench={paths[2]}"], [str(path) for path in paths[:2]])
    with open_scorer(EvaluationArgs(model=str(tiny))) as scorer:
        encoder = scoring.encoder_for(scorer, sets[0], "truncate")
        found = scoring.check_invariance(sets, encoder, rows=12, seed=1)
    assert found["rows"] == 12 and all(check["exact"] for check in found["checks"])
    made = [score for row in scoring.score_set(sets[0], encoder) for one in row for score in one["scores"]]
    assert np.std(made) > 0.05  # answers in wrong places would differ by far more than the tolerance


def test_a_set_is_scored_in_part_as_in_whole(standin, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", llmbar_rows(300))
    [named] = open_sets([f"reward_bench={path}"])
    encoder = scoring.encoder_for(Opened(tokenizer, **standin), named, "truncate")
    whole = [row for block in scoring.score_set(named, encoder) for row in block]
    part = [row for block in scoring.score_set(named, encoder, [0, 7, 299]) for row in block]
    assert len(whole) == 300 and part == [whole[0], whole[7], whole[299]]


# ---- where benchmarks come from


def test_a_benchmark_by_name_is_its_split_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, **how):
        asked.append((name, how["split"]))
        return datasets.Dataset.from_list(llmbar_rows(4))

    monkeypatch.setattr(readers.datasets, "load_dataset", load_dataset)
    [named] = open_sets(["reward_bench"])
    assert asked == [("allenai/reward-bench", "filtered")] and named.subsets == {
        "llmbar-natural": 2,
        "llmbar-adver-manual": 2,
    }
    open_sets(["reward_bench=somebody/copy"])
    assert asked[1] == ("somebody/copy", "filtered")


def test_a_folder_gives_the_benchmarks_split_or_else_all_its_files(tmp_path):
    folder = tmp_path / "clone"
    write(folder / "data" / "raw-00000-of-00001.jsonl", llmbar_rows(9))
    write(folder / "data" / "filtered-00000-of-00001.jsonl", llmbar_rows(4))
    (folder / ".git").mkdir()
    (folder / ".git" / "config.json").write_text("{}")
    assert open_sets([f"reward_bench={folder}"])[0].opened.size == 4
    (folder / "data" / "filtered-00000-of-00001.jsonl").unlink()
    write(folder / "inner" / "more.jsonl", llmbar_rows(5, first=20))
    assert open_sets([f"reward_bench={folder}"])[0].opened.size == 14
    saved = tmp_path / "saved"
    datasets.DatasetDict({"filtered": datasets.Dataset.from_list(llmbar_rows(6))}).save_to_disk(saved)
    assert open_sets([f"reward_bench={saved}"])[0].opened.size == 6


# ---- one sentence


def test_the_command_that_is_reported_gives_the_same_arguments_again():
    args = EvaluationArgs(model="my model", benchmark=["rm_bench=a b"], dataset=["x.jsonl"], overwrite=True, seed=7)
    words_of = command_of(args)
    assert words_of.startswith("python -m open_rm.evaluation --model 'my model' --benchmark 'rm_bench=a b'")
    assert command_line.parse(EvaluationArgs, shlex.split(words_of)[3:]) == args


MISTAKES = {
    "unknown benchmark": (
        {"benchmark": ["rewardbench"]},
        "no benchmark is called rewardbench; did you mean reward_bench?",
    ),
    "not there": (
        {"benchmark": ["rm_bench=nowhere/"]},
        "--benchmark rm_bench=nowhere/: there is no file or folder nowhere/",
    ),
    "twice": ({"benchmark": ["rm_bench", "rm_bench=rows"]}, "rm_bench stands twice"),
    "neither": ({"model": None, "benchmark": ["rm_bench"]}, "pass --model, or --scores"),
    "both": ({"scores": "rows"}, "--model and --scores: pass one"),
    "nothing": ({}, "nothing to judge: name a benchmark"),
    "output is a file": ({"benchmark": ["rm_bench=rows"], "output_dir": "rows"}, "--output_dir rows: rows is a file"),
    "against itself": ({"benchmark": ["rm_bench=rows"], "against": "m"}, "--against m is the model itself"),
    "against the output": ({"benchmark": ["rm_bench=rows"], "against": "out"}, "--against out is the model itself"),
    "no scores": ({"model": None, "scores": "nowhere.jsonl"}, "--scores nowhere.jsonl: there is no such file"),
    "model beside scores": ({"model": None, "scores": "rows", "against": "org/model"}, "no model is opened"),
    "dataset beside scores": ({"model": None, "scores": "rows", "dataset": ["rows"]}, "leave --dataset out"),
    "no data": ({"dataset": ["nowhere.jsonl"]}, "--dataset: there is no file or folder nowhere.jsonl"),
    "dtype beside scores": (
        {"model": None, "scores": "rows", "dtype": "bfloat16"},
        "--scores and --dtype: --scores opens no",
    ),
    "compare and more": ({"compare": ["rows"]}, "--compare and --model: --compare opens no model"),
    "compare nothing": ({"model": None, "compare": ["nowhere"]}, "--compare nowhere: there is no such folder or file"),
    "no column": ({"dataset": ["rows"], "column_map": ["a"]}, "--column_map a: write our column"),
    "seed": ({"benchmark": ["rm_bench=rows"], "seed": -1}, "--seed -1: must be from 0"),
}


def test_a_wrong_flag_is_answered_without_the_libraries_of_data():
    """pandas and datasets alone take a second to import."""
    program = (
        "import sys, runpy, atexit; atexit.register(lambda: print(sorted({'pandas', 'datasets', 'torch'} & set(sys.modules)))); "
        "runpy.run_module('open_rm.evaluation', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--modle", "m"],
        env=environment_of_a_process() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "unknown flag --modle; did you mean model?" in done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_opened(tmp_path, name, monkeypatch):
    flags, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows", llmbar_rows(3))
    with pytest.raises(UserError) as caught:
        command.check_args(EvaluationArgs(**{"model": "m", "output_dir": "out"} | flags))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def no_network(folder: Path) -> dict:
    return {"benchmark": ["judge_bench"]}


def empty_folder(folder: Path) -> dict:
    (folder / "empty").mkdir()
    return {"benchmark": [f"rm_bench={folder / 'empty'}"]}


def of_another(folder: Path) -> dict:
    return {"benchmark": [f"rm_bench={write(folder / 'of' / 'rows.jsonl', llmbar_rows(3))}"]}


def twice_an_id(folder: Path) -> dict:
    return {"benchmark": [f"reward_bench={write(folder / 'rows.jsonl', [*llmbar_rows(3), *llmbar_rows(1)])}"]}


def without_subset(folder: Path) -> dict:
    rows = [{k: v for k, v in row.items() if k != "subset"} for row in llmbar_rows(3)]
    return {"benchmark": [f"reward_bench={write(folder / 'rows.jsonl', rows)}"]}


def wrong_size(folder: Path) -> dict:
    rows = [row | {"domain": "chat"} for row in llmbar_rows(3)]
    return {"benchmark": [f"rm_bench={write(folder / 'rows.jsonl', rows)}"]}


def undecided(folder: Path) -> dict:
    return {"dataset": [str(write(folder / "rows.jsonl", [{"prompt": "p", "responses": ["a", "b"]}] * 3))]}


def two_labels(folder: Path, toy: Path) -> dict:
    save_tiny(toy, folder / "two", num_labels=2)
    return {"model": str(folder / "two"), "benchmark": [f"reward_bench={write(folder / 'r.jsonl', llmbar_rows(3))}"]}


def no_template(folder: Path, toy: Path) -> dict:
    save_tiny(toy, folder / "bare", template=False)
    return {"model": str(folder / "bare"), "benchmark": [f"reward_bench={write(folder / 'r.jsonl', llmbar_rows(3))}"]}


def other_has_two_labels(folder: Path, toy: Path) -> dict:
    flags = two_labels(folder, toy)
    save_tiny(toy, folder / "one")
    return flags | {"model": str(folder / "one"), "against": flags["model"]}


FOUND_BEFORE_WEIGHTS = {
    no_network: "--benchmark judge_bench: dataset ScalerLab/JudgeBench.* is named with --benchmark judge_bench=PATH",
    empty_folder: "holds no file with rows",
    of_another: "is no row of RM-Bench: no column domain, and 'rows' is no domain of RM-Bench",
    twice_an_id: "rows.jsonl:4 has the id llmbar-natural/0 of .*rows.jsonl:1",
    without_subset: "rows.jsonl:1 is no row of RewardBench: no column subset",
    wrong_size: "is no row of RM-Bench: it has 2 answers, and a row of it has 6",
    undecided: "nothing to judge: in none of the first 3 rows is one answer said to be better",
    two_labels: "two: LlamaForSequenceClassification has 2 labels, and a reward model has one",
    no_template: "bare: its tokenizer has no chat template, and RewardBench is conversations; pass --chat_template_name",
    other_has_two_labels: "--against .*two: LlamaForSequenceClassification has 2 labels",
}


@pytest.mark.parametrize("mistake", FOUND_BEFORE_WEIGHTS, ids=lambda mistake: mistake.__name__)
def test_what_data_and_small_files_show_is_one_sentence_before_weights_are_read(tmp_path, toy, monkeypatch, mistake):
    def refuse(flags):
        raise AssertionError("weights are read")

    monkeypatch.setattr(keeping, "open_scorer", refuse)
    takes = mistake.__code__.co_argcount
    flags = mistake(tmp_path) if takes == 1 else mistake(tmp_path, toy)
    with pytest.raises(UserError, match=FOUND_BEFORE_WEIGHTS[mistake]) as caught:
        evaluate(tmp_path / "out", **flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_damaged_scores_file_is_one_sentence_and_leaves_no_folder(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": 1, "subset": "a", "scores_chosen": NaN, "scores_rejected": 1}\n')
    with pytest.raises(UserError, match="scores.jsonl:1: .*NaN"):
        evaluate(tmp_path / "out", model=None, scores=str(path))
    assert not (tmp_path / "out").exists()


def test_a_hundredth_of_a_benchmark_may_be_unreadable_and_is_named(tmp_path):
    """RMB holds pairs whose rejected answer is empty."""
    rows = llmbar_rows(201)
    rows[7]["rejected"] = "  "
    [named] = open_sets([f"reward_bench={write(tmp_path / 'rows.jsonl', rows)}"])
    assert named.opened.size == 200 == len(list(named.opened.rows())) == sum(named.subsets.values())
    assert "left out, since they cannot be read: 1 (first " in named.says() and "rows.jsonl:8: " in named.says()
    assert rows[7]["id"] not in {row["id"] for _, row in named.opened.rows()}
    for row in rows[8:10]:
        row["rejected"] = ""
    with pytest.raises(UserError, match="rows.jsonl:8 is no row of RewardBench: "):
        open_sets([f"reward_bench={write(tmp_path / 'rows.jsonl', rows)}"])


# ---- rows twice, names that act, disks that are full


def six_answers(count: int, **more) -> list[dict]:
    """Rows as RM-Bench's repository has them."""
    sides = {"chosen": ["a", "b c", "d e f"], "rejected": ["g", "h i", "j k l"]}
    return [{"id": i, "prompt": words(i)} | sides | more for i in range(count)]


def copy_of_a_file(folder: Path) -> str:
    write(folder / "data" / "code copy.json", six_answers(3))
    return f"rm_bench={write(folder / 'data' / 'code.json', six_answers(3)).parent}"


def ids_of_a_domain(folder: Path) -> str:
    write(folder / "data" / "code_v2.json", six_answers(3, prompt="other"))
    return f"rm_bench={write(folder / 'data' / 'code.json', six_answers(3)).parent}"


def without_ids(folder: Path) -> str:
    rows = [{name: row[name] for name in row if name != "id"} for row in llmbar_rows(4)]
    return f"reward_bench={write(folder / 'rows.jsonl', [*rows, rows[1]])}"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (copy_of_a_file, "has the id code/0 of .*code copy.json"),
        (ids_of_a_domain, "has the id code/0 of .*code.json"),
        (without_ids, "rows.jsonl:5 has the content of .*rows.jsonl:2"),
    ],
)
def test_a_row_that_stands_twice_is_refused_whatever_its_file_is_called_and_without_ids(tmp_path, made, said):
    with pytest.raises(UserError, match=f"{said}.*; name a place that holds each row once"):
        open_sets([made(tmp_path)])


def test_what_became_of_answers_that_are_too_long_is_told_apart(standin, tmp_path):
    """A text of more than a million characters is not encoded, so it cannot be cut."""
    standin["max_token_length"] = 60
    rows = llmbar_rows(4)
    rows[1]["rejected"], rows[2]["rejected"] = "long " * 200_001, "long " * 100
    report = evaluate(tmp_path / "out", benchmark=[f"reward_bench={write(tmp_path / 'rows.jsonl', rows)}"])
    made = rows_of(tmp_path / "out")
    assert made[1]["scores"][1] is None and None not in made[2]["scores"]
    assert dict(report["made"])["over-length answers"] == (
        "3 of 8: 2 cut (the prompt's start, then an answer's end); 1 without a score (above 1,000,000 characters with the prompt)"
    )


def without_its_template(folder: Path, toy: Path) -> dict:
    save_tiny(toy, folder / "lost", template=False)
    Contract(chat=True, ending=load_tokenizer(str(folder / "lost")).eos_token).write(folder / "lost")
    return {"model": str(folder / "lost")}


def without_its_template_and_another_named(folder: Path, toy: Path) -> dict:
    return without_its_template(folder, toy) | {"chat_template_name": "tulu"}


def other_has_fewer_positions(folder: Path, toy: Path) -> dict:
    for name, positions in (("long", 2048), ("short", 128)):
        save_tiny(toy, folder / name, max_position_embeddings=positions)
    return {"model": str(folder / "long"), "against": str(folder / "short"), "max_token_length": 200}


OF_A_MODEL = {
    without_its_template: "lost: has lost its chat_template.jinja, .*; save, export or pull the model again",
    without_its_template_and_another_named: "lost: has lost its chat_template.jinja, .*; save, export or pull",
    other_has_fewer_positions: "^--against .*short: --max_token_length 200 is beyond the 128 positions of .*; pass 128 or less; "
    "both models are scored with the same limit$",
}


@pytest.mark.parametrize("mistake", OF_A_MODEL, ids=lambda mistake: mistake.__name__)
def test_what_small_files_show_of_either_model_is_told_before_any_is_scored(tmp_path, toy, monkeypatch, mistake):
    def refuse(flags):
        raise AssertionError("weights are read")

    monkeypatch.setattr(keeping, "open_scorer", refuse)
    flags = mistake(tmp_path, toy)
    with pytest.raises(UserError, match=OF_A_MODEL[mistake]):
        evaluate(tmp_path / "out", benchmark=[f"reward_bench={write(tmp_path / 'r.jsonl', llmbar_rows(3))}"], **flags)


@pytest.mark.parametrize("full", ["report.json", "report.html"])
def test_a_full_disk_leaves_the_report_that_was_there_and_nothing_half_written(tmp_path, full):
    small = sample_report() | {"sets": [], "against": None, "answers": [{"question": "?", "answer": "yes " * 500}]}
    document.write_report(small, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert 1000 < len(before["report.json"]) < len(before["report.html"]) - 1000  # in this order they are written
    own, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = small | {"model": "another"}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[full]) - 500, most))
        with pytest.raises(OSError, match="File too large"):
            document.write_report(report, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (own, most))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    document.write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["model"] == "another" and len([*tmp_path.iterdir()]) == 2


def test_scores_to_be_overwritten_stay_until_the_new_ones_are_whole(standin, tmp_path, monkeypatch):
    sets, out = open_sets([f"reward_bench={write(tmp_path / 'rows.jsonl', llmbar_rows(10))}"]), tmp_path / "out"
    keeping.keep_scores(EvaluationArgs(model="m", output_dir=str(out)), sets)
    before = {name: (out / name).read_bytes() for name in ("scores.jsonl", "scores.meta.json")}

    def stop(*_):
        assert {name: (out / name).read_bytes() for name in before} == before
        raise OSError(28, "No space left on device")

    anew = EvaluationArgs(model="n", output_dir=str(out), overwrite=True)
    standin["before"] = stop  # while it scores
    with pytest.raises(OSError, match="No space"):
        keeping.keep_scores(anew, sets)
    del standin["before"]
    with monkeypatch.context() as patched, pytest.raises(UserError, match="cannot be written .*No space"):
        patched.setattr(shutil, "copyfileobj", stop)  # while what was scored is joined
        keeping.keep_scores(anew, sets)
    assert {name: (out / name).read_bytes() for name in before} == before and not [*out.glob("*.new")]
    keeping.keep_scores(anew, sets)
    assert (out / "scores.jsonl").read_bytes() == before["scores.jsonl"]  # the stand-in's do not depend on its name
    assert json.loads((out / "scores.meta.json").read_text())["model"] == "n"


def test_names_of_others_do_nothing_to_the_terminal(tmp_path, capsys):
    hurt = "\x1b]0;x\x07\x00\u202e\n\x9b2J"
    shown = "[U+001B]]0;x[U+0007][U+0000][U+202E] [U+009B]2J"
    rows = [
        {
            "set": f"set{hurt}",
            "benchmark": None,
            "id": str(i),
            "subset": f"{'ab'[i % 2]}{hurt}",
            "scores": [1, i],
            "gold": [1, 0],
        }
        for i in range(6)
    ]
    evaluate(tmp_path / "out", model=None, scores=str(write(tmp_path / "scores.jsonl", rows)))
    said = capsys.readouterr().out
    [named] = open_sets([f"rm_bench={write(tmp_path / 'rows.json', six_answers(2, domain='chat' + hurt))}"])
    assert f"set{shown}: Accuracy" in said and f"  a{shown}: " in said and f": chat{shown} 2" in named.says()
    assert not [one for one in said + named.says() if not one.isprintable() and one != "\n"]


def test_scores_that_are_there_are_judged_again_without_reading_weights(tiny, tmp_path, monkeypatch, capsys):
    sets = open_sets([f"reward_bench={write(tmp_path / 'rows.jsonl', llmbar_rows(3))}"])
    args = EvaluationArgs(model=str(tiny), output_dir=str(tmp_path / "out"))
    keeping.keep_scores(args, sets)

    def refuse(flags):
        raise AssertionError("weights are read")

    monkeypatch.setattr(keeping, "open_scorer", refuse)
    keeping.keep_scores(args, sets)
    assert "judged again, not computed again" in capsys.readouterr().out


def test_a_limit_that_only_the_weights_show_does_not_hide_that_scores_are_there(
    standin, tokenizer, tmp_path, monkeypatch, capsys
):
    """Of RoBERTa's positions its class takes two away."""
    sets = open_sets([f"reward_bench={write(tmp_path / 'rows.jsonl', llmbar_rows(3))}"])
    args = EvaluationArgs(model="m", output_dir=str(tmp_path / "out"))
    keeping.keep_scores(args, sets)
    known = standin | {"max_token_length": 100_002}
    monkeypatch.setattr(keeping, "identify", lambda flags: Opened(tokenizer, name=flags.model, **known))
    keeping.keep_scores(args, sets)
    assert capsys.readouterr().out.count("judged again, not computed again") == 1


def test_rows_that_are_left_out_are_warned_of_once(standin, tmp_path, capsys):
    rows = llmbar_rows(201)
    rows[7]["rejected"] = "  "
    evaluate(tmp_path / "out", benchmark=[f"reward_bench={write(tmp_path / 'rows.jsonl', rows)}"])
    warned = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ") and "left out" in line
    ]
    assert len(warned) == 1 and " 1" in warned[0]
