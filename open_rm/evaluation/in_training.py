"""The model that is being trained, judged: by some rows of the benchmarks at each evaluation, and at the end by all of them and
by the held-out pairs, with the report that `python -m open_rm.evaluation` writes of a saved folder.

OUTPUT_DIR/evaluation/: scores.jsonl, scores.meta.json, report.json, report.html. OUTPUT_DIR/reliability.png is the model card's.
"""

import dataclasses
import datetime
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from open_rm import alive
from open_rm.data import tokenizer as tokenizers
from open_rm.data.pairs import PreferenceData
from open_rm.errors import UserError, quote_error
from open_rm.evaluation import held_out
from open_rm.evaluation.engine_scorer import InTraining
from open_rm.evaluation.held_out import Evaluation
from open_rm.evaluation.page import document, pictures
from open_rm.evaluation.rules.reward_bench_2 import TIES
from open_rm.evaluation.rules.verdict import OVERALL, SUBSET
from open_rm.evaluation.score_file import META, SCORES, read_scores, row_of
from open_rm.evaluation.score_folders import OF_A_RUN
from open_rm.evaluation.scored import ScoredSet
from open_rm.evaluation.scoring import BLOCK_ROWS, check_invariance, encoder_for, score_set
from open_rm.evaluation.sets import NamedSet
from open_rm.evaluation.trust.report import FACTS, judge, make_report
from open_rm.evaluation.trust.words import LEFT_OUT
from open_rm.flags import BenchmarkFlags
from open_rm.scoring.blocks import batched
from open_rm.scoring.lines import Lines
from open_rm.scoring.scorer import Scorer

HELD_OUT = "held-out pairs"
BLOCK_PAIRS = 1_000
# Held-out pairs whose texts are written; of more the numbers alone, since texts take long to decode.
WITH_TEXTS = 20_000


@dataclass(frozen=True)
class Scored:
    """What the end of a run is judged by.

    rewards: [pairs, 2] of the held-out pairs; None: there are none.  rows: of scores.jsonl, the benchmarks', on the main rank.
    invariance: of the report.  meta: how they were made, label to value.
    """

    rewards: torch.Tensor | None
    rows: list[dict]
    invariance: dict | None
    meta: dict


@dataclass
class Judge:
    """Judges one run's model; what takes `rewards_of` is a collective call.

    known: the model.  sets: the benchmarks, opened.  pairs: held out; None: there are none.  folder: of the run.
    named: the benchmarks as --benchmark has them.
    rows: of each benchmark that are judged at evaluations, drawn by `seed`.  most: tokens of a benchmark's prompt and answer.
    """

    known: InTraining
    sets: list[NamedSet]
    pairs: PreferenceData | None
    folder: str
    seed: int
    named: list[str] = field(default_factory=list)
    rows: int = 0
    most: int = 2048
    _latest: tuple[int, torch.Tensor] | None = field(default=None, init=False)
    _draws: dict[str, list[int]] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        flags: BenchmarkFlags,
        known: InTraining,
        sets: list[NamedSet],
        pairs: PreferenceData | None,
        folder: str,
        seed: int,
    ) -> "Judge":
        """As the flags ask."""
        asked = (flags.benchmark, flags.benchmark_rows, flags.benchmark_max_token_length)
        return cls(known, sets, pairs, folder, seed, *asked)

    def check(self) -> list[str]:
        """Encode every row of the benchmarks, so that one that cannot be scored is found before the first step.

        Returns:
            what will be judged, for the log.

        Raises:
            UserError: which one, and why.
        """
        scorer, said = self._scorer(_no_rewards), []
        for named in self.sets:
            encoder = encoder_for(scorer, named, "truncate")
            for block in batched(named.opened.rows(), BLOCK_ROWS):
                alive.beat()
                for number, what in encoder.rows(block)[1].items():
                    raise UserError(f"--benchmark {named.name}: {block[number][0]}: {what}")
            joined = (
                "" if scorer.chat else "; the model scores plain text, so prompt and answer are joined as they stand"
            )
            said.append(f"benchmark {named.says()}{joined}")
        return said

    def evaluate(self, rewards_of: Callable[..., torch.Tensor], *, step: int) -> Evaluation:
        """Held-out pairs (held_out.evaluate) and the benchmarks' rows that evaluations take: eval/<benchmark>/<number>.

        rewards_of: batch inputs to rewards, in evaluation mode.  step: that the weights are of.
        """
        result = held_out.evaluate(rewards_of, self.pairs, self.known.rules, self.known.ranks)
        self._latest = step, result.rewards
        return dataclasses.replace(result, metrics=result.metrics | self._by_benchmarks(rewards_of))

    def _by_benchmarks(self, rewards_of: Callable[..., torch.Tensor]) -> dict[str, float]:
        if not self.rows:
            return {}
        scorer, metrics = self._scorer(rewards_of), {}
        for named in self.sets:
            blocks = score_set(named, encoder_for(scorer, named, "truncate"), self._drawn(named))
            try:
                verdict = judge(scored_set([row for block in blocks for row in block]))
            except UserError:  # rewards that are no numbers, on all ranks alike: training says so by itself
                continue
            for line in verdict.lines:
                if line.level != SUBSET and math.isfinite(line.estimate.value):
                    name = "overall" if line.level == OVERALL else re.sub(r"\W+", "_", line.name.lower()).strip("_")
                    metrics[f"eval/{named.name}/{name}"] = line.estimate.value
        return metrics

    def _drawn(self, named: NamedSet) -> list[int]:
        """Numbers of the rows that evaluations take, rising: of each subset as many, since a section without rows counts as 0;
        the rows of one prompt of RewardBench 2's Ties together."""
        if named.name not in self._draws:
            units: dict[tuple[str, str], list[int]] = {}
            for number, (place, row) in enumerate(named.opened.rows()):
                identity, subset = named.id_of(row, place), named.subset_of(row, place)
                unit = identity.rpartition(":")[2] if subset == TIES else identity
                units.setdefault((subset, unit), []).append(number)
            taken, order = Counter(), np.random.default_rng(self.seed).permutation(len(units))
            ranked = []
            for (subset, _), numbers in (list(units.items())[i] for i in order):
                ranked.append((taken[subset], numbers))
                taken[subset] += 1
            ranked.sort(key=lambda one: one[0])  # the first of each subset, then the second, ...
            drawn = [number for _, numbers in ranked for number in numbers][: self.rows]
            self._draws[named.name] = sorted(drawn)
        return self._draws[named.name]

    def _scorer(self, rewards_of: Callable[..., torch.Tensor]) -> Scorer:
        return self.known.scorer(rewards_of, name=self.folder, max_token_length=self.most)

    def scored(
        self, rewards_of: Callable[..., torch.Tensor], *, step: int | None, say: Callable[[str], None]
    ) -> Scored | None:
        """All that the model is judged by at the end; None where there is nothing, or where it failed, which is said.

        step: of the evaluation that was of these weights, where there was one.  say: for the log.
        """
        if not self.sets and not self.pairs:
            return None
        scorer, rows, invariance = self._scorer(rewards_of), [], None
        with alive.phase("judging the model", alive.Kind.STEPS):
            try:
                rewards = self._held_out_rewards(rewards_of, step)
                for named in self.sets:
                    for block in score_set(named, encoder_for(scorer, named, "truncate")):
                        rows += block if self.known.ranks.is_main else ()
                if self.sets:
                    invariance = check_invariance(self.sets, encoder_for(scorer, self.sets[0], "truncate"))
            except UserError as error:  # on all ranks alike, since rewards are
                say(f"the model could not be judged: {error}")
                return None
        return Scored(rewards, rows, invariance, self._meta(scorer))

    def _held_out_rewards(self, rewards_of: Callable, step: int | None) -> torch.Tensor | None:
        if not self.pairs:
            return None
        if self._latest and self._latest[0] == step:
            return self._latest[1]
        everything = np.arange(len(self.pairs))
        return held_out.score_pairs(rewards_of, self.pairs, everything, self.known.rules, self.known.ranks)

    def report(self, found: Scored | None, *, say: Callable[[str], None]) -> dict | None:
        """Write the files; returns what report.json holds, None where nothing was scored. The main rank's alone.

        The model is saved by then: a report that fails is said, and costs neither its proof nor its push.
        """
        if found is None:
            return None
        try:
            report = self._reported(found)
            say(f"how far it can be trusted: {Path(self.folder) / OF_A_RUN / document.PAGE}")
            return report
        except Exception as error:
            say(
                f"the report could not be made ({type(error).__name__}: {quote_error(error)}); the model is not touched by it"
            )
            return None

    def _reported(self, found: Scored) -> dict:
        folder = Path(self.folder) / OF_A_RUN
        folder.mkdir(parents=True, exist_ok=True)
        facts = {FACTS: {"invariance": found.invariance}} if found.invariance else {}  # for scores judged again
        held = [] if found.rewards is None else self._held_out_rows(found.rewards)
        with (folder / SCORES).open("wb") as file:
            lines = Lines()
            for row in itertools.chain(held, found.rows):
                file.write(lines.of([row]))
        (folder / META).write_text(
            json.dumps(found.meta | facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        how = {"command": found.meta["command"], "seed": self.seed, "invariance": found.invariance}
        report = make_report(read_scores(folder / SCORES), model=self.folder, meta=found.meta, **how)
        document.write_report(report, folder)
        if drawn := next((one for one in report["sets"] if one["calibration"]), None):
            pictures.reliability_png(drawn["calibration"], Path(self.folder) / pictures.RELIABILITY, drawn["title"])
        return report

    def _held_out_rows(self, rewards: torch.Tensor) -> Iterator[dict]:
        """Rows of scores.jsonl, one a pair; its source is its subset."""
        pairs, tokenizer = self.pairs, self.known.tokenizer
        decode = tokenizer.decode if len(pairs) <= WITH_TEXTS else None
        table, sources = pairs.table, pairs.source_ids()
        for start in range(0, len(pairs), BLOCK_PAIRS):
            numbers = range(start, min(start + BLOCK_PAIRS, len(pairs)))
            for i, place, sides in zip(numbers, pairs.places(numbers), pairs.pairs(numbers), strict=True):
                alive.beat()
                prompt = min(int(table.prompt_length[i]), *map(len, sides))
                answers = [side[prompt:] for side in sides]
                texts = [decode(answer) for answer in answers] if decode is not None else None
                row = row_of(
                    set=HELD_OUT,
                    benchmark=None,
                    id=f"{i + 1} {Path(place).name}",
                    subset=pairs.labels[sources[i]],
                    scores=[float(reward) for reward in rewards[i]],
                    gold=[1.0, 0.0],
                    tokens=[len(answer) for answer in answers],
                    characters=texts and [len(text) for text in texts],
                    overlength=[False, False],
                    prompt=texts and decode(sides[0][:prompt]),
                    answers=texts or [],
                )
                yield (
                    row if texts else {name: value for name, value in row.items() if name not in ("prompt", "answers")}
                )

    def _meta(self, scorer) -> dict[str, object]:
        """How the scores were made: label -> value, for people."""
        known = self.known
        command = "none: held-out pairs are judged by training alone"
        if self.sets:
            flags = ["--model", self.folder, "--output_dir", f"{self.folder.rstrip('/')}-judged"]
            flags += ["--benchmark", *self.named, "--max_token_length", str(scorer.max_token_length)]
            command = f"python -m open_rm.evaluation {shlex.join(flags)}"
        left_out = sum(len(named.left_out) for named in self.sets)
        template = f"sha256 {tokenizers.fingerprint(known.tokenizer)[:12]}, of tokenizer and template"
        return {
            "model": self.folder,
            "truncation length": f"{scorer.max_token_length} tokens in benchmarks; held-out pairs as training reads them",
            "dtype": known.contract.dtype,
            "chat template": template if known.contract.chat else "none: plain text",
            "batching": known.rules.layout,
            "device": f"{known.ranks.world_size} x {known.ranks.device.type}, by the engine that trained it",
            "command": command,
            "seed": self.seed,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **({LEFT_OUT: left_out} if left_out else {}),
        }


def lines(report: dict | None) -> list[str]:
    """The three answers and the warnings, for the log."""
    if report is None:
        return []
    return [f"{one['question']} {one['answer']}" for one in report["answers"]] + [
        f"warning: {sentence}" for sentence in report["warnings"]
    ]


def scored_set(rows: list[dict]) -> ScoredSet:
    """Rows of scores.jsonl, all of one set, as they come from the model."""

    def column(name: str) -> np.ndarray:
        return np.array([value for row in rows for value in row[name] or [None] * len(row["scores"])], np.float64)

    characters = np.nan_to_num(column("characters"), nan=-1).astype(np.int64)
    return ScoredSet(
        rows[0]["set"],
        rows[0]["benchmark"],
        [row["id"] for row in rows],
        [row["subset"] for row in rows],
        np.cumsum([0, *(len(row["scores"]) for row in rows)]),
        column("scores"),
        column("gold"),
        characters,
        np.full(len(characters), -1),
        column("overlength").astype(bool),
    )


def _no_rewards(**inputs):
    raise AssertionError("rows are encoded alone here")
