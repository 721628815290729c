"""How rows of scores are written: our own lines, and what others' tools leave.

The first row of a file says which form it is; the others have to be of the same one.

    ours             set, id, scores, gold                                    (score_file.py)
    JudgeBench       source, label, score_A, score_B; or its own outputs, with judgments
    RMB              pair_uid, category_path, chosen_reward, reject_reward
    RewardBench      subset, id, scores_chosen, scores_rejected; an object of columns too
    RewardBench 2    subset, id, scores, num_correct
    RM-Bench         id, score_chosen [3], score_rejected [3], domain
    pairs            a chosen and a rejected score under any of the names in PAIRS, each a number or a list
    python -m open_rm.scoring score     the row as it was, with scores
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from open_rm.data.answers import Answers, read_answers
from open_rm.errors import UserError, quote
from open_rm.evaluation.rules.known import BENCHMARKS

NOTHING = math.nan
GREATEST = 1e100  # of scores: sums and squares of such ones, and of their differences, are still finite
# Names of a chosen and a rejected score, and whose benchmark writes them where the rows have these columns too.
PAIRS = (
    ("scores_chosen", "scores_rejected"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_scores", "rejected_scores"),
    ("chosen_reward", "reject_reward"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("chosen", "rejected"),  # numbers, as RewardBench's --save_all writes them
)
OF_DATA = (
    "score_chosen",
    "score_rejected",
)  # so UltraFeedback and what was made like it call the scores that chose the answers
SCORED_HERE = ("score", "scores", "judge_score", "judge_scores", "overlength")  # columns that open_rm.scoring adds
LABELS = {"A>B": [1.0, 0.0], "B>A": [0.0, 1.0]}


@dataclass(frozen=True)
class ScoreRow:
    """A row in numbers. scores, gold: nan where there is none.  characters, tokens: -1 where not known."""

    set: str
    benchmark: str | None
    id: str
    subset: str
    scores: list[float]
    gold: list[float]
    characters: list[int]
    tokens: list[int]
    overlength: list[bool]


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one file. own: they are lines of scores.jsonl."""

    read: Callable[[dict, str], ScoreRow]
    own: bool

    def __call__(self, row: dict, place: str) -> ScoreRow:
        return self.read(row, place)


def reader_of(row: dict, name: str, benchmark: str | None, place: str) -> Reader:
    """What reads the rows of a file that begins with this one.

    name: of the set where the rows do not say it.  benchmark: whose rows they are; None: what the form says.

    Raises:
        UserError: it is of no form with scores.
    """
    if {"set", "scores"} <= row.keys():
        return Reader(lambda row, place: _own(row, place, benchmark), True)
    if all(isinstance(row.get(name), list) for name in ("scores", "gold")):
        raise UserError(f"{place}: no set, the name of what the row is of; lines of scores.jsonl begin with it")
    for form, is_of, read, whose in FORMS:
        if is_of(row):
            own = benchmark or (whose(row) if callable(whose) else whose)
            return Reader(_Elsewhere(form, is_of, read, own, own or name), False)
    if "score" in row:
        raise UserError(
            f"{place}: one score a row, so no answer stands beside another one; score rows of pairs or of several answers"
        )
    raise UserError(
        f"{place}: no scores under any name that is known (columns {quote(list(row), 120)}); write rows with chosen_score and "
        "rejected_score, or lines of scores.jsonl (docs/evaluation.md)"
    )


def numbered(count: int) -> str:
    """The id of a row that says none: the count-th of its file, from 1."""
    return f"row {count}"


class _Elsewhere:
    """Reads rows of one form that others wrote."""

    def __init__(self, form: str, is_of: Callable, read: Callable, benchmark: str | None, name: str) -> None:
        self.form, self.is_of, self.read, self.benchmark, self.name = form, is_of, read, benchmark, name
        self.count = 0

    def __call__(self, row: dict, place: str) -> ScoreRow:
        self.count += 1
        if not self.is_of(row):
            raise UserError(f"{place}: not of the form of the rows before it ({self.form}); write one form a file")
        if len(found := sets_of_scores(row)) > 1:
            both = ", and ".join(" and ".join(names) for names in found)
            raise UserError(
                f"{place}: more than one set of scores ({both}); keep the model's, and remove or rename the others"
            )
        answers = _answers_in(row)
        scores, gold = self.read(row, place, answers)
        scores = _numbers(scores, "scores", place)
        gold = _numbers(gold, "gold scores", place) if gold else [NOTHING] * len(scores)
        return ScoreRow(
            self.name,
            self.benchmark,
            self._id(row, place),
            self._subset(row, place),
            scores,
            gold,
            _counts(row, len(scores), answers),
            [-1] * len(scores),
            _flags(row.get("overlength"), len(scores), place),
        )

    def _id(self, row: dict, place: str) -> str:
        if self.benchmark is not None:
            found = BENCHMARKS[self.benchmark].id_of(row, place)
            return numbered(self.count) if found == place else found  # no id, as in RM-Bench's lists
        found = next((row[name] for name in ("id", "pair_id") if row.get(name) is not None), None)
        return numbered(self.count) if found is None else str(found)

    def _subset(self, row: dict, place: str) -> str:
        if self.benchmark is not None:
            return BENCHMARKS[self.benchmark].subset_of(row, place)
        found = (row.get(name) for name in ("subset", "source", "category", "domain"))
        return next((value.strip() for value in found if isinstance(value, str) and value.strip()), "")


# ---- our own lines


def _own(row: dict, place: str, benchmark: str | None) -> ScoreRow:
    name, id = row.get("set"), row.get("id")
    if not isinstance(name, str) or not name:
        raise UserError(f"{place}: no set, the name of what the row is of")
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        raise UserError(f"{place}: no id, which tells a row of {name} from the others; give each its own")
    named = row.get("benchmark")
    if named is not None and named not in BENCHMARKS:
        raise UserError(f"{place}: {quote(named)} is no benchmark that is known here; they are {', '.join(BENCHMARKS)}")
    if named is not None and benchmark not in (None, named):
        raise UserError(
            f"{place}: the row is of benchmark {named}, and --benchmark says {benchmark}; leave the flag out"
        )
    subset = row.get("subset", "")
    if not isinstance(subset, str):
        raise UserError(f"{place}: subset must be text, not {quote(subset)}")
    scores = _numbers(row.get("scores"), "scores", place)
    gold = _numbers(row.get("gold"), "gold", place)
    if len(gold) != len(scores):
        raise UserError(
            f"{place}: {len(scores)} scores and {len(gold)} of gold; each answer has one of both (null: not known)"
        )
    return ScoreRow(
        name,
        named or benchmark,
        str(id),
        subset,
        scores,
        gold,
        _counts_of(row, "characters", len(scores), place),
        _counts_of(row, "tokens", len(scores), place),
        _flags(row.get("overlength"), len(scores), place),
    )


def _numbers(values: object, what: str, place: str) -> list[float]:
    """A list of numbers, nan for null."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{place}: {what} must be a list of numbers, one for each answer, not {quote(values)}")
    made = []
    for value in values:
        if value is None:
            made.append(NOTHING)
        elif type(value) in (float, int) and abs(value) <= GREATEST:
            made.append(value)
        else:
            raise UserError(
                f"{place}: {quote(value)} among its {what} is no finite number from {-GREATEST:g} to {GREATEST:g}; write null where "
                "there is none"
            )
    return made


def _counts_of(row: dict, name: str, size: int, place: str) -> list[int]:
    values = row.get(name)
    if values is None:
        answers = row.get("answers")
        if name == "characters" and isinstance(answers, list) and len(answers) == size:
            return [characters_of(answer) for answer in answers]
        return [-1] * size
    if isinstance(values, list) and len(values) == size:
        made = [-1 if value is None else value for value in values]
        if all(type(value) is int and -1 <= value < 2**62 for value in made):
            return made
    raise UserError(f"{place}: {name} must be a list of {size} whole numbers (null: not known), not {quote(values)}")


def _flags(value: object, size: int, place: str) -> list[bool]:
    if value is None:
        return [False] * size
    values = value if isinstance(value, list) else [value] * size
    if len(values) == size and all(isinstance(flag, bool) for flag in values):
        return values
    raise UserError(f"{place}: overlength must be a list of {size} true or false, not {quote(value)}")


def characters_of(answer: object) -> int:
    """Of an answer of text or messages; -1 where it is neither."""
    if isinstance(answer, str):
        return len(answer)
    if isinstance(answer, list) and answer and all(isinstance(message, dict) for message in answer):
        return sum(len(message["content"]) for message in answer if isinstance(message.get("content"), str))
    return -1


def texts_of(row: dict, *, own: bool) -> tuple[object, list] | None:
    """Prompt and answers of a row as it was read; None where it has none."""
    if own:
        answers = row.get("answers")
        return (row.get("prompt"), answers) if isinstance(answers, list) and answers else None
    found = _answers_in(row)
    return None if found is None else (plain_prompt(found.prompt), [plain_answer(answer) for answer in found.answers])


def plain_prompt(prompt: str | list) -> str | list:
    """As a line has it (Answers.prompt): text where it is one question of a user, else its messages."""
    return prompt[0]["content"] if len(prompt) == 1 and _is_text(prompt[0], "user") else prompt


def plain_answer(answer: str | list | None) -> str | list:
    """As a line has it (one of Answers.answers): text where it is one message of an assistant, else its messages; empty: ""."""
    if answer is None:
        return ""
    return answer[0]["content"] if len(answer) == 1 and _is_text(answer[0], "assistant") else answer


def _is_text(message: object, role: str) -> bool:
    return isinstance(message, dict) and message.keys() == {"role", "content"} and message["role"] == role


# ---- forms of others


def is_columns(value: object) -> bool:
    """Whether an object holds columns of rows, not one row: its subsets or ids are lists."""
    return isinstance(value, dict) and any(isinstance(value.get(name), list) for name in ("subset", "id"))


def rows_of_columns(value: object, place: str) -> list[dict]:
    """Rows of an object whose lists are columns; what is no list is said once for all rows."""
    if not is_columns(value):
        return [value]
    columns = {name: column for name, column in value.items() if isinstance(column, list)}
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{place}: its columns are of different lengths ({quote(sizes, 120)}); write the file again")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _is_score(value: object) -> bool:
    return all(item is None or isinstance(item, float | int) for item in _listed(value))


def _pair_names(row: dict) -> tuple[str, str] | None:
    return next(
        (both for both in PAIRS if all(name in row for name in both) and all(_is_score(row[n]) for n in both)), None
    )


def sets_of_scores(row: dict) -> list[tuple[str, ...]]:
    """The columns of each set of scores in a row that others wrote; open_rm.scoring's are the model's, whatever is beside them."""
    if {"scores", "overlength"} <= row.keys():
        return [("scores",)]
    found = [both for both in PAIRS if all(name in row and _is_score(row[name]) for name in both)]
    if found[1:] and found[-1] == PAIRS[-1] and row["chosen"] in (None, []):  # texts that were left out
        found.pop()
    found += [("score_A", "score_B")] if {"score_A", "score_B"} <= row.keys() else []
    return found + ([("scores",)] if isinstance(row.get("scores"), list) else [])


def _read_pairs(row: dict, place: str, answers: Answers | None) -> tuple[list, list]:
    chosen, rejected = (_unwrapped(row[name]) for name in _pair_names(row))
    return chosen + rejected, [1.0] * len(chosen) + [0.0] * len(rejected)


def _unwrapped(value: object) -> list:
    """A number, a list of numbers; of a list of lists of one each (some models' outputs) the numbers."""
    return [item[0] if isinstance(item, list) and len(item) == 1 else item for item in _listed(value)]


def _benchmark_of_pairs(row: dict) -> str | None:
    names = _pair_names(row)
    if "category_path" in row and names == ("chosen_reward", "reject_reward"):
        return "rmb"
    if all(isinstance(row[name], list) and len(row[name]) == 3 for name in names):
        return "rm_bench"
    return "reward_bench" if names == ("scores_chosen", "scores_rejected") and {"subset", "id"} <= row.keys() else None


def _read_judge_bench(row: dict, place: str, answers: Answers | None) -> tuple[list, list]:
    gold = LABELS.get(str(row.get("label")).replace(" ", ""))
    if gold is None:
        raise UserError(f"{place}: label must be A>B or B>A, not {quote(row.get('label'))}")
    if "judgments" not in row:
        return [row["score_A"], row["score_B"]], gold
    try:
        return row["judgments"][0]["judgment"]["scores"], gold
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{place}: its judgments hold no scores, which only reward models give; judge another file"
        ) from error


def _read_reward_bench_2(row: dict, place: str, answers: Answers | None) -> tuple[list, list]:
    scores, right = _unwrapped(row["scores"]), row["num_correct"]
    if type(right) is not int or not 0 < right <= len(scores):
        raise UserError(
            f"{place}: num_correct must be the number of right answers among {len(scores)}, not {quote(right)}"
        )
    return scores, [1.0] * right + [0.0] * (len(scores) - right)


def _as_it_was(row: dict) -> dict:
    """A row before open_rm.scoring added its scores, or without the scores of others."""
    row = {name: value for name, value in row.items() if name not in SCORED_HERE}
    for name in SCORED_HERE:
        if (before := f"input_{name}") in row:
            row[name] = row.pop(before)
    for both in PAIRS[:-1]:
        if all(name in row for name in both):
            row = {name: value for name, value in row.items() if name not in both}
    return row


def _read_scored_here(row: dict, place: str, answers: Answers | None) -> tuple[list, list]:
    if answers is None:
        raise UserError(
            f"{place}: scores without the answers they are of; write the rows as open_rm.scoring does, or scores.jsonl"
        )
    if not isinstance(row["scores"], list) or len(row["scores"]) != len(answers.answers):
        raise UserError(f"{place}: {quote(row['scores'])} are not the scores of its {len(answers.answers)} answers")
    return row["scores"], answers.given or []


def _answers_in(row: dict) -> Answers | None:
    """The answers of a row that others wrote; None where it holds none, as rows of scores alone."""
    try:
        return read_answers(_as_it_was(row))
    except UserError:
        return None


def _counts(row: dict, size: int, answers: Answers | None) -> list[int]:
    """Lengths of the answers of a row that others wrote, where it holds them or says them."""
    said = [row.get(f"characters_{side}") for side in "AB"]
    if size == 2 and all(type(count) is int for count in said):
        return said
    if answers is None or len(answers.answers) != size:
        return [-1] * size
    return [0 if answer is None else characters_of(answer) for answer in answers.answers]


# (what it is called, whether a row is of it, what reads its scores and gold, whose benchmark)
SCORED = "scores of python -m open_rm.scoring"
FORMS = (
    (SCORED, lambda row: {"scores", "overlength"} <= row.keys(), _read_scored_here, None),
    ("JudgeBench's scores", lambda row: {"score_A", "score_B"} <= row.keys(), _read_judge_bench, "judge_bench"),
    ("JudgeBench's outputs", lambda row: {"judgments", "label"} <= row.keys(), _read_judge_bench, "judge_bench"),
    (
        "RewardBench 2's scores",
        lambda row: {"scores", "num_correct", "subset"} <= row.keys(),
        _read_reward_bench_2,
        "reward_bench_2",
    ),
    ("chosen and rejected scores", _pair_names, _read_pairs, _benchmark_of_pairs),
    (SCORED, lambda row: "scores" in row, _read_scored_here, None),
)
