"""What planning a step costs: dealing its pairs to the ranks and cutting the shares, on real lengths.

    python -m benchmarks.planning                        # as it is
    python -m benchmarks.planning --against 6d45256      # and as it was in a commit of this repository

Every rank plans every step, in a thread beside training that holds Python's lock meanwhile. Both planners take the same
steps in one process, in turn, the first of a pair being once the one and once the other; ratios are taken within a step.
Prints medians with their range, how many steps both deal alike to the last micro-batch, and how even the deals are: the cost of
the most loaded rank over the mean, of the median and of the worst step, and what no deal is below: the cost of the longest pair
alone over the mean of the ranks.
"""

import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import tyro

from benchmarks import workloads
from benchmarks.preparation import spread
from open_rm.batching import dealing
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.data.pairs import PairTable
from open_rm.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parent.parent
Planner = Callable[[np.ndarray, BatchRules, int], object]  # pairs of a step, rules, ranks


@dataclass(frozen=True)
class PlanningArgs:
    """Measure what planning a step costs."""

    against: str | None = None
    """Commit whose planner runs beside that of the working tree."""
    data: str = "../shared/data"
    """Folder that holds hh_harmless/ and alpaca_eval/ with train.jsonl; what is not there is left out."""
    pairs: int = 256
    """Pairs of a step."""
    ranks: tuple[int, ...] = (8, 64)
    """Numbers of ranks."""
    max_tokens: tuple[int, ...] = (8192, 16384)
    """Most positions of a micro-batch."""
    steps: int = 15
    """Steps planned of each kind."""


def main(args: PlanningArgs) -> None:
    """Plan and print, a line for each set, layout, number of ranks and size of a micro-batch."""
    before = None if args.against is None else planner_module(args.against)
    print(f"planning {args.pairs} pairs a step, ms: median (range) of {args.steps} steps", flush=True)
    for name, table in real_tables(Path(args.data)):
        planners: list[Planner] = [] if before is None else [planner_of(before, table)]
        planners.append(planner_of(dealing, table))
        for layout, ranks, max_tokens in itertools.product(LAYOUTS, args.ranks, args.max_tokens):
            rules = BatchRules(layout, 0, max_tokens, evaluation_tokens=max_tokens, area_cost=area_cost())
            draws = [draw(len(table), args.pairs, np.random.default_rng(seed)) for seed in range(args.steps)]
            title = f"{name}, {layout}, {ranks} ranks, {max_tokens} tokens a micro-batch"
            title += f", no deal's balance is below {balance([least_imbalance(indices, table, rules, ranks) for indices in draws])}"
            print(f"  {title}: {compare(planners, draws, rules, ranks)}", flush=True)


def draw(pairs: int, pairs_per_step: int, rng: np.random.Generator) -> np.ndarray:
    """Random pairs of a set; of several epochs together where a step has more than the set."""
    epochs = -(-pairs_per_step // pairs)
    return np.concatenate([rng.permutation(pairs) for _ in range(epochs)])[:pairs_per_step]


def compare(planners: list[Planner], draws: list[np.ndarray], rules: BatchRules, ranks: int) -> str:
    """One line on one planner, or on two that plan the same steps in turn."""
    figures = []
    for number, indices in enumerate(draws):
        runs = {}
        for i in sorted(range(len(planners)), reverse=number % 2 == 1):
            started = time.perf_counter()
            deal = planners[i](indices, rules, ranks)
            runs[i] = 1e3 * (time.perf_counter() - started), deal
        figures.append([runs[i] for i in range(len(planners))])
    milliseconds = [[took for took, _ in step] for step in figures]
    uneven = [balance([step[i][1].imbalance for step in figures]) for i in range(len(planners))]
    *before, after = [spread(column, 1) for column in zip(*milliseconds, strict=True)]
    if not before:
        return f"{after}, balance {uneven[0]}"
    same = sum(micro_batches(old) == micro_batches(new) for (_, old), (_, new) in figures)
    return (
        f"before {before[0]}, after {after}, {spread([old / new for old, new in milliseconds], 1)} times as fast; "
        f"{same} of {len(draws)} steps dealt alike, balance {uneven[0]} and {uneven[1]}"
    )


def balance(imbalances: list[float]) -> str:
    """Of the deals of some steps."""
    return f"{statistics.median(imbalances):.3f} (worst {max(imbalances):.3f})"


def least_imbalance(indices: np.ndarray, table: PairTable, rules: BatchRules, ranks: int) -> float:
    """Some rank computes the step's longest pair, whatever else; costs as if no two pairs shared anything."""
    costs = dealing.pair_costs(indices, table, rules.layout, rules.area_cost)
    return max(1.0, ranks * costs.max() / costs.sum())


def micro_batches(deal) -> list[list[tuple[list[int], int]]]:
    """Pairs and counted ones of each micro-batch of each rank."""
    return [[(part.indices.tolist(), int(part.counted)) for part in rank] for rank in deal.ranks]


def planner_module(commit: str) -> ModuleType:
    """The planner of a commit, loaded beside the present one. It stood in open_rm/steps.py once."""
    for path in ("open_rm/batching/dealing.py", "open_rm/steps.py"):
        shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=REPOSITORY, capture_output=True, text=True)
        if shown.returncode == 0:
            module = ModuleType("planner_before")
            sys.modules[module.__name__] = module  # dataclasses look their module up there
            exec(compile(shown.stdout, f"{commit}:{path}", "exec"), module.__dict__)
            return module
    raise SystemExit(f"--against {commit}: no planner found there: {shown.stderr.strip()}")


def planner_of(module: ModuleType, table: PairTable) -> Planner:
    """What plans a step of the table's pairs, whichever names it had."""
    if hasattr(module, "deal_step"):
        return lambda indices, rules, ranks: module.deal_step(indices, table, rules, ranks)
    own = module.PairTable(**{field.name: getattr(table, field.name) for field in dataclasses.fields(table)})
    return lambda indices, rules, ranks: module.plan_step(
        indices,
        own,
        layout=rules.layout,
        world_size=ranks,
        max_tokens=rules.max_tokens,
        area_cost=rules.area_cost,
    )


def real_tables(data: Path) -> list[tuple[str, PairTable]]:
    """Lengths and ids of the sets' training pairs, up to 1,024 tokens of a vocabulary made from some of them."""
    files = [data / name / "train.jsonl" for name in ("hh_harmless", "alpaca_eval")]
    found = [file for file in files if file.is_file()]
    for file in [file for file in files if file not in found]:
        print(f"{file.parent.name} is left out: there is no {file}")
    if not found:
        raise SystemExit(f"--data {data}: nothing to plan")
    with tempfile.TemporaryDirectory(prefix="open_rm_planning_") as folder:
        some = [workloads.real(file.parent, pairs=160, seed=0, by_prompt=False) for file in found]
        workloads.make_tokenizer(some).save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        read = [
            workloads.read_pairs(file, tokenizer, Path(folder) / "cache", max_token_length=1024).table for file in found
        ]
    return [(file.parent.name, table) for file, table in zip(found, read, strict=True)]


def area_cost() -> float:
    """Of a Llama of a billion parameters."""
    shape = workloads.SHAPES["1B"]
    body = shape.layers * (shape.width**2 * (2 + 2 * shape.kv_heads / shape.heads) + 3 * shape.width * shape.mlp)
    return dealing.attention_cost(int(body), shape.layers, shape.width)


if __name__ == "__main__":
    main(tyro.cli(PlanningArgs, use_underscores=True))
