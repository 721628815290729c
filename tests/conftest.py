"""Fixtures: a tiny model with a tokenizer, preference rows, real data where it is there, and the recipe as a process."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# What tells a process its group; processes that a test starts are not of the test's own.
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# A GPU is for tests marked gpu, in processes of their own (`on_gpu`); all else computes on the CPU, in float32, wherever it runs.
# What was visible is kept, once: the workers of pytest-xdist start from an environment in which this was done.
VISIBLE_AT_FIRST = "CUDA_VISIBLE_DEVICES_AT_FIRST"
os.environ.setdefault(VISIBLE_AT_FIRST, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
IS_GIVEN_THE_GPU = "OPEN_RM_TEST_ON_GPU"  # set in a process of `on_gpu`, which may import tests
if IS_GIVEN_THE_GPU not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
# Before anything imports deepspeed or tokenizers: no fork warnings, no look at the network.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side, a process for each core; threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is compiled: a run that was killed while it compiled would leave a lock that later runs wait for.
os.environ["TORCH_EXTENSIONS_DIR"] = os.devnull

# A file is run by one process, so the longest come first: none is left over when the others are done.
LONGEST = (
    "slurm",
    "sequence_parallel",
    "many_ranks",
    "two_hosts",
    "trying",
    "stragglers",
    "hpz",
    "dry_run",
    "kills",
    "stops",
    "faults",
    "damage",
    "best",
    "adapters",
    "engine",
    "objectives",
    "recipe",
    "ranks",
    "benchmarks",
    "liger_interpreted",
    "families",
    "layouts_agree",
    "tracking",
    "hub",
    "trl_parity",
    "serving",
    "old_clients",
    "pairs_to_training",
    "everywhere_the_same",
    "any_decoder",
)


def pytest_collection_modifyitems(items):
    """The files of LONGEST, then the others as they were."""
    rank = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests marked gpu are skipped where there is none, before their fixtures are made."""
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


@functools.cache
def why_no_gpu() -> str | None:
    """Why tests marked gpu cannot run here; None where they can. This process does not see the GPU, so another one looks."""
    if not shutil.which("nvidia-smi") and not any(Path("/dev").glob("nvidia[0-9]*")):
        return "no CUDA device: neither nvidia-smi nor /dev/nvidia0 is there"
    if not on_gpu("import json, torch; print(json.dumps(torch.cuda.is_available()))"):
        return "no CUDA device: torch.cuda.is_available() is False"
    return None


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The embedded default, small: <folder>/model, <folder>/data/{train,test}.jsonl."""
    from open_rm import toy as module

    folder = tmp_path_factory.mktemp("toy")
    module.main(module.ToyArgs(folder=str(folder), train_pairs=240, test_pairs=60, seed=3))
    return folder


@pytest.fixture
def tokenizer(toy):
    from open_rm.data.tokenizer import load_tokenizer

    return load_tokenizer(str(toy / "model"))


@pytest.fixture
def write_rows(tmp_path):
    """Write rows (dicts, or raw lines) to a jsonl file and return its path."""

    def write(rows, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def read_pairs(mixer, tokenizer, *, splits=("train",), seed: int = 1, show_progress: bool = False, **flags):
    """Preference data from a mixer list, as the recipe reads it with these data flags."""
    from open_rm.data.building import load_preference_data
    from open_rm.flags import DataFlags

    named = {"dataset_mixer_list": [str(part) for part in mixer], "dataset_mixer_list_splits": list(splits)}
    return load_preference_data(DataFlags(**named, **flags), tokenizer, seed=seed, show_progress=show_progress)


@pytest.fixture
def load(tokenizer, tmp_path):
    """`read_pairs` with the toy's tokenizer and a cache of the test's own."""
    return functools.partial(read_pairs, tokenizer=tokenizer, dataset_local_cache_dir=str(tmp_path / "cache"))


def load_model(folder, tokenizer, *, layout: str = "padded", every: int = 0, **flags):
    """The reward model that the recipe makes of a folder with these model flags, in float32, seed 1. every: how many layers
    one is recomputed in the backward pass."""
    from open_rm.flags import ModelFlags
    from open_rm.model.loading import load_reward_model
    from open_rm.model.recompute import recompute

    model, _ = load_reward_model(ModelFlags(model_name_or_path=str(folder), **flags), tokenizer, layout=layout)
    recompute(model.classifier, every)
    return model


def alone():
    """The ranks of a process that no group was formed for."""
    import torch

    from open_rm.ranks import Ranks

    return Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def shared_data(name: str) -> Path:
    """A folder of real preference data beside the repository; the test is skipped where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


def run_recipe(
    *flags, processes: int = 1, env: dict | None = None, timeout: float = 900
) -> subprocess.CompletedProcess:
    """Run the recipe as a user would, in processes of its own; returns stdout, stderr and the exit status."""
    return launch("-m", "open_rm.reward_modeling", *flags, processes=processes, env=env, timeout=timeout)


def run_recipe_on_gpu(*flags, env: dict | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """`run_recipe` on one GPU; for tests marked gpu."""
    return launch("-m", "open_rm.reward_modeling", *flags, gpu=True, env=env, timeout=timeout)


def launch(
    *what, processes: int = 1, gpu: bool = False, env: dict | None = None, timeout: float = 900
) -> subprocess.CompletedProcess:
    """Run a script or `-m` a module with its flags, under torchrun where it takes several processes.

    timeout: guards against hangs alone, far above what any of it takes on a slow CPU that does other things too.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launcher, *map(str, what)],
        env=environment_of_a_process(gpu=gpu) | {"PYTHONPATH": python_path(REPOSITORY)} | (env or {}),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def toy_flags(toy: Path, output_dir: Path, **overrides) -> list[str]:
    """Flags of a run of a few seconds on the toy; overrides replace or add (None removes)."""
    flags = {
        "model_name_or_path": toy / "model",
        "dataset_mixer_list": [toy / "data", "1.0"],
        "dataset_mixer_eval_list": [toy / "data", "1.0"],
        "dataset_local_cache_dir": output_dir.parent / "cache",
        "output_dir": output_dir,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 16,
        "learning_rate": "1e-3",
        "total_episodes": 80,
        "num_sample_pairs": 2,
        **overrides,
    }
    result = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        result += [f"--{name}", *map(str, values)]
    return result


@pytest.fixture(scope="session")
def nursery():
    """Forks runs that tests kill (forking.py)."""
    from forking import Nursery

    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def run_forked(nursery, tmp_path_factory):
    """`run_recipe` without the ten seconds of imports, without torchrun and without pictures: for all tests of what a run
    computes. How a run starts, what it reads from its environment then, and its pictures are for `run_recipe`."""

    def run(*flags, processes: int = 1) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("forked")
        printed, errors = folder / "stdout", folder / "stderr"
        started = nursery.start(list(flags), printed, errors=errors, processes=processes)
        status = next(filter(None, started.statuses()), 0)
        return subprocess.CompletedProcess(flags, status, printed.read_text(), errors.read_text())

    return run


@pytest.fixture(scope="module")
def without_pictures():
    """For files of many runs in the test's own process, whose pictures nobody looks at."""
    from forking import leave_out_pictures

    from open_rm import reward_modeling

    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(reward_modeling, patch.setattr)
        yield


@pytest.fixture(scope="session")
def pairs_cache(tmp_path_factory):
    """Tokenized once for all runs."""
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def flags_for(toy, pairs_cache):
    """`flags_of_a_long_run` on the toy."""
    return functools.partial(flags_of_a_long_run, toy, pairs_cache)


def flags_of_a_long_run(toy: Path, pairs_cache: Path, output_dir: Path, processes: int = 1, **overrides) -> list[str]:
    """Flags of a run of 38 steps of 16 pairs, which crosses epochs, warms up, evaluates five times and writes a checkpoint
    every 4 steps."""
    own = {
        "dataset_local_cache_dir": pairs_cache,
        "per_device_train_batch_size": 16 // processes,
        "total_episodes": 600,
        "num_evals": 3,
        "warm_up_steps": 10,
        "checkpointing_steps": 4,
    }
    return toy_flags(toy, output_dir, **own | overrides)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them: their names, their addresses, and what cuts it."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"rm{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]

    def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)

    added = [ip("netns", "add", name, check=False) for name in names]
    if any(done.returncode for done in added):
        for name in names:
            ip("netns", "del", name, check=False)
        pytest.skip(f"no network namespaces here: {added[0].stderr.strip()}")
    try:
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, addresses, lambda: ip("-n", names[1], "link", "set", names[1], "down")
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def read_metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def environment_of_a_process(*, gpu: bool = False) -> dict[str, str]:
    """What a process that a test starts may know: no group of ranks, and the GPU only where it is asked for."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    if gpu:
        environment[IS_GIVEN_THE_GPU] = "1"
        del environment["DS_ACCELERATOR"], environment["CUDA_VISIBLE_DEVICES"]
        if environment[VISIBLE_AT_FIRST] != "all":
            environment["CUDA_VISIBLE_DEVICES"] = environment[VISIBLE_AT_FIRST]
    return environment


def in_a_process(script: str, *arguments):
    """Run a script that prints JSON in its last line, in a process that knows of no ranks; returns what it printed."""
    return printed_by(script, arguments, environment_of_a_process())


def on_gpu(script: str, *arguments):
    """`in_a_process` with the GPU in sight; for tests marked gpu. The script may import test files by their names."""
    folders = [REPOSITORY, *sorted({path.parent for path in (REPOSITORY / "tests").rglob("test_*.py")})]
    path = {"PYTHONPATH": python_path(*folders)}
    return printed_by(script, arguments, environment_of_a_process(gpu=True) | path)


def python_path(*folders: Path) -> str:
    """PYTHONPATH of these folders and what it was: packages may come by it."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def printed_by(script: str, arguments, environment: dict[str, str]):
    environment = environment | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
