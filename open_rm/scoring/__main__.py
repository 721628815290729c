"""Score files with a reward model, and select by the scores.

    python -m open_rm.scoring score     --model DIR --input FILE --output OUT.jsonl [--judge OTHER]
    python -m open_rm.scoring best_of_n --model DIR --input FILE --output OUT.jsonl --n 1
    python -m open_rm.scoring pairs     --model DIR --input FILE --output OUT.jsonl [--min_margin X] [--length_balanced]

docs/scoring.md says what goes in and what comes out; `COMMAND --help` has all flags.
"""

import sys

from open_rm import command_line
from open_rm.checks import check_values
from open_rm.scoring import arguments


def check_args(args: arguments.StreamFlags) -> None:
    """Refuse every value and combination that cannot work."""
    check_values(args)
    arguments.check(args)


if __name__ == "__main__":  # a wrong command line is answered before the imports below, which take seconds
    NAME, REST = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    if NAME not in arguments.COMMANDS:
        sys.exit(
            __doc__ if NAME in ("--help", "-h") else f"error: {NAME!r}: name {', '.join(arguments.COMMANDS)} first"
        )
    HOW = {"prog": f"python -m open_rm.scoring {NAME}", "argv": REST}
    ARGUMENTS = command_line.read(arguments.COMMANDS[NAME], check_args, **HOW)

import contextlib
import dataclasses
from pathlib import Path

import transformers

from open_rm.data.readers import open_source
from open_rm.scoring.arguments import BestOfNArgs, PairsArgs, ScoreArgs, StreamFlags
from open_rm.scoring.blocks import Encoder
from open_rm.scoring.opening import open_scorer
from open_rm.scoring.output import Output
from open_rm.scoring.scores import Scores
from open_rm.scoring.selection import BestOfN, Pairs
from open_rm.scoring.showing import Progress
from open_rm.scoring.streams import Maker, Stream, Tally, summary

FREE = (
    "model",
    "model_revision",
    "judge",
    "input",
    "input_split",
    "output",
    "overwrite",
    "skip_bad_rows",
    # as it came out, None among it: in Scorer.machine
    "max_tokens_per_micro_batch",
)


def main(args: StreamFlags) -> Tally:
    """Score the input into the output; returns what was counted."""
    check_args(args)
    transformers.logging.set_verbosity_error()
    source = arguments.source_of(args)
    opened = open_source(source)
    rows = shard_rows(opened.size, args)
    with contextlib.ExitStack() as stack:
        scorer = stack.enter_context(open_scorer(args))
        encoder = Encoder(scorer, arguments.reading_of(args, chat=scorer.chat), args.overlength)
        judge, name = None, getattr(args, "judge", None)
        for line in scorer.lines:
            print(line)
        if name is not None:
            other = stack.enter_context(open_scorer(dataclasses.replace(args, model=name, model_revision=None)))
            judge = Encoder(other, arguments.reading_of(args, chat=other.chat), args.overlength)
            for line in other.lines:
                print(f"judge: {line}")
        output = Output(Path(args.output).expanduser(), facts_of(args, rows, encoder, judge), overwrite=args.overwrite)
        shown = Progress(len(rows))
        maker = maker_of(args, encoder)
        stream = Stream(opened, rows, encoder, judge, maker, output, args.block_rows, args.skip_bad_rows, shown)
        tally = stream.run()
    took = shown.close()
    for line in summary(tally, name=source.name, model=scorer.name, judge=name):
        print(line)
    if name is not None:
        print(f"agreement in {arguments.report_beside(output.path)}")
    scored = tally.answers - tally.unscored
    print(
        f"{tally.rows:,} rows read, {tally.skipped:,} of them skipped as bad; {scored:,} of {tally.answers:,} "
        f"answers scored, {tally.overlength:,} over-length; {tally.written:,} rows written to {output.path} ({took})"
    )
    return tally


def shard_rows(size: int, args: StreamFlags) -> range:
    """The rows of a shard: whole blocks, so that the shards' outputs joined are the output of all."""
    blocks = -(-size // args.block_rows)
    first, last = (blocks * shard // args.num_shards for shard in (args.shard, args.shard + 1))
    return range(min(size, first * args.block_rows), min(size, last * args.block_rows))


def facts_of(args: StreamFlags, rows: range, encoder: Encoder, judge: Encoder | None) -> dict[str, object]:
    """What decides the output's bytes besides the rows: name, as a refusal says it -> value."""
    flags = {
        f"--{field.name}": getattr(args, field.name) for field in dataclasses.fields(args) if field.name not in FREE
    }
    facts = {
        "command": type(args).__name__,
        "model": encoder.scorer.fingerprint,
        "judge": judge.scorer.fingerprint if judge else None,
        "first row": rows.start,
    }
    of_judge = {f"judge's {name}": value for name, value in judge.scorer.machine.items()} if judge else {}
    return facts | flags | encoder.scorer.machine | of_judge


def maker_of(args: StreamFlags, encoder: Encoder) -> Maker:
    """What the command makes of scored rows."""
    if isinstance(args, BestOfNArgs):
        return BestOfN(args.n, encoder.reading)
    if isinstance(args, PairsArgs):
        return Pairs(encoder.reading, args.min_margin, args.length_balanced, args.output_form)
    assert isinstance(args, ScoreArgs)
    return Scores()


if __name__ == "__main__":
    command_line.run(main, ARGUMENTS)
