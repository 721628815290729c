"""What two public reward models scored on JudgeBench's pairs, as arrays."""

import functools
import json
from dataclasses import dataclass

import numpy as np
from conftest import shared_data

SKYWORK, INTERNLM = "Skywork_Skywork-Reward-Llama-3.1-8B", "internlm_internlm2-20b-reward"


@dataclass(frozen=True)
class Scores:
    """[350] each: score of the better answer minus that of the worse; their lengths in characters."""

    margins: np.ndarray
    better: np.ndarray
    worse: np.ndarray


@functools.cache
def scores_of(model: str) -> Scores:
    """The test that asks is skipped where there is no real data."""
    rows = [json.loads(line) for line in (shared_data("judgebench_scores") / f"{model}.jsonl").read_text().splitlines()]
    sides = [("A", "B") if row["label"] == "A>B" else ("B", "A") for row in rows]
    scores, characters = (
        np.array([[row[f"{name}_{side}"] for side in pair] for row, pair in zip(rows, sides, strict=True)])
        for name in ("score", "characters")
    )
    return Scores(scores[:, 0] - scores[:, 1], *characters.T)
