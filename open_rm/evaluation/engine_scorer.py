"""The model that is being trained, in the place of an opened one: a Scorer whose rewards the engine computes, on all ranks.

So the rows of a benchmark are read, rendered, encoded and laid out by the code that judges a saved folder.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_rm.batching.layouts import lay_out_sequences
from open_rm.batching.rules import BatchRules
from open_rm.model import families
from open_rm.model.contract import Contract
from open_rm.model.reward_model import RewardModel
from open_rm.ranks import Ranks, all_reduce_sum
from open_rm.scoring.computing import Facts, MicroBatch
from open_rm.scoring.open_model import Recipe, positions_of
from open_rm.scoring.scorer import Scorer, SequenceRules


class EngineComputer:
    """Micro-batches dealt to ranks in turn. Every rank makes the same calls, since under ZeRO-3 each is a collective one.

    rewards_of: batch inputs (layouts.Batch.inputs) to rewards [N], in evaluation mode.
    """

    def __init__(self, rewards_of: Callable[..., torch.Tensor], known: "InTraining", facts: Facts):
        self.facts = facts
        self._rewards_of, self._known = rewards_of, known

    @torch.no_grad()
    def rewards(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """[n] float32 of each micro-batch, in their order, on every rank. A collective call."""
        ranks, ends = self._known.ranks, np.cumsum([len(batch.sequences) for batch in batches])
        found = torch.zeros(int(ends[-1]) if len(ends) else 0, device=ranks.device)
        for start in range(0, len(batches), ranks.data_size):
            number = start + ranks.data_rank
            # a rank that has none left computes the last one again, and it does not count
            batch = batches[min(number, len(batches) - 1)]
            rewards = self._computed(batch)
            if number < len(batches) and ranks.counts:
                found[ends[number] - len(batch.sequences) : ends[number]] = rewards
        found = all_reduce_sum(found).cpu().numpy()
        return np.split(found, ends[:-1]) if len(ends) else []

    def _computed(self, batch: MicroBatch) -> torch.Tensor:
        rules, model = self._known.rules, self._known.model
        how = {"pad_token_id": rules.pad_token_id, "prompt_of": batch.prompt_of}
        inputs = lay_out_sequences(batch.layout or rules.layout, batch.sequences, **how).inputs(
            self._known.ranks.device
        )
        otherwise = batch.layout == "padded" and rules.layout != "padded"
        with model.padded_rows() if otherwise else contextlib.nullcontext():
            return self._rewards_of(**inputs).float()

    def close(self) -> None:
        """The engine goes on."""


@dataclass(frozen=True)
class InTraining:
    """What is known of the model that is trained: all that a Scorer over its engine needs besides the engine.

    contract: how its folder will have to be read.  rules: of evaluation.
    """

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    contract: Contract
    rules: BatchRules
    ranks: Ranks

    def scorer(self, rewards_of: Callable[..., torch.Tensor], *, name: str, max_token_length: int) -> Scorer:
        """The Scorer; its calls are collective.

        Args:
            rewards_of: see EngineComputer.
            name: of the model, for sentences.  max_token_length: most tokens of a sequence; what has more is cut to it.
        """
        longest = self._longest(max_token_length)
        positions, rows = positions_of(self.classifier), self.classifier.get_input_embeddings().num_embeddings
        most = self.rules.of_group(self.ranks.sequence_size).max_tokens
        facts = Facts(most, rows, positions, [], str(self.ranks.device), None)
        layout, pad = self.rules.layout, self.rules.pad_token_id
        rules = SequenceRules(
            chat=self.contract.chat,
            ending=self.contract.ending,
            ours=True,
            max_token_length=longest,
            rows=rows,
            cut_to=(longest, longest),
            apart_at=self._rope.get("original_max_position_embeddings", 0) if self._turns_longrope else 0,
            # encoders read the reward where their own pooling does
            skipped=None if self.classifier.config.model_type in families.ENCODERS else pad,
        )
        computer = EngineComputer(rewards_of, self, facts)
        recipe = Recipe("", layout, self.contract.dtype, pad, base=None, code=False)
        return Scorer(name, computer, recipe, self.tokenizer, rules, lines=[], fingerprint="")

    @property
    def classifier(self) -> PreTrainedModel:
        """What is inside, for its config and its sizes."""
        return self.model.classifier

    def _longest(self, wanted: int) -> int:
        """Most tokens of a sequence that are computed, and computed exactly."""
        text = self.classifier.config.get_text_config()
        most = min(wanted, positions_of(self.classifier) or wanted)
        if self.rules.layout != "padded" and self._rope.get("rope_type") in ("dynamic", "longrope"):
            # beyond it the frequencies follow from the longest sequence of a row
            most = min(most, self._rope.get("original_max_position_embeddings") or text.max_position_embeddings)
        return most

    @property
    def _rope(self) -> dict:
        return getattr(self.classifier.config.get_text_config(), "rope_parameters", None) or {}

    @property
    def _turns_longrope(self) -> bool:
        return self._rope.get("rope_type") == "longrope"
