"""The curves of a run as one picture, drawn from metrics.jsonl: over episodes and over hours."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a server

import matplotlib.pyplot as plt
import numpy as np

from open_rm.training.tracking import read_metrics

PANELS = (
    ("accuracy", ("accuracy",)),
    ("loss", ("loss",)),
    ("rewards", ("chosen_rewards", "rejected_rewards")),
    ("reward margin", ("reward_margin",)),
    ("learning rate", ("lr",)),
)
COLOURS = ("tab:blue", "tab:orange")
AXES = (("episode", "episodes"), ("hours", "hours"))


def draw_curves(record: Path, *, title: str) -> Path:
    """Write curves.png beside the metrics.jsonl `record` and return its path.

    A row over episodes, a row over hours; train as a faint line with its running mean, evaluations dotted.
    """
    rows = read_metrics(record)
    figure, axes = plt.subplots(len(AXES), len(PANELS), figsize=(20, 7), constrained_layout=True)
    for axis_row, (key, label) in zip(axes, AXES, strict=True):
        for axis, (name, metrics) in zip(axis_row, PANELS, strict=True):
            for colour, metric in zip(COLOURS, metrics, strict=False):
                _draw(axis, rows, key, metric, colour, len(metrics) > 1)
            axis.set_xlabel(label)
            axis.set_title(name)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
            if name == "accuracy":
                axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
                axis.set_ylim(0.0 if axis.get_ylim()[0] < 0.3 else 0.3, 1.02)
    figure.suptitle(title)
    path = record.with_name("curves.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw(axis, rows, key: str, metric: str, colour: str, named: bool) -> None:
    # a number that was not finite is null in the record, and left out here
    train, held_out = (
        [(row[key], row[name]) for row in rows if row.get(name) is not None]
        for name in (f"train/rm/{metric}", f"eval/rm/{metric}")
    )
    prefix = f"{metric.removesuffix('_rewards')} " if named else ""
    if train:
        x, y = zip(*train, strict=True)
        if metric == "lr":
            axis.plot(x, y, color=colour)
        else:
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(x, _running_mean(y, max(1, len(y) // 20)), color=colour, label=f"{prefix}train (running mean)")
    if held_out:
        x, y = zip(*held_out, strict=True)
        axis.plot(x, y, "o:", color="black" if colour == COLOURS[0] else "tab:red", label=f"{prefix}eval")


def _running_mean(values, window: int) -> list[float]:
    """Of the last `window` values, or of all where there are fewer."""
    sums, end = np.concatenate(([0.0], np.cumsum(values))), np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return ((sums[end] - sums[start]) / (end - start)).tolist()
