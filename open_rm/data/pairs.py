"""Tokenized preference pairs as everyone reads them: token ids by index, and columns of numbers over all pairs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

from open_rm.data.prefix_order import PromptOrder, find_order


@dataclass(frozen=True)
class PairTable:
    """What is known of each pair without its tokens, all [pairs], and which prompts begin alike.

    chosen_length, rejected_length: tokens.  shared_length: tokens that the two sides have in common from the start.
    prompt_length: tokens of the prompt.  chosen_id, rejected_id: equal where the tokens are equal.
    prompt_id: equal where the prompts were equal before they were cut; a pair without a prompt has one of its own.
    list_id: equal for the pairs of one ranked list; a pair of no list has one of its own.
    prompt_order: gives the order of all cut prompts, found at the first call; None: whether prompts begin alike isn't known.
    """

    chosen_length: np.ndarray
    rejected_length: np.ndarray
    shared_length: np.ndarray
    prompt_length: np.ndarray
    prompt_id: np.ndarray
    chosen_id: np.ndarray
    rejected_id: np.ndarray
    list_id: np.ndarray
    prompt_order: Callable[[], PromptOrder] | None = None

    def __len__(self) -> int:
        return len(self.chosen_length)

    def cut_prompt_ids(self, indices: np.ndarray) -> np.ndarray:
        """[n] equal where the prompts' tokens are, since answers of several lengths cut one prompt to several lengths.

        The last token of a cut prompt can differ: a tokenizer may merge it with the answer's first.
        """
        return self.prompt_id[indices] ^ (self.prompt_length[indices] << 40)  # ids are hashes, all their bits random


@dataclass(frozen=True)
class PreferenceData:
    """Tokenized pairs.

    dataset: columns chosen_input_ids, rejected_input_ids, those of PairTable, margin (NaN where there is none), label_prob,
        chosen_level, rejected_level, chosen_attributes, rejected_attributes, source (index into labels) and place (file and row).
    labels: one per source.  lines: one or more per source on what was read, dropped and kept, for the log.
    kind: what the rows were: text, messages (rendered by the chat template) or token ids.
    facts: one dict per source, what its lines say: label, name, rows, joined (rows of one answer each that became them),
        taken, kept, skipped (place and what is wrong), and the fields of counts.Counts.
    """

    dataset: Dataset
    labels: list[str]
    lines: list[str]
    kind: str | None
    facts: list[dict]

    @property
    def chat(self) -> bool:
        """Whether the chat template wrote them."""
        return self.kind == "messages"

    def __len__(self) -> int:
        return len(self.dataset)

    def pairs(self, indices) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids (chosen, rejected) of the given rows, in their order."""
        rows = self.dataset.with_format("numpy", columns=["chosen_input_ids", "rejected_input_ids"])[list(indices)]
        return list(zip(rows["chosen_input_ids"], rows["rejected_input_ids"], strict=True))

    @functools.cached_property
    def table(self) -> PairTable:
        """Lengths and ids of all pairs, for planning steps."""
        columns = [field.name for field in dataclasses.fields(PairTable) if field.name != "prompt_order"]
        return PairTable(**{name: self._column(name) for name in columns}, prompt_order=self.prompt_order)

    def prompt_order(self) -> PromptOrder:
        """The cut prompts of all pairs, those that begin alike side by side."""
        return self._prompt_order

    @functools.cached_property
    def _prompt_order(self) -> PromptOrder:
        ids, rows, limits = shareable(self.table)
        return find_order(ids, self._arrow("chosen_input_ids"), rows, limits)

    def source_ids(self) -> np.ndarray:
        """[pairs] index into labels."""
        return self._column("source")

    def places(self, indices) -> list[str]:
        """File and row of the given pairs."""
        return self.dataset.with_format(None, columns=["place"])[list(indices)]["place"]

    def margins(self) -> np.ndarray:
        """[pairs] float32, NaN where a row has none."""
        return np.array(self._arrow("margin"))

    def label_probs(self) -> np.ndarray:
        """[pairs] float32, how likely chosen is the better one: 1 where a row says nothing, 0.5 of a tie."""
        return np.array(self._arrow("label_prob"))

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """([pairs], [pairs]) int32, the places of chosen and of rejected in their list: 0 the best, equal ones of a tie."""
        return np.array(self._arrow("chosen_level")), np.array(self._arrow("rejected_level"))

    def attributes(self) -> np.ndarray:
        """[pairs, 2, K] float32, the attributes of chosen and of rejected, in the order of --attributes; NaN: not known."""
        chunks = [self._arrow(f"{side}_attributes").chunks for side in ("chosen", "rejected")]
        sides = [np.concatenate([np.zeros(0), *(chunk.flatten() for chunk in side)]) for side in chunks]
        shape = (len(self), sides[0].size // max(1, len(self)))
        return np.stack([side.astype(np.float32).reshape(shape) for side in sides], axis=1)

    def _column(self, name: str) -> np.ndarray:
        return np.array(self._arrow(name)).astype(np.int64)

    def _arrow(self, name: str) -> pa.ChunkedArray:
        return self.dataset.with_format("arrow", columns=[name])[:][name]


def shareable(table: PairTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids of the cut prompts, rising; a pair of each; tokens of each that other prompts may share), all [prompts].

    All sequences of a prompt begin with these tokens: of a single pair what its sides have in common, of several at most the
    prompt, as dealing plans them (batching/work.py).
    """
    cut = table.cut_prompt_ids(np.arange(len(table)))
    ids, rows, number, pairs = np.unique(cut, return_index=True, return_inverse=True, return_counts=True)
    at_most_prompt = np.minimum(table.prompt_length, table.shared_length)
    limits = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(limits, number, np.where(pairs[number] > 1, at_most_prompt, table.shared_length))
    return ids, rows, limits


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all sequences start with, leaving each at least one of its own: its last, where its reward is read."""
    length = min(len(sequence) for sequence in sequences) - 1
    for sequence in sequences[1:]:
        differs = np.flatnonzero(sequence[:length] != sequences[0][:length])
        length = int(differs[0]) if len(differs) else length
    return length
