"""Micro-batches one after another on one device, and how many positions its memory holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from open_rm.batching.dealing import CPU_POSITIONS
from open_rm.errors import UserError
from open_rm.scoring.open_model import OpenModel, Recipe

MOST_POSITIONS = 32_768  # on a GPU; more gain nothing


@dataclass(frozen=True)
class MicroBatch:
    """sequences: token ids.  prompt_of: equal where a prompt is shared.  layout: None, the model's own, or padded."""

    sequences: list[np.ndarray]
    prompt_of: list[int]
    layout: str | None = None


@dataclass(frozen=True)
class Facts:
    """What is known once the model is loaded. max_tokens: most positions of a micro-batch.  rows: of its embeddings.
    positions: most tokens that it can place; None: any number.  lines: for the log.
    device: its name, which tells what sums in which order.  threads: of a process that computes on a CPU."""

    max_tokens: int
    rows: int
    positions: int | None
    lines: list[str]
    device: str
    threads: int | None


class Computer:
    """An open model that computes whole calls."""

    def __init__(self, recipe: Recipe, device: torch.device, max_tokens: int | None):
        self.model = OpenModel(recipe, device)
        lines, most = list(self.model.lines), max_tokens or CPU_POSITIONS
        if device.type == "cuda" and max_tokens is None and not recipe.one_by_one:
            most = self._what_fits()
            lines.append(f"a forward of {most} positions fits into the memory of {device}")
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
        threads = None if on_gpu else torch.get_num_threads()
        self.facts = Facts(most, self.model.rows, self.model.positions, lines, name, threads)

    def rewards(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """[n] float32 of each micro-batch, in their order."""
        found = [self._rewards(batch) for batch in batches]  # on a GPU nothing waits before the line below
        return [rewards.cpu().numpy() for rewards in found]

    def _rewards(self, batch: MicroBatch) -> torch.Tensor:
        try:
            return self.model.rewards(batch.sequences, batch.prompt_of, batch.layout)
        except torch.OutOfMemoryError as error:
            half = len(batch.sequences) // 2
            if not half:
                raise UserError(
                    f"a sequence of {len(batch.sequences[0])} tokens does not fit into the memory of {self.model.device}; "
                    "pass a smaller --max_token_length, or --dtype bfloat16"
                ) from error
        torch.cuda.empty_cache()
        halves = (slice(None, half), slice(half, None))
        parts = [MicroBatch(batch.sequences[h], batch.prompt_of[h], batch.layout) for h in halves]
        return torch.cat([self._rewards(part) for part in parts])

    def _what_fits(self) -> int:
        """Positions of a forward on a GPU, halved until one fits: rows of up to 1024 tokens, nothing shared."""
        most, tokens = MOST_POSITIONS, min(1024, self.model.positions or 1024)
        while most > tokens:
            rows = most // tokens
            try:
                self.model.rewards([np.ones(tokens, np.int64)] * rows, list(range(rows)))
                return most
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                most //= 2
        return most

    def close(self) -> None:
        """Nothing to end: it computes in this process."""
