"""One preference row of any known form to pairs of one form: (prompt, chosen, rejected).

plan (columns.py) -> values (lookup.py) -> who won (comparisons.py) -> what was said (conversation.py). Nothing is repaired, and
what is odd and yet readable is counted, for the log and the inspection.
"""

import json
from dataclasses import dataclass, field

from open_rm.data.attributes import known_of_one_side, read_attributes
from open_rm.data.columns import Plan, plan_of
from open_rm.data.comparisons import Unchecked, Values, answers_of, comparisons
from open_rm.data.conversation import pair_of
from open_rm.data.forms import OWN_NAMES
from open_rm.data.grouping import Joined
from open_rm.data.messages import from_json, parsed_json, without_nulls
from open_rm.data.reading import Reading
from open_rm.errors import UserError

# Keywords of apply_chat_template that are ours to set.
OWN_KEYWORDS = (
    "tokenize",
    "add_generation_prompt",
    "return_tensors",
    "return_dict",
    "padding",
    "truncation",
    "messages",
)
OWN_KEYWORDS += (
    "bos_token",
    "eos_token",
    "tokenizer_kwargs",
    "conversation",
    "chat_template",
    "max_length",
    "continue_final_message",
    "return_assistant_tokens_mask",
)
MESSAGE_COLUMNS = ("prompt", "history", "chosen", "rejected", "messages", "rejected_messages", "rejected_response")
MESSAGE_COLUMNS += ("chosen_response", "response_a", "response_b")
LIST_COLUMNS = ("responses", "scores", "chosen_input_ids", "rejected_input_ids", "prompt_input_ids")  # JSON in csv


@dataclass(frozen=True)
class Preference:
    """One pair.

    prompt, chosen, rejected: all text, all lists of messages, or all lists of token ids (each side complete then).
    margin: by how much chosen is better, where the row says so.  template: what the chat template is given besides.
    label_prob: how probable it is that chosen is the better one, from 0.5, a tie, to 1.
    levels: places of chosen and rejected in the row's list, 0 the best; equal in a tie.
    attributes: those of chosen and of rejected, in the order of --attributes, NaN where the row has none.
    """

    prompt: str | list
    chosen: str | list
    rejected: str | list
    margin: float | None = None
    template: dict = field(default_factory=dict)
    label_prob: float = 1.0
    levels: tuple[int, int] = (0, 1)
    attributes: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    @property
    def is_tie(self) -> bool:
        """Whether both sides are as good."""
        return self.label_prob == 0.5

    @property
    def kind(self) -> str:
        """text, messages or token ids"""
        if isinstance(self.chosen, str):
            return "text"
        return "messages" if isinstance(self.chosen[0], dict) else "token ids"


@dataclass(frozen=True)
class Row:
    """A row that could be read.

    form: what the log calls it; empty where its ties leave that open.  plan: which column was what.  pairs: one, or those of a ranked list.
    ties: pairs of it that prefer neither side and are not trained on.  oddities: what a person should hear of, by the keys of ODDITIES.
    """

    form: str
    plan: Plan
    pairs: list[Preference]
    ties: int = 0
    oddities: tuple[str, ...] = ()


# What is counted of rows besides: key -> sentence in the log and the inspection.
ODDITIES = {
    "repeated": "repeat their prompt in both answers (it is taken once)",
    "begins with it": "have an answer that begins with the words of its prompt (joined as it stands)",
    "equal scores": "have equal {} and are pairs all the same",
    "contrary scores": "have {}, which prefers rejected",
    "ranks": "have scores that are 1 to n, as ranks are, and are read as the higher the better (--lower_is_better False says that "
    "this is right, --lower_is_better that 1 is the best)",
    "JSON": "hold JSON in an answer, read as text",
    "left out": "have an answer without text or score, which is left out",
    "in order": "are lists without scores, read as ranked with the best first",
    "prefill": "have a prompt that ends with the assistant's turn, so two of its turns follow each other",
    "no prompt": "have no prompt, and text in the column {}, which is not read",
    "nothing there": "have nothing at {}, which --column_map names",
    "less likely": "have {}, so their sides change places",
    "one side": "know {} of one of their two sides alone (correct the place of the other, or leave the attribute out)",
    "lonely": "have fewer than two answers and give no pair",
}

AS_IS = Reading()


def read_row(row: object, reading: Reading = AS_IS) -> Row:
    """One row of any accepted form; its pairs are checked and normalised.

    If both sides repeat the prompt, it is taken off. If there is no prompt, the part that both sides share becomes the prompt.

    Raises:
        UserError: what is wrong with the row; the caller adds where it is.
    """
    return _assembled(values_of(row, reading))


def values_of(row: object, reading: Reading) -> Values:
    """What a row holds under our own names, not yet checked.

    Raises:
        UserError: the row is of no form, or lacks what it should have.
    """
    answers, attributes = {}, None
    if isinstance(row, Joined):
        answers, attributes = {"responses": row.responses, "scores": row.scores}, row.attributes
        row = row.first
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with columns such as chosen and rejected, not {type(row).__name__}")
    plan = plan_of(row, reading)
    if plan.form.refuses:
        raise UserError(f"this is the form {plan.form.name} of --dataset_format: {plan.form.refuses}")
    values = {ours: lookup.get(row) for ours, lookup in plan.values.items()}
    odd = [f"nothing there: {plan.values[ours].written}" for ours in reading.column_map if values[ours] is None]
    for ours in ("chosen", "rejected", "response_a", "response_b"):  # an answer behind steps that were given
        if ours in plan.values and (holes := plan.values[ours].holes) and not str(holes[-1].get(row) or "").strip():
            raise UserError(f"{holes[-1].written} is empty; remove the row or fill it in")
    values |= answers
    for name in MESSAGE_COLUMNS:
        if values.get(name).__class__ is str:
            values[name] = from_json(name, values[name])
    for name in LIST_COLUMNS:
        if values.get(name).__class__ is str and (found := parsed_json(values[name])) is not None:
            values[name] = found
    return Values(row, plan, reading, values, odd, attributes=attributes)


def _assembled(values: Values) -> Row:
    """The pairs that the values give, checked."""
    template = template_of(values.found)
    attributes = _attributes(values)
    found, ties = comparisons(values)
    form, pairs = None, []
    for one in found:
        form, parts = pair_of(values, template, one.prompt, one.chosen, one.rejected)
        if parts[1] == parts[2] and len(found) + ties == 1 and one.label_prob != 0.5:
            raise UserError("chosen and rejected are identical, so the pair prefers nothing; remove the row")
        if parts[1] == parts[2]:
            ties += 1
        else:
            of_sides = tuple(attributes[i] if attributes else () for i in one.answers)
            pairs.append(_preference(one, parts, template, of_sides))
    known = values.plan.form
    form = known.says or (known.name if known.name not in OWN_NAMES else form or "")
    return Row(form, values.plan, pairs, ties, tuple(dict.fromkeys(values.oddities)))


def _attributes(values: Values) -> list[tuple[float, ...]]:
    """Of each answer of the row; empty where none are asked."""
    found, plan = values.found, values.plan
    if values.attributes is not None:
        return values.attributes
    counts = (1, 1)
    if plan.shape == "ranked":
        if not isinstance(found["responses"], list):  # which is what is wrong with the row
            return []
        counts = (len(found["responses"]),)
    elif plan.shape == "rows":
        counts = (1,)
    elif plan.shape == "pairs":
        counts = (len(answers_of(found["chosen"])), len(answers_of(found["rejected"])))
    attributes = read_attributes(plan.attributes, values.row, counts)
    values.oddities += [f"one side: {name}" for name in known_of_one_side(plan.attributes, attributes, counts)]
    return attributes


def _preference(one: Unchecked, parts: tuple, template: dict, attributes: tuple) -> Preference:
    """The pair with the side in front that is at least as probably the better one. attributes: of the two as they stand."""
    prompt, chosen, rejected = parts
    if one.label_prob < 0.5:
        attributes = attributes[::-1]
        return Preference(prompt, rejected, chosen, one.margin, template, 1 - one.label_prob, one.levels, attributes)
    return Preference(prompt, chosen, rejected, one.margin, template, one.label_prob, one.levels, attributes)


def most_pairs(row: object, reading: Reading) -> int:
    """At most how many pairs a row gives, before it is read: a list gives one for each two responses."""
    if isinstance(row, Joined):
        return max(1, len(row.responses) * (len(row.responses) - 1) // 2)
    try:
        plan = plan_of(row, reading) if isinstance(row, dict) else None
        if plan is None or plan.shape not in ("ranked", "pairs"):
            return 1
        found = {
            name: plan.values[name].get(row) for name in ("responses", "chosen", "rejected") if name in plan.values
        }
    except UserError:
        return 1
    if plan.shape == "ranked":
        n = len(found["responses"]) if isinstance(found["responses"], list) else 0
        return max(1, n * (n - 1) // 2)
    return max(1, len(answers_of(found["chosen"])) * len(answers_of(found["rejected"])))


def template_of(values: dict) -> dict:
    """What the chat template is given besides the messages: tools, and chat_template_kwargs."""
    given = {}
    for name, kind, what in (("chat_template_kwargs", dict, "an object"), ("tools", list, "a list of objects")):
        value = values.get(name)
        if isinstance(value, str) and value.strip():
            value = _json_of(name, value, what)
        if value is None or value == "":
            continue
        if kind is list and isinstance(value, list):  # tools may be a list of JSON texts (When2Call)
            value = [_json_of(name, tool, what) if isinstance(tool, str) else tool for tool in value]
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
            raise UserError(f"{name} must be {what}, or JSON text of it, not {type(value).__name__}")
        value = without_nulls(value)
        given |= value if kind is dict else ({"tools": value} if value else {})
    if own := sorted(set(given) & set(OWN_KEYWORDS)):
        raise UserError(f"chat_template_kwargs sets {own[0]}, which the trainer decides; remove it")
    return given


def _json_of(name: str, text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is text that is not JSON; it must be {what}") from error
