"""The tokenizer of training and of every client: its pad and end tokens, its reward token, its chat template.

Rules that keep a reward the same wherever it is computed:
  - padding is on the right, and the pad token is one that never occurs in text (never eos, bos or unk);
  - a reward token, where there is one, comes after the end of the text and is scored. It belongs to the tokenizer
    (transformers saves it as `reward_token`) and the chat template writes it, so clients need not know of it;
  - a template that prints today's date prints a fixed one;
  - a saved tokenizer names no BOS, and the scored token as its EOS, so that clients add nothing to a conversation
    (publishing/tokenizer_files.py). Its template says what they were; `load_tokenizer` names them again, and who goes on
    from a saved folder has the tokenizer of its training.
What is not covered: choosing a template for the user. Without one, messages are refused by name (encoding.py).
"""

import hashlib
import json
import re
from collections.abc import Callable

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_rm.data.templates import read_template
from open_rm.errors import UserError, quote_error
from open_rm.flags import ModelFlags

PAD_TOKEN = "<|pad|>"
# Some templates print today's date, and rewards would change from day to day. This is the date that those of Llama 3.1 and
# later take when they are not told today's.
DATE = "26 Jul 2024"
FIXED_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"
# What a saved chat template begins with where the tokenizer beside it names other tokens than in training (`say_names`).
LITERAL = r'("(?:[^"\\]|\\.)*")'
NAMES = re.compile(rf"\A(?:{{% set bos_token = {LITERAL} %}})?{{% set eos_token = {LITERAL} %}}\n")


def tokenizer_of(flags: ModelFlags) -> PreTrainedTokenizerBase:
    """The tokenizer that the flags name: one of its own, or the model's."""
    is_models = flags.tokenizer_name in (None, flags.model_name_or_path)
    return load_tokenizer(
        flags.tokenizer_name or flags.model_name_or_path,
        revision=flags.tokenizer_revision or (flags.model_revision if is_models else None),
        chat_template_name=flags.chat_template_name,
        reward_token=flags.reward_token,
        trust_remote_code=flags.trust_remote_code,
    )


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
        chat_template_name: a name of `templates.template_names()`, a Jinja file, or None for the tokenizer's own template.
        reward_token: is appended to every response and scored; added if the tokenizer does not know it. None: the one
            the tokenizer was saved with, if any.
        trust_remote_code: whether code that the folder brings may run.

    Raises:
        UserError: the tokenizer cannot be loaded, has no eos token to score, or was saved with another reward token.
    """
    tokenizer, saved = _from_pretrained(name, revision, reward_token, trust_remote_code)
    _name_again(tokenizer)
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
    _mend_templates(tokenizer)
    return tokenizer


def _from_pretrained(
    name: str, revision: str | None, reward_token: str | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer, and the reward token that it was saved with."""
    how = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
        saved = reward_token_of(tokenizer)
        if reward_token is not None and saved is None:
            tokenizer = AutoTokenizer.from_pretrained(name, reward_token=reward_token, **how)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"--tokenizer_name {name}: no tokenizer could be loaded ({quote_error(error)}); "
            "check the name, or pass a folder that holds tokenizer.json"
        ) from error
    return tokenizer, saved


def _mend_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """The chat template writes the reward token, where there is one, and a fixed date in place of today's."""
    if (reward_token := reward_token_of(tokenizer)) is not None and tokenizer.chat_template is not None:
        literal = json.dumps(reward_token, ensure_ascii=False)
        write = "{% if not add_generation_prompt %}{{ " + literal + " }}{% endif %}"
        change_templates(tokenizer, lambda template: template.removesuffix(write) + write)
    if prints_date(tokenizer):
        # The template may look the function up under this name: a macro of its own takes precedence.
        change_templates(tokenizer, lambda template: FIXED_DATE + template.removeprefix(FIXED_DATE))


def say_names(template: str, *, bos_token: str | None, eos_token: str) -> str:
    """The template with the values of `bos_token` and `eos_token` in it, for a tokenizer that no longer says them.

    A line of its own: transformers removes the newline after a block, so the template's first line is read as before.
    """
    names = {"bos_token": bos_token, "eos_token": eos_token}
    literals = {name: json.dumps(token, ensure_ascii=False) for name, token in names.items() if token is not None}
    return "".join(f"{{% set {name} = {literal} %}}" for name, literal in literals.items()) + "\n" + template


def _name_again(tokenizer: PreTrainedTokenizerBase) -> None:
    """Undo `say_names`, and name the tokens that it said."""
    for template in templates_of(tokenizer).values():
        if said := NAMES.match(template):
            bos_token, eos_token = said.groups()
            if bos_token is not None:
                tokenizer.bos_token = json.loads(bos_token)
            tokenizer.eos_token = json.loads(eos_token)
    change_templates(tokenizer, lambda template: NAMES.sub("", template))


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
    for name in ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"):
        # PAD_TOKEN becomes the pad of a tokenizer that has none, after this check
        if getattr(tokenizer, name, None) == reward_token or (name == "pad_token" and reward_token == PAD_TOKEN):
            raise UserError(
                f"--reward_token {reward_token}: is the tokenizer's {name}, which text may hold; name a token of its own"
            )
    ids = tokenizer(f"a{reward_token}", add_special_tokens=False, verbose=False)["input_ids"]
    if ids[-1] != tokenizer.convert_tokens_to_ids(reward_token) or not reward_token.strip():
        raise UserError(f"--reward_token {reward_token!r}: this tokenizer cannot keep it in one piece; name another")


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints today's date (or did, before `load_tokenizer` fixed it)."""
    return any("strftime_now" in template for template in templates_of(tokenizer).values())


def templates_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat template, or templates by name."""
    template = tokenizer.chat_template or {}
    return template if isinstance(template, dict) else {"": template}


def change_templates(tokenizer: PreTrainedTokenizerBase, change: Callable[[str], str]) -> None:
    """Change every chat template of the tokenizer, if it has any."""
    if not tokenizer.chat_template:
        return
    changed = {name: change(template) for name, template in templates_of(tokenizer).items()}
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
