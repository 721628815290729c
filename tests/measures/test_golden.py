"""Numbers of two public reward models on JudgeBench that were computed by others' code, to the digits that are printed."""

import numpy as np
import pytest
from real_scores import INTERNLM, SKYWORK, scores_of

from open_rm.measures import calibration, lengths

GOLDEN = {  # accuracy, ties, Bradley-Terry loss, ECE, Brier, T, loss at T
    SKYWORK: ("0.6229", 1, "2.4082", "0.3244", "0.3322", "14.221", "0.6303"),
    INTERNLM: ("0.6343", 0, "0.6138", "0.0534", "0.2149", "1.028", None),
}


@pytest.mark.parametrize("model", GOLDEN)
def test_accuracy_and_calibration_are_the_published_ones(model):
    d = scores_of(model).margins
    temperature = calibration.fit_temperature(d)
    found = (
        f"{np.mean(d > 0):.4f}",
        np.sum(d == 0),
        f"{calibration.loss(d):.4f}",
        f"{calibration.ece(d):.4f}",
        f"{calibration.brier(d):.4f}",
        f"{temperature:.3f}",
        f"{calibration.loss(d, temperature):.4f}",
    )
    assert all(expected in (None, value) for value, expected in zip(found, GOLDEN[model], strict=True)), found


def test_accuracy_by_length_is_the_published_one():
    scores = scores_of(SKYWORK)
    found = lengths.explained(scores.margins, scores.better, scores.worse, np.arange(350))
    said = {name: (f"{found[name]['value']:.4f}", found[name]["n"]) for name in ("longer", "shorter")}
    assert said == {"longer": ("0.5528", 161), "shorter": ("0.6825", 189)}
    assert found["equal"] is None
    # The published baseline is the rule that the longer answer is better; the other rule is the better one here.
    assert f"{lengths.prefer_longer(scores.better, scores.worse).mean():.4f}" == "0.4600"
    assert found["baseline"]["rule"] == lengths.SHORTER and f"{found['baseline']['value']:.4f}" == "0.5400"
