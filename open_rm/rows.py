"""One preference row of any accepted form to one form: (prompt, chosen, rejected)."""

from open_rm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


def normalise_row(row: object) -> tuple:
    """One row of any accepted form to (prompt, chosen, rejected): all text, or all lists of messages.

    Accepted: chosen/rejected as text or as message lists, with `prompt` (text or messages) or without. A prompt that
    chosen and rejected already begin with is not repeated; without one, the messages both sides begin with are it.
    Both sides must continue the same prompt: what tells them apart may only be the answer.

    Raises:
        UserError: what is wrong with the row; the caller adds where it is.
    """
    if not isinstance(row, dict):
        raise UserError(f"a row is an object with chosen and rejected, not {type(row).__name__}")
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise UserError(
            f"no value for {' and '.join(missing)}; the row has the columns {', '.join(sorted(row)) or 'none'}"
        )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        prompt, chosen, rejected = _normalise_text(prompt or "", chosen, rejected)
    else:
        prompt, chosen, rejected = _normalise_messages(
            prompt, _messages("chosen", chosen), _messages("rejected", rejected)
        )
    if chosen == rejected:
        raise UserError("chosen and rejected are identical, so the pair prefers nothing; remove the row")
    return prompt, chosen, rejected


def _normalise_text(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise UserError(f"{name} is empty; remove the row or fill it in")
    if prompt and _both_begin_with_it(chosen.startswith(prompt), rejected.startswith(prompt)):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _normalise_messages(prompt, chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    complete = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    if prompt is None or (isinstance(prompt, str) and complete):
        if prompt is not None and not all(_has_turn(messages, prompt) for messages in (chosen, rejected)):
            raise UserError("the prompt column is no turn of both conversations; correct it, or remove the column")
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        same = min(len(chosen), len(rejected)) - 1 if same is None else same
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    else:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
        size = len(prompt)
        if _both_begin_with_it(chosen[:size] == prompt, rejected[:size] == prompt):
            chosen, rejected = chosen[size:], rejected[size:]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            last = messages[-1]["role"] if messages else "nothing"
            raise UserError(f"{name} must end with an assistant message (the response that is scored), not {last}")
        if not messages[-1]["content"].strip():
            raise UserError(f"{name} is empty; remove the row or fill it in")
        if prompt and messages[0]["role"] != "assistant":
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


def _has_turn(messages: list[dict], text: str) -> bool:
    return any(text.strip() in message["content"] for message in messages if message["role"] != "assistant")


def _messages(name: str, value: object) -> list[dict]:
    """A checked list of messages, reduced to what a chat template reads: columns of a table file leave empty keys."""
    if isinstance(value, str):  # beside message lists, text is the assistant's answer
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{name} must be text or a list of messages, not {'empty' if value == [] else type(value).__name__}"
        )
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(
                f"{name} holds something that is not a message with role and content (text): {str(message)[:80]}"
            )
        if message["role"] not in ROLES:
            raise UserError(f"{name} has a message of role {message['role']!r}; the roles are {', '.join(ROLES)}")
    return [{key: message[key] for key in MESSAGE_KEYS if message.get(key) is not None} for message in value]
