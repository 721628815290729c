"""Where rows come from: Hub names, files, folders, globs.

    org/name   org/name:config   org/name@revision      on the Hub
    a.jsonl   a.jsonl.gz   a.json   a.csv   a.parquet   a.arrow
    folder/                 <split>.<extension>, <split>-*.<extension> (also in folder/data), or saved by datasets
    "folder/*.jsonl"        all files that match, sorted, as one source

A source is opened to (fingerprint of its content, number of rows, function that yields (place, row)). The place, file and
line or row, is what an error names; a row that cannot be read is yielded as the UserError that says why, so that the
caller may skip it. A file that is broken as a whole raises.
"""

import csv
import glob
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet

from open_rm.errors import UserError, quote, quote_error

FILE_EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".csv", ".parquet", ".arrow")
BLOCK_ROWS = 1000
MOST_ROWS = 10**9  # of an amount: a larger one is a slip of the hand
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before the first character
Rows = Iterator[tuple[str, object]]
Opened = tuple[str, int, Callable[[], Rows]]
csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long response


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
        if paths and len(paths) == 1:
            own = [paths[0].parent.name, paths[0].name.removesuffix(_extension(paths[0]))]
        else:  # a glob, or shards, or a Hub name: as written, without what file names and metric names cannot have
            own = [*Path(name).parts[-2 if paths else -1 :], *([split] if paths and not _is_glob(name) else [])]
            own = [re.sub(r"[^\w.-]+", "", part.removesuffix(_extension(Path(part)))) for part in own]
        label = base = "_".join(part for part in own if part)
        number = 1
        while label in {source.label for source in sources}:
            number += 1
            label = f"{base}_{number}"
        sources.append(Source(name, label, split, paths, _parse_amount(amount, name, flag)))
    return sources


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


def _extension(path: Path) -> str:
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
        found = [match for match in found if match.is_file() and _extension(match)]
        if not found:
            raise UserError(f"--{flag}: no {', '.join(FILE_EXTENSIONS)} file matches {name}")
        return tuple(found)
    if path.is_dir():
        return _in_folder(path, name, split, flag)
    if _extension(path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        if not path.is_file():
            raise UserError(f"--{flag}: there is no file or folder {name}")
        if not _extension(path):
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
    files = [file for file in files if _extension(file) and file.is_file()]
    stems = {file: file.name.removesuffix(_extension(file)) for file in files}
    shard = re.compile(re.escape(split) + r"-\d+(-of-\d+)?")
    of_split = [file for file, stem in stems.items() if stem == split or shard.fullmatch(stem)]
    kinds = {(file.parent, _extension(file), stems[file] == split) for file in of_split}
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


def open_source(source: Source) -> Opened:
    """Content fingerprint, number of rows, and the rows themselves with their places."""
    if not source.paths:
        return _open_hub(source)
    opened = [_open_path(path) for path in source.paths]
    digest = hashlib.sha256("".join(content for content, *_ in opened).encode()).hexdigest()
    return (
        digest,
        sum(rows for _, rows, _ in opened),
        lambda: itertools.chain.from_iterable(rows() for *_, rows in opened),
    )


def _open_path(path: Path) -> Opened:
    if path.is_dir():
        return _open_saved(path)
    openers = {".parquet": _open_parquet, ".arrow": _open_arrow, ".csv": _open_csv, ".json": _open_json}
    return content_hash([path]), *openers.get(_extension(path), _open_json_lines)(path)


def content_hash(paths: Iterable[Path]) -> str:
    """sha256 over the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _open_json_lines(path: Path):
    try:
        with _lines(path) as file:
            size = sum(1 for line in file if line.removeprefix(BYTE_ORDER_MARK).strip())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({quote_error(error)}); compress it again") from error
    return size, lambda: _json_lines(path)


def _lines(path: Path):
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")


def _json_lines(path: Path) -> Rows:
    with _lines(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                place = f"{path}:{number}"
                try:
                    yield place, json.loads(line.decode(), object_pairs_hook=_object)
                except RecursionError:
                    yield place, UserError("nested too deeply to be a preference row; remove it")
                except UnicodeDecodeError as error:
                    yield place, UserError(f"not UTF-8 (byte {error.start}); convert the file, e.g. with iconv")
                except json.JSONDecodeError as error:
                    what = f"{error.msg}, column {error.colno}"
                    yield place, UserError(f"not valid JSON ({what}); every line must be one JSON object")
                except ValueError as error:
                    yield place, UserError(f"not usable JSON ({quote_error(error)}); correct or remove the row")


def _object(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {quote(counts.most_common(1)[0][0])} stands twice in one object")
    return made


def _open_json(path: Path):
    """A .json file that is one array of rows, or JSON lines under another name."""
    with path.open("rb") as file:
        if not file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            return _open_json_lines(path)
    try:
        rows = json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({quote_error(error)}); mend the array, or use JSON lines") from error
    return len(rows), lambda: ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))


def _open_csv(path: Path):
    return sum(1 for _ in _csv_rows(path)), lambda: _csv_rows(path)


def _csv_rows(path: Path) -> Rows:
    """Rows of text; an empty cell is no value."""
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(f"{path}:1: a column name stands twice in the header; rename one")
            end = reader.line_num
            for cells in reader:  # a record's place is its first line
                line, end = end + 1, reader.line_num
                if any("\0" in cell for cell in cells):
                    yield f"{path}:{line}", UserError("holds a NUL character; remove it")
                elif len(cells) == len(header):
                    values = (cell or None for cell in cells)
                    yield f"{path}:{line}", dict(zip(header, values, strict=True))
                elif cells:
                    what = f"{len(cells)} cells under a header of {len(header)}; quote cells that hold commas or lines"
                    yield f"{path}:{line}", UserError(what)
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: not valid CSV after this line ({quote_error(error)}); check the quotes"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 after this line; convert the file, e.g. with iconv") from error


def _open_parquet(path: Path):
    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({quote_error(error)}); write it again") from error
    _no_name_twice(path, file.schema_arrow.names)
    return file.metadata.num_rows, lambda: _table_rows(path, file.iter_batches(BLOCK_ROWS))


def _no_name_twice(path: Path, names: list[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: the column {quote(twice[0])} stands twice; rename one")


def _open_arrow(path: Path):
    """A stream, as datasets writes it, or a file in Arrow's own file format."""

    def batches() -> Iterator[pa.RecordBatch]:
        mapped = pa.memory_map(str(path))
        try:
            yield from pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            if mapped.read(6) != b"ARROW1":
                raise
            reader = pa.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    try:
        size = 0
        for batch in batches():
            _no_name_twice(path, batch.schema.names)
            size += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable arrow file ({quote_error(error)}); write it again") from error
    return size, lambda: _table_rows(path, batches())


def _table_rows(path: Path, batches: Iterator[pa.RecordBatch]) -> Rows:
    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # a damaged file may point outside its own memory
            for start in range(0, batch.num_rows, BLOCK_ROWS):
                for row in batch.slice(start, BLOCK_ROWS).to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: cannot be read after row {number} ({quote_error(error)}); write it again") from error


def _open_saved(path: Path) -> Opened:
    """A folder that datasets' save_to_disk wrote."""
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pa.ArrowException) as error:
        what = f"not a folder that datasets can load ({quote_error(error)}); save it again"
        raise UserError(f"{path}: {what}") from error
    files = sorted(file for file in path.iterdir() if file.is_file())
    return content_hash(files), *_dataset_rows(dataset, str(path))


def _open_hub(source: Source) -> Opened:
    name, _, revision = source.name.partition("@")
    name, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=source.split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = quote_error(error)
        advice = "check the name, the split and the network (a private dataset needs HF_TOKEN in the environment)"
        raise UserError(
            f"dataset {source.name}, split {source.split!r}: cannot be loaded ({what}); {advice}"
        ) from error
    return dataset._fingerprint, *_dataset_rows(dataset, f"{source.name}[{source.split}]")


def _dataset_rows(dataset: datasets.Dataset, name: str):
    dataset = dataset.with_format(None)  # all columns, as Python values, whatever it was saved with

    def rows() -> Rows:
        number = 0
        try:
            for block in dataset.iter(BLOCK_ROWS):
                for values in zip(*block.values(), strict=True):
                    number += 1
                    yield f"{name}: row {number}", dict(zip(block, values, strict=True))
        except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"{name}: cannot be read after row {number} ({quote_error(error)}); make it again"
            ) from error

    return len(dataset), rows
