"""From the lines of a GPU profile to a table, a picture and results.json; made from whatever lines are there.

Lines (results.jsonl) are of these kinds: machine, agreement, measured, error, left out, trace. A run that was killed leaves the
lines of what it had measured, and the last one may be torn.
"""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import card
from benchmarks.contestants import CONTESTANTS, MEANS
from open_rm.errors import UserError

LINES = "results.jsonl"
PEERS = ("TRL", "TRL bfloat16")
MEDIANS = (
    "pairs_per_second",
    "tokens_per_second",
    "distinct_tokens_per_second",
    "step_seconds",
    "padding",
    "mfu",
    "peak_gib",
    "reserved_gib",
)


def report(output: Path) -> list[dict]:
    """Print the tables, write results.json and throughput.png beside the lines; returns the lines.

    Raises:
        UserError: there are none.
    """
    rows = read(output)
    [machine, *_] = [row for row in rows if row["kind"] == "machine"] or [None]
    if machine is None:
        raise UserError(f"{output / LINES} is empty or names no machine: is it a folder of --profile gpu?")
    summary = summarise(rows, machine)
    beside = {"left_out": [row for row in rows if row["kind"] == "left out"]}
    beside |= {"errors": [row for row in rows if row["kind"] == "error"]}
    beside |= {"traces": [row for row in rows if row["kind"] == "trace"]}
    whole = {"machine": machine, "contestants": MEANS, "summary": summary, **beside, "lines": rows}
    (output / "results.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(f"\n{card.describe(machine)}")
    if machine["smoke"]:
        print("a smoke run: that every line works, and no measurement")
    for title in dict.fromkeys(row["title"] for row in summary):
        _print_table(title, [row for row in summary if row["title"] == title])
    print()
    for name, meaning in MEANS.items():
        if any(row["contestant"] == name for row in summary):
            print(f"{name}: {meaning}")
    for row in beside["left_out"]:
        print(f"left out: {row['shape']}, {row['contestant']}, {row['what']}: {row['why']}")
    for row in beside["errors"]:
        where = ", ".join(str(row[key]) for key in ("shape", "contestant", "workload", "pairs_per_step") if key in row)
        print(f"failed: {where}: {row['why']}")
    for row in beside["traces"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        print(f"one step of {row['shape']}, {row['contestant']}, {row['seconds']:.3f} s: {shares}")
    if summary:
        draw(summary, machine, output / "throughput.png")
    print(
        f"results in {output}/results.json and {output}/{LINES}"
        + (f", picture in {output}/throughput.png" * bool(summary))
    )
    return rows


def read(output: Path) -> list[dict]:
    """The lines, but for one that a kill tore."""
    path = output / LINES
    if not path.is_file():
        raise UserError(f"{path} is not there: name a folder that --profile gpu wrote to")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def summarise(rows: list[dict], machine: dict) -> list[dict]:
    """One row for each (shape, setting, contestant): medians over the rounds, the range of pairs/s, ratios to TRL's medians."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["kind"] == "measured":
            title = f"{row['shape']}, {row['workload']}, {row['pairs_per_step']} pairs a step"
            title += ", recompute" if row["recompute"] else ""
            groups.setdefault((title, row["contestant"]), []).append(row)
    peak = machine["peak_tflops"]
    summary = []
    for (title, name), of in groups.items():
        made = {"title": title, "contestant": name, "rounds": len(of)}
        for key in MEDIANS:
            values = [row[key] for row in of if row[key] is not None]
            made[key] = statistics.median(values) if values else None
        made["slowest"], made["fastest"] = (f([row["pairs_per_second"] for row in of]) for f in (min, max))
        flops = statistics.median(row["flops_per_second"] for row in of)
        made["mfu_of_card"] = flops / (peak * 1e12) if peak else None
        summary.append(made)
    speeds = {(row["title"], row["contestant"]): row["pairs_per_second"] for row in summary}
    for row in summary:
        for peer in PEERS:
            there = speeds.get((row["title"], peer))
            row[f"over {peer}"] = row["pairs_per_second"] / there if there else None
    known = list(CONTESTANTS)
    return sorted(summary, key=lambda row: (row["title"], known.index(row["contestant"])))


def _print_table(title: str, rows: list[dict]) -> None:
    print(f"\n{title}\n")
    columns = ("pairs/s (range)", "distinct tokens/s", "tokens/s", "mfu", "mfu of the card", "peak GiB", "reserved GiB")
    columns += tuple(f"over {peer}" for peer in PEERS)
    print(f"| trainer | {' | '.join(columns)} |")
    print("| --- " * (1 + len(columns)) + "|")
    for row in rows:
        cells = [f"{row['pairs_per_second']:.2f} ({row['slowest']:.2f}-{row['fastest']:.2f})"]
        cells += [f"{row[key]:,.0f}" for key in ("distinct_tokens_per_second", "tokens_per_second")]
        cells += [_figure(row[key], ".3f") for key in ("mfu", "mfu_of_card")]
        cells += [_figure(row[key], ".2f") for key in ("peak_gib", "reserved_gib")]
        cells += [_figure(row[f"over {peer}"], ".2f", "x") for peer in PEERS]
        print(f"| {row['contestant']} | {' | '.join(cells)} |")


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def draw(summary: list[dict], machine: dict, path: Path) -> None:
    """Bars of distinct tokens/s, a group for each setting; lines are the range of the rounds."""
    titles = list(dict.fromkeys(row["title"] for row in summary))
    colours = dict(zip(CONTESTANTS, plt.get_cmap("tab10").colors, strict=False))
    size = (8, 1 + 1.9 * len(titles))
    figure, axes = plt.subplots(len(titles), 1, figsize=size, constrained_layout=True, squeeze=False)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        rows = [row for row in summary if row["title"] == title]
        for y, row in enumerate(rows):
            value, middle = row["distinct_tokens_per_second"], row["pairs_per_second"]
            axis.barh(y, value, color=colours[row["contestant"]])
            most = value * row["fastest"] / middle
            axis.plot([value * row["slowest"] / middle, most], [y, y], color="black")
            axis.text(most, y, f" {value:,.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["contestant"] for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("distinct tokens/s")
    figure.suptitle(machine["name"] + (" (smoke run: no measurement)" if machine["smoke"] else ""), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
