"""The command line of a dataclass: flags, `--config FILE.yaml` underneath them, and the nearest name for a typo.

tyro does the parsing and `--help`. A YAML file is turned into flags, so that `3e-6` is a number there too (YAML alone
reads it as text) and every error reads the same.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro
import yaml

from open_rm.errors import UserError
from open_rm.flags import Recompute, Switch

T = TypeVar("T")
PROG = "python -m open_rm.reward_modeling"


def read(arguments_class: type[T], check: Callable[[T], None], *, prog: str = PROG, argv: list[str] | None = None) -> T:
    """This process's command line, checked; a mistake ends it with one sentence and status 1.

    argv: the words behind the program's name; None: all of them.

    Called before torch and its like are imported, so that `--help` and a wrong flag are answered at once.
    """
    try:
        args = parse(arguments_class, sys.argv[1:] if argv is None else argv, prog=prog)
        check(args)
    except UserError as mistake:  # most are found by every rank, and the first tells them
        if _rank() == 0:
            sys.exit(f"error: {mistake}")
        from open_rm import process_group  # here, since it takes seconds

        process_group.leave_word(mistake)  # of a file that another machine has, for one
        sys.exit(1)
    return args


def run(main: Callable[[T], object], args: T) -> None:
    """A command; a user's mistake is one sentence and status 1, anything else keeps its traceback."""
    try:
        main(args)
    except UserError as mistake:
        sys.exit(f"error: {mistake}" if _rank() == 0 else f"[rank {_rank()}] {mistake}")


def _rank() -> int:
    """This process's rank before any process group exists, as torchrun set it."""
    return int(os.environ.get("RANK", 0))


def parse(arguments_class: type[T], argv: list[str], *, prog: str = PROG) -> T:
    """Parse `argv` (without the program's name, `prog`) into `arguments_class`; flags override the --config file."""
    fields = {field.name: field for field in dataclasses.fields(arguments_class)}
    flags, config = _split_config([_underscored(token) for token in argv])
    given = {_name(token) for token in flags if token.startswith("--")}
    below = [
        token for name, value in _read_yaml(config).items() for token in _tokens(name, value, fields, config, given)
    ]
    flags = _explicit_booleans(below + flags, fields)
    for token in flags:
        if token.startswith("--") and token != "--help":
            _check_known(_name(token), fields, "flag --")
    return tyro.cli(arguments_class, args=flags, use_underscores=True, prog=prog)


def _underscored(token: str) -> str:
    name, equals, value = token.partition("=")
    if not token.startswith("--"):
        return token
    return "--" + name[2:].replace("-", "_") + equals + value  # the leading dashes stay


def _name(token: str) -> str:
    return token[2:].partition("=")[0]


def _split_config(argv: list[str]) -> tuple[list[str], Path | None]:
    flags, config = [], None
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            config = Path(next(tokens, ""))
        elif token.startswith("--config="):
            config = Path(token.partition("=")[2])
        else:
            flags.append(token)
    return flags, config


def _read_yaml(path: Path | None) -> dict:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read as UTF-8 text ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold flag names with values, one per line, e.g. learning_rate: 3e-6")
    return content


def _tokens(name, value, fields, config, given) -> list[str]:
    _check_known(str(name), fields, f"name in {config}: ")
    if {name, f"no_{name}"} & given or value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}", str(value)]
    return [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]


def _explicit_booleans(flags: list[str], fields: dict) -> list[str]:
    """`--flag True` and `--flag False`, as other trainers write them, to tyro's `--flag` and `--no_flag`."""
    result, i = [], 0
    while i < len(flags):
        token, following = flags[i], flags[i + 1].lower() if i + 1 < len(flags) else ""
        if token.startswith("--") and _name(token) in fields and fields[_name(token)].type is bool:
            name, _, value = token[2:].partition("=")
            if not value and following in ("true", "false"):
                value, i = following, i + 1
            if value.lower() not in ("", "true", "false") or token.endswith("="):
                raise UserError(f"--{name} {value!r}: write --{name} or --no_{name}, or True or False after it")
            result.append(f"--no_{name}" if value.lower() == "false" else f"--{name}")
        elif token.startswith("--") and (name := _switch_of(token, fields)):
            result.append(f"--{name}")
            if token != f"--{name}" or not following or following.startswith("--"):  # bare, or --no_name
                result.append(str(token == f"--{name}"))
        else:
            result.append(token)
        i += 1
    return result


def _switch_of(token: str, fields: dict) -> str | None:
    """The flag that a token names alone, --name or --no_name, and that takes True and False among other values."""
    name = token[2:].removeprefix("no_")
    return name if name in fields and fields[name].type in (Switch, Recompute) else None


def _check_known(name: str, fields: dict, where: str) -> None:
    if name in fields or (name.startswith("no_") and name[3:] in fields):
        return
    nearest = difflib.get_close_matches(name, [*fields, "config"], n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help for all of them"
    raise UserError(f"unknown {where}{name}; {hint}")
