"""A scorer without a model, for tests of what stands around one: real token ids, rewards that are a function of them."""

import hashlib
from collections.abc import Callable

import numpy as np

from open_rm.data import encoding
from open_rm.data.tokenizer import ending

WORDS = [
    "river",
    "meadow",
    "orchard",
    "harbor",
    "lantern",
    "copper",
    "gloomy",
    "joyful",
    "quiet",
    "bright",
    "walks",
    "sounds",
    "looks",
]


def words(number: int, count: int = 4) -> str:
    """A few words, others for each number."""
    return " ".join(WORDS[(number * 7 + k * (number + 3)) % len(WORDS)] for k in range(count))


def reward_of(ids) -> np.float32:
    """A number of its own for each sequence, with all the digits that a float32 may have."""
    digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()
    return np.float32(int.from_bytes(digest[:4], "little") / 2**31 - 1) * np.float32(10)


class StandIn:
    """The interface of scoring.scorer.Scorer. before: called with the sequences of each call before they are scored."""

    def __init__(
        self,
        tokenizer,
        *,
        chat: bool,
        max_token_length: int = 100_000,
        cut_to: tuple[int, int] | None = None,
        machine: dict | None = None,
        name: str = "stand-in",
        reward=reward_of,
        before: Callable = lambda sequences: None,
    ):
        self.tokenizer, self.chat, self.max_token_length, self.name = tokenizer, chat, max_token_length, name
        self.ending, self.fingerprint, self.lines = ending(tokenizer), f"weights of {name}", [name]
        self.cut_to, self.rows = cut_to or (max_token_length, max_token_length), len(tokenizer)
        self.machine = {"device": "stand-in"} | (machine or {})
        self.reward, self.before = reward, before

    def encode_texts(self, texts):
        return encoding.encode(self.tokenizer, texts, chat=self.chat)

    def complete(self, prompt: str, answer: str) -> str:
        return encoding.render_pair(self.tokenizer, prompt, answer, answer).chosen

    def rewards(self, sequences, prompt_of=None) -> np.ndarray:
        assert prompt_of is None or len(prompt_of) == len(sequences)
        assert all(0 < len(ids) <= self.max_token_length for ids in sequences)
        self.before(sequences)
        return np.array([self.reward(ids) for ids in sequences], np.float32)

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
