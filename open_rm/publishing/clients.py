"""What each client of a reward model makes of a saved folder: its own way to token ids, beside those of training.

Written from the clients' code: TRL 1.16, OpenRLHF 3c3be62, verl b178a3c, vLLM and SGLang of 2026-08, NeMo-RL 7ea279a, slime
624b824, RewardBench 0.1.4 (docs/clients.md says where). Taken as given, because no folder can decide it: a policy has the
reward model's tokenizer and template, and writes what the template writes for an answer, up to the end of the turn.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template  # vLLM reads templates through it too

from open_rm.data import tokenizer as tokenizers
from open_rm.data.encoding import encode, render_pair, render_sample, special_tokens
from open_rm.data.tokenizer import templates_of
from open_rm.errors import UserError, quote_error
from open_rm.model.contract import Contract

Ids = list[int]
Conversation = list[dict]
WITH_SYSTEM = "a system message"
SYSTEM = {"role": "system", "content": "You are kind."}
# Contents that templates and encoders are known to treat differently: outer spaces (trimmed by some), letters of several
# bytes, and turns before the last, which some templates write otherwise.
CONVERSATIONS: dict[str, list[str]] = {
    "one turn": ["Hello, you.", "Hello! How are you?"],
    "several turns": ["Who sings?", "The lake.", "And who\n\nlistens?", "We do, all of us."],
    WITH_SYSTEM: ["Why?", "So that it is said."],
    "an answer that ends in spaces": ["Make a list.", "- a\n- b \n"],
    "letters beyond ASCII": ["Wie heißt der See? 湖", "Zürichsee — naïve 😀"],
}


@dataclass(frozen=True)
class ClientCheck:
    """Whether a client reads the token ids of training.

    why_not: one short sentence; empty where it does.  how: the line by which it takes the folder.
    """

    client: str
    reads_the_same: bool
    why_not: str
    how: str


@dataclass(frozen=True)
class Saved:
    """The tokenizer as a client loads it, and how training's texts end.

    ending: what follows the answer.  end: its first part, up to the token at which a policy stops by itself. Qwen 2.5's are
        "<|im_end|>\\n" and "<|im_end|>"; a reward token stands in `ending` alone.
    """

    tokenizer: PreTrainedTokenizerBase
    ending: str
    end: str

    @classmethod
    def of(cls, saved: PreTrainedTokenizerBase, trained: PreTrainedTokenizerBase, *, chat: bool) -> "Saved":
        """Raises UserError where the chat template takes no conversation."""
        if not chat:
            return cls(saved, tokenizers.ending(trained), trained.eos_token)
        messages, text = render_sample(trained)
        ending = text.rpartition(messages[-1]["content"])[2]
        turn = ending.removesuffix(tokenizers.reward_token_of(trained) or "").rstrip("\n")
        ends = [turn.index(token) + len(token) for token in special_tokens(trained) if token in turn]
        return cls(saved, ending, turn[: min(ends, default=len(turn))])

    def render(self, conversation: Conversation, **how) -> str:
        """The chat template's text."""
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, **how)

    def written_by_a_policy(self, conversation: Conversation) -> str:
        """The prompt, and the answer as a policy leaves it: what the template writes for it up to the end of the turn."""
        prompt, text = self.render(conversation[:-1], add_generation_prompt=True), self.render(conversation)
        if not text.startswith(prompt):
            raise UserError("its text after a question is not what the template writes when asked for an answer")
        return text.removesuffix(self.ending) + self.end


# ---------------------------------------------------------------- conversations


def template_ids(saved: Saved, conversation: Conversation) -> Ids:
    """apply_chat_template alone."""
    return saved.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]


def text_with_special(saved: Saved, conversation: Conversation) -> Ids:
    """The rendered text through the tokenizer as it comes: pipelines, servers."""
    return saved.tokenizer(saved.render(conversation))["input_ids"]


def text_without_special(saved: Saved, conversation: Conversation) -> Ids:
    """The rendered text alone: the model card, TRL."""
    return saved.tokenizer(saved.render(conversation), add_special_tokens=False)["input_ids"]


def reward_bench(saved: Saved, conversation: Conversation) -> Ids:
    """The rendered text in a padded batch; the first of two BOS would be masked."""
    return saved.tokenizer([saved.render(conversation)], truncation=True, max_length=2048, padding=True)["input_ids"][0]


def open_rlhf(saved: Saved, conversation: Conversation) -> Ids:
    """The policy's tokens, decoded, as they are."""
    return saved.tokenizer(saved.written_by_a_policy(conversation), add_special_tokens=False)["input_ids"]


def our_server(saved: Saved, conversation: Conversation) -> Ids:
    """The same text to `open_rm.serve`, which ends it as training's texts end (serving/texts.py)."""
    text = saved.written_by_a_policy(conversation).removesuffix(saved.end) + saved.ending
    return encode(saved.tokenizer, [text], chat=True)[0]


def verl(saved: Saved, conversation: Conversation) -> Ids:
    """The folder's template, BOS taken off, to a server whose encoder adds its special tokens."""
    text, bos = saved.render(conversation, add_generation_prompt=False), saved.tokenizer.bos_token
    return saved.tokenizer(text[len(bos) :] if bos is not None and text.startswith(bos) else text)["input_ids"]


def vllm_messages(saved: Saved, conversation: Conversation) -> Ids:
    """Contents become parts where the template loops over them; no special tokens are added."""
    if _loops_over_content(saved.tokenizer):
        conversation = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in conversation]
    return text_without_special(saved, conversation)


def nemo_rl(saved: Saved, conversation: Conversation) -> Ids:
    """Message by message: what each adds to the text so far is encoded by itself."""
    tokenizer, ids, before = saved.tokenizer, [], ""
    for number in range(len(conversation)):
        text = saved.render(conversation[: number + 1], add_generation_prompt=False)
        same = next(
            (i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text))
        )
        piece, before = text[same:], text
        if number == 0 and tokenizer.bos_token is not None and not piece.startswith(tokenizer.bos_token):
            piece = tokenizer.bos_token + piece
        last = number == len(conversation) - 1
        if last and tokenizer.eos_token is not None and not piece.rstrip("\n").endswith(tokenizer.eos_token):
            piece += tokenizer.eos_token
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


# ---------------------------------------------------------------- plain text


def plain_with_special(saved: Saved, prompt: str, answer: str) -> Ids:
    """A complete text through the tokenizer as it comes."""
    return saved.tokenizer(prompt + answer + saved.ending)["input_ids"]


def plain_trl(saved: Saved, prompt: str, answer: str) -> Ids:
    """GRPO decodes answers without special tokens, and adds none."""
    return saved.tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]


def plain_open_rlhf(saved: Saved, prompt: str, answer: str) -> Ids:
    """The policy's tokens, decoded: the prompt without BOS, the answer with EOS."""
    return saved.tokenizer(prompt + answer + saved.end, add_special_tokens=False)["input_ids"]


def plain_our_server(saved: Saved, prompt: str, answer: str) -> Ids:
    """The same text through `open_rm.serve`."""
    return encode(saved.tokenizer, [prompt + answer + saved.ending], chat=False)[0]


@dataclass(frozen=True)
class Client:
    """conversation, text: its ways to token ids; None where it has no way for them.

    takes_system: system messages.  takes_adapters: a folder that holds an adapter, besides whole models.
    required: every folder has to be right for it.
    """

    name: str
    how: str
    conversation: Callable[[Saved, Conversation], Ids]
    text: Callable[[Saved, str, str], Ids] | None = None
    takes_system: bool = True
    takes_adapters: bool = False
    required: bool = False


CLIENTS = (
    Client(
        "transformers",
        "the lines of the model card",
        text_without_special,
        plain_with_special,
        takes_adapters=True,
        required=True,
    ),
    Client(
        "transformers pipeline",
        'pipeline("text-classification", FOLDER)',
        text_with_special,
        plain_with_special,
        required=True,
    ),
    Client("chat template's ids", "apply_chat_template(messages, tokenize=True)", template_ids, takes_adapters=True),
    Client("RewardBench", "rewardbench --model FOLDER --dataset FILE", reward_bench, takes_system=False),
    Client("TRL", 'GRPOTrainer(reward_funcs="FOLDER", ...)', text_without_special, plain_trl),
    Client("OpenRLHF", "openrlhf.cli.serve_rm --reward.model_name_or_path FOLDER", open_rlhf, plain_open_rlhf),
    Client(
        "OpenRLHF, our server",
        "--reward.remote_url http://HOST:PORT/get_reward",
        our_server,
        plain_our_server,
        takes_adapters=True,
    ),
    Client(
        "slime, our server",
        "--rm-type remote_rm --rm-url http://HOST:PORT/",
        our_server,
        plain_our_server,
        takes_adapters=True,
    ),
    Client("verl, vLLM", "reward_model.model.path=FOLDER reward_model.rollout.name=vllm", verl),
    Client("verl, SGLang", "reward_model.model.path=FOLDER reward_model.rollout.name=sglang", verl),
    Client("vLLM, messages", '/classify {"messages": ..., "use_activation": false}', vllm_messages),
    Client("vLLM, text", '/classify {"input": ..., "use_activation": false}', text_with_special, plain_with_special),
    Client("SGLang, text", '/v1/embeddings {"input": ...}', text_with_special, plain_with_special),
    Client("NeMo-RL", "env.reward_model.model_name=FOLDER", nemo_rl),
)


def check_clients(
    saved: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, contract: Contract
) -> list[ClientCheck]:
    """Replay every client on some conversations, or texts, and compare its token ids with those of training.

    Args:
        saved: the tokenizer as a client loads it from the folder.  tokenizer: training's.

    Raises:
        UserError: the chat template takes no conversation at all.
    """
    seen, cases = Saved.of(saved, tokenizer, chat=contract.chat), _cases(tokenizer, contract)
    checks = []
    for client in CLIENTS:
        reason = _why_not(client, seen, cases, contract)
        if not reason and contract.holds_adapter and not client.takes_adapters:
            reason = "it takes whole models, and the folder holds an adapter; --merge_adapter makes it whole"
        checks.append(ClientCheck(client.name, not reason, reason, client.how))
    return checks


def plain_difference(
    saved: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, contract: Contract
) -> str | None:
    """What plain transformers reads otherwise, without special tokens or with them; arguments of `check_clients`."""
    seen, cases = Saved.of(saved, tokenizer, chat=contract.chat), _cases(tokenizer, contract)
    reasons = (_why_not(client, seen, cases, contract) for client in CLIENTS if client.required)
    return next(filter(None, reasons), None)


def lines(checks: Sequence[ClientCheck]) -> list[str]:
    """For the log: who reads the folder as it was trained, and a line for each who cannot."""
    right = "; ".join(check.client for check in checks if check.reads_the_same)
    wrong = [f"{check.client} reads it otherwise: {check.why_not}" for check in checks if not check.reads_the_same]
    return [f"clients that read the folder as it was trained: {right}", *wrong]


@dataclass(frozen=True)
class Case:
    """A conversation, or a prompt and an answer, with training's ids."""

    name: str
    asked: Conversation | tuple[str, str]
    expected: Ids

    @property
    def has_system(self) -> bool:
        """Whether it begins with a system message."""
        return isinstance(self.asked, list) and self.asked[0]["role"] == "system"


def _cases(tokenizer: PreTrainedTokenizerBase, contract: Contract) -> list[Case]:
    return _conversations(tokenizer) if contract.chat else _texts(tokenizer)


def _conversations(tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """Those that the template takes."""
    found: list[Case] = []
    error = None
    for name, contents in CONVERSATIONS.items():
        roles = itertools.cycle(("user", "assistant"))
        turns = [{"role": next(roles), "content": content} for content in contents]
        for number, messages in enumerate((turns, [SYSTEM, *turns])):
            if number == 0 and name == WITH_SYSTEM:
                continue
            try:
                text = render_pair(tokenizer, messages[:-1], messages[-1:], messages[-1:]).chosen
            except UserError as refused:  # some templates want a system message, some take none
                error = refused
                continue
            found.append(Case(name, messages, encode(tokenizer, [text], chat=True)[0]))
            break
    if not found:
        raise error
    return found


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    cases = []
    for name, contents in CONVERSATIONS.items():
        *before, answer = contents
        prompt = "\n\n".join(before) + "\n\n"
        text = render_pair(tokenizer, prompt, answer, answer).chosen
        cases.append(Case(name, (prompt, answer), encode(tokenizer, [text], chat=False)[0]))
    return cases


def _why_not(client: Client, saved: Saved, cases: list[Case], contract: Contract) -> str:
    """One sentence on the first case that the client reads otherwise; empty where there is none."""
    if not contract.chat and client.text is None:
        return "it renders conversations by a chat template, and this model reads plain text"
    for case in cases:
        if case.has_system and not client.takes_system:
            continue
        try:
            ids = client.conversation(saved, case.asked) if contract.chat else client.text(saved, *case.asked)
        except Exception as error:  # a template is a program, and some clients show it unfinished conversations
            return f"{case.name}: {quote_error(error)}"
        if list(ids) != case.expected:
            return f"{case.name}: {_difference(saved.tokenizer, list(ids), case.expected)}"
    return ""


def _difference(tokenizer: PreTrainedTokenizerBase, ids: Ids, expected: Ids) -> str:
    """What a client reads that training did not, in words."""

    def say(part: Ids) -> str:
        return repr(tokenizer.decode(part[:8]))

    more, less = len(ids) - len(expected), len(expected) - len(ids)
    if more > 0 and ids[:-more] == expected:
        return f"it adds {say(ids[-more:])} at the end, where the reward is read"
    if less > 0 and expected[:-less] == ids:
        return f"its text ends before {say(expected[-less:])}, where the reward is read"
    if more > 0 and ids[more:] == expected:
        return f"it puts {say(ids[:more])} in front"
    if less > 0 and expected[less:] == ids:
        return f"it leaves out {say(expected[:less])} in front"
    place = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected))
    )
    return f"it reads {say(ids[place:])} where training reads {say(expected[place:])}, from token {place} on"


def _loops_over_content(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template loops over a message's content, by which vLLM decides that contents are parts.

    It follows `messages` through assignments and loops by name, whatever the scope, and takes any `content` for one. What it
    cannot follow (an assignment into a namespace) it takes for text.
    """
    templates = templates_of(tokenizer)
    source = templates.get("", templates.get("default", ""))
    tree = _compile_jinja_template(source).environment.parse(source)
    loops, assignments = list(tree.find_all(nodes.For)), list(tree.find_all(nodes.Assign))
    lists, targets = ["messages"], []
    for name in lists:  # grows meanwhile
        found = [assignment.target for assignment in assignments if _read_name(assignment.node) == name]
        targets += found
        lists += [target.name for target in found if isinstance(target, nodes.Name) and target.name not in lists]
    found = [loop.target for loop in loops if _read_name(loop.iter) in lists]
    if not all(isinstance(target, nodes.Name) for target in targets + found):
        return False
    contents = {f"{target.name}.content" for target in found}
    return any(
        _read_name(loop.iter) in contents or (isinstance(loop.iter, nodes.Name) and loop.iter.name == "content")
        for loop in loops
    )


def _read_name(node: nodes.Node) -> str | None:
    """`name`, or `name.key`, of what is read, whole or a slice of it, filtered or not; None of anything else."""
    sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    if sliced or isinstance(node, nodes.Filter | nodes.Test):
        return _read_name(node.node)
    if isinstance(node, nodes.Name):
        return node.name
    if not isinstance(node, nodes.Getattr | nodes.Getitem) or not isinstance(node.node, nodes.Name):
        return None
    key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    return f"{node.node.name}.{key}"
