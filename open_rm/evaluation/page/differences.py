"""Two texts with the spans in which they differ, by words.

difflib's SequenceMatcher on words and signs, whatever space follows them. Its own rule for frequent words, by which they start no
match, is used only where they would make the work large. Crumbs of agreement between two differing spans are counted with them: a
text that is marked at every other word reads like none. Answers that were written apart share next to nothing: marks would
be everywhere, so there are none and the page says why.
"""

import difflib
import re
from collections import Counter

COMPARED = 4_000  # characters of each text; what follows is left unmarked
MOST_MATCHES = 100_000  # equal words of both texts, each with each: of more, frequent words start no match
CRUMB = 12  # characters: a shorter shared span between two differing ones is counted with them
LITTLE = 0.2  # a smaller share of both texts shared: they differ throughout
SHORT = 400  # characters of both texts together: so few are marked whatever they share
WORDS = re.compile(r"(?:\w+|[^\w\s])\s*|\s+")

Spans = list[tuple[str, bool]]


def differing(better: str, worse: str) -> tuple[Spans, Spans, str]:
    """([(text, whether it differs)] of the one, of the other, what is to be said of the marks; empty: nothing).

    The texts of a list joined are the text that was given.
    """
    if better == worse:
        return [(better, False)], [(worse, False)], "The two answers are the same text."
    ours, theirs = (WORDS.findall(text[:COMPARED]) for text in (better, worse))
    blocks = _without_crumbs(_matched(ours, theirs), ours)
    compared = min(len(better), COMPARED) + min(len(worse), COMPARED)
    shared = 2 * sum(len("".join(ours[one:end])) for differs, one, end, _, _ in blocks if not differs)
    if compared > SHORT and shared < LITTLE * compared:
        return [(better, False)], [(worse, False)], "The two answers differ throughout: nothing is marked."
    spans = [("".join(ours[one:end]), differs) for differs, one, end, _, _ in blocks]
    others = [("".join(theirs[one:end]), differs) for differs, _, _, one, end in blocks]
    said = "" if any(differs for differs, *_ in blocks) else "The two answers differ in spaces and line breaks alone."
    if max(len(better), len(worse)) > COMPARED:
        said = f"Compared in their first {COMPARED:,} characters."
        spans.append((better[COMPARED:], False))
        others.append((worse[COMPARED:], False))
    return [span for span in spans if span[0]], [span for span in others if span[0]], said


def _matched(ours: list[str], theirs: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's opcodes."""
    one, other = ([word.strip() for word in words] for words in (ours, theirs))
    times = Counter(other)
    many = sum(count * times[word] for word, count in Counter(one).items()) > MOST_MATCHES
    return difflib.SequenceMatcher(None, one, other, autojunk=many).get_opcodes()


def _without_crumbs(opcodes, ours: list[str]) -> list[tuple[bool, int, int, int, int]]:
    """(whether it differs, start and end in ours, start and end in theirs), differing and shared spans in turn."""
    blocks: list[tuple[bool, int, int, int, int]] = []
    last = len(opcodes) - 1
    for place, (what, one, end, other, other_end) in enumerate(opcodes):
        crumb = 0 < place < last and len("".join(ours[one:end]).strip()) < CRUMB
        differs = what != "equal" or crumb
        if blocks and blocks[-1][0] == differs:
            _, one, _, other, _ = blocks.pop()
        blocks.append((differs, one, end, other, other_end))
    return blocks
