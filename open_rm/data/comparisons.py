"""Who won, from a row's values: pairs whose sides are not yet checked, and ties.

labels.py says what a label, a strength or scores mean; here they meet the row's answers and its margin.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from open_rm.data import labels, sides
from open_rm.data.columns import Plan, columns_of, suspicion
from open_rm.data.forms import OWN_NAMES
from open_rm.data.messages import check_messages, from_json, has_turn, is_message
from open_rm.data.reading import SCORES, Reading
from open_rm.errors import UserError, quote


class Unchecked(NamedTuple):
    """A pair whose sides are not yet checked.

    margin: by how much the better side is better.  label_prob: how probable it is that chosen is that side, 0 to 1.
    levels: places in a list of the better side and of the other one.
    answers: the numbers of chosen and rejected among the row's answers, chosen ones before rejected ones, a before b.
    """

    prompt: object
    chosen: object
    rejected: object
    margin: float | None = None
    label_prob: float = 1.0
    levels: tuple[int, int] = (0, 1)
    answers: tuple[int, int] = (0, 1)


@dataclass
class Values:
    """A row on its way to pairs.

    row: as it stands in the file.  found: our column -> value.
    oddities: what is odd and yet readable, gathered on the way: keys of rows.ODDITIES.
    probability: that chosen, or the winner, is the better one, where the row says it.
    attributes: those of each answer (attributes.py), where the row was joined from rows of one.
    repeated: whether all answers of a row that may hold more than two begin with its prompt, once that is known.
    """

    row: dict
    plan: Plan
    reading: Reading
    found: dict
    oddities: list[str] = field(default_factory=list)
    probability: float | None = None
    attributes: list[tuple[float, ...]] | None = None
    repeated: bool | None = None

    @property
    def keep_ties(self) -> bool:
        """Whether two answers that are as good are a pair; where the row itself says 0.5 they always are."""
        return self.reading.keep_ties or self.probability == labels.TIE

    @property
    def is_tie(self) -> bool:
        """Whether a column of the form says so (forms.Form.tie) that is not ignored."""
        tie = self.plan.form.tie
        return bool(tie) and tie[0] not in self.reading.ignore and self.row.get(tie[0]) == tie[1]

    def messages(self, name: str) -> list[dict]:
        """One of our columns as checked messages."""
        return check_messages(name, self.found[name], self.reading.ignore)


def comparisons(values: Values) -> tuple[list[Unchecked], int]:
    """(pairs, ties that are not among them)"""
    values.probability = labels.probability(values.found)
    pairs, ties = ([], 1) if values.is_tie and not values.keep_ties else _decided(values)
    pairs = [_tied(pair) for pair in pairs] if values.is_tie else pairs
    return (pairs, ties) if values.probability is None else (_as_probable(values, pairs, ties), ties)


def _tied(pair: Unchecked) -> Unchecked:
    """The same as a tie."""
    return pair._replace(margin=None if pair.margin is None else 0.0, label_prob=labels.TIE, levels=(0, 0))


def _as_probable(values: Values, pairs: list[Unchecked], ties: int) -> list[Unchecked]:
    """The pair of a row that says how probable it is that chosen is the better one."""
    p = values.probability
    if len(pairs) + ties > 1:
        raise UserError(
            f"the row gives {len(pairs) + ties} pairs, and its one probability ({p:g}) cannot be that of all; write a row for "
            "each pair"
        )
    if p != labels.TIE and (ties or pairs[0].label_prob == labels.TIE):
        raise UserError(
            f"the row is a tie, and its votes or label_prob say {p:g} for one side; correct it, or leave one of both out with "
            "--ignore_columns"
        )
    if p == labels.TIE:
        return [_tied(pair) for pair in pairs]
    if p < labels.TIE:
        where = (
            "label_prob below 0.5" if values.found.get("label_prob") not in (None, "") else "more votes for rejected"
        )
        values.oddities.append(f"less likely: {where}")
    return [pair._replace(label_prob=p) for pair in pairs]


def _decided(values: Values) -> tuple[list[Unchecked], int]:
    """The pairs and the ties that are dropped, by what decides in a row of this shape."""
    found, shape, prompt = values.found, values.plan.shape, values.found.get("prompt")
    if shape == "ranked" or "responses" in found:
        return _of_list(values, prompt)
    if shape in ("winner", "strength", "two scores"):
        return _of_two(values)
    if shape == "pairs":
        return _of_sides(values, prompt)
    margin = _margin(values)
    given = two_sides(values)
    if given is None:  # one answer alone prefers nothing
        raise UserError("a row of one answer among rows of other forms; name its form with --dataset_format")
    return [Unchecked(*given, margin)], 0


def two_sides(values: Values) -> tuple[object, object, object] | None:
    """(prompt, chosen, rejected) of a row whose columns name them, as they stand; None for other shapes."""
    found, shape, prompt = values.found, values.plan.shape, values.found.get("prompt")
    if shape == "token ids":
        return found.get("prompt_input_ids"), found["chosen_input_ids"], found["rejected_input_ids"]
    if shape == "conversations":
        return prompt, found["messages"], found["rejected_messages"]
    if shape == "answers":
        return _beside(prompt, values.messages("messages")), found["chosen_response"], found["rejected_response"]
    if shape == "last answer":
        messages = values.messages("messages")
        sides.ends_with_answer("messages", messages)
        return _beside(prompt, messages[:-1]), messages[-1:], values.messages("rejected_response")
    return None


def _beside(prompt, messages: list[dict]):
    """The prompt of a row that has both messages and a prompt column: the messages, of which the other has to be a part."""
    if prompt in (None, "", []) or not messages:
        return messages or prompt
    if not (has_turn(messages, prompt) if isinstance(prompt, str) else messages == check_messages("prompt", prompt)):
        raise UserError(
            "prompt and messages say different things; correct the row, or leave one out (--ignore_columns prompt)"
        )
    return messages


def _of_list(values: Values, prompt) -> tuple[list[Unchecked], int]:
    found, reading, form = values.found, values.reading, values.plan.form
    responses, scores = found["responses"], found.get("scores")
    if scores in (None, "") and "scores" in values.plan.values:  # else the list would be read as ranked, the best first
        where = values.plan.values["scores"].written
        raise UserError(
            f"no value for {where}, the scores of the responses; correct or remove the row, or where lists stand with the best "
            f"first leave the column out (--ignore_columns {where})"
        )
    responses = responses_of(responses)
    numbers = range(len(responses) if isinstance(responses, list) else 0)  # of the answers in the row
    lenient = form.gaps or values.plan.shape == "rows"
    if lenient and isinstance(responses, list) and isinstance(scores, list):
        responses, scores, numbers = _without_gaps(values, responses, scores)
        if len(responses) < 2:
            values.oddities.append("lonely")
            return [], 0
    if reading.margin_from not in (None, (SCORES,)) or found.get("margin") not in (None, ""):
        raise UserError(
            "a ranked list gives many pairs, and one margin cannot be that of all; remove margin, or pass --margin_from "
            f"{SCORES} for the difference of their scores"
        )
    if reading.margin_from and scores is None:
        raise UserError(f"--margin_from {SCORES}: the row has no scores; remove the flag, or map scores")
    if scores is None:
        values.oddities.append("in order")
    pairs = labels.ranked(responses, scores, values.plan.lower_is_better)
    # of the scores of a public set the direction is known
    is_own = form.name in OWN_NAMES or bool({"scores", "score"} & reading.column_map.keys())
    if reading.lower_is_better is None and not form.lower_is_better and is_own and labels.looks_like_ranks(scores):
        values.oddities.append("ranks")
    kept = [pair for pair in pairs if not pair.alike and (values.keep_ties or not pair.is_tie)]
    with_margin = reading.margin_from is not None
    return [
        Unchecked(
            prompt,
            pair.better,
            pair.worse,
            pair.lead if with_margin else None,
            labels.TIE if pair.is_tie else 1.0,
            pair.levels,
            tuple(numbers[i] for i in pair.answers),
        )
        for pair in kept
    ], len(pairs) - len(kept)


def responses_of(given: object) -> object:
    """The responses of a list, of which some may be JSON text of messages; anything else as it is."""
    if not isinstance(given, list):
        return given
    return [from_json("responses", text) if isinstance(text, str) else text for text in given]


def _without_gaps(values: Values, responses: list, scores: list) -> tuple[list, list, list[int]]:
    """The answers that have both text and score: texts, scores, and their numbers in the row."""
    if len(responses) != len(scores):
        raise UserError(f"there are {len(responses)} responses and {len(scores)} scores; correct or remove the row")
    both = list(zip(responses, scores, strict=True))
    kept = [
        number
        for number, (text, score) in enumerate(both)
        if (text.strip() if isinstance(text, str) else text) and score is not None
    ]
    if both and all(score is None for _, score in both):
        where = (values.plan.values.get("scores") or values.plan.values["score"]).written
        raise UserError(f"no answer has a score in {where}; name others with --column_map scores=... (docs/data.md)")
    if len(kept) < len(both):
        values.oddities.append("left out")
    return [responses[i] for i in kept], [scores[i] for i in kept], kept


def two_answers(values: Values) -> tuple[object, list]:
    """(prompt, answers a and b) as far as they were judged."""
    found, form, prompt = values.found, values.plan.form, values.found.get("prompt")
    two = [found["response_a"], found["response_b"]]
    turns = values.row.get(form.turn) if form.turn else None
    if turns not in (None, ""):
        two = [_up_to(int(labels.number(form.turn, turns)), side) for side in two]
    if isinstance(prompt, list) and prompt and all(isinstance(turn, str) for turn in prompt):
        return None, [_turns(prompt, answers) for answers in two]
    return prompt, two


def _of_two(values: Values) -> tuple[list[Unchecked], int]:
    found, plan, lead = values.found, values.plan, None
    if plan.shape == "winner":
        winner = labels.winner_of(found["winner"], plan.labels)
    elif plan.shape == "strength":
        winner, lead = labels.winner_of_strength(found["strength"])
    else:
        winner, lead = labels.winner_of_scores(found, plan.lower_is_better)
    # A set's word for "nobody voted" may be among its ties, and says nothing that could be trained on.
    is_voted = plan.shape != "winner" or str(found["winner"]).strip().lower() != "none"
    if winner == "tie" and not (values.keep_ties and is_voted):
        return [], 1
    prompt, two = two_answers(values)
    margin_from = values.reading.margin_from
    is_margin = margin_from == (SCORES,) or (margin_from is None and plan.shape == "strength")
    if winner == "tie":
        has_margin = is_margin or margin_from or found.get("margin") not in (None, "")
        return [_tied(Unchecked(prompt, *two, 0.0 if has_margin else None))], 0
    if not (is_margin and lead is not None) or found.get("margin") not in (None, ""):
        lead = _margin(values, swapped=winner == "b")
    else:
        lead = _checked_margin(values, lead, plan.shape)
    first = ("a", "b").index(winner)
    pair = Unchecked(prompt, two[first], two[1 - first], lead, answers=(first, 1 - first))
    if _is_equal(values, lead):
        return ([_tied(pair)], 0) if values.keep_ties else ([], 1)
    return [pair], 0


def _is_equal(values: Values, margin: float | None) -> bool:
    """Whether the scores of --margin_from are equal, where nothing else says how sure it is who won."""
    return bool(values.reading.margin_from) and margin == 0 and values.probability is None


def _up_to(turns: int, side: object) -> object:
    """A conversation up to its n-th answer, since a vote on an earlier turn (MT-bench) is about no later one."""
    if not isinstance(side, list):
        return side
    answers = [i for i, message in enumerate(side) if is_message(message) and message.get("role") == "assistant"]
    return side[: answers[turns - 1] + 1] if 0 < turns < len(answers) else side


def _turns(prompt: list[str], answers: object) -> list[dict]:
    """Turns of a user and of a model in two lists, as the arena's files hold them, to one conversation."""
    if not isinstance(answers, list) or len(answers) != len(prompt):
        what = f"{len(answers)} answers" if isinstance(answers, list) else type(answers).__name__
        raise UserError(f"the prompt is a list of {len(prompt)} turns, and there are not as many answers: {what}")
    said = [text for turn in zip(prompt, answers, strict=True) for text in turn]
    if any(not isinstance(text, str) or not text.strip() for text in said):
        raise UserError("a turn of the conversation is empty; remove the row")
    roles = ("user", "assistant") * len(prompt)
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]


def _of_sides(values: Values, prompt) -> tuple[list[Unchecked], int]:
    chosen, rejected = answers_of(values.found["chosen"]), answers_of(values.found["rejected"])
    if {"chosen", "rejected"} <= values.reading.column_map.keys():
        _check_no_label_is_left(values)
    margin = _margin(values)
    pairs = [
        Unchecked(prompt, good, bad, margin, answers=(i, len(chosen) + j))
        for i, good in enumerate(chosen)
        for j, bad in enumerate(rejected)
    ]
    if _is_equal(values, margin):
        return ([_tied(pair) for pair in pairs], 0) if values.keep_ties else ([], len(pairs))
    if values.plan.twins:
        _compare_twins(values, values.plan.twins)
    return pairs, 0


def _check_no_label_is_left(values: Values) -> None:
    """Two columns that are mapped to chosen and rejected must not have a label beside them, by which either may be better."""
    a, b = (values.plan.values[name].written for name in ("chosen", "rejected"))
    for name in values.plan.unread:
        value = values.row[name]
        if suspicion(name, value) == "label" and str(value).strip().lower() in (
            *labels.WINNERS,
            *labels.TIES,
            a.lower(),
            b.lower(),
        ):
            raise UserError(
                f"the column {name} says which answer is better ({quote(value)}) and is not read; write --column_map "
                f"response_a={a} response_b={b} winner={name}, or leave it out with --ignore_columns {name}"
            )


def answers_of(value: object) -> list:
    """The answers of a side: one, or those of a list of texts or of conversations (RewardBench 2, RM-Bench)."""
    if not isinstance(value, list) or not value or any(map(is_message, value)):
        return [value]
    alike = all(isinstance(entry, str) for entry in value) or all(isinstance(entry, list) for entry in value)
    return value if alike else [value]


def every_answer(values: Values) -> list:
    """All answers of a row that may hold more than two, as they stand; none of other rows."""
    found = values.found
    if "responses" in found:
        return found["responses"] if isinstance(found["responses"], list) else []
    return answers_of(found["chosen"]) + answers_of(found["rejected"]) if values.plan.shape == "pairs" else []


def _compare_twins(values: Values, twins: tuple[str, str]) -> None:
    """Whether scores beside chosen and rejected agree with it; words such as N/A say nothing."""
    try:
        better, worse = (labels.number(name, values.row[name]) for name in twins)
    except UserError:
        return
    if better == worse:
        values.oddities.append(f"equal scores: {twins[0]} and {twins[1]}")
    elif better < worse:
        values.oddities.append(f"contrary scores: {twins[0]} below {twins[1]}")


def _margin(values: Values, swapped: bool = False) -> float | None:
    """By how much the better side is better; never negative. swapped: of labelled rows, whose columns are those of a and b."""
    names, row = values.reading.margin_from, values.row
    if names == (SCORES,):
        raise UserError(
            f"--margin_from {SCORES}: no scores decide rows of this form; name two columns, or remove the flag"
        )
    if names:
        if lacking := [name for name in names if row.get(name) is None]:
            raise UserError(f"no value for {lacking[0]}, which --margin_from names; {columns_of(row)}")
        first, second = (labels.number(name, row[name]) for name in names)
        margin = second - first if swapped else first - second
        name = f"{names[0]} - {names[1]}"
    elif values.found.get("margin") in (None, ""):
        return None
    else:
        margin = labels.number("margin", values.found["margin"])
        name = "the margin"
    return _checked_margin(values, margin, name)


def _checked_margin(values: Values, margin: float, name: str) -> float:
    """The margin of the side that is better by label_prob or by votes, where the row has them, else of chosen."""
    p = values.probability
    if p is not None and p < labels.TIE:
        if margin > 0:
            raise UserError(
                f"{name} is {margin:g}, which says that chosen is the better one, and label_prob or the votes say so with "
                f"{p:g} alone; correct the row, or leave one of both out with --ignore_columns"
            )
        return abs(margin)
    if margin < 0 and p != labels.TIE and not values.is_tie:
        raise UserError(
            f"{name} is {margin:g}, which says that rejected is the better one; correct the row, swap the columns, or leave "
            "margins out"
        )
    return margin
