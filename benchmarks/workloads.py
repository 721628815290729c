"""What the benchmarks train on: models of given shapes with random weights, a tokenizer, and pairs of real lengths."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from open_rm.data.building import load_preference_data
from open_rm.data.pairs import PreferenceData
from open_rm.data.templates import read_template
from open_rm.flags import DataFlags

VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, query heads, key/value heads, MLP width."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int


SHAPES = {
    "6x384": Shape(6, 384, 6, 6, 1024),
    "1B": Shape(16, 2048, 32, 8, 8192),  # Llama 3.2 1B
    # Llama 3.1 8B, a quarter of its layers: with all 32 the float32 optimizer state alone exceeds one device
    "8B/4": Shape(8, 4096, 32, 8, 14336),
    "tiny": Shape(2, 64, 4, 2, 128),
}


@dataclass(frozen=True)
class Workload:
    """name; rows as dicts with chosen, rejected (and prompt); by_prompt: several pairs share a prompt."""

    name: str
    rows: list[dict]
    by_prompt: bool


def real(folder: Path, pairs: int, seed: int, by_prompt: bool) -> Workload:
    """About `pairs` rows of a data folder's train.jsonl: random ones, or all rows of random prompts."""
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = random.Random(seed)
    if not by_prompt:
        return Workload(folder.name, rng.sample(rows, min(pairs, len(rows))), False)
    prompts: dict[str, list[dict]] = {}
    for row in rows:
        prompts.setdefault(json.dumps(row["prompt"]), []).append(row)
    chosen: list[dict] = []
    for key in rng.sample(sorted(prompts), len(prompts)):
        if len(chosen) < pairs:
            chosen += prompts[key]
    return Workload(folder.name, chosen, True)


def behind(load: Workload, text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Workload:
    """The same pairs behind the first `tokens` tokens of a text: as a system message, or in front of both sides."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"the header has {len(ids)} tokens and not {tokens}")
    header = tokenizer.decode(ids[:tokens])

    def row_of(row: dict) -> dict:
        if isinstance(row.get("prompt"), list):
            return row | {"prompt": [{"role": "system", "content": header}, *row["prompt"]]}
        fields = ("prompt",) if "prompt" in row else ("chosen", "rejected")
        return row | {name: header + row[name] for name in fields}

    return Workload(f"{load.name}_behind_{tokens}", [row_of(row) for row in load.rows], load.by_prompt)


def long_prompts(pairs: int, seed: int, words: int = 2000) -> Workload:
    """A long document as the prompt, two short answers."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(3000)]

    def text(count: int) -> str:
        return " ".join(rng.choices(vocabulary, k=count))

    rows = []
    for _ in range(pairs):
        prompt = text(rng.randint(words // 2, words))
        rows.append(
            {"prompt": prompt + " ", "chosen": text(rng.randint(20, 120)), "rejected": text(rng.randint(20, 120))}
        )
    return Workload("long_prompts", rows, False)


def equal_lengths(pairs: int, seed: int, words: int = 120) -> Workload:
    """Nothing to gain: all sides of one length, nothing shared from the first token on."""
    rng = random.Random(seed)
    vocabulary = [chr(ord("a") + i) + chr(ord("a") + j) for i in range(26) for j in range(26)]

    def text(first: str) -> str:
        return " ".join([first, *rng.choices(vocabulary, k=words - 1)])

    return Workload("equal_lengths", [{"chosen": text("aa"), "rejected": text("zz")} for _ in range(pairs)], False)


def conversations(pairs: int, seed: int, words: int = 60) -> Workload:
    """A text that both sides begin with, and two answers: what hh_harmless is, made up, for where that is absent."""
    text = _words_of(seed)
    rows = []
    for _ in range(pairs):
        said = text(words // 3, words)
        rows.append({"chosen": f"{said} {text(3, words // 4)}", "rejected": f"{said} {text(3, words // 4)}"})
    return Workload("conversations", rows, False)


def many_answers(pairs: int, seed: int, words: int = 40) -> Workload:
    """Prompts with three answers each, in three pairs: what alpaca_eval is, made up."""
    text = _words_of(seed)
    rows = []
    while len(rows) < pairs:
        prompt, answers = text(words // 4, words) + " ", [text(3, words) for _ in range(3)]
        for better, worse in ((0, 1), (0, 2), (1, 2)):
            rows.append({"prompt": prompt, "chosen": answers[better], "rejected": answers[worse]})
    return Workload("many_answers", rows[:pairs], True)


def _words_of(seed: int):
    """A function (least, most words) -> text of made-up words."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(3000)]
    return lambda least, most: " ".join(rng.choices(vocabulary, k=rng.randint(least, most)))


def make_tokenizer(workloads: list[Workload]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8 K tokens trained on the rows (words of `equal_lengths` are single tokens by themselves)."""

    def texts():
        for workload in workloads:
            for row in workload.rows:
                for value in row.values():
                    yield from (
                        [value]
                        if isinstance(value, str)
                        else (m["content"] for m in value if isinstance(m, dict))
                        if (isinstance(value, list))
                        else []
                    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    fast.chat_template = read_template("tulu")
    return fast


def config_of(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape as a config of transformers."""
    return LlamaConfig(
        vocab_size=max(VOCABULARY, len(tokenizer)),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        dtype=torch.bfloat16 if shape.width >= 2048 else torch.float32,
    )


def write_model(
    folder: Path, shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int = 0, device: str = "cpu"
) -> None:
    """A causal model of the shape with random weights, and the tokenizer, as a folder that both trainers load.

    device: where the weights are drawn; two thousand million of them take half a minute on a CPU.
    """
    torch.manual_seed(seed)
    config = config_of(shape, tokenizer)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(config.dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, workload: Workload) -> Path:
    """The rows as a jsonl file."""
    path = folder / f"{workload.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in workload.rows), encoding="utf-8")
    return path


def read_pairs(
    rows: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, *, max_token_length: int, amount: str = "1.0"
) -> PreferenceData:
    """The rows of a file as the recipe reads them."""
    flags = DataFlags(
        dataset_mixer_list=[str(rows), amount],
        dataset_local_cache_dir=str(cache),
        max_token_length=max_token_length,
        max_prompt_token_length=max_token_length,
    )
    return load_preference_data(flags, tokenizer)
