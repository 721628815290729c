"""What each client sends and expects: a body to a question, rewards to the JSON that the client reads.

    OpenRLHF   POST /get_reward      {"query": [text], "prompts", "labels"}    -> {"rewards", "scores", "extra_logs"}
    vLLM       POST /classify        {"input": text | [text] | ids | [ids]} or {"messages"} -> {"data": [{"probs": [r]}]}
               POST /pooling         the same                                  -> {"data": [{"data": [r]}]}
               POST /score, /v1/score  {"text_1" | "queries", "text_2" | "documents"} -> {"data": [{"score": r}]}
               POST /rerank, /v1/rerank, /v2/rerank  {"query", "documents", "top_n"} -> {"results": [{"relevance_score": r}]}
    SGLang     POST /classify        {"text": text | [text]} or {"input_ids"}  -> {"embedding": [r], "meta_info"}, or a list
               POST /v1/embeddings   {"input"}                                 -> {"data": [{"embedding": [r]}]}
    slime      POST / and /remote_rm {"prompt", "response", "label"}           -> r

Read from their code: OpenRLHF 3c3be62, verl 1dda039, slime 624b824, vLLM and SGLang of 2026-08. A field `model` may say
anything: the server has one model, and trainers send paths of their own. Fields that are unknown are left alone, as these
servers do; one that asks for what is not done here is refused.
"""

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from open_rm.data.rows import OWN_KEYWORDS
from open_rm.errors import quote
from open_rm.serving.limits import Refusal
from open_rm.serving.texts import Answered, Conversation, Ids, Item, Text


@dataclass(frozen=True)
class Scored:
    """Rewards of a question's items, and the tokens of each."""

    rewards: list[float]
    tokens: list[int]
    seconds: float

    @property
    def usage(self) -> dict:
        """As vLLM and SGLang count."""
        total = sum(self.tokens)
        return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None}


@dataclass(frozen=True)
class Question:
    """What a request asks: items to score, and how the answer is written.

    keep: most tokens that are kept of each text, its last ones (truncate_prompt_tokens); None: all, -1: as many as fit.
    """

    items: Sequence[Item]
    write: Callable[[Scored], object]
    keep: int | None = None


# ---------------------------------------------------------------- OpenRLHF and slime


def get_reward(body: dict, name: str) -> Question:
    """OpenRLHF's reward.remote_url; the query alone is read, as in its serve_rm. Of several servers, all but the first are
    asked about nothing, and the request fails unless each of them answers."""
    queries = body.get("query")
    queries = [queries] if isinstance(queries, str) else queries
    items = [Text(text) for text in _texts("query", queries)] if queries != [] else []

    def write(scored: Scored) -> dict:
        return {"rewards": scored.rewards, "scores": scored.rewards, "extra_logs": {}}

    return Question(items, write)


def remote_rm(body: dict, name: str) -> Question:
    """slime's --rm-type remote_rm. The prompt is rendered text, messages, or plain text."""
    if not isinstance(body.get("response"), str):
        raise Refusal(400, f"response must be text, not {quote(body.get('response'))}")
    return Question(
        [Answered(_prompt("prompt", body.get("prompt")), body["response"])], lambda scored: scored.rewards[0]
    )


# ---------------------------------------------------------------- vLLM


def classify(body: dict, name: str) -> Question:
    """vLLM's /classify, or SGLang's, which has text or input_ids in the place of input."""
    if "input" not in body and "messages" not in body and ("text" in body or "input_ids" in body):
        return _native(body)

    def entry(index: int, reward: float) -> dict:
        return {"index": index, "label": "LABEL_0", "probs": [reward], "num_classes": 1}

    return _vllm(body, name, "classify", entry)


def pooling(body: dict, name: str) -> Question:
    """vLLM's /pooling."""
    written = _vector(body)
    return _vllm(
        body, name, "pool", lambda index, reward: {"index": index, "object": "pooling", "data": written(reward)}
    )


def embeddings(body: dict, name: str) -> Question:
    """SGLang's /v1/embeddings, which is OpenAI's."""
    _refuse(body)
    written, items = _vector(body), _inputs("input", body.get("input"))

    def write(scored: Scored) -> dict:
        data = [
            {"object": "embedding", "index": index, "embedding": written(reward)}
            for index, reward in enumerate(scored.rewards)
        ]
        return {"object": "list", "data": data, "model": name, "usage": scored.usage}

    return Question(items, write)


def score(body: dict, name: str) -> Question:
    """vLLM's /score: prompts and answers, one prompt for all or one each."""
    _refuse(body)
    pairs = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
    first, second = next((pair for pair in pairs if set(pair) <= body.keys()), pairs[0])
    prompts, answers = body.get(first), body.get(second)
    prompts = [prompts] if isinstance(prompts, str) or _is_messages(prompts) else prompts
    answers = _texts(second, [answers] if isinstance(answers, str) else answers)
    if not isinstance(prompts, list) or len(prompts) not in (1, len(answers)):
        raise Refusal(
            400, f"{first} must be one prompt or as many as {second} has ({len(answers)}), not {quote(prompts)}"
        )
    prompts = prompts * len(answers) if len(prompts) == 1 else prompts
    items = [
        Answered(_prompt(first, prompt), answer, whole=True) for prompt, answer in zip(prompts, answers, strict=True)
    ]

    def entry(index: int, reward: float) -> dict:
        return {"index": index, "object": "score", "score": reward}

    return Question(items, _listed(body, name, "score", entry), _keep(body))


def rerank(body: dict, name: str) -> Question:
    """vLLM's /rerank: the answers to a prompt, the best first."""
    _refuse(body)
    documents = body.get("documents")
    documents = _texts("documents", [documents] if isinstance(documents, str) else documents)
    top = body.get("top_n", 0)
    if not isinstance(top, int) or isinstance(top, bool):
        raise Refusal(400, f"top_n must be a number of documents, not {quote(top)}")
    prompt = _prompt("query", body.get("query"))

    def write(scored: Scored) -> dict:
        best = sorted(range(len(documents)), key=lambda n: -scored.rewards[n])[: top if top > 0 else None]
        results = [
            {"index": n, "document": {"text": documents[n], "multi_modal": None}, "relevance_score": scored.rewards[n]}
            for n in best
        ]
        usage = {"prompt_tokens": sum(scored.tokens), "total_tokens": sum(scored.tokens)}
        return {"id": _id(body, "rerank"), "model": name, "usage": usage, "results": results}

    return Question([Answered(prompt, document, whole=True) for document in documents], write, _keep(body))


def _vllm(body: dict, name: str, kind: str, entry: Callable[[int, float], dict]) -> Question:
    """/classify and /pooling: input or messages."""
    _refuse(body)
    if "messages" in body:
        for key in ("add_generation_prompt", "continue_final_message", "chat_template"):
            if body.get(key):
                raise Refusal(
                    400, f"{key} is not taken: the answer is complete and the template the model's own; leave it out"
                )
        template = body.get("chat_template_kwargs") or {}
        if not isinstance(template, dict) or not isinstance(body["messages"], list):
            raise Refusal(400, "messages must be a list of messages, and chat_template_kwargs an object")
        if own := sorted(set(template) & set(OWN_KEYWORDS)):
            raise Refusal(
                400, f"chat_template_kwargs sets {own[0]}, which the server decides as training did; leave it out"
            )
        items: Sequence[Item] = [Conversation(body["messages"], template)]
    else:
        items = _inputs("input", body.get("input"))
    return Question(items, _listed(body, name, kind, entry), _keep(body))


def _listed(body: dict, name: str, kind: str, entry: Callable[[int, float], dict]) -> Callable[[Scored], dict]:
    def write(scored: Scored) -> dict:
        data = [entry(index, reward) for index, reward in enumerate(scored.rewards)]
        head = {"id": _id(body, kind), "object": "list", "created": int(time.time()), "model": name}
        return head | {"data": data, "usage": scored.usage}

    return write


def _refuse(body: dict) -> None:
    """Known fields that ask for something else. use_activation is none: of one label with problem_type regression, as these
    folders have, vLLM's activation is the identity."""
    _check_id(body, "request_id")
    if "normalize" in body:
        raise Refusal(400, "normalize was removed from vLLM, and a reward is not normalised; leave it out")
    for key in ("dimensions", "mm_processor_kwargs"):
        if body.get(key) is not None:
            raise Refusal(400, f"{key} is not taken: a reward is one number of a text; leave it out")
    if body.get("priority"):
        raise Refusal(400, "priority is not taken: requests are scored as they come; leave it out")
    if body.get("truncation_side") == "right":
        raise Refusal(400, "truncation_side right would cut off the token that is scored; leave it out, or say left")
    for key in ("use_activation", "add_special_tokens"):
        if body.get(key) not in (None, True, False):
            raise Refusal(400, f"{key} must be true or false, not {quote(body[key])}")


def _keep(body: dict) -> int | None:
    keep = body.get("truncate_prompt_tokens")
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < -1 or keep == 0):
        raise Refusal(400, f"truncate_prompt_tokens must be a number of tokens, or -1, not {quote(keep)}")
    return keep


def _check_id(body: dict, key: str) -> None:
    """What the client calls its request is written into the answer."""
    try:
        str(body.get(key)).encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{key} holds half of a surrogate pair, which is no text in UTF-8") from error


def _id(body: dict, kind: str) -> str:
    return f"{kind}-{body.get('request_id') or uuid.uuid4().hex}"


def _vector(body: dict) -> Callable[[float], list[float] | str]:
    """How a vector of one number is written: a list, or the base64 of its float32, for which OpenAI's client asks."""
    encoding = body.get("encoding_format", "float")
    if encoding == "base64":
        return lambda reward: base64.b64encode(np.float32(reward).tobytes()).decode()
    if encoding not in ("float", None):
        raise Refusal(400, f"encoding_format must be float or base64, not {quote(encoding)}")
    return lambda reward: [reward]


# ---------------------------------------------------------------- SGLang


def _native(body: dict) -> Question:
    """SGLang's /classify: one object for one text, a list for a list."""
    name = "text" if body.get("text") is not None else "input_ids"
    given = body.get(name)
    items = _inputs(name, given)
    alone = isinstance(given, str) or (isinstance(given, list) and isinstance(given[0], int))
    _check_id(body, "rid")
    rid = body.get("rid")

    def write(scored: Scored) -> dict | list[dict]:
        entries = [
            {
                "embedding": [reward],
                "meta_info": {
                    "id": rid if isinstance(rid, str) and alone else uuid.uuid4().hex,
                    "finish_reason": {"type": "length", "length": 0},
                    "prompt_tokens": tokens,
                    "e2e_latency": scored.seconds,
                },
            }
            for reward, tokens in zip(scored.rewards, scored.tokens, strict=True)
        ]
        return entries[0] if alone else entries

    return Question(items, write)


# ---------------------------------------------------------------- fields


def _texts(name: str, value: object) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise Refusal(400, f"{name} must be a list of texts, not {quote(value)}")
    return value


def _inputs(name: str, value: object) -> list[Item]:
    """A text, texts, token ids, or lists of them."""
    if isinstance(value, str):
        return [Text(value)]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [Ids(value)]
        if all(isinstance(text, str) for text in value):
            return [Text(text) for text in value]
        if all(isinstance(ids, list) and _are_ids(ids) for ids in value):
            return [Ids(ids) for ids in value]
    raise Refusal(400, f"{name} must be a text, a list of texts, token ids or a list of them, not {quote(value)}")


def _are_ids(value: list) -> bool:
    return bool(value) and all(type(token) is int for token in value)


def _prompt(name: str, value: object) -> str | list:
    if isinstance(value, str) or _is_messages(value):
        return value
    raise Refusal(400, f"{name} must be a text or a list of messages, not {quote(value)}")


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


READERS = {
    "/get_reward": get_reward,
    "/": remote_rm,
    "/remote_rm": remote_rm,
    "/classify": classify,
    "/pooling": pooling,
    "/v1/embeddings": embeddings,
    "/score": score,
    "/v1/score": score,
    "/rerank": rerank,
    "/v1/rerank": rerank,
    "/v2/rerank": rerank,
}
# Clients of these read {"error": {"message", "type", "code"}}; those of the others {"error": sentence}.
PLAIN_ERRORS = ("/get_reward", "/", "/remote_rm")
KINDS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "RequestEntityTooLarge"}
KINDS |= {500: "InternalServerError", 503: "ServiceUnavailableError"}


def error(path: str, refusal: Refusal) -> dict:
    """A refusal as the clients of a path read it."""
    if path in PLAIN_ERRORS:
        return {"error": refusal.sentence}
    kind = KINDS.get(refusal.status, "BadRequestError")
    return {"error": {"message": refusal.sentence, "type": kind, "param": None, "code": refusal.status}}
