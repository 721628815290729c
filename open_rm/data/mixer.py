"""What a mixer list names: sources, each with its files, its split and the amount to take.

    org/name   org/name:config   org/name@revision      on the Hub
    org/name/folder                                     a sub-folder of it (load_dataset's data_dir)
    a.jsonl (.ndjson, .jsonl.gz, .jsonl.zst)   a.json   a.csv   a.tsv   a.parquet   a.arrow   a file without an ending
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

FILE_EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
MOST_ROWS = 10**9  # of an amount: a larger one is a slip of the hand
MOST_PASSES = 100  # over a source: more is one too (400.0 for 400)


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
        return "_".join(filter(None, (paths[0].parent.name, stem_of(paths[0]))))
    if not paths:
        parts = [Path(name).name]
    elif _is_glob(name):
        parts = list(Path(name).parts[-2:])
    else:
        parts = [*Path(name).parts[-2:], split]
    # What was written may hold signs that file names and metric names cannot have.
    parts = [re.sub(r"[^\w.-]+", "", stem_of(Path(part))) for part in parts]
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
    if text == "1":
        raise UserError(f"--{flag}: the amount after {name} is 1, a single row; write 1.0 for all its rows")
    if isinstance(amount, float) and amount > MOST_PASSES:
        raise UserError(
            f"--{flag}: the amount after {name} is {text}, which is {amount:g} passes over its rows; write "
            f"{round(amount)} for a count of rows, or 1.0 for all of them once"
        )
    return amount


def extension_of(path: Path) -> str:
    """The known extension of a file name, in small letters, or the empty string."""
    found = [extension for extension in FILE_EXTENSIONS if path.name.lower().endswith(extension)]
    return max(found, key=len, default="")


def stem_of(path: Path) -> str:
    """A file's name without its known extension."""
    return path.name[: len(path.name) - len(extension_of(path))]


def _is_glob(name: str) -> bool:
    return glob.has_magic(name) and not Path(name).exists()


def _local_paths(name: str, split: str, flag: str) -> tuple[Path, ...]:
    """The files behind a local source; none when the name is one of the Hub."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"--{flag}: {name} names the home of a user that this machine does not know") from None
    if _is_glob(name):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in found if match.is_file() and extension_of(match)]
        if not found:
            raise UserError(f"--{flag}: no {', '.join(FILE_EXTENSIONS)} file matches {name}")
        return tuple(found)
    if path.is_dir():
        return _in_folder(path, name, split, flag)
    if path.is_file():
        if path.suffix and not extension_of(path):
            raise UserError(f"--{flag}: {name} is not a {', '.join(FILE_EXTENSIONS)} file")
        return (path,)
    if path.exists():
        raise UserError(f"--{flag}: {name} is neither a file nor a folder; name one that holds rows")
    if _is_local(name, path):
        raise UserError(f"--{flag}: there is no file or folder {name}")
    return ()


def _is_local(name: str, path: Path) -> bool:
    """Whether a name that does not exist can only have meant something on this machine."""
    if extension_of(path) or path.is_absolute() or name.startswith((".", "~")):
        return True
    return name.count("/") > 1 and Path(path.parts[0]).is_dir()  # on the Hub it would be a sub-folder of org/name


def _in_folder(path: Path, name: str, split: str, flag: str) -> tuple[Path, ...]:
    if (path / "state.json").is_file():  # one Dataset saved by datasets: there is nothing to choose from
        return (path,)
    if (path / "dataset_dict.json").is_file():
        if not (path / split / "state.json").is_file():
            has = ", ".join(sorted(part.parent.name for part in path.glob("*/state.json")))
            raise UserError(f"--{flag}: {name} has no split {split!r}; it has {has or 'none'}")
        return (path / split,)
    try:
        files = [file for folder in (path, path / "data") if folder.is_dir() for file in sorted(folder.iterdir())]
    except OSError as error:
        raise UserError(f"--{flag}: the folder {name} cannot be read ({error.strerror})") from error
    files = [file for file in files if extension_of(file) and file.is_file()]
    stems = {file: stem_of(file) for file in files}
    shard = re.compile(re.escape(split) + r"-\d+(-of-\d+)?")
    of_split = [file for file, stem in stems.items() if stem == split or shard.fullmatch(stem)]
    kinds = {(file.parent, extension_of(file), stems[file] == split) for file in of_split}
    if len(kinds) > 1:
        some = ", ".join(str(file.relative_to(path)) for file in of_split[:4])
        raise UserError(f"--{flag}: several files of {name} could be its split {split!r} ({some}); name one, or a glob")
    if of_split:
        _all_shards(of_split, stems, f"--{flag}: {name}, split {split!r}")
        return tuple(of_split)
    if not files and (inner := _folders_with_data(path)):
        raise UserError(
            f"--{flag}: {name} holds folders and no data file of its own; name one of them, e.g. {name.rstrip('/')}/{inner[0]} "
            f"(it has {', '.join(inner[:8])})"
        )
    has = ", ".join(sorted({re.sub(r"-\d+(-of-\d+)?$", "", stem) for stem in stems.values()}))
    raise UserError(f"--{flag}: {name} has no split {split!r}; it has {has or 'no data file at all'}")


def _folders_with_data(path: Path) -> list[str]:
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name != "data"]
    return [folder.name for folder in inner if any(extension_of(file) for file in folder.rglob("*"))]


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
