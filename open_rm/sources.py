"""Where rows come from: a Hub name, a json/jsonl/parquet file, or a folder that holds <split>.<extension>.

A source is opened to (fingerprint of its content, number of rows, function that yields (place, row)); the place, file and
line or row, is what an error names.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet

from open_rm.errors import UserError, quote_error

FILE_EXTENSIONS = (".jsonl", ".json", ".parquet")
BLOCK_ROWS = 1000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before the first character
Opened = tuple[str, int, Callable[[], Iterator[tuple[str, dict]]]]


@dataclass(frozen=True)
class Source:
    """One entry of a mixer list.

    name: as the user wrote it.  label: short and unique, used in metric names.  split: e.g. "train".
    path: the local file, or None for the Hub.  amount: a count of rows, or a fraction (a float).
    """

    name: str
    label: str
    split: str
    path: Path | None
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
        path = _local_file(name, split, flag)
        own = [path.parent.name, path.stem] if path else [name.split("/")[-1]]
        label = base = "_".join(part for part in own if part)
        number = 1
        while label in {source.label for source in sources}:
            number += 1
            label = f"{base}_{number}"
        sources.append(Source(name, label, split, path, _parse_amount(amount, name, flag)))
    return sources


def _parse_amount(text: str, name: str, flag: str) -> int | float:
    try:
        amount = float(text) if "." in text else int(text)
    except ValueError:
        amount = 0
    if not amount > 0:
        raise UserError(
            f"--{flag}: the amount after {name} is {text!r}; write a count (400) or a fraction with a point (0.5, 1.0)"
        )
    return amount


def _local_file(name: str, split: str, flag: str) -> Path | None:
    """The file behind a local source; None when the name is one of the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        for extension in FILE_EXTENSIONS:
            if (path / f"{split}{extension}").is_file():
                return path / f"{split}{extension}"
        found = sorted(file.stem for file in path.iterdir() if file.suffix in FILE_EXTENSIONS)
        raise UserError(f"--{flag}: {name} has no split {split!r}; it has {', '.join(found) or 'no data file at all'}")
    if path.suffix in FILE_EXTENSIONS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        if not path.is_file():
            raise UserError(f"--{flag}: there is no file or folder {name}")
        if path.suffix not in FILE_EXTENSIONS:
            raise UserError(f"--{flag}: {name} is not a {', '.join(FILE_EXTENSIONS)} file")
        return path
    return None


def open_source(source: Source) -> Opened:
    """Content fingerprint, number of rows, and the rows themselves with their places."""
    if source.path is None:
        return _open_hub(source)
    digest = hashlib.sha256()
    with source.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if source.path.suffix == ".parquet":
        return digest.hexdigest(), *_open_parquet(source.path)
    if source.path.suffix == ".json" and (opened := _open_json_array(source.path)):
        return digest.hexdigest(), *opened
    with source.path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return digest.hexdigest(), rows, lambda: _json_lines(source.path)


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line.removeprefix(BYTE_ORDER_MARK))
                except RecursionError as error:
                    raise UserError(f"{path}:{number}: nested too deeply to be a preference row; remove it") from error
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not UTF-8 (byte {error.start}); convert the file, e.g. with iconv"
                    ) from error
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno}); "
                        "every line must be one JSON object"
                    ) from error


def _open_json_array(path: Path):
    """A .json file that is one array of rows; None when it is JSON lines under another name."""
    with path.open("rb") as file:
        if not file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            return None
    try:
        rows = json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({quote_error(error)}); mend the array, or use JSON lines") from error
    return len(rows), lambda: ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))


def _open_parquet(path: Path):
    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({quote_error(error)})") from error

    def rows():
        number = 0
        for batch in file.iter_batches(BLOCK_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row

    return file.metadata.num_rows, rows


def _open_hub(source: Source) -> Opened:
    try:
        dataset = datasets.load_dataset(source.name, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = quote_error(error)
        advice = "check the name, the split and the network (a private dataset needs HF_TOKEN in the environment)"
        raise UserError(
            f"dataset {source.name}, split {source.split!r}: cannot be loaded ({what}); {advice}"
        ) from error

    def rows():
        number = 0
        for block in dataset.iter(BLOCK_ROWS):
            for values in zip(*block.values(), strict=True):
                number += 1
                yield f"{source.name}[{source.split}]: row {number}", dict(zip(block, values, strict=True))

    return dataset._fingerprint, len(dataset), rows
