"""report.html: one file that asks nothing of anybody, holds what the report holds, and does nothing that a text tells it to."""

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

import matplotlib.image
import pytest
from browser import Browser
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_report import HOSTILE, sample_report

from open_rm.evaluation.page import differences, document, figures, inert, pictures

VOID = {"meta", "link", "br", "img", "hr", "input", "source", "wbr", "base", "embed"}


class Strict(HTMLParser):
    """Every element is closed where it was opened. elements: (tag, attributes).  texts: (tag, text) of each piece of text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"<{tag}/>")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:50]}")

    def text_of(self, tag: str) -> str:
        return "".join(text for inside, text in self.texts if inside == tag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def harmless(folder):
    document.write_html(sample_report(), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def hostile(folder):
    document.write_html(sample_report(HOSTILE, megabytes=1), folder / "hostile.html")
    return folder / "hostile.html"


@pytest.fixture(params=["harmless", "hostile"])
def page(request):
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------- the file


def test_nothing_in_the_page_can_ask_for_anything(page):
    """Nor run anything but the one script, or look otherwise than the one style sheet says."""
    parsed = Strict(page.read_text(encoding="utf-8"))
    ids = [of["id"] for _, of in parsed.elements if "id" in of]
    assert len(ids) == len(set(ids))
    links = [of for tag, of in parsed.elements if tag == "link"]
    assert links == [{"rel": "icon", "href": "data:,"}]
    for tag, of in parsed.elements:
        assert not {"src", "srcset", "style", "action", "data", "srcdoc", "xlink:href"} & set(of), (tag, of)
        assert not any(name.startswith(("on", "xmlns")) for name in of), (tag, of)
        if "href" in of and tag != "link":
            assert of["href"][0] == "#" and of["href"][1:] in ids, (tag, of)
        if "clip-path" in of:
            assert of["clip-path"].removeprefix("url(#").removesuffix(")") in ids
    count = Counter(tag for tag, _ in parsed.elements)
    assert (count["script"], count["style"], count["img"], count["iframe"], count["object"]) == (1, 1, 0, 0, 0)


def test_the_policy_names_the_script_and_the_style_sheet_by_their_hashes(page):
    parsed = Strict(page.read_text(encoding="utf-8"))
    [policy] = [of["content"] for _, of in parsed.elements if of.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parsed.text_of(tag).encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_a_hostile_text_changes_no_element_of_the_page(harmless, hostile):
    """Pictures apart, which hold as many labels as there are; marks and what is said of them follow the texts."""

    def counted(path):
        count = Counter(
            tag for tag, of in Strict(path.read_text(encoding="utf-8")).elements if of.get("class") != "muted"
        )
        return {tag: number for tag, number in count.items() if tag not in ("mark", "p", "use", "g", "path", "defs")}

    assert counted(hostile) == counted(harmless)


def test_a_hostile_text_is_shown_as_text(hostile):
    parsed = Strict(hostile.read_text(encoding="utf-8"))
    shown = " ".join(text for tag, text in parsed.texts if tag not in ("script", "style"))
    for part in (
        "<script>window.hurt = 1</script>",
        "{{ 7*7 }}",
        "{% raw %}",
        "]]></style></title>",
        "&lt;b&gt;",
        "[U+202E]gnp",
    ):
        assert part in shown
    for part in ("[U+D800]", "[U+0000]", "[U+200B]", "more combining marks]", "characters left out"):
        assert part in shown
    assert not inert.UNSEEN.search(shown)
    assert hostile.stat().st_size < 1_000_000  # of which the answer alone had as much


def test_the_same_report_gives_the_same_bytes(harmless, folder):
    document.write_html(sample_report(), folder / "again.html")
    assert (folder / "again.html").read_bytes() == harmless.read_bytes()


def test_the_numbers_of_the_report_stand_in_the_page(harmless):
    shown = " ".join(" ".join(text for _, text in Strict(harmless.read_text(encoding="utf-8")).texts).split())
    for part in (
        "62.3 % (59.6 to 65.0)", "ECE 0.324", "Brier score 0.332", "temperature 14.22 the loss is 0.6303",
        "every pair is ranked right", "54.0 % (52.6 to 55.4)", "18.0 %", "+12.0 (+8.0 to +16.0)", "< 0.001", "0.412 (0.380 to 0.444)",
        "398 of 441", "Missing: math", "p 0.030; as one of 4 (Šidák) p 0.115, no more than chance", "python -m open_rm.evaluation --model",
        "2,048 tokens", "bfloat16", "not known", "1 without a score", "41 longer than was read", "batches of 1 instead of 32",
    ):  # fmt: skip
        assert part in shown, part
    assert "://" not in shown


def test_what_a_report_does_not_have_is_left_out(folder):
    bare = {
        "name": "x",
        "rows": 0,
        "pairs": 0,
        "headline": {"name": "accuracy", "value": None, "low": None, "high": None, "n": 0},
    }
    document.write_html(
        {"model": "m", "created": "now", "command": "c", "seed": 1, "sets": [bare]}, folder / "bare.html"
    )
    parsed = Strict((folder / "bare.html").read_text(encoding="utf-8"))
    assert "accuracy: –" in " ".join(text for _, text in parsed.texts).replace("\n", "").replace(" :", ":")
    assert not [tag for tag, _ in parsed.elements if tag == "svg"]


def test_pairs_without_texts_are_a_table_of_numbers(folder):
    report = sample_report()
    report["sets"][0] |= {"calibration": None, "margins": [], "sources": []}
    report["sets"] = report["sets"][:1]
    for pair in report["sets"][0]["mistakes"]:
        pair |= {"prompt": "", "better": "", "worse": "", "note": "The scores hold no texts of this row."}
    document.write_html(report, folder / "no_texts.html")
    text = (folder / "no_texts.html").read_text(encoding="utf-8")
    section = text[text.index('id="set1-mistakes"') : text.index('id="set1-unsure"')]
    assert "The scores hold no texts of this row." in section and "<details" not in section
    assert section.count("<tr>") == 1 + 4


def test_a_report_of_real_scores_is_drawn(folder):
    from open_rm.evaluation import score_file
    from open_rm.evaluation.trust.report import make_report

    skywork, internlm = (
        score_file.read_scores(shared_data("judgebench_scores") / f"{name}.jsonl")
        for name in ("Skywork_Skywork-Reward-Llama-3.1-8B", "internlm_internlm2-20b-reward")
    )
    report = make_report(skywork, model="Skywork", meta={}, command="c", seed=1, other=("InternLM", internlm))
    document.write_html(report, folder / "real.html")
    parsed = Strict((folder / "real.html").read_text(encoding="utf-8"))
    shown = " ".join(" ".join(text for _, text in parsed.texts).split())
    assert "62.3 % (57.1 to 67.2)" in shown and "ECE 0.324 (" in shown and "Brier score 0.332, loss 2.408" in shown
    assert [tag for tag, of in parsed.elements if of.get("class") == "picture"] == ["svg"] * 3


# ---------------------------------------------------------------- pictures


def test_a_picture_has_no_style_of_its_own_and_only_its_own_ids():
    margins = sample_report()["sets"][0]["margins"]
    one, other = (str(pictures.by_margin(margins, key)) for key in ("a", "b"))
    assert one != other and one.replace('"a-', '"b-').replace("#a-", "#b-") == other
    parsed = Strict(one)
    classes = " ".join(of.get("class", "") for _, of in parsed.elements)
    assert "stroke-one" in classes and "fill-ink" in classes
    coloured = [of[name] for _, of in parsed.elements for name in ("fill", "stroke") if name in of]
    assert set(coloured) <= {"none"}
    assert not [of for _, of in parsed.elements if "font-family" in of]
    assert parsed.elements[0][1]["aria-label"] == "Accuracy by size of the margin"


@pytest.mark.filterwarnings("error")
def test_a_name_in_a_picture_is_text_and_no_formula(tmp_path):
    source = sample_report()["sets"][0]["sources"][0] | {"name": "<b>$x_1$ \\frac & co</b> 日本"}
    [label] = [text for tag, text in Strict(str(pictures.by_source([source], "k"))).texts if "frac" in text]
    assert label == "<b>$x_1$ \\frac & co</b> 日本"
    pictures.reliability_png(sample_report()["sets"][0]["calibration"], tmp_path / "r.png", "$\\broken{$ 日本")
    picture = matplotlib.image.imread(tmp_path / "r.png")
    assert min(picture.shape[:2]) > 400 and (picture[0, 0, :3] == 1).all() and (picture[..., :3] < 0.5).any()


# ---------------------------------------------------------------- numbers and texts


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.estimate({"value": 0.6229, "low": 0.5757, "high": 0.6683}), "62.3 % (57.6 to 66.8)"),
        (figures.estimate({"value": 1.0, "low": None, "high": None}), "100.0 %"),
        (figures.estimate(None), "–"),
        (figures.percent(-0.0001), "0.0 %"),
        (figures.points({"difference": -0.0312, "low": -0.0714, "high": 0.01}), "−3.1 (−7.1 to +1.0)"),
        (figures.number(1234567), "1,234,567"),
        (figures.number(0.00012345, 3), "0.000123"),
        (figures.number(-2.0, 3), "−2.00"),
        (figures.number(123456.7), "123,457"),
        (figures.p_value(0.0004), "< 0.001"),
    ],
)
def test_numbers_are_shown_as_people_read_them(shown, expected):
    assert shown == expected


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=80))
def test_any_text_can_be_written_and_hides_nothing(text):
    shown = inert.visible(text)
    shown.encode("utf-8")
    assert not inert.UNSEEN.search(shown) and "\r" not in shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_scripts_that_need_joiners_and_marks_are_left_as_they_are():
    for text in ("\U0001f468\u200d\U0001f469\u200d\U0001f467", "نمی\u200cخواهم", "Z\u0301\u0323", "ที่นี่", "שָׁלוֹם"):
        assert inert.visible(text) == text


PIECES = st.lists(st.sampled_from(["one ", "two ", "a, b. ", "\n", "word" * 9, " ", "x" * 30, "日本"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(PIECES, PIECES)
def test_the_spans_of_two_texts_joined_are_the_texts(one, other):
    better, worse = "".join(one), "".join(other)
    spans, others, _ = differences.differing(better, worse)
    assert ("".join(text for text, _ in spans), "".join(text for text, _ in others)) == (better, worse)
    shared, theirs = (["".join(t.split()) for t, differs in side if not differs] for side in (spans, others))
    if any(differs for _, differs in [*spans, *others]):  # what is not marked stands in both
        assert "".join(shared) == "".join(theirs)


def test_what_only_one_answer_has_is_marked():
    shared = "The capital of France is a large city on a river, and its name is "
    spans, others, said = differences.differing(
        shared + "Paris. It has been so for long.", shared + "Lyon. It has been so for long."
    )
    assert [text for text, differs in spans if differs] == ["Paris"]
    assert [text for text, differs in others if differs] == ["Lyon"] and said == ""


def test_crumbs_of_agreement_between_differences_are_marked_with_them():
    shared = "Everything before this place is the same in both answers, word by word. "
    spans, others, _ = differences.differing(shared + "red a blue of green", shared + "ten a two of six")
    assert spans == [(shared, False), ("red a blue of green", True)]
    assert others == [(shared, False), ("ten a two of six", True)]


def test_answers_that_differ_in_spaces_alone_are_not_marked_and_it_is_said():
    spans, others, said = differences.differing("one two\nthree", "one  two three")
    assert (spans, others) == ([("one two\nthree", False)], [("one  two three", False)])
    assert "spaces and line breaks alone" in said


def test_texts_that_share_next_to_nothing_are_not_marked_and_it_is_said():
    better, worse = "abc def ghi jkl " * 30, "mno pqr stu vwx " * 30
    spans, _, said = differences.differing(better, worse)
    assert spans == [(better, False)] and "throughout" in said


def test_long_texts_of_few_words_are_compared_in_bounded_work():
    """Each word of one matches thousands of the other: without a bound this takes minutes."""
    better, worse = "a b " * 5_000, "b b a " * 4_000
    spans, others, _ = differences.differing(better, worse)
    assert "".join(text for text, _ in spans) == better and "".join(text for text, _ in others) == worse


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


# Ratio by WCAG 2.2 of each visible text with what is behind it; the worst of the page.
CONTRAST = """(() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n.slice(0, 3), 1] };
  const over = (top, low) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * low[i]).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  for (const one of document.querySelectorAll("details")) one.open = true;
  let worst = [99, ""], count = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); layers.push(c); if (c[3] === 1) break }
    const back = layers.reverse().reduce((low, top) => over(top, low), [255, 255, 255, 1]);
    const style = getComputedStyle(element);
    const fore = over(parse(element.ownerSVGElement ? style.fill : style.color), back);
    const [a, b] = [light(fore), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    count++;
    if (ratio < worst[0]) worst = [ratio, text.slice(0, 60)];
  }
  return [worst, count];
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_has_nothing_to_complain_of_and_every_text_can_be_read(browser, harmless, dark):
    for width in (1280, 390):
        browser.show(harmless, width=width, dark=dark)
        assert browser.requests == [harmless.resolve().as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        (worst, text), count = browser.evaluate(CONTRAST)
        assert worst >= 4.5 and count > 500, (worst, text, count)
        assert browser.complaints == []
    back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") != dark


def test_a_hostile_text_does_nothing_in_a_browser(browser, hostile):
    browser.show(hostile, width=390)
    assert browser.evaluate("window.hurt === undefined && document.images.length === 0")
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.complaints == [] and browser.requests == [hostile.resolve().as_uri()]


def test_markup_that_slipped_through_would_do_nothing_either(browser, harmless):
    browser.show(harmless)
    browser.evaluate(
        'document.body.insertAdjacentHTML(\'beforeend\', \'<img src="http://127.0.0.1:9/x.png" onerror="window.hurt = 1">'
        '<p id=styled style="position: fixed" onclick="window.hurt = 2">x</p><form action="http://127.0.0.1:9/"></form>\');'
        "document.getElementById('styled').click(); const s = document.createElement('script'); s.text = 'window.hurt = 3';"
        "document.body.append(s); new Promise((done) => setTimeout(done, 0))"
    )
    assert browser.evaluate("window.hurt") is None
    assert browser.evaluate("getComputedStyle(document.getElementById('styled')).position") == "static"
    assert any("Content Security Policy" in text for text in browser.complaints)


COLUMN = (
    "[...document.querySelectorAll('#set1-lines + figure tbody tr')].map((row) => row.cells[%d].textContent.trim())"
)
BUTTON = "#set1-lines + figure th:nth-child(%d) button"
SORTED = "document.querySelector('#set1-lines + figure th:nth-child(%d)').getAttribute('aria-sort')"


def test_a_table_is_sorted_by_mouse_and_by_keyboard_and_back_again(browser, harmless):
    browser.show(harmless)
    as_written = browser.evaluate(COLUMN % 2)
    browser.click(BUTTON % 3)
    values = [float(re.match(r"[\d.]+", text)[0]) for text in browser.evaluate(COLUMN % 2)]
    assert values == sorted(values, reverse=True) and browser.evaluate(SORTED % 3) == "descending"
    browser.press("Enter", 13, "\r")  # the button has the focus
    values = [float(re.match(r"[\d.]+", text)[0]) for text in browser.evaluate(COLUMN % 2)]
    assert values == sorted(values) and browser.evaluate(SORTED % 3) == "ascending"
    browser.press(" ", 32, " ")
    assert browser.evaluate(COLUMN % 2) == as_written and browser.evaluate(SORTED % 3) is None
    browser.click(BUTTON % 1)
    names = browser.evaluate(COLUMN % 0)
    assert names == sorted(names, key=str.lower) and browser.evaluate(SORTED % 1) == "ascending"


def test_the_page_is_whole_without_scripts_and_on_paper(browser, harmless):
    browser.show(harmless, scripts=False)
    assert browser.evaluate("document.querySelectorAll('button').length") == 0
    closed = "[...document.querySelectorAll('details:not([open]) .text')].map((one) => one.checkVisibility())"
    assert set(browser.evaluate(closed)) == {False}
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert set(browser.evaluate(closed)) == {True}
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.theme(dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.pdf().startswith(b"%PDF")


def test_the_answers_stand_whole_however_many_sets_they_are_about():
    """They grow with the sets; a cut would fall into a sentence."""
    answer = " ".join(f"Sentence {i} of an answer." for i in range(150))
    assert inert.inert({"answers": [{"answer": answer}]})["answers"][0]["answer"] == answer
