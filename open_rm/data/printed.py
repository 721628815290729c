"""Whether a chat template prints all that a conversation holds.

Most templates know no tool calls, many no reasoning, some no system text; what they leave out is no part of the tokens, and a
pair that differs there alone would become two equal sides. Whatever is not found in the text is taken away and the rest
rendered again: where that gives the same text, the template does not print it.
"""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from open_rm.data.templates import read_template, template_names
from open_rm.errors import UserError

REASONING = ("reasoning_content", "reasoning", "thinking")


def check_printed(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict], side: list[dict], text: str, template: dict
) -> None:
    """Refuse a conversation of which the template leaves something out.

    text: prompt and side rendered with `template`, the variables besides the messages.

    Raises:
        UserError: names the template and what it does not print.
    """
    messages = [*prompt, *side]
    hidden = _not_found(messages, text)
    if not hidden and not template and all(len(message) == 2 for message in messages):
        return

    def render(changed: list[dict], variables: dict) -> str | None:
        try:
            return tokenizer.apply_chat_template(changed, tokenize=False, **variables)
        except Exception:  # a template may refuse what is left, and then it has read what was taken away
            return None

    for what, key, changed, variables in _without(messages, hidden, template):
        if render(changed, variables) == text:
            raise UserError(
                f"{template_title(tokenizer)} does not print {what}, so it would be no part of what is trained on; choose "
                f"a template that does (--chat_template_name), or "
                + (f"leave it out with --ignore_columns {key}" if key else "remove the row")
            )


def _not_found(messages: list[dict], text: str) -> list[int]:
    """The messages whose content does not stand in the text behind that of the one before."""
    at, hidden = 0, []
    for i, message in enumerate(messages):
        content = message["content"].strip()
        found = text.find(content, at)
        if found < 0:
            hidden.append(i)
        else:
            at = found + len(content)
    return hidden


def _without(
    messages: list[dict], hidden: list[int], template: dict
) -> Iterator[tuple[str, str | None, list[dict], dict]]:
    """(what is taken away, what names it in --ignore_columns, messages and variables without it)"""
    if template.get("tools"):
        variables = {name: value for name, value in template.items() if name != "tools"}
        yield "tools", "tools", messages, variables
    for i in hidden:
        what = f"the content of a message of role {messages[i]['role']}"
        yield what, None, _changed(messages, i, content=""), template
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            yield "tool calls", "tool_calls", _changed(messages, i, without=("tool_calls",)), template
    if keys := [key for key in REASONING if any(message.get(key) for message in messages)]:
        without = [{key: value for key, value in message.items() if key not in REASONING} for message in messages]
        yield f"reasoning ({keys[0]})", keys[0], without, template


def _changed(messages: list[dict], i: int, without: tuple[str, ...] = (), **more) -> list[dict]:
    one = {key: value for key, value in messages[i].items() if key not in without} | more
    return [*messages[:i], one, *messages[i + 1 :]]


def template_title(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in use, as the user knows it."""
    template = tokenizer.chat_template
    for name in template_names():
        if isinstance(template, str) and read_template(name) in template:
            return f"the chat template {name}"
    return "the tokenizer's own chat template"
