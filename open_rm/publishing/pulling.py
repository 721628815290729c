"""A model from the Hub as a folder that is whole or not there.

Files arrive in a hidden folder beside, are held against the sizes and hashes that the Hub tells, and appear by one rename. What
is killed on the way leaves that other folder, and the same command goes on with the files in it that are whole (the client does
not go on within a file). A mark in that folder says that a pull has made it; one without is somebody's, and left alone.
"""

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from open_rm.errors import UserError, quote_error
from open_rm.manifest import sync_folder
from open_rm.publishing.hub_calls import FULL, HUB_ERRORS, OF_THE_DISK, persistently, reason
from open_rm.publishing.pushing import MODELS, NOT_PUSHED, PUSHED

PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # reading weights from one runs what somebody put into it
OF_THE_CLIENT = ".cache"  # what the download keeps beside the files, to go on with them
MARK = ".open_rm_pull"  # in the folder beside: repository and revision; no name that could be pulled


@dataclass(frozen=True)
class Snapshot:
    """The files of a model at one commit. files: path to what the Hub says of it."""

    repo_id: str
    revision: str
    commit: str
    files: dict[str, RepoFile]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files.values())

    def damaged(self, folder: Path) -> list[str]:
        """The files that are not in the folder as the Hub has them; what is there is on the disk afterwards."""
        return [name for name, file in self.files.items() if not _is(folder / name, file)]

    def described(self) -> str:
        """Name, revision, commit, size, files: one a line."""
        named = self.revision if self.revision == self.commit else f"{self.revision}, commit {self.commit}"
        lines = [f"{self.repo_id} ({named}): {len(self.files)} files, {_mib(self.size)}, each as the Hub has it"]
        lines += [f"  {name}  {file.size:,} bytes" for name, file in sorted(self.files.items())]
        code = sorted(name for name in self.files if name.endswith(".py"))
        if code:
            lines.append(f"it brings Python code ({', '.join(code)}): read it before you pass --trust_remote_code")
        return "\n".join(lines)


def pull_model(repo_id: str, folder: str, *, revision: str = "main") -> str:
    """Download a model into a new folder, with retries; returns lines that say what it holds.

    Args:
        revision: branch, tag or commit.

    Raises:
        UserError: there is no such model, or it is not ours to read; the folder holds something else; the disk takes no more;
            the Hub stays away.
    """
    where = Path(folder).expanduser().resolve()
    if where.exists() and not where.is_dir():
        raise UserError(f"--folder {folder} is a file; name a folder to make")
    snapshot = _find(repo_id, revision)
    if _is_there(where, snapshot):
        (where / MARK).unlink(missing_ok=True)  # of a pull that was killed behind its rename
        return f"{where} holds already {snapshot.described()}"
    beside = where.with_name(f".{where.name}.pulling")
    lock = where.with_name(f"{beside.name}.lock")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, blocking=False):
            try:
                _mark(beside, snapshot)
                _download(snapshot, beside)
                _clear(beside, snapshot)
                os.rename(beside, where)
                (where / MARK).unlink()
                sync_folder(where)
                sync_folder(where.parent)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is pulling into {where}; wait for it, or name another folder") from None
    except OSError as error:
        full = f"the disk is full, {_mib(_free(beside))} are free" if error.errno in FULL else None
        raise UserError(_given_up(snapshot, beside, full or quote_error(error))) from error
    return f"{where} holds {snapshot.described()}"


def _find(repo_id: str, revision: str) -> Snapshot:
    """What the Hub has."""
    api = HfApi()
    try:
        commit = persistently(lambda: api.model_info(repo_id, revision=revision).sha)
        tree = persistently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repo_id} has no branch, tag or commit {revision}; it has {_references(api, repo_id)}"
        ) from error
    except (*HUB_ERRORS, ValueError) as error:
        raise UserError(f"{repo_id} cannot be pulled: {reason(error, repo_id=repo_id)}") from error
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    wanted = filter_repo_objects(there, allow_patterns=PUSHED, ignore_patterns=NOT_PUSHED)
    files = {name: there[name] for name in wanted}
    if not any(name in files for name in MODELS):
        raise UserError(
            f"there is no model in {repo_id} at {revision} (no {' and no '.join(MODELS)}); it has {_references(api, repo_id)}: "
            "name one by --revision"
        )
    if not any(name.endswith(".safetensors") for name in files):
        pickles = sorted(name for name in there if name.endswith(PICKLES))
        why = (
            f": its weights are pickles ({', '.join(pickles)}), which can run code when they are read"
            if pickles
            else ""
        )
        raise UserError(f"{repo_id} has no weights as safetensors at {revision}{why}")
    return Snapshot(repo_id, revision, commit, files)


def _references(api: HfApi, repo_id: str) -> str:
    """The names that --revision may have."""
    with contextlib.suppress(*HUB_ERRORS):
        found = api.list_repo_refs(repo_id)
        tags = f" and the tags {', '.join(ref.name for ref in found.tags)}" if found.tags else ""
        return f"the branches {', '.join(ref.name for ref in found.branches)}{tags}"
    return "others, which the Hub does not tell now"


def _is_there(where: Path, snapshot: Snapshot) -> bool:
    """Whether the folder holds the model already; anything else in it is refused."""
    if where.is_mount():
        raise UserError(f"--folder {where} is where a file system is mounted; name a folder inside it")
    if not where.exists() or (where.is_dir() and not any(where.iterdir())):
        return False
    if where.is_dir() and not snapshot.damaged(where):
        there = (path.relative_to(where).as_posix() for path in where.rglob("*") if path.is_file())
        of_a_model = filter_repo_objects(there, allow_patterns=PUSHED, ignore_patterns=NOT_PUSHED)
        if more := sorted(set(of_a_model) - set(snapshot.files)):
            raise UserError(
                f"--folder {where} holds {more[0]}, which {snapshot.repo_id} does not have at {snapshot.revision}; "
                "choose another folder, or move that file away"
            )
        return True
    what = "holds another model" if any((where / name).exists() for name in MODELS) else "holds other files"
    raise UserError(f"--folder {where} {what}; choose another folder, or move that one away")


def _mark(beside: Path, snapshot: Snapshot) -> None:
    """Make the folder ours, in which what the snapshot does not have is removed."""
    if any(beside.iterdir()) and not (beside / MARK).is_file():
        raise UserError(f"{beside} holds files that no pull has put there; move it away, or name another --folder")
    (beside / MARK).write_text(f"{snapshot.repo_id} {snapshot.revision}\n", encoding="utf-8")


def _download(snapshot: Snapshot, beside: Path) -> None:
    """Fill the folder beside, going on with what has arrived there before."""
    for part in beside.glob(
        f"{OF_THE_CLIENT}/**/*.incomplete"
    ):  # of a pull that was killed: the client would leave it there
        part.unlink()
    arrived = sum(path.stat().st_size for path in beside.rglob("*") if path.is_file())
    if snapshot.size - arrived > _free(beside):
        why = f"it needs {_mib(snapshot.size - arrived)} more on the disk, {_mib(_free(beside))} are free"
        raise UserError(_given_up(snapshot, beside, why))
    # The client takes what its cache holds; where that is damaged, a cache that is empty makes it ask the Hub.
    for cache in (None, beside / OF_THE_CLIENT):
        try:
            persistently(
                lambda cache=cache: snapshot_download(
                    snapshot.repo_id,
                    revision=snapshot.commit,
                    local_dir=beside,
                    cache_dir=cache,
                    allow_patterns=PUSHED,
                    ignore_patterns=NOT_PUSHED,
                )
            )
        except (*HUB_ERRORS, ValueError) as error:
            if getattr(error, "errno", None) in OF_THE_DISK:
                raise
            raise UserError(_given_up(snapshot, beside, reason(error, repo_id=snapshot.repo_id))) from error
        damaged = snapshot.damaged(beside)
        if not damaged:
            return
        for name in damaged:
            (beside / name).unlink(missing_ok=True)
    raise UserError(_given_up(snapshot, beside, f"{', '.join(damaged)}: not what the Hub says of it"))


def _given_up(snapshot: Snapshot, beside: Path, why: str) -> str:
    waits = beside.is_dir() and any(path.name != MARK for path in beside.iterdir())
    arrived = f". What has arrived waits in {beside}, and the same command goes on with it" if waits else ""
    return f"{snapshot.repo_id} cannot be pulled: {why}{arrived}"


def _clear(folder: Path, snapshot: Snapshot) -> None:
    """Remove what the client keeps, and what a pull of another commit has left."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in {*snapshot.files, MARK}:
            path.unlink()
    sync_folder(folder)


def _is(path: Path, file: RepoFile) -> bool:
    """Whether a file has the Hub's size and hash: sha256 of a large one, git's own of the others."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
        os.fsync(content.fileno())
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)


def _free(folder: Path) -> int:
    """Bytes that the disk has left."""
    return shutil.disk_usage(folder).free


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
