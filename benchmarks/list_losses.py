"""Ranked lists trained as pairs, as whole rankings (Plackett-Luce) and as the best of K, with the same compute.

    python -m benchmarks.list_losses --model MODEL --chat_template_name encoder --data ../shared/data/alpaca_eval/ranked.jsonl

MODEL: a decoder with a tokenizer, such as the one that `VARIANT=decoder scripts/train/minilm/reward_modeling.sh` makes. The lists
are divided into training and held-out ones for each seed; the three runs of a seed take the same lists in the same order, so that
they compute the same tokens. On the held-out lists: how many pairs that are no ties are ranked right, and how often the answer
that is scored best is one of the list's best. Intervals are of 95 %, pairs of a list counted as dependent, over all seeds' lists.
"""

import itertools
import json
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from open_rm.flags import OpeningFlags
from open_rm.measures.intervals import Estimate, of_pairs, of_rows
from open_rm.scoring.opening import open_scorer

REPOSITORY = Path(__file__).parent.parent
LOSSES = ("pairs", "plackett_luce", "best_of_k")


@dataclass(frozen=True)
class ListArgs:
    """Compare --list_loss on ranked lists."""

    model: str
    """Folder or Hub name of the model to start from."""
    data: str = "../shared/data/alpaca_eval/ranked.jsonl"
    """Rows of prompt, responses and scores."""
    output: str = "output/list_losses"
    """Folder for data and runs."""
    held_out: int = 150
    """Lists that are held out."""
    seeds: int = 3
    """Divisions of the lists, and orders of training."""
    epochs: float = 1.0
    """Passes over the training lists."""
    chat_template_name: str | None = None
    """As the recipe's: for a tokenizer that has no template."""
    flags: str = ""
    """More flags of the recipe, for all runs, in one text."""


@dataclass
class Found:
    """Of the held-out lists of all seeds. pairs: [P] right or not.  lists: [P] which list.  best: [lists] the share that the
    answer scored best is one of the best.  seconds: of each run."""

    pairs: list[float]
    lists: list[int]
    best: list[float]
    seconds: list[float]

    def estimates(self) -> tuple[Estimate, Estimate]:
        return of_pairs(np.array(self.pairs), np.array(self.lists)), of_rows(np.array(self.best))


def main(args: ListArgs) -> dict[str, Found]:
    """All runs, and the table."""
    rows = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    found = {loss: Found([], [], [], []) for loss in LOSSES}
    for seed in range(1, args.seeds + 1):
        folder = Path(args.output) / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        random.Random(seed).shuffle(rows)
        held_out, training = rows[: args.held_out], rows[args.held_out :]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training), encoding="utf-8")
        for loss in LOSSES:
            started = time.monotonic()
            output = _train(args, folder, loss, seed)
            found[loss].seconds.append(time.monotonic() - started)
            _judge(output, held_out, found[loss])
            print(f"seed {seed}, {_line(loss, found[loss])}", flush=True)
    print("\n| loss | pairs ranked right | best answer found | seconds of a run |\n| --- | --- | --- | --- |")
    for loss, one in found.items():
        pairs, best = one.estimates()
        print(f"| `{loss}` | {_shown(pairs)} | {_shown(best)} | {np.median(one.seconds):.0f} |")
    return found


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _line(loss: str, found: Found) -> str:
    pairs, best = found.estimates()
    return f"{loss}: pairs {_shown(pairs)}, best {_shown(best)}"


def _train(args: ListArgs, folder: Path, loss: str, seed: int) -> str:
    """One run of the recipe; returns its folder."""
    output = str(folder / loss)
    command = [
        *("--model_name_or_path", args.model, "--dataset_mixer_list", str(folder / "train.jsonl"), "1.0"),
        *("--list_loss", loss, "--group_by_prompt", "--num_train_epochs", str(args.epochs), "--seed", str(seed)),
        *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-4"),
        *("--max_token_length", "512", "--max_prompt_token_length", "256", "--warmup_ratio", "0.1"),
        *("--output_dir", output, "--dataset_local_cache_dir", str(folder / "cache"), *shlex.split(args.flags)),
    ]
    command += ["--chat_template_name", args.chat_template_name] if args.chat_template_name else []
    done = subprocess.run(
        [sys.executable, "-m", "open_rm.reward_modeling", *command], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: the run in {output} failed:\n{done.stderr[-2000:]}")
    return output


def _judge(model: str, held_out: list[dict], found: Found) -> None:
    """Score the held-out lists."""
    with open_scorer(OpeningFlags(model=model)) as scorer:
        answers = [(number, answer) for number, row in enumerate(held_out) for answer in row["responses"]]
        conversations = [_conversation(held_out[number]["prompt"], answer) for number, answer in answers]
        ids = [tokens[-scorer.max_token_length :] for tokens in scorer.encode_conversations(conversations)]
        rewards = scorer.rewards(ids)
    of_list = np.array([number for number, _ in answers])
    for number, row in enumerate(held_out):
        scores, own = np.array(row["scores"], float), rewards[of_list == number]
        for a, b in itertools.combinations(range(len(scores)), 2):
            if scores[a] != scores[b]:
                found.pairs.append(float((own[a] > own[b]) == (scores[a] > scores[b])))
                found.lists.append(len(found.best))
        chosen = own == own.max()
        found.best.append(float((scores[chosen] == scores.max()).mean()))


def _conversation(prompt: object, answer: object) -> list[dict]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return turns + ([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)


if __name__ == "__main__":
    main(tyro.cli(ListArgs, use_underscores=True))
