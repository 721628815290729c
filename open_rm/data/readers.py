"""Files, folders and Hub data sets to rows, each with its place: the file and line or row that an error names.

A row that cannot be read is yielded as the UserError that says why, so that the caller may skip it; a file that is broken
as a whole raises. A new file format is one opener here, and its extension in mixer.py.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet

from open_rm import node_cache
from open_rm.data.mixer import Source, extension_of
from open_rm.errors import UserError, quote, quote_error
from open_rm.manifest import content_hash

BLOCK_ROWS = 1000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# What a file without an ending is, by its first bytes (an Arrow stream begins with the mark of a message).
BEGINNINGS = {
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"\xff\xff\xff\xff": ".arrow",
    GZIP: ".jsonl.gz",
    ZSTD: ".jsonl.zst",
}
BEGINNINGS |= {b"[": ".json", b"{": ".jsonl"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before the first character
Rows = Iterator[tuple[str, object]]
csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long response


@dataclass(frozen=True)
class Opened:
    """A source that can be read: fingerprint of its content, number of rows, and what yields (place, row)."""

    fingerprint: str
    size: int
    rows: Callable[[], Rows]


def open_source(source: Source) -> Opened:
    """The source, ready to be read."""
    if not source.paths:
        return _open_hub(source)
    opened = [_open_path(path) for path in source.paths]
    return Opened(
        fingerprint=hashlib.sha256("".join(part.fingerprint for part in opened).encode()).hexdigest(),
        size=sum(part.size for part in opened),
        rows=lambda: itertools.chain.from_iterable(part.rows() for part in opened),
    )


def _open_path(path: Path) -> Opened:
    if path.is_dir():
        return _open_saved(path)
    openers = {
        ".parquet": _open_parquet,
        ".arrow": _open_arrow,
        ".csv": _open_csv,
        ".tsv": _open_csv,
        ".json": _open_json,
    }
    fingerprint = content_hash([path])  # first, since it names a file that cannot be read
    kind = _kind_of(path)
    size, rows = openers[kind](path) if kind in openers else _open_json_lines(path, kind)
    return Opened(fingerprint, size, rows)


def _kind_of(path: Path) -> str:
    """A file's extension; of a file without one, by its content.

    Raises:
        UserError: the content is a pointer, or packed where the name does not say so.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path}: a Git LFS pointer and not the data itself; fetch it (git lfs pull)")
    extension = extension_of(path)
    if not extension:
        start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
        extension = next((kind for beginning, kind in BEGINNINGS.items() if start.startswith(beginning)), "")
        if not extension:
            raise UserError(
                f"{path}: neither its name nor its content says what it is; give it an ending such as .jsonl"
            )
    packed = {GZIP: ".gz", ZSTD: ".zst"}.items()
    if not extension.endswith((".gz", ".zst")) and (
        ending := next((e for mark, e in packed if head.startswith(mark)), "")
    ):
        raise UserError(f"{path}: packed, and its name does not say so; rename it to {path.name}{ending}, or unpack it")
    return extension


def _open_json_lines(path: Path, kind: str = ".jsonl"):
    try:
        with _lines(path, kind) as file:
            size = sum(1 for line in file if line.removeprefix(BYTE_ORDER_MARK).strip())
    except (OSError, EOFError, zlib.error) as error:
        packer = "zstd" if kind.endswith(".zst") else "gzip"
        raise UserError(f"{path}: not a complete {packer} file ({quote_error(error)}); compress it again") from error
    return size, lambda: _json_lines(path, kind)


def _lines(path: Path, kind: str):
    if kind.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 2**20)
    return gzip.open(path) if kind.endswith(".gz") else path.open("rb")


def _json_lines(path: Path, kind: str) -> Rows:
    with _lines(path, kind) as file:
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
            tabs = {"delimiter": "\t"} if extension_of(path) == ".tsv" else {}
            reader = csv.reader(file, strict=True, **tabs)
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
    return Opened(content_hash(files), *_dataset_rows(dataset, str(path)))


def _open_hub(source: Source) -> Opened:
    name, _, revision = source.name.partition("@")
    name, _, config = name.partition(":")
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    name = f"{owner}/{repository}" if repository else owner
    how = {"split": source.split, "revision": revision or None, "data_dir": folder or None}
    try:
        dataset = node_cache.load_dataset(name, config or None, **how)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"dataset {source.name}, split {source.split!r}: cannot be loaded ({_hub_error(error)}); it is no file or folder "
            "here, so check the name (org/name, org/name:config, org/name/folder, @revision), the split and the network (a "
            "private dataset needs HF_TOKEN in the environment)"
        ) from error
    return Opened(dataset._fingerprint, *_dataset_rows(dataset, f"{source.name}[{source.split}]"))


def _hub_error(error: Exception) -> str:
    """What datasets says, on one line, with the list of configs or splits that it may hold, and what caused it."""
    said = " ".join(str(error).split()) or type(error).__name__
    cause = " ".join(str(error.__cause__ or "").split())
    said = said if not cause or cause in said else f"{said}; cause: {cause}"
    return said.rstrip(". ")[:600].encode(errors="backslashreplace").decode()


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
