"""Rows in, rewards beside them, rows out: in order, in bounded memory, resumable to the same bytes.

blocks.py reads and encodes the next block in a thread while the model scores; what is made of a scored row is for a maker
(scores.py, selection.py); output.py keeps what was made.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from open_rm.batching.prefetch import prefetch
from open_rm.data.answers import Answers
from open_rm.data.counts import Counts, columns_line, oddity_sentence
from open_rm.data.readers import Opened
from open_rm.data.rows import Row
from open_rm.errors import UserError
from open_rm.scoring.agreement import Agreement
from open_rm.scoring.arguments import report_beside
from open_rm.scoring.blocks import Block, EncodedRow, Encoder, Raw, blocks, skip
from open_rm.scoring.lines import Lines
from open_rm.scoring.output import Output
from open_rm.scoring.scorer import Scorer
from open_rm.scoring.showing import Progress


@dataclass(frozen=True)
class ScoredRow:
    """A row with the rewards of its answers.

    place: file and row.  row: as it stands in the file; not to be changed.  answers: those in it.
    scores: one an answer, the float of the shortest decimal text of the float32 reward; None: over-length, or empty.
    overlength: for each answer, whether it has more tokens than the model takes (then not scored, or scored cut).
    judge: the same of a second reward model (--judge).
    """

    place: str
    row: dict
    answers: Answers
    scores: list[float | None]
    overlength: list[bool]
    judge: list[float | None] | None = None


class Maker(Protocol):
    """What is made of scored rows. counts: a dataclass of plain values, all that it remembers from row to row."""

    counts: object

    def take(self, scored: ScoredRow) -> list[dict]:
        """The rows of the output that one scored row gives."""

    def lines(self) -> list[str]:
        """What became of all of them, for the log."""


@dataclass
class Tally:
    """How far a stream is and what it counted: what a run that goes on takes up.

    rows: of the input, read.  digest: of them.  written: rows of the output.  skipped: bad rows that were left out.
    empty: answers without text.  unscored: answers without a score, these among them.  made: the maker's counts.  agreements: with the judge, and with what the file says.
    """

    rows: int = 0
    digest: str = ""
    written: int = 0
    answers: int = 0
    overlength: int = 0
    empty: int = 0
    unscored: int = 0
    skipped: int = 0
    counts: Counts = field(default_factory=Counts)
    made: dict = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict) -> "Tally":
        """What `dataclasses.asdict` gave, through JSON."""
        agreements = {name: Agreement(**sums) for name, sums in state["agreements"].items()}
        return cls(**state | {"counts": Counts(**state["counts"]), "agreements": agreements})


@dataclass(frozen=True)
class Stream:
    """One file's way through a model.

    rows: which of the input's rows, whole blocks of `block_rows`.  skip_bad_rows: most that are left out.
    shown: where the log's lines go, and how far it is.
    """

    opened: Opened
    rows: range
    encoder: Encoder
    judge: Encoder | None
    maker: Maker
    output: Output
    block_rows: int
    skip_bad_rows: int
    shown: Progress

    def run(self) -> Tally:
        """Score all rows and have the output appear.

        Raises:
            UserError: a row that is bad and may not be skipped, a disk that takes no more. What was written is kept.
        """
        try:
            tally, raw = self._begun()
        except BaseException:
            self.output.close()
            raise
        if tally.made:
            self.maker.counts = type(self.maker.counts)(**tally.made)
        self.shown.begin(tally.rows)
        how = {"size": self.block_rows, "digest": tally.digest}
        lines, is_first = Lines(), True
        try:
            with contextlib.closing(prefetch(blocks(raw, self.encoder, self.judge, **how), depth=2)) as ready:
                for block in ready:
                    self._judge_bad_rows(block, tally)
                    made = [row for scored in self._scored(block, tally) for row in self.maker.take(scored)]
                    tally.rows, tally.digest = tally.rows + block.size, block.digest
                    tally.written += len(made)
                    tally.made = dataclasses.asdict(self.maker.counts)
                    self.output.write(lines.of(made), dataclasses.asdict(tally), now=is_first)
                    if is_first and (columns := columns_line(dataclasses.asdict(tally.counts))):
                        self.shown.say(columns.strip())
                    is_first = False
                    self.shown.moved(block.size)
            self.output.finish(self._reports(tally))
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.output.commit()
            self.output.close()
            if isinstance(error, UserError) and self.output.progress and "what was written" not in str(error):
                raise UserError(f"{error}. {self._kept()}") from error
            raise
        for line in (*lines.said(), *self.maker.lines()):
            self.shown.say(line)
        return tally

    def _begun(self) -> tuple[Tally, Iterator[Raw]]:
        """How far the output is, and the rows behind."""
        tally = Tally.of(self.output.progress) if self.output.progress else Tally()
        raw = self._raw()
        if skip(raw, size=self.block_rows, done=tally.rows) == tally.digest:
            if tally.rows:
                self.shown.say(f"going on after row {tally.rows:,} of {len(self.rows):,}, from {self.output.partial}")
            return tally, raw
        what = f"the first {tally.rows:,} rows of --input are not those that were read before"
        if not self.output.overwrite:
            raise UserError(
                f"{what}; give the input that {self.output.partial} was begun with, or pass --overwrite to begin anew"
            )
        self.shown.say(f"{what}: begun anew")
        self.output.begin_anew()
        return Tally(), self._raw()

    def _raw(self) -> Iterator[Raw]:
        return itertools.islice(self.opened.rows(), self.rows.start, self.rows.stop)

    def _reports(self, tally: Tally) -> dict[Path, str]:
        """Files beside the output, and their texts."""
        if self.judge is None:
            return {}
        names = self.encoder.scorer.name, self.judge.scorer.name
        said = tally.agreements.get("judge", Agreement()).report(*names)
        return {report_beside(self.output.path): json.dumps(said, indent=2) + "\n"}

    def _kept(self) -> str:
        return (
            f"The {self.output.progress['rows']:,} rows before are kept in {self.output.partial}: the same command goes on behind "
            "them, also when later rows were corrected or may be skipped"
        )

    def _judge_bad_rows(self, block: Block, tally: Tally) -> None:
        allowed = tally.skipped + len(block.bad)
        if allowed > self.skip_bad_rows:
            place, what = block.bad[max(0, self.skip_bad_rows - tally.skipped)]
            before = f"{self.skip_bad_rows} are used up; " if self.skip_bad_rows else ""
            raise UserError(
                f"{place}: {what} ({before}--skip_bad_rows {allowed} would leave out the bad rows up to here)"
            )
        tally.skipped = allowed
        for place, what in block.bad:
            self.shown.say(f"skipped {place}: {what}")

    def _scored(self, block: Block, tally: Tally) -> list[ScoredRow]:
        scores = rewards_of(self.encoder.scorer, block.rows)
        judged = rewards_of(self.judge.scorer, block.judged) if self.judge else [None] * len(scores)
        found = [
            ScoredRow(row.place, row.row, row.answers, own, row.overlength, other)
            for row, own, other in zip(block.rows, scores, judged, strict=True)
        ]
        for scored in found:
            tally.answers += len(scored.scores)
            tally.overlength += sum(scored.overlength)
            tally.empty += sum(answer is None for answer in scored.answers.answers)
            tally.unscored += sum(score is None for score in scored.scores)
            for name, other in (("judge", scored.judge), ("file", scored.answers.given)):
                if other is not None and len(other) > 1:
                    tally.agreements.setdefault(name, Agreement()).take(scored.scores, other)
        read = [(one.place, one.row, _as_read(one.answers), 1) for one in found]
        tally.counts.add_rows(read)
        return found


def _as_read(answers: Answers) -> Row:
    return Row(answers.form, answers.plan, [], oddities=answers.oddities)


def rewards_of(scorer: Scorer, rows: list[EncodedRow]) -> list[list[float | None]]:
    """Scores of each row's answers, as ScoredRow has them.

    Raises:
        UserError: a reward that is no finite number.
    """
    where = [(row, i) for row, encoded in enumerate(rows) for i, ids in enumerate(encoded.ids) if ids is not None]
    scores: list[list[float | None]] = [[None] * len(row.ids) for row in rows]
    if not where:
        return scores
    prompts = _prompt_numbers(rows)
    rewards = scorer.rewards([rows[row].ids[i] for row, i in where], prompt_of=[prompts[row] for row, _ in where])
    if not np.isfinite(rewards).all():
        row = where[int(np.flatnonzero(~np.isfinite(rewards))[0])][0]
        raise UserError(
            f"{rows[row].place}: the reward that {scorer.name} gives is no finite number; are its weights damaged, or is "
            "--dtype too narrow for it?"
        )
    for (row, i), reward in zip(where, rewards, strict=True):
        scores[row][i] = float(str(reward))  # the shortest decimal that is this float32
    return scores


def _prompt_numbers(rows: list[EncodedRow]) -> list[int]:
    """[rows] equal where the prompts are; a row that names none is of its own."""
    numbers: dict[object, int] = {}
    keys = (
        (row.answers.prompt, row.answers.template) if row.answers.prompt else number for number, row in enumerate(rows)
    )
    return [numbers.setdefault(key if isinstance(key, int) else repr(key), len(numbers)) for key in keys]


def summary(tally: Tally, *, name: str, model: str, judge: str | None) -> list[str]:
    """What became of the input, for the log: forms, oddities, agreement."""
    forms = ", ".join(f"{count:,} {form}" for form, count in tally.counts.forms.items())
    lines = [f"{name}: {tally.rows:,} rows ({forms})" if forms else f"{name}: {tally.rows:,} rows"]
    for key, entry in tally.counts.oddities.items():
        lines.append(f"{entry['count']:,} rows {oddity_sentence(key)} (first {entry['first']})")
    left_out = tally.unscored - tally.empty
    if cut := tally.overlength - left_out:
        lines.append(f"{cut:,} answers are over-length, marked and cut")
    if left_out:
        lines.append(f"{left_out:,} answers are over-length, marked and not scored")
    if tally.empty:
        lines.append(f"{tally.empty:,} answers are empty and have no score")
    if judge is not None:
        lines += tally.agreements.get("judge", Agreement()).lines(model, judge)
    if (with_file := tally.agreements.get("file")) and with_file.share is not None:
        low, high = with_file.interval
        lines.append(
            f"{model} agrees with what the file says in {with_file.agreeing:,} of {with_file.strict:,} pairs of answers: "
            f"{with_file.share:.1%} (95 % interval {low:.1%} to {high:.1%})"
        )
    return lines
