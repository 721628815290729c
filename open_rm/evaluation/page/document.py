"""report.html: the report as one page that asks nothing of anybody.

A strict policy stands in the page itself: nothing is loaded, the one style sheet and the one script are named by their hashes,
so that a text which slipped through as markup would still do nothing. All texts pass inert.inert first and Jinja's escaping
last; what is Markup is our own (style, script, pictures).
"""

import base64
import hashlib
import json
import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from open_rm.evaluation.page import differences, figures, inert, pictures
from open_rm.evaluation.score_folders import REPORT

FOLDER = Path(__file__).parent
PAGE = "report.html"
# What a set may leave out, and what stands in a report that has none of it.
OF_A_SET = {
    "title": None, "benchmark": None, "tied": 0, "unscored": 0, "overlength": 0, "lines": [], "missing": [], "notes": [],
    "extremes": None, "calibration": None, "length": None, "margins": [], "sources": [], "style": None, "ranking": None,
    "mistakes": [], "least_sure": [], "confident": None,
}  # fmt: skip
OF_LENGTH = {"prefers_longer": None, "gain": None}
OF_A_REPORT = {"made": [], "answers": [], "warnings": [], "sets": [], "invariance": None, "against": None}


def write_report(report: dict, folder: Path) -> None:
    """report.json and report.html, into a folder that is there; both whole, or both as they were."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    beside = {name: folder / f"{name}.tmp" for name in (REPORT, PAGE)}
    try:
        beside[REPORT].write_text(text + "\n", encoding="utf-8")
        write_html(report, beside[PAGE])
        for name, path in beside.items():
            os.replace(path, folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def write_html(report: dict, path: str | Path) -> None:
    """Draw a report (trust/report.make_report's, or a report.json read back) as one file."""
    report = OF_A_REPORT | inert.inert(report)
    sets = [_prepared(one, f"set{number}") for number, one in enumerate(report["sets"], 1)]
    write_page("report.html.jinja", path, report=report | {"sets": sets})


def write_page(template: str, path: str | Path, **values) -> None:
    """A template of this folder as one file, with the style, the script and the policy that all pages have."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": figures.percent, "estimate": figures.estimate, "points": figures.points, "number": figures.number,
        "plain": figures.plain, "p": figures.p_value, "limits": figures.limits, "place": figures.place, "key": figures.key, "name": inert.name,
    }  # fmt: skip
    environment.globals["pictures"] = pictures
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = environment.get_template(template).render(
        values | {"policy": Markup(policy), "style": Markup(style), "script": Markup(script)}
    )
    Path(path).write_text(page + "\n", encoding="utf-8", newline="\n")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _prepared(one: dict, key: str) -> dict:
    """A set with what the template needs besides: an id for its anchors, its examples side by side."""
    one = OF_A_SET | one
    if one["length"]:
        one["length"] = OF_LENGTH | one["length"]
    examples = {name: [_example(pair) for pair in one[name]] for name in ("mistakes", "least_sure")}
    return one | examples | {"key": key, "shown": one["title"] or one["name"]}


def _example(pair: dict) -> dict:
    """texts: whether there are any."""
    texts = bool(pair["better"] or pair["worse"])
    better, worse, said = differences.differing(pair["better"], pair["worse"])
    said = " ".join(filter(None, [pair.get("note"), said if texts else ""]))
    return pair | {"better": better, "worse": worse, "said": said, "texts": texts}
