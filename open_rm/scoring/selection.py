"""What is made of scored answers: the n best of a row, and preference pairs.

Both go from row to row and keep numbers alone, so that a file of any length takes the same memory, and a run that goes on
takes up the numbers it had written (`dataclasses.asdict` of `counts`, and back). Nothing is drawn: the same rows give the
same output.

Length balance: reward models tend to like long answers, and what is trained on their preferences more so. It is counted
whether the chosen answer is the longer or the shorter one, and no pair is taken that brings one count further ahead of the
other than 1 + 2 % of the pairs so far. A row then gives its next best pair, if it has one that may be taken:

    answer  score  length        pairs, the largest margin first    while "longer" is as far ahead as it may be
    a        2.0     900         a over c  3.0  chosen is longer    not taken
    b        0.5     200         b over c  1.5  chosen is shorter   taken; "longer" is one less ahead
    c       -1.0     400         a over b  1.5  chosen is longer    (one pair a row: not asked any more)
"""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from open_rm.data.columns import plan_of
from open_rm.data.reading import Reading
from open_rm.scoring.pair_rows import PairRows, renamed, template_columns
from open_rm.scoring.streams import ScoredRow

LEAD = 0.02  # how far one of the two counts may be ahead, besides one pair: a share of the pairs so far
LONGER, SHORTER, ALIKE = "longer", "shorter", "alike"


@dataclass
class BestCounts:
    """rows: taken.  short: had fewer than n answers with a score.  none: had no answer with a score.
    unscored: answers without one (over-length, or empty).  tied: rows where equal scores stood on both sides of the cut.
    alone: rows that hold one answer by their form.  renamed: columns of the input that are called input_<name>."""

    rows: int = 0
    short: int = 0
    none: int = 0
    unscored: int = 0
    tied: int = 0
    alone: int = 0
    renamed: list[str] = field(default_factory=list)


@dataclass
class BestOfN:
    """The n best answers of each row. reading: how the rows were read."""

    n: int
    reading: Reading
    counts: BestCounts = field(default_factory=BestCounts)

    def take(self, scored: ScoredRow) -> list[dict]:
        """The row with its n best answers, the best first; equal scores in the order of the row. [] where none has a score.

        In its own form: `responses` and `scores` are those that were kept, `response_indices` their places in the row (0 is
        the first), for other lists beside them; with n = 1 `response`, `score` and `response_index`. Other columns stay;
        those with such names, as the scores that the row came with, are called input_<name>. A row of another form (a pair,
        a public set) becomes prompt and responses.
        """
        order = _best_first(scored)
        counts = self.counts
        counts.rows += 1
        counts.unscored += len(scored.scores) - len(order)
        counts.short += 0 < len(order) < self.n
        counts.none += not order
        counts.alone += not scored.answers.several
        if not order:
            return []
        kept = order[: self.n]
        counts.tied += len(order) > self.n and scored.scores[order[self.n]] == scored.scores[kept[-1]]
        scores, best = scored.scores, kept[0]
        if not scored.answers.several:
            return [self._beside(scored.row, {"score": scores[best]})]
        row, responses = self._without_answers(scored)
        if self.n == 1:
            made = {"response": responses[best], "score": scores[best], "response_index": best}
        else:
            made = {"responses": [responses[i] for i in kept], "scores": [scores[i] for i in kept]}
            made |= {"response_indices": kept}
        return [self._beside(row, made)]

    def _beside(self, row: dict, made: dict) -> dict:
        """Other columns, and what was made."""
        called = renamed(row, {"score", "scores", *made})
        changed = {name for name in row if called[name] != name}
        self.counts.renamed += sorted(changed - set(self.counts.renamed))
        return {called[name]: value for name, value in row.items()} | made

    def _without_answers(self, scored: ScoredRow) -> tuple[dict, list]:
        """(the row's other columns and its prompt, its answers)"""
        row, answers = scored.row, scored.answers
        plan = plan_of(row, self.reading)
        responses = plan.values.get("responses")
        if responses is not None and responses.text == "responses" and isinstance(row["responses"], list):
            return {name: row[name] for name in row if name != "responses"}, row["responses"]
        if answers.kind == "token ids":
            return _others(row, plan.unread), [answers.prompt + ids for ids in answers.answers]
        prompt = {"prompt": answers.prompt} if answers.prompt else {}
        return _others(row, plan.unread) | prompt | template_columns(answers.template), answers.answers

    def lines(self) -> list[str]:
        """What became of the rows, for the log."""
        counts = self.counts
        kept = counts.rows - counts.none
        lines = [f"kept the {f'{self.n} best answers' if self.n > 1 else 'best answer'} of {kept:,} rows"]
        if counts.short:
            lines.append(f"{counts.short:,} rows have fewer than {self.n} answers with a score: all of them are kept")
        if counts.tied:
            lines.append(f"{counts.tied:,} rows are cut between equal scores: the answers that stand first are kept")
        if counts.unscored:
            lines.append(f"{counts.unscored:,} answers have no score (too long, or empty) and are never kept")
        if counts.none:
            lines.append(f"{counts.none:,} rows have no answer with a score and are left out")
        return lines + _said(counts)


@dataclass
class PairCounts:
    """rows: taken.  longer, shorter, alike: pairs whose chosen answer is the longer, the shorter, or as long.
    margins: sum over pairs.  none: rows without a pair.  ties: pairs of equal scores, or rows whose best and worst are.
    repeated: answers that a row holds a second time.  unscored: answers without a score (over-length, or empty).
    near: pairs below the least margin.  turned: pairs not taken for their lengths.  second: rows that gave another pair than
    best against worst, for the same reason.  alone: rows that hold one answer by their form.
    renamed: columns of the input that are called input_<name>."""

    rows: int = 0
    longer: int = 0
    shorter: int = 0
    alike: int = 0
    margins: float = 0.0
    none: int = 0
    ties: int = 0
    repeated: int = 0
    unscored: int = 0
    near: int = 0
    turned: int = 0
    second: int = 0
    alone: int = 0
    renamed: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return self.longer + self.shorter + self.alike


@dataclass
class Pairs:
    """Preference pairs of each row: its best answer against its worst, or with min_margin every pair that is that far apart.

    reading: how the rows were read.  length_balanced: see above.  form: open_rm or trl, what is written (pair_rows.py).
    """

    reading: Reading
    min_margin: float | None = None
    length_balanced: bool = False
    form: Literal["open_rm", "trl"] = "open_rm"
    counts: PairCounts = field(default_factory=PairCounts)

    def __post_init__(self) -> None:
        self._rows = PairRows(self.form, self.reading)

    def take(self, scored: ScoredRow) -> list[dict]:
        """The row's pairs, the largest margin first. Equal scores and identical answers give none."""
        self.counts.rows += 1
        self.counts.alone += not scored.answers.several
        order = self._distinct(scored)
        if self.min_margin is None:
            pairs = self._one(scored, order)
        else:
            pairs = self._every(scored, order)
        rows = []
        for chosen, rejected in pairs:
            self.counts.margins += scored.scores[chosen] - scored.scores[rejected]
            row, changed = self._rows.row(scored, chosen, rejected)
            self.counts.renamed += [name for name in changed if name not in self.counts.renamed]
            rows.append(row)
        self.counts.none += not rows
        return rows

    def _distinct(self, scored: ScoredRow) -> list[int]:
        """Answers with a score, the best first, each once."""
        found: dict[str, int] = {}
        order = _best_first(scored)
        for i in sorted(order):
            answer = scored.answers.answers[i]
            found.setdefault(answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True), i)
        self.counts.unscored += len(scored.scores) - len(order)
        self.counts.repeated += len(order) - len(found)
        once = set(found.values())
        return [i for i in order if i in once]

    def _one(self, scored: ScoredRow, order: list[int]) -> list[tuple[int, int]]:
        if len(order) < 2:
            return []
        best, worst = order[0], order[-1]
        if scored.scores[best] == scored.scores[worst]:
            self.counts.ties += 1
            return []
        if not self.length_balanced:
            self._count(scored, best, worst)
            return [(best, worst)]
        taken = self._balanced(scored, _by_margin(scored, order), most=1)
        self.counts.second += taken not in ([], [(best, worst)])
        return taken

    def _every(self, scored: ScoredRow, order: list[int]) -> list[tuple[int, int]]:
        pairs = []
        for chosen, rejected in _by_margin(scored, order):
            margin = scored.scores[chosen] - scored.scores[rejected]
            self.counts.ties += margin == 0
            self.counts.near += 0 < margin < self.min_margin
            if margin > 0 and margin >= self.min_margin:
                pairs.append((chosen, rejected))
        if self.length_balanced:
            return self._balanced(scored, pairs, most=len(pairs))
        for pair in pairs:
            self._count(scored, *pair)
        return pairs

    def _balanced(self, scored: ScoredRow, pairs: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
        """Up to `most` of the pairs (largest margin first) such that neither count gets too far ahead."""
        waiting: dict[str, deque] = {LONGER: deque(), SHORTER: deque(), ALIKE: deque()}
        for rank, (chosen, rejected) in enumerate(pairs):
            if scored.scores[chosen] > scored.scores[rejected]:
                waiting[_side(scored, chosen, rejected)].append((rank, chosen, rejected))
        taken = []
        while len(taken) < most:
            admitted = [queue for side, queue in waiting.items() if queue and self._may_take(side)]
            if not admitted:
                break
            _, *pair = min(admitted, key=lambda queue: queue[0]).popleft()
            self._count(scored, *pair)
            taken.append(tuple(pair))
        self.counts.turned += most - len(taken)
        return taken

    def _may_take(self, side: str) -> bool:
        if side == ALIKE:
            return True
        counts = self.counts
        ahead = counts.longer - counts.shorter if side == LONGER else counts.shorter - counts.longer
        return ahead + 1 <= 1 + LEAD * counts.pairs

    def _count(self, scored: ScoredRow, chosen: int, rejected: int) -> None:
        side = _side(scored, chosen, rejected)
        setattr(self.counts, side, getattr(self.counts, side) + 1)

    def lines(self) -> list[str]:
        """What became of the rows, for the log."""
        counts, pairs = self.counts, self.counts.pairs
        which = "best against worst" if self.min_margin is None else f"every margin of at least {self.min_margin:g}"
        lines = [f"{pairs:,} pairs of {counts.rows:,} rows ({which})"]
        if pairs:
            lines[0] += f"; margin {counts.margins / pairs:.3g} on average"
            lines.append(
                f"the chosen answer is the longer one in {counts.longer / pairs:.1%}, the shorter one in {counts.shorter / pairs:.1%} "
                f"of the pairs{'' if self.length_balanced else ' (--length_balanced makes these equal)'}"
            )
        said = {
            "{:,} pairs are not taken, to balance the lengths": counts.turned,
            "{:,} rows gave another pair than best against worst, to balance the lengths": counts.second,
            "{:,} ties, of equal scores, give no pair": counts.ties,
            "{:,} answers stand a second time in their row and count once": counts.repeated,
            "{:,} pairs have a smaller margin": counts.near,
            "{:,} answers have no score (too long, or empty) and are in no pair": counts.unscored,
            "{:,} rows give no pair": counts.none,
        }
        lines += [text.format(number) for text, number in said.items() if number]
        lines += _said(counts)
        if self.form == "trl":
            lines.append(
                "score_chosen - score_rejected is the margin; there is no column of it, for TRL trains with one that it finds"
            )
        return lines


def _said(counts: BestCounts | PairCounts) -> list[str]:
    lines = []
    if counts.alone:
        lines.append(
            f"{counts.alone:,} rows hold one answer each; to select from, put all answers of a prompt into one row"
        )
    if counts.renamed:
        lines.append(f"columns of the input that are now called input_<name>: {', '.join(counts.renamed)}")
    return lines


def _best_first(scored: ScoredRow) -> list[int]:
    """Indices of the answers with a score; equal scores in the order of the row."""
    return sorted((i for i, score in enumerate(scored.scores) if score is not None), key=lambda i: -scored.scores[i])


def _by_margin(scored: ScoredRow, order: list[int]) -> list[tuple[int, int]]:
    """Every two of the answers (best first) as (chosen, rejected), the largest margin first."""
    pairs = [(better, worse) for i, better in enumerate(order) for worse in order[i + 1 :]]
    return sorted(pairs, key=lambda pair: scored.scores[pair[1]] - scored.scores[pair[0]])


def _side(scored: ScoredRow, chosen: int, rejected: int) -> str:
    """Whether the chosen answer is longer, shorter or as long: characters of its texts, or token ids."""
    chosen, rejected = (_length(scored.answers.answers[i]) for i in (chosen, rejected))
    return LONGER if chosen > rejected else SHORTER if chosen < rejected else ALIKE


def _length(answer: str | list) -> int:
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return sum(len(message["content"]) for message in answer)
    return len(answer)


def _others(row: dict, names: Iterable[str]) -> dict:
    return {name: row[name] for name in names}
