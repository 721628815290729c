"""What a report says of one set besides the benchmark's own numbers: plain dictionaries, from scores alone.

Unless said otherwise everything is counted over the pairs of all rows (scored.pairs_of), and intervals take the pairs of a row for
one cluster. Shapes: N rows, P pairs. Memory grows with the answers.
"""

import numpy as np

from open_rm.evaluation.rules import rm_bench
from open_rm.evaluation.rules.verdict import Verdict
from open_rm.evaluation.scored import Pairs, ScoredSet
from open_rm.measures import calibration, lengths, ranking
from open_rm.measures.intervals import Estimate, fisher, of_differences, of_pairs, of_rows, permutation, sidak

MARGIN_BINS = 8
MOST_SOURCES = 60
OTHERS = "others"
FEWEST_ROWS = 10  # of a subset that is called the best or the worst
SIGNIFICANT = 0.05
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SURE = 0.95  # a probability from which on a preference is called confident


def accuracy_of(pairs: Pairs) -> Estimate | None:
    """Share of pairs with a higher score for the better answer; a tie is not right. None without pairs."""
    return of_pairs(pairs.margin > 0, pairs.row) if len(pairs) else None


def accuracy_without_ties(pairs: Pairs) -> Estimate | None:
    """Right against wrong alone, which is .5 by chance; None where all pairs are tied."""
    apart = pairs.margin != 0
    return of_pairs(pairs.margin[apart] > 0, pairs.row[apart]) if apart.any() else None


def calibration_of(pairs: Pairs) -> dict | None:
    """How sigma(margin) does as the probability that an answer is the better one, at T = 1 and at the T that fits best.

    Beside what their names say: ece_of_chance, the ECE that right probabilities stay below in 95 % of cases, with so many pairs;
    temperature_p, that the true temperature is 1.
    """
    if not len(pairs):
        return None
    margin = pairs.margin
    temperature = calibration.fit_temperature(margin)
    return {
        "bins": calibration.reliability(margin, row=pairs.row),
        "ece": calibration.ece(margin),
        "ece_of_chance": calibration.ece_of_chance(margin, pairs.row),
        "brier": calibration.brier(margin),
        "loss": calibration.loss(margin),
        "temperature": temperature,
        "temperature_p": None if temperature is None else calibration.temperature_p(margin, pairs.row, temperature),
        "loss_at_temperature": None if temperature is None else calibration.loss(margin, temperature),
        "why_no_temperature": calibration.why_no_temperature(margin) if temperature is None else None,
    }


def confident_of(pairs: Pairs) -> dict:
    """How many pairs the model is surer of than SURE, by sigma(|margin|), and in how many of them it is wrong."""
    sure = np.abs(pairs.margin) > np.log(SURE / (1 - SURE))
    return {"above": SURE, "pairs": int(sure.sum()), "wrong": int((sure & (pairs.margin < 0)).sum())}


def length_of(scored: ScoredSet, pairs: Pairs) -> dict | None:
    """What length explains, in tokens where every answer's are known, else in characters; None where no pair has either.

    Beside what measures.lengths gives:
    gain: accuracy minus that of the better rule of length alone, on the same pairs.
    prefers_longer: of the pairs of unequal length, the share in which the model gives the longer answer the higher score, that in
    which the longer one is the better one, and the difference of both (excess); None without such pairs.
    """
    if not len(pairs):
        return None
    unit = "tokens" if min(scored.tokens[pairs.better].min(), scored.tokens[pairs.worse].min()) >= 0 else "characters"
    better, worse = (getattr(scored, unit)[side] for side in (pairs.better, pairs.worse))
    known = (better >= 0) & (worse >= 0)
    found = lengths.explained(pairs.margin, better, worse, pairs.row)
    if found is None:
        return None
    better, worse, margin, row = better[known], worse[known], pairs.margin[known], pairs.row[known]
    _, by_rule = lengths.best_rule(better, worse)
    gain = of_differences((margin > 0) - by_rule, row)
    return {"unit": unit, **found, "gain": gain, "prefers_longer": _prefers_longer(margin, better - worse, row)}


def _prefers_longer(margin: np.ndarray, longer: np.ndarray, row: np.ndarray) -> dict | None:
    """longer: [P] by how much the better answer is longer than the worse."""
    uneven = longer != 0
    if not uneven.any():
        return None
    model, gold, row = (np.sign(margin) * np.sign(longer) > 0)[uneven], (longer > 0)[uneven], row[uneven]
    excess = of_differences(model.astype(float) - gold, row)
    return {"model": of_pairs(model, row), "gold": of_pairs(gold, row), "excess": excess}


def margins_of(pairs: Pairs) -> list[dict]:
    """Accuracy by the size of the margin: MARGIN_BINS bins of as many pairs each, fewer where equal sizes fall together."""
    if not len(pairs):
        return []
    size = np.abs(pairs.margin)
    edges = np.unique(np.quantile(size, np.arange(1, MARGIN_BINS) / MARGIN_BINS))
    bin_of = np.searchsorted(edges, size)  # an edge is the last of its bin
    return [
        {
            "low": float(size[inside].min()),
            "high": float(size[inside].max()),
            "accuracy": of_pairs(pairs.margin[inside] > 0, pairs.row[inside]),
        }
        for inside in (np.flatnonzero(bin_of == number) for number in np.unique(bin_of))
    ]


def sources_of(scored: ScoredSet, pairs: Pairs) -> list[dict]:
    """Rewards and accuracy of each subset, in their order; of more than MOST_SOURCES, the largest and the rest together."""
    names, subset_of = _subsets(scored)
    sizes = np.bincount(subset_of, minlength=len(names))
    if len(names) > MOST_SOURCES:
        shown = np.sort(np.argsort(-sizes, kind="stable")[: MOST_SOURCES - 1])
        place = np.full(len(names), len(shown))
        place[shown] = np.arange(len(shown))
        subset_of, names = place[subset_of], [names[number] for number in shown] + [OTHERS]
    answers = _grouped(subset_of[scored.row_of], len(names))
    pairs_of_source = _grouped(subset_of[pairs.row], len(names))
    sizes = np.bincount(subset_of, minlength=len(names))
    found = []
    for number, name in enumerate(names):
        inside = pairs_of_source[number]
        margin = pairs.margin[inside]
        found.append(
            {
                "name": name,
                "rows": int(sizes[number]),
                "pairs": len(inside),
                "accuracy": of_pairs(margin > 0, pairs.row[inside]) if len(inside) else None,
                "reward": _spread(scored.scores[answers[number]]),
                "mean_margin": float(margin.mean()) if len(inside) else None,
            }
        )
    return found


def _subsets(scored: ScoredSet) -> tuple[list[str], np.ndarray]:
    """Names of the subsets in the order in which they first come, and [N] which of them a row is of."""
    numbers: dict[str, int] = {}
    subset_of = np.fromiter((numbers.setdefault(name, len(numbers)) for name in scored.subsets), np.int64, len(scored))
    return list(numbers), subset_of


def _grouped(group: np.ndarray, groups: int) -> list[np.ndarray]:
    """For each of `groups` numbers, where it stands in `group`."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group[order], np.arange(1, groups)))


def _spread(rewards: np.ndarray) -> dict:
    rewards = rewards[~np.isnan(rewards)]
    if not len(rewards):
        return {"mean": None, "std": None, "quantiles": [None] * len(QUANTILES)}
    return {
        "mean": float(rewards.mean()),
        "std": float(rewards.std(ddof=1)) if len(rewards) > 1 else None,
        "quantiles": np.quantile(rewards, QUANTILES).tolist(),
    }


def extremes_of(scored: ScoredSet, verdict: Verdict) -> dict | None:
    """The best and the worst subset, each against all other rows of its form; None where fewer than two have FEWEST_ROWS rows.

    By the wins of the rules, within rows of one form (Verdict.forms), since those of others have other chances. p: Fisher's exact test
    where rows are won or lost, a permutation test where they are won in part. p_sidak: that one of so many subsets (tests) is as far
    off by chance (reward-bench #270). clear: every subset that remains apart after it. form: null where all rows are of one.
    """
    names, subset_of = _subsets(scored)
    counted = np.flatnonzero(~np.isnan(verdict.wins))
    forms = np.asarray(verdict.forms if verdict.forms else [""] * len(scored), dtype=object)[counted]
    kinds = sorted(set(forms))
    found = []
    for form in kinds:
        rows = counted[forms == form]
        found += _of_form(names, subset_of[rows], verdict.wins[rows], form if len(kinds) > 1 else None)
    if len(found) < 2:
        return None
    found = [{**one, "p_sidak": sidak(one["p"], len(found)), "tests": len(found)} for one in found]
    clear = [one for one in found if one["p_sidak"] < SIGNIFICANT]
    best, worst = (choose(found, key=lambda one: one["value"] - one["of_form"]) for choose in (max, min))
    return {"best": best, "worst": worst, "clear": clear}


def _of_form(names: list[str], subset_of: np.ndarray, wins: np.ndarray, form: str | None) -> list[dict]:
    """Each subset with FEWEST_ROWS rows against the others. subset_of, wins: of the rows of a form.  of_form: the mean of all."""
    sizes, sums = np.bincount(subset_of, minlength=len(names)), np.bincount(subset_of, wins, minlength=len(names))
    compared = np.flatnonzero((sizes >= FEWEST_ROWS) & (sizes < len(wins)))
    n, own = sizes[compared], sums[compared]
    rest, others = wins.sum() - own, len(wins) - n
    if np.isin(wins, (0.0, 1.0)).all():
        tables = np.rint([own, n, rest, others]).astype(int).T.tolist()
        ps = [fisher(*table) for table in tables]
    else:
        ps = permutation(wins, n, own / n)
    return [
        {
            "name": names[compared[i]],
            "form": form,
            "value": float(own[i] / n[i]),
            "rows": int(n[i]),
            "rest": float(rest[i] / others[i]),
            "of_form": float(wins.mean()),
            "p": float(ps[i]),
        }
        for i in range(len(compared))
    ]


def style_of(scored: ScoredSet) -> dict | None:
    """RM-Bench: [i][j] how often the right answer in style i gets more than the wrong one in style j.

    hard, easy: over all cells where the wrong, or the right, answer is in the fancier style; steep: easy minus hard; of rows.
    """
    if scored.benchmark != "rm_bench":
        return None
    hard, easy = (rm_bench.of_difficulty(scored, kind) for kind in ("hard", "easy"))
    return {
        "names": list(rm_bench.STYLES),
        "matrix": rm_bench.style_matrix(scored),
        "hard": of_rows(hard),
        "easy": of_rows(easy),
        "steep": of_differences(easy - hard, np.arange(len(hard))),
    }


def ranking_of(scored: ScoredSet) -> dict | None:
    """How the order of more than two answers agrees with their gold scores; None where gold is but right or wrong.

    tau: Kendall's tau-b, the mean over the rows that have one, with an interval over rows.
    """
    gold = scored.gold[~np.isnan(scored.gold)]
    if not len(scored) or np.isin(gold, (0.0, 1.0)).all() or np.diff(scored.first).max() < 3:
        return None
    usable = ~(np.isnan(scored.scores) | np.isnan(scored.gold))
    answers = np.flatnonzero(usable)
    rows = [inside for inside in _grouped(scored.row_of[answers], len(scored)) if len(inside) > 2]
    if not rows:
        return None
    rows = [(scored.scores[answers[inside]], scored.gold[answers[inside]]) for inside in rows]
    return {"rows": len(rows), "tau": ranking.mean_tau(rows), "best_of_n": ranking.best_of_n(rows)}
