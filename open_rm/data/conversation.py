"""What was said, from a row's values: system text, earlier turns, prompt and two answers to the sides of one pair.

A row is text, or a conversation: then texts become messages. What a user must see to and cannot see is refused here: a row
without a prompt whose columns hold one, text that was to be a conversation and has no prompt.
"""

import re

from open_rm.data import sides
from open_rm.data.columns import suspicion
from open_rm.data.comparisons import Values, every_answer
from open_rm.data.messages import HH_TURN, check_messages, parse_hh, parsed_json
from open_rm.errors import UserError

IMPLIED = {"text": "text, prompt implied", "messages": "messages, prompt implied"}
GIVEN = {"text": "text, prompt given", "messages": "messages, prompt given"}


def pair_of(values: Values, template: dict, prompt, chosen, rejected) -> tuple[str, tuple]:
    """(what a row of our own columns is called, (prompt, chosen, rejected) checked)

    template: what the chat template is given besides.
    """
    plan, parse = values.plan, values.reading.parse_hh
    if plan.shape == "token ids":
        return "token ids", sides.of_ids(prompt, chosen, rejected)
    all_text = all(isinstance(value, str) for value in ("" if prompt is None else prompt, chosen, rejected))
    is_hh = all_text and bool(HH_TURN.match(chosen) and HH_TURN.match(rejected)) and not prompt
    if all_text and (parse or (is_hh and plan.chat)):
        turns = _parsed_hh(prompt, chosen, rejected)
        if _before(values):
            turns = _with_context(values, *turns)
        return "HH text", sides.of_messages(*turns)
    if all_text and not plan.chat:
        form = "HH text" if is_hh else (GIVEN if prompt else IMPLIED)["text"]
        return form, _as_text(values, template, prompt or "", chosen, rejected, is_hh)
    if all_text and prompt and _repeats(values, prompt, chosen, rejected):
        chosen, rejected = chosen[len(prompt) :].strip(), rejected[len(prompt) :].strip()
    given = isinstance(prompt, str | list) or any(isinstance(side, str) for side in (chosen, rejected))
    chosen = check_messages("chosen", chosen, values.reading.ignore)
    rejected = check_messages("rejected", rejected, values.reading.ignore)
    if any(len(side) == 1 and parsed_json(side[0]["content"]) is not None for side in (chosen, rejected)):
        values.oddities.append("JSON")
    parts = sides.of_messages(*_with_context(values, prompt, chosen, rejected))
    if not parts[0]:
        _check_no_prompt_is_left(values)
    elif parts[0][-1]["role"] == "assistant":
        values.oddities.append("prefill")
    return (GIVEN if given else IMPLIED)["messages"], parts


def _as_text(
    values: Values, template: dict, prompt: str, chosen: str, rejected: str, is_hh: bool
) -> tuple[str, str, str]:
    if template:
        raise UserError("tools and chat_template_kwargs are for message rows, and this one is text; remove them")
    if isinstance(values.found.get("system"), str) and values.found["system"].strip():
        raise UserError("the row has a system text, which only messages can hold; leave out --as_messages False")
    if values.found.get("history") not in (None, "", []):
        raise UserError("the row has a history, which only messages can hold; leave out --as_messages False")
    if not prompt and not is_hh:
        _check_no_prompt_is_left(values, chosen, rejected)
    if any(parsed_json(text) is not None for text in (chosen, rejected)):
        values.oddities.append("JSON")
    return sides.of_text(prompt, chosen, rejected, repeated=_repeats(values, prompt, chosen, rejected))


def _repeats(values: Values, prompt: str, chosen: str, rejected: str) -> bool:
    """`sides.repeats` of all answers of the row, so that each is one text in all its pairs; and a note of it."""
    if not prompt:
        return False
    if values.repeated is not None:
        return values.repeated
    several = [text for text in every_answer(values) if isinstance(text, str) and text.strip()]
    answers = several or (chosen, rejected)
    repeated = sides.repeats(prompt, *answers)
    if repeated or (prompt.strip() and any(answer.startswith(prompt) for answer in answers)):
        values.oddities.append("repeated" if repeated else "begins with it")
    values.repeated = repeated if several else None
    return repeated


def _with_context(values: Values, prompt, chosen: list[dict], rejected: list[dict]) -> tuple:
    """System text and history go before the prompt, or before both sides where these are whole conversations."""
    before = _before(values)
    complete = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if isinstance(prompt, str) and not complete:
        prompt = parse_prompt(prompt, values.plan.form.marks) if prompt.strip() else None
    elif not isinstance(prompt, str | None):
        prompt = check_messages("prompt", prompt, values.reading.ignore)
    if prompt and isinstance(prompt, list):
        return _after(before, prompt), chosen, rejected
    if not complete and (values.plan.chat or "prompt" in values.plan.values):
        _check_no_prompt_is_left(values)
        if "prompt" in values.plan.values:
            where = values.plan.values["prompt"].written
            raise UserError(f"no value for {where}, and a conversation needs a prompt; correct or remove the row")
        raise UserError(
            "no prompt, so nothing tells the question from the answer; name its column with --column_map prompt=..., or "
            "train on text without --as_messages"
        )
    if complete:
        chosen, rejected = _after(before, chosen), _after(before, rejected)
    return prompt, chosen, rejected


def _before(values: Values) -> list[dict]:
    """System text and earlier turns that have columns of their own."""
    system, history = values.found.get("system"), values.found.get("history")
    before: list[dict] = []
    if isinstance(system, str):
        before += [{"role": "system", "content": system}] if system.strip() else []
    elif system is not None:
        raise UserError(
            f"system must be text, not {type(system).__name__}; correct it, or leave it out (--ignore_columns)"
        )
    if isinstance(history, list) and history:
        if all(isinstance(turn, list) for turn in history):  # LLaMA-Factory: [[question, answer], ...]
            if any(len(turn) != 2 for turn in history):
                raise UserError("history must be a list of [question, answer]; correct or remove the row")
            said = [text for turn in history for text in turn]
            roles = ("user", "assistant") * len(history)
            history = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        turns = check_messages("history", history, values.reading.ignore)
        if before and turns[0]["role"] == "system":
            raise UserError(
                "the system text stands in a column and another one in the history; leave the column out with --ignore_columns"
            )
        before += turns
    elif history not in (None, "", []):
        raise UserError(
            "history must be a list of turns; text is mapped to where it belongs, e.g. --column_map prompt=history"
        )
    return before


def _after(before: list[dict], messages: list[dict]) -> list[dict]:
    """Messages behind those that have columns of their own, unless they repeat them."""
    if messages[: len(before)] == before:
        return messages
    if before[0]["role"] == messages[0]["role"] == "system":
        raise UserError(
            "the system text stands in a column and another one in the messages; leave the column out with --ignore_columns"
        )
    return before + messages


def _check_no_prompt_is_left(values: Values, *texts: str) -> None:
    """A row without a prompt must not have a column that looks like one, unless all texts hold its content."""
    if "prompt" in values.reading.column_map and (values.found.get("prompt") in (None, "")):
        where = values.plan.values["prompt"].written
        raise UserError(f"no value for {where}, which --column_map names as the prompt; correct it, or remove the row")
    aside = [name for name in values.plan.form.leaves if name in values.row and texts]
    for name in (*values.plan.unread, *aside):
        value = values.row[name]
        if isinstance(value, str) and texts and all(value.strip() in text for text in texts):
            continue
        if suspicion(name, value) != "prompt":
            if isinstance(value, str) and texts and len(value.split()) > 2:
                values.oddities.append(f"no prompt: {name}")
            continue
        raise UserError(
            f"the row has no prompt, and its column {name} looks like one; name it with --column_map prompt={name}, or leave it "
            f"out with --ignore_columns {name}"
        )


def parse_prompt(text: str, marks: tuple[str, str] | None = None) -> list[dict]:
    """A prompt of text as messages: one user's turn, or several where the text itself marks them.

    marks: what stands before a user's and before a model's turn, at the start of a line; the first turn may lack it. HH text
    (Nectar) is known by its own marks; its last, empty turn is dropped.
    """
    if HH_TURN.match(text):
        turns = parse_hh("prompt", text)
        return turns if turns[-1]["content"] else turns[:-1]
    if marks is None:
        return [{"role": "user", "content": text}]
    user, model = marks
    parts = re.split(rf"(?:^|\n)({re.escape(user)}|{re.escape(model)})", text)
    turns = [("user", parts[0])] if parts[0].strip() else []
    turns += [
        ("user" if mark == user else "assistant", said) for mark, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1][0] != "user":
        raise UserError("the prompt ends with the model's own turn, so the answers are a user's; remove the row")
    return [{"role": role, "content": said} for role, said in turns]


def _parsed_hh(prompt: object, chosen: str, rejected: str) -> tuple[None, list[dict], list[dict]]:
    """HH text as messages; a prompt column may hold its first turns, repeated in the sides or not."""
    if isinstance(prompt, str) and HH_TURN.match(prompt):
        both = sides.both_begin_with_it(chosen.startswith(prompt), rejected.startswith(prompt))
        prompt, chosen, rejected = None, *(side if both else prompt + side for side in (chosen, rejected))
    if prompt or not (HH_TURN.match(chosen) and HH_TURN.match(rejected)):
        raise UserError('this is text that does not begin with "\\n\\nHuman:"; --parse_hh reads nothing else')
    return None, parse_hh("chosen", chosen), parse_hh("rejected", rejected)
