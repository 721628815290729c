"""Text of others made visible and harmless: what a model, a set or an answer is called cannot change the page around it.

Escaping alone (Jinja's, here) keeps markup from acting. It leaves what acts as plain text: overrides of the direction, which
let a line read otherwise than it is stored; control and tag characters that nobody sees; towers of combining marks that
cover other lines; half surrogates, which no file can hold; texts of megabytes. Each is shown as what it is.
"""

import re

# Characters that are shown: of what people have to read in full, of any other text, of a name; of a longer one head and tail.
MOST, MOST_OF_A_SENTENCE, MOST_OF_A_NAME = 20_000, 1_500, 160
LONG = {"prompt", "better", "worse", "command", "answer", "says"}  # of a report
MARKS_SHOWN = 4  # combining marks on one character; scripts that stack them use up to three

# Controls but for newline and tab; line and paragraph separators; marks, embeddings, overrides and isolates of direction;
# characters without width but for the joiners, which scripts and emoji need; half surrogates; tags; not characters at all.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
COMBINING = re.compile(
    "([\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    f"\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{{{MARKS_SHOWN},}})"
)


def inert(value: object, most: int = MOST_OF_A_SENTENCE) -> object:
    """A report (dicts, lists, texts, numbers) with every text of it visible and no longer than is shown."""
    if isinstance(value, str):
        return visible(value, most)
    if isinstance(value, dict):
        return {key: inert(part, MOST if key in LONG else MOST_OF_A_SENTENCE) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [inert(part, most) for part in value]
    return value


def visible(text: str, most: int = MOST) -> str:
    """A text in which nothing is hidden: [U+202E] for what is not seen, the middle left out where it is longer than `most`.

    The result can be written as UTF-8 and holds no carriage return.
    """
    if len(text) > most:
        tail = most // 4
        left_out = f"\n[… {len(text) - most:,} characters left out …]\n"
        text = text[: most - tail] + left_out + text[len(text) - tail :]
    text = UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))
    return COMBINING.sub(_fewer_marks, text)


def _fewer_marks(found: re.Match) -> str:
    more = len(found[0]) - MARKS_SHOWN
    return found[0][:MARKS_SHOWN] + (f"[{more} more combining mark{'s' if more > 1 else ''}]" if more else "")


def name(text: object) -> str:
    """A name on one line."""
    return visible(" ".join(str(text).split()), MOST_OF_A_NAME).replace("\n", " ")
