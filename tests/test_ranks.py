"""The processes of a run: what one does for the others, and that none is left waiting.

Groups are of real processes. They are started one by one, in the environment that torchrun would give them: torchrun itself
ends the others by a signal as soon as one fails, and would hide that they wait.
"""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, in_a_process, launch
from killing import lines_of

from open_rm import process_group, ranks
from open_rm.ranks import Ranks

# What two processes take here is about 20 s, nearly all of it imports; they would wait for four hours.
TIMEOUT = 300


def group_of_two(script: str, folder, *, nodes: int = 1, own=({}, {}), first: str = "") -> list[SimpleNamespace]:
    """Run a script in two processes, in which `ranks` is known; returns status, stdout and stderr of each.

    nodes: 2 where each is the first of a node.  own: environment of each.  first: what they do before any import.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = folder / "script.py"
    path.write_text(first + SCRIPT.format(body="\n".join(f"    {line}" for line in script.strip().splitlines())))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in (0, 1):
        env = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank if nodes == 1 else 0)} | own[rank]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen([sys.executable, str(path)], env=env, text=True, **output))
    try:
        said = [process.communicate(timeout=TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        SimpleNamespace(status=process.returncode, out=out, err=err)
        for process, (out, err) in zip(running, said, strict=True)
    ]


SCRIPT = """
import dataclasses, json, os, sys, time
import torch.distributed as dist
from open_rm import process_group
from open_rm.errors import UserError
from open_rm.ranks import joined_ranks

with joined_ranks() as ranks:
{body}
"""

TOGETHER = """
made, ended = [], {}
def work():
    made.append(ranks.rank)
    return {"from": ranks.rank, "text": "of the main rank"}
def refuse():
    raise UserError("mend this")
value = ranks.from_main(work)
first = ranks.main_first(lambda: f"built by {ranks.rank}")
once = []
ranks.once_a_node(lambda: once.append(ranks.rank))
two_nodes = dataclasses.replace(ranks, local_rank=0)
def stop():
    if ranks.rank == 1:
        raise SystemExit(75)
calls = {
    "from_main": lambda: ranks.from_main(refuse), "main_first": lambda: ranks.main_first(refuse),
    "fail": lambda: ranks.fail("mend this"), "bug": lambda: ranks.main_first(lambda: 1 / 0),
    "stop": lambda: two_nodes.once_a_node(stop),
}
for name, call in calls.items():
    try:
        call()
    except BaseException as raised:
        ended[name] = f"{type(raised).__name__} {raised}"
        ended[name + " in order"] = ranks.all_leave(raised)
def seconds(group):
    return group._get_backend(ranks.device).options._timeout.total_seconds()
groups = dist.distributed_c10d._world.pg_map
how = {"waiting": seconds(process_group.waiting()), "default": seconds(dist.group.WORLD), "kinds": [kind for kind, _ in groups.values()]}
print(json.dumps({"value": value, "made": made, "first": first, "once": once, "ended": ended, "groups": how}))
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What each of two processes saw."""
    done = group_of_two(TOGETHER, tmp_path_factory.mktemp("together"))
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    return [json.loads(one.out.splitlines()[-1]) for one in done]


def test_every_rank_gets_the_value_that_the_main_rank_made(together):
    main, other = together
    assert main["value"] == other["value"] == {"from": 0, "text": "of the main rank"}
    assert (main["made"], other["made"]) == ([0], [])


def test_what_is_built_main_first_is_built_by_every_rank_and_not_sent_around(together):
    assert [one["first"] for one in together] == ["built by 0", "built by 1"]


def test_what_is_done_once_a_node_is_done_by_its_first_rank_alone(together):
    assert [one["once"] for one in together] == [[0], []]


@pytest.mark.parametrize("call", ["from_main", "main_first", "fail"])
def test_a_mistake_of_the_user_is_told_by_the_main_rank_and_ends_the_other(together, call):
    assert [one["ended"][call] for one in together] == ["UserError mend this", "SystemExit 1"]


def test_main_first_leaves_no_rank_waiting_for_a_build_that_failed(together):
    assert [one["ended"]["bug"] for one in together] == ["ZeroDivisionError division by zero", "SystemExit 1"]


def test_a_stop_of_another_nodes_first_rank_ends_all_with_its_status(together):
    assert [one["ended"]["stop"] for one in together] == ["SystemExit 75", "SystemExit 75"]


@pytest.mark.parametrize(
    ("call", "in_order"), [("from_main", True), ("main_first", True), ("fail", True), ("bug", False), ("stop", True)]
)
def test_ranks_leave_in_order_by_a_mistake_of_the_user_and_by_no_other_error(together, call, in_order):
    assert [one["ended"][f"{call} in order"] for one in together] == [in_order] * 2


def test_ranks_wait_for_data_in_a_group_of_their_own_for_hours_and_for_a_step_not_as_long(together):
    """torch tells what a group was given; DeepSpeed, which is told too, has changed nothing."""
    for one in together:
        assert one["groups"] == {"waiting": 4 * 3600, "default": 3600, "kinds": ["gloo", "gloo"]}
    assert process_group.COLLECTIVE_TIMEOUT["nccl"] == timedelta(minutes=15)


def test_an_error_of_the_main_rank_that_is_no_mistake_of_the_user_ends_the_other_rank_too(tmp_path):
    """The main rank keeps its traceback; the other, which knows of no error, says nothing."""
    done = group_of_two('def break_it():\n    raise KeyError("a bug of ours")\nranks.from_main(break_it)', tmp_path)
    main, other = done
    assert (main.status, other.status) == (1, 1), [one.err for one in done]
    assert "Traceback" in main.err and "in break_it" in main.err
    assert main.err.strip().splitlines()[-1].endswith("KeyError: 'a bug of ours'")
    assert "Traceback" not in other.err and "KeyError" not in other.err


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    """Two groups one after another in the processes of one torchrun; an error of the main rank ends the second."""
    path = tmp_path_factory.mktemp("torchrun") / "script.py"
    first = SCRIPT.format(body='    print(f"{ranks.rank} got", ranks.from_main(lambda: "a value"), flush=True)')
    path.write_text(first + SCRIPT.format(body='    ranks.from_main(lambda: {}["a bug of ours"])'))
    return launch(path, processes=2, env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=TIMEOUT)


def test_under_torchrun_an_error_of_the_main_rank_ends_the_run_and_keeps_its_traceback(under_torchrun):
    assert under_torchrun.returncode == 1
    assert under_torchrun.stderr.count("KeyError: 'a bug of ours'") == 1


def test_the_processes_of_one_torchrun_can_join_a_second_group(under_torchrun):
    """What they left behind of the first does not stop them: the error above is of the second."""
    assert sorted(under_torchrun.stdout.splitlines()) == ["0 got a value", "1 got a value"]
    assert "KeyError" in under_torchrun.stderr


def test_a_process_alone_is_a_group_of_one_that_it_leaves_again(tmp_path):
    script = """
import os
from open_rm.ranks import all_reduce_sum, joined_ranks
import torch
with joined_ranks() as ranks:
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert ranks.from_main(lambda: 7) == ranks.main_first(lambda: 7) == 7
    assert all_reduce_sum(torch.tensor([3.0])).tolist() == [3.0]
assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)  # a child process would look for this group
with joined_ranks() as ranks:
    assert ranks.from_main(lambda: 8) == 8
"""
    (tmp_path / "script.py").write_text(script)
    done = launch(tmp_path / "script.py", env={"CUDA_VISIBLE_DEVICES": ""}, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


MAIN = Ranks(rank=0, local_rank=0, world_size=2, device=None)


def test_a_collective_that_fails_does_not_hide_the_error_that_came_before(monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(ranks.dist, "broadcast_object_list", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        MAIN.from_main(lambda: 1 / 0)
    assert "the device is gone" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="the device is gone"):
        MAIN.from_main(lambda: 1)


@pytest.mark.parametrize(("group", "device"), [("of gloo", torch.device("cpu")), (None, None)])
def test_what_the_main_rank_made_goes_over_the_waiting_group_and_never_onto_the_gpu(monkeypatch, group, device):
    """Without such a group over the default one, wherever that takes it."""
    seen = {}
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda both, **how: seen.update(how))
    monkeypatch.setattr(process_group, "_waiting", group)
    on_gpu = Ranks(rank=0, local_rank=0, world_size=2, device=torch.device("cuda"))
    assert on_gpu.from_main(lambda: "a value") == "a value"
    assert seen == {"src": 0, "group": group, "device": device}


def test_ranks_that_wait_say_so(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "WAITING_SECONDS", 0.05)
    for rank in (0, 3):
        with Ranks(rank=rank, local_rank=rank, world_size=4, device=None)._waiting_for("somebody"):
            time.sleep(0.3)
        assert f"[rank {rank}] waiting for somebody, 0 s so far" in capsys.readouterr().err


@pytest.fixture(scope="module")
def imported() -> dict:
    """What a process says that has imported the ranks, and the process group again with a GPU in sight."""
    return in_a_process("""
import importlib, json, os, sys, torch
import open_rm.process_group, open_rm.ranks
heavy = sorted({"datasets", "deepspeed"} & set(sys.modules))
torch.cuda.is_available = lambda: True
found = []
for chosen in ({}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}):
    os.environ.update(chosen)
    importlib.reload(open_rm.process_group)
    found.append({name: os.environ.pop(name) for name in list(os.environ) if name.endswith("ALLOC_CONF")})
print(json.dumps({"environment": found, "heavy": heavy}))
""")


def test_who_imports_the_ranks_alone_does_not_wait_for_datasets(imported):
    assert imported["heavy"] == []


def test_on_a_gpu_the_allocators_segments_grow_unless_the_user_chose(imported):
    """Said in the environment, which CUDA reads at its first allocation."""
    ours = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    theirs = [{"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}]
    assert imported["environment"] == [ours, *theirs]


# ---------------------------------------------------------------- ranks that fail

IN_TIME = 10.0  # seconds from a failure to the end of all processes
IN_ORDER = (
    40.0  # and of Python's and torchrun's own leaving, which computes: many times longer on a machine that is busy
)
MISTAKE = 'UserError("no such column")'

# As nccl does, leaving the group waits for all others. What fails notes when.
AS_ON_A_GPU = """
import os, pathlib, time
import torch.distributed as dist
from open_rm.errors import UserError
rank, folder, leave = int(os.environ["RANK"]), pathlib.Path({folder!r}), dist.destroy_process_group
def together(*given, **named):
    (folder / f"left by {{rank}}").touch()
    while len(list(folder.glob("left by *"))) < 2:
        time.sleep(0.02)
    return leave(*given, **named)
dist.destroy_process_group = together
def fails(error):
    (folder / "failed").write_text(str(time.time()))
    raise error
"""
IN_THE_LOOP = """
import open_rm.training.engine as e
if rank == {rank}:
    made, step = [], e.Engine.step
    def broken(self, **how):
        made.append(1)
        return fails({error}) if len(made) == 3 else step(self, **how)
    e.Engine.step = broken
"""
WHILE_SAVING = """
import open_rm.publishing.card as c
c.write_card = lambda *given, **named: fails({error})
"""
WHILE_READING = """
import open_rm.resolving as v
if rank == 1:
    os.environ["LOCAL_RANK"] = "0"  # the first of another node
    v.read_both = lambda *given, **named: fails({error})
"""
CLOSING = """
import open_rm.training.tracking as t
t.Tracker.__exit__ = lambda *given: fails({error}) if rank == 0 else None
"""


def patch(folder, where: str, error: str, rank: int = 1) -> str:
    return AS_ON_A_GPU.format(folder=str(folder)) + where.format(error=error, rank=rank)


def seconds_since_the_failure(folder) -> float:
    return time.time() - float((folder / "failed").read_text())


@pytest.fixture
def broken_run(nursery, flags_for, tmp_path):
    """Runs the recipe on two ranks with something broken; returns their statuses and what they printed."""

    def run(where: str, error: str, rank: int = 1, more: str = "", **flags):
        env = {"TEST_PATCH": patch(tmp_path, where, error, rank) + more}
        started = nursery.start(flags_for(tmp_path / "run", 2, **flags), tmp_path / "log", processes=2, env=env)
        statuses = started.statuses(timeout=90)
        assert seconds_since_the_failure(tmp_path) < IN_TIME, started.output
        return statuses, started.output

    return run


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", ['RuntimeError("a bug of ours")', 'KeyboardInterrupt("a bug of ours")'])
def test_a_rank_that_fails_in_the_loop_waits_for_nobody_and_shows_where(broken_run, tmp_path, rank, error):
    statuses, output = broken_run(IN_THE_LOOP, error, rank)
    assert statuses[rank] == 1 and 0 not in statuses, output
    assert output.count("a bug of ours") == 1 and "in broken" in output, output
    assert not list(tmp_path.glob("left by *"))


def test_a_rank_that_fails_in_the_loop_ends_the_others_where_no_watchdog_is(broken_run):
    statuses, output = broken_run(IN_THE_LOOP, 'RuntimeError("a bug of ours")', stall_timeout=0)
    assert statuses == [1, 1] and "in broken" in output


def test_an_error_while_the_main_rank_saves_ends_all_and_keeps_its_traceback(broken_run, tmp_path):
    statuses, output = broken_run(WHILE_SAVING, 'OSError("a bug of ours")')
    assert statuses[0] == 1 and statuses[1] in (1, 76), output
    assert output.count("OSError: a bug of ours") == 1 and "in fails" in output, output
    assert not list(tmp_path.glob("left by *"))


def test_a_disk_that_breaks_while_the_main_rank_saves_ends_all_in_order_with_a_sentence(broken_run, tmp_path):
    statuses, output = broken_run(WHILE_SAVING, 'OSError(5, "the disk broke")')
    assert statuses == [1, 1] and "Traceback" not in output and output.count("the disk broke") == 1, output
    assert len(list(tmp_path.glob("left by *"))) == 2


def test_a_mistake_that_another_nodes_first_rank_finds_is_told_once_and_all_leave_in_order(broken_run, tmp_path):
    statuses, output = broken_run(WHILE_READING, MISTAKE)
    assert statuses == [1, 1] and "Traceback" not in output, output
    assert [line for line in output.splitlines() if "no such column" in line] == [
        f"error: rank 1 on {platform.node()}: no such column"
    ]
    assert len(list(tmp_path.glob("left by *"))) == 2


def test_a_bug_that_another_nodes_first_rank_meets_ends_all_and_is_shown_there(broken_run):
    statuses, output = broken_run(WHILE_READING, 'KeyError("a bug of ours")')
    assert statuses == [1, 1] and output.count("KeyError: 'a bug of ours'") == 1, output


def test_a_mistake_that_one_rank_alone_finds_ends_all_and_is_told_once(broken_run):
    """The others, which wait for it in a collective, learn of it from the watchdog."""
    sooner = "\nimport open_rm.ranks\nopen_rm.ranks.AGREEING_SECONDS = 2"
    statuses, output = broken_run(IN_THE_LOOP, MISTAKE, more=sooner)
    assert statuses == [76, 1] and "Traceback (most recent call last)" not in output, output
    assert output.count("no such column") == 1 and "[rank 1] no such column" in output
    assert "rank 1 on" in output and "failed with an error of its own" in output


def test_a_main_rank_that_fails_while_it_closes_its_records_ends_all(broken_run):
    """The others have nothing left to do by then, and would wait for it to leave the group."""
    statuses, output = broken_run(CLOSING, 'OSError("a full disk")')
    assert statuses[0] == 1 and statuses[1] != 0 and output.count("OSError: a full disk") == 1, output


def test_a_main_rank_that_fails_after_all_agreed_to_stop_keeps_nobody_waiting(nursery, flags_for, tmp_path):
    """Without a watchdog."""
    flags = flags_for(tmp_path / "run", 2, total_episodes=60000, checkpointing_steps=100000, stall_timeout=0)
    env = {"TEST_PATCH": patch(tmp_path, CLOSING, 'OSError("a full disk")')}
    started = nursery.start(flags, tmp_path / "log", processes=2, env=env)
    started.wait_for(lambda: lines_of(tmp_path / "run") > 4, "steps")
    started.send(signal.SIGTERM, 1)
    assert started.statuses(timeout=90) == [1, 75], started.output
    assert seconds_since_the_failure(tmp_path) < IN_TIME and started.output.count("OSError: a full disk") == 1


def test_a_mistake_that_every_rank_finds_by_itself_is_left_by_in_order(tmp_path):
    done = group_of_two('time.sleep(ranks.rank)\nraise UserError("of the flags")', tmp_path)
    for one in done:  # raised again, for who called
        assert one.status == 1 and "open_rm.errors.UserError: of the flags" in one.err and "Traceback" in one.err


@pytest.mark.parametrize(
    ("where", "error", "said", "within"),
    [
        (IN_THE_LOOP, 'RuntimeError("a bug of ours")', "RuntimeError: a bug of ours", IN_TIME),
        (WHILE_SAVING, 'OSError("a bug of ours")', "OSError: a bug of ours", IN_TIME),
        (WHILE_READING, MISTAKE, f"error: rank 1 on {platform.node()}: no such column", IN_ORDER),
    ],
    ids=["in the loop", "while saving", "while reading"],
)
def test_under_torchrun_all_processes_end_in_time_and_say_why(flags_for, tmp_path, where, error, said, within):
    """torchrun ends the others by a signal as soon as the first one has left."""
    script = tmp_path / "broken.py"
    recipe = "from open_rm import command_line\nfrom open_rm.checks import check_args\nfrom open_rm import reward_modeling as r\n"
    recipe += patch(tmp_path, where, error) + "command_line.run(r.main, command_line.read(r.Args, check_args))\n"
    script.write_text(recipe)
    done = launch(script, *flags_for(tmp_path / "run", 2), processes=2, timeout=TIMEOUT)
    assert seconds_since_the_failure(tmp_path) < within, done.stderr
    assert done.returncode == 1 and done.stderr.count(said) == 1, done.stderr


def test_a_rank_that_computes_on_another_kind_of_device_is_told_before_groups_of_two_backends_wait(
    nursery, flags_for, tmp_path
):
    """A node whose CUDA does not start would take gloo, and the others nccl."""
    other = """
import os, open_rm.process_group as p
if os.environ["RANK"] == "1":
    p._kind_of = lambda device: "a GPU of compute capability 9.0"
"""
    started = nursery.start(flags_for(tmp_path / "run", 2), tmp_path / "log", processes=2, env={"TEST_PATCH": other})
    assert started.statuses(timeout=90) == [1, 1], started.output
    host = platform.node()
    [sentence] = started.output.strip().splitlines()
    assert sentence.startswith(
        f"error: rank 1 on {host} computes on a GPU of compute capability 9.0, and rank 0 on {host} on a CPU; "
    )


def test_two_machines_whose_names_stand_for_themselves_alone_wait_over_the_way_to_the_main_one(tmp_path, two_hosts):
    names, addresses, _ = two_hosts
    enter = "import ctypes, os\nassert ctypes.CDLL(None).setns(os.open('/run/netns/' + os.environ['HOST'], os.O_RDONLY), 0x40000000) == 0\n"
    own = tuple({"HOST": name, "MASTER_ADDR": addresses[0]} for name in names)
    body = 'print(ranks.gathered(os.environ["GLOO_SOCKET_IFNAME"]), flush=True)'
    done = group_of_two(body, tmp_path, nodes=2, own=own, first=enter)
    assert [one.out for one in done] == [f"{names}\n"] * 2, [one.err for one in done]
