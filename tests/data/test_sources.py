"""Names in a mixer list: every kind of file by its ending or its content, folders, the Hub, and what leads nowhere."""

import gzip
import json

import datasets
import pyarrow as pa
import pytest
from conftest import read_pairs
from pyarrow import parquet

from open_rm.data import readers
from open_rm.data.mixer import parse_mixer
from open_rm.errors import UserError

PAIRS = [{"prompt": f"q{i}: ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def table(content=None) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(PAIRS), sink)
    return sink.getvalue().to_pybytes()


def arrow(new) -> bytes:
    sink, rows = pa.BufferOutputStream(), pa.Table.from_pylist(PAIRS)
    with new(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def separated(by: str) -> bytes:
    return "\n".join(by.join(cells) for cells in [list(PAIRS[0]), *(row.values() for row in PAIRS)]).encode()


FILES = {
    "a.jsonl.zst": zstd(LINES),
    "a.ndjson": LINES,
    "a.tsv": separated("\t"),
    "A.JSONL": LINES,
    "A.Csv": separated(","),
    "A.JSONL.GZ": gzip.compress(LINES),
    "lines": LINES,
    "array": json.dumps(PAIRS, indent=1).encode(),
    "packed": gzip.compress(LINES),
    "packed_too": zstd(LINES),
    "table": table(),
    "stream": arrow(pa.ipc.new_stream),
    "file": arrow(pa.ipc.new_file),
}


@pytest.fixture
def texts(tokenizer, tmp_path):
    """What a source's chosen sides read."""

    def read(source, amount="1.0", **flags):
        data = read_pairs([str(source), amount], tokenizer, dataset_local_cache_dir=str(tmp_path / "cache"), **flags)
        return [tokenizer.decode(chosen) for chosen, _ in data.pairs(range(len(data)))]

    return read


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_by_their_ending_or_by_their_content(texts, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert [text.partition("<")[0] for text in texts(tmp_path / name)] == ["q0: yes 0", "q1: yes 1", "q2: yes 2"]


def test_cells_of_json_are_lists_where_a_list_is_meant(texts, tmp_path):
    rows = [("prompt", "responses", "scores"), ("q: ", '["a", "b"]', "[1, 2]")]
    (tmp_path / "a.tsv").write_text(
        "\n".join("\t".join(json.dumps(cell) if '"' in cell else cell for cell in row) for row in rows)
    )
    quoted = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    (tmp_path / "a.csv").write_text(quoted)
    [text] = texts(tmp_path / "a.csv")
    assert text.startswith("q: b")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", gzip.compress(LINES), "packed, and its name does not say so; rename it to a.jsonl.gz"),
        ("a.json", zstd(LINES), "packed, and its name does not say so; rename it to a.json.zst"),
        ("a.jsonl.zst", zstd(LINES)[:-20], "not a complete zstd file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "a Git LFS pointer .*git lfs pull"),
        ("notes", b"once upon a time", "give it an ending such as .jsonl"),
    ],
    # named, since the bytes of a packed file hold the time and every worker must collect the same names
    ids=["gzip unsaid", "zstd unsaid", "zstd cut off", "git-lfs pointer", "prose"],
)
def test_a_file_that_is_something_else_says_what(texts, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        texts(tmp_path / name)


def test_a_folder_of_folders_names_them(tmp_path):
    (tmp_path / "set" / "helpful").mkdir(parents=True)
    (tmp_path / "set" / "helpful" / "train.jsonl").write_bytes(LINES)
    with pytest.raises(
        UserError, match="holds folders and no data file of its own; name one of them, e.g. .*/set/helpful"
    ):
        parse_mixer([str(tmp_path / "set"), "1.0"], ["train"], "dataset_mixer_list")


@pytest.mark.parametrize(
    ("name", "amount", "says"),
    [
        ("~nobody_at_all/a.jsonl", "1.0", "the home of a user that this machine does not know"),
        ("my/data", "1", "is 1, a single row; write 1.0 for all its rows"),
        ("my/data", "400.0", "400 passes over its rows; write 400 for a count"),
        ("/dev/null", "1.0", "neither a file nor a folder"),
    ],
)
def test_names_and_amounts_that_are_slips(name, amount, says):
    with pytest.raises(UserError, match=says):
        parse_mixer([name, amount], ["train"], "dataset_mixer_list")


def test_a_count_far_beyond_the_rows_is_refused(texts, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="33333 passes over its 3 rows"):
        texts(tmp_path / "a.jsonl", "100000")


HUB_NAMES = {
    "org/name": ("org/name", None, None, None),
    "org/name:main": ("org/name", "main", None, None),
    "org/name@v1": ("org/name", None, "v1", None),
    "org/name/helpful-base": ("org/name", None, None, "helpful-base"),
    "org/name/data/en:main@v1": ("org/name", "main", "v1", "data/en"),
    "name": ("name", None, None, None),
}


@pytest.mark.parametrize("written", HUB_NAMES)
def test_a_name_on_the_hub_says_config_revision_and_folder(monkeypatch, texts, written):
    asked = []

    def load_dataset(name, config, *, split, revision, data_dir, keep_in_memory):
        asked.append((name, config, revision, data_dir))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(readers.datasets, "load_dataset", load_dataset)
    assert len(texts(written)) == 3
    assert asked == [HUB_NAMES[written]]


def test_a_hub_error_keeps_the_list_of_configs_and_the_cause(monkeypatch, texts):
    def load_dataset(*_, **__):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"
        ) from OSError("the server said 403")

    monkeypatch.setattr(readers.datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"configs: \['en', 'de'\]; cause: the server said 403"):
        texts("org/name")


def test_a_bad_row_says_how_many_there_are_and_which_flag_leaves_them_out(texts, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"chosen": "a"}\n{"chosen": "b"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:4: no value for rejected.*\(2 of all 5 rows.*--skip_bad_rows 2"):
        texts(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl:5: .*--skip_bad_rows 1 are used up; --skip_bad_rows 2 would"):
        texts(tmp_path / "a.jsonl", skip_bad_rows=1)
    assert len(texts(tmp_path / "a.jsonl", skip_bad_rows=2)) == 3
    (tmp_path / "b.jsonl").write_bytes(b'{"chosen": "a"}\n{"chosen": "b"}\n')
    with pytest.raises(
        UserError, match=r"b.jsonl:1: no value .*none of the 2 rows of this source can be used"
    ) as error:
        texts(tmp_path / "b.jsonl")
    assert "--skip_bad_rows" not in str(error.value), "which would leave nothing"
    with pytest.raises(UserError, match="b.jsonl:1: no value .*the first; none of the 2 rows"):
        texts(tmp_path / "b.jsonl", skip_bad_rows=1)
