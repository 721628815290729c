"""How pairs are computed, in one object that training, evaluation and scoring share."""

import dataclasses
from dataclasses import dataclass

LAYOUTS = ("padded", "packed", "shared_prefix")


@dataclass(frozen=True)
class BatchRules:
    """Memory and speed follow from it, rewards do not.

    layout: one of LAYOUTS.
    max_tokens: most positions of a micro-batch, padding included; a single pair may have more.  evaluation_tokens: the same
        where no gradients are needed.
    area_cost: what a query-key product costs, in units of a token's cost (dealing.attention_cost); it decides how pairs are
        dealt to ranks.
    whole_lists: whether the pairs of one ranked list are computed in one micro-batch, however large, as losses of lists ask.
    """

    layout: str
    pad_token_id: int
    max_tokens: int
    evaluation_tokens: int
    area_cost: float = 0.0
    whole_lists: bool = False

    def for_evaluation(self) -> "BatchRules":
        """Where no loss needs a list whole."""
        return dataclasses.replace(self, max_tokens=self.evaluation_tokens, whole_lists=False)

    def of_group(self, size: int) -> "BatchRules":
        """For `size` devices that compute a micro-batch together, each its share of the positions."""
        most = {"max_tokens": size * self.max_tokens, "evaluation_tokens": size * self.evaluation_tokens}
        return dataclasses.replace(self, **most)

    def describe(self, why_not_shared: str | None) -> str:
        """One line for the log. why_not_shared: why auto fell back to padded (families.Layout)."""
        why = f", not shared_prefix: {why_not_shared}" if why_not_shared else ""
        return (
            f"batching {self.layout}{why}, at most {self.max_tokens} positions a micro-batch unless one pair has more"
        )
