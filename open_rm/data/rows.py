"""One preference row of any accepted form to pairs of one form: (prompt, chosen, rejected).

The columns of a row say which form it is (`FORMS`); forms other than chosen/rejected are turned into it first, then all are
checked alike. What the two sides have in common must be the prompt: only the answer may tell them apart.
Not covered: guessing at columns of other names (--column_map names them), repairing rows.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from open_rm.data.messages import (
    HH_TURN,
    check_messages,
    ends_with_answer,
    from_json,
    has_turn,
    parse_hh,
    without_nulls,
)
from open_rm.errors import UserError, quote
from open_rm.flags import DataFlags

FORMS = {
    "text": "text, prompt given",
    "bare text": "text, prompt implied",
    "HH": "HH text",
    "messages": "messages, prompt given",
    "bare messages": "messages, prompt implied",
    "rejected_messages": "messages + rejected_messages",
    "rejected_response": "messages + rejected_response",
    "ranked": "ranked responses",
    "A/B": "labelled A/B",
    "ids": "token ids",
}
WINNERS = {name + side: side for name in ("", "response_", "model_") for side in "ab"}
# Keywords of apply_chat_template that are ours to set.
OWN_KEYWORDS = ("tokenize", "add_generation_prompt", "return_tensors", "return_dict", "padding", "truncation")
OWN_KEYWORDS += (
    "messages",
    "conversation",
    "chat_template",
    "max_length",
    "continue_final_message",
    "return_assistant_tokens_mask",
)


@dataclass(frozen=True)
class Preference:
    """One pair.

    prompt, chosen, rejected: all text, all lists of messages, or all lists of token ids (each side complete then).
    margin: by how much chosen is better, where the row says so.  template: what the chat template is given besides.
    """

    prompt: str | list
    chosen: str | list
    rejected: str | list
    margin: float | None = None
    template: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """text, messages or token ids"""
        if isinstance(self.chosen, str):
            return "text"
        return "messages" if isinstance(self.chosen[0], dict) else "token ids"


@dataclass(frozen=True)
class Row:
    """form: one of FORMS' values.  pairs: one, or those of a ranked list.  ties: pairs of it that prefer neither side."""

    form: str
    pairs: list[Preference]
    ties: int = 0


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    column_map: our column -> the file's.  margin_from: margin = first column - second.  parse_hh: HH text to messages.
    """

    column_map: dict[str, str] = field(default_factory=dict)
    margin_from: tuple[str, str] | None = None
    parse_hh: bool = False


AS_IS = Reading()
FORM_COLUMNS = (
    ("chosen_input_ids", "rejected_input_ids"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("responses",),
    ("response_a", "response_b", "winner"),
    ("chosen", "rejected"),
)
# TRL's own names, and the columns in which csv files hold messages as JSON.
OTHER_NAMES = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "messages", "rejected_messages", "rejected_response")
MESSAGE_COLUMNS += ("response_a", "response_b")
COLUMNS = ("prompt", "chosen", "rejected", "messages", "rejected_messages", "rejected_response", "responses", "scores")
COLUMNS += ("response_a", "response_b", "winner", "chosen_input_ids", "rejected_input_ids", "prompt_input_ids")
COLUMNS += ("margin", "tools", "chat_template_kwargs")


def make_reading(flags: DataFlags) -> Reading:
    """The flags --column_map (chosen=better ...), --margin_from (two columns) and --parse_hh, checked."""
    mapped: dict[str, str] = {}
    for entry in flags.column_map:
        ours, equals, theirs = entry.partition("=")
        if not equals or not theirs or ours not in COLUMNS or ours in mapped:
            raise UserError(
                f"--column_map {entry}: write our column, an equals sign and the file's column, each of ours once, e.g. "
                f"chosen=better rejected=worse; ours are {', '.join(COLUMNS)}"
            )
        mapped[ours] = theirs
    margin_from = tuple(flags.margin_from)
    if margin_from and len(margin_from) != 2:
        raise UserError(f"--margin_from takes two columns, of chosen and of rejected; got {len(margin_from)}")
    if margin_from and "margin" in mapped:
        raise UserError("--margin_from and margin in --column_map both say where margins are; pass one")
    return Reading(mapped, margin_from or None, flags.parse_hh)


def read_row(row: object, reading: Reading = AS_IS) -> Row:
    """One row of any accepted form; its pairs are checked and normalised.

    If both sides repeat the prompt, it is taken off. If there is no prompt, the part that both sides share becomes the prompt.

    Raises:
        UserError: what is wrong with the row; the caller adds where it is.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with columns such as chosen and rejected, not {type(row).__name__}")
    whole = row
    if lacking := sorted(set(reading.column_map.values()) - row.keys()):
        raise UserError(f"no column {lacking[0]}, which --column_map names; the row has {_columns_of(row)}")
    row = _form_that_is_mapped(row, reading.column_map)
    row = row | {ours: whole[theirs] for ours, theirs in reading.column_map.items()}
    for ours, theirs in OTHER_NAMES.items():
        if theirs in row and ours not in row:
            row[ours] = row[theirs]
    row |= {name: from_json(name, row[name]) for name in MESSAGE_COLUMNS if isinstance(row.get(name), str)}
    form, ties, found = _pairs_of(row, reading)
    margin, template = _margin(row, reading, form), _template(row)
    pairs = []
    for prompt, chosen, rejected in found:
        if reading.parse_hh and isinstance(chosen, str) and isinstance(rejected, str):
            prompt, chosen, rejected = _parsed_hh(prompt, chosen, rejected)
        if form == FORMS["ids"]:
            sides = _checked_ids(prompt, chosen, rejected)
        elif all(isinstance(value, str) for value in ("" if prompt is None else prompt, chosen, rejected)):
            if template:
                raise UserError(
                    "tools and chat_template_kwargs are for message rows, and this one is text; remove them"
                )
            sides = _normalise_text(prompt or "", chosen, rejected)
        else:
            sides = _normalise_messages(prompt, check_messages("chosen", chosen), check_messages("rejected", rejected))
        if sides[1] == sides[2]:
            raise UserError("chosen and rejected are identical, so the pair prefers nothing; remove the row")
        pairs.append(Preference(*sides, margin, template))
    return Row(form, pairs, ties)


def _form_that_is_mapped(row: dict, column_map: dict[str, str]) -> dict:
    """The row without columns that only decide another form than the one that --column_map names.

    With chosen=better rejected=worse, a row that also has `messages` and `rejected_messages` is read as chosen and rejected.
    """
    named = {group: len(set(group) & column_map.keys()) for group in FORM_COLUMNS}
    most = max(named.values())
    if most == 0:
        return row
    wanted = {name for group, count in named.items() if count == most for name in group}
    others = {name for group in FORM_COLUMNS for name in group} - wanted
    return {name: value for name, value in row.items() if name not in others}


def _pairs_of(row: dict, reading: Reading) -> tuple[str, int, list[tuple]]:
    """(form, ties, unchecked (prompt, chosen, rejected))"""

    def has(*names: str) -> bool:
        return all(row.get(name) is not None for name in names)

    several = [" and ".join(names) for names in FORM_COLUMNS if has(*names)]
    if len(several) > 1:
        raise UserError(
            f"the row has {several[0]} and also {several[1]}; say which are meant, e.g. --column_map chosen=chosen "
            "rejected=rejected"
        )
    prompt = row.get("prompt")
    if has("chosen_input_ids", "rejected_input_ids"):
        return FORMS["ids"], 0, [(row.get("prompt_input_ids"), row["chosen_input_ids"], row["rejected_input_ids"])]
    if has("messages", "rejected_messages"):
        return FORMS["rejected_messages"], 0, [(None, row["messages"], row["rejected_messages"])]
    if has("messages", "rejected_response"):
        messages = check_messages("messages", row["messages"])
        ends_with_answer("messages", messages)
        answer = check_messages("rejected_response", row["rejected_response"])
        return FORMS["rejected_response"], 0, [(messages[:-1] or None, messages[-1:], answer)]
    if has("responses"):
        pairs = list(_ranked(row["responses"], row.get("scores")))
        kept = [(prompt, *pair) for pair in pairs if pair]
        return FORMS["ranked"], len(pairs) - len(kept), kept
    if has("response_a", "response_b", "winner"):
        winner = str(row["winner"]).strip().lower()
        if winner == "tie" or winner.startswith("tie "):
            return FORMS["A/B"], 1, []
        if winner not in WINNERS:
            raise UserError(
                f"winner is {quote(row['winner'])}; it must be a, b, response_a, response_b, model_a, model_b or tie"
            )
        sides = (row["response_a"], row["response_b"])
        return FORMS["A/B"], 0, [(prompt, *(sides if WINNERS[winner] == "a" else reversed(sides)))]
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise UserError(f"no value for {' and '.join(missing)}; the row has {_columns_of(row)}")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        is_hh = reading.parse_hh or (HH_TURN.match(chosen) and HH_TURN.match(rejected) and not prompt)
        return FORMS["HH" if is_hh else "text" if prompt else "bare text"], 0, [(prompt or None, chosen, rejected)]
    given = isinstance(prompt, list) or any(isinstance(side, str) for side in (chosen, rejected))
    return FORMS["messages" if given or isinstance(prompt, str) else "bare messages"], 0, [(prompt, chosen, rejected)]


def _parsed_hh(prompt: object, chosen: str, rejected: str) -> tuple[None, list[dict], list[dict]]:
    """HH text as messages; a prompt column may hold its first turns, repeated in the sides or not."""
    if isinstance(prompt, str) and HH_TURN.match(prompt):
        both = _both_begin_with_it(chosen.startswith(prompt), rejected.startswith(prompt))
        prompt, chosen, rejected = None, *(side if both else prompt + side for side in (chosen, rejected))
    if prompt or not (HH_TURN.match(chosen) and HH_TURN.match(rejected)):
        raise UserError('this is text that does not begin with "\\n\\nHuman:"; --parse_hh reads nothing else')
    return None, parse_hh("chosen", chosen), parse_hh("rejected", rejected)


def _columns_of(row: dict) -> str:
    names = ", ".join(sorted(str(name)[:40] if str(name).isprintable() else quote(name, 40) for name in row))
    return f"the columns {names[:200]}; name others with --column_map" if names else "no columns"


def _ranked(responses: object, scores: object) -> Iterator[tuple | None]:
    """All pairs (better, worse) of a ranked list; None for a tie."""
    if not isinstance(responses, list) or len(responses) < 2:
        what = f"{len(responses)} responses" if isinstance(responses, list) else type(responses).__name__
        raise UserError(f"responses must be a list of at least 2 responses, not {what}; correct or remove the row")
    if scores is None:
        scores = list(range(len(responses), 0, -1))
    if not isinstance(scores, list) or len(scores) != len(responses):
        what = len(scores) if isinstance(scores, list) else type(scores).__name__
        raise UserError(f"scores must be a list with a number for each of the {len(responses)} responses, not {what}")
    values = [_number("scores", score) for score in scores]
    order = sorted(range(len(values)), key=lambda i: -values[i])  # stable: equal scores stay in the file's order
    for better, worse in itertools.combinations(order, 2):
        yield None if values[better] == values[worse] else (responses[better], responses[worse])


def _number(name: str, value: object) -> float:
    if isinstance(value, str):  # csv files hold text only
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or math.isnan(value):
        raise UserError(f"{name} holds {quote(value)}, which is not a finite number; correct or remove it")
    return float(value)


def _margin(row: dict, reading: Reading, form: str) -> float | None:
    if form == FORMS["ranked"] and (reading.margin_from or row.get("margin") not in (None, "")):
        raise UserError(
            "a ranked list gives many pairs, and one margin cannot be that of all; remove margin, --margin_from"
        )
    if reading.margin_from:
        if lacking := [name for name in reading.margin_from if row.get(name) is None]:
            raise UserError(f"no value for {lacking[0]}, which --margin_from names; the row has {_columns_of(row)}")
        better, worse = (_number(name, row[name]) for name in reading.margin_from)
        # of labelled rows the columns are those of a and b, and b may be the chosen one
        swapped = form == FORMS["A/B"] and WINNERS.get(str(row["winner"]).strip().lower()) == "b"
        return worse - better if swapped else better - worse
    return None if row.get("margin") in (None, "") else _number("margin", row["margin"])


def _template(row: dict) -> dict:
    """What the chat template is given besides the messages: tools, and chat_template_kwargs."""
    given = {}
    for name, kind, what in (("chat_template_kwargs", dict, "an object"), ("tools", list, "a list of objects")):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name} is text that is not JSON; it must be {what}") from error
        if value is None or value == "":
            continue
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
            raise UserError(f"{name} must be {what}, or JSON text of it, not {type(value).__name__}")
        value = without_nulls(value)
        given |= value if kind is dict else ({"tools": value} if value else {})
    if own := sorted(set(given) & set(OWN_KEYWORDS)):
        raise UserError(f"chat_template_kwargs sets {own[0]}, which the trainer decides; remove it")
    return given


def _checked_ids(prompt: object, chosen: object, rejected: object) -> tuple[list[int], list[int], list[int]]:
    sides = (
        ("prompt_input_ids", [] if prompt is None else prompt),
        ("chosen_input_ids", chosen),
        ("rejected_input_ids", rejected),
    )
    for name, ids in sides:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise UserError(f"{name} must be a list of token ids (whole numbers from 0); correct or remove the row")
    for name, ids in sides[1:]:
        if not ids:
            raise UserError(f"{name} is empty; remove the row or fill it in")
    size = len(prompt or [])
    if chosen[:size] != (prompt or []) or rejected[:size] != (prompt or []):
        raise UserError(
            "chosen_input_ids and rejected_input_ids must both begin with prompt_input_ids; correct the row"
        )
    if size == len(chosen) or size == len(rejected):
        raise UserError("a side ends with prompt_input_ids, so its response is empty; correct or remove the row")
    return prompt or [], chosen, rejected


def _normalise_text(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise UserError(f"{name} is empty; remove the row or fill it in")
    if prompt and _both_begin_with_it(chosen.startswith(prompt), rejected.startswith(prompt)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise UserError(f"{name} is empty after the prompt; remove the row or fill it in")
    return prompt, chosen, rejected


def _normalise_messages(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    prompt = None if prompt == "" else prompt
    complete = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if prompt is None or (isinstance(prompt, str) and complete):
        if prompt is not None and not all(has_turn(messages, prompt) for messages in (chosen, rejected)):
            raise UserError("the prompt column is no turn of both conversations; correct it, or remove the column")
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        same = min(len(chosen), len(rejected)) - 1 if same is None else same
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    else:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages("prompt", prompt)
        size = len(prompt)
        if _both_begin_with_it(chosen[:size] == prompt, rejected[:size] == prompt):
            chosen, rejected = chosen[size:], rejected[size:]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        ends_with_answer(name, messages)
        if messages[0]["role"] != "assistant":
            raise UserError(
                f"after the prompt, {name} goes on with a message of role {messages[0]['role']!r}: chosen and rejected "
                "must answer the same prompt"
            )
    return prompt, chosen, rejected


def _both_begin_with_it(chosen: bool, rejected: bool) -> bool:
    """Whether chosen and rejected repeat the prompt; one side alone would be told apart by that."""
    if chosen != rejected:
        repeats, does_not = ("chosen", "rejected") if chosen else ("rejected", "chosen")
        raise UserError(
            f"{repeats} begins with the prompt and {does_not} does not; repeat it in both sides, or in neither"
        )
    return chosen
