"""One row of any form to the answers in it, each to be scored: what training reads, without the question who won.

Ties, two equal answers, an unknown winner, a single answer are no errors here. An answer is written as in the pair that it
forms with another one of its row (rows.py), so its token ids are those of training. An answer that stands alone is taken as
it is: no other one tells whether words of the prompt at its start are repeated or said.
"""

import re
from dataclasses import dataclass, field

from open_rm.data import labels
from open_rm.data.columns import Plan
from open_rm.data.comparisons import Values, answers_of, responses_of, two_answers, two_sides
from open_rm.data.conversation import pair_of
from open_rm.data.forms import OWN_NAMES
from open_rm.data.messages import HH_TURN
from open_rm.data.reading import Reading
from open_rm.data.rows import template_of, values_of
from open_rm.errors import UserError

TO_SCORE = Reading(to_score=True)
ANSWER_ALONE = {"rows": "response", "one answer": "response", "conversation": "messages"}  # shape -> what holds it
OTHER = "-"  # an answer that begins with no prompt


@dataclass(frozen=True)
class Answers:
    """The answers in one row, in the order in which they stand in it; of pairs, chosen before rejected.

    kind: text, messages or token ids.
    prompt: text; or the messages, or token ids, that all answers begin with (where the row says none, what they share).
    answers: text, messages or token ids that go on behind the prompt. None: an empty answer of a list, nothing to score.
    template: what the chat template is given besides.
    form: what the log calls the row.  plan: which column was what.
    several: rows of this form hold several answers, so that they get a list of scores, even of one.
    given: how good the row says that each is, higher is better: its scores; 1 for the better and 0 for the other of two, 0.5
        for both of a tie; p and 1 - p where it says how probable it is that the first is the better one. None where it says
        nothing that can be read.
    oddities: what a person should hear of (rows.ODDITIES).
    """

    kind: str
    prompt: str | list
    answers: list
    template: dict = field(default_factory=dict)
    form: str = ""
    plan: Plan | None = None
    several: bool = True
    given: list[float | None] | None = None
    oddities: tuple[str, ...] = ()

    def complete(self, number: int) -> str | list:
        """Prompt and answer: text without its ending, a whole conversation, or token ids."""
        return self.prompt + self.answers[number]


def read_answers(row: object, reading: Reading = TO_SCORE) -> Answers:
    """The answers in one row of any form. reading: of Reading(to_score=True).

    Raises:
        UserError: what is wrong with the row; the caller adds where it is.
    """
    values = values_of(row, reading)
    template = template_of(values.found)
    shape = values.plan.shape
    prompt, found, met = _found(values)
    filled = [i for i, answer in enumerate(found) if not _is_empty(answer)] if shape == "ranked" else range(len(found))
    try:
        form, parts = _written(values, template, prompt, [found[i] for i in filled], met)
    except UserError as error:
        if shape in ANSWER_ALONE:  # which is a pair's chosen answer there
            raise UserError(re.sub(r"\bchosen\b", ANSWER_ALONE[shape], str(error))) from error
        raise
    kind, prompt, answers = _behind_prompt(parts) if parts else ("text", "", [])
    known = values.plan.form
    placed = dict(zip(filled, answers, strict=True))
    return Answers(
        kind,
        prompt,
        [placed.get(i) for i in range(len(found))],
        template,
        known.says or (known.name if known.name not in OWN_NAMES else form),
        values.plan,
        shape not in ANSWER_ALONE,
        _given(values, len(found)),
        tuple(dict.fromkeys(values.oddities)),
    )


def _found(values: Values) -> tuple[object, list, list[tuple[int, int]] | None]:
    """(prompt, answers as they stand, which of them meet in pairs that training makes; None: each the first)"""
    found, shape, prompt = values.found, values.plan.shape, values.found.get("prompt")
    if shape == "ranked" or "responses" in found:
        responses = responses_of(found["responses"])
        if not isinstance(responses, list) or not responses:
            what = "an empty list" if responses == [] else type(responses).__name__
            raise UserError(f"responses must be a list of responses, not {what}; correct or remove the row")
        return prompt, responses, None
    if shape in ("winner", "strength", "two scores", "two answers"):
        return *two_answers(values), None
    if shape == "pairs":
        chosen, rejected = answers_of(found["chosen"]), answers_of(found["rejected"])
        met = [(0, len(chosen) + j) for j in range(len(rejected))] + [(i, len(chosen)) for i in range(1, len(chosen))]
        return prompt, [*chosen, *rejected], met
    if shape in ("rows", "one answer"):
        return prompt, [found["response"]], None
    if shape == "conversation":
        return prompt, [values.messages("messages")], None
    prompt, *both = two_sides(values)
    return prompt, both, None


def _is_empty(answer: object) -> bool:
    return not (answer.strip() if isinstance(answer, str) else answer)


def _written(
    values: Values, template: dict, prompt: object, found: list, met: list[tuple[int, int]] | None
) -> tuple[str, list[tuple]]:
    """(what the row is called, (prompt, answer) of each as training writes it)"""
    if not found:
        return "ranked responses", []
    if len(found) == 1:
        [alone] = found
        own_words = isinstance(alone, str) and isinstance(prompt, str) and prompt.strip() and not HH_TURN.match(alone)
        form, (before, answer, _) = pair_of(values, template, prompt, alone, OTHER if own_words else alone)
        return form, [(before, answer)]
    form, parts = "", {}
    for i, j in met or [(0, j) for j in range(1, len(found))]:
        form, (before, one, other) = pair_of(values, template, prompt, found[i], found[j])
        parts.setdefault(i, (before, one))
        parts.setdefault(j, (before, other))
    return form, [parts[i] for i in range(len(found))]


def _behind_prompt(parts: list[tuple]) -> tuple[str, str | list, list]:
    """(kind, the prompt that all have, the answers behind it)"""
    kinds = {_kind(answer) for _, answer in parts}
    if len(kinds) > 1:
        raise UserError(
            f"its answers are of several kinds ({' and '.join(sorted(kinds))}); write all of them in one way"
        )
    [kind] = kinds
    prompt = min((before for before, _ in parts), key=len)
    if kind == "text":
        return kind, prompt, [answer for _, answer in parts]
    if kind == "token ids":  # complete
        return kind, prompt, [answer[len(prompt) :] for _, answer in parts]
    return kind, prompt, [(before + answer)[len(prompt) :] for before, answer in parts]


def _kind(answer: str | list) -> str:
    if isinstance(answer, str):
        return "text"
    return "messages" if isinstance(answer[0], dict) else "token ids"


def _given(values: Values, count: int) -> list[float | None] | None:
    """How good the row itself says that its answers are (Answers.given)."""
    found, plan = values.found, values.plan
    lower = -1.0 if plan.lower_is_better else 1.0
    try:
        if "responses" in found or plan.shape == "rows":
            scores = found.get("scores") if "responses" in found else [found["score"]]
            if not isinstance(scores, list) or len(scores) != count:
                return None
            truth = [labels.TRUTH.get(str(score).strip().lower(), score) for score in scores]
            return [None if score is None else lower * labels.number("scores", score) for score in truth]
        if plan.shape == "two scores":
            return [lower * labels.number(name, found[name]) for name in ("score_a", "score_b")]
        if values.is_tie:
            return [0.5] * count
        p = labels.probability(found) if count == 2 else None
        if plan.shape in ("winner", "strength"):
            is_winner = plan.shape == "winner"
            winner = (
                labels.winner_of(found["winner"], plan.labels)
                if is_winner
                else labels.winner_of_strength(found["strength"])[0]
            )
            p = 1.0 if p is None else p
            return {"a": [p, 1 - p], "b": [1 - p, p], "tie": [0.5, 0.5]}[winner]
        if p is not None and plan.shape != "two answers":
            return [p, 1 - p]
    except UserError:  # an unknown label is no fault of a row that is scored
        return None
    if plan.shape == "pairs":
        better = len(answers_of(found["chosen"]))
        return [1.0] * better + [0.0] * (count - better)
    return [1.0, 0.0] if count == 2 and plan.shape != "two answers" else None
