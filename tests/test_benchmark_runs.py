"""Benchmarks that train, to their end in small: all they print and write, and that they compare what they say they compare."""

import json
import random
from types import SimpleNamespace

import pytest

from benchmarks import annotator_noise, headers, list_losses
from open_rm import command_line
from open_rm.flags import Args
from open_rm.reward_modeling import main as recipe


def test_headers_are_measured_beside_the_same_pairs_without_sharing_them(tmp_path, capsys):
    """Ours alone: TRL beside ours is in test_benchmarks.py."""
    ours = (headers.OURS, headers.SWITCHED_OFF)
    args = headers.HeaderArgs(smoke=True, contestants=ours, only=("conversations",), tokens=200, output=str(tmp_path))
    result, without = headers.main(args)
    assert json.loads((tmp_path / "results.json").read_text())["results"] == [result, without]
    assert (tmp_path / "headers.png").stat().st_size > 5_000
    assert result["title"] == "conversations, behind 200 tokens"
    [found] = result["rounds"]
    assert set(found) == set(ours) and not [row for row in found.values() if "error" in row], found
    shared, not_shared = found.values()
    assert shared["loss"] == pytest.approx(not_shared["loss"], abs=1e-5)  # the same pairs, steps and weights
    assert 0 < shared["distinct"] < 0.6 * not_shared["distinct"] < 0.6
    assert without["title"] == "conversations, without a header"
    [[one, other]] = (list(times.values()) for times in without["rounds"])
    assert one["distinct"] == other["distinct"] > 0.5, "nothing was shared that could be"
    printed = capsys.readouterr().out
    for name in ours:
        assert f"| {name} | {found[name]['pairs_per_second']:.2f}" in printed
        assert f"{found[name]['distinct']:.3f} of all" in printed


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of the recipe that a benchmark starts are made here, which saves their imports; gives their flags."""
    runs = []

    def run(command, **_):
        assert command[1:3] == ["-m", "open_rm.reward_modeling"]
        runs.append(command_line.parse(Args, command[3:]))
        recipe(runs[-1])
        return SimpleNamespace(returncode=0)

    for benchmark in (annotator_noise, list_losses):
        monkeypatch.setattr(benchmark.subprocess, "run", run)
    return runs


def test_votes_and_majorities_are_trained_from_the_same_pairs_and_judged_on_pairs_without_noise(
    tmp_path, capsys, in_this_process
):
    args = annotator_noise.NoiseArgs(str(tmp_path), train_pairs=48, test_pairs=10, seeds=1, error=0.3)
    found = annotator_noise.main(args)
    assert json.loads((tmp_path / "found.json").read_text()) == {"error": 0.3} | found
    assert {kind: [0 < rate < 1 for rate in rates] for kind, rates in found.items()} == {
        "votes": [True],
        "majority": [True],
    }
    votes, majority = (vars(run) for run in in_this_process)
    own = ("dataset_mixer_list", "output_dir")
    assert {name for name in votes if votes[name] != majority[name]} == set(own)
    read = {
        kind: [json.loads(line) for line in (tmp_path / "seed_1" / f"{kind}.jsonl").read_text().splitlines()]
        for kind in found
    }
    assert len(read["votes"]) == 48
    for voted, ruled in zip(*read.values(), strict=True):
        against = voted["n_rejected"]
        assert voted["n_chosen"] + against == 5
        assert (ruled["chosen"] == voted["rejected"]) is (against > 2) and "n_chosen" not in ruled
    assert any(row["n_rejected"] > 2 for row in read["votes"])
    printed = capsys.readouterr().out
    assert f"votes: annotators are wrong {found['votes'][0]:.3f} of the time" in printed


def test_losses_of_lists_are_compared_on_the_same_lists(toy, tmp_path, capsys, in_this_process):
    """Lists of three answers with a tie here and there; the held-out ones are in no training data."""
    lines = (toy / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["chosen"][0]["content"] for line in lines]
    rng = random.Random(1)
    rows = [
        {"prompt": f"Say {i}.", "responses": texts[3 * i : 3 * i + 3], "scores": rng.choices((1, 2, 3, 5), k=3)}
        for i in range(14)
    ]
    rows = [row for row in rows if len(set(row["scores"])) > 1]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--as_messages --gradient_accumulation_steps 1 --max_token_length 256"
    args = list_losses.ListArgs(
        str(toy / "model"), str(tmp_path / "ranked.jsonl"), str(tmp_path / "out"), held_out=5, seeds=1, flags=flags
    )
    found = list_losses.main(args)
    assert [run.list_loss for run in in_this_process] == list(found) == list(list_losses.LOSSES)
    trained = (tmp_path / "out" / "seed_1" / "train.jsonl").read_text().splitlines()
    held_out = [row for row in rows if json.dumps(row) not in trained]
    assert len(held_out) == 5 and len(trained) == len(rows) - 5
    differing = sum(a != b for row in held_out for i, a in enumerate(row["scores"]) for b in row["scores"][i + 1 :])
    for one in found.values():
        assert len(one.pairs) == len(one.lists) == differing and len(one.best) == 5 and len(one.seconds) == 1
        assert set(one.pairs) <= {0.0, 1.0} and set(one.lists) == set(range(5))
        assert all(0 <= share <= 1 for share in one.best)
    printed = capsys.readouterr().out
    assert all(f"| `{loss}` | " in printed for loss in list_losses.LOSSES)
