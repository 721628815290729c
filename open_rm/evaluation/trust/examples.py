"""The pairs that are worth reading: where the model is surest of the wrong answer, and where it is least sure.

Texts are read for these pairs alone, and cut to what a page can hold: both answers around the place where they first differ, which
is the same place in both, and the prompt at its end, which is next to the answers.
"""

import json

import numpy as np

from open_rm.evaluation.scored import Pairs, ScoredSet

LONGEST = 4_000  # characters of a text, what is said of those left out included
KEPT = LONGEST - 100
BEFORE = 1_000  # of the characters kept, how many stand before the first difference where there are more
NO_TEXT = "The scores hold no texts of this row."
OTHER_TEXT = "The texts of this row are not as many as its scores, so none is shown."


def confident_mistakes(scored: ScoredSet, pairs: Pairs, count: int) -> list[dict]:
    """The pairs with the largest margin for the wrong answer, at most one of a row, the largest first."""
    wrong = np.flatnonzero(pairs.margin < 0)
    return _examples(scored, pairs, wrong[np.argsort(pairs.margin[wrong], kind="stable")], count)


def least_sure(scored: ScoredSet, pairs: Pairs, count: int) -> list[dict]:
    """The pairs with the smallest margin for either answer, at most one of a row, the smallest first."""
    return _examples(scored, pairs, np.argsort(np.abs(pairs.margin), kind="stable"), count)


def _examples(scored: ScoredSet, pairs: Pairs, order: np.ndarray, count: int) -> list[dict]:
    """The first `count` rows among the pairs `order` ([P] or fewer numbers of pairs)."""
    _, firsts = np.unique(pairs.row[order], return_index=True)
    return [_example(scored, pairs, int(pair)) for pair in order[np.sort(firsts)[:count]]]


def _example(scored: ScoredSet, pairs: Pairs, pair: int) -> dict:
    """probability: that the model gives the better answer, sigma(margin)."""
    row, better, worse = (int(numbers[pair]) for numbers in (pairs.row, pairs.better, pairs.worse))
    margin = float(pairs.margin[pair])
    prompt, better_text, worse_text, note = _texts(scored, row, better, worse)
    return {
        "id": scored.ids[row],
        "subset": scored.subsets[row],
        "margin": margin,
        "probability": float(np.exp(-np.logaddexp(0.0, -margin))),
        "prompt": prompt,
        "better": better_text,
        "worse": worse_text,
        "better_score": float(scored.scores[better]),
        "worse_score": float(scored.scores[worse]),
        "note": note,
    }


def _texts(scored: ScoredSet, row: int, better: int, worse: int) -> tuple[str, str, str, str | None]:
    """Prompt, better and worse answer, each cut, and why they are empty where there are none."""
    found = scored.texts(row)
    if found is None:
        return "", "", "", NO_TEXT
    prompt, answers = found
    start, end = map(int, scored.first[row : row + 2])
    if len(answers) != end - start:
        return "", "", "", OTHER_TEXT
    better_text, worse_text = (readable(answers[answer - start]) for answer in (better, worse))
    differ = first_difference(better_text, worse_text)
    prompt = readable(prompt)
    return cut(prompt, len(prompt)), cut(better_text, differ), cut(worse_text, differ), None


def readable(value: object) -> str:
    """A text as it is; messages as `role: text` parts with an empty line between them; nothing as an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n\n".join(_message(message) for message in value)
    return _as_json(value)


def _message(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):  # parts, of which those of text are read
        content = "".join(_as_json(part.get("text", part) if isinstance(part, dict) else part) for part in content)
    more = {
        key: value for key, value in message.items() if key not in ("role", "content") and value not in (None, [], "")
    }
    parts = [_as_json(content), *(f"[{key}: {_as_json(value)}]" for key, value in more.items())]
    return f"{message.get('role', 'message')}: " + "\n".join(part for part in parts if part)


def _as_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def first_difference(one: str, other: str) -> int:
    """How many characters both begin with. Halves of texts are compared, so that a megabyte takes no time."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def cut(text: str, around: int) -> str:
    """At most LONGEST characters of a text about the place `around`, with how many are left out on either side."""
    if len(text) <= LONGEST:
        return text
    start = min(max(around - BEFORE, 0), len(text) - KEPT)
    end = start + KEPT
    before = f"[… {start:,} characters left out …]\n" if start else ""
    behind = f"\n[… {len(text) - end:,} characters left out …]" if end < len(text) else ""
    return before + text[start:end] + behind
