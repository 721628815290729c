"""The flags of `python -m open_rm.scoring`, and what they cannot be. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from open_rm.bounds import AmountOrNone, Count, Must, Number
from open_rm.data.mixer import Source, parse_mixer
from open_rm.data.reading import Reading, make_reading
from open_rm.errors import UserError
from open_rm.flags import OpeningFlags, ReadingFlags


@dataclass(frozen=True, kw_only=True)
class StreamFlags(OpeningFlags, ReadingFlags):
    """What all three commands have in common: a file in, a file out."""

    input: str
    """Rows to score: a file, a folder, a glob or a Hub data set, of any form of docs/data.md; or rows with prompt and response,
    or with messages alone."""
    input_split: str = "train"
    """Split of a folder or Hub data set. A single file is itself the split."""
    output: Annotated[str, Must("a file that ends in .jsonl", lambda name: str(name).endswith(".jsonl"))]
    """The file to make, OUT.jsonl. A command that was killed goes on where it was, to the same bytes."""
    overwrite: bool = False
    """Make the output anew where it is there, or was begun with another model, input or flags."""
    overlength: Literal["null", "truncate"] = "null"
    """Answers of more than max_token_length tokens: no score (null), or cut to the limits of training. Marked and counted."""
    block_rows: Count = 256
    """Rows of a block: what is encoded and scored together. Another number may change rewards in their last digits."""
    num_shards: Count = 1
    """Parts of the input, each for a command of its own: cat of their outputs in order is the whole."""
    shard: Number = 0
    """Which part to score, from 0 to num_shards - 1."""


@dataclass(frozen=True, kw_only=True)
class ScoreArgs(StreamFlags):
    """Write each row with its rewards: score, or scores (of pairs: chosen, then rejected); all else as it was."""

    judge: str | None = None
    """A second reward model: its rewards as judge_score(s), and how far the two agree, in OUT.agreement.json too."""


@dataclass(frozen=True, kw_only=True)
class BestOfNArgs(StreamFlags):
    """Write each row with its n best answers."""

    n: Count = 1
    """How many to keep. 1: as response and score, more: as responses and scores, the best first."""


@dataclass(frozen=True, kw_only=True)
class PairsArgs(StreamFlags):
    """Write preference pairs: of each row its best answer against its worst."""

    min_margin: AmountOrNone = None
    """Instead every pair of a row's answers whose rewards are at least so far apart."""
    length_balanced: bool = False
    """Take pairs so that chosen is as often the longer answer as the shorter."""
    output_form: Literal["open_rm", "trl"] = "open_rm"
    """Columns: those of docs/data.md with the margin, or those that TRL's trainers read."""


COMMANDS = {"score": ScoreArgs, "best_of_n": BestOfNArgs, "pairs": PairsArgs}


def check(args: StreamFlags) -> None:
    """Refuse what cannot work, before anything is loaded; the bounds of single flags are for checks.check_values.

    Raises:
        UserError: one sentence.
    """
    if args.shard >= args.num_shards:
        raise UserError(f"--shard {args.shard}: must be from 0 to num_shards - 1, which is {args.num_shards - 1}")
    if isinstance(args, PairsArgs) and args.length_balanced and args.num_shards > 1:
        raise UserError("--length_balanced counts over all rows, and --num_shards divides them; pass one")
    output = Path(args.output).expanduser()
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file")
    if not (place := next(folder for folder in output.absolute().parents if folder.exists())).is_dir():
        raise UserError(f"--output {output}: {place} is a file and not a folder; name another")
    if output.resolve() in [path.resolve() for path in source_of(args).paths]:
        raise UserError(f"--output {output} is the input itself; name another file")
    made = [output]
    if getattr(args, "judge", None) and not output.with_name(output.name + ".partial").exists():
        made.append(report_beside(output))  # with rows beside it, it is their own: it appears before the output does
    if not args.overwrite and (there := [path for path in made if path.exists()]):
        raise UserError(f"--output {there[0]} is there already; name another file, or pass --overwrite to make it anew")
    reading_of(args, chat=True)


def report_beside(output: Path) -> Path:
    """Where the agreement with a judge is written."""
    return output.with_suffix(".agreement.json")


def source_of(args: StreamFlags) -> Source:
    """The input, all of it once."""
    try:
        [source] = parse_mixer([args.input, "1.0"], [args.input_split], "input")
    except UserError as error:
        raise UserError(str(error).replace("--input_splits", "--input_split")) from error
    return source


def reading_of(flags: ReadingFlags, *, chat: bool) -> Reading:
    """How rows are read for a model. chat: it scores conversations, so that texts become messages where no flag says else."""
    reading = make_reading(flags, "eval")
    as_messages = reading.as_messages
    if as_messages is None and (chat or not reading.parse_hh):
        as_messages = chat
    return reading.to_be_scored(as_messages)
