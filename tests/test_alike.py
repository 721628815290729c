"""Ranks that are compared: what their marks hold, and the sentence where one's are not the main rank's."""

import dataclasses
import importlib.metadata
import json
import platform

import pytest
import torch
from conftest import alone

from open_rm import alike
from open_rm.errors import UserError
from open_rm.evaluation import sets
from open_rm.flags import Args
from open_rm.ranks import Ranks
from open_rm.resolving import Resolved


@pytest.fixture
def others(monkeypatch):
    """The main rank of as many as there are marks besides its own, which it gathers."""

    def call(*found: dict) -> Ranks:
        names = [f"rank {rank} on host-{rank}" for rank in range(len(found) + 1)]
        monkeypatch.setattr(Ranks, "gathered", lambda _, own: [own, *zip(names[1:], found, strict=True)])
        monkeypatch.setattr(platform, "node", lambda: "host-0")
        return Ranks(rank=0, local_rank=0, world_size=len(names), device=torch.device("cpu"))

    return call


def test_marks_that_are_equal_pass_and_one_that_is_not_is_told_with_rank_and_host(others):
    alike.compare(others({"a": "1"}, {"a": "1"}), lambda: {"a": "1"}, "mend it")
    with pytest.raises(UserError) as caught:
        alike.compare(others({"a": "1"}, {"a": "2"}), lambda: {"a": "1"}, "mend it")
    assert str(caught.value) == (
        "rank 2 on host-2 is not like the others: a is '2' there and '1' on rank 0 on host-0; mend it"
    )


def test_of_many_marks_that_differ_three_are_named_and_one_that_is_missing_counts(others):
    with pytest.raises(UserError, match="d is None there and '1' on rank 0 on host-0; and 2 more differ; mend it"):
        alike.compare(others({"a": "1"}), lambda: dict.fromkeys("abcdef", "1"), "mend it")


def test_a_rank_alone_is_compared_with_nobody():
    alike.compare(alone(), lambda: {"a": "1"}, "mend it")


def marks(**flags) -> dict[str, str]:
    return alike.marks(dataclasses.asdict(Args(model_name_or_path="m")) | flags)


def test_flags_are_marks_but_those_of_a_disk_of_the_nodes_own():
    assert marks(seed=2)["--seed"] == "2"
    assert marks(dataset_local_cache_dir="/here") == marks(dataset_local_cache_dir="/there")


def test_the_content_of_deepspeeds_file_is_a_mark(tmp_path):
    """Every node reads it from a checkout of its own."""
    file, found = tmp_path / "zero.json", []
    for stage in (2, 3):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        found.append(marks(deepspeed=str(file)))
    differ = [name for name, value in found[0].items() if found[1][name] != value]
    assert differ == ["the file of --deepspeed"]


def test_libraries_that_change_kernels_are_marks_and_absent_where_they_are_not_there(monkeypatch):
    def version(name):
        if name != "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.13.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = marks()
    assert found["torch"] == "2.13.0"
    assert {found[name] for name in ("liger-kernel", "peft", "bitsandbytes", "flash-attn")} == {"absent"}


def test_a_patch_release_of_python_may_differ_and_a_version_not(monkeypatch):
    found = []
    for release in ("3.11.7", "3.11.9", "3.12.1"):
        monkeypatch.setattr(platform, "python_version", lambda release=release: release)
        monkeypatch.setattr(platform, "python_version_tuple", lambda release=release: tuple(release.split(".")))
        found.append(marks())
    assert found[0] == found[1] != found[2]


def test_a_row_more_of_a_benchmark_makes_another_mark(write_rows):
    """It would be scored in one forward more, which waits for the other ranks for ever."""
    rows = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no", "subset": "hep-python", "id": n} for n in range(9)]
    found = []
    for count in (8, 8, 9):
        path = write_rows(rows[:count])
        found.append(sets.marks(sets.open_sets([f"reward_bench={path}"])))
    assert list(found[0]) == ["--benchmark reward_bench"]
    assert found[0] == found[1] != found[2]


def test_what_was_read_is_a_mark_config_tokenizer_and_pairs(toy, tokenizer):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(toy / "model")
    read = Resolved(config, torch.float32, None, tokenizer, "train", None, ())
    found = read.marks(lambda data: data and f"mark of {data}")
    assert found["the training data"] == "mark of train" and found["the held-out data"] is None
    config.num_hidden_layers += 1
    changed = read.marks(lambda data: data and f"mark of {data}")
    assert [name for name in found if found[name] != changed[name]] == ["the model's config"]
    tokenizer.chat_template += " "
    changed_again = read.marks(lambda data: data and f"mark of {data}")
    assert [name for name in found if changed_again[name] != changed[name]] == ["the tokenizer"]
