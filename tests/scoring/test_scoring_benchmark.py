"""The benchmark of scoring, in small: every contestant scores all answers, and rewards that differ end it."""

import json

import numpy as np
import pytest

from benchmarks import scoring


def smoke(tmp_path, **flags):
    args = {"smoke": True, "rounds": 2, "batch_sizes": (4, 8), "processes": (1,), "output": str(tmp_path / "out")}
    return scoring.main(scoring.ScoringArgs(**args | flags))


def test_all_contestants_score_all_answers_and_agree(tmp_path, capsys):
    found = smoke(tmp_path)
    assert list(found) == ["ours, 1 process", "transformers, batches of 4", "transformers, batches of 8"]
    assert all(
        one["largest_difference"] <= scoring.TOLERANCE["float32"] and one["lists_per_second"] > 0
        for one in found.values()
    )
    assert max(found["transformers, batches of 4"]["ratio"], found["transformers, batches of 8"]["ratio"]) == 1.0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == found
    assert "16 lists, 32 answers" in capsys.readouterr().out


def test_rewards_that_differ_are_no_result(tmp_path, monkeypatch):
    right = scoring.Loop.__call__
    monkeypatch.setattr(scoring.Loop, "__call__", lambda self, part: right(self, part) + np.float32(1e-3))
    with pytest.raises(AssertionError, match="ours, 1 process: rewards differ by 1.0e-03"):
        smoke(tmp_path)
    assert not (tmp_path / "out").exists()
