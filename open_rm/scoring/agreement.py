"""How far two reward models agree on the answers of a file: what --judge prints.

Every two answers of a prompt are a pair. Sums alone are kept, so that a file of any length takes the same memory, and so
that a run that goes on takes up the sums it had written (`dataclasses.asdict` and back).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from open_rm.measures.intervals import independent_pairs, wilson


@dataclass
class Agreement:
    """Sums over prompts. `take` one prompt after another, then `lines` or `report`.

    prompts: that were taken.  unscored: answers left out, because either model gave no score.
    pairs: every two answers of a prompt; of these tied_model, tied_judge and tied_both have equal rewards (of that model
    alone, or of both) and the others, strict, have not; agreeing: strict ones in which both prefer the same answer.
    paired_prompts: that have a strict pair.  squares, products, agreeing_squares: sums over prompts of strict^2,
    strict * agreeing, agreeing^2, for the interval.
    tau_sum, tau_prompts: Kendall's tau-b, where a prompt has one.
    model_squares, judge_squares, margin_products, model_margins, judge_margins: sums over pairs of both models' squared
    margins, their product and their sizes.
    """

    prompts: int = 0
    unscored: int = 0
    pairs: int = 0
    tied_model: int = 0
    tied_judge: int = 0
    tied_both: int = 0
    strict: int = 0
    agreeing: int = 0
    paired_prompts: int = 0
    squares: int = 0
    products: int = 0
    agreeing_squares: int = 0
    tau_sum: float = 0.0
    tau_prompts: int = 0
    model_squares: float = 0.0
    judge_squares: float = 0.0
    margin_products: float = 0.0
    model_margins: float = 0.0
    judge_margins: float = 0.0

    def take(self, scores: Sequence[float | None], judged: Sequence[float | None]) -> None:
        """One prompt: [answers] rewards of the model and of the judge, None where an answer was too long."""
        both = [(a, b) for a, b in zip(scores, judged, strict=True) if a is not None and b is not None]
        self.prompts += 1
        self.unscored += len(scores) - len(both)
        strict = agreeing = tied_model = tied_judge = 0
        for (a, b), (other_a, other_b) in itertools.combinations(both, 2):
            margin, judged_margin = a - other_a, b - other_b
            if margin and judged_margin:
                strict += 1
                agreeing += (margin > 0) == (judged_margin > 0)
            elif margin:
                tied_judge += 1
            elif judged_margin:
                tied_model += 1
            self.model_squares += margin * margin
            self.judge_squares += judged_margin * judged_margin
            self.margin_products += margin * judged_margin
            self.model_margins += abs(margin)
            self.judge_margins += abs(judged_margin)
        pairs = len(both) * (len(both) - 1) // 2
        self.pairs += pairs
        self.tied_model += tied_model
        self.tied_judge += tied_judge
        self.tied_both += pairs - strict - tied_model - tied_judge
        self.strict += strict
        self.agreeing += agreeing
        self.paired_prompts += strict > 0
        self.squares += strict * strict
        self.products += strict * agreeing
        self.agreeing_squares += agreeing * agreeing
        # tau-b (Kendall 1945): a pair that is tied in either ranking counts for neither, and shrinks the other one's norm.
        if norm := (strict + tied_judge) * (strict + tied_model):
            self.tau_prompts += 1
            self.tau_sum += (2 * agreeing - strict) / math.sqrt(norm)

    @property
    def share(self) -> float | None:
        """Of the strict pairs, those in which both prefer the same answer; None without any."""
        return self.agreeing / self.strict if self.strict else None

    @property
    def independent_pairs(self) -> float:
        """As how many independent pairs the strict ones count.

        Pairs of one prompt share answers, so they tell less than as many pairs of different prompts.
        """
        if not self.strict:
            return 0.0
        p = self.agreeing / self.strict
        spread = self.agreeing_squares - 2 * p * self.products + p * p * self.squares
        # Rounding may leave a little less than nothing where prompts are alike.
        return independent_pairs(p, self.strict, self.paired_prompts, self.squares, max(0.0, spread))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of `share`, over `independent_pairs`."""
        return None if self.share is None else wilson(self.share, self.independent_pairs)

    @property
    def tau(self) -> float | None:
        """Kendall's tau-b of a prompt's answers, on average over the prompts that have one."""
        return self.tau_sum / self.tau_prompts if self.tau_prompts else None

    @property
    def correlation(self) -> float | None:
        """Of the margins, over every pair in both directions, so that it does not depend on which answer comes first."""
        norm = math.sqrt(self.model_squares) * math.sqrt(self.judge_squares)
        return self.margin_products / norm if norm else None

    def report(self, model: str, judge: str) -> dict:
        """What the json file holds."""
        return {
            "model": model,
            "judge": judge,
            "prompts": self.prompts,
            "pairs": self.pairs,
            "strict_pairs": self.strict,
            "agreeing_pairs": self.agreeing,
            "agreement": self.share,
            "interval_95": None if self.interval is None else list(self.interval),
            "independent_pairs": self.independent_pairs,
            "tied_pairs": {"model": self.tied_model, "judge": self.tied_judge, "both": self.tied_both},
            "kendall_tau_b": self.tau,
            "kendall_prompts": self.tau_prompts,
            "margin_correlation": self.correlation,
            "mean_margin": {"model": self._mean(self.model_margins), "judge": self._mean(self.judge_margins)},
            "unscored_answers": self.unscored,
        }

    def lines(self, model: str, judge: str) -> list[str]:
        """The same in plain words, for the log."""
        if self.share is None:
            return [f"{model} and {judge} cannot be compared: no prompt has two answers that both score differently"]
        low, high = self.interval
        lines = [
            f"{model} and {judge} prefer the same answer in {self.agreeing:,} of {self.strict:,} pairs: {self.share:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%}; two answers of a prompt are a pair, {self.paired_prompts:,} prompts)",
            f"Kendall's tau-b {self.tau:.3f}, on average over {self.tau_prompts:,} prompts",
            f"correlation of the margins {self.correlation:.3f}; a margin is {self._mean(self.model_margins):.3g} of {model} and "
            f"{self._mean(self.judge_margins):.3g} of {judge} on average",
        ]
        if tied := self.pairs - self.strict:
            lines.append(
                f"not counted: {tied:,} pairs with equal rewards ({self.tied_model:,} of the first model, {self.tied_judge:,} of "
                f"the second, {self.tied_both:,} of both)"
            )
        if self.unscored:
            lines.append(f"left out: {self.unscored:,} answers that either model gave no score (too long)")
        return lines

    def _mean(self, total: float) -> float | None:
        return total / self.pairs if self.pairs else None
