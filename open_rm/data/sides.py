"""The two sides of a pair brought to one form: (prompt, chosen, rejected), where only the answer tells them apart.

Text: prompt and answer are joined as they stand. Messages: what both conversations begin with is the prompt. Token ids:
both sides complete.
"""

from open_rm.data.messages import check_messages, ends_with_answer, has_turn
from open_rm.errors import UserError


def of_text(prompt: str, chosen: str, rejected: str, *, repeated: bool) -> tuple[str, str, str]:
    """Both answers as they follow the prompt. repeated: they begin with it (see `repeats`), and it is taken off."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise UserError(f"{name} is empty; remove the row or fill it in")
    if repeated:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def repeats(prompt: str, *answers: str) -> bool:
    """Whether all answers repeat the prompt: they begin with it, and what follows begins anew.

    "Hello" is no part of "Hello! How can I help?" or of "Helloween": after a word, only white space begins anew.
    """
    if not prompt or not all(answer.startswith(prompt) for answer in answers):
        return False
    rest = [answer[len(prompt) :] for answer in answers]
    return all(text.strip() and (text[0].isspace() or not prompt[-1].isalnum()) for text in rest)


def of_messages(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """prompt: messages, the text of a turn, or None where both sides are whole conversations."""
    prompt = None if prompt == "" else prompt
    complete = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if prompt is None or (isinstance(prompt, str) and complete):
        if prompt is not None and not all(has_turn(messages, prompt) for messages in (chosen, rejected)):
            raise UserError(
                "the prompt column is no turn of both conversations; correct it, or leave the column out (--ignore_columns)"
            )
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        same = min(len(chosen), len(rejected)) - 1 if same is None else same
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    else:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages("prompt", prompt)
        size = len(prompt)
        if both_begin_with_it(chosen[:size] == prompt, rejected[:size] == prompt):
            chosen, rejected = chosen[size:], rejected[size:]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        ends_with_answer(name, messages)
        if messages[0]["role"] != "assistant":
            raise UserError(
                f"after the prompt, {name} goes on with a message of role {messages[0]['role']!r}: chosen and rejected "
                "must answer the same prompt"
            )
    return prompt, chosen, rejected


def both_begin_with_it(chosen: bool, rejected: bool) -> bool:
    """Whether chosen and rejected repeat the prompt; one side alone would be told apart by that."""
    if chosen != rejected:
        repeating, other = ("chosen", "rejected") if chosen else ("rejected", "chosen")
        raise UserError(
            f"{repeating} begins with the prompt and {other} does not; repeat it in both sides, or in neither"
        )
    return chosen


def of_ids(prompt: object, chosen: object, rejected: object) -> tuple[list[int], list[int], list[int]]:
    """Token ids, both sides complete."""
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
