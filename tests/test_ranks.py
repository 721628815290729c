"""The processes of a run: what one does for the others, and that none is left waiting.

Groups are of real processes. They are started one by one, in the environment that torchrun would give them: torchrun itself
ends the others by a signal as soon as one fails, and would hide that they wait.
"""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, launch

from open_rm import ranks
from open_rm.ranks import Ranks

# What two processes take here is about 20 s, nearly all of it imports; they would wait for four hours.
TIMEOUT = 300


def group_of_two(script: str, folder) -> list[SimpleNamespace]:
    """Run a script in two processes, in which `ranks` is known; returns status, stdout and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = folder / "script.py"
    path.write_text(SCRIPT.format(body="\n".join(f"    {line}" for line in script.strip().splitlines())))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in ("0", "1"):
        env = environment | {"RANK": rank, "LOCAL_RANK": rank}
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
import json, sys
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
calls = {
    "from_main": lambda: ranks.from_main(refuse), "main_first": lambda: ranks.main_first(refuse),
    "fail": lambda: ranks.fail("mend this"), "bug": lambda: ranks.main_first(lambda: 1 / 0),
}
for name, call in calls.items():
    try:
        call()
    except BaseException as raised:
        ended[name] = f"{type(raised).__name__} {raised}"
print(json.dumps({"value": value, "made": made, "first": first, "ended": ended}))
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


@pytest.mark.parametrize("call", ["from_main", "main_first", "fail"])
def test_a_mistake_of_the_user_is_told_by_the_main_rank_and_ends_the_other(together, call):
    assert [one["ended"][call] for one in together] == ["UserError mend this", "SystemExit 1"]


def test_main_first_leaves_no_rank_waiting_for_a_build_that_failed(together):
    assert [one["ended"]["bug"] for one in together] == ["ZeroDivisionError division by zero", "SystemExit 1"]


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


def test_ranks_that_wait_for_the_main_one_say_so(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "WAITING_SECONDS", 0.05)
    for rank in (0, 3):
        with Ranks(rank=rank, local_rank=rank, world_size=4, device=None)._said_while_waiting():
            time.sleep(0.3)
        assert ("[rank 3] waiting for the main rank" in capsys.readouterr().err) is (rank == 3)
