"""Signals, restarts and Slurm: what the launch scripts make of a run that is stopped or breaks.

The training is a stand-in that does what a plan says, one line of Python an attempt; torchrun is the real one.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import OF_A_GROUP, REPOSITORY

SBATCH = "scripts/train/slurm/reward_modeling.sbatch"

# What `set_up_python` asks is answered by yes; torchrun runs; all else is the training, here and as torchrun's rank.
PYTHON = """\
#!/bin/bash
case "$1 $2" in
    "- "*) exit 0 ;;
    "-m torch.distributed.run") cd "$HERE" ;;
    "-m open_rm.reward_modeling") exec {python} -S "$HERE/open_rm/reward_modeling.py" "$@" ;;
esac
exec {python} "$@"
"""

TRAINING = '''\
import os, signal, sys, time
from pathlib import Path

here = Path(os.environ["HERE"])
rank = os.environ.get("RANK", "0")
attempt = sum(1 for _ in here.glob(f"attempt_{rank}_*"))
(here / f"attempt_{rank}_{attempt}").write_text(str(os.getpid()))


def commit(step, takes=0):
    """On all ranks: none is left before the checkpoint stands, as torchrun would end the others."""
    building = here / f"out/checkpoints/step_{step:08d}.tmp"
    if rank == "0":
        building.mkdir(parents=True)
        time.sleep(takes)
        building.rename(building.with_suffix(""))
    while not building.with_suffix("").exists():
        time.sleep(0.02)
    time.sleep(0.2)


def note(number, frame):
    with open(here / f"heard_{rank}", "a") as file:
        file.write(signal.Signals(number).name + "\\n")


def listen(kinds=("SIGTERM", "SIGINT", "SIGUSR1")):
    """Until a signal comes; further ones are written down too."""
    for kind in kinds:
        signal.signal(getattr(signal, kind), note)
    ready()
    until = time.monotonic() + 90  # nothing is left of a test that failed
    while not (here / f"heard_{rank}").exists() and time.monotonic() < until:
        time.sleep(0.02)


def ready():
    (here / f"ready_{rank}").touch()


lines = os.environ["PLAN"].splitlines()
exec(lines[attempt] if attempt < len(lines) else "sys.exit(99)")
'''

RECIPE = """\
set -euo pipefail
cd {repository}
source scripts/launch.sh
GLOBAL_BATCH=8
PER_DEVICE=1
launch "$@"
"""


def take_signals() -> None:
    """Tests that run under nohup or in the background ignore these, and bash cannot trap what it was born to ignore."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


class Place:
    """A folder with a stand-in python, a recipe and the output folder of a run."""

    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder / "out"
        (folder / "open_rm").mkdir()
        (folder / "open_rm/__init__.py").touch()
        (folder / "open_rm/reward_modeling.py").write_text(TRAINING)
        (folder / "recipe.sh").write_text(RECIPE.format(repository=shlex.quote(str(REPOSITORY))))
        self.script("python", PYTHON.format(python=shlex.quote(sys.executable)))

    def script(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def environment(self, variables: dict) -> dict:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_A_GROUP and not name.startswith(("SLURM_", "PET_"))
        }
        path = f"{self.folder}:{kept['PATH']}"
        return kept | {"HERE": str(self.folder), "PYTHON": str(self.folder / "python"), "PATH": path} | variables

    def start(self, *plan: str, command=None, flags=None, **variables: str) -> subprocess.Popen:
        flags = ["--output_dir", str(self.output)] if flags is None else flags
        return subprocess.Popen(
            [*(command or ["bash", str(self.folder / "recipe.sh")]), *flags],
            env=self.environment({"PLAN": "\n".join(plan), **variables}),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=take_signals,
        )

    def run(self, *plan: str, **kwargs) -> tuple[int, str, str]:
        return ended(self.start(*plan, **kwargs))

    def commit(self, step: int) -> None:
        (self.output / f"checkpoints/step_{step:08d}").mkdir(parents=True)

    def wait_for(self, name: str) -> str:
        """What a file of this folder holds, once it is there."""
        until = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < until, f"{name} did not appear"
            time.sleep(0.02)
        return (self.folder / name).read_text()

    def heard(self, rank: int = 0) -> list[str]:
        return self.wait_for(f"heard_{rank}").split()

    @property
    def attempts(self) -> int:
        return len(list(self.folder.glob("attempt_0_*")))


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def call(function: str, *arguments: str) -> str:
    """What a function of launch.sh prints."""
    command = ["bash", "-euc", 'source scripts/launch.sh; "$@"', "-", function, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True).stdout


def test_the_latest_checkpoint_is_the_highest_step_that_was_committed(place):
    assert call("latest_checkpoint", "") == call("latest_checkpoint", str(place.output)) == ""
    for name in ("step_00000009", "step_00000080", "step_99999999.tmp", "step_x", "step_00000090.damaged", "other"):
        (place.output / "checkpoints" / name).mkdir(parents=True)
    assert call("latest_checkpoint", str(place.output)) == "step_00000080\n"
    place.commit(123456789)  # more digits than the others
    assert call("latest_checkpoint", str(place.output)) == "step_123456789\n"


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--seed", "1"], ""),
        (["--output_dir", "a b", "--seed", "1"], "a b"),
        (["--output_dir=a", "--output-dir", "b"], "b"),
        (["--output-dir", "a", "--output_dir=b=c"], "b=c"),
        (["--output_dir=~/a"], f"{os.path.expanduser('~')}/a"),
    ],
)
def test_the_output_folder_is_the_last_that_the_flags_name(flags, folder):
    assert call("output_folder", *flags) == f"{folder}\n"


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--seed", "1"], ""),
        (["--dry_run"], "true"),
        (["--seed", "1", "--dry-run", "--world_size", "64"], "true"),
        (["--dry_run", "False"], "False"),
        (["--dry_run=True"], "True"),
        (["--dry_run", "--no_dry_run"], "false"),
        (["--config", "CONFIG"], "true"),
        (["--config=CONFIG", "--no-dry-run"], "false"),
    ],
)
def test_a_flag_is_read_as_the_recipe_reads_it(place, flags, value):
    (place.folder / "config.yaml").write_text("seed: 3\ndry_run: true  # first\n")
    flags = [flag.replace("CONFIG", str(place.folder / "config.yaml")) for flag in flags]
    assert call("flag_value", "dry_run", *flags) == f"{value}\n"


OF_A_POD = {"WORLD_SIZE": "2", "RANK": "1", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2"}


def test_a_dry_run_is_one_python_that_knows_of_no_group_and_is_not_started_again(place):
    plan = "print(' '.join(sys.argv[1:]), [name for name in os.environ if name in {group}]); sys.exit(3)"
    group = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *OF_A_POD)
    flags = ["--dry_run", "--world_size", "8"]
    status, out, err = place.run(plan.format(group=group), flags=flags, RESTARTS="2", **OF_A_POD)
    assert (status, place.attempts, err) == (3, 1, "")
    step = "-m open_rm.reward_modeling --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
    assert out == f"{step} --world_size 8 --dry_run --world_size 8 []\n"


@pytest.mark.parametrize("word", ["TRUE", "True", "true"])
def test_a_dry_run_is_asked_for_in_any_case(place, word):
    plan = "print('WORLD_SIZE' in os.environ); sys.exit(0)"
    assert place.run(plan, flags=["--dry_run", word], GPUS="2")[:2] == (0, "False\n")


@pytest.mark.parametrize("word", ["FALSE", "False", "false"])
def test_no_dry_run_is_said_in_any_case(place, word):
    flags = ["--dry_run", word]
    assert "-m torch.distributed.run" in place.run(flags=flags, GPUS="2", DRY="1")[1]


@pytest.mark.parametrize(
    ("flags", "variables", "node"),
    [
        ([], {"GPUS": "4", "NNODES": "2"}, "4"),
        ([], {"GPUS": "1", "NNODES": "8"}, "1"),
        (["--world_size", "8"], {"GPUS": "4"}, "4"),
        (["--world_size", "2"], {"GPUS": "4"}, "2"),
        (["--world_size", "8"], {}, "None"),  # GPUS is 1 by default: no word about nodes
    ],
)
def test_a_dry_run_plans_with_the_devices_that_torchrun_would_have_on_a_node(place, flags, variables, node):
    plan = "print(os.environ.get('LOCAL_WORLD_SIZE')); sys.exit(0)"
    assert place.run(plan, flags=["--dry_run", *flags], **variables)[:2] == (0, f"{node}\n")


@pytest.mark.parametrize(
    ("flags", "why"),
    [(["--world_size", "3"], "--world_size = 1 x 3"), ([], "NNODES x GPUS = 1 x 6")],
)
def test_a_dry_run_that_shares_no_step_says_whose_count_it_is(place, flags, why):
    expected = f"error: GLOBAL_BATCH=8 is not a multiple of PER_DEVICE x {why}\n"
    assert place.run(flags=["--dry_run", *flags], NNODES="2", GPUS="3") == (1, "", expected)


def test_one_process_in_a_pod_knows_of_no_group(place):
    plan = "print([name for name in os.environ if name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR')]); sys.exit(0)"
    where = OF_A_POD | {
        "PET_NNODES": "1",
        "PET_NODE_RANK": "0",
        "PET_NPROC_PER_NODE": "auto",
        "MASTER_ADDR": "a-master-0",
    }
    assert place.run(plan, **where) == (0, "[]\n", "")


def test_what_a_recipe_needs_is_made_when_nothing_is_left_to_refuse(place):
    recipe = (place.folder / "recipe.sh").read_text()
    (place.folder / "recipe.sh").write_text('make_inputs() { echo "made with $PYTHON"; }\n' + recipe)
    made = f"made with {place.folder}/python\n"
    assert place.run("print('trained'); sys.exit(0)")[:2] == (0, f"{made}trained\n")
    assert place.run("print('told'); sys.exit(0)", flags=["--dry_run"])[1].startswith(made)
    assert place.run(NNODES="2")[:2] == (1, "")
    assert "made" not in place.run(DRY="1")[1]


@pytest.mark.parametrize("status", [0, 1, 75, 76])
def test_the_status_of_a_run_without_signals_is_its_own(place, status):
    assert place.run(f"print('trained'); sys.exit({status})")[:2] == (status, "trained\n")


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_reaches_the_training_once_and_its_checkpoint_is_waited_for(place, kind):
    process = place.start("listen(); commit(7, takes=0.5); sys.exit(1)")
    place.wait_for("ready_0")
    os.killpg(process.pid, getattr(signal, kind))  # as Ctrl-C at a terminal: the group of the script
    status, _, err = ended(process)
    assert (status, place.heard()) == (75, ["SIGTERM" if kind == "SIGHUP" else kind])
    assert "passed on to the training" in err and "stopped at step_00000007; the same command" in err


def test_a_second_signal_is_passed_on_too(place):
    process = place.start("listen(); time.sleep(1); sys.exit(3)")
    place.wait_for("ready_0")
    process.send_signal(signal.SIGUSR1)
    place.heard()
    process.send_signal(signal.SIGTERM)
    assert (ended(process)[0], place.heard()) == (3, ["SIGUSR1", "SIGTERM"])


@pytest.mark.parametrize(("own", "status"), [(0, 0), (1, 1), (75, 75), (76, 76)])
def test_a_run_told_to_stop_that_saves_nothing_ends_with_its_own_status(place, own, status):
    place.commit(7)  # was there before
    process = place.start(f"listen(); sys.exit({own})", "sys.exit(98)", RESTARTS="3")
    place.wait_for("ready_0")
    process.terminate()
    assert (ended(process)[0], place.attempts) == (status, 1)


def test_a_run_that_does_not_listen_yet_ends_at_the_first_signal(place):
    process = place.start("ready(); time.sleep(60)")
    place.wait_for("ready_0")
    process.terminate()
    status, _, err = ended(process)
    assert status == 128 + signal.SIGTERM and "Terminated" not in err


def test_a_run_that_breaks_is_started_again_while_it_saves_checkpoints(place):
    plan = ["commit(10); sys.exit(1)", "commit(20); os.kill(os.getpid(), 9)", "print('trained')"]
    status, out, err = place.run(*plan, RESTARTS="5")
    assert (status, out, place.attempts) == (0, "trained\n", 3)
    assert err.splitlines() == [
        "the run ended with status 1 after step_00000010; restart 1 of 5",
        "the run ended with status 137 after step_00000020; restart 2 of 5",
    ]


def test_a_run_that_breaks_each_time_at_the_same_step_ends(place):
    status, _, err = place.run("commit(10); sys.exit(76)", "sys.exit(76)", "sys.exit(98)", RESTARTS="5")
    assert (status, place.attempts) == (76, 2)
    assert "ended with status 76 and without a new checkpoint, so it is not started again" in err


@pytest.mark.parametrize(("restarts", "attempts"), [({}, 1), ({"RESTARTS": "0"}, 1), ({"RESTARTS": "2"}, 3)])
def test_a_run_is_started_again_so_often_and_no_more(place, restarts, attempts):
    plan = [f"commit({step}); sys.exit(1)" for step in range(10, 20)]
    assert (place.run(*plan, **restarts)[0], place.attempts) == (1, attempts)


def test_a_run_that_was_told_to_stop_is_not_started_again(place):
    plan = ["commit(10); sys.exit(1)", "listen(); sys.exit(1)", "sys.exit(98)"]
    process = place.start(*plan, RESTARTS="5")
    place.wait_for("ready_0")
    process.terminate()
    assert (ended(process)[0], place.attempts) == (75, 2)  # newer than at the start of the script


def test_a_run_that_stopped_by_itself_is_not_started_again(place):
    assert (place.run("commit(10); sys.exit(75)", RESTARTS="5")[0], place.attempts) == (75, 1)


def test_restarts_need_an_output_folder(place):
    status, _, err = place.run("commit(10); sys.exit(5)", flags=[], RESTARTS="5")
    assert (status, place.attempts) == (5, 1)
    assert err.startswith("RESTARTS=5 has no effect without --output_dir")


@pytest.mark.parametrize("restarts", ["-1", "many"])
def test_restarts_are_a_count(place, restarts):
    expected = (1, "", f"error: RESTARTS is a count of 0 or more, not '{restarts}'\n")
    assert place.run(RESTARTS=restarts) == expected


def test_several_tasks_on_a_node_of_several_are_refused(place):
    status, out, err = place.run(NNODES="2", MASTER_ADDR="h", GPUS="4", SLURM_NTASKS_PER_NODE="4")
    assert (status, out) == (1, "")
    assert err == "error: each node runs this once and starts its 4 ranks; ask Slurm for --ntasks-per-node=1, not 4\n"


@pytest.mark.parametrize(
    ("variables", "port"),
    [({}, "29500"), ({"SLURM_JOB_ID": "12345678"}, "29678"), ({"SLURM_JOB_ID": "1", "MASTER_PORT": "4"}, "4")],
)
def test_two_jobs_on_a_node_have_ports_of_their_own(place, variables, port):
    out = place.run(DRY="1", NNODES="2", SLURM_NTASKS_PER_NODE="1", **variables)[1]
    assert f"--master_port {port} " in out


def test_two_nodes_start_again_though_one_is_late(place):
    # the first node still has the last attempt's store when the second is back
    broken = "commit(7); rank == '0' and time.sleep(1.5); sys.exit(1)"
    where = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "RESTARTS": "2"}
    nodes = [place.start(broken, "commit(9); sys.exit(0)", NODE_RANK=node, **where) for node in "01"]
    for status, _, err in map(ended, nodes):
        assert (status, place.attempts) == (0, 2)
        assert "ended with status 1 after step_00000007; restart 1 of 2" in err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the ranks of torchrun are found in /proc")
@pytest.mark.parametrize("told", [0, 1])
def test_a_node_that_was_not_told_stops_with_the_one_that_was(place, told):
    place.output.mkdir()
    (place.output / ".stopped").touch()  # by the run before
    # of the ranks, which agree on it, the told one's hears it; all end with the checkpoint
    plan = [f"rank == '{told}' and listen(); commit(7, takes=0.5); sys.exit(75)", "sys.exit(98)"]
    where = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "RESTARTS": "2"}
    nodes = [place.start(*plan, NODE_RANK=node, **where) for node in "01"]
    place.wait_for(f"ready_{told}")
    nodes[told].send_signal(signal.SIGUSR1)
    for status, _, err in map(ended, nodes):
        assert (status, place.attempts) == (75, 1)
        assert err.splitlines()[-1] == "stopped at step_00000007; the same command goes on from there"


# torchrun, which writes down how long each node waits for the others
RENDEZVOUS = """\
import os, runpy
from pathlib import Path
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous as static

def store(address, port, size, is_master, timeout, plain=static.TCPStore, **kwargs):
    (Path(os.environ["HERE"]) / f"patience_{int(not is_master)}").write_text(str(timeout.total_seconds()))
    return plain(address, port, size, is_master, timeout, **kwargs)

static.TCPStore = store
runpy.run_module("torch.distributed.run", run_name="__main__")
"""


def test_nodes_wait_an_hour_for_each_other(place):
    (place.folder / "rendezvous.py").write_text(RENDEZVOUS)
    with_patience = '"-m torch.distributed.run") cd "$HERE"; shift 2; set -- "$HERE/rendezvous.py" "$@"'
    text = (place.folder / "python").read_text().replace('"-m torch.distributed.run") cd "$HERE"', with_patience)
    place.script("python", text)
    where = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    second = place.start("sys.exit(0)", NODE_RANK="1", **where)
    assert place.wait_for("patience_1") == "3600.0"  # there is nobody to meet yet
    first = place.start("sys.exit(0)", NODE_RANK="0", **where)
    assert [ended(node)[0] for node in (first, second)] == [0, 0]
    assert (place.wait_for("patience_0"), place.attempts) == ("3600.0", 1)


OF_RANKS = ("OMP_NUM_THREADS", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE")


@pytest.mark.parametrize(
    ("gpus", "variables", "expected"),
    [
        ("2", {}, ["4", "1", "2000"]),  # 9 cores for 2 ranks
        (
            "2",
            {"OMP_NUM_THREADS": "3", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_BUFFER_SIZE": "9"},
            ["3", "0", "9"],
        ),
        ("1", {}, [None, None, None]),  # one process: torch takes all cores by itself
    ],
)
def test_ranks_share_the_cores_and_leave_a_record_of_a_collective_that_hangs(
    place, monkeypatch, gpus, variables, expected
):
    for name in OF_RANKS:
        monkeypatch.delenv(name, raising=False)
    place.script("nproc", "#!/bin/sh\necho 9\n")
    plan = f"import json; print(json.dumps([os.environ.get(name) for name in {OF_RANKS}])) if rank == '0' else None"
    status, out, err = place.run(f"{plan}; sys.exit(0)", GPUS=gpus, **variables)
    assert (status, json.loads(out)) == (0, expected), err


def test_more_ranks_than_cores_have_a_thread_each(place, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place.script("nproc", "#!/bin/sh\nexit 1\n")  # not everywhere
    place.script("getconf", "#!/bin/sh\necho 1\n")
    plan = "print(os.environ['OMP_NUM_THREADS']) if rank == '0' else None; sys.exit(0)"
    assert place.run(plan, GPUS="2")[:2] == (0, "1\n")


def alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the ranks of torchrun are found in /proc")
def test_torchruns_ranks_are_told_and_its_agent_is_not(place):
    plan = "listen(); time.sleep(0.5); commit(7, takes=1); sys.exit(75)"
    process = place.start(plan, GPUS="2")
    for rank in (0, 1):
        place.wait_for(f"ready_{rank}")
    pid = place.wait_for("attempt_0_0")
    agent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    for kind in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # where Slurm signals every process of a step
        os.kill(agent, kind)
    time.sleep(0.5)
    assert not (place.folder / "heard_0").exists()
    process.send_signal(signal.SIGUSR1)
    status, _, err = ended(process)
    assert (status, place.heard(0)[0], place.heard(1)[0]) == (75, "SIGUSR1", "SIGUSR1")
    assert "stopped at step_00000007" in err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the ranks of torchrun are found in /proc")
def test_torchruns_ranks_that_do_not_listen_yet_end_at_the_first_signal(place):
    process = place.start("ready(); time.sleep(60)", GPUS="2")
    pids = [place.wait_for(f"ready_{rank}") or place.wait_for(f"attempt_{rank}_0") for rank in (0, 1)]
    process.send_signal(signal.SIGINT)
    before = time.monotonic()
    assert ended(process)[0] == 1
    assert time.monotonic() - before < 20 and not any(alive(pid) for pid in pids)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the ranks of torchrun are found in /proc")
def test_each_rank_has_a_log_of_its_own_for_each_start(place):
    logs = place.folder / "logs"
    broken = "print('first', rank, file=sys.stderr); commit(7); assert rank == '0'; sys.exit(1)"
    process = place.start(
        broken, "print('second', rank, flush=True); listen(); commit(9); sys.exit(75)",
        GPUS="2", RESTARTS="1", RANK_LOGS=str(logs),
    )  # fmt: skip
    for name in ("attempt_1_0", "attempt_1_1", "ready_0", "ready_1"):  # a slow machine has a minute for each
        place.wait_for(name)
    process.send_signal(signal.SIGUSR1)
    status, out, err = ended(process)
    assert (status, place.heard(0), place.heard(1)) == (75, ["SIGUSR1"], ["SIGUSR1"])
    assert err.splitlines()[-1] == "stopped at step_00000009; the same command goes on from there"

    starts = sorted((logs / "node_0").iterdir())
    assert len(starts) == 2

    def of_rank(start: Path, rank: int, name: str) -> str:
        [file] = start.glob(f"*/attempt_0/{rank}/{name}.log")
        return file.read_text()

    for rank in (0, 1):
        assert f"first {rank}\n" in of_rank(starts[0], rank, "stderr")
        assert of_rank(starts[1], rank, "stdout") == f"second {rank}\n"
    assert "AssertionError" in of_rank(starts[0], 1, "stderr") and "[rank 1] AssertionError" in err
    assert out == "[rank 0] second 0\n"  # each node's first rank; of the others stderr


@pytest.mark.parametrize(
    ("gpus", "visible", "refused"),
    [
        ("2", None, None),
        ("3", None, "has 2 (nvidia-smi -L)"),
        ("2", "1", "has 1 (CUDA_VISIBLE_DEVICES=1)"),
        ("3", "0,1,2", None),  # whoever set it knows
        ("4", "", None),  # computes on its CPU
        ("1", "", None),
    ],
)
def test_more_ranks_than_gpus_are_refused(place, monkeypatch, gpus, visible, refused):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    place.script(
        "nvidia-smi", "#!/bin/sh\nprintf 'GPU 0: NVIDIA H200 (UUID: GPU-1)\\nGPU 1: NVIDIA H200 (UUID: GPU-2)\\n'\n"
    )
    variables = {"GPUS": gpus} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    command = ["bash", "-euc", "source scripts/launch.sh; check_gpus"]
    status, _, err = ended(place.start(command=command, flags=[], **variables))
    if refused is None:
        assert (status, err) == (0, "")
    else:
        assert status == 1 and err.startswith(f"error: GPUS={gpus}, but ") and refused in err and err.count("\n") == 1


def test_the_launcher_alone_is_refused():
    done = subprocess.run(["bash", "scripts/launch.sh"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: launch.sh is sourced by recipes; run one of")


SRUN = """\
#!/bin/bash
# what it was asked, then the task in its place: a signal to srun is one to the task
printf '%s\\n' "$@" > "$HERE/srun.args"
while [[ $1 != bash ]]; do shift; done
exec "$@"
"""

SCONTROL = """\
#!/bin/bash
case "$1" in
    show) echo "   JobState=${STATE:-RUNNING} Reason=None" ;;
    requeue) echo "$2" >> "$HERE/requeued" ;;
esac
"""


class Job(Place):
    """The same as a Slurm job, with stand-ins for its commands."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.script("srun", SRUN)
        self.script("scontrol", SCONTROL)

    def start(self, *plan: str, **kwargs) -> subprocess.Popen:
        slurm = {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
        return super().start(*plan, command=["bash", SBATCH, str(self.folder / "recipe.sh")], **(slurm | kwargs))

    @property
    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_job_that_finishes_is_done(job):
    status, out, _ = job.run("commit(10); sys.exit(0)")
    assert (status, job.requeued, out.splitlines()[-1]) == (0, [], "finished")
    logs = f"{job.output}.logs"
    asked = (job.folder / "srun.args").read_text().splitlines()
    assert (
        asked[:4] == ["--kill-on-bad-exit=0", "--wait=300", "--output", f"{logs}/node_%n.log"] and Path(logs).is_dir()
    )
    assert f"job 77, start 1, from the beginning; logs in {logs}" in out


@pytest.mark.parametrize("kind", ["SIGUSR1", "SIGTERM"])
def test_a_job_before_its_time_limit_saves_a_checkpoint_and_is_requeued(job, kind):
    job.commit(5)
    process = job.start("listen(); commit(7, takes=0.5); sys.exit(1)", SLURM_RESTART_COUNT="2")
    job.wait_for("ready_0")
    process.send_signal(getattr(signal, kind))
    status, out, _ = ended(process)
    assert (status, job.heard(), job.requeued) == (75, ["SIGUSR1"], ["77"])
    assert "job 77, start 3, from step_00000005" in out
    assert out.splitlines()[-1] == "status 75, step_00000007: requeued, to go on from there"


@pytest.mark.parametrize(
    ("plan", "status", "requeued"),
    [
        ("commit(10); sys.exit(76)", 76, ["77"]),  # broke, but got on
        ("commit(10); os.kill(os.getpid(), 9)", 137, ["77"]),
        ("sys.exit(75)", 75, ["77"]),
        ("sys.exit(76)", 76, []),  # would break again
        ("sys.exit(1)", 1, []),
    ],
)
def test_a_job_that_broke_is_requeued_if_it_saved_a_checkpoint(job, plan, status, requeued):
    job.commit(5)
    assert (job.run(plan)[0], job.requeued) == (status, requeued)


@pytest.mark.parametrize("before", [None, 5])
def test_a_job_stopped_twice_at_the_same_checkpoint_ends(job, before):
    if before:
        job.commit(before)
    plan = ["ready(); time.sleep(60)", "sys.exit(75)", "commit(7); sys.exit(75)", "sys.exit(75)"]
    process = job.start(*plan)  # it is told while it loads, and says nothing of its own
    job.wait_for("ready_0")
    process.send_signal(signal.SIGUSR1)
    assert (ended(process)[0], job.requeued) == (128 + signal.SIGUSR1, ["77"])
    status, out, _ = job.run(*plan)
    assert (status, job.requeued) == (75, ["77"]) and "no new checkpoint: not requeued" in out
    job.run(*plan)
    job.run(*plan)
    assert job.requeued == ["77"] * 3  # it got on, and was stopped for the first time there


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT"])
def test_a_job_that_slurm_is_ending_is_not_requeued(job, state):
    status, out, _ = job.run("commit(10); sys.exit(75)", STATE=state)
    assert (status, job.requeued) == (75, [])
    assert "Slurm is ending the job" in out


def test_one_of_an_array_is_requeued_alone_and_has_its_number_in_its_flags(job):
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}  # the last of an array has the array's job id
    flags = ["--seed", "%a", f"--output_dir={job.folder}/seed_%a"]
    assert (job.run("sys.exit(75)", flags=flags, **array)[0], job.requeued) == (75, ["77_3"])
    asked = (job.folder / "srun.args").read_text().splitlines()
    assert asked[-3:] == ["--seed", "3", f"--output_dir={job.folder}/seed_3"]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SLURM_JOB_ID": ""}, "output/slurm_JOB_ID"),
        ({}, "output/slurm_77"),
        ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}, "output/slurm_70_2"),
    ],
)
def test_a_dry_job_prints_its_commands(job, variables, folder):
    status, out, _ = job.run(flags=["--seed", "3"], DRY="1", NNODES="2", GPUS="4", **variables)
    step, _, command, then = out.splitlines()
    assert (status, job.attempts) == (0, 0)
    flags = ["--seed", "3", "--output_dir", folder]
    assert shlex.split(step)[-4:] == shlex.split(command)[-4:] == flags and step.startswith("srun ")
    assert "--nnodes 2" in command and f"a new checkpoint in {folder}" in then


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ([], {}, "the first argument is the recipe"),
        (["no/recipe.sh"], {}, "not 'no/recipe.sh'"),
        (["scripts/train/tulu3/reward_modeling_8b.sh"], {}, "there is no Slurm job; submit this with sbatch"),
        ([], {"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository; run sbatch in its root"),
    ],
)
def test_a_job_submitted_wrongly_is_refused_in_one_sentence(place, arguments, variables, sentence):
    process = Place.start(place, command=["bash", SBATCH], flags=arguments, **variables)
    status, out, err = ended(process)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
