"""The process group: how the processes of a run find each other, how long they wait, how they part.

gloo on the CPU, nccl on a GPU; alone, a process is a group of one. On several there is a second group, in which ranks wait.
"""

import contextlib
import ctypes
import fcntl
import functools
import itertools
import json
import logging
import os
import platform
import socket
import struct
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.distributed_c10d import _set_pg_timeout

from open_rm.errors import UserError, quote_error

# DeepSpeed reads these when it is imported. Which device it is for is torch's to say, since we ask torch too.
os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
    # Micro-batches differ in size, and blocks of many sizes that one freed would not fit the next. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

# Ranks that wait for data or for a model to be saved may wait long, and spend nothing: a group of their own, on the CPU.
WAITING_TIMEOUT = timedelta(hours=4)
# Training's collectives, in which ranks are about a step apart: what a hung one costs at most, where the watchdog is off or does
# not see it (it has 10 minutes). A CPU may take half an hour for a step of a large model, longer where it is shared, and
# its hours cost less. The groups that DeepSpeed makes for ZeRO 1 and 2 have torch's own: 10 minutes, and 30 on a CPU.
COLLECTIVE_TIMEOUT = {"nccl": timedelta(minutes=15), "gloo": timedelta(hours=1)}
MEETING_TIMEOUT = timedelta(minutes=30)  # for the last process to start
CONNECTING_TIMEOUT = timedelta(minutes=2)  # and then to connect to all others
LOOKING_AROUND = timedelta(seconds=1)  # meanwhile: how often it is asked whether one said that it does not
LEAVING_WORD = timedelta(seconds=10)
WORD = "open_rm/does not come"
GROUP_OF_ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
SIOCGIFADDR = 0x8915  # Linux's question for an interface's address
_GROUP_NUMBERS = itertools.count()  # every rank counts the groups that it has joined alike
_waiting: dist.ProcessGroup | None = None


def waiting() -> dist.ProcessGroup | None:
    """The group in which ranks wait for each other's objects, on the CPU; None for the default one."""
    return _waiting


def join() -> tuple[int, int, int, torch.device]:
    """Join the group that torchrun described in the environment, or form one of this process alone.

    Returns:
        rank, local rank, number of ranks, device.

    Raises:
        UserError: a process did not start, or the processes cannot reach each other.
    """
    global _waiting
    import deepspeed  # here, since it takes seconds

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(GROUP_OF_ONE, MASTER_PORT=str(port))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On some CPUs bitsandbytes looks for a bfloat16 kernel that nothing here calls, and says "Failed to load".
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Lines of libraries would hide ours; DeepSpeed 0.19 calls collectives by names that torch 2.13 renames, a line a call.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # some images make float32 mean 10 bits of mantissa (TF32)
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
        # DeepSpeed would compile a helper that only its inference calls, and wait for ever for the lock of a run that
        # was killed while it compiled.
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():
        _form_group(device, backend)
    deepspeed.init_distributed(dist_backend=backend, timeout=COLLECTIVE_TIMEOUT[backend], verbose=False)
    if dist.get_world_size() > 1:
        _waiting = _connected(lambda: dist.new_group(backend="gloo", timeout=CONNECTING_TIMEOUT))
        _set_pg_timeout(WAITING_TIMEOUT, _waiting)
    return dist.get_rank(), local_rank, dist.get_world_size(), device


def _form_group(device: torch.device, backend: str) -> None:
    """The default group, of all ranks."""
    store, rank, world_size = _meeting_place()
    # torchrun's store outlives a group and keeps the addresses that its ranks had; the next one, in another run of the same
    # processes, would look for its ranks there and wait for ever. So each group has names of its own.
    store = dist.PrefixStore(f"open_rm/{next(_GROUP_NUMBERS)}", store)
    here = [f"here/{number}" for number in range(world_size)]
    store.set(here[rank], json.dumps([platform.node(), _kind_of(device)]))
    _wait_for_all(store, here, rank)
    _check_devices(store, here, rank)
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface_to(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    how = {"store": store, "rank": rank, "world_size": world_size}
    how["device_id"] = device if backend == "nccl" and world_size > 1 else None  # as DeepSpeed does
    if backend == "nccl":
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT[backend], **how)
    else:
        _connected(lambda: dist.init_process_group(backend, timeout=CONNECTING_TIMEOUT, **how))
        _set_pg_timeout(COLLECTIVE_TIMEOUT[backend])


def _wait_for_all(store: dist.Store, here: list[str], rank: int) -> None:
    """Until every process has come, or one says that it does not."""
    until = time.monotonic() + MEETING_TIMEOUT.total_seconds()
    while True:
        try:
            return store.wait(here, LOOKING_AROUND)
        except RuntimeError as error:
            lost = error
        try:
            word = _word_of_one_that_fails()
        except RuntimeError as error:  # the store went with its process
            word, lost, until = None, error, 0.0
        if word:
            raise UserError(word) if rank == 0 else SystemExit(1)
        if time.monotonic() > until:
            raise UserError(
                f"not all {len(here)} processes of the run started within {MEETING_TIMEOUT.total_seconds() / 60:.0f} minutes of "
                f"rank {rank} ({quote_error(lost)}); see what the others print, and that each machine was given the same command"
            ) from lost


def _kind_of(device: torch.device) -> str:
    """What ranks compute on, as messages call it: ranks of one run choose kernels and collectives alike."""
    if device.type != "cuda":
        return "a CPU"
    return "a GPU of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))


def _check_devices(store: dist.Store, here: list[str], rank: int) -> None:
    """Refuse ranks that compute on another kind of device than the main one: gloo would wait for nccl, and nccl for gloo.

    Raises:
        UserError: on the main rank; the others end with it.
    """
    found = [json.loads(store.get(name)) for name in here]
    kinds = [kind for _, kind in found]
    other = next((number for number, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is None:
        return
    read = [f"read/{number}" for number in range(len(here))]
    store.set(read[rank], "")
    if rank != 0:
        raise SystemExit(1)
    with contextlib.suppress(RuntimeError):  # the store may go with this process, and all have to have read
        store.wait(read, LEAVING_WORD)
    raise UserError(
        f"rank {other} on {found[other][0]} computes on {kinds[other]}, and rank 0 on {found[0][0]} on {kinds[0]}; give all "
        "ranks devices of one kind: see nvidia-smi, CUDA_VISIBLE_DEVICES and `python -c 'import torch; torch.cuda.init()'` on "
        "both"
    )


def leave_word(mistake: object) -> None:
    """A process that ends before it joins says why, so that those that wait for it do not: the main one tells it.

    A mistake that all make the main process has told by itself by then, and nobody listens.
    """
    rank = os.environ["RANK"]
    with contextlib.suppress(RuntimeError, ValueError):  # nobody to tell
        store, *_ = next(dist.rendezvous("env://", timeout=LEAVING_WORD))
        store.set(WORD, f"rank {rank} on {platform.node()}: {mistake}")


def _word_of_one_that_fails() -> str | None:
    store, *_ = _meeting_place()
    return store.get(WORD).decode() if store.check([WORD]) else None


def _connected(form: Callable[[], Any]) -> Any:
    """Form a gloo group. Who waits for the connection of one that cannot reach it waits for five times its timeout, so that
    is short here, and longer for what follows."""
    try:
        return form()
    except RuntimeError as error:
        raise UserError(
            f"the processes of the run cannot connect to each other ({quote_error(error)}); set GLOO_SOCKET_IFNAME on each "
            "machine to the network interface that leads to the others (`ip address` lists them)"
        ) from error


def _interface_to(main: str) -> str | None:
    """The network interface over which this machine and the main one reach each other; None where they are one machine.

    Gloo by itself takes what the machine's own name stands for, which many systems set to 127.0.1.1.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((main, 9))  # sends nothing: the system chooses the way
        except OSError:
            return None
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex() if own[0] != 127 else ():
            with contextlib.suppress(OSError):  # it has no address
                if fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store in which ranks find each other, this process's rank and their number; one for all groups."""
    return next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))


def leave() -> None:
    """Leave the process group. Exiting without it ends some runs with a signal on their way out."""
    global _waiting
    import deepspeed

    _waiting = None
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    if os.environ.get("WORLD_SIZE") == "1" and not dist.is_torchelastic_launched():
        # what `join` set would lead child processes to this group
        _meeting_place.cache_clear()
        for name in (*GROUP_OF_ONE, "MASTER_PORT"):
            os.environ.pop(name, None)


def _keep_freed_memory() -> None:
    """Let glibc reuse the large blocks that each step frees, instead of giving them back and having them zeroed again.

    About a tenth of a CPU step was page faults. Elsewhere than under glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is kept
