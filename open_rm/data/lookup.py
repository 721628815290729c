r"""Where a value stands in a row: the right-hand sides of --column_map and of the table of forms.

    question                       a column, whatever signs are in its name
    question.full_text             a key of an object
    completions[].response         of every element of a list
    conversation[0]  [-1]          one element, from the front or from the back
    conversation[:-1]              a part of a list
    response_*                     columns that differ by a number, in its order, as a list
    -preference_strength           the negative of a number, or of every number of a list
    {instruction}\n{input}         text made of several values; a line whose values are all empty is left out

Text that a step leads into is read as JSON, since table files such as csv hold lists and objects that way.
"""

import json
import re
from dataclasses import dataclass

from open_rm.errors import UserError, quote

STEP = re.compile(r"\.([^.\[\]{}]+)|\[\]|\[(-?\d+)\]|\[(-?\d*):(-?\d*)\]")
HEAD = re.compile(r"[^.\[\]{}]+")
HOLE = re.compile(r"\{([^{}]+)\}")
EACH = "[]"


@dataclass(frozen=True)
class Lookup:
    """One expression, ready to be looked up in any row.

    text: as it was written.  columns: the row's columns that it reads.
    """

    text: str
    columns: tuple[str, ...]
    steps: tuple[str | int | slice, ...] = ()
    negative: bool = False
    holes: tuple["Lookup", ...] = ()  # of text made of several values
    is_list: bool = False  # of several columns

    @property
    def written(self) -> str:
        """The expression on one line."""
        return self.text.replace("\n", "\\n")

    def is_in(self, columns: set[str]) -> bool:
        """Whether a row of these columns has it: all that it needs, or one of those that a text is made of."""
        return any(name in columns for name in self.columns) if self.holes else columns.issuperset(self.columns)

    def get(self, row: dict) -> object:
        """The value, or None where a column, a key or an element is absent.

        Raises:
            UserError: a step leads into something that is no object or list.
        """
        if self.holes:
            return self._filled(row)
        if self.is_list:
            return [row.get(name) for name in self.columns]
        value = row.get(self.columns[0])
        if self.steps:
            value = _walk(value, self.steps, self.text)
        return _negated(value, self.text) if self.negative and value is not None else value

    def _filled(self, row: dict) -> str:
        lines, holes, left_out = [], iter(self.holes), False
        for line in self.text.split("\n"):
            values = [next(holes).get(row) for _ in HOLE.findall(line)]
            values = ["" if value is None else value for value in values]
            if odd := [value for value in values if not isinstance(value, str)]:
                raise UserError(f"{quote(self.text)} is made of text, and a value is {type(odd[0]).__name__}")
            if left_out and not line:  # the empty line after one that is left out goes with it
                continue
            left_out = bool(values) and not any(value.strip() for value in values)
            if not left_out:
                filled = iter(values)
                lines.append(HOLE.sub(lambda _, filled=filled: next(filled), line))
        return "\n".join(lines)


def parse_lookup(text: str, columns: object = ()) -> Lookup:
    """An expression. `columns`: names of the row's columns, one of which may look like an expression.

    Raises:
        UserError: the expression cannot be read.
    """
    if text in columns:
        return Lookup(text, (text,))
    if text.endswith("*") and columns:
        return Lookup(text, _numbered(text.removesuffix("*"), columns) or (text,), is_list=True)
    text = text.replace("\\n", "\n")
    if "{" in text:
        holes = tuple(parse_lookup(hole, columns) for hole in HOLE.findall(text))
        if not holes or re.search(r"[{}]", HOLE.sub("", text)):  # a brace that nothing closes would be text
            raise _unreadable(text)
        return Lookup(text, tuple(dict.fromkeys(name for hole in holes for name in hole.columns)), holes=holes)
    negative = text.startswith("-")
    head = HEAD.match(text, int(negative))
    if not head:
        raise _unreadable(text)
    steps, at = [], head.end()
    while at < len(text):
        step = STEP.match(text, at)
        if not step:
            raise _unreadable(text)
        steps.append(_step(step))
        at = step.end()
    return Lookup(text, (head[0],), tuple(steps), negative)


def _numbered(start: str, columns) -> tuple[str, ...]:
    ends = {name: name.removeprefix(start) for name in columns if str(name).startswith(start)}
    return tuple(sorted((name for name, end in ends.items() if end.isdecimal()), key=lambda name: int(ends[name])))


def _step(found: re.Match) -> str | int | slice:
    key, index, start, end = found.groups()
    if key is not None:
        return key
    if index is not None:
        return int(index)
    if start is None:
        return EACH
    return slice(int(start) if start else None, int(end) if end else None)


def _unreadable(text: str) -> UserError:
    return UserError(
        f"{quote(text)} names no place in a row; write a column, a key (question.full_text), elements "
        "(completions[].response, turns[0], turns[:-1]), -column for its negative, or text of several ({instruction}\\n{input})"
    )


def _walk(value: object, steps: tuple, text: str) -> object:
    for number, step in enumerate(steps):
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = _from_json(value, text)
        if value is None:
            return None
        if isinstance(step, str) and step != EACH:
            if isinstance(value, list):
                raise UserError(
                    f"{text}: there is a list before .{step}; write [].{step} for all its elements, or [0].{step}"
                )
            if not isinstance(value, dict):
                raise UserError(f"{text}: there is no key {step} in {_kind(value)}")
            value = value.get(step)
            continue
        if not isinstance(value, list):
            raise UserError(f"{text}: a list is needed there, and the row has {_kind(value)}")
        if step == EACH:
            rest = steps[number + 1 :]
            return [_walk(element, rest, text) for element in value]
        if isinstance(step, slice):
            value = value[step]
        else:
            value = value[step] if -len(value) <= step < len(value) else None
    return value


def _from_json(value: str, text: str) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{text}: the row has text there that is not JSON ({quote(value, 30)})") from None


def _negated(value: object, text: str) -> object:
    if isinstance(value, list):
        return [None if element is None else _negated(element, text) for element in value]
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{text}: only a number has a negative, and the row has something else there")
    return -value


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, list(value)[:8]))}"[:120] if value else "an empty object"
    return quote(value, 40)
