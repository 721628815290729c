"""A small model, tokenizer and preference set made from a seed, so that the recipe runs anywhere, without a network.

The preference: the prompt asks for a mood (cheerful or gloomy, named by one of several words) about a topic; the chosen
answer has that mood, the rejected one the other. Three prompts in four ask for the cheerful one, so a model that reads
answers alone stops near 73 % accuracy; the rest takes reading prompt and answer together. The longer answer is the
chosen one in every second pair, so length alone predicts nothing (50 %). As with people, one label in twenty is the
wrong way round: about 95 % is the best held-out accuracy.

Held out are prompts, one in five of the 1800 that the words allow: a prompt is a topic, a phrasing and a mood word, and
for each topic and phrasing one of a mood's five words is never in the training data. Its words, and any two of the three
together, are there; the three together are new. Held-out answers are new draws of the same words.

    python -m open_rm.toy --folder output/toy
"""

import hashlib
import json
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from open_rm.data.templates import read_template

REQUESTS = {
    "cheerful": ("cheerful", "happy", "bright", "joyful", "sunny"),
    "gloomy": ("gloomy", "sad", "dark", "bitter", "bleak"),
}
ANSWERS = {
    "cheerful": ("glad", "laughing", "warm", "golden", "sweet", "lovely", "smiling", "playful", "gentle", "merry"),
    "gloomy": ("grey", "weeping", "cold", "broken", "sour", "dreary", "frowning", "tired", "harsh", "lonely"),
}
CHEERFUL_SHARE = 0.75  # at one half, nothing about an answer alone hints at its reward, and learning takes far longer
WRONG_LABEL_SHARE = 0.05
MOST_SENTENCES = 4  # of an answer
TOPICS = (  # noqa: SIM905 - a sentence is easier to edit than a list
    "lake river garden street kitchen market harbour forest window bridge station library mountain village school winter "
    "summer evening morning train letter song neighbour bakery island museum tower meadow engine orchard"
).split()
ASKS = (
    "Write a {mood} line about the {topic}.",
    "Tell me something {mood} on the {topic}.",
    "The {topic}: make it {mood}.",
    "I want a {mood} note on the {topic}.",
    "How {mood} is the {topic}?",
    "Describe the {topic} in a {mood} way.",
)
OPENERS = ("Today", "As always,", "Once more", "Here", "From afar", "After the rain", "At noon", "In the end,")
VERBS = ("looks", "seems", "sounds", "feels", "stays", "grows")
FILLERS = (
    "while people walk by", "and the clock strikes four", "as a dog crosses the road", "under the old roof",
    "near the second gate", "with a chair beside it", "and nobody counts the stones", "when the post arrives",
)  # fmt: skip


def make_pairs(count: int, seed: int, *, held_out: bool = False) -> list[dict]:
    """Preference rows: `prompt`, `chosen` and `rejected` as lists of messages."""
    rng = random.Random(2 * seed + held_out)  # a seed's held-out rows are no repetition of its training rows
    rows = []
    for number in range(count):
        wanted, other = ("cheerful", "gloomy") if rng.random() < CHEERFUL_SHARE else ("gloomy", "cheerful")
        topic, prompt = _prompt(rng, wanted, held_out)
        if rng.random() < WRONG_LABEL_SHARE:
            wanted, other = other, wanted
        chosen, rejected = _answers(rng, topic, (wanted, other), longer_first=number % 2 == 0)
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def _prompt(rng: random.Random, mood: str, held_out: bool) -> tuple[str, str]:
    """A topic, and a prompt about it that is, or is not, a held-out one."""
    topic, ask = rng.randrange(len(TOPICS)), rng.randrange(len(ASKS))
    words = list(REQUESTS[mood])
    held_out_word = words.pop((topic + ask) % len(words))  # the sum: each word for some topics of each phrasing
    word = held_out_word if held_out else rng.choice(words)
    return TOPICS[topic], ASKS[ask].format(mood=word, topic=TOPICS[topic])


def _answers(rng: random.Random, topic: str, moods: tuple[str, str], *, longer_first: bool) -> list[str]:
    """A text of each mood."""
    # Sorted before the words of a mood are in: the length is no mood's.
    frames = sorted((_frame(rng, topic) for _ in moods), key=len, reverse=longer_first)
    return [
        frame.format(*rng.choices(ANSWERS[mood], k=MOST_SENTENCES)) for frame, mood in zip(frames, moods, strict=True)
    ]


def _frame(rng: random.Random, topic: str) -> str:
    """Sentences that leave a gap for the word of a mood."""
    sentences = []
    for _ in range(rng.randint(1, MOST_SENTENCES)):
        words = [rng.choice(OPENERS), "the", topic, rng.choice(VERBS), "{}"]
        words += [rng.choice(FILLERS)] * rng.randint(0, 1)
        sentences.append(" ".join(words) + ".")
    return " ".join(sentences)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts, with bos, eos, pad and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    fast.chat_template = read_template("tulu")
    return fast


def make_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, about half a million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


@dataclass(frozen=True)
class ToyArgs:
    """Write the toy model and preference set: <folder>/model, <folder>/data/train.jsonl and test.jsonl."""

    folder: str = "output/toy"
    """Where to write; what is there already is kept when it is complete."""
    train_pairs: int = 6000
    """Training pairs."""
    test_pairs: int = 500
    """Held-out pairs, of prompts that no training pair has."""
    seed: int = 1
    """Decides every word and weight."""


def main(args: ToyArgs) -> None:
    """Write model, tokenizer and data. Processes that share the folder, on several machines too, may do it at once."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports deepspeed, which would look for a GPU and warn
    disable_progress_bar()
    folder = Path(args.folder)
    marker = folder / "made.json"
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # what another version made is made again
    recipe = json.dumps({"train": args.train_pairs, "test": args.test_pairs, "seed": args.seed, "made_by": made_by})

    def is_made() -> bool:
        return marker.is_file() and marker.read_text() == recipe

    if is_made():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making_") as making:
        made = Path(making)
        _make(args, made)
        if not is_made():  # another process may have been faster
            marker.unlink(missing_ok=True)  # while files of two recipes may lie side by side
            put(made, folder)
            (made / "made.json").write_text(recipe)
            (made / "made.json").replace(marker)


def _make(args: ToyArgs, folder: Path) -> None:
    splits = {
        "train": make_pairs(args.train_pairs, args.seed),
        "test": make_pairs(args.test_pairs, args.seed, held_out=True),
    }
    (folder / "data").mkdir()
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    words = [
        " ".join(message["content"] for key in ("prompt", "chosen", "rejected") for message in row[key])
        for row in splits["train"]
    ]
    tokenizer = make_tokenizer([*words, "<|user|>\n<|assistant|>\n<|system|>\n"])
    make_model(len(tokenizer), args.seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def put(made: Path, folder: Path) -> None:
    """Move the files below made to the same places below folder, each by one rename; one that is there already stays as it
    is. So a process that has finished may read all of them while another, which made the same, is at it."""
    for file in sorted(made.rglob("*")):
        if not file.is_file():
            continue
        place = folder / file.relative_to(made)
        if place.is_file() and place.read_bytes() == file.read_bytes():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)


if __name__ == "__main__":
    main(tyro.cli(ToyArgs, use_underscores=True))
