"""Pictures of the report: vector graphics inside the page, and the reliability diagram as PNG for the model card.

matplotlib draws each in marker colours; in its SVG they, and all other styles, become classes and attributes, so that the
page's style sheet colours them (dark, light, print) and the page's security policy can refuse every inline style. What
matplotlib adds for files of their own (metadata, its addresses, the doctype) is left out. The same numbers give the same bytes.
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What is drawn, its marker in the SVG (replaced by a class of that name), its colour in a PNG on white.
MARKERS = {
    "ink": ("#010101", "#1b1f24"),
    "muted": ("#020202", "#57606a"),
    "grid": ("#030303", "#d0d7de"),
    "one": ("#040404", "#0b5cad"),
    "two": ("#050505", "#a04a00"),
    "three": ("#060606", "#1a7f37"),
}
SVG, PNG = ({name: pair[place] for name, pair in MARKERS.items()} for place in (0, 1))
WIDTH, HEIGHT = 4.3, 3.1  # inches, of which one is 72 units of the SVG: about a phone's width
MOST_SOURCES = 40  # boxes in one picture
RELIABILITY = "reliability.png"  # in a model's folder, for its card

Draw = Callable[[Figure, dict[str, str]], None]


def reliability_png(calibration: dict, path: str | Path, title: str) -> None:
    """The reliability diagram on white, readable in both themes."""
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    with _drawing(PNG):
        _reliability(calibration)(figure, PNG)
        figure.suptitle(title, fontsize=10, parse_math=False)
        figure.savefig(path, dpi=144, facecolor="white", metadata={"Software": None})


def reliability(calibration: dict, key: str) -> Markup:
    """key: of the picture, for the ids in it, unique in the page."""
    return _svg(
        _reliability(calibration), key, "Reliability diagram: share of pairs ranked right by stated probability", 3.9
    )


def by_margin(margins: list[dict], key: str) -> Markup:
    """Accuracy of the pairs in each bin of |margin|."""

    def draw(figure: Figure, colour: dict[str, str]) -> None:
        axis = figure.subplots()
        places = range(len(margins))
        largest = max((edge for one in margins for edge in (one["low"], one["high"]) if edge is not None), default=0)
        digits = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0

        def rounded(edge: float | None) -> str:
            return "∞" if edge is None else f"{round(edge, digits):g}"

        _with_intervals(axis, places, [one["accuracy"] for one in margins], colour["one"])
        axis.axhline(50, color=colour["muted"], linewidth=1, linestyle="--")
        axis.set_xticks(places, [f"{rounded(one['low'])} to\n{rounded(one['high'])}" for one in margins], fontsize=8)
        axis.set_ylim(0, 103)
        axis.set_xlabel("|margin|")
        axis.set_ylabel("ranked right, %")

    return _svg(draw, key, "Accuracy by size of the margin")


def by_source(sources: list[dict], key: str) -> Markup:
    """Boxes of the rewards of each source: line from 5 to 95 %, box from 25 to 75 %, the median across it."""
    shown = [one for one in sources if one["reward"] and all(edge is not None for edge in one["reward"]["quantiles"])]
    shown = shown[:MOST_SOURCES]

    def draw(figure: Figure, colour: dict[str, str]) -> None:
        axis = figure.subplots()
        for place, source in enumerate(shown):
            low, quarter, median, upper, high = source["reward"]["quantiles"]
            axis.plot([low, high], [place, place], color=colour["one"], linewidth=1.2)
            axis.barh(place, upper - quarter, left=quarter, height=0.5, color=colour["one"], alpha=0.35)
            axis.plot([median, median], [place - 0.3, place + 0.3], color=colour["one"], linewidth=2.2)
        axis.set_yticks([])
        for place, source in enumerate(
            shown
        ):  # the names inside, above each box: long ones need no margin of their own
            axis.annotate(
                _cut(source["name"], 44), (0, place - 0.33), xycoords=("axes fraction", "data"), xytext=(3, 0),
                textcoords="offset points", fontsize=8, color=colour["ink"], parse_math=False, va="bottom",
            )  # fmt: skip
        axis.set_ylim(len(shown) - 0.5, -0.9)
        axis.set_xlabel("reward")

    return _svg(draw, key, "Rewards by source: 5, 25, 50, 75 and 95 %", 0.75 + 0.37 * max(1, len(shown)))


def best_of_n(points: list[dict], key: str) -> Markup:
    """Gold score of the answer that the model likes best of n, with the best and the mean of n beside it."""

    def draw(figure: Figure, colour: dict[str, str]) -> None:
        axis = figure.subplots()
        counts = [point["n"] for point in points]
        lines = (("oracle", "three", "^", ":"), ("expected", "one", "o", "-"), ("random", "muted", "", "--"))
        for name, of, marker, style in lines:
            label = {"expected": "chosen by this model", "oracle": "the best there is", "random": "any answer"}[name]
            values = [float("nan") if point[name] is None else point[name] for point in points]
            axis.plot(counts, values, color=colour[of], marker=marker, linestyle=style, markersize=4, label=label)
        axis.set_xlabel("n answers to choose from")
        axis.set_ylabel("gold score")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)

    return _svg(draw, key, "Best of n: gold score of the answer with the highest reward")


def _reliability(calibration: dict) -> Draw:
    bins = [one for one in calibration["bins"] if one["n"]]

    def draw(figure: Figure, colour: dict[str, str]) -> None:
        axis, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axis.plot([50, 100], [50, 100], color=colour["muted"], linewidth=1, linestyle="--")
        points = [{"value": one["accuracy"], "low": _limits(one)[0], "high": _limits(one)[1]} for one in bins]
        _with_intervals(axis, [100 * one["confidence"] for one in bins], points, colour["one"], line=True)
        axis.set_ylim(0, 103)
        axis.set_xlim(49, 101)
        axis.set_ylabel("ranked right, %")
        axis.annotate(
            "below the line: too sure",
            (0.98, 0.04),
            xycoords="axes fraction",
            ha="right",
            color=colour["muted"],
            fontsize=8,
        )
        for one in bins:
            below.bar(50 * (one["low"] + one["high"]), one["n"], width=4.4, color=colour["one"], alpha=0.6)
        below.set_ylabel("pairs")
        below.yaxis.get_major_locator().set_params(nbins=2, integer=True)
        below.set_xlabel("the model's own probability, σ(|margin|), %")

    return draw


def _limits(one: dict) -> tuple[float, float]:
    """A bin's interval, as [low, high] or as a dict of an estimate."""
    interval = one["interval"]
    return (interval["low"], interval["high"]) if isinstance(interval, dict) else tuple(interval)


def _with_intervals(axis: Axes, places, estimates: list[dict], colour: str, line: bool = False) -> None:
    """Points in percent with their limits."""
    drawn = [(x, one) for x, one in zip(places, estimates, strict=True) if one["value"] is not None]
    values = [100 * one["value"] for _, one in drawn]
    below = [max(0.0, value - 100 * one["low"]) for value, (_, one) in zip(values, drawn, strict=True)]
    above = [max(0.0, 100 * one["high"] - value) for value, (_, one) in zip(values, drawn, strict=True)]
    axis.errorbar(
        [x for x, _ in drawn], values, yerr=[below, above], fmt="o-" if line else "o", color=colour, markersize=5,
        linewidth=1, elinewidth=1.5, capsize=2.5,
    )  # fmt: skip


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


@contextlib.contextmanager
def _drawing(colour: dict[str, str]) -> Iterator[None]:
    """matplotlib in these colours. Of characters that its own font lacks it does not warn: in the page the browser has them, in a
    PNG they are boxes."""
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "legend.labelcolor")
    style = {name: colour["ink"] for name in ink} | {
        "axes.grid": True, "axes.axisbelow": True, "grid.color": colour["grid"], "grid.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
        "font.size": 9, "font.family": "DejaVu Sans", "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "svg.fonttype": "none", "svg.hashsalt": "open_rm",
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _svg(draw: Draw, key: str, label: str, height: float = HEIGHT) -> Markup:
    """An <svg> element for the page; `label` is what a screen reader says, the numbers stand in a table beside it."""
    written = io.StringIO()
    with _drawing(SVG):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure, SVG)
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    tree = ElementTree.fromstring(written.getvalue())
    for child in [child for child in tree if child.tag.endswith("metadata")]:
        tree.remove(child)
    for parent in tree.iter():
        for child in [child for child in parent if child.tag.endswith("style")]:
            parent.remove(child)
    for element in tree.iter():
        _bare(element, key)
    tree.attrib.update({"role": "img", "aria-label": label, "class": "picture"})
    for name in ("width", "height", "version"):
        tree.attrib.pop(name, None)
    return Markup(ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False))


def _bare(element: ElementTree.Element, key: str) -> None:
    """An element of matplotlib's SVG as one of a page: no namespaces, no style of its own, ids that are the picture's own."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    classes = []
    for declaration in filter(None, attributes.pop("style", "").split(";")):
        name, value = (part.strip() for part in declaration.split(":", 1))
        role = next((role for role, marker in SVG.items() if value == marker), None)
        if role:
            classes.append(f"{name}-{role}")
        elif name != "font-family":  # the page's own
            attributes[name] = value
    if element.tag == "text" and "fill" not in attributes and not any(one.startswith("fill") for one in classes):
        classes.append("fill-ink")
    if classes:
        attributes["class"] = " ".join(classes)
    for name, value in attributes.items():
        if name == "id":
            attributes[name] = f"{key}-{value}"
        elif name in ("href", "clip-path"):
            attributes[name] = re.sub("#", f"#{key}-", value)
        elif name == "d":
            attributes[name] = " ".join(value.split())
    element.attrib.clear()
    element.attrib.update(attributes)
    for part in ("text", "tail"):  # the line breaks between elements
        if element.tag not in ("text", "tspan") or part == "tail":
            setattr(element, part, None) if not (getattr(element, part) or "").strip() else None
