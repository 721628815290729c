"""A row as it was, with its rewards: what `score` writes."""

from dataclasses import dataclass, field

from open_rm.scoring.streams import ScoredRow


@dataclass
class ScoreCounts:
    """renamed: column of the input -> what it is called in the output, because a reward stands under its name."""

    renamed: dict[str, str] = field(default_factory=dict)


@dataclass
class Scores:
    """Rows with `score`, or `scores` where their form holds several answers (of pairs: chosen, then rejected).

    `overlength` stands beside it: true, or a list of them, where an answer has more tokens than the model takes. It is always
    there, since readers of tables take the columns of the first rows for those of all. `judge_score` and `judge_scores` are
    those of --judge.
    """

    counts: ScoreCounts = field(default_factory=ScoreCounts)

    def take(self, scored: ScoredRow) -> list[dict]:
        """One row for each. A column of the input that has one of these names is kept as input_<name>."""
        several = scored.answers.several
        added: dict[str, object] = {}
        for name, values in (("score", scored.scores), ("judge_score", scored.judge)):
            if values is not None:
                added[f"{name}s" if several else name] = values if several else values[0]
        added["overlength"] = scored.overlength if several else scored.overlength[0]
        row = scored.row
        if not added.keys().isdisjoint(row):
            row = {self._name(name, row) if name in added else name: value for name, value in row.items()}
        return [row | added]

    def _name(self, name: str, row: dict) -> str:
        other = f"input_{name}"
        while other in row:
            other = f"input_{other}"
        self.counts.renamed[name] = other
        return other

    def lines(self) -> list[str]:
        """What was renamed, for the log."""
        return [f"the input's own column {name} is now called {other}" for name, other in self.counts.renamed.items()]
