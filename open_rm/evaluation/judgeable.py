"""Whether scores can be judged at all."""

from dataclasses import replace

import numpy as np

from open_rm.evaluation.scored import ScoredSet, pairs_of


def why_not(scored: ScoredSet) -> str | None:
    """Why rules that ask gold which answer is better have nothing to judge; None where they have, or go by position."""
    if scored.benchmark not in (None, "judge_bench") or len(pairs_of(scored)):
        return None
    known = ~np.isnan(scored.gold)
    if len(scored.scores) == len(scored):
        return "every row has one answer, so that none stands beside another one; write rows of several answers"
    if not known.any():
        return "gold is null in every row, so nothing says which answer is better; write it (higher is better)"
    if not len(pairs_of(replace(scored, scores=np.zeros(len(scored.scores))))):
        return "gold says of no two answers of a row that one is better than the other; write it (higher is better)"
    lacking = int(np.isnan(scored.scores).sum())
    return (
        f"{lacking:,} of {len(scored.scores):,} scores are null, and no row has scores of two answers of which one is better; score "
        "it again, of answers that are too long with --overlength truncate"
    )
