"""What judging costs, no model involved: scores of many pairs to a report.

    python -m benchmarks.judging                  # 10,000 and 50,000 pairs

Scores are drawn (a model that is right in about three of four pairs, in 20 subsets), with texts of 1 KB an answer, as
`python -m open_rm.evaluation --model` writes them. Each row is one run of `python -m open_rm.evaluation --scores` in a process of its
own, imports, pictures and the page included: seconds until it ended, its largest resident memory, the size of the scores file. Memory
that grows by less than the file shows that texts are not held.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from open_rm.evaluation.score_file import SCORES, row_of
from open_rm.scoring.lines import Lines

SUBSETS = 20
WORDS = np.array(["reward", "model", "answer", "prefers", "the", "longer", "right", "wrong", "margin", "of", "a"])


@dataclass(frozen=True)
class JudgingArgs:
    """Time and memory of judging scores that are there already."""

    pairs: tuple[int, ...] = (10_000, 50_000)
    """How many pairs to judge, one after another."""
    characters: int = 1_000
    """Of an answer."""


def write_scores(path: Path, pairs: int, characters: int) -> None:
    """A scores file of so many pairs."""
    random = np.random.default_rng(1)
    margins = random.normal(1.0, 1.5, pairs)
    lines = Lines()
    with path.open("wb") as file:
        for i, margin in enumerate(margins):
            texts = [" ".join(random.choice(WORDS, characters // 6)) for _ in range(2)]
            row = row_of(
                set="drawn",
                benchmark=None,
                id=str(i),
                subset=f"subset {i % SUBSETS}",
                scores=[float(margin), 0.0],
                gold=[1.0, 0.0],
                characters=[len(text) for text in texts],
                overlength=[False, False],
                prompt="Which answer is better?",
                answers=texts,
            )
            file.write(lines.of([row]))


def judged(path: Path, output: Path) -> tuple[float, float]:
    """(seconds, MB of resident memory at most) of one run of the command."""
    command = [sys.executable, "-m", "open_rm.evaluation", "--scores", str(path), "--output_dir", str(output)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"error: {' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1000


def main(args: JudgingArgs) -> list[tuple[int, float, float]]:
    """Print the table; returns (pairs, seconds, MB) of each row."""
    found = []
    print("pairs      scores, MB  seconds  pairs/s  memory, MB")
    with tempfile.TemporaryDirectory() as folder:
        for pairs in args.pairs:
            path = Path(folder) / SCORES
            write_scores(path, pairs, args.characters)
            seconds, memory = judged(path, Path(folder) / "report")
            size = path.stat().st_size / 1e6
            print(f"{pairs:<10,} {size:<11.1f} {seconds:<8.1f} {pairs / seconds:<8,.0f} {memory:.0f}", flush=True)
            found.append((pairs, seconds, memory))
    return found


if __name__ == "__main__":
    main(tyro.cli(JudgingArgs, use_underscores=True, prog="python -m benchmarks.judging"))
