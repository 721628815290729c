"""What a saved folder says of its rewards: on real ones, and where there is nothing to say."""

import json
import math

import pytest
import torch
from conftest import shared_data

from open_rm.evaluation import calibration
from open_rm.measures.calibration import fit_temperature

MODEL = "Skywork_Skywork-Reward-Llama-3.1-8B"


def rewards_of(model: str) -> torch.Tensor:
    """[350, 2]: what a public reward model gave to JudgeBench's pairs, the better answer first."""
    rows = [json.loads(line) for line in (shared_data("judgebench_scores") / f"{model}.jsonl").read_text().splitlines()]
    sides = [("A", "B") if row["label"] == "A>B" else ("B", "A") for row in rows]
    return torch.tensor(
        [[row[f"score_{side}"] for side in pair] for row, pair in zip(rows, sides, strict=True)]
    ).double()


def metrics(rewards: torch.Tensor) -> dict[str, float]:
    """As `held_out.evaluate` names them."""
    margin = {"reward_margin": (rewards[:, 0] - rewards[:, 1]).mean().item()}
    return {f"eval/rm/{name}": value for name, value in (margin | calibration.reward_statistics(rewards)).items()}


def test_the_mean_and_the_deviation_are_of_both_answers_of_all_pairs():
    rewards = rewards_of(MODEL)
    said = calibration.statistics_of(metrics(rewards), pairs=350)
    both = torch.cat([rewards[:, 0], rewards[:, 1]])
    assert said.mean == pytest.approx(both.mean().item(), rel=1e-12)
    assert said.std == pytest.approx(both.std().item(), rel=1e-12)  # as OpenRLHF computes it
    assert said.temperature == fit_temperature((rewards[:, 0] - rewards[:, 1]).numpy())
    assert (said.pairs, said.no_temperature) == (350, None)
    assert "350 held-out pairs" in calibration.describe(said)


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [([[3.0, 1.0], [2.0, 1.5]], "nearly every pair is ranked right"), ([[1.0, 3.0], [2.0, 1.5]], "no higher rewards")],
)
def test_why_there_is_no_temperature_is_said(rewards, reason):
    said = calibration.statistics_of(metrics(torch.tensor(rewards, dtype=torch.float64)), pairs=2)
    assert said.temperature is None and reason in said.no_temperature
    assert reason in calibration.describe(said)


@pytest.mark.parametrize("values", [None, [[2.0, 2.0]], [[math.nan, 1.0]], [[math.inf, 1.0]]], ids=str)
def test_nothing_is_said_where_nothing_was_scored_or_nothing_can_be_divided_by(values):
    found = metrics(torch.tensor(values, dtype=torch.float64)) if values else {"train/rm/loss": 1.0}
    said = calibration.statistics_of(found, pairs=1)
    assert said is None and "no mean" in calibration.describe(said)
