"""The saved folder, and the proof that plain transformers reads the same rewards from it.

The contract: a `...ForSequenceClassification` with one label and problem_type "regression" (else clients return a
sigmoid), a score head of shape [1, D], the tokenizer's own pad id in the config, a chat template and a tokenizer class
that older clients load too, no BOS twice, files readable by others, nothing that needs custom code.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from open_rm.errors import UserError
from open_rm.model import RewardModel

# Absolute plus relative to the reward. float32: the order of sums differs between layouts. bfloat16: 8 bits of
# mantissa in every layer, and plain transformers rounds the reward itself to bfloat16 (ours is float32).
RELOAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def claim_folder(folder: str) -> None:
    """Make sure that a model can be written there when the training is over, and that none is overwritten."""
    path = Path(folder)
    if (path / "config.json").exists():
        raise UserError(f"--output_dir {folder} already holds a model; choose another folder, or move that one away")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error


def write_facts(folder: str, facts: dict) -> None:
    """run.json: the run's flags, derived numbers, log lines and versions, to repeat it or to find out why not."""
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
    text = json.dumps(facts | {"versions": versions | {"python": platform.python_version()}}, indent=2)
    (Path(folder) / "run.json").write_text(text + "\n", encoding="utf-8")


def save_reward_model(
    model: RewardModel, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: str, *, chat: bool
) -> None:
    """Write the folder (main rank only).

    Args:
        state: the complete weights, from Engine.gathered_state.
        chat: trained on conversations (the template writes the special tokens) or on plain text (the encoder does).
    """
    path = Path(folder)
    weights = {name.removeprefix("classifier."): tensor.contiguous() for name, tensor in state.items()}
    model.classifier.save_pretrained(path, state_dict=weights)
    tokenizer.save_pretrained(path)
    _mend_model_config(path / "config.json")
    _mend_tokenizer_files(path, tokenizer, chat)
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


def _mend_tokenizer_files(path: Path, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has a dict under this name, and fails
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if chat and tokenizer.chat_template is not None and _template_writes_bos(tokenizer):
        # Clients that render the template and then encode the text (pipelines, servers) would get BOS twice.
        # Written even where it was absent: transformers 4 takes True for some families then.
        config["add_bos_token"] = False
        _remove_added_bos(path / "tokenizer.json", tokenizer.bos_token)
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _template_writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _remove_added_bos(file: Path, bos_token: str) -> None:
    def without(processor: dict | None) -> dict | None:
        if processor and processor["type"] == "Sequence":
            processor["processors"] = [without(part) for part in processor["processors"]]
        elif processor and processor["type"] == "TemplateProcessing":
            for key in ("single", "pair"):
                processor[key] = [
                    piece for piece in processor[key] if piece.get("SpecialToken", {}).get("id") != bos_token
                ]
        return processor

    content = json.loads(file.read_text(encoding="utf-8"))
    content["post_processor"] = without(content.get("post_processor"))
    Tokenizer.from_str(json.dumps(content)).save(str(file))


def check_reload(folder: str, sequences: list[list[int]], rewards: torch.Tensor, device: torch.device) -> str:
    """Load the folder as any client would and compare rewards, one by one and as a padded batch.

    Args:
        sequences: token ids of a few complete texts.
        rewards: [len(sequences)] what the trainer computed for them.
        device: where the trainer computed; used when the reloaded model fits beside it.

    Returns:
        a line for the log with the largest difference.

    Raises:
        UserError: a reward differs by more than the tolerance; the model must not be trusted.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    bytes_needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > bytes_needed:
        model.to(device)
    tolerance = RELOAD_TOLERANCE[model.dtype]
    with torch.no_grad():
        single = [model(input_ids=torch.tensor([ids], device=model.device)).logits.squeeze() for ids in sequences]
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt").to(model.device)
        batched = model(**batch).logits.squeeze(-1)
    ours = rewards.double().cpu()
    worst = 0.0
    for how, theirs in (("one by one", torch.stack(single)), ("in a padded batch", batched)):
        difference = (theirs.double().cpu() - ours).abs()
        worst = max(worst, difference.max().item())
        if not bool((difference <= tolerance * (1 + ours.abs())).all()):
            raise UserError(
                f"{folder}: reloaded by plain transformers, rewards {how} differ from the trainer's by up to "
                f"{difference.max():.2e} (allowed: {tolerance:.0e} * (1 + |reward|)); do not use this model"
            )
    return (
        f"reload check: {len(sequences)} rewards from {folder} in plain transformers, one by one and padded, equal ours "
        f"(largest difference {worst:.1e}, {str(model.dtype).removeprefix('torch.')})"
    )
