"""Rows of one answer each, joined by their prompt to rows of all answers with their scores.

Two passes: the first notes which rows share a prompt (16 bytes a row), the second holds the answers of a prompt until its
last one was read. Where a prompt's rows stand together, as in HelpSteer2, that is a few rows; where they are scattered, no
answer is lost, and memory holds what is still open.
"""

import hashlib
import json
from dataclasses import dataclass, field

from open_rm.data.attributes import read_attributes
from open_rm.data.columns import Plan, plan_of
from open_rm.data.readers import Opened, Rows
from open_rm.data.reading import Reading
from open_rm.errors import UserError

CONTEXT = ("system", "history", "prompt", "tools", "chat_template_kwargs")
PEEKED = 100  # rows that may be unreadable before one says what form a source is of


@dataclass(frozen=True)
class Joined:
    """A row of all answers to a prompt: the rows that were joined, the first of which stands for all.

    attributes: of each answer those of --attributes; empty where none are asked.
    """

    first: dict
    responses: list
    scores: list
    attributes: list[tuple[float, ...]] = field(default_factory=list)


def is_answer_a_row(opened: Opened, reading: Reading) -> bool:
    """Whether a source has one answer a row, by the first of its rows that can be read."""
    for number, (_, row) in enumerate(opened.rows()):
        if number >= PEEKED:
            break
        if (plan := _plan(row, reading)) is not None:
            return plan.shape == "rows"
    return False


def joined(opened: Opened, reading: Reading) -> Opened:
    """The same source by prompts; a row that cannot be joined stays as it is, for the error that names it."""
    last: dict[bytes, int] = {}
    alone = 0
    for number, (_, row) in enumerate(opened.rows()):
        key = _key(row, reading)
        if key is None:
            alone += 1
        else:
            last[key] = number

    def rows() -> Rows:
        open_prompts: dict[bytes, tuple[str, Joined]] = {}
        for number, (place, row) in enumerate(opened.rows()):
            key = _key(row, reading)
            if key is None:
                yield place, row
                continue
            plan = _plan(row, reading)
            at, joint = open_prompts.setdefault(key, (place, Joined(row, [], [])))
            joint.responses.append(plan.values["response"].get(row))
            joint.scores.append(plan.values["score"].get(row))
            joint.attributes.extend(read_attributes(plan.attributes, row, (1,)))
            if last[key] == number:
                del open_prompts[key]
                yield at, joint

    return Opened(opened.fingerprint, len(last) + alone, rows)


def _key(row: object, reading: Reading) -> bytes | None:
    """Equal where rows have the same prompt; None for a row that is not of one answer."""
    plan = _plan(row, reading)
    if plan is None or plan.shape != "rows":
        return None
    try:
        read_attributes(plan.attributes, row, (1,))  # a row with a wrong one stays alone, and is named
        said = [plan.values[name].get(row) if name in plan.values else None for name in CONTEXT]
        return hashlib.blake2b(json.dumps(said, default=str).encode(), digest_size=16).digest()
    except (UserError, ValueError, RecursionError, UnicodeEncodeError):
        return None


def _plan(row: object, reading: Reading) -> Plan | None:
    try:
        return plan_of(row, reading) if isinstance(row, dict) else None
    except UserError:
        return None
