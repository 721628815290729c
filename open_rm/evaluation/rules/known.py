"""The table of the benchmarks: where their data is, how a row is known and counted, whose rules judge it.

A benchmark's rows are read like any preference data (data/answers.py: chosen answers before rejected ones; JudgeBench's A
before B); what its rules need besides are an id and a subset. To add one: a room of rules, a line here, a form in
data/public_sets.py, and in score_file.py how scores made elsewhere are written.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from open_rm.errors import UserError
from open_rm.evaluation.rules import judge_bench, reward_bench, reward_bench_2, rm_bench, rmb
from open_rm.evaluation.rules.verdict import (
    OVERALL,
    SUBSET,
    Line,
    Part,
    Verdict,
    by_subset,
    is_scored,
    rows_that_count,
)
from open_rm.evaluation.scored import Pairs, ScoredSet, pairs_of
from open_rm.measures.intervals import of_pairs
from open_rm.measures.paired import OfMeans

OfRow = Callable[[dict, str], str]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    name: what --benchmark takes.  title: what people call it.
    hub: its data set on the Hub; None: it is not there, see data.  splits: of it, all of which are the benchmark.
    data: where the rows are, for a message.
    judge: its rules.  id_of, subset_of: of a row as the data has it, and its place ("file:3", "file: row 3").
    sizes: least and most answers of a row; None: any number.
    max_token_length: at how many tokens the authors cut an answer with its prompt; None: they do not.
    source: the authors' code, with the commit that was read.
    """

    name: str
    title: str
    hub: str | None
    splits: tuple[str, ...]
    data: str
    judge: Callable[[ScoredSet], Verdict]
    id_of: OfRow
    subset_of: OfRow
    sizes: tuple[int, int | None]
    max_token_length: int | None
    source: str


def _subset_and_id(subset_of: OfRow, *columns: str) -> OfRow:
    """Ids are unique within a subset alone. A row without one is known by its place."""

    def id_of(row: dict, place: str) -> str:
        number = next((row[name] for name in columns if row.get(name) is not None), None)
        return place if number is None else f"{subset_of(row, place)}/{number}"

    return id_of


def _column(name: str, benchmark: str) -> OfRow:
    def subset_of(row: dict, place: str) -> str:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{place}: no column {name}, by which {benchmark} counts its rows; use the benchmark's own rows"
            )
        return value

    return subset_of


def _domain(row: dict, place: str) -> str:
    """A row's own domain; else that of its file, as in the repository (data/safety-refuse_filtered.json)."""
    named = row.get("domain")
    if not isinstance(named, str):
        file = PurePath(re.sub(r":\s*(row )?\d+$", "", place)).name
        named = re.sub(r"(_filtered)?\.\w+(\.\w+)?$", "", file)
    try:
        rm_bench.domain_of(named)
    except UserError as error:
        raise UserError(f"{place}: no column domain, and {error}") from error
    return named


def _source(row: dict, place: str) -> str:
    """The source, and whose answers they are where they are not GPT-4o's."""
    source = _column("source", "JudgeBench")(row, place)
    is_claude = str(row.get("response_model", "")).startswith("claude")
    return f"{judge_bench.CLAUDE}{source}" if is_claude else source


def _category(row: dict, place: str) -> str:
    """category_path, as "Pairwise_set/Helpfulness/Chat/Discussion"."""
    return _column("category_path", "RMB")(row, place)


_subset = _column("subset", "RewardBench")
MOST_SUBSETS = 50  # lines of a table of preference data
REWARD_BENCH_CODE = "https://github.com/allenai/reward-bench/tree/05a9005"

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "reward_bench",
            "RewardBench",
            hub="allenai/reward-bench",
            splits=("filtered",),
            data="https://huggingface.co/datasets/allenai/reward-bench",
            judge=reward_bench.judge,
            id_of=_subset_and_id(_subset, "id"),
            subset_of=_subset,
            sizes=(2, 2),
            max_token_length=2048,
            source=REWARD_BENCH_CODE,
        ),
        Benchmark(
            "reward_bench_2",
            "RewardBench 2",
            hub="allenai/reward-bench-2",
            splits=("test",),
            data="https://huggingface.co/datasets/allenai/reward-bench-2",
            judge=reward_bench_2.judge,
            id_of=_subset_and_id(_subset, "id"),
            subset_of=_subset,
            sizes=(2, None),
            max_token_length=2048,
            source=REWARD_BENCH_CODE,
        ),
        Benchmark(
            "rm_bench",
            "RM-Bench",
            hub="THU-KEG/RM-Bench",
            splits=("train",),
            data="https://github.com/THU-KEG/RM-Bench, folder data",
            judge=rm_bench.judge,
            id_of=_subset_and_id(_domain, "id"),
            subset_of=_domain,
            sizes=(6, 6),
            max_token_length=2048,
            source="https://github.com/THU-KEG/RM-Bench/tree/73c52d7",
        ),
        Benchmark(
            "judge_bench",
            "JudgeBench",
            hub="ScalerLab/JudgeBench",
            splits=("gpt", "claude"),
            data="https://github.com/ScalerLab/JudgeBench, folder data",
            judge=judge_bench.judge,
            id_of=_subset_and_id(_source, "pair_id"),
            subset_of=_source,
            sizes=(2, 2),
            max_token_length=None,
            source="https://github.com/ScalerLab/JudgeBench/tree/e2c52c2",
        ),
        Benchmark(
            "rmb",
            "RMB",
            hub=None,
            splits=(),
            data="https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark, folder RMB_dataset",
            judge=rmb.judge,
            id_of=_subset_and_id(_category, "pair_uid", "bon_uid"),
            subset_of=_category,
            sizes=(2, None),
            max_token_length=2048,
            source="https://github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark/tree/2be3180",
        ),
    )
}


def plain(scored: ScoredSet) -> Verdict:
    """Preference data without rules of its own: the share of pairs whose better answer has the strictly higher score, over
    all pairs of all rows; by subset where there are several. Intervals take the pairs of a row together."""
    pairs = pairs_of(scored)
    counts = np.bincount(pairs.row, minlength=len(scored))
    right = np.bincount(pairs.row, weights=pairs.margin > 0, minlength=len(scored))
    wins = np.where(counts > 0, right / np.maximum(counts, 1), np.nan)
    counted = rows_that_count(scored, wins)
    lines = [_share("Accuracy", OVERALL, counted, pairs, right, counts)]
    found = by_subset(scored, counted)
    notes = _without_scores(scored, counts)
    if len(found) > MOST_SUBSETS:
        notes.append(f"of {len(found):,} subsets the {MOST_SUBSETS} with the most rows have a line")
    most = set(sorted(found, key=lambda name: -len(found[name]))[:MOST_SUBSETS]) if len(found) > 1 else ()
    lines += [_share(name, SUBSET, found[name], pairs, right, counts) for name in found if name in most]
    if tied := int((pairs.margin == 0).sum()):
        notes.append(f"{tied:,} of {len(pairs):,} pairs have equal scores, and count as wrong")
    if skipped := int((is_scored(scored) & (counts == 0)).sum()):
        notes.append(f"{skipped:,} rows say of no two answers which is better, and are passed over")
    return Verdict(lines, wins, [], notes)


def _without_scores(scored: ScoredSet, counts: np.ndarray) -> list[str]:
    """counts: [N] pairs of each row that are left."""
    lacking = ~is_scored(scored)
    passed, partly = int((lacking & (counts == 0)).sum()), int((lacking & (counts > 0)).sum())
    notes = []
    if passed:
        notes.append(
            f"{passed:,} of {len(scored):,} rows have an answer without a score and no pair left, and are passed over"
        )
    if partly:
        notes.append(
            f"{partly:,} of {len(scored):,} rows have an answer without a score, and count with their other pairs"
        )
    return notes


# [..., (right, pairs)] means over rows -> [...], the share of the pairs of these rows that are right.
right_of_pairs = OfMeans(lambda means: means[..., 0] / means[..., 1])


def _share(name: str, level: str, rows: np.ndarray, pairs: Pairs, right: np.ndarray, counts: np.ndarray) -> Line:
    inside = np.zeros(len(counts), bool)
    inside[rows] = True
    chosen = inside[pairs.row]
    estimate = of_pairs((pairs.margin[chosen] > 0).astype(float), pairs.row[chosen])
    if (counts[rows] == 1).all():
        return Line(name, level, (Part(1.0, rows, right[rows]),), estimate)
    values = np.stack([right[rows], counts[rows]], -1).astype(float)
    return Line(name, level, (Part(1.0, rows, values, right_of_pairs),), estimate)
