"""How rewards are spread and what their differences mean: against torch's own optimizer, on real rewards, and at the edges."""

import json
import math

import pytest
import torch
from conftest import shared_data

from open_rm.evaluation import calibration

MODELS = ("Skywork_Skywork-Reward-Llama-3.1-8B", "internlm_internlm2-20b-reward")


def rewards_of(model: str) -> torch.Tensor:
    """[350, 2]: what a public reward model gave to JudgeBench's pairs, the better answer first."""
    rows = [json.loads(line) for line in (shared_data("judgebench_scores") / f"{model}.jsonl").read_text().splitlines()]
    sides = [("A", "B") if row["label"] == "A>B" else ("B", "A") for row in rows]
    return torch.tensor(
        [[row[f"score_{side}"] for side in pair] for row, pair in zip(rows, sides, strict=True)]
    ).double()


def loss(margins: torch.Tensor, temperature: float) -> float:
    return torch.nn.functional.softplus(-margins / temperature).mean().item()


def fitted_by_torch(margins: torch.Tensor) -> float:
    """The temperature that LBFGS finds, searching its logarithm."""
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logarithm], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-margins / logarithm.exp()).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return logarithm.exp().item()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6])
def test_the_temperature_of_real_rewards_is_the_one_that_torch_finds(model, scale):
    rewards = rewards_of(model)
    margins = rewards[:, 0] - rewards[:, 1]
    found = calibration.fit_temperature(margins * scale)
    # Where LBFGS stops the loss is flat to 1e-12, which leaves its square root of T.
    assert found == pytest.approx(fitted_by_torch(margins) * scale, rel=1e-6)
    at_best = loss(margins * scale, found)
    assert all(loss(margins * scale, found * factor) > at_best for factor in (0.99, 1.01))


def test_the_temperature_of_probabilities_that_are_known_is_found_again():
    """Margins whose sides are drawn with probability sigmoid(margin / 3): T is 3, within what chance leaves of 200,000."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(200_000, generator=generator, dtype=torch.float64) * 4
    right = torch.rand(200_000, generator=generator, dtype=torch.float64) < torch.sigmoid(size / 3)
    assert calibration.fit_temperature(torch.where(right, size, -size)) == pytest.approx(3.0, rel=0.02)


EDGES = {
    "all right": [0.5, 1.0, 2.0],
    "all right but for ties": [0.0, 1.0],
    "no more right than wrong": [1.0, -1.0],
    "mostly wrong": [0.5, -3.0],
    "all equal": [0.0, 0.0],
    "not a number": [1.0, -0.5, math.nan],
    "infinite": [1.0, -0.5, math.inf],
}


@pytest.mark.parametrize("name", EDGES)
def test_there_is_no_temperature_where_no_finite_one_above_0_fits_best(name):
    assert calibration.fit_temperature(torch.tensor(EDGES[name], dtype=torch.float64)) is None


@pytest.mark.parametrize(
    "margins", [[5.0, -1e-3], [1.0, -0.999], [1e-200, -1e-201], [1e5] * 50 + [-1.0], [1.0, 1.0, -1e-12]]
)
def test_extreme_margins_have_the_temperature_at_which_the_slope_is_0(margins):
    margins = torch.tensor(margins, dtype=torch.float64)
    beta = (1 / torch.tensor(calibration.fit_temperature(margins), dtype=torch.float64)).requires_grad_()
    terms = margins * torch.sigmoid(-beta * margins)
    # The mean slope beside the sizes of its parts: rounding alone is left.
    assert abs(terms.sum().item()) <= 1e-9 * terms.abs().sum().item()


def metrics(rewards: torch.Tensor) -> dict[str, float]:
    """As `held_out.evaluate` names them."""
    margin = {"reward_margin": (rewards[:, 0] - rewards[:, 1]).mean().item()}
    return {f"eval/rm/{name}": value for name, value in (margin | calibration.reward_statistics(rewards)).items()}


def test_the_mean_and_the_deviation_are_of_both_answers_of_all_pairs():
    rewards = rewards_of(MODELS[0])
    said = calibration.statistics_of(metrics(rewards), pairs=350)
    both = torch.cat([rewards[:, 0], rewards[:, 1]])
    assert said.mean == pytest.approx(both.mean().item(), rel=1e-12)
    assert said.std == pytest.approx(both.std().item(), rel=1e-12)  # as OpenRLHF computes it
    assert said.temperature == calibration.fit_temperature(rewards[:, 0] - rewards[:, 1])
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
