"""What one rank of a node fetches and the others find: commits, opened data sets, and that nobody else asks."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from transformers.utils import hub

from open_rm import node_cache
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.node_cache import Notes

ONE, TWO = "1" * 40, "2" * 40


@pytest.fixture
def snapshots(monkeypatch, tmp_path):
    """Repositories of a cache, "name@revision" -> commit; `asked` notes what was asked for."""
    found, asked = {}, []

    def cached_file(name, file, revision=None, **how):
        asked.append(f"{name}@{revision or 'main'}")
        if (commit := found.get(asked[-1])) is None:
            raise OSError("not there")
        return f"{tmp_path}/hub/models--x/snapshots/{commit}/{file}"

    monkeypatch.setattr(hub, "cached_file", cached_file)
    return SimpleNamespace(found=found, asked=asked)


def test_revisions_become_the_commits_that_they_stand_for_and_the_tokenizer_is_the_models(snapshots):
    snapshots.found |= {"org/m@main": ONE, "org/t@v2": TWO}
    both = {"model_revision": ONE, "tokenizer_revision": ONE}
    assert node_cache.commits_of(ModelFlags(model_name_or_path="org/m"), {}) == both
    assert len(snapshots.asked) == 1
    assert node_cache.commits_of(ModelFlags(model_name_or_path="org/m", tokenizer_name="org/m"), {}) == both
    named = ModelFlags(model_name_or_path="org/m", tokenizer_name="org/t", tokenizer_revision="v2")
    commits = node_cache.commits_of(named, {})
    assert commits == {"model_revision": ONE, "tokenizer_revision": TWO}
    pinned = node_cache.at(named, commits)
    assert (pinned.model_revision, pinned.tokenizer_revision) == (ONE, TWO)


def test_what_is_not_found_keeps_the_revision_that_was_given(snapshots):
    flags = ModelFlags(model_name_or_path="org/m", model_revision="v1")
    assert node_cache.commits_of(flags, {}) == {}
    assert node_cache.at(flags, {}) == flags and node_cache.kept(flags, flags) == {}


def test_a_run_that_goes_on_takes_its_commits_again_and_asks_for_what_is_named_otherwise(snapshots):
    """The branch has moved meanwhile."""
    flags = ModelFlags(model_name_or_path="org/m")
    snapshots.found["org/m@main"] = ONE
    kept = node_cache.kept(flags, node_cache.at(flags, node_cache.commits_of(flags, {})))
    assert kept == {"org/m": ONE}
    snapshots.found["org/m@main"], snapshots.found["org/m@v2"] = TWO, TWO
    assert node_cache.commits_of(flags, kept) == {"model_revision": ONE, "tokenizer_revision": ONE}
    named = ModelFlags(model_name_or_path="org/m", model_revision="v2")
    assert node_cache.commits_of(named, kept) == {"model_revision": TWO, "tokenizer_revision": TWO}


def test_a_folder_has_no_commit_though_it_be_a_snapshot_of_a_cache(toy, tmp_path):
    folder = tmp_path / "hub/models--org--m/snapshots" / ONE
    folder.parent.mkdir(parents=True)
    folder.symlink_to(toy / "model")
    assert node_cache.commits_of(ModelFlags(model_name_or_path=str(folder)), {}) == {}


# ---------------------------------------------------------------- data sets


@pytest.fixture
def opened(write_rows, tmp_path, monkeypatch):
    """Opens 500 rows as a data set of the Hub would be: by a name, into datasets' cache of this test; counts the calls."""
    path = write_rows([{"text": f"row {number} " * 50} for number in range(500)])
    load, calls = datasets.load_dataset, []

    def counted(name, config, **how):
        calls.append(how)
        how = {key: value for key, value in how.items() if key != "revision"}
        return load(name, config, cache_dir=str(tmp_path / "datasets"), **how)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    return SimpleNamespace(
        call=lambda: node_cache.load_dataset("json", None, data_files=str(path), split="train"),
        calls=calls,
        cache=tmp_path / "datasets",
    )


def test_a_data_set_is_opened_once_and_other_ranks_get_where_its_files_lie_and_not_its_rows(opened):
    notes = Notes()
    with node_cache.noting(notes):
        first = opened.call()
        assert opened.call() is first and len(opened.calls) == 1
    packed = notes.packed()
    assert len(packed) < 10_000 < first.data.nbytes
    with node_cache.noting(Notes.unpacked(packed)), node_cache.as_fetched():
        found = opened.call()
    assert len(opened.calls) == 1 and found[499] == first[499] and found._fingerprint == first._fingerprint
    opened.call()  # nothing is noted outside
    assert len(opened.calls) == 2


def test_a_data_set_lies_in_files_whatever_the_environment_says_about_memory(opened, monkeypatch):
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**40)  # HF_DATASETS_IN_MEMORY_MAX_SIZE
    notes = Notes()
    with node_cache.noting(notes):
        assert opened.call().cache_files
    assert len(notes.packed()) < 10_000


def test_files_that_another_rank_does_not_see_are_a_sentence(opened):
    notes = Notes()
    with node_cache.noting(notes):
        [where] = opened.call().cache_files
    packed = notes.packed()
    Path(where["filename"]).rename(opened.cache / "elsewhere")
    with pytest.raises(UserError, match="not seen here .*; give all ranks of a node the same HF_HOME"):
        Notes.unpacked(packed)


def test_a_commit_that_is_noted_is_the_one_that_is_asked_for(monkeypatch):
    """As the first rank of another node does, after the main rank has found it in what was downloaded."""
    asked = []

    def load(name, config, revision=None, **how):
        asked.append(revision)
        checksums = {f"hf://datasets/org/d@{ONE}/data/train.parquet": {}}
        return SimpleNamespace(info=SimpleNamespace(download_checksums=checksums))

    monkeypatch.setattr(datasets, "load_dataset", load)
    main = Notes()
    with node_cache.noting(main):
        node_cache.load_dataset("org/d", None, split="train", revision=None)
    assert list(main.commits.values()) == [ONE]
    with node_cache.noting(Notes(commits=main.commits)):
        node_cache.load_dataset("org/d", None, split="train", revision=None)
    assert asked == [None, ONE]


def test_while_it_is_as_fetched_no_client_asks_and_afterwards_they_may_again(monkeypatch):
    rooms = (huggingface_hub.constants, datasets.config)
    for room in rooms:
        monkeypatch.setattr(room, "HF_HUB_OFFLINE", False)
    with pytest.raises(ZeroDivisionError), node_cache.as_fetched():
        assert [room.HF_HUB_OFFLINE for room in rooms] == [True, True]
        raise ZeroDivisionError
    assert [room.HF_HUB_OFFLINE for room in rooms] == [False, False]
    with node_cache.model_as_fetched(ModelFlags(model_name_or_path="org/m", trust_remote_code=True)):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
