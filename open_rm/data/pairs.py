"""Tokenized preference pairs as everyone reads them: token ids by index, and columns of numbers over all pairs."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset


@dataclass(frozen=True)
class PairTable:
    """What is known of each pair without its tokens. All [pairs].

    chosen_length, rejected_length: tokens.  shared_length: tokens that the two sides have in common from the start.
    prompt_length: tokens of the prompt.  chosen_id, rejected_id: equal where the tokens are equal.
    prompt_id: equal where the prompts were equal before they were cut; a pair without a prompt has one of its own.
    """

    chosen_length: np.ndarray
    rejected_length: np.ndarray
    shared_length: np.ndarray
    prompt_length: np.ndarray
    prompt_id: np.ndarray
    chosen_id: np.ndarray
    rejected_id: np.ndarray

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

    dataset: columns chosen_input_ids, rejected_input_ids, those of PairTable, margin (NaN where there is none), source
        (index into labels) and place (file and row).
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
        return PairTable(**{field.name: self._column(field.name) for field in dataclasses.fields(PairTable)})

    def source_ids(self) -> np.ndarray:
        """[pairs] index into labels."""
        return self._column("source")

    def places(self, indices) -> list[str]:
        """File and row of the given pairs."""
        return self.dataset.with_format(None, columns=["place"])[list(indices)]["place"]

    def margins(self) -> np.ndarray:
        """[pairs] float32, NaN where a row has none."""
        return np.array(self.dataset.with_format("arrow", columns=["margin"])[:]["margin"])

    def _column(self, name: str) -> np.ndarray:
        return np.array(self.dataset.with_format("arrow", columns=[name])[:][name]).astype(np.int64)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all sequences start with, leaving each at least one of its own: its last, where its reward is read."""
    length = min(len(sequence) for sequence in sequences) - 1
    for sequence in sequences[1:]:
        differs = np.flatnonzero(sequence[:length] != sequences[0][:length])
        length = int(differs[0]) if len(differs) else length
    return length
