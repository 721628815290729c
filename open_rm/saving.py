"""The saved folder, and the proof that plain transformers reads the same rewards from it.

The contract: a `...ForSequenceClassification` with one label and problem_type "regression" (else clients return a
sigmoid), a score head of shape [1, D], the tokenizer's own pad id in the config, a chat template and a tokenizer class
that older clients load too, no BOS twice, files readable by others, nothing that needs custom code.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from open_rm import adapters
from open_rm.errors import UserError, quote_error
from open_rm.model import RewardModel
from open_rm.tokenization import encode, ending, render_pair

# Absolute plus relative to the reward. float32: the order of sums differs between layouts. bfloat16: 8 bits of
# mantissa in every layer, and plain transformers rounds the reward itself to bfloat16 (ours is float32). 4-bit weights are
# the same in both, but on some CPUs bitsandbytes computes with them in bfloat16 whatever it is told.
RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "4-bit": 5e-2}


def claim_folder(folder: str) -> None:
    """Make sure that a model can be written there when the training is over, and that no run is overwritten."""
    path = Path(folder)
    for name, what in (("config.json", "a model"), ("metrics.jsonl", "the record of a run")):
        if (path / name).exists():
            raise UserError(f"--output_dir {folder} already holds {what}; choose another folder, or move that one away")
    was_there = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
        if not was_there:
            path.rmdir()  # a run that is refused later leaves nothing behind
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error


@dataclass(frozen=True)
class Loading:
    """What a client has to say besides the folder.

    dtype: of an adapter's base; a whole model's folder says it itself.  load_in_4bit: whether that base is packed.
    trust_remote_code: whether the model brings code of its own.
    """

    dtype: str = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False


def write_facts(folder: str, facts: dict) -> None:
    """run.json: the run's flags, derived numbers, log lines and versions, to repeat it or to find out why not."""
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
    text = json.dumps(facts | {"versions": versions | {"python": platform.python_version()}}, indent=2)
    (Path(folder) / "run.json").write_text(text + "\n", encoding="utf-8")


def save_reward_model(
    model: RewardModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    *,
    chat: bool,
    merge_adapter: bool = False,
    loading: Loading | None = None,
) -> None:
    """Write the folder (main rank only): a model, or an adapter with its head where the model has one.

    Args:
        state: the complete weights, from Engine.gathered_state.
        chat: trained on conversations (the template writes the special tokens) or on plain text (the encoder does).
        merge_adapter: write an adapter and its base as one model; `loading` says how the base was held.
    """
    path = Path(folder)
    weights = {name.removeprefix("classifier."): tensor.contiguous() for name, tensor in state.items()}
    if model.adapted is None:
        model.classifier.save_pretrained(path, state_dict=weights)
    elif not merge_adapter:
        adapters.save(model.adapted, weights, path)
        (path / "README.md").unlink(missing_ok=True)  # peft's; the recipe writes its own
    else:
        with tempfile.TemporaryDirectory() as apart:
            adapters.save(model.adapted, weights, Path(apart))
            merged = adapters.merge(apart, tokenizer, **dataclasses.asdict(loading))
        for part in {id(c): c for c in (merged.config, merged.config.get_text_config())}.values():
            part.pad_token_id = tokenizer.pad_token_id
        merged.config.problem_type, merged.config.id2label = "regression", model.classifier.config.id2label
        merged.config.label2id = model.classifier.config.label2id
        merged.save_pretrained(path)
    _save_tokenizer(path, tokenizer, chat, loading is not None and loading.trust_remote_code)
    if not adapters.is_adapter(path):
        _mend_model_config(path / "config.json")
    for file in path.iterdir():
        if file.is_file():  # safetensors writes for its owner alone
            file.chmod(0o644)


def _mend_model_config(file: Path) -> None:
    """Write rotary settings where transformers 4 looks for them too; it would silently take its defaults instead."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else there are none, or one set per kind of layer, which transformers 4 never had
        rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        config["rope_theta"] = rope["rope_theta"]
        if rest.get("rope_type", "default") != "default":
            config["rope_scaling"] = rest
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config["model_type"] == "gpt_neox":
            config["rotary_emb_base"], config["rotary_pct"] = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rehearse(tokenizer: PreTrainedTokenizerBase, *, chat: bool, trust_remote_code: bool) -> None:
    """Before training: save the tokenizer somewhere and refuse one whose clients would get other tokens than training."""
    with tempfile.TemporaryDirectory() as folder:
        _save_tokenizer(Path(folder), tokenizer, chat, trust_remote_code)
        _check_encoding(folder, tokenizer, chat, trust_remote_code)


def _save_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, chat: bool, trust_remote_code: bool) -> None:
    tokenizer.save_pretrained(path)
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has a dict under this name, and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # What the encoder adds by itself must not come on top of what the text already has. On a conversation the template
    # has written everything; on plain text the encoder's BOS was trained with, and EOS stands at the end of the text.
    # Written even where absent: transformers 4 takes True for some families then.
    config["add_eos_token"] = False
    unwanted = {tokenizer.eos_token}
    if chat:
        config["add_bos_token"] = False
        unwanted.add(tokenizer.bos_token)
    if (path / "tokenizer.json").is_file():  # not of a tokenizer written in Python
        _remove_added(path / "tokenizer.json", unwanted)
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    added = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)("a")["input_ids"]
    if (path / "tokenizer.json").is_file() and set(added) & {
        tokenizer.convert_tokens_to_ids(token) for token in unwanted if token
    }:
        # Some classes (BertTokenizer) put back what their file no longer says; the plain class reads the file alone.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_added(file: Path, tokens: set[str | None]) -> None:
    """Take special tokens out of what the encoder adds (its post-processor)."""

    def without(processor: dict | None) -> dict | None:
        if processor and processor["type"] == "Sequence":
            processor["processors"] = [without(part) for part in processor["processors"]]
        elif processor and processor["type"] == "TemplateProcessing":
            for key in ("single", "pair"):
                pieces = processor[key]
                processor[key] = [piece for piece in pieces if piece.get("SpecialToken", {}).get("id") not in tokens]
        return processor

    content = json.loads(file.read_text(encoding="utf-8"))
    content["post_processor"] = without(content.get("post_processor"))
    Tokenizer.from_str(json.dumps(content)).save(str(file))


@dataclass(frozen=True)
class Probe:
    """What the trainer computed for a few texts. sequences: token ids.  rewards: one each."""

    sequences: list[list[int]]
    rewards: list[float]


def check_reload(
    folder: str,
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
    fresh_process: bool,
    loading: Loading | None = None,
) -> str:
    """Load the folder as any client would and compare token ids, and rewards one by one and as a padded batch.

    Any client: plain transformers, or peft where the folder holds an adapter.

    Args:
        tokenizer: the trainer's; `chat` says how it was used.
        fresh_process: reload in a process of its own. Needed where transformers' modules were patched in this one (Liger):
            what is built here would not be plain.

    Returns:
        a line for the log with the largest difference.

    Raises:
        UserError: a client would not get the trainer's rewards; the model must not be trusted.
    """
    loading = loading or Loading()
    _check_encoding(folder, tokenizer, chat, loading.trust_remote_code)
    if fresh_process:
        command = [sys.executable, "-m", "open_rm.saving", folder, json.dumps(dataclasses.asdict(loading))]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        done = subprocess.run(
            command, input=json.dumps(probe.sequences), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"{folder}: plain transformers cannot load it: {done.stderr.strip().splitlines()[-1:]}")
        reloaded = json.loads(done.stdout.splitlines()[-1])
    else:
        try:
            reloaded = plain_rewards(folder, probe.sequences, loading)
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"{folder}: a client cannot load it ({quote_error(error)}); do not use this model"
            ) from error
    tolerance = RELOAD_TOLERANCE[reloaded["dtype"]]
    worst = 0.0
    for how in ("one by one", "in a padded batch"):
        for ours, theirs in zip(probe.rewards, reloaded[how], strict=True):
            worst = max(worst, abs(theirs - ours))
            if not abs(theirs - ours) <= tolerance * (1 + abs(ours)):
                raise UserError(
                    f"{folder}: reloaded by plain transformers {how}, a reward is {theirs:.6f} and the trainer's {ours:.6f} "
                    f"(allowed: {tolerance:.0e} * (1 + |reward|)); do not use this model"
                )
    return (
        f"reload check: {len(probe.sequences)} rewards from {folder} in plain transformers, one by one and padded, equal ours "
        f"(largest difference {worst:.1e}, {reloaded['dtype']})"
    )


def _check_encoding(folder: str, tokenizer: PreTrainedTokenizerBase, chat: bool, trust_remote_code: bool) -> None:
    """A client that encodes a complete text, with the tokenizer's defaults or without special tokens, gets our ids."""
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if chat:
        prompt, answer = [{"role": "user", "content": "Hello, you."}], [{"role": "assistant", "content": "Hello!"}]
        try:
            ours = render_pair(tokenizer, prompt, answer, answer)
        except UserError:  # some templates want a system message
            prompt = [{"role": "system", "content": "Be kind."}, *prompt]
            ours = render_pair(tokenizer, prompt, answer, answer)
        text = saved.apply_chat_template(prompt + answer, tokenize=False)
        ways = ({}, {"add_special_tokens": False})
    else:
        text = f"Hello, you.{ending(tokenizer)}"
        ours = render_pair(tokenizer, "", "Hello, you.", "Hello, you.")
        ways = ({},)
    expected = encode(tokenizer, [ours.chosen], chat=chat)[0]
    for options in ways:
        ids = saved(text, **options)["input_ids"]
        if ids != expected:
            raise UserError(
                f"the tokenizer, once saved, gives a client that encodes {text!r} the tokens {ids}, and training has "
                f"{expected}; name another with --tokenizer_name, or another template with --chat_template_name"
            )


def plain_rewards(folder: str, sequences: list[list[int]], loading: Loading | None = None) -> dict:
    """Rewards by plain transformers, {"one by one": [...], "in a padded batch": [...], "dtype": name}."""
    loading = loading or Loading()
    trust = {"trust_remote_code": loading.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    if adapters.is_adapter(folder):
        model = adapters.load(folder, pad_token_id=tokenizer.pad_token_id, **dataclasses.asdict(loading))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", **trust).eval()
    bytes_needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > bytes_needed:
        model.to("cuda")
    with torch.no_grad():
        single = [model(input_ids=torch.tensor([ids], device=model.device)).logits.item() for ids in sequences]
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt").to(model.device)
        batched = model(**batch).logits.float().squeeze(-1).tolist()
    computed_in = (
        "4-bit" if loading.load_in_4bit and adapters.is_adapter(folder) else str(model.dtype).removeprefix("torch.")
    )
    return {"one by one": single, "in a padded batch": batched, "dtype": computed_in}


if __name__ == "__main__":
    print(json.dumps(plain_rewards(sys.argv[1], json.load(sys.stdin), Loading(**json.loads(sys.argv[2])))))
