"""Scoring throughput: ours and a padded, length-sorted loop over plain transformers, side by side on ranked lists.

    python -m benchmarks.scoring            # 600 lists of alpaca_eval, 6 layers x 384, float32
    python -m benchmarks.scoring --shape 1B --dtype bfloat16 --processes 1 --batch_sizes 16 64 256      # on a GPU

Both have the same weights and dtype, the same token ids, and all cores. The loop sorts all answers by length and pads a batch
to its longest; it is timed at several batch sizes, and the best of them counts. Every round runs each contestant once, in
turn, and ratios are taken within a round, so a machine whose speed drifts slows all alike. A round is a part of the work: of
ours every so many lists, of the loop every so many of its batches, which are made of all lists. All rounds together are all of it.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from benchmarks import workloads
from benchmarks.card import name as machine
from open_rm.errors import UserError
from open_rm.flags import OpeningFlags
from open_rm.scoring.opening import open_scorer
from open_rm.scoring.scorer import Scorer

# Sums in another order, over 6 layers and a thousand tokens; in bfloat16 over 16 layers, at rewards of order one.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class ScoringArgs:
    """Measure scoring throughput against plain transformers."""

    data: str = "../shared/data/alpaca_eval/ranked.jsonl"
    """Ranked lists: rows of `prompt` (messages) and `responses`."""
    lists: int = 600
    """Lists that are scored."""
    rounds: int = 5
    """Parts that the work is cut into; each contestant does each part once."""
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Of the loop over transformers."""
    processes: tuple[int, ...] = (1, 2)
    """Of ours: one process with all cores, or several that share them."""
    shape: str = "6x384"
    """Of workloads.SHAPES."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which all compute."""
    output: str = "output/benchmark_scoring"
    """Folder for results.json."""
    smoke: bool = False
    """A few made-up lists and a tiny model, in seconds. No measurement."""


@dataclass
class Contestant:
    """name; what it does in a round, sequences -> rewards in their place; seconds, and tokens done, of each round."""

    name: str
    parts: list[list[int]]
    compute: Callable[[list[int]], np.ndarray]
    rewards: np.ndarray
    seconds: list[float]
    tokens: list[int]

    def run(self, number: int, lengths: np.ndarray) -> None:
        part = self.parts[number]
        started = time.perf_counter()
        self.rewards[part] = self.compute(part)
        self.seconds.append(time.perf_counter() - started)
        self.tokens.append(int(lengths[part].sum()))

    def rates(self) -> np.ndarray:
        """[rounds] tokens a second."""
        return np.array(self.tokens) / np.array(self.seconds)


def read_lists(args: ScoringArgs) -> list[dict]:
    """Rows of a prompt and its responses."""
    if args.smoke:
        made = workloads.many_answers(48, seed=1).rows
        return [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "responses": [row["chosen"], row["rejected"]]}
            for row in made[::3]
        ]
    if not Path(args.data).is_file():
        raise UserError(f"--data {args.data}: there is no such file; pass rows of prompt and responses, or --smoke")
    with Path(args.data).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][: args.lists]


def write_reward_model(folder: Path, rows: list[dict], shape: str) -> None:
    """A Llama of the shape with random weights and a score head, and a tokenizer that is trained on the rows."""
    texts = [{"prompt": row["prompt"], **dict(enumerate(row["responses"]))} for row in rows]
    tokenizer = workloads.make_tokenizer([workloads.Workload("ranked", texts, True)])
    config = workloads.config_of(workloads.SHAPES[shape], tokenizer)
    config.num_labels = 1
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForSequenceClassification(config).to(config.dtype)
    torch.nn.init.normal_(model.score.weight, std=1 / (config.hidden_size + 1) ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Loop:
    """The loop over plain transformers, at one batch size."""

    def __init__(self, folder: Path, ids: list[list[int]], batch_size: int, dtype: str):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
        self.ids, self.batch_size = [torch.tensor(one) for one in ids], batch_size

    def parts(self, rounds: int) -> list[list[int]]:
        """The batches of all sequences, longest first, dealt to the rounds in turn."""
        order = sorted(range(len(self.ids)), key=lambda i: -len(self.ids[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [[i for batch in batches[number::rounds] for i in batch] for number in range(rounds)]

    @torch.inference_mode()
    def __call__(self, part: list[int]) -> np.ndarray:
        found = []
        for start in range(0, len(part), self.batch_size):
            rows = [self.ids[i] for i in part[start : start + self.batch_size]]
            pad = self.model.config.pad_token_id
            batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            mask = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            inputs = {"input_ids": batch.to(DEVICE), "attention_mask": mask.long().to(DEVICE)}
            found.append(self.model(**inputs).logits.squeeze(-1).float())
        return torch.cat(found).cpu().numpy()


def contestants(
    args: ScoringArgs, folder: Path, rows: list[dict], scorers: list[Scorer]
) -> tuple[list[Contestant], np.ndarray]:
    """Ours and the loops, with what each does in a round; and the tokens of each answer."""
    conversations = [
        [*row["prompt"], {"role": "assistant", "content": one}] for row in rows for one in row["responses"]
    ]
    ids = scorers[0].encode_conversations(conversations)
    list_of = [number for number, row in enumerate(rows) for _ in row["responses"]]
    own_parts = [[i for i, number in enumerate(list_of) if number % args.rounds == part] for part in range(args.rounds)]
    found = []
    for scorer, processes in zip(scorers, args.processes, strict=True):

        def ours(part: list[int], scorer=scorer) -> np.ndarray:
            return scorer.rewards([ids[i] for i in part], [list_of[i] for i in part])

        found.append((f"ours, {processes} process{'es' * (processes > 1)}", own_parts, ours))
    for size in args.batch_sizes:
        loop = Loop(folder, ids, size, args.dtype)
        found.append((f"transformers, batches of {size}", loop.parts(args.rounds), loop))
    return [Contestant(*one, np.zeros(len(ids), np.float32), [], []) for one in found], np.array(list(map(len, ids)))


def main(args: ScoringArgs) -> dict:
    """Prints a line for each contestant, and writes results.json."""
    transformers.utils.logging.disable_progress_bar()
    rows = read_lists(args)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        write_reward_model(folder, rows, "tiny" if args.smoke else args.shape)
        scorers = [
            stack.enter_context(open_scorer(OpeningFlags(model=str(folder), dtype=args.dtype, num_processes=processes)))
            for processes in args.processes
        ]
        taking_part, lengths = contestants(args, folder, rows, scorers)
        for one in taking_part:
            one.compute(one.parts[0][-4:])  # first calls allocate
        for number in range(args.rounds):
            for one in taking_part[number % 2 :] + taking_part[: number % 2]:
                one.run(number, lengths)
                print(f"round {number + 1}: {one.name}: {one.rates()[-1]:,.0f} tokens/s", flush=True)
    return report(args, taking_part, rows, lengths)


def report(args: ScoringArgs, taking_part: list[Contestant], rows: list[dict], lengths: np.ndarray) -> dict:
    best = max(taking_part[len(args.processes) :], key=lambda one: sum(one.tokens) / sum(one.seconds))
    print(
        f"\n{machine()}, {torch.get_num_threads()} threads; {len(rows)} lists, {len(lengths)} answers, {lengths.sum():,} tokens"
    )
    found = {}
    for one in taking_part:
        per_second = sum(one.tokens) / sum(one.seconds) * len(rows) / lengths.sum()
        ratios = one.rates() / best.rates()
        difference = float(np.abs(one.rewards - best.rewards).max())
        found[one.name] = {
            "lists_per_second": float(per_second),
            "ratio": statistics.median(ratios),
            "ratios": ratios.tolist(),
            "largest_difference": difference,
        }
        print(
            f"{one.name}: {per_second:.2f} lists/s, {statistics.median(ratios):.2f} times the best loop "
            f"({ratios.min():.2f} to {ratios.max():.2f}), rewards within {difference:.1e}"
        )
        if not difference <= TOLERANCE[args.dtype]:
            raise AssertionError(f"{one.name}: rewards differ by {difference:.1e}, more than {TOLERANCE[args.dtype]}")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "results.json").write_text(
        json.dumps({"machine": machine(), "results": found}, indent=2) + "\n"
    )
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(ScoringArgs, use_underscores=True, prog="python -m benchmarks.scoring"))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
