"""That all ranks of a run are one program on one set of data: the same code, libraries and flags, the same pairs.

Each node starts its ranks by a command and from a checkout of its own, and may read files of its own. Where these differ, ranks deal
steps differently or wait in different collectives, hours later or for ever; so they compare short marks.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from open_rm.errors import quote
from open_rm.ranks import Ranks

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "numpy")
OF_KERNELS = ("liger-kernel", "peft", "bitsandbytes", "flash-attn")  # which need not be there
READ_BY_ALL = ("deepspeed",)  # flags whose file every node reads; what others name is compared when it has been read
OF_A_NODE = ("dataset_local_cache_dir",)  # flags by which every node may name a disk of its own
MOST_NAMED = 3
SAME_FILES = "give every node the same files, or a folder that all see"


def check(ranks: Ranks, flags: Mapping[str, object]) -> None:
    """Refuse ranks that are not started alike. A collective call.

    Args:
        flags: all of them, by name.

    Raises:
        UserError: some rank's differ: which, where, and how.
    """
    compare(
        ranks,
        lambda: marks(flags),
        "give every node the same command, the same commit of this repository and the same packages",
    )


def compare(ranks: Ranks, own: Callable[[], Mapping[str, str | None]], advice: str) -> None:
    """Refuse ranks whose marks are not the main rank's. A collective call.

    Args:
        own: gives this rank's marks, by what messages call them; they take reading everything, and one rank alone needs none.
        advice: how to have them alike.

    Raises:
        UserError: some rank's differ: which, where, and how.
    """
    if ranks.world_size == 1:
        return
    both = ranks.gathered((ranks.name, own()))
    main, expected = both[0]
    for name, found in both:
        differ = [
            f"{what} is {quote(found.get(what))} there and {quote(mark)} on {main}"
            for what, mark in expected.items()
            if found.get(what) != mark
        ]
        if differ:
            more = f"; and {len(differ) - MOST_NAMED} more differ" if len(differ) > MOST_NAMED else ""
            ranks.fail(f"{name} is not like the others: {'; '.join(differ[:MOST_NAMED])}{more}; {advice}")


def marks(flags: Mapping[str, object]) -> dict[str, str]:
    """What has to be the same on all ranks, by what messages call it."""
    code = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    found = {"the code of open_rm": code.hexdigest()[:12], "Python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: _version(name) for name in (*LIBRARIES, *OF_KERNELS)}
    for name in READ_BY_ALL:
        if flags[name] is not None:
            found[f"the file of --{name}"] = hashlib.sha256(Path(str(flags[name])).read_bytes()).hexdigest()[:12]
    return found | {f"--{name}": str(value) for name, value in flags.items() if name not in OF_A_NODE}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
