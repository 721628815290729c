"""One set-up of .venv, however many scripts ask for it at once, whatever is killed in the middle.

Python, venv and what asks which packages are installed are real; pip is a stand-in that installs empty packages from nowhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

# The first python that environment.sh tries to make a .venv with.
BASE = """\
#!/bin/bash
if [[ "$1 $2" == "-m venv" ]]; then
    {python} -m venv --without-pip "$3" && exec {python} "$HERE/with_pip.py" "$3"
fi
exec {python} "$@"
"""

WITH_PIP = """\
import os, sys
from pathlib import Path
[packages] = Path(sys.argv[1]).glob("lib/python*/site-packages")
(packages / "pip").mkdir()
(packages / "pip/__init__.py").touch()
(packages / "pip/__main__.py").write_text(Path(os.environ["HERE"], "stand_in.py").read_text())
(packages / "pip-1.0.dist-info").mkdir()
(packages / "pip-1.0.dist-info/METADATA").write_text("Name: pip\\nVersion: 1.0\\n")
(packages / "pip-1.0.dist-info/RECORD").write_text("pip/__init__.py,,0\\npip-1.0.dist-info/INSTALLER,,\\n")
"""

# As pip does: what is in the wheel, its list of files too, then the commands, last a list that names them and the installer.
# It stops in the middle of the package that `hold` names.
PIP = """\
import fcntl, os, sys, time
from pathlib import Path
here, packages = Path(os.environ["HERE"]), Path(__file__).parent.parent
running = open(here / "running", "w")
try:
    fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (here / "two_at_once").touch()
with open(here / "pip.log", "a") as log:
    log.write(" ".join(arg for arg in sys.argv[1:] if not arg.startswith("--")) + "\\n")
if (here / "fails").exists():
    sys.exit(int((here / "fails").read_text()))
wanted = [sys.argv[-1]] if "==" in sys.argv[-1] else Path(sys.argv[-1]).read_text().split()
for name, version in [line.split("==") for line in wanted]:
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (packages / f"{name}.py").write_text("x = 1\\n")
    (folder / "METADATA").write_text(f"Name: {name}\\nVersion: {version}\\n")
    (folder / "RECORD").write_text(f"{name}.py,,6\\n")
    (here / f"at_{name}").write_text(str(os.getpid()))
    while (here / "hold").exists() and (here / "hold").read_text() == name:
        time.sleep(0.02)
    (packages.parents[2] / f"bin/{name}").touch()
    (folder / "RECORD").write_text(f"{name}.py,,6\\n../../../bin/{name},,0\\n{folder.name}/INSTALLER,,\\n")
"""

SCRIPT = """\
set -euo pipefail
cd "$HERE"
source scripts/environment.sh
set_up_python "$1"
echo "$PYTHON"
"""


class House:
    """A repository of three requirements, without a .venv."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, []
        (folder / "scripts").mkdir()
        shutil.copy(REPOSITORY / "scripts/environment.sh", folder / "scripts")
        (folder / "requirements.txt").write_text("torch==1.0\nalpha==1.0\nbeta==2.0\n")
        (folder / "requirements-dev.txt").write_text("alpha==1.0\ngamma==1.0\n")
        (folder / "stand_in.py").write_text(PIP)
        (folder / "with_pip.py").write_text(WITH_PIP)
        (folder / "run.sh").write_text(SCRIPT)
        (folder / "bin").mkdir()
        (folder / "bin/python3.13").write_text(BASE.format(python=sys.executable))
        (folder / "bin/python3.13").chmod(0o755)

    def start(self, requirements: str = "requirements.txt", **variables: str) -> subprocess.Popen:
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        variables = {"HERE": str(self.folder), "PATH": path, "LOOK_SECONDS": "0.05"} | variables
        process = subprocess.Popen(
            ["bash", str(self.folder / "run.sh"), requirements],
            env=kept | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=take_signals,
        )
        self.processes.append(process)
        return process

    def run(self, *args, **variables) -> tuple[int, str, str]:
        return ended(self.start(*args, **variables))

    def hold(self, package: str) -> None:
        (self.folder / "hold").write_text(package)

    def go_on(self) -> None:
        (self.folder / "hold").unlink()

    def wait_until(self, true) -> None:
        until = time.monotonic() + 60
        while not true():
            assert time.monotonic() < until, "it did not come to that"
            time.sleep(0.02)

    def wait_for(self, name: str) -> str:
        self.wait_until(lambda: (self.folder / name).exists() and (self.folder / name).read_text())
        return (self.folder / name).read_text()

    @property
    def installs(self) -> list[str]:
        assert not (self.folder / "two_at_once").exists(), "two pips at once"
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def fills(self) -> list[str]:
        """How each fill ended."""
        folders = sorted((self.folder / ".venv.fills").glob("[0-9]*"), key=lambda path: int(path.name))
        return [
            path.joinpath("ended").read_text().strip() if path.joinpath("ended").exists() else "" for path in folders
        ]


def take_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


BOTH = ["install torch==1.0", "install -r requirements.txt"]
READY = (0, ".venv/bin/python\n", "")
SAYS = "installing requirements.txt into .venv (a few minutes, once)\n"


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    for process in house.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_venv_is_filled_once_and_then_taken_without_a_lock_or_pip(house):
    assert house.run() == (0, ".venv/bin/python\n", SAYS)
    assert house.installs == BOTH and house.fills == ["whole"]
    assert house.run() == READY
    assert house.installs == BOTH and house.fills == ["whole"]


def test_eight_at_once_fill_one_venv_once(house):
    assert [process[:2] for process in map(ended, [house.start() for _ in range(8)])] == [READY[:2]] * 8
    assert house.installs == BOTH and house.fills == ["whole"]


def test_who_waits_says_for_whom_and_goes_on_at_once(house):
    house.hold("beta")
    first = house.start()
    house.wait_for("at_beta")
    others = [house.start() for _ in range(6)] + [house.start(LOOK_SECONDS="0.02")]
    lines = [process.stderr.readline() for process in others]
    lines += [others[-1].stderr.readline() for _ in range(4)]  # each after 30 more looks; 90 are enough for a dead one
    assert set(lines) == {
        f"waiting for process {first.pid} on {os.uname().nodename}, which fills {house.folder}/.venv\n"
    }
    assert all(process.poll() is None for process in others)
    house.go_on()
    assert [ended(process)[:2] for process in [first, *others]] == [READY[:2]] * 8
    assert house.installs == BOTH and house.fills == ["whole"]


def test_a_venv_in_the_making_is_not_taken_though_it_has_all_pins(house):
    house.hold("beta")  # its description stands there already
    house.start()
    house.wait_for("at_beta")
    path = f"{house.folder}/.venv/bin:{house.folder}/bin:{os.environ['PATH']}"  # activated, and named
    second = house.start(PATH=path, PYTHON=f"{house.folder}/.venv/bin/python")
    assert second.stderr.readline().startswith("waiting for process")
    house.go_on()
    assert ended(second)[0] == 0 and house.installs == BOTH


@pytest.mark.parametrize("whom", ["all", "script", "filler"])
def test_a_killed_filler_is_noticed_and_its_torn_venv_made_again(house, whom):
    house.hold("beta")
    first = house.start()
    pip = int(house.wait_for("at_beta"))
    waiting = [house.start(LOOK_SECONDS="0.02") for _ in range(2)]
    for process in waiting:
        assert process.stderr.readline().startswith("waiting for process")
    if whom == "all":  # the host went down
        os.killpg(first.pid, signal.SIGKILL)
    elif whom == "script":
        first.kill()
    else:
        os.kill(parent_of(pid=pip), signal.SIGKILL)
    first.wait()
    house.wait_until(lambda: not alive(pip))  # nobody installs for a run that is no more
    house.go_on()
    results = [ended(process) for process in waiting]
    assert [result[:2] for result in results] == [READY[:2]] * 2
    said = "".join(result[2] for result in results)
    assert said.count("was left half-filled; it is made again") == 1
    assert ("is dead: it was not heard of" in said) == (whom != "script")  # who notices its end says so
    assert house.installs == BOTH * 2 and house.fills == ["torn" if whom == "script" else "", "whole"]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or between that and the reading
        return False


@pytest.mark.parametrize(("kind", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_filler_leaves_its_place_at_once(house, kind, status):
    house.hold("alpha")
    first = house.start()
    pip = int(house.wait_for("at_alpha"))
    second = house.start(LOOK_SECONDS="0.3")
    assert second.stderr.readline().startswith("waiting for process")
    os.killpg(first.pid, getattr(signal, kind))  # as Ctrl-C at a terminal
    house.wait_until(lambda: not alive(pip))
    assert first.wait() in (status, -getattr(signal, kind))
    house.wait_until(lambda: house.fills[0] == "torn")
    house.go_on()
    out, err = second.communicate(timeout=30)  # far below the looks that it takes to find it dead
    assert (second.returncode, out) == READY[:2] and "dead" not in err


def test_one_that_was_killed_between_two_packages_is_gone_on_with(house):
    house.hold("torch")
    first = house.start()
    house.wait_for("at_torch")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    [folder] = house.folder.glob(".venv/lib/python*/site-packages/torch-1.0.dist-info")
    (folder / "RECORD").write_text(f"torch.py,,6\n{folder.name}/INSTALLER,,\n")
    house.go_on()
    status, _, err = house.run(LOOK_SECONDS="0.02")
    assert (status, house.fills) == (0, ["", "whole"]) and "half-filled" not in err


def test_a_failed_install_ends_with_its_status_and_the_next_run_starts_clean(house):
    (house.folder / "fails").write_text("3")
    status, out, err = house.run()
    assert (status, out) == (3, "") and err.startswith(SAYS)
    assert "error: '.venv/bin/python -m pip install" in err and "failed (3)" in err and "build the image again" in err
    assert house.fills == ["torn"]
    (house.folder / "fails").unlink()
    assert house.run() == (0, ".venv/bin/python\n", SAYS)
    assert house.fills == ["torn", "whole"]


def test_what_a_venv_has_stays_usable_when_more_cannot_be_installed(house):
    house.run()
    (house.folder / "fails").write_text("1")  # no network
    assert house.run("requirements-dev.txt")[0] == 1
    assert house.fills == ["whole", "torn"]
    assert house.run() == READY  # looked through, found whole
    assert house.fills == ["whole", "torn", "whole"]
    assert house.run() == READY and len(house.fills) == 3


def test_a_venv_that_was_made_before_fills_were_counted_is_taken(house):
    house.run()
    shutil.rmtree(house.folder / ".venv.fills")
    assert house.run() == READY
    assert house.installs == BOTH and not (house.folder / ".venv.fills").exists()


def test_an_active_python_with_the_requirements_is_taken(house):
    house.run()
    (house.folder / ".venv").rename(house.folder / "elsewhere")
    active = f"{house.folder}/elsewhere/bin/python"
    assert house.run(PYTHON=active) == (0, f"{active}\n", "")
    assert house.run(PATH=f"{house.folder}/elsewhere/bin:{os.environ['PATH']}") == (0, "python3\n", "")
    assert house.installs == BOTH and house.fills == ["whole"]


def test_what_the_fills_leave_is_no_part_of_the_repository(house):
    house.run()
    subprocess.run(["git", "init", "--quiet"], cwd=house.folder, check=True)
    ignored = subprocess.run(["git", "check-ignore", ".venv.fills/1"], cwd=house.folder, capture_output=True, text=True)
    assert ignored.stdout == ".venv.fills/1\n"
    assert ".venv.fills" in (REPOSITORY / ".dockerignore").read_text().splitlines()


def test_a_folder_that_cannot_be_written_is_named(house):
    (house.folder / ".venv.fills").write_text("")
    why = f"{house.folder}/.venv.fills cannot be written to make a .venv"
    sentence = f"error: no python here has the packages of requirements.txt, and {why}\n"
    assert house.run() == (1, "", sentence)
