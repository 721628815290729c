"""The model that is trained is judged as the saved folder would be: the same scores, whatever the layout and the ranks."""

import json
from collections import Counter

import pytest
from conftest import launch, read_metrics, read_pairs, run_recipe, toy_flags
from huggingface_hub.utils import filter_repo_objects

from open_rm.evaluation import held_out, in_training
from open_rm.evaluation.sets import open_sets
from open_rm.publishing import pushing

SUBSETS = ("llmbar-natural", "llmbar-adver-manual", "xstest-should-respond")
TOLERANCE = 1e-5  # float32 sums in another order; the proof at the end of a run asks for 1e-4


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A file of RewardBench's form, of three subsets, some of whose answers are long."""
    path = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    rows = [
        {
            "id": i,
            "subset": SUBSETS[i % 3],
            "prompt": f"Write a cheerful note on the village and the {'meadow ' * (i % 5)}evening.",
            "chosen": "Today the village looks golden. " * (1 + i % 4),
            "rejected": "Today the village looks broken. " * (1 + (i + 1) % 3),
        }
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(toy, benchmark, tmp_path_factory):
    """The same run on one process and on two, with the benchmark's rows at each evaluation."""
    folder = tmp_path_factory.mktemp("judged")
    judged = {"benchmark": f"reward_bench={benchmark}", "benchmark_rows": 8, "benchmark_max_token_length": 40}
    found = {}
    for processes in (1, 2):
        flags = {"per_device_train_batch_size": 8 // processes, "eval_steps": 5, **judged}
        own = folder / f"of_{processes}"
        done = run_recipe(*toy_flags(toy, own, **flags), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = own, done.stdout
    return found


def scores_of(folder) -> dict:
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["set"], row["id"]): row for row in map(json.loads, lines)}


def test_the_saved_folder_is_judged_the_same(runs, benchmark, tmp_path):
    folder, _ = runs[1]
    flags = ["--model", folder, "--benchmark", f"reward_bench={benchmark}", "--max_token_length", 40]
    done = launch("-m", "open_rm.evaluation", *flags, "--output_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, again = scores_of(folder / "evaluation"), scores_of(tmp_path / "again")
    assert len(again) == 20 and any(any(row["overlength"]) for row in again.values())
    for key, row in again.items():
        assert row["scores"] == pytest.approx(ours[key]["scores"], abs=TOLERANCE)
        assert {k: v for k, v in row.items() if k != "scores"} == {k: v for k, v in ours[key].items() if k != "scores"}


def test_two_processes_judge_as_one(runs):
    one, two = (scores_of(runs[processes][0] / "evaluation") for processes in (1, 2))
    assert list(one) == list(two) and len(one) == 20 + 60
    for key, row in one.items():  # the weights differ in their last digits after ten steps
        assert two[key]["scores"] == pytest.approx(row["scores"], abs=2e-4)


def test_evaluations_judge_the_same_rows_and_are_in_the_record(runs):
    rows = [row for row in read_metrics(runs[1][0]) if "eval/rm/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 5, 10]
    for row in rows:
        assert {"eval/reward_bench/overall", "eval/reward_bench/chat_hard", "eval/reward_bench/safety"} <= row.keys()
        assert {"eval/rm/ece", "eval/rm/length_accuracy"} <= row.keys()
    assert "evaluation at step 5, reward_bench: overall" in runs[1][1]


def test_the_report_counts_held_out_pairs_as_the_last_evaluation_does(runs):
    folder, _ = runs[1]
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    held, judged = report["sets"]
    last = [row for row in read_metrics(folder) if "eval/rm/accuracy" in row][-1]
    assert held["headline"]["value"] == pytest.approx(last["eval/rm/accuracy"])
    assert held["calibration"]["ece"] == pytest.approx(last["eval/rm/ece"])
    assert held["length"]["unit"] == "tokens"
    assert judged["benchmark"] == "reward_bench" and judged["rows"] == 20 and judged["overlength"] > 0
    assert report["invariance"]["rows"] == 20 and all(check["exact"] for check in report["invariance"]["checks"])


def test_the_card_has_answers_warnings_table_and_diagram(runs):
    folder, said = runs[1]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("**How good is it?**", "**Can I believe it?**", "**Where does it fail?**", "> **Warning:**"):
        assert part in card
    assert "| held-out pairs | " in card and "(reliability.png)" in card and "at most 40" not in card
    assert "40 tokens" in card  # the truncation length stands beside the numbers
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "How good is it?" in said and "warning: " in said


def test_a_row_that_cannot_be_scored_ends_the_run_before_its_first_step(toy, benchmark, tmp_path):
    broken = tmp_path / "rows.jsonl"
    row = json.loads(benchmark.read_text(encoding="utf-8").splitlines()[0])
    broken.write_text(json.dumps(row | {"chosen": "half \ud800 a pair"}) + "\n", encoding="utf-8")
    done = run_recipe(*toy_flags(toy, tmp_path / "run", benchmark=f"reward_bench={broken}"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{broken}:1" in done.stderr and "step 1/" not in done.stdout


def test_a_judgement_or_a_report_that_fails_costs_no_model(toy, tokenizer, tmp_path, monkeypatch):
    """Both come after the model is saved; the log says what became of them, and the run goes on to its proof."""
    said = []
    judge = in_training.Judge(None, [], None, str(tmp_path), seed=1)
    monkeypatch.setattr(judge, "_reported", lambda found: 1 / 0)
    assert judge.report(in_training.Scored(None, [], None, {}), say=said.append) is None
    assert judge.report(None, say=said.append) is None
    assert len(said) == 1 and "ZeroDivisionError" in said[0]


NOT_A_NUMBER = """
import sys
from open_rm.evaluation import held_out, in_training
from open_rm.reward_modeling import Args, main

def refuse(*_, **__):
    raise in_training.UserError("a reward is no finite number")

in_training.score_set = refuse
toy, folder, rows = sys.argv[1:]
main(Args(model_name_or_path=f"{toy}/model", dataset_mixer_list=[f"{toy}/data", "1.0"], total_episodes=8, num_sample_pairs=0,
          dataset_local_cache_dir=f"{folder}/cache", output_dir=f"{folder}/run", benchmark=[f"reward_bench={rows}"]))
"""


def test_a_run_whose_model_cannot_be_judged_ends_with_its_model_proven(toy, benchmark, tmp_path):
    done = launch("-c", NOT_A_NUMBER, toy, tmp_path, benchmark)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the model could not be judged: a reward is no finite number" in done.stdout
    assert "reload check" in done.stdout and "How far it can be trusted" not in (tmp_path / "run/README.md").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


def test_evaluations_take_as_many_rows_of_each_subset_and_the_same_ones(benchmark, tmp_path):
    [named] = open_sets([f"reward_bench={benchmark}"])
    judge = in_training.Judge(None, [named], None, str(tmp_path), seed=3, rows=7)
    drawn = judge._drawn(named)
    counts = Counter(SUBSETS[number % 3] for number in drawn)
    assert drawn == sorted(set(drawn)) and len(drawn) == 7 and set(counts.values()) == {2, 3}
    again = in_training.Judge(None, [named], None, str(tmp_path), seed=3, rows=7)
    assert again._drawn(named) == drawn


def test_texts_of_reports_are_never_pushed():
    paths = ["evaluation/report.json", "judged/report.json", "report.json", "scores.meta.json", "config.json"]
    paths += ["model.safetensors", "reliability.png", "README.md", "evaluation/scores.jsonl", "evaluation/report.html"]
    kept = filter_repo_objects(paths, allow_patterns=pushing.PUSHED, ignore_patterns=pushing.NOT_PUSHED)
    assert set(kept) == {"config.json", "model.safetensors", "reliability.png", "README.md"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--benchmark", "reward_bnech"], "reward_bench"),
        (["--benchmark", "rm_bench=/nowhere"], "/nowhere"),
        (["--benchmark_rows", "8"], "--benchmark_rows"),
        (["--benchmark_max_token_length", "8"], "--benchmark_max_token_length"),
        (["--benchmark", "rm_bench", "--cache_dataset_only"], "--cache_dataset_only"),
    ],
)
def test_flags_that_cannot_work_are_told_before_anything_is_loaded(toy, tmp_path, flags, sentence):
    done = run_recipe(*toy_flags(toy, tmp_path / "run"), *flags)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_held_out_rewards_are_computed_again_where_the_last_evaluation_was_of_other_weights(
    toy, tokenizer, tmp_path, monkeypatch
):
    import torch

    pairs = read_pairs([toy / "data", "1.0"], tokenizer, splits=["test"], dataset_local_cache_dir=str(tmp_path))
    fresh = torch.rand(len(pairs), 2, dtype=torch.float64)
    monkeypatch.setattr(held_out, "score_pairs", lambda *_: fresh)

    class Known:
        tokenizer = None
        rules = None

        class ranks:
            is_main = True

    Known.tokenizer = tokenizer
    judge = in_training.Judge(Known, [], pairs, str(tmp_path), seed=1)
    judge._latest = 5, torch.zeros(len(pairs), 2)
    kept, anew = (judge._held_out_rewards(None, step) for step in (5, 4))
    assert not kept.any() and torch.equal(anew, fresh)
    rows = list(judge._held_out_rows(anew))
    assert [row["scores"] for row in rows] == fresh.tolist()
    assert rows[0]["prompt"] and all(row["answers"][0] != row["answers"][1] for row in rows)
    monkeypatch.setattr(in_training, "WITH_TEXTS", 0)
    assert all("prompt" not in row and row["tokens"] for row in judge._held_out_rows(fresh))
