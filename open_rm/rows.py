"""One preference row of any accepted form to one form: (prompt, chosen, rejected)."""

from open_rm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")


def normalise_row(row: object) -> tuple:
    """One row of any accepted form to (prompt, chosen, rejected): all text, or all lists of messages.

    Accepted: chosen/rejected as text or as message lists, with `prompt` (text or messages) or without. A prompt that
    chosen and rejected already begin with is not repeated; without one, the messages both sides begin with are it.

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
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise UserError(f"{name} is empty; remove the row or fill it in")
        if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        prompt = prompt or ""
    else:
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
        # A text prompt beside complete conversations (the common Hub form) only repeats one of their turns.
        if prompt is None or (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
            same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
            same = min(len(chosen), len(rejected)) - 1 if same is None else same
            prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        else:
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
            chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if not messages or messages[-1]["role"] != "assistant":
                last = messages[-1]["role"] if messages else "nothing"
                raise UserError(f"{name} must end with an assistant message (the response that is scored), not {last}")
            if not messages[-1]["content"].strip():
                raise UserError(f"{name} is empty; remove the row or fill it in")
    if chosen == rejected:
        raise UserError("chosen and rejected are identical, so the pair prefers nothing; remove the row")
    return prompt, chosen, rejected


def _messages(name: str, value: object) -> list[dict]:
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
    return value


def _without_prompt(prompt: list[dict], messages: list[dict]) -> list[dict]:
    if messages[: len(prompt)] == prompt and len(messages) > len(prompt):
        return messages[len(prompt) :]
    return messages
