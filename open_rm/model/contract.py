"""What a client of a saved folder has to know besides its weights: contract.json in it.

Written at saving (publishing/saving.py); read by whoever opens the folder: the proof, scoring, export.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from open_rm.data import tokenizer as tokenizers
from open_rm.flags import AdapterFlags, DataFlags

CONTRACT = "contract.json"


@dataclass(frozen=True)
class RewardStatistics:
    """Of the rewards of held-out pairs, both answers of each, as the saved model gives them.

    mean, std: over all rewards; (reward - mean) / std is normalised.
    temperature: T with which sigmoid((r_a - r_b) / T) fits the pairs best; None where none does, and no_temperature says why.
    pairs: how many there were.
    """

    mean: float
    std: float
    temperature: float | None
    pairs: int
    no_temperature: str | None = None


@dataclass(frozen=True)
class Contract:
    """How the folder has to be read, as contract.json in it says.

    chat: trained on conversations, which the chat template renders with all special tokens; else on plain text.
    ending: what plain text has to end with; its last token is scored.
    adapter: trained as an adapter.  merged: the folder holds the sum of it and its base, a whole model.
    dtype: that was computed in: an adapter's base is loaded in it; a whole model's config says its own.
    load_in_4bit: the adapter's base is held in 4 bits (NF4, double quantization); false in the folder of a merged one, whose
        weights are whole.
    trust_remote_code: the model brings Python code of its own.
    statistics: of held-out rewards; None where there are none.
    max_token_length, max_prompt_token_length: what training cut or filtered a side and its prompt to; None in folders of
        older versions.
    """

    chat: bool
    ending: str
    adapter: bool = False
    merged: bool = False
    dtype: str = "float32"
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    statistics: RewardStatistics | None = None
    max_token_length: int | None = None
    max_prompt_token_length: int | None = None

    @classmethod
    def of(
        cls,
        flags: AdapterFlags,
        data: DataFlags,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool,
        dtype: torch.dtype,
        code: bool,
    ) -> "Contract":
        """The contract of a run. code: --trust_remote_code."""
        return cls(
            chat=chat,
            ending=tokenizers.ending(tokenizer),
            adapter=flags.use_peft,
            merged=flags.merge_adapter,
            dtype=str(dtype).removeprefix("torch."),
            load_in_4bit=flags.load_in_4bit,
            trust_remote_code=code,
            max_token_length=data.max_token_length,
            max_prompt_token_length=data.max_prompt_token_length,
        )

    def write(self, folder: str | Path) -> None:
        """Into a folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (Path(folder) / CONTRACT).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "Contract":
        """That of a folder saved here."""
        return cls.from_json(json.loads((Path(folder) / CONTRACT).read_text(encoding="utf-8")))

    @classmethod
    def from_json(cls, said: dict) -> "Contract":
        """From what `dataclasses.asdict` made of one, of an older version too.

        Raises:
            ValueError, TypeError: it is no contract.
        """
        if not isinstance(said, dict):
            raise ValueError("it is not an object")
        numbers = said.get("statistics")
        return cls(**said | {"statistics": RewardStatistics(**numbers) if numbers else None})

    @property
    def holds_adapter(self) -> bool:
        """Whether a client needs the base model besides."""
        return self.adapter and not self.merged

    def base(self) -> dict:
        """How an adapter's base is loaded (adapters.load, adapters.merge)."""
        return {name: getattr(self, name) for name in ("dtype", "load_in_4bit", "trust_remote_code")}
