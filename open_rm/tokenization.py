"""From text to token ids: tokenizer loading, pad and end-of-sequence rules, chat templates, pairs.

Rules that keep a reward the same wherever it is computed:
  - padding is on the right, and the pad token is one that never occurs in text (never eos, bos or unk);
  - a conversation is rendered by the chat template alone (the encoder adds no BOS of its own);
  - plain text gets the tokenizer's own BOS, and exactly one EOS at its end: the token that is scored;
  - a reward token, where there is one, comes after all that and is scored instead. It belongs to the tokenizer (transformers
    saves it as `reward_token`) and the chat template writes it, so clients need not know of it.
What is not covered: choosing a template for the user. Without one, messages are refused by name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_rm.errors import UserError, quote_error

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"
PAD_TOKEN = "<|pad|>"
# Some templates print today's date, and rewards would change from day to day. This is the date that those of Llama 3.1 and
# later take when they are not told today's.
DATE = "26 Jul 2024"
FIXED_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"


def template_names() -> list[str]:
    """Names that --chat_template_name knows; each is a Jinja file in open_rm/chat_templates."""
    return sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))


def read_template(name: str) -> str:
    """The Jinja text of a named template or of a file."""
    known = TEMPLATE_FOLDER / f"{name}.jinja"
    path = known if known.is_file() else Path(name)
    if not path.is_file():
        raise UserError(
            f"--chat_template_name {name}: neither a file nor a known name; the names are {', '.join(template_names())}"
        )
    # One trailing newline belongs to the file, not to the template: it would become the scored token.
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template_name {name}: cannot be read as UTF-8 text ({quote_error(error)})") from error


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    chat_template_name: str | None = None,
    reward_token: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the right with a token of its own.

    Args:
        name: Hub name or local folder.
        revision: branch, tag or commit on the Hub; None is the default branch.
        chat_template_name: a name of `template_names()`, a Jinja file, or None for the tokenizer's own template.
        reward_token: is appended to every response and scored; added if the tokenizer does not know it. None: the one
            the tokenizer was saved with, if any.
        trust_remote_code: whether code that the folder brings may run.

    Raises:
        UserError: the tokenizer cannot be loaded, has no eos token to score, or was saved with another reward token.
    """
    try:
        how = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
        saved = reward_token_of(tokenizer)
        if reward_token is not None and saved is None:
            tokenizer = AutoTokenizer.from_pretrained(name, reward_token=reward_token, **how)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"--tokenizer_name {name}: no tokenizer could be loaded ({quote_error(error)}); "
            "check the name, or pass a folder that holds tokenizer.json"
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:  # an encoder's: [CLS] text [SEP]
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name} has no eos token, and the reward is read there; set eos_token in its tokenizer_config.json"
        )
    if reward_token is not None:
        _check_reward_token(tokenizer, reward_token, saved)
    text_ids = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in text_ids:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:  # lengths are for us to limit
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
    tokenizer.split_special_tokens = False  # else the end token would be spelt out, and its last letter scored
    if chat_template_name is not None:
        tokenizer.chat_template = read_template(chat_template_name)
    if (reward_token := reward_token_of(tokenizer)) is not None and tokenizer.chat_template is not None:
        write = (
            "{% if not add_generation_prompt %}{{ " + json.dumps(reward_token, ensure_ascii=False) + " }}{% endif %}"
        )
        _change_templates(tokenizer, lambda template: template.removesuffix(write) + write)
    if prints_date(tokenizer):
        # The template may look the function up under this name: a macro of its own takes precedence.
        _change_templates(tokenizer, lambda template: FIXED_DATE + template.removeprefix(FIXED_DATE))
    return tokenizer


def reward_token_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that was made for scoring (XTuner's reward_token_id); None where the last token of the text is scored."""
    return getattr(tokenizer, "reward_token", None)


def reward_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of `reward_token_of`."""
    return getattr(tokenizer, "reward_token_id", None)


def ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """What plain text has to end with: EOS, and the reward token where there is one."""
    return tokenizer.eos_token + (reward_token_of(tokenizer) or "")


def _check_reward_token(tokenizer: PreTrainedTokenizerBase, reward_token: str, saved: str | None) -> None:
    if saved not in (None, reward_token):
        raise UserError(
            f"--reward_token {reward_token}: the tokenizer was saved with the reward token {saved}; remove the flag"
        )
    taken = [
        name for name in ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    ]
    used = [name for name in taken if getattr(tokenizer, name, None) == reward_token]
    if used := used or (["pad_token"] if reward_token == PAD_TOKEN else []):
        raise UserError(
            f"--reward_token {reward_token}: is the tokenizer's {used[0]}, which text may hold; name a token of its own"
        )
    ids = tokenizer(f"a{reward_token}", add_special_tokens=False, verbose=False)["input_ids"]
    if ids[-1] != tokenizer.convert_tokens_to_ids(reward_token) or not reward_token.strip():
        raise UserError(f"--reward_token {reward_token!r}: this tokenizer cannot keep it in one piece; name another")


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints today's date (or did, before `load_tokenizer` fixed it)."""
    return any("strftime_now" in template for template in _templates(tokenizer).values())


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat template, or templates by name."""
    template = tokenizer.chat_template or {}
    return template if isinstance(template, dict) else {"": template}


def _change_templates(tokenizer: PreTrainedTokenizerBase, change) -> None:
    changed = {name: change(template) for name, template in _templates(tokenizer).items()}
    tokenizer.chat_template = changed if isinstance(tokenizer.chat_template, dict) else changed[""]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything of the tokenizer that decides token ids: vocabulary, merges, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "backend": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "reward": reward_token_of(tokenizer),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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

    A pair that the chat template refuses gives the UserError that says so in its place. Pairs that give the template the
    same besides their messages are rendered in one call; one by one it would take three times as long.
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


def _rendered_together(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple]) -> list[PairText]:
    """Pairs of text, or of messages with the same template variables."""
    if isinstance(pairs[0][1], str):
        return [_as_text(tokenizer, *pair[:3]) for pair in pairs]
    if tokenizer.chat_template is None:
        raise UserError(
            "the rows are messages, and the tokenizer has no chat template; choose one with --chat_template_name "
            f"({', '.join(template_names())}, or a Jinja file)"
        )

    def render(conversations: list[list[dict]], **how) -> list[str]:
        how = pairs[0][3] | how
        return tokenizer.apply_chat_template(conversations, tokenize=False, **how) if conversations else []

    try:
        prompts = iter(render([prompt for prompt, *_ in pairs if prompt], add_generation_prompt=True))
        sides = iter(render([prompt + side for prompt, *both, _ in pairs for side in both]))
    except Exception as error:  # a template is a program; given an odd row, it may fail in any way
        raise UserError(f"the chat template refuses these messages: {quote_error(error)}") from error
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


def token_name(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as a person reads it, e.g. `'<|im_end|>' (id 7)`."""
    return f"{tokenizer.decode([token_id])!r} (id {token_id})"
