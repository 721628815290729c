"""Who won: a label, a signed strength, two scores, or a list of scores to pairs (better, worse); ties are told apart.

Numbers are read only where the row or a flag says what they mean: 1 may be the first answer, the second, or yes.
"""

import contextlib
import itertools
import math
import re
from decimal import Decimal
from typing import NamedTuple

from open_rm.data.forms import SOFT, VOTES
from open_rm.errors import UserError, quote

SIDES = ("a", "b", "tie")
TIE = 0.5  # the probability that the first of two is the better one, where both are as good
WINNERS = {name + side: side for name in ("", "response_", "model_") for side in "ab"}
TRUTH = {"true": 1, "false": 0}  # of answers that are right or wrong, also as text (csv)
TIES = ("tie", "both_bad", "bothbad", "both bad", "both_good", "neither")


def number(name: str, value: object, way_on: str = "correct or remove it") -> float:
    """A finite number, also where it stands as text (csv)."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    value = float(value) if isinstance(value, Decimal) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or math.isnan(value):
        raise UserError(f"{name} holds {quote(value)}, which is not a finite number; {way_on}")
    return float(value)


def probability(found: dict) -> float | None:
    """How probable it is that chosen is the better one, by label_prob or by votes; None where the row does not say."""
    given = {name: value for name in SOFT if (value := found.get(name)) not in (None, "")}
    if not given:
        return None
    if "label_prob" in given:
        p = number("label_prob", given["label_prob"])
        if not 0 <= p <= 1:
            raise UserError(f"label_prob is {p:g}, which is no probability; it must be from 0 to 1")
        return TIE if abs(p - TIE) < 1e-7 else p  # what the cache's float32 cannot tell from a tie is one
    if lacking := [name for name in VOTES if name not in given]:
        raise UserError(f"no value for {lacking[0]}, beside the votes for the other side; correct or remove the row")
    for_chosen, for_rejected = (_votes(name, given[name]) for name in VOTES)
    if for_chosen + for_rejected == 0:
        raise UserError(f"{VOTES[0]} and {VOTES[1]} are both 0, so nobody says which is better; remove the row")
    return for_chosen / (for_chosen + for_rejected)


def _votes(name: str, value: object) -> float:
    votes = number(name, value)
    if votes < 0 or not votes.is_integer():
        raise UserError(f"{name} is {votes:g}, which is no number of votes; it must be a whole number, 0 or more")
    return votes


def winner_of(value: object, meant: dict[str, str]) -> str:
    """a, b or tie. meant: what values mean (--label_values, or a form's); empty: the words that everybody uses."""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    if text in meant:
        return meant[text]
    if meant:
        named = " ".join(f"{side}={value}" for value, side in meant.items())
        raise UserError(f"winner is {quote(value)}, which is none of the values that say who won ({named})")
    if text in TIES or text.startswith("tie "):
        return "tie"
    if text not in WINNERS:
        raise UserError(
            f"winner is {quote(value)}; it must be a, b, response_a, response_b, model_a, model_b or tie, or say with "
            "--label_values what its values mean, e.g. a=1 b=0"
        )
    return WINNERS[text]


def winner_of_scores(values: dict, lower_is_better: bool) -> tuple[str, float]:
    """(a, b or tie; by how much) of score_a and score_b."""
    a, b = (number(name, values[name]) for name in ("score_a", "score_b"))
    lead = b - a if lower_is_better else a - b
    return ("a" if lead > 0 else "b" if lead < 0 else "tie"), abs(lead)


def winner_of_strength(value: object) -> tuple[str, float]:
    """(a, b or tie; by how much) of a number that is positive where a is better."""
    strength = number("strength", value)
    return ("a" if strength > 0 else "b" if strength < 0 else "tie"), abs(strength)


class Ranked(NamedTuple):
    """Two answers of a ranked list, the better one first, or of two that are as good the one that stands first.

    answers: their numbers among the responses.  lead: difference of their scores; None without scores.
    levels: their places in the list, 0 the best; equal scores have equal ones.  alike: the answers are the same.
    """

    better: object
    worse: object
    answers: tuple[int, int]
    lead: float | None
    levels: tuple[int, int]
    alike: bool

    @property
    def is_tie(self) -> bool:
        """Whether both have the same score."""
        return self.levels[0] == self.levels[1]


def ranked(responses: object, scores: object, lower_is_better: bool) -> list[Ranked]:
    """All pairs of a ranked list, the best first. Without scores the list is in order, the best first."""
    if not isinstance(responses, list) or len(responses) < 2:
        what = f"{len(responses)} responses" if isinstance(responses, list) else type(responses).__name__
        raise UserError(f"responses must be a list of at least 2 responses, not {what}; correct or remove the row")
    in_order = scores is None
    if in_order:
        scores = list(range(len(responses), 0, -1))
    if not isinstance(scores, list) or len(scores) != len(responses):
        what = len(scores) if isinstance(scores, list) else type(scores).__name__
        raise UserError(f"scores must be a list with a number for each of the {len(responses)} responses, not {what}")
    way_on = "correct it, or remove the answer and its score"
    values = [number("scores", TRUTH.get(str(score).strip().lower(), score), way_on) for score in scores]
    if lower_is_better and not in_order:
        values = [-value for value in values]
    order = sorted(range(len(values)), key=lambda i: -values[i])  # stable: equal scores stay in the file's order
    level = {value: place for place, value in enumerate(sorted(set(values), reverse=True))}
    pairs = []
    for i, j in itertools.combinations(order, 2):
        lead = None if in_order else values[i] - values[j]
        levels = level[values[i]], level[values[j]]
        pairs.append(Ranked(responses[i], responses[j], (i, j), lead, levels, responses[i] == responses[j]))
    return pairs


def is_called_rank(text: str) -> bool:
    """Whether a column or key is called a rank, of which 1 is mostly the best."""
    return bool({"rank", "ranks", "ranking", "rankings"} & set(re.findall(r"[a-z]+", text.lower().replace("_", " "))))


def looks_like_ranks(scores: object) -> bool:
    """Whether a list of scores is 1 to n in some order, as ranks are."""
    try:
        return isinstance(scores, list) and sorted(map(float, scores)) == list(range(1, len(scores) + 1))
    except (TypeError, ValueError):
        return False
