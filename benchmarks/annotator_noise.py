"""Votes as soft labels against their majority as hard ones: which model knows how often annotators are wrong?

    python -m benchmarks.annotator_noise --output output/annotator_noise      # about a minute a run on 2 cores

The toy's pairs have a right answer. Of each, several annotators vote, and each of them is wrong with a known probability. One
model is trained on the votes (columns n_chosen and n_rejected), one on the majority, both with the same flags and from the same
weights. On held-out pairs the model's own probability that the worse answer is preferred, sigmoid(r_worse - r_better), should be
that of an annotator to be wrong. Prints it for each seed and kind, and the median of its error.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tyro

from open_rm import toy
from open_rm.flags import OpeningFlags
from open_rm.scoring.opening import open_scorer

REPOSITORY = Path(__file__).parent.parent
KINDS = ("votes", "majority")


@dataclass(frozen=True)
class NoiseArgs:
    """Train on votes and on majorities of annotators whose error is known."""

    output: str = "output/annotator_noise"
    """Folder for data and runs."""
    error: float = 0.2
    """Probability that an annotator votes for the worse answer."""
    annotators: int = 5
    """Votes of a pair."""
    train_pairs: int = 6000
    """Training pairs."""
    test_pairs: int = 500
    """Held-out pairs."""
    seeds: int = 3
    """Data sets and models."""


def main(args: NoiseArgs) -> dict[str, list[float]]:
    """All runs; returns the rates that the models found, by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(1, args.seeds + 1):
        folder = Path(args.output) / f"seed_{seed}"
        test = _make(args, folder, seed)
        for kind in KINDS:
            found[kind].append(_rate(_train(folder, kind, seed), test))
            print(f"seed {seed}, {kind}: {found[kind][-1]:.3f} (annotators: {args.error:.3f})", flush=True)
    for kind, rates in found.items():
        error = statistics.median(abs(rate - args.error) for rate in rates)
        print(f"{kind}: annotators are wrong {statistics.median(rates):.3f} of the time, off by {error:.3f} (medians)")
    (Path(args.output) / "found.json").write_text(json.dumps({"error": args.error} | found, indent=2) + "\n")
    return found


def votes(rows: list[dict], args: NoiseArgs, seed: int) -> dict[str, list[dict]]:
    """The same pairs with votes, and as the majority has them."""
    wrong = np.random.default_rng(seed).binomial(args.annotators, args.error, len(rows)).tolist()
    kinds: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for row, against in zip(rows, wrong, strict=True):
        kinds["votes"].append(row | {"n_chosen": args.annotators - against, "n_rejected": against})
        swapped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        kinds["majority"].append(swapped if 2 * against > args.annotators else row)
    return kinds


def _make(args: NoiseArgs, folder: Path, seed: int) -> list[dict]:
    """Model and data; returns the held-out pairs."""
    with patch.object(toy, "WRONG_LABEL_SHARE", 0.0):
        toy.main(toy.ToyArgs(str(folder / "toy"), args.train_pairs, args.test_pairs, seed))
    rows = {split: _read(folder / "toy" / "data" / f"{split}.jsonl") for split in ("train", "test")}
    for kind, labelled in votes(rows["train"], args, seed).items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return rows["test"]


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _train(folder: Path, kind: str, seed: int) -> str:
    """One run of the recipe; returns its folder."""
    output = str(folder / kind)
    flags = {
        "model_name_or_path": folder / "toy" / "model", "dataset_mixer_list": [folder / f"{kind}.jsonl", "1.0"],
        "max_token_length": 1024, "max_prompt_token_length": 1024, "learning_rate": 5e-4, "warmup_ratio": 0.05,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "seed": seed, "output_dir": output,
        "dataset_local_cache_dir": folder / "cache", "resume_from_checkpoint": "auto",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", *_words(value))]
    done = subprocess.run(
        [sys.executable, "-m", "open_rm.reward_modeling", *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: the run in {output} failed:\n{done.stderr[-2000:]}")
    return output


def _words(value) -> list[str]:
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


def _rate(model: str, test: list[dict]) -> float:
    """How often, by the model, the worse answer of a pair is preferred."""
    with open_scorer(OpeningFlags(model=model)) as scorer:
        sides = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in test]
        better, worse = np.split(np.array(scorer.rewards(scorer.encode_conversations(sides))), 2)
    return float((1 / (1 + np.exp(better - worse))).mean())


if __name__ == "__main__":
    main(tyro.cli(NoiseArgs, use_underscores=True))
