"""--find_batch_size: what is found fits, the next does not, and nothing but micro-batches is changed by looking for it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import alone, in_a_process
from headers_of_ids import batches_dealt, conversations, keys_of
from pairs_of_ids import as_data

from open_rm.batching.rules import BatchRules
from open_rm.errors import UserError
from open_rm.flags import ObjectiveFlags, ScaleFlags
from open_rm.training import gathered, memory, trying
from open_rm.training.filling import Filling
from open_rm.training.trying import Try, expected_peak

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
OF_RANKS = f"import sys; sys.path[:0] = {FOLDERS}; import ranks_that_train; ranks_that_train.main(*sys.argv[1:])"
ROW = [5 + i % 90 for i in range(400)]


# ---------------------------------------------------------------- ranks that train


@pytest.fixture(scope="module")
def found(toy):
    """What real ranks found."""
    return in_a_process(OF_RANKS, "trying", toy / "model")


def test_a_run_that_found_a_budget_equals_bit_for_bit_one_that_was_given_it(found):
    """Losses, gradient norms, learning rates and weights of two steps."""
    for name in ("1: dropout", "2: 2", "2: 3, a group"):
        for of_rank in found[name]:
            assert of_rank["equal"] and of_rank["numbers"], name
            assert len(of_rank["steps"]) == 2 and of_rank["steps"][0] != of_rank["steps"][1]


def test_the_rank_with_the_least_memory_decides_for_all(found):
    here, there = found["2: 2"]
    assert here["budget"] == there["budget"] < 4096
    assert "and rank 1 has" in here["lines"][-1] + here["lines"][-2]


def test_a_step_that_is_dropped_leaves_nothing_to_the_next(found):
    """bfloat16, with and without the optimizer on the CPU; that it was no number, and that its gradients were forgotten."""
    [here] = found["1: dropped"]
    assert len(here) == 6
    for case, (dropped, plain, after_nan, after_forgetting) in here.items():
        assert dropped == "inf" and after_nan == plain, case
        assert after_forgetting == plain and plain[0] != plain[1], case


def test_what_is_found_under_a_real_limit_trains_under_it_and_twice_as_much_does_not(found):
    [here] = found["1: real"]
    assert here["budget"] >= 1024
    assert memory.is_shortage(RuntimeError(here["next"]))
    assert any(f"{2 * here['budget']} would take" in line for line in here["lines"])


def test_memory_that_runs_out_is_taken_back_and_the_last_that_fitted_is_kept(found):
    [here] = found["1: runs out, 3"]
    assert here["equal"] and here["budget"] >= 512
    assert any(f"{2 * here['budget']} ran out of memory" in line for line in here["lines"])


def test_every_try_says_positions_memory_seconds_and_speed(found):
    [here] = found["1: real"]
    tried = [line for line in here["lines"] if line.startswith("tried ")]
    assert [int(line.split()[1]) for line in tried] == [256 * 2**n for n in range(len(tried))]
    assert all(" MiB at most, " in line and " positions/s" in line for line in tried)
    assert any(
        f"micro-batches of up to {here['budget']} positions (--find_batch_size, " in line for line in here["lines"]
    )


# ---------------------------------------------------------------- what is tried


def rules(layout: str) -> BatchRules:
    return BatchRules(layout, 0, max_tokens=1024, evaluation_tokens=1024)


@pytest.mark.parametrize(("layout", "largest"), [("padded", 600), ("packed", 580), ("shared_prefix", 580 - 279)])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_budget_is_filled_with_the_longest_pairs_and_never_exceeded(layout, largest, devices):
    pairs = [(ROW[:300], [*ROW[:279], 3]), (ROW[:30], ROW[5:40]), (ROW[:90], ROW[9:100])]
    fill = Filling(rules(layout), as_data(pairs, [0, 0, 0]), devices)
    assert fill.smallest == -(-largest // (256 * devices)) * 256
    for budget in (fill.smallest, 2 * fill.smallest, 8 * fill.smallest):
        [micro] = fill.micro_batches(budget)
        room = budget * devices
        assert room - largest < micro.batch.positions <= room
        assert micro.indices[0] == 0 and set(micro.indices) >= (
            {0} if layout == "padded" else {0, 1, 2} if len(micro.indices) > 2 else {0}
        )
    assert fill.least().indices.tolist() == [1]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_where_lists_stay_whole_a_budget_holds_the_largest_list(layout):
    """A list of three middling pairs is larger than the longest pair."""
    answers = [[*ROW[:100], 7 + i, *ROW[:99]] for i in range(3)]
    pairs = [(ROW[:250], ROW[3:240]), *((answers[i], answers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))]
    data = as_data(pairs, [0, 100, 100, 100])
    columns = data.dataset.to_dict() | {"list_id": [4, 8, 8, 8]}
    data = dataclasses.replace(data, dataset=datasets.Dataset.from_dict(columns))
    whole = dataclasses.replace(rules(layout), whole_lists=True)
    fill, of_pairs = (Filling(how, data, 1) for how in (whole, rules(layout)))
    # three answers of 200 tokens with a common beginning of 100 where that is shared: 400 tokens, less than the pair's 487
    if layout == "shared_prefix":
        assert fill.smallest == of_pairs.smallest == 512
    else:
        assert (fill.smallest, of_pairs.smallest) == (1280, 512)
    for budget in (fill.smallest, 2 * fill.smallest):
        for micro in fill.micro_batches(budget):
            assert micro.batch.positions <= budget
            assert sorted(micro.indices.tolist()).count(1) == micro.indices.tolist().count(3)  # no list is cut
    assert fill.least().indices.tolist() == ([1, 2, 3] if layout == "shared_prefix" else [0])


def test_the_prompt_whose_answers_gather_most_keys_is_tried_too_where_prefixes_are_shared():
    answers = [ROW[:200] + [7 + i] * 5 for i in range(8)]
    many = [(answers[i], answers[j]) for i in range(8) for j in range(i)]
    data = as_data([*many, (ROW[:390], ROW[3:])], [200] * len(many) + [0])
    few, longest = Filling(rules("shared_prefix"), data, 1).micro_batches(2048)
    assert set(few.indices) <= set(range(len(many))) and few.batch.positions <= 2048
    assert len(few.batch.segments.key_index) > 3 * few.batch.positions
    assert longest.indices[0] == len(many)
    assert len(Filling(rules("packed"), data, 1).micro_batches(2048)) == 1


@pytest.mark.parametrize("lists", [False, True])
def test_where_prompts_share_headers_what_gathers_most_keys_is_tried_too(lists):
    """Against what training deals at the same budget, steps of several sizes on one rank and on three."""
    for seed in range(6):
        data = conversations(seed, prompts=60, lists=lists)
        how = dataclasses.replace(rules("shared_prefix"), whole_lists=lists)
        fill = Filling(how, data, 1)
        for budget in (4 * fill.smallest, 8 * fill.smallest):
            tried = [micro.batch for micro in fill.micro_batches(budget)]
            assert tried[-1].input_ids.equal(fill.longest(budget).batch.input_ids)
            assert all(batch.positions <= budget for batch in tried)
            training = batches_dealt(data, dataclasses.replace(how, max_tokens=budget), seed)
            assert max(map(keys_of, tried)) >= max(map(keys_of, training)), (seed, budget)
    pairs = as_data([(ROW[:30], ROW[5:40]), (ROW[:90], ROW[9:100])], [0, 0])  # nothing begins alike
    assert len(Filling(rules("shared_prefix"), pairs, 1).micro_batches(2048)) == 1


def test_behind_one_header_a_budget_holds_all_the_prompts_that_fit():
    pairs = [tuple([*ROW[:200], 1000 + i, 10 + side, *ROW[:9]] for side in (0, 1)) for i in range(40)]
    data = as_data(pairs, [201] * 40)
    behind, _ = (micro.batch for micro in Filling(rules("shared_prefix"), data, 1).micro_batches(768))
    # the header, and 27 prompts of one token more with two answers of ten each
    assert behind.positions == 200 + 27 * 21 and keys_of(behind) == 27 * 2 * 211
    assert len(gathered.by_headers(data.table, whole_lists=False, room=768)) == 1  # all ways to find headers agree


def test_units_that_come_after_what_fills_the_room_are_left_out_and_nothing_is_lost():
    def keys(way: gathered.ByHeader, room: int) -> int:
        return max(way.keys[way._filled(room, densest)[0]].sum() for densest in (False, True))

    table = conversations(1, prompts=1500).table
    short, whole = (gathered.by_headers(table, whole_lists=False, room=room) for room in (600, 10**9))
    assert sum(len(way.own) for way in short) < 0.6 * sum(len(way.own) for way in whole)
    for way, of_all in zip(short, whole, strict=True):
        assert [keys(way, room) for room in (150, 300, 600)] == [keys(of_all, room) for room in (150, 300, 600)]


def test_a_peak_is_foreseen_on_the_line_through_the_last_two():
    first = Try(512, 2, 500, peak=150.0, seconds=1.0)
    flat = [first, Try(1024, 4, 1000, peak=170.0, seconds=1.0)]
    falling = [first, Try(1024, 4, 1000, peak=140.0, seconds=1.0)]
    assert expected_peak([first], 1024, base=100.0, careful=False) == 200.0
    assert expected_peak(flat, 2048, base=100.0, careful=False) == 210.0
    assert expected_peak(falling, 2048, base=100.0, careful=False) == 140.0
    # on a CPU the heap, which keeps what a try took, hides a part of the next one's
    assert expected_peak(flat, 2048, base=90.0, careful=True) == 250.0


class Climb:
    """In place of the ranks' tries."""

    def __init__(self, tries):
        self.tries = tries

    def to_the_top(self):
        return self.tries, "for a test"

    def forget(self):
        pass


def engine_of(ranks, *, recomputed: bool = False, stage: int = 0):
    module = torch.nn.Linear(1, 1)
    module.gradient_checkpointing = recomputed
    return SimpleNamespace(ranks=ranks, module=module, optimizer=None, config={"zero_optimization": {"stage": stage}})


def find(monkeypatch, tries, **how):
    monkeypatch.setattr(trying, "_Climb", lambda *_, **__: Climb(tries))
    monkeypatch.setattr(trying, "Filling", lambda *_, **__: None)
    monkeypatch.setattr(trying, "columns_of", lambda *_: None)
    ranks = alone()
    others = how.pop("others", [])  # what other ranks say to a question
    monkeypatch.setattr(type(ranks), "gathered", lambda self, value: [value, *others] if value is True else [value])
    engine = engine_of(ranks)
    engine.schedule_state, engine.set_schedule = dict, lambda state: None
    flags = ScaleFlags(find_batch_size=how.pop("flag", True))
    return trying.find(flags, ObjectiveFlags(), engine, rules("packed"), None, pairs_per_step=8, **how)


TRIES = [Try(512, 2, 500, 1e9, 0.5), Try(1024, 4, 1000, 2e9, 1.5), Try(2048, 8, 2000, 3e9, 3.2)]


def test_a_smaller_budget_that_was_clearly_faster_is_said_and_the_largest_kept(monkeypatch):
    found, lines = find(monkeypatch, TRIES, before=None)
    assert found.max_tokens == 2048
    assert lines[-1] == "--max_tokens_per_micro_batch 512 was 1.6 times as fast a position as 2048"
    _, lines = find(monkeypatch, TRIES[1:], before=None)
    assert lines[-1].startswith("micro-batches of up to 2048 positions")


def test_without_the_flag_nothing_is_tried(monkeypatch):
    same = rules("packed")
    assert find(monkeypatch, [], flag=False, before=None) == (same, [])
    assert trying.kept(ScaleFlags(), same, engine_of(alone())) is None


def test_a_run_that_goes_on_cuts_its_steps_as_before_where_the_same_decides_what_fits(monkeypatch):
    def of(engine, layout: str = "packed") -> dict:
        return trying.kept(ScaleFlags(find_batch_size=True), BatchRules(layout, 0, 768, 1024), engine)

    ranks = alone()
    before = json.loads(json.dumps(of(engine_of(ranks))))
    found, [line] = find(monkeypatch, TRIES, before=before)
    assert found.max_tokens == 768 and "as --find_batch_size found them before" in line
    # each of these had another budget
    grouped = dataclasses.replace(ranks, world_size=2, sequence_size=2)
    others = [engine_of(grouped), engine_of(ranks, recomputed=True), engine_of(ranks, stage=2)]
    for other in ({"device": "NVIDIA H200"}, *map(of, others), of(engine_of(ranks), "padded")):
        found, _ = find(monkeypatch, TRIES, before=before | other)
        assert found.max_tokens == 2048, other


def test_ranks_decide_together_whether_to_go_on_with_a_budget(monkeypatch):
    """One of them has another device than it had."""
    before = trying.kept(ScaleFlags(find_batch_size=True), BatchRules("packed", 0, 768, 1024), engine_of(alone()))
    found, _ = find(monkeypatch, TRIES, before=before, others=[False])
    assert found.max_tokens == 2048


class _OneShort:
    """A model whose forward finds no memory, on one of two ranks that compute together."""

    stage, optimizer, module = 3, torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), torch.nn.Linear(1, 1)
    flats = staticmethod(list)

    def __init__(self, ranks):
        self.ranks = ranks

    def __call__(self, **_):
        raise MemoryError


@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_runs_out_for_the_largest_pair_is_a_sentence_with_ways_out(monkeypatch, world):
    ranks = dataclasses.replace(alone(), world_size=world)
    monkeypatch.setattr(type(ranks), "gathered", lambda self, value: [value])
    fill = Filling(rules("packed"), as_data([(ROW[:300], [*ROW[:279], 3])], [0]), 1)
    climb = trying._Climb(_OneShort(ranks), ObjectiveFlags(), fill, most_pairs=8)
    with pytest.raises(UserError) as told:
        climb.to_the_top()
    assert "out of memory in a micro-batch of 1 pairs and 580 positions; pass --gradient_checkpointing on" in str(
        told.value
    )
    assert "configs/ds/zero3.json, a smaller --max_token_length" in str(told.value)
    assert "--sequence_parallel_size" in str(told.value) and "in place of" not in str(told.value)


# ---------------------------------------------------------------- memory of this process


def test_the_peak_is_that_since_the_reset_and_what_is_freed_counts_as_left():
    here = memory.CpuMemory(1)
    block = torch.ones(64 * 2**18)  # 64 MiB
    assert here.peak() >= here.held() >= 64 * 2**20
    with_it = here.held()
    del block
    here.reset()
    if here.peak() < with_it:  # not where the system forbids it
        before = here.held()
        assert torch.ones(32 * 2**18).sum() and 24 * 2**20 < here.peak() - before < 48 * 2**20
    assert 0 < memory.CpuMemory(4).left() <= here.left() + 2**30


def test_words_of_an_allocator_are_a_shortage_and_other_errors_are_not():
    assert memory.is_shortage(MemoryError()) and memory.is_shortage(torch.OutOfMemoryError("x"))
    assert memory.is_shortage(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not memory.is_shortage(RuntimeError("shapes differ")) and not memory.is_shortage(OSError("out of memory"))


def test_the_share_of_a_machine_is_divided_by_its_processes(monkeypatch):
    monkeypatch.setattr(memory, "_left_of_control_groups", list)
    monkeypatch.setattr(memory, "_number_of", lambda file, name: 8 * 2**20)  # KiB
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: (memory.resource.RLIM_INFINITY, 0))
    assert memory.CpuMemory(4).left() == 2 * 2**30
    monkeypatch.setattr(memory, "_left_of_control_groups", lambda: [4 * 2**30])
    assert memory.CpuMemory(4).left() == 2**30


def group(folder: Path, most: str, held: int, dropped: int = 0, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit, used, stat = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    for name, text in ((limit, most), (used, held), ("memory.stat", f"anon 5\n{stat} {dropped}")):
        (folder / name).write_text(f"{text}\n")


def test_a_control_groups_limit_is_the_least_along_its_path(tmp_path):
    """As Slurm and systemd set it, without a namespace of the job's own."""
    left, top = memory._left_of_control_groups, tmp_path / "sys/fs/cgroup"
    assert left(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/job_7/step_0\n")
    group(top / "system.slice", "9000", 1000)
    group(top / "system.slice/job_7", "5000", 3000, 400)
    group(top / "system.slice/job_7/step_0", "max", 3000)
    assert sorted(left(tmp_path)) == [2400, 8000]
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")  # a container's own namespace
    group(top, "700", 300)
    assert left(tmp_path) == [400]
    (tmp_path / "proc/self/cgroup").write_text("0::/docker/a_group_of_the_host\n")
    assert left(tmp_path) == [400]
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/x\n4:memory,hugetlb:/slurm/job_7\n0::/none\n")
    (top / "memory.max").unlink()
    group(top / "memory/slurm/job_7", "2000", 500, 100, version=1)
    group(top / "memory", str(2**63 - 4096), 10**6, version=1)
    assert min(left(tmp_path)) == 1600
