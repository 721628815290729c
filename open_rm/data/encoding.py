"""Pairs to token ids: rendered by the chat template or as plain text, encoded, and cut to the limits.

A conversation is rendered by the chat template alone (the encoder adds no BOS of its own); plain text gets the tokenizer's
own BOS, and exactly one EOS at its end (tokenizer.ending). Many pairs at a time, since one by one takes several times as
long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from open_rm.data.templates import template_names
from open_rm.data.tokenizer import ending, reward_id_of
from open_rm.errors import UserError, quote_error


@dataclass(frozen=True)
class PairText:
    """A preference pair as text, ready to encode.

    chat: rendered by the chat template (no special tokens are added when encoding) or plain text (BOS is added).
    prompt is only measured (--max_prompt_token_length); chosen and rejected are the complete texts, prompt included.
    """

    chat: bool
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairIds:
    """A preference pair as token ids. prompt: its own tokens, which may merge with the response's first ones in a side."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def render_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple]) -> list[PairText | UserError]:
    """Render normalised pairs (rows.Preference's prompt, chosen, rejected, template) to text.

    Where the template refuses a pair, its place in the result holds the UserError. Pairs that give the template the same
    besides their messages are rendered in one call; one by one it would take three times as long.
    """
    result: list[PairText | UserError | None] = [None] * len(pairs)
    together: dict[str, list[int]] = {}
    for i, (_, chosen, _, template) in enumerate(pairs):
        together.setdefault("text" if isinstance(chosen, str) else repr(template), []).append(i)
    for members in together.values():
        try:
            texts = _rendered_together(tokenizer, [pairs[i] for i in members])
        except UserError:  # of one of them
            texts = []
            for i in members:
                try:
                    texts += _rendered_together(tokenizer, [pairs[i]])
                except UserError as error:
                    texts.append(error)
        for i, text in zip(members, texts, strict=True):
            result[i] = text
    return result


def render_pair(tokenizer: PreTrainedTokenizerBase, prompt, chosen, rejected, template: dict | None = None) -> PairText:
    """One pair of `render_pairs`.

    Args:
        prompt: text, or the list of messages that both responses continue.
        chosen, rejected: text that continues the prompt, or a list of messages that continues it.
        template: tools and further variables for the chat template.

    Raises:
        UserError: messages without a chat template, or a template that refuses them (the caller adds the row).
    """
    return _rendered_together(tokenizer, [(prompt, chosen, rejected, template or {})])[0]


def render_conversations(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[dict]], template: dict
) -> list[str | UserError]:
    """Whole conversations to text, in one call where the template takes all of them.

    One that it refuses is its UserError; all are where there is no template. template: tools and further variables for it.
    """
    if tokenizer.chat_template is None:
        return [_no_template() for _ in chats]
    try:
        return tokenizer.apply_chat_template(list(chats), tokenize=False, **template) if chats else []
    except Exception as error:  # a template is a program; given an odd row, it may fail in any way
        if len(chats) == 1:
            return [_refused(error)]
    return [text for chat in chats for text in render_conversations(tokenizer, [chat], template)]


def _no_template() -> UserError:
    return UserError(
        "the rows are messages, and the tokenizer has no chat template; choose one with --chat_template_name "
        f"({', '.join(template_names())}, or a Jinja file)"
    )


def _refused(error: Exception) -> UserError:
    return UserError(f"the chat template refuses these messages: {quote_error(error)}")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that the encoder cuts out of a text whole; not those of spaces, which some vocabularies add."""
    return [token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if token.strip()]


def render_sample(tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict], str]:
    """A conversation that the chat template takes, and what it makes of it. Raises UserError where it takes none."""
    messages = [{"role": "user", "content": "Hello, you."}, {"role": "assistant", "content": "Hello!"}]
    try:
        return messages, render_pair(tokenizer, messages[:1], messages[1:], messages[1:]).chosen
    except UserError:  # some templates want a system message
        messages = [{"role": "system", "content": "Be kind."}, *messages]
        return messages, render_pair(tokenizer, messages[:-1], messages[-1:], messages[-1:]).chosen


def _rendered_together(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple]) -> list[PairText]:
    """Pairs of text, or of messages with the same template variables."""
    if isinstance(pairs[0][1], str):
        return [_as_text(tokenizer, *pair[:3]) for pair in pairs]
    if tokenizer.chat_template is None:
        raise _no_template()

    def render(conversations: list[list[dict]], **how) -> list[str]:
        how = pairs[0][3] | how
        return tokenizer.apply_chat_template(conversations, tokenize=False, **how) if conversations else []

    try:
        prompts = iter(render([prompt for prompt, *_ in pairs if prompt], add_generation_prompt=True))
        sides = iter(render([prompt + side for prompt, *both, _ in pairs for side in both]))
    except Exception as error:  # a template is a program; given an odd row, it may fail in any way
        raise _refused(error) from error
    return [PairText(True, next(prompts) if prompt else "", next(sides), next(sides)) for prompt, *_ in pairs]


def _as_text(tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str) -> PairText:
    end = ending(tokenizer)
    texts = (prompt + answer.removesuffix(tokenizer.eos_token) for answer in (chosen, rejected))
    chosen, rejected = (text + end for text in texts)
    return PairText(chat=False, prompt=prompt, chosen=chosen, rejected=rejected)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Token ids of complete texts, in one call so that a fast tokenizer uses all cores."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python; verbose=False: lengths are checked by us
        ids = tokenizer(list(texts), add_special_tokens=not chat, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    else:  # straight to Rust, without the offsets that nobody reads: a fifth faster
        if backend.truncation or backend.padding:  # a call of the tokenizer may have switched it on
            backend.no_truncation()
            backend.no_padding()
        ids = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=not chat)]
    if not chat:
        ids = [_one_bos_one_eos(sequence, tokenizer) for sequence in ids]
    return ids


def _one_bos_one_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # The text may name BOS or EOS itself while the encoder adds it again.
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    reward_id = reward_id_of(tokenizer)
    last = tokenizer.eos_token_id if reward_id is None else reward_id
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and ids[-2] == last:
        ids = ids[:-1]
    return ids


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PairText]) -> list[PairIds]:
    """Encode many pairs; order is kept."""
    result: list[PairIds | None] = [None] * len(pairs)
    for chat in (True, False):
        where = [i for i, pair in enumerate(pairs) if pair.chat == chat]
        texts = [text for i in where for text in (pairs[i].prompt, pairs[i].chosen, pairs[i].rejected)]
        ids = encode(tokenizer, texts, chat=chat)
        for k, i in enumerate(where):
            prompt, chosen, rejected = ids[3 * k : 3 * k + 3]
            # Text that names no prompt: what the two sides share from the start is the prompt.
            if not chat and prompt and prompt[-1] == tokenizer.eos_token_id:  # the encoder's own; the text goes on
                prompt = prompt if pairs[i].prompt.endswith(tokenizer.eos_token) else prompt[:-1]
            if not pairs[i].prompt:
                prompt = chosen[: shared_prefix_length(chosen, rejected)]
            result[i] = PairIds(prompt, chosen, rejected)
    return result


def truncate(
    pair: PairIds, *, max_token_length: int, max_prompt_token_length: int, bos_token_id: int | None
) -> PairIds:
    """The pair within the limits: the prompt loses its start (BOS stays), equally on both sides; a response that alone is
    too long keeps its start and its last token, where the reward is read.

    max_token_length: of a side, in tokens.  max_prompt_token_length: of what both sides share of the prompt.
    """
    sides = (pair.chosen, pair.rejected)
    size = min(shared_prefix_length(pair.prompt, side) for side in sides)
    # The last token of a side is never part of its prompt: an answer may end in what the prompt is made of.
    size = min(size, *(len(side) - 1 for side in sides))
    room = max(0, max_token_length - max(len(side) - size for side in sides))
    prompt = pair.chosen[:size]
    has_bos = size > 0 and max_token_length > 1 and prompt[0] == bos_token_id
    kept = max(has_bos, min(size, room, max_prompt_token_length))
    if kept < size:
        prompt = prompt[:has_bos] + prompt[size - kept + has_bos :]
    answers = []
    for side in sides:
        answer, space = side[size:], max_token_length - len(prompt)
        answers.append(answer if len(answer) <= space else answer[: space - 1] + answer[-1:])
    return PairIds(prompt, prompt + answers[0], prompt + answers[1])


def shared_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that a and b have in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
