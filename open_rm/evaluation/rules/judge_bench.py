"""JudgeBench (Tan et al. 2024, arXiv:2410.12784): both orders agree with the label.

Rules: utils/metrics.py and utils/judges.py of https://github.com/ScalerLab/JudgeBench at e2c52c2. A reward model scores each
answer once. Asked in one order it votes A>B if A's score is higher, else B>A; asked in the other order likewise, flipped
back; a pair is right if the votes agree with the label on balance. So a higher score must be the better answer's, and a tie
is never right. GPT-4o's pairs and Claude's are two tables at the authors.
"""

from collections.abc import Iterable

import numpy as np

from open_rm.evaluation.rules.verdict import (
    OVERALL,
    SECTION,
    SUBSET,
    VIEW,
    Line,
    Verdict,
    answers_of,
    by_subset,
    fewer_rows,
    is_scored,
    mean_line,
    not_the_whole,
    rows_that_count,
    without_scores,
)
from open_rm.evaluation.scored import ScoredSet

# Category -> what its sources begin with.
CATEGORIES = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
CLAUDE = "claude/"  # what the subset of a pair of Claude's answers begins with
AUTHORS_ROWS = {
    "": {"Overall": 350, "Knowledge": 154, "Reasoning": 98, "Math": 56, "Coding": 42},
    CLAUDE: {"Overall": 270, "Knowledge": 154, "Reasoning": 51, "Math": 34, "Coding": 31},
}


def judge(scored: ScoredSet) -> Verdict:
    """Rows of two answers in any order, of which gold says the better one, by their sources (ScoredSet.subsets). Overall is
    over GPT-4o's pairs where there are any; Claude's have lines of their own beside them."""
    answers_of(scored, 2)
    scores, gold = scored.scores.reshape(-1, 2), scored.gold.reshape(-1, 2)
    margin, label = scores[:, 0] - scores[:, 1], gold[:, 0] - gold[:, 1]
    decided = is_scored(scored) & ~np.isnan(label) & (label != 0)
    wins = np.where(decided, np.sign(margin) == np.sign(label), np.nan)
    found = by_subset(scored, rows_that_count(scored, wins))
    gpt = _table({name: rows for name, rows in found.items() if not name.startswith(CLAUDE)}, wins, "")
    claude = _table({name: rows for name, rows in found.items() if name.startswith(CLAUDE)}, wins, CLAUDE)
    lines = gpt or claude
    notes = []
    if gpt and claude:
        lines = gpt + [_beside(line) for line in claude]
        notes.append(
            "the overall number is of GPT-4o's pairs, as the authors' first table; Claude's pairs stand beside it"
        )
    elif claude:
        notes.append("these are Claude's pairs, the authors' second table")
    names = {line.name for line in lines}
    missing = [name for name in CATEGORIES if name not in names]
    rest = "the overall number is over the rows that are there"
    if undecided := int((is_scored(scored) & ~decided).sum()):
        notes.append(f"{undecided:,} rows without a label are passed over")
    notes = not_the_whole(missing, rest) + without_scores(scored) + notes + fewer_rows(lines)
    return Verdict(lines, wins, missing, notes)


def _table(found: dict[str, np.ndarray], wins: np.ndarray, begins: str) -> list[Line]:
    """Overall, the four categories, and the sources of one that has several. found: source -> rows."""
    if not found:
        return []
    expected = AUTHORS_ROWS[begins]
    lines = [mean_line("Overall", OVERALL, _together(found.values()), wins, expected["Overall"])]
    others = dict(found)
    for category, source in CATEGORIES.items():
        inside = {name: others.pop(name) for name in found if name.startswith(begins + source)}
        if inside:
            lines.append(mean_line(category, SECTION, _together(inside.values()), wins, expected[category]))
        if len(inside) > 1:
            lines += [mean_line(name, SUBSET, rows, wins) for name, rows in inside.items()]
    return lines + [mean_line(name, SUBSET, rows, wins) for name, rows in others.items()]


def _together(rows: Iterable[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(list(rows)))


def _beside(line: Line) -> Line:
    """A line of Claude's table below that of GPT-4o's pairs."""
    level = VIEW if line.level == OVERALL else line.level
    name = line.name if line.level == SUBSET else f"Claude: {line.name}"
    return Line(name, level, line.parts, line.estimate, line.authors_rows)
