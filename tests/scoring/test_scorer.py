"""Rewards of a Scorer are those of plain transformers one by one, whatever is asked for beside them and whoever computes.

Tolerance: float32 sums in another order, at rewards of up to 3.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import types

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import OpeningFlags
from open_rm.scoring import computing, processes
from open_rm.scoring.opening import open_scorer

TOLERANCE = 1e-5
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=640)
SMALL |= {"max_position_embeddings": 128}
GQA = SMALL | {"num_key_value_heads": 1}
PAD = 3
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
FAMILIES = {
    "llama": ("LlamaConfig", GQA),
    "qwen2": ("Qwen2Config", GQA),
    "gemma2": ("Gemma2Config", GQA | {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 1.0}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "phi3 longrope": (
        "Phi3Config",
        GQA | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 30},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 640, "n_positions": 128}),
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", SMALL),
}
LAYOUT = dict.fromkeys(("llama", "qwen2", "gemma2", "gpt_neox"), "shared_prefix") | {"phi3 longrope": "padded"}


def classifier(folder, tokenizer, kind: str = "LlamaConfig", **config) -> None:
    """Somebody's reward model: a head with weights of order one, and the toy's tokenizer beside it."""
    config = getattr(transformers, kind)(**{"num_labels": 1, "pad_token_id": PAD} | config)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("score.", "classifier.")):
                parameter.normal_(std=0.3)
            elif parameter.dim() > 1:
                parameter.mul_(5)  # so that positions and neighbours would show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def some_sequences(seed: int = 0) -> list[list[int]]:
    """Prompts with several answers each and a few without any, from 1 to 60 tokens, in no order; one stands there twice."""
    rng = np.random.default_rng(seed)
    found = [rng.integers(5, 640, size).tolist() for size in (1, 2, 31, 60)]
    for _ in range(4):
        prompt = rng.integers(5, 640, rng.integers(9, 25)).tolist()
        found += [prompt + rng.integers(5, 640, rng.integers(1, 30)).tolist() for _ in range(4)]
    return [found[i] for i in rng.permutation(len(found))] + found[-1:]


SEQUENCES = some_sequences()


@torch.no_grad()
def plain(folder, sequences=SEQUENCES, **how) -> np.ndarray:
    """Rewards by transformers itself, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **{"dtype": "float32"} | how).eval()
    return np.array([model(input_ids=torch.tensor([ids])).logits.float().item() for ids in sequences])


@pytest.fixture(scope="module")
def folders(toy, tmp_path_factory):
    """The folder of a family's classifier, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name: str = "llama", **changes) -> str:
        key = f"{name} {sorted(changes.items())}"
        if key not in made:
            made[key] = str(root / str(len(made)))
            kind, sizes = FAMILIES[name]
            classifier(made[key], load_tokenizer(str(toy / "model")), kind, **sizes | changes)
        return made[key]

    return folder


def opened(folder, **flags):
    return open_scorer(OpeningFlags(model=str(folder), **flags))


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_equal_plain_transformers_one_by_one(name, folders):
    scorer = opened(folders(name), max_tokens_per_micro_batch=200)
    said = LAYOUT.get(name, "its own forward on padded rows")
    assert any(f"batching: {said}" in line for line in scorer.lines), scorer.lines
    expected = plain(folders(name))
    assert np.std(expected) > 0.1
    rewards = scorer.rewards(SEQUENCES)
    assert rewards.dtype == np.float32
    assert rewards == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_neighbours_order_and_micro_batches_change_nothing(name, folders):
    rewards = opened(folders(name)).rewards(SEQUENCES)
    scorer = opened(folders(name), max_tokens_per_micro_batch=70)
    assert scorer.rewards(SEQUENCES) == pytest.approx(rewards, abs=TOLERANCE)
    for how in ({"max_tokens": 1}, {"max_tokens": 150}, {"padded": True}, {}):
        assert scorer.rewards(SEQUENCES, **how) == pytest.approx(rewards, abs=TOLERANCE)
    order = np.random.default_rng(1).permutation(len(SEQUENCES))
    assert scorer.rewards([SEQUENCES[i] for i in order]) == pytest.approx(rewards[order], abs=TOLERANCE)
    alone = [scorer.rewards([ids])[0] for ids in SEQUENCES]
    assert alone == pytest.approx(rewards.tolist(), abs=TOLERANCE)
    for prompt_of in ([0] * len(SEQUENCES), range(len(SEQUENCES)), [len(ids) % 3 for ids in SEQUENCES]):
        assert scorer.rewards(SEQUENCES, prompt_of) == pytest.approx(rewards, abs=TOLERANCE)


def test_the_same_call_gives_the_same_bits(folders):
    first, again = (opened(folders(), max_tokens_per_micro_batch=100) for _ in range(2))
    rewards = first.rewards(SEQUENCES)
    assert np.array_equal(rewards, first.rewards(SEQUENCES))
    assert np.array_equal(rewards, again.rewards([np.array(ids, np.int32) for ids in SEQUENCES]))


def test_of_no_sequences_there_are_no_rewards(folders):
    rewards = opened(folders()).rewards([])
    assert rewards.shape == (0,) and rewards.dtype == np.float32


# ---------------------------------------------------------------- where the reward is read

EOS = 1
ENDS_IN_PADS = [*SEQUENCES[:6], *([*ids, EOS] for ids in SEQUENCES[:3]), [7, 8, EOS, EOS], [EOS, 9, EOS, 9], [EOS, EOS]]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_where_the_pad_is_the_end_token_rewards_are_read_where_transformers_reads_them(name, folders):
    folder = folders(name, pad_token_id=EOS, eos_token_id=EOS)
    scorer = opened(folder)
    assert scorer.rewards(ENDS_IN_PADS) == pytest.approx(plain(folder, ENDS_IN_PADS), abs=TOLERANCE)
    told = any("its pad is its end token" in line for line in scorer.lines)
    assert told == (name != "gpt2")  # which is called as it is


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_pad_the_last_token_is_read(name, folders):
    folder = folders(name, pad_token_id=None)
    scorer = opened(folder)
    assert scorer.rewards(ENDS_IN_PADS) == pytest.approx(plain(folder, ENDS_IN_PADS), abs=TOLERANCE)
    assert any("one by one" in line for line in scorer.lines) == (name == "gpt2")


BIASED = """
from torch import nn
from transformers import LlamaForSequenceClassification
class BiasedForSequenceClassification(LlamaForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=True)
        self.post_init()
"""


@pytest.fixture(scope="module")
def biased(folders, tmp_path_factory):
    """A Llama whose head has a bias, which only the code in its folder knows."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    shutil.copytree(folders(), folder)
    (folder / "biased.py").write_text(BIASED)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "biased.BiasedForSequenceClassification"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.bias": torch.tensor([2.5])}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_head_with_a_bias_is_computed_by_the_code_that_knows_it(biased, folders):
    scorer = opened(biased, trust_remote_code=True)
    assert any("its class is code that it brings along" in line for line in scorer.lines)
    rewards = scorer.rewards(SEQUENCES)
    assert rewards == pytest.approx(plain(biased, trust_remote_code=True), abs=TOLERANCE)
    assert rewards == pytest.approx(plain(folders()) + 2.5, abs=TOLERANCE)


def test_a_head_that_the_class_does_not_use_is_refused(biased, tmp_path):
    with pytest.raises(UserError, match=r"brings a classifier of its own \(biased.Biased.*pass --trust_remote_code"):
        opened(biased)
    shutil.copytree(biased, tmp_path / "without")
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "without" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"LlamaForSequenceClassification does not use score.bias.* --trust_remote_code"
    ):
        opened(tmp_path / "without")
    with pytest.raises(UserError, match="--batching packed is not possible: its class is code"):
        opened(biased, trust_remote_code=True, batching="packed")


def test_bfloat16_is_within_its_rounding_of_transformers_in_bfloat16(folders):
    rewards = opened(folders(), dtype="bfloat16").rewards(SEQUENCES)
    expected = plain(folders(), dtype="bfloat16")
    # 8 bits in every layer, in both; a client rounds the reward itself besides
    assert rewards == pytest.approx(expected, abs=5e-2 * np.abs(expected).max())
    assert np.abs(rewards - plain(folders())).max() > TOLERANCE


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("sequence", "said"),
    [
        ([], "sequence 1 has 0 tokens, and .* takes from 1 to 128"),
        ([5] * 129, "sequence 1 has 129 tokens, and .* takes from 1 to 128"),
        ([5, 640], "sequence 1 has the token id 640, and .* knows those from 0 to 639"),
        ([-1, 5], "sequence 1 has the token id -1"),
        ([5, 0.5], "sequence 1 is no list of token ids"),
        (["5"], "sequence 1 is no list of token ids"),
        ([[5], [6, 7]], "sequence 1 is no list of token ids"),
    ],
)
def test_a_sequence_that_cannot_be_scored_is_refused_in_a_sentence(sequence, said, folders):
    with pytest.raises(UserError, match=said):
        opened(folders()).rewards([[5, 6], sequence])


def test_what_does_not_fit_into_memory_is_computed_in_halves(folders, monkeypatch):
    scorer = opened(folders())
    expected, compute, sizes = scorer.rewards(SEQUENCES), scorer._computer.model.rewards, []

    def small_memory(sequences, prompt_of, layout=None):
        sizes.append(len(sequences))
        if len(sequences) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(sequences, prompt_of, layout)

    monkeypatch.setattr(scorer._computer.model, "rewards", small_memory)
    most = 3
    assert scorer.rewards(SEQUENCES) == pytest.approx(expected, abs=TOLERANCE)
    assert max(sizes) > most
    most = 70  # rows of 128 tokens, the model's positions
    assert scorer._computer._what_fits() == computing.MOST_POSITIONS // 4 == 128 * 64
    most = 0
    with pytest.raises(UserError, match=r"a sequence of \d+ tokens does not fit into the memory of cpu; pass"):
        scorer.rewards(SEQUENCES)


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def two(folders):
    """Two worker processes; the tests below use them one after another, the last ones up."""
    with opened(folders(), num_processes=2, max_tokens_per_micro_batch=70) as scorer:
        yield scorer


def test_two_processes_give_the_bits_of_one(two, folders):
    one = opened(folders(), max_tokens_per_micro_batch=70)
    for sequences in (SEQUENCES, SEQUENCES[:1], [], some_sequences(seed=5)):
        assert np.array_equal(two.rewards(sequences), one.rewards(sequences))
    assert any("2 processes compute, on cpu" in line for line in two.lines)
    assert (two.fingerprint, two.max_token_length) == (one.fingerprint, one.max_token_length)


def test_a_worker_that_is_killed_is_one_sentence_and_the_others_end(two):
    expected, workers = two.rewards(SEQUENCES), list(two._computer._processes)
    os.kill(workers[0].pid, signal.SIGTERM)  # as to all of a group; the main process ends its workers
    assert np.array_equal(two.rewards(SEQUENCES), expected)
    os.kill(workers[1].pid, signal.SIGKILL)
    workers[1].join()
    with pytest.raises(
        UserError, match=r"worker process 2 of 2 was ended by SIGKILL; if memory ran out, pass a smaller"
    ):
        two.rewards(SEQUENCES)
    assert not any(process.is_alive() for process in workers)
    two.close()
    with pytest.raises(UserError, match="the worker processes have ended; open the model again"):
        two.rewards(SEQUENCES)


class Mistaken:
    """A worker's computer: it refuses sequences of one token, and of nine it dies."""

    def rewards(self, batches):
        if len(batches[0].sequences[0]) == 1:
            raise UserError("does not fit")
        if len(batches[0].sequences[0]) == 9:
            raise EOFError
        return [np.float32([len(ids) for ids in batches[0].sequences])]


@pytest.fixture
def of_threads(monkeypatch):
    """Workers whose processes are threads, which start in no time."""

    def answering(pipe):
        with contextlib.suppress(EOFError, ConnectionError), pipe:
            while True:
                pipe.send(processes._answer(Mistaken(), pipe.recv()))

    def started(self):
        for _ in range(2):
            ours, theirs = multiprocessing.Pipe()
            threading.Thread(target=answering, args=(theirs,), daemon=True).start()
            self._pipes.append(ours)
        ended = {"join": lambda timeout: None, "is_alive": lambda: False, "exitcode": -signal.SIGKILL}
        self._processes = [types.SimpleNamespace(**ended)] * 2

    monkeypatch.setattr(processes.Workers, "_started", started)
    workers = processes.Workers(None, [], None)
    yield workers
    workers.close()


def test_a_mistake_in_a_micro_batch_leaves_the_workers_at_work_and_nothing_for_the_next_call(of_threads):
    batches = [computing.MicroBatch([np.arange(size)], [0]) for size in (3, 1, 2, 4, 5, 6)]
    for _ in range(3):
        with pytest.raises(UserError, match="^does not fit$"):
            of_threads.rewards(batches)
        assert of_threads.rewards(batches[2:]) == [[2], [4], [5], [6]]


def test_after_a_worker_was_lost_the_next_call_starts_all_again(of_threads):
    batches = [computing.MicroBatch([np.arange(size)], [0]) for size in (3, 9, 2, 4, 5, 6)]
    for _ in range(3):
        with pytest.raises(UserError, match=r"worker process [12] of 2 was ended by SIGKILL"):
            of_threads.rewards(batches)
        assert of_threads.rewards(batches[2:]) == [[2], [4], [5], [6]]
