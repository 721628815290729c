"""The model that is being trained, judged: by some rows of the benchmarks at each evaluation, and at the end by all of them and
by the held-out pairs, with the report that `python -m open_rm.evaluation` writes of a saved folder.

OUTPUT_DIR/evaluation/: scores.jsonl, scores.meta.json, report.json, report.html. OUTPUT_DIR/reliability.png is the model card's.
"""

import dataclasses
import datetime
import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from open_rm import alive
from open_rm.data import tokenizer as tokenizers
from open_rm.data.pairs import PreferenceData
from open_rm.errors import UserError
from open_rm.evaluation import held_out
from open_rm.evaluation.engine_scorer import InTraining
from open_rm.evaluation.held_out import Evaluation
from open_rm.evaluation.page import document, pictures
from open_rm.evaluation.rules.verdict import OVERALL, SUBSET
from open_rm.evaluation.score_file import META, SCORES, read_scores, row_of
from open_rm.evaluation.scoring import BLOCK_ROWS, check_invariance, encoder_for, score_set
from open_rm.evaluation.sets import NamedSet
from open_rm.evaluation.trust.report import judge, make_report
from open_rm.flags import BenchmarkFlags
from open_rm.scoring.blocks import batched
from open_rm.scoring.scorer import Scorer

FOLDER, RELIABILITY = "evaluation", "reliability.png"
HELD_OUT = "held-out pairs"
BLOCK_PAIRS = 1_000
WITH_TEXTS = (
    20_000  # held-out pairs whose texts are written; of more the numbers alone, since texts take long to decode
)


@dataclass(frozen=True)
class Scored:
    """rows: of scores.jsonl, those of the held-out pairs on the main rank alone.  invariance: of the report.  meta: how they were
    made, label to value."""

    rows: list[dict]
    invariance: dict | None
    meta: dict


@dataclass
class Judge:
    """Judges one run's model; what takes `rewards_of` is a collective call.

    known: the model.  sets: the benchmarks, opened.  pairs: held out; None: there are none.  folder: of the run.
    rows: of each benchmark that are judged at evaluations, drawn by `seed`.  most: tokens of a benchmark's prompt and answer.
    """

    known: InTraining
    sets: list[NamedSet]
    pairs: PreferenceData | None
    folder: str
    seed: int
    rows: int = 0
    most: int = 2048
    _latest: tuple[int, torch.Tensor] | None = field(default=None, init=False)

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
        return cls(known, sets, pairs, folder, seed, flags.benchmark_rows, flags.benchmark_max_token_length)

    def check(self) -> list[str]:
        """Encode every row of the benchmarks, so that one that cannot be scored is found before the first step.

        Returns:
            what will be judged, for the log.

        Raises:
            UserError: which one, and why.
        """
        scorer = self._scorer(_no_rewards)
        for named in self.sets:
            encoder = encoder_for(scorer, named, "truncate")
            for block in batched(named.opened.rows(), BLOCK_ROWS):
                alive.beat()
                for number, what in encoder.rows(block)[1].items():
                    raise UserError(f"--benchmark {named.name}: {block[number][0]}: {what}")
        return [f"benchmark {named.says()}" for named in self.sets]

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
            random = np.random.default_rng(self.seed)
            drawn = np.sort(random.permutation(named.opened.size)[: self.rows]).tolist()
            blocks = score_set(named, encoder_for(scorer, named, "truncate"), drawn)
            with tempfile.TemporaryDirectory() as folder:
                path = _written(Path(folder) / SCORES, (row for block in blocks for row in block))
                [scored] = read_scores(path)
            for line in judge(scored).lines:
                if line.level != SUBSET and math.isfinite(line.estimate.value):
                    name = "overall" if line.level == OVERALL else re.sub(r"\W+", "_", line.name.lower()).strip("_")
                    metrics[f"eval/{named.name}/{name}"] = line.estimate.value
        return metrics

    def _scorer(self, rewards_of: Callable[..., torch.Tensor]) -> Scorer:
        return self.known.scorer(rewards_of, name=self.folder, max_token_length=self.most)

    def scored(self, rewards_of: Callable[..., torch.Tensor], *, step: int | None) -> Scored | None:
        """All that is judged at the end; None where nothing is.

        step: of the evaluation that was of these weights, where there was one.

        Raises:
            UserError: a reward that is no finite number.
        """
        if not self.sets and not self.pairs:
            return None
        scorer, invariance = self._scorer(rewards_of), None
        with alive.phase("judging the model", alive.Kind.STEPS):
            rows = list(self._all_rows(rewards_of, scorer, step))
            if self.sets:
                invariance = check_invariance(self.sets, encoder_for(scorer, self.sets[0], "truncate"))
        facts = {"facts": {"invariance": invariance}} if invariance else {}  # so that scores judged again keep it
        return Scored(rows, invariance, self._meta(scorer) | facts)

    def report(self, found: Scored | None) -> dict | None:
        """Write the files; returns what report.json holds. The main rank's alone."""
        if found is None:
            return None
        folder = Path(self.folder) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        scores, meta = _written(folder / SCORES, found.rows), found.meta
        (folder / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        how = {"command": meta["command"], "seed": self.seed, "invariance": found.invariance}
        report = make_report(read_scores(scores), model=self.folder, meta=meta, **how)
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        document.write_html(report, folder / "report.html")
        if drawn := next((one for one in report["sets"] if one["calibration"]), None):
            pictures.reliability_png(drawn["calibration"], Path(self.folder) / RELIABILITY, drawn["title"])
        return report

    def _all_rows(self, rewards_of: Callable, scorer, step: int) -> Iterator[dict]:
        if self.pairs:
            rewards = self._latest[1] if self._latest and self._latest[0] == step else None
            if rewards is None:
                everything = np.arange(len(self.pairs))
                rewards = held_out.score_pairs(rewards_of, self.pairs, everything, self.known.rules, self.known.ranks)
            if self.known.ranks.is_main:
                yield from self._held_out_rows(rewards)
        for named in self.sets:
            for block in score_set(named, encoder_for(scorer, named, "truncate")):
                yield from block

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
        flags = ["--model", self.folder, "--output_dir", f"{self.folder}/{FOLDER}-again"]
        if self.sets:
            names = [named.name for named in self.sets]
            flags += ["--benchmark", *names, "--max_token_length", str(scorer.max_token_length)]
        template = f"sha256 {tokenizers.fingerprint(known.tokenizer)[:12]}, of tokenizer and template"
        return {
            "model": self.folder,
            "truncation length": f"{scorer.max_token_length} tokens in benchmarks; held-out pairs as training reads them",
            "dtype": known.contract.dtype,
            "chat template": template if known.contract.chat else "none: plain text",
            "batching": known.rules.layout,
            "device": f"{known.ranks.world_size} x {known.ranks.device.type}, by the engine that trained it",
            "command": f"python -m open_rm.evaluation {shlex.join(flags)}",
            "seed": self.seed,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def lines(report: dict | None) -> list[str]:
    """The three answers and the warnings, for the log."""
    if report is None:
        return []
    return [f"{one['question']} {one['answer']}" for one in report["answers"]] + [
        f"warning: {sentence}" for sentence in report["warnings"]
    ]


def _written(path: Path, rows: Iterable[dict]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _no_rewards(**inputs):
    raise AssertionError("rows are encoded alone here")
