"""A real Slurm of two nodes on this machine: its daemons are this file's own, and nothing of them is left.

The debug recipe as it stands, one rank on each node, told to stop in mid-run and requeued; and an array of jobs.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment_of_a_process
from killing import lines_of, same_run

SBATCH = "scripts/train/slurm/reward_modeling.sbatch"
DEBUG = "scripts/train/debug/reward_modeling.sh"
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
# Seconds for any part of it on a machine that is shared by many; a job that broke ends the wait at once.
LONGEST = 1800.0

SLURM = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=sched_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=n1,n2 Default=YES
"""


def wait_until(true, what: str, log: Path | None = None) -> None:
    """log: of the job that is to do it."""
    until = time.monotonic() + LONGEST
    while not true():
        said = text_of(log) if log else ""
        assert "not requeued" not in said, f"the job has ended without it: {what}\n{said}{logs_beside(log)}"
        assert time.monotonic() < until, f"not in {LONGEST:g} s: {what}\n{said}{logs_beside(log)}"
        time.sleep(0.2)


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def logs_beside(log: Path | None) -> str:
    return "".join(f"\n{file}:\n{text_of(file)[-2000:]}" for file in (log.parent.rglob("node_*.log") if log else ()))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Slurm:
    """What asks the daemons of the slurm.conf in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.conf = folder, folder / "slurm.conf"

    def __call__(self, *command: str, check: bool = True, **variables: str) -> str:
        kept = {name: value for name, value in environment_of_a_process().items() if not name.startswith("SLURM_")}
        env = kept | {"SLURM_CONF": str(self.conf), "PYTHON": sys.executable} | variables
        done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=LONGEST)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def daemons(self) -> list[list[str]]:
        munge = ["munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"]
        munge += [f"--{part}={self.folder}/munge.{part.partition('-')[0]}" for part in ("pid-file", "log-file")]
        munge += [f"--seed-file={self.folder}/munge.seed", f"--socket={self.folder}/munge.socket"]
        nodes = [["slurmd", "-D", "-f", str(self.conf), "-N", name] for name in ("n1", "n2")]
        return [munge, ["slurmctld", "-D", "-f", str(self.conf)], *nodes]


@pytest.fixture(scope="module")
def daemons():
    """Two nodes."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if shutil.which(name, path=SBIN) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm to start here: {f'no {missing[0]}' if missing else 'not root'}")
    with tempfile.TemporaryDirectory(prefix="slurm_") as name, contextlib.ExitStack() as stack:
        slurm = Slurm(Path(name))  # a short one, for the socket
        for part in ("state", "n1", "n2"):
            (slurm.folder / part).mkdir()
        (slurm.folder / "munge.key").write_bytes(os.urandom(1024))
        (slurm.folder / "munge.key").chmod(0o600)
        slurm.conf.write_text(SLURM.format(host=socket.gethostname(), folder=slurm.folder, ports=free_ports(3)))
        for command in slurm.daemons():
            output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            daemon = subprocess.Popen(command, env=os.environ | {"PATH": SBIN}, **output)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            if command[0] == "munged":
                wait_until((slurm.folder / "munge.socket").exists, "munge listens")
        idle = ["sinfo", "--noheader", "--format=%T:%D"]  # refused while the controller starts
        wait_until(lambda: slurm(*idle, check=False) == "idle:2", "both nodes are idle")
        yield slurm


@pytest.fixture
def slurm(daemons):
    """Two idle nodes."""
    yield daemons
    daemons("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)  # what a failed test has left
    daemons("scancel", "--user=root", check=False)
    wait_until(lambda: not daemons("squeue", "--noheader"), "no job is left")


def test_the_debug_recipe_on_two_nodes_is_stopped_requeued_and_ends_as_an_undisturbed_run(slurm, tmp_path):
    log, output, logs = tmp_path / "job.log", tmp_path / "out", tmp_path / "out.logs"
    flags = ["--total_episodes", "480", "--num_evals", "2", "--dataset_local_cache_dir", str(tmp_path / "cache")]
    variables = {"TOY": str(tmp_path / "toy"), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    job = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", SBATCH, DEBUG, *flags, "--output_dir", str(output)]
    number = slurm(*job, **variables)
    # the evaluation before the first of 30 steps, and two: on a quick machine too the signal is there before the last
    wait_until(lambda: lines_of(output) > 2, "the run is on its way", log)
    slurm("scancel", "--batch", "--signal=USR1", number)  # what --signal=B:USR1@300 does 300 s before the end
    wait_until(lambda: "finished" in text_of(log), "the job finishes", log)

    said = text_of(log)
    [stopped_at] = (line.split()[2].rstrip(":") for line in said.splitlines() if line.startswith("status 75"))
    assert f"status 75, {stopped_at}: requeued, to go on from there" in said
    assert f"job {number}, start 2, from {stopped_at}" in said
    for node in (0, 1):
        of_node = text_of(logs / f"node_{node}.log")
        assert f"stopped at {stopped_at}; the same command goes on from there" in of_node
        assert f"[rank {node}] " in of_node
        # a start has a folder of its own, and in it the rank's output
        first, second = sorted((logs / f"node_{node}").iterdir())
        for start in (first, second):
            [stderr] = start.glob("*/attempt_0/0/stderr.log")
            assert (stderr.parent / "stdout.log").exists()

    undisturbed = tmp_path / "undisturbed"
    subprocess.run(
        ["bash", DEBUG, *flags, "--output_dir", str(undisturbed)],
        env=environment_of_a_process() | variables | {"GPUS": "2", "PYTHON": sys.executable},
        cwd=REPOSITORY,
        capture_output=True,
        timeout=LONGEST,
        check=True,
    )
    same_run(output, undisturbed)


# In place of a recipe: breaks once after a checkpoint, where it is the second of the array.
ARRAY = """\
mkdir -p "$4"
printf '%s\\n' "$@" >> "$4/flags"
if [[ $2 == 2 && ! -d $4/checkpoints ]]; then mkdir -p "$4/checkpoints/step_00000007"; exit 1; fi
"""


def test_each_job_of_an_array_has_its_number_in_its_flags_and_is_requeued_alone(slurm, tmp_path):
    (tmp_path / "recipe.sh").write_text(ARRAY)
    flags = ["--seed", "%a", "--output_dir", f"{tmp_path}/seed_%a"]
    job = ["sbatch", "--parsable", "--array=1-2", f"--output={tmp_path}/job_%a.log", SBATCH, f"{tmp_path}/recipe.sh"]
    slurm(*job, *flags)
    for number, starts in ((1, 1), (2, 2)):
        log = tmp_path / f"job_{number}.log"
        wait_until(lambda log=log: "finished" in text_of(log), f"job {number} of the array finishes", log)
        expected = ["--seed", str(number), "--output_dir", f"{tmp_path}/seed_{number}"]
        assert (tmp_path / f"seed_{number}/flags").read_text().split() == expected * starts
        assert (f"start {starts}," in text_of(log)) and (tmp_path / f"seed_{number}.logs/node_0.log").exists()


# In place of a recipe: a run that was stopped, whose second node leaves it after the first.
LATE = """\
if (( ${SLURM_RESTART_COUNT:-0} )); then exit 0; fi
trap 'touch "$2/heard"' TERM
mkdir -p "$2/checkpoints/step_00000007"
if [[ $SLURM_NODEID == 0 ]]; then touch "$2/left"; exit 75; fi
until [[ -e $2/left ]]; do sleep 0.1; done
for (( i = 0; i < 30; i++ )); do sleep 0.1; done
exit 75
"""


def test_a_node_that_leaves_a_stopped_run_late_is_not_killed(slurm, tmp_path):
    (tmp_path / "recipe.sh").write_text(LATE)
    log, output = tmp_path / "job.log", tmp_path / "out"
    slurm("sbatch", "--nodes=2", f"--output={log}", SBATCH, f"{tmp_path}/recipe.sh", "--output_dir", str(output))
    wait_until(lambda: "finished" in text_of(log), "the job finishes", log)
    assert "status 75, step_00000007: requeued" in text_of(log) and not (output / "heard").exists()
