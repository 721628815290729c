"""Messages: a list of {role, content} checked and reduced to what a chat template reads, wherever it came from.

A file that can hold text only (csv) holds lists as JSON text; HH's own text ("\n\nHuman: ...") is parsed on demand.
"""

import json
import re

from open_rm.errors import UserError, quote

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
DEEPEST = 50  # levels of objects and lists in what a chat template is given
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def check_messages(name: str, value: object) -> list[dict]:
    """A checked list of messages, reduced to what a chat template reads: columns of a table file leave empty keys."""
    if isinstance(value, str):  # beside message lists, text is the assistant's answer
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{name} must be text or a list of messages, not {'empty' if value == [] else type(value).__name__}"
        )
    for message in value:
        calls = isinstance(message, dict) and message.get("tool_calls")
        text = "" if calls and message.get("content") is None else isinstance(message, dict) and message.get("content")
        if not isinstance(text, str) or "role" not in message:
            raise UserError(
                f"{name} holds something that is not a message with role and content (text): {quote(message)}"
            )
        if message["role"] not in ROLES:
            raise UserError(f"{name} has a message of role {quote(message['role'])}; the roles are {', '.join(ROLES)}")
    return [
        {"content": ""} | {key: without_nulls(message[key]) for key in MESSAGE_KEYS if message.get(key) is not None}
        for message in value
    ]


def from_json(name: str, value: object) -> object:
    """Messages that stand as JSON text in a cell, as lists; anything else as it is.

    Raises:
        UserError: the text is a Python list of messages as Python prints it, which nothing else reads.
    """
    if not isinstance(value, str) or not LIST_OF_OBJECTS.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        if re.match(r"\s*\[\s*\{\s*'(role|content)'\s*:", value):
            raise UserError(f"{name} is a list of messages as Python prints it; write it as JSON") from None
        return value
    return found if all(isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in found) else value


def parse_hh(name: str, text: str) -> list[dict]:
    r"""Text of the form "\n\nHuman: ...\n\nAssistant: ..." (Bai et al. 2022, https://arxiv.org/abs/2204.05862) to messages."""
    parts = HH_TURN.split(text)
    if parts[0].strip():
        raise UserError(
            f'{name} does not begin with "\\n\\nHuman:" or "\\n\\nAssistant:"; --parse_hh reads nothing else'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def ends_with_answer(name: str, messages: list[dict]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise UserError(f"{name} must end with an assistant message (the response that is scored), not {last}")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise UserError(f"{name} is empty; remove the row or fill it in")


def has_turn(messages: list[dict], text: str) -> bool:
    return any(text.strip() in message["content"] for message in messages if message["role"] != "assistant")


def without_nulls(value, depth: int = 0):
    """A table file gives every object all keys of its column, most of them null."""
    if depth > DEEPEST:
        raise UserError("nested too deeply for a chat template; remove the row")
    if isinstance(value, dict):
        return {str(key): without_nulls(item, depth + 1) for key, item in value.items() if item is not None}
    return [without_nulls(item, depth + 1) for item in value] if isinstance(value, list) else value
