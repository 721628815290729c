"""A reward model that is open: token ids, texts or conversations in, rewards out.

A reward does not depend on what else is asked for, on the size of micro-batches or on the number of processes: each
sequence sees itself alone, and only the order of sums changes (within 1e-5 in float32). The same call gives the same bits.
Shapes: N sequences.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_rm.data import encoding
from open_rm.errors import UserError
from open_rm.scoring.computing import Computer, MicroBatch
from open_rm.scoring.open_model import OWN, Recipe
from open_rm.scoring.planning import plan
from open_rm.scoring.processes import Workers


@dataclass(frozen=True)
class SequenceRules:
    """How sequences have to look, and where their reward is read.

    chat: whether conversations are rendered by the chat template, which writes all special tokens.
    ending: what plain text ends with.  ours: encoded as training encodes, where repeated BOS and EOS are one; else as the
        tokenizer does it.
    max_token_length: most tokens.  apart_at: sequences of more tokens than this and others cannot be computed in the same
        rows (rotary embeddings that change there); 0: none.
    rows: token ids are below it.
    cut_to: most tokens of a sequence and of a prompt where both are cut as training did.
    skipped: id that is passed over from the end of a sequence to where the reward is read; None: it is read at the end.
    """

    chat: bool
    ending: str
    ours: bool
    max_token_length: int
    rows: int
    cut_to: tuple[int, int]
    apart_at: int = 0
    skipped: int | None = None


class Scorer:
    """See the module; opening.open_scorer makes it. A context manager that ends its processes.

    name: what the user named.  lines: for the log, what was opened as what.
    tokenizer: of the folder; pads on the right.
    chat: trained on conversations (contract.json), or somebody's model with a chat template.
    ending: what plain text has to end with.
    max_token_length: most tokens of a sequence.
    cut_to: most tokens of a sequence and of a prompt where both are cut as training did.
    rows: token ids are below it.
    fingerprint: changes with whatever decides a reward: weights, code, tokenizer, dtype.
    machine: name, as a refusal says it -> value, of what decides a reward's last digits besides.
    folder: that was opened.  layout: how sequences lie in memory.  dtype: that is computed in.
    """

    def __init__(
        self,
        name: str,
        computer: Computer | Workers,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        rules: SequenceRules,
        *,
        lines: list[str],
        fingerprint: str,
    ):
        self.name, self.tokenizer, self.lines, self.fingerprint = name, tokenizer, lines, fingerprint
        self.chat, self.ending, self.max_token_length = rules.chat, rules.ending, rules.max_token_length
        self.cut_to, self.rows = rules.cut_to, rules.rows
        facts = computer.facts
        self.machine = {"device": facts.device, "number of threads": facts.threads}
        self.machine |= {"--max_tokens_per_micro_batch": facts.max_tokens}
        self.folder, self.layout, self.dtype = recipe.folder, recipe.layout, recipe.dtype
        self._computer, self._recipe, self._rules = computer, recipe, rules
        self._one_call = threading.Lock()

    def encode_conversations(
        self, conversations: Sequence[list[dict]], template: dict | None = None
    ) -> list[list[int]]:
        """Token ids of conversations, answer included, as training encodes them.

        template: tools and further variables for the chat template.

        Raises:
            UserError: there is no chat template, or it refuses one of them.
        """
        texts = encoding.render_conversations(self.tokenizer, conversations, template or {})
        for mistake in texts:
            if isinstance(mistake, UserError):
                raise mistake
        return encoding.encode(self.tokenizer, texts, chat=True)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of complete texts: conversations that were rendered, or plain text with its ending."""
        if self.chat or self._rules.ours:
            return encoding.encode(self.tokenizer, texts, chat=self.chat)
        return self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []

    def complete(self, prompt: str, answer: str) -> str:
        """Plain text as in training, its ending included.

        Raises:
            UserError: the model was trained on conversations.
        """
        if self.chat:
            raise UserError(
                f"{self.name} scores conversations, and this is plain text; give it messages, or a prompt and an answer as such"
            )
        if not self._rules.ours:
            return prompt + answer
        return encoding.render_pair(self.tokenizer, prompt, answer, answer).chosen

    def rewards(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_of: Sequence[int] | None = None,
        *,
        max_tokens: int | None = None,
        padded: bool = False,
    ) -> np.ndarray:
        """[N] float32, in order.

        Args:
            sequences: token ids, each at most max_token_length.
            prompt_of: [N] equal where sequences begin with the same prompt; None: what they have in common is looked for.
            max_tokens: most positions of a micro-batch, to see that rewards do not depend on it; None: as the model was opened.
            padded: in padded rows, to see the same, whatever the layout that the model was opened for.

        Raises:
            UserError: a sequence that is empty, too long, or has ids that the model has not; a worker that ended.
        """
        checked = [self._checked(number, sequence) for number, sequence in enumerate(sequences)]
        distinct: dict[bytes, int] = {}
        place = [distinct.setdefault(sequence.tobytes(), len(distinct)) for sequence in checked]
        _, first = np.unique(place, return_index=True)
        unique = [checked[i] for i in first]
        prompts = None if prompt_of is None else [prompt_of[i] for i in first]
        layout = "padded" if padded or self._recipe.layout == OWN else self._recipe.layout
        most = 1 if self._recipe.one_by_one else max_tokens or self._computer.facts.max_tokens
        with self._one_call:
            return self._rewards(unique, prompts, layout, most)[place]

    def _checked(self, number: int, sequence: Sequence[int]) -> np.ndarray:
        """[T] int64: the sequence up to where its reward is read."""
        most = self.max_token_length
        try:
            ids = np.asarray(sequence)
        except ValueError:  # lists in it, of several lengths
            ids = np.zeros((0, 0))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UserError(f"sequence {number} is no list of token ids")
        if not 0 < len(ids) <= most:
            raise UserError(f"sequence {number} has {ids.size} tokens, and {self.name} takes from 1 to {most}")
        if ids.min() < 0 or ids.max() >= self.rows:
            raise UserError(
                f"sequence {number} has the token id {ids.min() if ids.min() < 0 else ids.max()}, and {self.name} knows those "
                f"from 0 to {self.rows - 1}"
            )
        if self._rules.skipped is not None and ids[-1] == self._rules.skipped:
            kept = np.flatnonzero(ids != self._rules.skipped)
            ids = ids[: kept[-1] + 1 if len(kept) else 1]
        return ids.astype(np.int64)

    def _rewards(
        self, sequences: list[np.ndarray], prompts: Sequence[int] | None, layout: str, most: int
    ) -> np.ndarray:
        parts = plan(sequences, prompts, layout=layout, max_tokens=most, apart_at=self._rules.apart_at)
        batches = [MicroBatch([sequences[i] for i in part.members], part.prompt_of, layout) for part in parts]
        rewards = np.zeros(len(sequences), np.float32)
        for part, of_part in zip(parts, self._computer.rewards(batches), strict=True):
            rewards[part.members] = of_part
        return rewards

    def close(self) -> None:
        """End worker processes, where there are any."""
        self._computer.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_) -> None:
        self.close()
