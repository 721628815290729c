"""The folder of a reward model: on the disk, or fetched from the Hub; and its fingerprint."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from open_rm.errors import UserError, quote_error
from open_rm.model.adapters import ADAPTER_CONFIG

SMALL = ["*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
SAFE = ["model*.safetensors", "adapter_model.safetensors"]
PICKLED = ["pytorch_model*.bin", "adapter_model.bin"]
ELSEWHERE = ["*/*.safetensors", "*/*.bin", "onnx/*", "original/*", "checkpoint-*/*"]
WHOLE = 64 * 2**20  # bytes; of larger weights SAMPLES stretches are hashed
SAMPLES, STRETCH = 256, 2**16
DECIDING = (".json", ".py", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors", ".bin")
# What a run and its publishing leave beside the model.
OTHERS = ("run.json", "trainer_state.json", "generation_config.json", "all_results.json")
OTHERS += ("report.json", "scores.meta.json")  # what judging leaves where it is told to


def find(name: str, revision: str | None) -> Path:
    """The folder that a user named, or the local copy of the repository of that name; downloading shows its progress.

    Raises:
        UserError: neither is there, or the Hub does not give it.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if revision is not None:
            raise UserError(
                f"--model_revision {revision}: {name} is a local folder, which has no revisions; leave it out"
            )
        return local
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such folder")
    try:
        folder = _fetched(name, revision, SMALL + SAFE)
        if not any(next(folder.glob(pattern), None) for pattern in SAFE):
            _fetched(name, revision, PICKLED)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"--model {name}: neither a folder nor a model that the Hub gives ({quote_error(error)}); check the name, the "
            "revision, the network, and HF_TOKEN for a private one"
        ) from error
    return folder


def _fetched(name: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ELSEWHERE))


def fingerprint(folder: Path, *facts: str) -> str:
    """sha256, in hex, over what decides a reward: the folder's files and `facts` (tokenizer, dtype).

    Weights of up to 64 MiB a file are hashed whole; of larger files the size, the first 64 KiB (names and shapes) and 256
    stretches of 64 KiB spread over it. Training moves all weights, so that this tells two models apart; a file in which
    someone changed single bytes it may not.
    """
    digest = hashlib.sha256(json.dumps(facts).encode())
    for path in _deciding(folder):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        for stretch in _stretches(path):
            digest.update(stretch)
    base = folder / ADAPTER_CONFIG
    if base.is_file():
        named = json.loads(base.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        if Path(named).is_dir():
            digest.update(fingerprint(Path(named)).encode())
    return digest.hexdigest()


def _deciding(folder: Path) -> list[Path]:
    """Files that a loader may read: those of the folder itself, and code wherever it lies."""
    found = {path for path in folder.iterdir() if path.suffix in DECIDING and path.name not in OTHERS}
    return sorted(path for path in found | set(folder.rglob("*.py")) if path.is_file())


def _stretches(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while part := file.read(2**20):
                yield part
            return
        for number in range(SAMPLES + 1):
            file.seek((size - STRETCH) * number // SAMPLES)
            yield file.read(STRETCH)
