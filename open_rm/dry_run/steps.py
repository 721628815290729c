"""The run's steps, drawn and dealt to all ranks as the run does it, and laid out in memory as each rank would."""

import time
from dataclasses import dataclass

import numpy as np

from open_rm.batching.dealing import deal_step, pair_costs
from open_rm.batching.feeding import micro_batches
from open_rm.batching.rules import BatchRules
from open_rm.data.pairs import PreferenceData
from open_rm.dry_run.told import Told, counted, thousands
from open_rm.training.plan import Plan

SAMPLED_STEPS = 24
ALL_UP_TO = 60  # steps, of which all are dealt


@dataclass(frozen=True)
class Dealt:
    """What steps come to, each a list with one entry a step that was dealt.

    numbers: which steps, from 1.  pairs, tokens, distinct, positions: of all ranks; tokens of all sequences, distinct ones that
        are computed, positions with padding.  forwards: micro-batches of each rank.  imbalance: max over mean cost of the ranks.
    seconds: that dealing took.  area: query-key products.  read: positions at which a reward is read.
    largest: positions of a device's largest micro-batch.  share: most positions that a device has in one step.
    """

    numbers: list[int]
    pairs: list[int]
    tokens: list[int]
    distinct: list[int]
    positions: list[int]
    forwards: list[int]
    imbalance: list[float]
    seconds: list[float]
    area: list[int]
    read: list[int]
    largest: int
    share: int


def deal(plan: Plan, data: PreferenceData, rules: BatchRules, *, ranks: int, group: int, seed: int) -> Dealt:
    """Deal a sample of the steps, all where they are few; which ones `seed` decides.

    ranks: shares of a step's pairs, a sequence group's devices being one.  group: devices of it.
    """
    chosen = set(range(1, plan.total_steps + 1))
    if plan.total_steps > ALL_UP_TO:
        rng = np.random.default_rng(seed)
        chosen = set((1 + rng.choice(plan.total_steps, SAMPLED_STEPS, replace=False)).tolist())
    rules = rules.of_group(group)
    rows, largest, share = [], 0, 0
    for number, indices in enumerate(plan.draw(data.table), start=1):
        if number not in chosen:
            continue
        started = time.perf_counter()
        dealt = deal_step(indices, data.table, rules, ranks)
        seconds = time.perf_counter() - started
        counts = np.zeros(5, np.int64)
        for parts in dealt.ranks:
            own = [(micro.batch, len(micro.indices) > 0) for micro in micro_batches(parts, data, rules)]
            positions = [batch.positions for batch, _ in own]
            largest, share = max(largest, *positions), max(share, sum(positions))
            counts[2] += sum(positions)
            for batch, real in own:  # as metrics.Meter counts them
                if real:
                    counts[[0, 1, 3, 4]] += (batch.tokens, batch.computed, batch.area, len(batch.read_index))
        rows.append(
            (
                number,
                len(indices),
                *counts[:3].tolist(),
                len(dealt.ranks[0]),
                dealt.imbalance,
                seconds,
                *counts[3:].tolist(),
            )
        )
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Dealt(*columns, largest=-(-largest // group), share=-(-share // group))


def distinct_tokens(data: PreferenceData, layout: str) -> int:
    """Tokens that are computed where each pair of the data is scored once, alone."""
    return int(pair_costs(np.arange(len(data)), data.table, layout, 0.0).sum())


def told(plan: Plan, dealt: Dealt, pairs: int, rules: BatchRules) -> Told:
    """pairs: of the data."""
    steps, epochs = len(dealt.numbers), plan.total_episodes / pairs
    mean = {name: float(np.mean(getattr(dealt, name))) for name in ("tokens", "distinct", "positions")}
    whole = steps == plan.total_steps
    of = f"all of {counted(steps, 'step')} dealt" if whole else f"{steps} of {plan.total_steps} steps dealt"
    shared = 100 * (1 - mean["distinct"] / mean["tokens"])
    padding = 100 * (1 - mean["distinct"] / max(mean["positions"], 1))
    counts = (
        f"{thousands(mean['tokens'])} tokens, {thousands(mean['distinct'])} of them distinct ({shared:.0f} % shared)"
    )
    forwards = f"{np.median(dealt.forwards):.0f}, at most {max(dealt.forwards)}"
    lines = [
        f"{plan.describe()} ({epochs:.2f} epochs of {thousands(pairs)} pairs), warm-up {plan.warmup_steps}",
        f"a step of all devices: {counts}, {thousands(mean['positions'])} positions computed ({padding:.0f} % padding or fillers)",
        f"micro-batches of a device in a step: {forwards}, of up to {thousands(dealt.largest)} positions (limit {thousands(rules.max_tokens)})",
        f"balance (slowest device over the mean): median {np.median(dealt.imbalance):.3f}, worst {max(dealt.imbalance):.3f}; "
        f"planning takes {1000 * np.median(dealt.seconds):.0f} ms a step ({of})",
    ]
    numbers = plan.numbers() | {"seed": plan.seed, "dealt_steps": dealt.numbers, "all_dealt": whole, "epochs": epochs}
    numbers |= {f"{name}_per_step": value for name, value in mean.items()}
    numbers |= {"micro_batches_per_rank": float(np.median(dealt.forwards)), "micro_batches_most": max(dealt.forwards)}
    numbers |= {
        "largest_micro_batch": dealt.largest,
        "max_tokens_per_micro_batch": rules.max_tokens,
        "layout": rules.layout,
    }
    numbers |= {"imbalance_median": float(np.median(dealt.imbalance)), "imbalance_worst": max(dealt.imbalance)}
    numbers |= {"planning_ms": 1000 * float(np.median(dealt.seconds))}
    return Told("steps", lines, numbers)
