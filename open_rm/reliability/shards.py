"""An engine's state in files, one of each rank, and back on any number of ranks under any ZeRO stage.

A rank writes its flat tensors (training/engine_state.py) as they are, with an index of which elements of which parameter lie
where. Where the same flat tensor is found again, all of it is copied: bit for bit, 8-bit moments with their blocks too. Else
every rank reads the slices that it needs from whichever files hold them. Files are safetensors, which hold numbers alone:
reading one runs no code, whoever wrote it.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from open_rm.errors import UserError, quote_error
from open_rm.training.engine_state import Flat, Slice, make_state

WEIGHTS = "weights"
BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit moments


class Snapshot:
    """A copy of a rank's flat tensors in host memory, which training cannot change; its buffers are used again.

    tensors: by "key|name".  index: for each flat tensor its slices, the names of its tensors, and its plain numbers.
    """

    def __init__(self, *, pinned: bool):
        """pinned: in memory from which a GPU copies at full speed."""
        self._pinned = pinned
        self.tensors: dict[str, torch.Tensor] = {}
        self.index: list[dict] = []

    def take(self, flats: Iterable[Flat]) -> None:
        """Copy what this rank writes."""
        buffers, self.tensors, self.index = self.tensors, {}, []
        for flat in flats:
            if not flat.written:
                continue
            tensors = {WEIGHTS: flat.weights}
            for name, value in flat.state.items():
                if torch.is_tensor(value):  # of one dimension where each weight has an element, whatever holds it
                    tensors[name] = value.reshape(-1) if value.shape == flat.shape else value
            numbers = {name: value for name, value in flat.state.items() if not torch.is_tensor(value)}
            for name, tensor in tensors.items():
                label = f"{flat.key}|{name}"
                buffer = buffers.get(label)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
                buffer.copy_(tensor.detach(), non_blocking=True)
                self.tensors[label] = buffer
            slices = [dataclasses.astuple(slice_) for slice_ in flat.slices]
            self.index.append({"key": flat.key, "stretches": slices, "names": [*tensors], "numbers": numbers})
        if self._pinned:
            torch.cuda.synchronize()

    def write(self, path: Path, others: dict[str, torch.Tensor]) -> None:
        """Write a rank's file. others: more tensors, such as random states."""
        save_file(self.tensors | others, path, metadata={"index": json.dumps(self.index)})


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """A flat tensor in a file."""

    file: "ShardFile"
    key: str
    slices: tuple[Slice, ...]
    names: list[str]
    numbers: dict

    def whole(self, name: str) -> torch.Tensor:
        return self.file.tensor(f"{self.key}|{name}")

    def values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """float32 elements of a tensor that has one for each weight; 8-bit ones are turned into numbers."""
        number = name.removeprefix("state")
        if f"absmax{number}" in self.names:
            return _dequantized(self, number)[start:stop]
        return self.file.part(f"{self.key}|{name}", start, stop)


@functools.lru_cache(maxsize=4)
def _dequantized(source: _Source, number: str) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    blocks, scales, code = (source.whole(f"{name}{number}") for name in ("state", "absmax", "qmap"))
    return dequantize_blockwise(blocks, absmax=scales, code=code, blocksize=BLOCK)


class ShardFile:
    """A rank's file, of which only what is asked for is read."""

    def __init__(self, path: Path):
        """Raises:
        UserError: it is no such file.
        """
        try:
            self._file = safe_open(path, framework="pt")
            index = json.loads((self._file.metadata() or {})["index"])
            self.sources = [
                _Source(self, one["key"], tuple(Slice(*s) for s in one["stretches"]), one["names"], one["numbers"])
                for one in index
            ]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no file of a checkpoint ({quote_error(error)})") from error

    def tensor(self, label: str) -> torch.Tensor:
        return self._file.get_tensor(label)

    def part(self, label: str, start: int, stop: int) -> torch.Tensor:
        return self._file.get_slice(label)[start:stop]

    def others(self) -> dict[str, torch.Tensor]:
        """What is no flat tensor."""
        names = [name for name in self._file.keys() if "|" not in name]  # noqa: SIM118 - no dict
        return {name: self._file.get_tensor(name) for name in names}


class Shards:
    """All ranks' files of a checkpoint."""

    def __init__(self, paths: list[Path], sizes: dict[str, int]):
        """sizes: elements of each parameter that is trained (engine_state.trained_sizes).

        Raises:
            UserError: they are of another model, or no such files.
        """
        self.files = [ShardFile(path) for path in paths]
        self._twins = {source.key: source for file in self.files for source in file.sources}
        self._holding: dict[str, list[tuple[_Source, Slice]]] = {}
        for source in self._twins.values():
            for slice_ in source.slices:
                self._holding.setdefault(slice_.name, []).append((source, slice_))
        if sizes != {name: sum(s.stop - s.start for _, s in parts) for name, parts in self._holding.items()}:
            where = paths[0].parent if paths else "the checkpoint"
            raise UserError(f"{where} is of another model: its trained parameters have other names or sizes")

    def load(self, flat: Flat, optimizer: torch.optim.Optimizer | None) -> bool:
        """Fill a rank's flat tensor, its moments too where an optimizer is given. Returns whether bit for bit.

        Raises:
            UserError: the files do not hold all of it.
        """
        twin = self._twins.get(flat.key)
        if twin is not None and twin.slices == flat.slices and len(twin.whole(WEIGHTS)) == len(flat.weights):
            flat.weights.copy_(twin.whole(WEIGHTS))
            if optimizer is not None:
                _copy_state(twin, flat, optimizer)
            return True
        pieces = [piece for slice_ in flat.slices for piece in self._pieces(slice_)]
        for source, start, stop, at in pieces:
            flat.weights[at : at + stop - start].copy_(source.values(WEIGHTS, start, stop))
        if optimizer is not None and pieces:
            _gather_state(pieces, flat, optimizer)
        return False

    def _pieces(self, wanted: Slice) -> list[tuple[_Source, int, int, int]]:
        """(source, start and stop in its flat tensor, where in ours) of the files' parts of a slice."""
        pieces, found = [], 0
        for source, held in self._holding.get(wanted.name, ()):
            start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
            if start < stop:
                ours, theirs = wanted.at - wanted.start, held.at - held.start
                pieces.append((source, start + theirs, stop + theirs, start + ours))
                found += stop - start
        if found != wanted.stop - wanted.start:
            raise UserError(f"the checkpoint does not hold all of parameter {wanted.name}; it is of another model")
        return pieces


def _copy_state(twin: _Source, flat: Flat, optimizer: torch.optim.Optimizer) -> None:
    if not flat.state and hasattr(optimizer, "init_state") and "state1" in twin.names:
        make_state(optimizer, flat.weights)
    for name in twin.names:
        if name != WEIGHTS:
            _put(flat, name, twin.whole(name))
    flat.state.update(twin.numbers)


def _put(flat: Flat, name: str, value: torch.Tensor) -> None:
    """In place where there is such a tensor: others may hold it too."""
    if value.dim() == 1 and len(value) == len(flat.weights):
        value = value.view(flat.shape)
    old = flat.state.get(name)
    if torch.is_tensor(old) and old.shape == value.shape and old.dtype == value.dtype:
        old.copy_(value)
    else:
        # A copy: what is read from a file may lie in the file's memory, where several tensors would be one.
        flat.state[name] = value.to(flat.weights.device, copy=True)


def _gather_state(pieces: list, flat: Flat, optimizer: torch.optim.Optimizer) -> None:
    first, size = pieces[0][0], len(flat.weights)
    if not flat.state and hasattr(optimizer, "init_state"):
        make_state(optimizer, flat.weights)
    like = [name for name in first.names if name != WEIGHTS and not name.startswith(("absmax", "qmap"))]
    for name in like:
        if first.whole(name).dim() == 0:  # a counter of steps
            _put(flat, name, first.whole(name))
            continue
        if any(len(source.whole(name)) != len(source.whole(WEIGHTS)) for source, *_ in pieces):
            raise UserError(f"the optimizer's {name} has another form than the weights and cannot be divided anew")
        values = torch.zeros(size, dtype=torch.float32, device=flat.weights.device)
        for source, start, stop, at in pieces:
            values[at : at + stop - start].copy_(source.values(name, start, stop))
        number = name.removeprefix("state")
        if f"absmax{number}" in flat.state:
            _quantize(values, flat.state, number)
        else:
            _put(flat, name, values)
    flat.state.update(first.numbers)


def _quantize(values: torch.Tensor, state: dict, number: str) -> None:
    from bitsandbytes.functional import quantize_blockwise

    quantized, how = quantize_blockwise(values, code=state[f"qmap{number}"], blocksize=BLOCK)
    state[f"state{number}"].copy_(quantized.view_as(state[f"state{number}"]))
    state[f"absmax{number}"].copy_(how.absmax)
