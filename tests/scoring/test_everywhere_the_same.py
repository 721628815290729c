"""One reward wherever it is asked for: on real conversations, every way of ours and of our clients gives plain transformers' number.

Training's evaluation, scoring, the server in each dialect, the pipeline and TRL's GRPOTrainer, on all rows of LLMBar and on
ranked lists of alpaca_eval. Not covered: a GPU, bfloat16, and inference servers themselves, whose calls ours answers.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
import transformers
from conftest import (
    REPOSITORY,
    alone,
    environment_of_a_process,
    in_a_process,
    load_model,
    read_pairs,
    shared_data,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from open_rm.batching.rules import BatchRules
from open_rm.data.tokenizer import ending, load_tokenizer
from open_rm.evaluation.held_out import score_pairs
from open_rm.flags import OpeningFlags
from open_rm.model.contract import Contract
from open_rm.publishing.saving import save_reward_model
from open_rm.scoring.opening import open_scorer
from open_rm.toy import make_tokenizer

# float32, and the same weights and token ids: only the order of sums differs.
TOLERANCE = 1e-5
LISTS = 10  # of alpaca_eval's 600
MOST_TOKENS = 4096
AT_A_TIME = 48  # requests

Chat = list[dict]


@dataclass(frozen=True)
class Case:
    """A prompt, all answers to it, and the rewards that plain transformers gives, one forward each without padding."""

    prompt: Chat
    answers: list[str]
    ids: list[list[int]]
    rewards: list[float]

    @property
    def chats(self) -> list[Chat]:
        return [[*self.prompt, {"role": "assistant", "content": answer}] for answer in self.answers]


@dataclass(frozen=True)
class Trained:
    """A reward model as the trainer has it, and the folder it left."""

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    folder: Path
    policy: Path


# ---------------------------------------------------------------- what is scored, and the reference


@pytest.fixture(scope="module")
def llmbar() -> Path:
    return shared_data("rewardbench_llmbar") / "test.jsonl"


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> Path:
    """Evenly taken lists of alpaca_eval."""
    rows = (shared_data("alpaca_eval") / "ranked.jsonl").read_text(encoding="utf-8").splitlines()
    taken = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, LISTS).astype(int))]
    path = tmp_path_factory.mktemp("lists") / "test.jsonl"
    path.write_text("\n".join(taken) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def questions(llmbar, ranked) -> list[tuple[Chat, list[str]]]:
    """(prompt, answers) of both files."""
    rows = [json.loads(line) for path in (llmbar, ranked) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (row["prompt"], row["responses"])
        if "responses" in row
        else ([{"role": "user", "content": row["prompt"]}], [row["chosen"], row["rejected"]])
        for row in rows
    ]


@pytest.fixture(scope="module")
def trained(questions, tmp_path_factory) -> Trained:
    """A small Llama on these words. Its template writes BOS and its end token is not eos, which clients get wrong most easily;
    weights so large that rewards differ."""
    root = tmp_path_factory.mktemp("everywhere")
    policy, folder = root / "policy", root / "model"
    make_tokenizer(
        [text for prompt, answers in questions for text in (prompt[0]["content"], *answers)]
    ).save_pretrained(policy)
    tokenizer = load_tokenizer(str(policy), chat_template_name="llama3")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(**sizes, max_position_embeddings=MOST_TOKENS, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(policy)
    model = load_model(policy, tokenizer, layout="shared_prefix").eval()
    contract = Contract(chat=True, ending=ending(tokenizer))
    save_reward_model(model, model.state_dict(), tokenizer, str(folder), contract)
    return Trained(model, tokenizer, folder, policy)


@pytest.fixture(scope="module")
def cases(questions, trained) -> list[Case]:
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    result = []
    for prompt, answers in questions:
        chats = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
        ids = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False)
        with torch.inference_mode():
            rewards = [model(input_ids=torch.tensor([sequence])).logits.item() for sequence in ids]
        result.append(Case(prompt, answers, ids, rewards))
    assert np.std([reward for case in result for reward in case.rewards]) > 0.1
    return result


@pytest.fixture(scope="module")
def chats(cases) -> list[Chat]:
    return [chat for case in cases for chat in case.chats]


@pytest.fixture(scope="module")
def expected(cases) -> np.ndarray:
    """Of all chats."""
    return np.array([reward for case in cases for reward in case.rewards])


@pytest.fixture(scope="module")
def texts(chats, trained) -> list[str]:
    """As a client renders them."""
    return AutoTokenizer.from_pretrained(trained.folder).apply_chat_template(chats, tokenize=False)


def worst(rewards, expected) -> float:
    assert len(rewards) == len(expected)
    return float(np.abs(np.asarray(rewards, np.float64) - expected).max())


# ---------------------------------------------------------------- ours


def test_trainings_evaluation(trained, cases, llmbar, ranked, tmp_path):
    flags = {"max_token_length": MOST_TOKENS, "max_prompt_token_length": MOST_TOKENS, "as_messages": ["True"]}
    flags |= {"dataset_local_cache_dir": str(tmp_path), "splits": ("test",)}
    data = read_pairs([llmbar, "1.0", ranked, "1.0"], trained.tokenizer, **flags)
    rules = BatchRules("shared_prefix", trained.tokenizer.pad_token_id, max_tokens=1536, evaluation_tokens=1536)
    rewards = score_pairs(trained.model, data, np.arange(len(data)), rules, alone())
    known = {tuple(ids): reward for case in cases for ids, reward in zip(case.ids, case.rewards, strict=True)}
    pairs = data.pairs(range(len(data)))
    # where a pair's tokens are not those of a client, this has no such key
    reference = np.array([[known[tuple(side.tolist())] for side in pair] for pair in pairs])
    assert worst(rewards.numpy(), reference) < TOLERANCE
    # equal scores and equal answers are no pairs; all others are here
    assert sum(place.startswith(str(llmbar)) for place in data.places(range(len(data)))) == 419
    assert len({tuple(side.tolist()) for pair in pairs for side in pair}) > 0.9 * len(known)


def test_scoring(trained, chats, cases, texts, expected):
    with open_scorer(OpeningFlags(model=str(trained.folder))) as scorer:
        ids = scorer.encode_conversations(chats)
        assert ids == scorer.encode_texts(texts) == [sequence for case in cases for sequence in case.ids]
        assert worst(scorer.rewards(ids), expected) < TOLERANCE


# ---------------------------------------------------------------- clients


def test_the_pipeline(trained, texts, expected):
    score = pipeline("text-classification", model=str(trained.folder), device="cpu")
    order = np.argsort([len(text) for text in texts])
    results = score([texts[i] for i in order], batch_size=16)
    assert worst([result["score"] for result in results], expected[order]) < TOLERANCE


GRPO = """
import json, sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

policy, folder, rows, output_dir = sys.argv[1:]
rows = json.load(open(rows))
trainer = GRPOTrainer(
    model=policy,
    reward_funcs=folder,
    train_dataset=Dataset.from_list([{"prompt": rows[0]["prompt"]}] * 4),
    args=GRPOConfig(
        output_dir=output_dir, per_device_train_batch_size=4, num_generations=2, report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False,
    ),
)
rewards = []
for start in range(0, len(rows), 16):
    some = rows[start : start + 16]
    prompts, completions = [row["prompt"] for row in some], [row["completion"] for row in some]
    # what it calls at every step, with completions that were not generated
    rewards += trainer._calculate_rewards(some, prompts, completions, [[]] * len(some))[:, 0].tolist()
print(json.dumps(rewards))
"""


def test_trls_grpo_trainer(trained, chats, texts, expected, tmp_path):
    order = np.argsort([len(text) for text in texts])
    rows = [{"prompt": chats[i][:-1], "completion": chats[i][-1:]} for i in order]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    rewards = in_a_process(GRPO, trained.policy, trained.folder, tmp_path / "rows.json", tmp_path / "out")
    assert worst(rewards, expected[order]) < TOLERANCE


# ---------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """Its address."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "open_rm.serve", "--model", str(trained.folder), "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment_of_a_process(), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    lines = iter(process.stdout.readline, "")
    try:
        found = next((found for line in lines if (found := re.search(r"^serving .* on (http://\S+)$", line))), None)
        assert found, log.read_text()
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@dataclass(frozen=True)
class Asked:
    """A request: where to, what, and how the client reads one reward for each answer."""

    path: str
    body: dict
    read: Callable[[object], list[float]]


def many(answer: dict, key: str) -> list[float]:
    entries = sorted(answer["data"], key=lambda entry: entry["index"])
    return [entry[key] if isinstance(entry[key], float) else entry[key][-1] for entry in entries]


def openrlhf(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    """remote_rm_fn sends one sample a request; serve_rm takes lists."""
    return [Asked("/get_reward", {"query": texts, "prompts": texts, "labels": texts}, lambda a: a["rewards"])]


def verl_to_vllm(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    """One text a request, without what the tokenizer names as BOS."""
    bos = tokenizer.bos_token
    bare = [text.removeprefix(bos) if bos else text for text in texts]
    bodies = [{"model": "m", "input": text, "use_activation": False} for text in bare]
    return [Asked("/classify", body, lambda a: [a["data"][-1]["probs"][-1]]) for body in bodies]


def verl_to_sglang(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    bos = tokenizer.bos_token
    bodies = [{"model": "m", "input": text.removeprefix(bos) if bos else text} for text in texts]
    return [Asked("/v1/embeddings", body, lambda a: [a["data"][-1]["embedding"][-1]]) for body in bodies]


def vllm_messages(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    return [Asked("/classify", {"messages": chat}, lambda a: many(a, "probs")) for chat in case.chats]


def vllm_pooling(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    return [Asked("/pooling", {"model": "m", "input": texts}, lambda a: many(a, "data"))]


def vllm_score(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    body = {"queries": case.prompt[0]["content"], "documents": case.answers}
    return [Asked("/score", body, lambda a: many(a, "score"))]


def vllm_rerank(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    def read(answer: dict) -> list[float]:
        found = [entry["relevance_score"] for entry in answer["results"]]
        assert found == sorted(found, reverse=True)
        return [entry["relevance_score"] for entry in sorted(answer["results"], key=lambda entry: entry["index"])]

    return [Asked("/v1/rerank", {"query": case.prompt[0]["content"], "documents": case.answers}, read)]


def sglang_native(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    return [Asked("/classify", {"model": "m", "text": texts}, lambda a: [entry["embedding"][0] for entry in a])]


def slime(case: Case, texts: list[str], tokenizer) -> list[Asked]:
    """The policy's rendered prompt, here of the same template, and what it generated, its end included."""
    prompt = tokenizer.apply_chat_template(case.prompt, tokenize=False, add_generation_prompt=True)
    bodies = [{"prompt": prompt, "response": text.removeprefix(prompt), "label": None} for text in texts]
    assert all(text.startswith(prompt) for text in texts)
    return [Asked("/", body, lambda a: [a]) for body in bodies]


DIALECTS = (
    openrlhf,
    verl_to_vllm,
    verl_to_sglang,
    vllm_messages,
    vllm_pooling,
    vllm_score,
    vllm_rerank,
    sglang_native,
    slime,
)


async def answers_to(address: str, all_asked: list[Asked]) -> list[list[float]]:
    """What all clients read, in order, each of their requests one of many."""
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(session: aiohttp.ClientSession, asked: Asked) -> list[float]:
        async with places, session.post(address + asked.path, json=asked.body) as answer:
            said = await answer.json()
            assert answer.status == 200, (asked.path, said)
            return asked.read(said)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        return await asyncio.gather(*(one(session, asked) for asked in all_asked))


def test_the_server_in_every_dialect_at_once(server, cases, texts, expected, trained):
    """All clients ask about the same row at about the same time."""
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    left, dialect_of, all_asked = iter(texts), [], []
    for case in cases:
        of_case = [next(left) for _ in case.answers]
        for dialect in DIALECTS:
            asked = dialect(case, of_case, tokenizer)
            all_asked += asked
            dialect_of += [dialect.__name__] * len(asked)
    answers = asyncio.run(answers_to(server, all_asked))
    rewards = {dialect.__name__: [] for dialect in DIALECTS}
    for name, some in zip(dialect_of, answers, strict=True):
        rewards[name] += some
    differences = {name: worst(some, expected) for name, some in rewards.items()}
    assert max(differences.values()) < TOLERANCE, differences
