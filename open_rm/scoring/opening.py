"""What a user named becomes an open reward model, or one sentence that says why not.

    ours        contract.json is there: chat or plain text and its ending as in training
    an adapter  of ours, beside its base as contract.json says
    others'     a `...ForSequenceClassification` with one label: gives what plain transformers gives one by one

DeepSpeed is not imported, here or anywhere below.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from open_rm.data import tokenizer as tokenizers
from open_rm.errors import UserError, quote_error
from open_rm.flags import ModelFlags, OpeningFlags
from open_rm.model import adapters, families, loading
from open_rm.model.any_decoder import AUTO
from open_rm.model.contract import CONTRACT, Contract
from open_rm.model.kernels import capability_of
from open_rm.scoring import folders
from open_rm.scoring.computing import Computer, Facts
from open_rm.scoring.open_model import OWN, Recipe, read_config
from open_rm.scoring.processes import Workers
from open_rm.scoring.scorer import Scorer, SequenceRules

UNBOUNDED = 2**20  # most tokens where neither the model nor its tokenizer names a limit


def open_scorer(flags: OpeningFlags) -> Scorer:
    """Open the model that the flags name.

    Raises:
        UserError: it is none that gives one reward a text, or cannot be opened as asked.
    """
    folder = folders.find(flags.model, flags.model_revision)
    with _in_words_of_these_flags(flags.model, folder):
        found = _look(flags, folder)
        devices = _devices(flags.num_processes)
        recipe, why_not_shared = _recipe(flags, found, devices[0])
        mark = _fingerprint(found, recipe)
        most = flags.max_tokens_per_micro_batch
        computer = Workers(recipe, devices, most) if len(devices) > 1 else Computer(recipe, devices[0], most)
        try:
            rules = _rules(flags, found, recipe, computer.facts)
        except UserError:
            computer.close()
            raise
    lines = [*_said(flags.model, found, recipe, rules, why_not_shared), *computer.facts.lines]
    if len(devices) > 1:
        lines.append(f"{len(devices)} processes compute, on {', '.join(map(str, dict.fromkeys(devices)))}")
    return Scorer(flags.model, computer, recipe, found.tokenizer, rules, lines=lines, fingerprint=mark)


@dataclass(frozen=True)
class Identity:
    """What is known of a model without its weights, as the Scorer of it has it."""

    fingerprint: str
    layout: str
    chat: bool
    max_token_length: int


def identify(flags: OpeningFlags) -> Identity:
    """The model as `open_scorer` would open it. Its class may place fewer tokens than its config says (RoBERTa's), and
    max_token_length is then too large.

    Raises:
        UserError: the small files show that `open_scorer` would refuse it.
    """
    folder = folders.find(flags.model, flags.model_revision)
    with _in_words_of_these_flags(flags.model, folder):
        found = _look(flags, folder)
        recipe, _ = _recipe(flags, found, _devices(flags.num_processes)[0])
        most = _most(flags, found, _positions(found.config))
        return Identity(_fingerprint(found, recipe), recipe.layout, _is_chat(found), most)


def look(flags: OpeningFlags) -> bool:
    """Whether it is known how the model reads conversations: one of ours, or with a chat template. Reads no weights.

    Raises:
        UserError: the small files show that `open_scorer` would refuse it.
    """
    folder = folders.find(flags.model, flags.model_revision)
    with _in_words_of_these_flags(flags.model, folder):
        found = _look(flags, folder)
    return found.contract is not None or found.tokenizer.chat_template is not None


@contextlib.contextmanager
def _in_words_of_these_flags(name: str, folder: Path) -> Iterator[None]:
    """Sentences of other rooms speak of training's flags, and of the folder that a Hub name was fetched into."""
    try:
        yield
    except UserError as mistake:
        said = str(mistake).replace("--model_name_or_path", "--model").replace("--tokenizer_name", "--model")
        raise UserError(said.replace(str(folder), name)) from mistake


@dataclass(frozen=True)
class _Found:
    """What the small files of a folder say.

    contract: of one of ours; None of others'.  adapter: adapter_config.json, of an adapter.
    config: of the whole model, or of the adapter's base.  own_code: whether its class is code that it brings along.
    """

    folder: Path
    contract: Contract | None
    adapter: dict | None
    config: PreTrainedConfig
    own_code: bool
    tokenizer: PreTrainedTokenizerBase


def _look(flags: OpeningFlags, folder: Path) -> _Found:
    """Refuses what the small files show to be no reward model, before weights are read."""
    contract, code = _contract(folder), flags.trust_remote_code
    adapter = _adapter_config(folder, contract)
    name, revision = (adapter["base_model_name_or_path"], adapter["revision"]) if adapter else (str(folder), None)
    config, loader = read_config(name, revision=revision, code=code)
    if contract is None:
        _check_has_one_label(folder, config)
    plain = getattr(loader, "__name__", "") == "AutoModelForSequenceClassification"
    if contract is not None and contract.trust_remote_code and not code and plain:
        raise UserError(
            f"--model {folder}: needs Python code that it brings along; read that code, then pass --trust_remote_code"
        )
    own_code = code and plain and AUTO in (getattr(config, "auto_map", None) or {})
    template = flags.chat_template_name if contract is None else None
    tokenizer = tokenizers.load_tokenizer(str(folder), chat_template_name=template, trust_remote_code=code)
    if contract is not None:
        _check_template(flags, folder, contract, tokenizer)
    if own_code:
        loading.check_trusted_code(ModelFlags(model_name_or_path=name, model_revision=revision, trust_remote_code=True))
    _check_length(flags, _positions(config))
    return _Found(folder, contract, adapter, config, own_code, tokenizer)


def _fingerprint(found: _Found, recipe: Recipe) -> str:
    facts = (tokenizers.fingerprint(found.tokenizer), recipe.dtype, f"code {recipe.code}")
    return folders.fingerprint(found.folder, *facts)


def _positions(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model can place, as its config says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_length(flags: OpeningFlags, positions: int | None) -> None:
    wanted = flags.max_token_length
    if positions and wanted and wanted > positions:
        raise UserError(
            f"--max_token_length {wanted} is beyond the {positions} positions of {flags.model}; pass {positions} or less"
        )


def _check_template(flags: OpeningFlags, folder: Path, contract: Contract, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of ours has the template of its training, and no other one gives its rewards."""
    if contract.chat and tokenizer.chat_template is None:
        raise UserError(
            f"--model {folder}: has lost its chat_template.jinja, which wrote the conversations that it was trained on, and no "
            "other will do; save, export or pull the model again, or copy the file from where it came from"
        )
    if flags.chat_template_name is not None:
        raise UserError(
            f"--chat_template_name {flags.chat_template_name}: {folder} has the one it was trained with; leave it out"
        )


def _contract(folder: Path) -> Contract | None:
    if not (folder / CONTRACT).is_file():
        return None
    try:
        return Contract.read(folder)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"--model {folder}: {CONTRACT} in it cannot be read ({quote_error(error)}); save the model again, or open it "
            "with the version of open_rm that wrote it"
        ) from error


def _adapter_config(folder: Path, contract: Contract | None) -> dict | None:
    """adapter_config.json of an adapter of ours; None where the folder holds a whole model."""
    if not adapters.is_adapter(folder):
        return None
    if contract is None or not contract.holds_adapter:
        raise UserError(
            f"--model {folder}: an adapter without our {CONTRACT}, so how its base was loaded is not known; merge the two "
            "(peft's merge_and_unload), save the sum with its tokenizer, and name that folder"
        )
    return json.loads((folder / adapters.ADAPTER_CONFIG).read_text(encoding="utf-8"))


def _check_has_one_label(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse what its config says to be no reward model."""
    named = ", ".join(getattr(config, "architectures", None) or ["a model of no named class"])
    if config.num_labels == 1:
        return
    if "SequenceClassification" in named:
        raise UserError(
            f"--model {folder}: {named} has {config.num_labels} labels, and a reward model has one; name a model with one label"
        )
    raise UserError(
        f"--model {folder}: {named} is no `...ForSequenceClassification` with one label, so its rewards would be random; "
        "train it with open_rm.reward_modeling, or name a reward model"
    )


def _devices(num_processes: int | None) -> list[torch.device]:
    """One device for each process."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return [torch.device("cpu")] * (num_processes or 1)
    if (num_processes or 1) > gpus:
        raise UserError(
            f"--num_processes {num_processes}: a process takes a GPU, and there are {gpus}; pass {gpus} or less"
        )
    return [torch.device("cuda", number) for number in range(num_processes or gpus)]


def _recipe(flags: OpeningFlags, found: _Found, device: torch.device) -> tuple[Recipe, str | None]:
    """How every process opens it, and why it shares no prompts, where it does not."""
    contract, text, dtype = found.contract, found.config.get_text_config(), _dtype(flags, found, device)
    layout = families.choose_layout(
        flags.batching,
        found.config,
        attn_implementation=None,
        max_token_length=flags.max_token_length or getattr(text, "max_position_embeddings", None) or 0,
        on_gpu=device.type == "cuda",
        bf16=dtype == torch.bfloat16,
        capability=capability_of(device),
    )
    name, why = layout.name, layout.why_not_shared
    if contract is None and found.own_code and name != "padded":
        why = "its class is code that it brings along, which is called as it is"
        if flags.batching != "auto":
            raise UserError(f"--batching {flags.batching} is not possible: {why}; leave it to auto")
    if contract is None and (found.own_code or text.model_type not in families.SEGMENTS):
        name = OWN
    base = contract.base() | {"trust_remote_code": flags.trust_remote_code} if found.adapter else None
    pad = getattr(text, "pad_token_id", None) if contract is None else found.tokenizer.pad_token_id
    recipe = Recipe(
        folder=str(found.folder),
        layout=name,
        dtype=str(dtype).removeprefix("torch."),
        pad_token_id=pad,
        base=base,
        code=flags.trust_remote_code,
    )
    return recipe, why


def _dtype(flags: OpeningFlags, found: _Found, device: torch.device) -> torch.dtype:
    if not found.adapter or not found.contract.load_in_4bit:
        return loading.compute_dtype(flags.dtype, device)
    held_in = found.contract.dtype
    if flags.dtype not in ("auto", held_in):
        raise UserError(
            f"--dtype {flags.dtype}: the adapter's base is held in 4 bits that compute in {held_in}; leave it out, or train "
            "with --merge_adapter"
        )
    return getattr(torch, held_in)


def _rules(flags: OpeningFlags, found: _Found, recipe: Recipe, facts: Facts) -> SequenceRules:
    """How sequences have to look, now that the model is there."""
    contract, text = found.contract, found.config.get_text_config()
    _check_length(flags, facts.positions)
    most = _most(flags, found, facts.positions)
    trained = (contract.max_token_length, contract.max_prompt_token_length) if contract else (None, None)
    cut_to = flags.max_token_length or min(most, trained[0] or most)
    rope = getattr(text, "rope_parameters", None) or {}
    reads_where_its_pooling_says = recipe.layout == OWN or found.config.model_type in families.ENCODERS
    return SequenceRules(
        chat=_is_chat(found),
        ending="" if contract is None else contract.ending,
        ours=contract is not None,
        max_token_length=most,
        rows=facts.rows,
        cut_to=(cut_to, min(cut_to, trained[1] or cut_to)),
        # there the frequencies change, for all rows of a forward
        apart_at=rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else 0,
        skipped=None if reads_where_its_pooling_says else recipe.pad_token_id,
    )


def _most(flags: OpeningFlags, found: _Found, positions: int | None) -> int:
    """Most tokens of a sequence."""
    if flags.max_token_length:
        return flags.max_token_length
    most = positions or UNBOUNDED
    if found.contract is None:
        # tokenizers of others may know better than the config (RoBERTa); a huge number means nothing
        most = min(most, found.tokenizer.model_max_length)
    return most


def _is_chat(found: _Found) -> bool:
    """Whether it scores conversations, which its template renders."""
    return found.tokenizer.chat_template is not None if found.contract is None else found.contract.chat


def _said(name: str, found: _Found, recipe: Recipe, rules: SequenceRules, why_not_shared: str | None) -> list[str]:
    """What was opened as what, for the log."""
    contract, kind = found.contract, found.config.model_type
    if contract is None:
        what = f"somebody's {', '.join(getattr(found.config, 'architectures', None) or [kind])} with one label"
    elif found.adapter:
        held_in = "4 bits (NF4)" if contract.load_in_4bit else contract.dtype
        what = f"an adapter of ours, beside its base {found.adapter['base_model_name_or_path']} in {held_in}"
    else:
        what = f"a reward model of ours ({kind})"
    scored = "conversations, rendered by its chat template" if rules.chat else "plain text"
    if rules.ending and not rules.chat:
        scored += f" that ends in {rules.ending!r}"
    why = f", not shared_prefix: {why_not_shared}" if why_not_shared else ""
    layout = "its own forward on padded rows" if recipe.layout == OWN else recipe.layout
    lines = [
        f"{name}: {what}; it scores {scored}, of at most {rules.max_token_length} tokens",
        f"computed in {recipe.dtype}, batching: {layout}{why}",
    ]
    if contract is not None and contract.max_token_length:
        prompt = f", {contract.max_prompt_token_length} of them its prompt" if contract.max_prompt_token_length else ""
        lines.append(f"trained on at most {contract.max_token_length} tokens a side{prompt}")
    if recipe.one_by_one:
        lines.append(
            "sequences are computed one by one: its config names no pad token, and its class needs one for several"
        )
    elif contract is None and rules.skipped is not None and rules.skipped == found.tokenizer.eos_token_id:
        pad = found.tokenizer.convert_ids_to_tokens(rules.skipped)
        lines.append(
            f"its pad is its end token, {pad}: as in transformers, the reward is read before those at a text's end"
        )
    if rules.chat and tokenizers.prints_date(found.tokenizer):
        lines.append(f"its chat template prints today's date; here it is always {tokenizers.DATE}")
    return lines
