"""Pictures of preference data: length histograms, and pairs token by token (terminal, HTML, PNG).

In the pairs every token is visible as the model gets it: its own span, special tokens by name, a newline as ⏎, a space
as ·, bytes of a character that is spread over several tokens as \\xe2. What both sides share from the start is shown
once, then what is the chosen's and the rejected's own; the last token of each, where its reward is read, is marked.
Terminal and PNG leave out the middle of long parts and say how many tokens; the HTML file shows all of them.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a server

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.patches import Rectangle
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from open_rm.data.counts import attribute_cells
from open_rm.inspection import sharing

MARKS = {"\n": "⏎", " ": "·", "\t": "⇥"}
# Background and, in the terminal, style of each part; the scored token is its side's last.
COLOURS = {"shared": "#dbe7f5", "chosen": "#d3efd4", "rejected": "#fadbd6", "scored": "#ffd23f"}
STYLES = {
    "shared": "black on #dbe7f5",
    "chosen": "black on #a9dfab",
    "rejected": "black on #f3b5ab",
    "scored": "bold black on #ffd23f",
}
SPECIAL_COLOUR = "#7b1fa2"
LEGEND = {
    "shared": "shared by both sides",
    "chosen": "chosen's own",
    "rejected": "rejected's own",
    "scored": "scored token",
}
HTML_PAIRS, PNG_PAIRS, TEXT_PAIRS = 12, 3, 2
HEAD, TAIL = 60, 30  # tokens of a part that are shown where its middle is left out
COLUMNS, MARGIN = 120, 9  # characters a line, and those of the part's name before them
# Cells of a whole number of pixels (10 points at 144 dpi are 20 pixels, 12 wide), or long text would drift out of them.
FONT_SIZE, ADVANCE, LINE, DPI = 10, 0.6, 1.5, 144
BINS = 60
SOURCES_PER_TABLE = 4


@dataclass(frozen=True)
class Token:
    """text: visible.  position: in its side.  ends_line: the text holds a newline."""

    text: str
    token_id: int
    position: int
    special: bool
    scored: bool
    ends_line: bool


@dataclass(frozen=True)
class PairView:
    """A pair to draw. title: place, source and lengths.  parts: shared, chosen, rejected."""

    title: str
    parts: dict[str, list[Token]]


class TokenNames:
    """Visible text of single tokens, whatever the kind of tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._added = {number: str(token.content) for number, token in tokenizer.added_tokens_decoder.items()}
        self.special = set(tokenizer.all_special_ids)
        self.special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Byte-level vocabularies write each byte as one of 256 characters, a space as Ġ and never as SentencePiece's ▁.
        vocabulary = tokenizer.get_vocab()
        byte_level = "Ġ" in vocabulary and "▁" not in vocabulary
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()} if byte_level else {}

    def raw(self, token_id: int) -> str:
        """The token as text with its whitespace."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return f"<{token_id}>"
        if self._bytes and all(character in self._bytes for character in token):
            # A token may hold a part of a character; its bytes are shown then.
            return bytes(self._bytes[character] for character in token).decode("utf-8", errors="backslashreplace")
        return token.replace("▁", " ")


def visible(text: str) -> str:
    """Whitespace as marks, everything else that cannot be seen as an escape."""
    shown = [MARKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text]
    return "".join(shown) or "∅"


def sample_views(split: str, data, tokenizer, count: int) -> list[PairView]:
    """Views of about `count` pairs of a pairs.PreferenceData, evenly spread over each source."""
    names, ids = TokenNames(tokenizer), data.source_ids()
    present = np.unique(ids)
    indices = []
    for number in present:
        own = np.flatnonzero(ids == number)
        spread = np.linspace(0, len(own) - 1, min(len(own), max(1, round(count / len(present))))).astype(int)
        indices += own[spread].tolist()
    views = []
    for index, place, (chosen, rejected) in zip(indices, data.places(indices), data.pairs(indices), strict=True):
        shared = int(data.table.shared_length[index])
        title = f"{split} {data.labels[ids[index]]}, {place}: {shared} tokens shared, "
        title += f"{len(chosen) - shared} of chosen, {len(rejected) - shared} of rejected"
        parts = {
            "shared": _tokens(names, chosen, 0, shared),
            "chosen": _tokens(names, chosen, shared, len(chosen)),
            "rejected": _tokens(names, rejected, shared, len(rejected)),
        }
        views.append(PairView(title, parts))
    return views


def _tokens(names: TokenNames, side: np.ndarray, start: int, end: int) -> list[Token]:
    tokens = []
    for position in range(start, end):
        token_id = int(side[position])
        raw = names.raw(token_id)
        scored = position == len(side) - 1
        tokens.append(Token(visible(raw), token_id, position, token_id in names.special, scored, "\n" in raw))
    return tokens


def _shortened(tokens: list[Token]) -> Iterator[Token | str]:
    """The tokens, or the first and last of many with a note between them."""
    left_out = len(tokens) - HEAD - TAIL
    if left_out <= 0:
        yield from tokens
        return
    yield from tokens[:HEAD]
    yield f" [{left_out} tokens] "
    yield from tokens[-TAIL:]


def wrapped(tokens: list[Token], width: int) -> list[list[tuple[str, Token | None]]]:
    """Lines of pieces (text, its token or None for a note), at most `width` characters long; newlines end a line."""
    lines, used, full = [[]], 0, False
    for item in _shortened(tokens):
        token = None if isinstance(item, str) else item
        text = item if token is None else token.text
        if used and (full or used + len(text) > width):
            lines.append([])
            used = 0
        for start in range(0, len(text), width):  # a token may be longer than a line
            if start:
                lines.append([])
                used = 0
            piece = text[start : start + width]
            lines[-1].append((piece, token))
            used += len(piece)
        full = token is not None and token.ends_line
    return lines


# ---- terminal


def pairs_as_text(data, tokenizer, *, width: int = COLUMNS, split: str = "train", count: int = TEXT_PAIRS) -> Text:
    """Sample pairs in colours for the terminal, in lines of `width` characters."""
    text = Text("tokens: ")
    for part, meaning in LEGEND.items():
        text.append(f" {meaning} ", STYLES[part]).append(" ")
    text.append("special", f"bold {SPECIAL_COLOUR} on white").append("  ⏎ newline  · space")
    for view in sample_views(split, data, tokenizer, count):
        text.append(f"\n\n{view.title}", "bold")
        for part, tokens in view.parts.items():
            for number, line in enumerate(wrapped(tokens, max(20, width - MARGIN))):
                text.append(f"\n{'' if number else part:>{MARGIN - 1}} ")
                for piece, token in line:
                    style = STYLES["scored" if token and token.scored else part] if token else "italic"
                    text.append(piece, f"{style} bold {SPECIAL_COLOUR}" if token and token.special else style)
    return text.append("\n")


def fact_tables(split: str, found: dict) -> list[Table]:
    """The numbers of a split of the report: a column per source, a few sources a table, and all of them at the end."""
    columns = found["sources"] + ([found["overall"]] if len(found["sources"]) > 1 else [])
    tables = []
    for start in range(0, len(columns), SOURCES_PER_TABLE):
        shown = columns[start : start + SOURCES_PER_TABLE]
        table = Table()
        for header in (split, *(column["label"] for column in shown)):
            table.add_column(Text(header))
        rows = [_fact_cells(column) for column in shown]
        for name in dict.fromkeys(name for cells in rows for name in cells):
            table.add_row(Text(name), *(Text(cells.get(name, "")) for cells in rows))
        tables.append(table)
    return tables


def _fact_cells(source: dict) -> dict[str, str]:
    cells = {"rows": f"{source['rows']}, {source['taken']} taken"}
    if "forms" in source:
        cells["forms"] = "\n".join(f"{form}: {count}" for form, count in source["forms"].items())
    cells |= {"pairs": str(source["pairs"])} | attribute_cells(source)
    for reason, fault in source["dropped"].items():
        first = f", first {fault['first']}" if isinstance(fault, dict) else ""
        cells[f"dropped: {reason}"] = f"{fault['count'] if isinstance(fault, dict) else fault}{first}"
    skipped = source["skipped"]
    cells["rows skipped"] = (
        f"{len(skipped)}, first {skipped[0]['place']}" if isinstance(skipped, list) and skipped else str(skipped or 0)
    )
    cells["ties, truncated"] = f"{source['ties']}, {source['truncated']}"
    if "identical_sides" in source:
        cells["identical sides"] = _with_place(source["identical_sides"])
    if not source["pairs"]:
        return cells
    cells["duplicate pairs"] = _with_place(source["duplicates"])
    cells["contradictory pairs"] = _with_place(source["contradictory"])
    cells["chosen longer, as long"] = f"{source['chosen_longer']:.1%}, {source['equally_long']:.1%}"
    baseline = source["length_baseline"]
    cells["length-only accuracy"] = f"{baseline['accuracy']:.1%} ({baseline['rule']})"
    for name, lengths in source["lengths"].items():
        cells[f"tokens, {name.replace('_', ' ')}"] = "  ".join(f"{key} {value}" for key, value in lengths.items())
    shared = source["shared"]
    cells["saved by shared_prefix"] = (
        f"{shared['by_pair']['ratio']:.2f}x fewer tokens, "
        f"{shared['by_prompt']['ratio']:.2f}x with all pairs of a prompt together"
    )
    cells |= {"prompts": str(shared["prompts"])} | sharing.cells(shared["step"])
    cells["scored token"] = "\n".join(
        f"{token['text']!r} (id {token['id']}) in {token['sides']} sides" for token in source["scored"]["tokens"]
    )
    return cells


def _with_place(found: dict) -> str:
    first = found["first"]
    if isinstance(first, dict):
        first = f"{first['place']} and {first['other']}"
    return f"{found['count']}, first {first}" if first else str(found["count"])


# ---- histograms


def draw_lengths(splits: dict, folder: Path) -> Path:
    """Write lengths.png: a row per split; prompts, whole sides, and what each side has of its own."""
    figure, axes = plt.subplots(len(splits), 3, figsize=(15, 3.6 * len(splits)), constrained_layout=True, squeeze=False)
    for row, (split, data) in zip(axes, splits.items(), strict=True):
        table = data.table
        own = {
            "chosen": table.chosen_length - table.shared_length,
            "rejected": table.rejected_length - table.shared_length,
        }
        panels = {
            "prompt": {"prompt": table.prompt_length},
            "whole side (prompt and response)": {"chosen": table.chosen_length, "rejected": table.rejected_length},
            "a side's own tokens (not shared)": own,
        }
        for axis, (title, series) in zip(row, panels.items(), strict=True):
            _histogram(axis, series)
            axis.set_title(f"{split}: {title}")
    path = folder / "lengths.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _histogram(axis, series: dict[str, np.ndarray]) -> None:
    colours = {"prompt": "tab:blue", "chosen": "tab:green", "rejected": "tab:red"}
    # The longest few would squeeze the rest into a corner: they are counted in the last bar.
    longest = max(int(np.percentile(lengths, 99.5, method="higher")) for lengths in series.values())
    width = max(1, -(-(longest + 1) // BINS))
    edges = np.arange(0, longest + width + 1, width) - 0.5
    for name, lengths in series.items():
        counts, _ = np.histogram(np.minimum(lengths, longest), edges)
        p50, p95 = np.percentile(lengths, (50, 95), method="inverted_cdf")
        label = f"{name}: p50 {p50}, p95 {p95}, max {lengths.max()}"
        axis.stairs(counts, edges, fill=True, alpha=0.35, color=colours[name], label=label)
        axis.stairs(counts, edges, color=colours[name], linewidth=1)
        axis.axvline(p50, color=colours[name], linestyle="--", linewidth=1)
    cut = any(lengths.max() > longest for lengths in series.values())
    axis.set_xlabel("tokens" + (f" (longer than {longest}: in the last bar)" if cut else ""))
    axis.set_ylabel("pairs")
    axis.set_xlim(edges[0], edges[-1])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="dashed: p50", title_fontsize=8)


# ---- pairs as HTML and PNG

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>preference pairs, token by token</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; background: #fff }}
h2 {{ font-size: 1em; margin: 2em 0 .3em; overflow-wrap: anywhere }}
div.part {{ font: 13px/1.9 monospace; overflow-wrap: anywhere; margin: .3em 0; padding-left: 6em; text-indent: -6em }}
div.part b {{ display: inline-block; width: 6em; text-indent: 0; color: #666 }}
span {{ padding: 2px 0; border-right: 1px solid #fff; text-indent: 0 }}
{colours}
.special {{ color: {special}; font-weight: bold }}
.scored {{ outline: 2px solid #b8860b; font-weight: bold }}
</style></head><body>
<h1>Preference pairs, token by token</h1>
<p>{legend} <span class="special">&lt;special&gt;</span> ⏎ newline, · space, \\xe2 a byte of a character that
is spread over several tokens.
Hover over a token for its id and position.</p>
{pairs}
</body></html>
"""


def draw_pairs(splits: dict, tokenizer, folder: Path) -> list[Path]:
    """Write pairs.html (self-contained, whole pairs) and pairs.png (a few, long parts shortened)."""
    views = [view for split, data in splits.items() for view in sample_views(split, data, tokenizer, HTML_PAIRS)]
    page = folder / "pairs.html"
    page.write_text(pairs_as_html(views), encoding="utf-8")
    picture = folder / "pairs.png"
    split, data = next(iter(splits.items()))
    _draw_png(sample_views(split, data, tokenizer, PNG_PAIRS), picture)
    return [page, picture]


def pairs_as_html(views: list[PairView]) -> str:
    """One self-contained page; everything that comes from data is escaped."""
    pairs = []
    for view in views:
        pairs.append(f"<h2>{html.escape(view.title)}</h2>")
        for part, tokens in view.parts.items():
            spans = "".join(_span(token, part) for token in tokens)
            pairs.append(f'<div class="part"><b>{part}</b>{spans}</div>')
    return PAGE.format(
        colours="\n".join(f".{part} {{ background: {colour} }}" for part, colour in COLOURS.items()),
        special=SPECIAL_COLOUR,
        legend=" ".join(f'<span class="{part}">{meaning}</span>' for part, meaning in LEGEND.items()),
        pairs="\n".join(pairs),
    )


def _span(token: Token, part: str) -> str:
    classes = part + (" special" if token.special else "") + (" scored" if token.scored else "")
    title = f"id {token.token_id}, position {token.position}" + (", the reward is read here" if token.scored else "")
    end = "<br>" if token.ends_line else "<wbr>"
    return f'<span class="{classes}" title="{title}">{html.escape(token.text)}</span>{end}'


def _draw_png(views: list[PairView], path: Path) -> None:
    """Tokens as text on a grid of character cells, wrapped at COLUMNS."""
    known = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()
    cells: list[tuple[int, int, str, str | None, bool, bool]] = []  # row, column, text, background, bold, special
    column = 0
    for part, meaning in LEGEND.items():
        cells.append((0, column, f" {meaning} ", COLOURS[part], part == "scored", False))
        column += len(meaning) + 4
    cells.append((0, column, "<special>", None, True, True))
    cells.append((0, column + 11, "⏎ newline  · space", None, False, False))
    row = 2
    for view in views:
        title = view.title if len(view.title) <= COLUMNS else "..." + view.title[3 - COLUMNS :]
        cells.append((row, 0, title, None, True, False))
        row += 1
        for part, tokens in view.parts.items():
            cells.append((row, 0, part, None, False, False))
            for line in wrapped(tokens, COLUMNS - MARGIN):
                column = MARGIN
                for piece, token in line:
                    colour = COLOURS["scored" if token.scored else part] if token else None
                    bold, special = (token.scored, token.special) if token else (False, False)
                    cells.append((row, column, piece, colour, bold, special))
                    column += len(piece)
                row += 1
        row += 1
    width, height = FONT_SIZE * ADVANCE / 72, FONT_SIZE * LINE / 72  # of a cell, in inches
    figure = plt.figure(figsize=((COLUMNS + 4) * width, (row + 2) * height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-2, COLUMNS + 2), ylim=(row + 1, -1))
    axis.axis("off")
    for row, column, text, colour, bold, special in cells:
        if colour:
            axis.add_patch(Rectangle((column, row), len(text), 0.9, facecolor=colour, edgecolor="white", linewidth=0.8))
        shown = "".join(c if ord(c) in known else "□" for c in text)  # the font has no such character
        axis.text(
            column,
            row + 0.45,
            shown,
            family="DejaVu Sans Mono",
            fontsize=FONT_SIZE,
            weight="bold" if bold or special else "normal",
            color=SPECIAL_COLOUR if special else "black",
            verticalalignment="center_baseline",
            parse_math=False,
        )
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
