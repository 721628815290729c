"""Look at preference data before training on it: numbers per source, findings in sentences, pictures of tokens.

    python -m open_rm.inspection --model_name_or_path MODEL --dataset_mixer_list DATA 1.0 ...

takes the flags of the recipe, so that one changes the module's name in a training command and looks. It writes
report.json, lengths.png, pairs.html and pairs.png into --output_dir, or output/inspection. --strict ends with status 1
where there are findings. The recipe prints the short form before each training.
"""

import dataclasses

from open_rm import command_line
from open_rm.checks import check_args, check_values
from open_rm.flags import Args


def check(args: Args) -> None:
    """As before a training; to look at attributes needs no weights of them."""
    check_values(args)
    check_args(dataclasses.replace(args, attribute_weights=args.attribute_weights or [0.0] * len(args.attributes)))


if __name__ == "__main__":  # a wrong command line is answered before the imports below, which take seconds
    ARGUMENTS = command_line.read(Args, check, prog="python -m open_rm.inspection")

import transformers

from open_rm.data.building import read_both
from open_rm.data.tokenizer import tokenizer_of
from open_rm.inspection import look
from open_rm.inspection.findings import check_strict
from open_rm.inspection.report import inspect_data

DEFAULT_FOLDER = "output/inspection"


def main(args: Args) -> dict:
    """Read the data as the recipe does, look at it, write and print what there is to see; returns the report."""
    check(args)
    transformers.logging.set_verbosity_error()
    tokenizer = tokenizer_of(args)
    train, held_out = read_both(args, tokenizer, seed=args.seed, show_progress=True)
    report = inspect_data(train, held_out, tokenizer)
    paths = look.write_report(report, args.output_dir or DEFAULT_FOLDER, train, held_out, tokenizer)
    look.console(report, train, tokenizer, paths=paths)
    if args.strict:
        check_strict(report)
    return report


if __name__ == "__main__":
    command_line.run(main, ARGUMENTS)
