"""A set's rows through a reward model, to the rows of scores.jsonl; and whether rewards depend on what is computed beside them.

The rows are read, rendered, encoded and cut by scoring/blocks.py, as everywhere else.
Shapes: N sequences.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_rm.data.answers import Answers
from open_rm.data.comparisons import answers_of
from open_rm.errors import UserError
from open_rm.evaluation.score_file import row_of
from open_rm.evaluation.score_forms import characters_of, plain_answer, plain_prompt
from open_rm.evaluation.sets import NamedSet, only
from open_rm.scoring.blocks import EncodedRow, Encoder, batched
from open_rm.scoring.scorer import Scorer
from open_rm.scoring.streams import ScoredRow, rewards_of

BLOCK_ROWS = 128  # what is encoded and scored together
CHECKED_ROWS = 64
# Rewards are equal within it, relative to 1 + |reward|: float32 sums in another order; bfloat16 keeps 8 bits of a number.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


Written = Callable[[set[tuple[str, str]]], dict[tuple[str, str], list]]


@dataclass
class Nothing:
    """What has to be remembered from row to row."""

    nothing: None = None


@dataclass
class ScoreRows:
    """Makes a row of scores.jsonl of each scored row (streams.Maker)."""

    named: NamedSet
    tokenizer: PreTrainedTokenizerBase
    counts: Nothing = field(default_factory=Nothing)

    def take(self, scored: ScoredRow) -> list[dict]:
        """One row for each."""
        answers, named = self._readable(scored.answers), self.named
        return [
            row_of(
                set=named.name,
                benchmark=named.benchmark.name if named.benchmark else None,
                id=named.id_of(scored.row, scored.place),
                subset=named.subset_of(scored.row, scored.place),
                scores=scored.scores,
                gold=answers.given or [None] * len(answers.answers),
                characters=[0 if answer is None else characters_of(answer) for answer in answers.answers],
                overlength=scored.overlength,
                prompt=plain_prompt(answers.prompt),
                answers=[plain_answer(answer) for answer in answers.answers],
            )
        ]

    def _readable(self, answers: Answers) -> Answers:
        """Token ids as text."""
        if answers.kind != "token ids":
            return answers
        decode = self.tokenizer.decode
        texts = [None if answer is None else decode(answer) for answer in answers.answers]
        return dataclasses.replace(answers, prompt=decode(answers.prompt), answers=texts)

    def lines(self) -> list[str]:
        """Nothing more to say."""
        return []


def encoder_for(scorer: Scorer, named: NamedSet, overlength: str) -> Encoder:
    """How a set's rows become token ids: of more than max_token_length tokens a prompt loses its start, as in training."""
    most = scorer.max_token_length
    return Encoder(scorer, named.reading_for(chat=scorer.chat), overlength, cut_to=(most, most))


def score_set(named: NamedSet, encoder: Encoder, rows: Sequence[int] | None = None) -> Iterator[list[dict]]:
    """Rows of scores.jsonl, a block at a time, in the set's order.

    encoder: of the model; its reading is replaced by the set's.  rows: numbers of the rows to score, rising; None: all.

    Raises:
        UserError: a row that cannot be scored.
    """
    encoder = dataclasses.replace(encoder, reading=named.reading_for(chat=encoder.scorer.chat))
    maker = ScoreRows(named, encoder.scorer.tokenizer)
    for raw in batched(only(rows, named.opened)(), BLOCK_ROWS):
        good, faults = encoder.rows(raw)
        if faults:
            number = min(faults)
            raise UserError(f"{raw[number][0]}: {faults[number]}")
        encoded = [good[number] for number in sorted(good)]
        scores = rewards_of(encoder.scorer, encoded)
        found = (
            ScoredRow(row.place, row.row, row.answers, own, row.overlength)
            for row, own in zip(encoded, scores, strict=True)
        )
        yield [made for scored in found for made in maker.take(scored)]


# ---- does a reward depend on what is computed beside it


def check_invariance(
    sets: Sequence[NamedSet], encoder: Encoder, rows: int = CHECKED_ROWS, seed: int = 1, written: Written | None = None
) -> dict:
    """Rewards of some rows again, in other company: the report's "invariance".

    Args:
        encoder: of the model; its reading is replaced by each set's.
        rows: how many, of all sets together, drawn by `seed`.
        written: {(set, id)} to the scores of these rows that were written, to be compared with; None: those of one call for all.

    Returns:
        rows, tolerance (relative to 1 + |reward|), and of each check `what`, `largest` absolute difference, `flips` (pairs of a
        row's answers of which another one is preferred), `exact` (no flip, within the tolerance); `says` in a sentence.
    """
    sample = _Sample(sets, encoder, rows, seed)
    scorer = encoder.scorer
    base = sample.written(written) if written is not None else sample.rewards()
    tolerance = TOLERANCE[scorer.dtype]
    smaller = max(1, scorer.machine["--max_tokens_per_micro_batch"] // 3)
    found = {
        "one sequence at a time": sample.rewards(max_tokens=1),
        f"micro-batches of {smaller:,} positions": sample.rewards(max_tokens=smaller),
        "answers in the other order": sample.turned_round(),
    }
    if scorer.layout not in ("padded", "own forward"):
        found["padded rows"] = sample.rewards(padded=True)
    if written is not None:
        found["these rows alone"] = sample.rewards()
    checks = [sample.compared(what, base, rewards, tolerance) for what, rewards in found.items()]
    return {
        "rows": len(sample),
        "tolerance": tolerance,
        "checks": checks,
        "says": _says(len(sample), checks, tolerance),
    }


class _Sample:
    """Some rows of all sets, encoded. Rewards are [N] float64, answers of all rows together; nan: not scored."""

    def __init__(self, sets: Sequence[NamedSet], encoder: Encoder, rows: int, seed: int):
        self.encoder, self.keys, self.rows, self.turned = encoder, [], [], []
        random = np.random.default_rng(seed)
        for number, named in enumerate(sets):
            count = rows * (number + 1) // len(sets) - rows * number // len(sets)
            size = named.opened.size
            drawn = sorted(random.choice(size, min(count, size), replace=False).tolist())
            of_set = dataclasses.replace(encoder, reading=named.reading_for(chat=encoder.scorer.chat))
            raw = list(only(drawn, named.opened)())
            good, _ = of_set.rows(raw)
            turned = [_turned(row) for _, row in raw]
            others, _ = of_set.rows([(place, row) for (place, _), (row, _) in zip(raw, turned, strict=True)])
            for i, row in good.items():
                self.rows.append(row)
                self.keys.append((named.name, named.id_of(row.row, row.place)))
                places = turned[i][1]
                known = i in others and places is not None and len(places) == len(row.ids) == len(others[i].ids)
                self.turned.append((others[i], places) if known else (row, np.arange(len(row.ids))))
        self.first = np.cumsum([0, *(len(row.ids) for row in self.rows)])

    def __len__(self) -> int:
        return len(self.rows)

    def rewards(self, rows: list[EncodedRow] | None = None, **how) -> np.ndarray:
        rows = self.rows if rows is None else rows
        ids = [one for row in rows for one in row.ids]
        prompt_of = np.repeat(np.arange(len(rows)), [len(row.ids) for row in rows])
        there = [i for i, one in enumerate(ids) if one is not None]
        found = np.full(len(ids), np.nan)
        if there:
            found[there] = self.encoder.scorer.rewards([ids[i] for i in there], prompt_of[there], **how)
        return found

    def turned_round(self) -> np.ndarray:
        """Of the rows, last first, each with its answers in the other order; given in the order of all other calls."""
        rows = [row for row, _ in self.turned[::-1]]
        ends = np.cumsum([len(row.ids) for row in rows])
        parts = np.split(self.rewards(rows), ends[:-1])[::-1] if rows else []
        placed = [part[places] for part, (_, places) in zip(parts, self.turned, strict=True)]
        return np.concatenate(placed) if placed else np.zeros(0)

    def written(self, written: Written) -> np.ndarray:
        scores = written(set(self.keys))
        values = [score for key in self.keys for score in scores[key]]
        return np.array([np.nan if score is None else score for score in values])

    def compared(self, what: str, base: np.ndarray, other: np.ndarray, tolerance: float) -> dict:
        # written scores are the shortest decimals of float32 numbers; as such they are equal again
        difference = np.abs(base.astype(np.float32) - other.astype(np.float32)).astype(float)
        same_gaps = np.array_equal(np.isnan(base), np.isnan(other))
        flips = sum(_flips(base[a:b], other[a:b]) for a, b in itertools.pairwise(self.first))
        within = bool(np.all((difference <= tolerance * (1 + np.abs(base))) | np.isnan(base)))
        largest = float(np.nanmax(difference)) if np.isfinite(difference).any() else 0.0
        return {"what": what, "largest": largest, "flips": flips, "exact": within and same_gaps and not flips}


def _flips(base: np.ndarray, other: np.ndarray) -> int:
    """Pairs of a row's answers that the one prefers otherwise than the other."""
    one, two = np.triu_indices(len(base), 1)
    before, after = np.sign(base[one] - base[two]), np.sign(other[one] - other[two])
    return int(((before != after) & ~np.isnan(before)).sum())


TURNED = (("chosen", "rejected"), ("response_a", "response_b"), ("response_A", "response_B"))


def _turned(row: object) -> tuple[object, np.ndarray | None]:
    """(the row with its answers in the other order, where in it each of the row's answers stands); the same and None where
    their columns have other names."""
    if not isinstance(row, dict):
        return row, None
    for one, other in TURNED:
        if one in row and other in row:
            before, behind = len(answers_of(row[one])), len(answers_of(row[other]))
            return row | {one: row[other], other: row[one]}, np.r_[np.arange(before) + behind, np.arange(behind)]
    if isinstance(row.get("responses"), list):
        both = {name: row[name][::-1] for name in ("responses", "scores") if isinstance(row.get(name), list)}
        return row | both, np.arange(len(row["responses"]))[::-1]
    return row, None


def _says(rows: int, checks: list[dict], tolerance: float) -> str:
    flips, largest = sum(check["flips"] for check in checks), max(check["largest"] for check in checks)
    what = f"{rows} rows scored again in other company ({', '.join(check['what'] for check in checks)})"
    if all(check["exact"] for check in checks):
        size = "bit for bit the same" if not largest else f"the same within {largest:.1e}"
        return f"{what}: {size}, no decision differs"
    worst = f"rewards differ by up to {largest:.2g} (allowed: {tolerance:g} x (1 + |reward|))"
    decided = f"{flips} preferences change" if flips else "no preference changes"
    return f"{what}: {worst}, {decided}"
