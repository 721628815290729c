"""What the Hub is asked: by one rank of each node, for one commit of a model, whoever moves its branch meanwhile. A run that
goes on reads the commits that it was begun with.

The first rank of a node fetches into the node's cache, and its other ranks read that cache alone (`as_fetched`); so does the
first one when it reads again. Of data sets it notes how they are opened, since datasets itself finds no revision in its cache.

    main rank      asks, and says which commits it found
    first of node  asks for those commits
    other ranks    ask nothing
"""

import contextlib
import dataclasses
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub

from open_rm.errors import UserError
from open_rm.flags import ModelFlags

COMMIT = re.compile(r"[0-9a-f]{40}")
OF_A_MODEL = ("config.json",)
OF_A_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "config.json")


@dataclass
class Notes:
    """What a rank's `load_dataset` calls found, by what they asked for.

    data: opened data sets.  commits: of those whose commit is known.
    """

    data: dict[tuple, datasets.Dataset] = field(default_factory=dict)
    commits: dict[tuple, str] = field(default_factory=dict)

    def packed(self) -> bytes:
        """For other ranks of the node: an opened data set is where its files lie, not what is in them (`load_dataset`)."""
        return pickle.dumps(self.data)

    @classmethod
    def unpacked(cls, packed: bytes) -> "Notes":
        """Raises:
        UserError: the files are not where the node's first rank has them.
        """
        try:
            return cls(data=pickle.loads(packed))
        except OSError as error:
            raise UserError(
                f"data that the first rank of this node fetched is not seen here ({error}); give all ranks of a node the same "
                "HF_HOME, on a disk that they share"
            ) from error


_notes: Notes | None = None


@contextlib.contextmanager
def noting(notes: Notes) -> Iterator[None]:
    """While open, `load_dataset` notes what it finds, and takes what is noted: the data set itself, or its commit."""
    global _notes
    before, _notes = _notes, notes
    try:
        yield
    finally:
        _notes = before


@contextlib.contextmanager
def as_fetched() -> Iterator[None]:
    """While open, nothing is asked of the Hub: huggingface_hub, transformers and datasets read what is in the cache."""
    rooms = (huggingface_hub.constants, datasets.config)  # where all three look at each call
    before = [room.HF_HUB_OFFLINE for room in rooms]
    for room in rooms:
        room.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for room, value in zip(rooms, before, strict=True):
            room.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def model_as_fetched(flags: ModelFlags) -> Iterator[None]:
    """`as_fetched`, but where a model brings code or kernels of the Hub: what these read besides, they alone know."""
    brings = flags.trust_remote_code or "/" in (flags.attn_implementation or "")
    with contextlib.nullcontext() if brings else as_fetched():
        yield


def load_dataset(name: str, config: str | None, **how) -> datasets.Dataset:
    """datasets.load_dataset of a split, once a node (see `noting`); never into memory, whatever HF_DATASETS_IN_MEMORY_MAX_SIZE
    says: other ranks would be sent its rows."""
    asked = (name, config, *sorted(how.items()))
    notes = _notes or Notes()
    if asked not in notes.data:
        pinned = {"revision": notes.commits[asked]} if asked in notes.commits else {}
        notes.data[asked] = datasets.load_dataset(name, config, keep_in_memory=False, **how | pinned)
        found = re.search(r"@([0-9a-f]{40})/", " ".join(notes.data[asked].info.download_checksums or ()))
        if found:
            notes.commits[asked] = found[1]
    return notes.data[asked]


def commits_of(flags: ModelFlags, before: Mapping[str, str]) -> dict[str, str]:
    """The flags of revisions, with the commits that they stand for; those of names that are not found on the Hub are left out:
    reading them says what is wrong.

    before: `kept` of the run that goes on, whose commits are taken again; of what is named otherwise now, the Hub is asked.
    """
    files = {"model_revision": OF_A_MODEL, "tokenizer_revision": OF_A_TOKENIZER}
    commits, found = {}, dict(before)
    for flag, (name, revision) in _read_by(flags).items():
        asked = _asked(name, revision)
        if asked not in found:
            found[asked] = _commit(name, revision, files[flag])
        commits[flag] = found[asked]
    return {flag: commit for flag, commit in commits.items() if commit}


def kept(flags: ModelFlags, pinned: ModelFlags) -> dict[str, str]:
    """What was asked for, NAME or NAME@REVISION, with its commit: for a run that goes on. pinned: `flags`, by `at`."""
    commits = {_asked(*read): getattr(pinned, flag) for flag, read in _read_by(flags).items()}
    return {asked: commit for asked, commit in commits.items() if commit and COMMIT.fullmatch(commit)}


def _read_by(flags: ModelFlags) -> dict[str, tuple[str, str | None]]:
    """Name and revision of what each flag of a revision is for; the tokenizer is the model's unless it is named."""
    model, tokenizer = flags.model_name_or_path, flags.tokenizer_name or flags.model_name_or_path
    revision = flags.tokenizer_revision or (flags.model_revision if tokenizer == model else None)
    return {"model_revision": (model, flags.model_revision), "tokenizer_revision": (tokenizer, revision)}


def _asked(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


def at(flags: ModelFlags, commits: dict[str, str]) -> ModelFlags:
    """The flags, with these commits as revisions."""
    return dataclasses.replace(flags, **commits)


def _commit(name: str, revision: str | None, files: tuple[str, ...]) -> str | None:
    """The commit of a repository that a revision stands for; None for a folder, and where it cannot be found."""
    if Path(name).is_dir():  # of somebody's cache, perhaps, but without a revision of its own
        return None
    from transformers.utils import hub  # here, since it takes seconds, and judging scores needs none of it

    for file in files:
        with contextlib.suppress(OSError, ValueError):
            found = hub.cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            place = re.search(r"/snapshots/([^/]+)/", found or "")
            if place and COMMIT.fullmatch(place[1]):
                return place[1]
    return None
