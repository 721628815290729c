"""What a mixer list names: sources, each with its files, its split and the amount to take.

    org/name   org/name:config   org/name@revision      on the Hub
    a.jsonl   a.jsonl.gz   a.json   a.csv   a.parquet   a.arrow
    folder/                 <split>.<extension>, <split>-*.<extension> (also in folder/data), or saved by datasets
    "folder/*.jsonl"        all files that match, sorted, as one source

Only names are looked at here; readers.py opens what is behind them.
"""

import glob
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from open_rm.errors import UserError

FILE_EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".csv", ".parquet", ".arrow")
MOST_ROWS = 10**9  # of an amount: a larger one is a slip of the hand


@dataclass(frozen=True)
class Source:
    """One entry of a mixer list.

    name: as the user wrote it.  label: short and unique, used in metric names.  split: e.g. "train".
    paths: local files, or one folder saved by datasets; empty for the Hub.
    amount: a count of rows, or a fraction (a float).
    """

    name: str
    label: str
    split: str
    paths: tuple[Path, ...]
    amount: int | float


def parse_mixer(mixer: list[str], splits: list[str], flag: str) -> list[Source]:
    """Alternating name and amount, e.g. ["a/b", "400", "c.jsonl", "0.5"], to sources.

    An amount is a count of rows, or a fraction when written with a point ("1.0" is everything). Counts beyond the
    source's size repeat rows. `splits` has one entry, for all, or one per source; a single file is itself the split.
    """
    if len(mixer) % 2:
        raise UserError(f"--{flag} alternates name and amount (e.g. my/data 1.0); got {len(mixer)} values: {mixer}")
    names, amounts = mixer[::2], mixer[1::2]
    if len(splits) not in (1, len(names)):
        raise UserError(
            f"--{flag}_splits has {len(splits)} values for {len(names)} sources; give one, or one per source"
        )
    splits = splits * len(names) if len(splits) == 1 else splits
    sources: list[Source] = []
    for name, amount, split in zip(names, amounts, splits, strict=True):
        paths = _local_paths(name, split, flag)
        if bad := [path for path in paths if not str(path).isprintable()]:
            raise UserError(f"--{flag}: the file name {ascii(str(bad[0]))} is no plain text; rename the file")
        label = _unused(label_of(name, split, paths), {source.label for source in sources})
        sources.append(Source(name, label, split, paths, _parse_amount(amount, name, flag)))
    return sources


def label_of(name: str, split: str, paths: tuple[Path, ...]) -> str:
    """What metrics call a source.

    my/pairs.jsonl                                my_pairs
    my (a folder that holds train.jsonl)          my_train
    sets/my, split train, in several shards       sets_my_train
    "my/*.jsonl" (several files)                   my
    org/name:config, on the Hub                   nameconfig
    """
    if len(paths) == 1:
        return "_".join(filter(None, (paths[0].parent.name, paths[0].name.removesuffix(extension_of(paths[0])))))
    if not paths:
        parts = [Path(name).name]
    elif _is_glob(name):
        parts = list(Path(name).parts[-2:])
    else:
        parts = [*Path(name).parts[-2:], split]
    # What was written may hold signs that file names and metric names cannot have.
    parts = [re.sub(r"[^\w.-]+", "", part.removesuffix(extension_of(Path(part)))) for part in parts]
    return "_".join(filter(None, parts))


def _unused(label: str, taken: set[str]) -> str:
    """The label, or with a number where it is taken."""
    numbered = (f"{label}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([label], numbered) if name not in taken)


def _parse_amount(text: str, name: str, flag: str) -> int | float:
    try:
        amount = float(text) if "." in text else int(text)
    except ValueError:
        amount = 0
    if not 0 < amount < MOST_ROWS:
        raise UserError(
            f"--{flag}: the amount after {name} is {text!r}; write a count (400) or a fraction with a point (0.5, 1.0)"
        )
    return amount


def extension_of(path: Path) -> str:
    """The known extension of a file name, or the empty string."""
    found = [extension for extension in FILE_EXTENSIONS if path.name.endswith(extension)]
    return max(found, key=len, default="")


def _is_glob(name: str) -> bool:
    return glob.has_magic(name) and not Path(name).exists()


def _local_paths(name: str, split: str, flag: str) -> tuple[Path, ...]:
    """The files behind a local source; none when the name is one of the Hub."""
    path = Path(name).expanduser()
    if _is_glob(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in found if match.is_file() and extension_of(match)]
        if not found:
            raise UserError(f"--{flag}: no {', '.join(FILE_EXTENSIONS)} file matches {name}")
        return tuple(found)
    if path.is_dir():
        return _in_folder(path, name, split, flag)
    if extension_of(path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        if not path.is_file():
            raise UserError(f"--{flag}: there is no file or folder {name}")
        if not extension_of(path):
            raise UserError(f"--{flag}: {name} is not a {', '.join(FILE_EXTENSIONS)} file")
        return (path,)
    return ()


def _in_folder(path: Path, name: str, split: str, flag: str) -> tuple[Path, ...]:
    if (path / "state.json").is_file():  # one Dataset saved by datasets: there is nothing to choose from
        return (path,)
    if (path / "dataset_dict.json").is_file():
        if not (path / split / "state.json").is_file():
            has = ", ".join(sorted(part.parent.name for part in path.glob("*/state.json")))
            raise UserError(f"--{flag}: {name} has no split {split!r}; it has {has or 'none'}")
        return (path / split,)
    files = [file for folder in (path, path / "data") if folder.is_dir() for file in sorted(folder.iterdir())]
    files = [file for file in files if extension_of(file) and file.is_file()]
    stems = {file: file.name.removesuffix(extension_of(file)) for file in files}
    shard = re.compile(re.escape(split) + r"-\d+(-of-\d+)?")
    of_split = [file for file, stem in stems.items() if stem == split or shard.fullmatch(stem)]
    kinds = {(file.parent, extension_of(file), stems[file] == split) for file in of_split}
    if len(kinds) > 1:
        some = ", ".join(str(file.relative_to(path)) for file in of_split[:4])
        raise UserError(f"--{flag}: several files of {name} could be its split {split!r} ({some}); name one, or a glob")
    if of_split:
        _all_shards(of_split, stems, f"--{flag}: {name}, split {split!r}")
        return tuple(of_split)
    has = ", ".join(sorted({re.sub(r"-\d+(-of-\d+)?$", "", stem) for stem in stems.values()}))
    raise UserError(f"--{flag}: {name} has no split {split!r}; it has {has or 'no data file at all'}")


def _all_shards(files: list[Path], stems: dict[Path, str], what: str) -> None:
    """Files that say they are one of N must be all N."""
    parts = [re.search(r"-(\d+)-of-(\d+)$", stems[file]) for file in files]
    if not any(parts):
        return
    total = max(int(part[2]) for part in parts if part)
    if lacking := sorted(set(range(total)) - {int(part[1]) for part in parts if part}):
        raise UserError(
            f"{what}: {len(lacking)} of {total} files are missing, the first number {lacking[0]}; fetch them"
        )
