"""Messages: every shape in use, checked and reduced to the list of {role, content} that a chat template reads.

Accepted besides the plain list: content in text parts, from/value with human and gpt (ShareGPT), one message alone, tool
calls and their results under roles of their own (ms-swift, LLaMA-Factory), JSON text of any of these, HH's text.
Not covered: images and sound; they are refused by that word.
"""

import json
import re
from collections.abc import Collection

from open_rm.errors import UserError, quote

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
# Other projects' names of the roles: ShareGPT, OpenAssistant, Gemini; results of tools in ms-swift, LLaMA-Factory, OpenAI.
SAME_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
SAME_ROLES |= {"function": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool"}
# Keys of a message that say something and that no chat template is given. images are lists of files (ms-swift, LLaMA-Factory).
LOST_KEYS = frozenset(["function_call", "image", "images", "audio", "audios", "video", "videos", "documents"])
CALL_ROLES = ("tool_call", "function_call")
OTHER_PARTS = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file")
DEEPEST = 50  # levels of objects and lists in what a chat template is given
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def check_messages(name: str, value: object, leave_out: Collection[str] = ()) -> list[dict]:
    """A checked list of messages, reduced to what a chat template reads: columns of a table file leave empty keys.

    leave_out: keys of messages to ignore, e.g. reasoning_content.
    """
    if isinstance(value, str):  # beside message lists, text is the assistant's answer
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict) and is_message(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{name} must be text or a list of messages, not {'empty' if value == [] else type(value).__name__}"
        )
    messages: list[dict] = []
    for message in value:
        made = _checked(name, message, leave_out)
        if made.get("tool_calls") and messages and _is_call(message) and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"] += made["tool_calls"]  # calls in a row are one turn of several calls
        else:
            messages.append(made)
    return messages


def _checked(name: str, message: object, leave_out: Collection[str]) -> dict:
    """One message."""
    if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
        message = {"role": message["from"], "content": message["value"]} | message
    if not isinstance(message, dict) or "role" not in message:
        raise _no_message(name, message)
    if len(message) > 2 and not LOST_KEYS.isdisjoint(message):
        _check_nothing_is_lost(name, message, leave_out)
    content = message.get("content")
    if content.__class__ is not str:
        content = _content(name, message)
    role = message["role"]
    if role not in ROLES:
        role = role.strip().lower() if isinstance(role, str) else role
        if role in CALL_ROLES:
            return {"role": "assistant", "content": "", "tool_calls": _calls(name, content)}
        role = SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        roles = ", ".join(ROLES)
        raise UserError(f"{name} has a message of role {quote(message['role'])}; the roles are {roles}")
    kept = {
        key: message[key] if message[key].__class__ is str else without_nulls(message[key])
        for key in MESSAGE_KEYS
        if message.get(key) is not None and key not in leave_out
    }
    return kept | {"role": role, "content": content}


def _check_nothing_is_lost(name: str, message: dict, leave_out: Collection[str]) -> None:
    for key in sorted(LOST_KEYS & message.keys() - set(leave_out)):
        if message[key] not in (None, "", [], {}):
            way = "write it as tool_calls" if key == "function_call" else "remove the row"
            raise UserError(
                f"{name} has a message with {key}, which the reward model does not read; {way}, or leave it out "
                f"(--ignore_columns {key})"
            )


def _content(name: str, message: dict) -> str:
    """Content that is no text: parts of text, or none beside tool calls."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list) or not content:
        raise _no_message(name, message)
    return "".join(_text_of_part(name, part, message) for part in content)


def _text_of_part(name: str, part: object, message: dict) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _no_message(name, message)
    kind = part.get("type")
    other = [word for word in OTHER_PARTS if kind == word or (kind != "text" and part.get(word) is not None)]
    if other or (kind == "text" and part.get("image") is not None):
        raise UserError(
            f"{name} holds a part of type {(other or ['image'])[0]}, and the reward model reads text alone; remove the row"
        )
    if not isinstance(part.get("text"), str):
        raise _no_message(name, message)
    return part["text"]


def _no_message(name: str, message: object) -> UserError:
    return UserError(f"{name} holds something that is not a message with role and content (text): {quote(message)}")


def _is_call(message: object) -> bool:
    return str(message.get("role", message.get("from"))).strip().lower() in CALL_ROLES


def _calls(name: str, content: str) -> list[dict]:
    """The calls that stand as JSON in a message of their own: {"name": ..., "arguments": {...}}, or a list of them."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f'{name} has a tool call that is not JSON with a "name": {quote(content)}')
    return [{"type": "function", "function": without_nulls(call)} for call in calls]


def is_message(value: object) -> bool:
    """Whether an object is one message, by its keys."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def from_json(name: str, text: str) -> object:
    """Messages that stand as JSON text in a cell: a list of them, one alone, or content in parts; other text as it is.

    Raises:
        UserError: the text is a Python list of messages as Python prints it, which nothing else reads.
    """
    found = parsed_json(text)
    if found is None:
        if re.match(r"\s*\[?(array\()?[\[\s]*\{\s*'\w+'\s*:", text) and re.search(
            r"'(role|content|from|value)'\s*:", text
        ):
            raise UserError(f"{name} is a list of messages as Python prints it; write it as JSON")
        return text
    if is_message(found):
        return [found]
    if isinstance(found, list) and found and all(map(is_message, found)):
        return found
    return text


def parsed_json(text: str) -> list | dict | None:
    """What text holds that is a JSON list or object; None for all other text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


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
