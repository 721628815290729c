"""What may differ between a run and the command that goes on with it.

What changes the mathematics is refused by its name; what does not (paths, logging, ranks, micro-batches, how often to evaluate
or to save) is allowed and said. Data are compared by their content, not by their names.
"""

import dataclasses
import hashlib
import json
from dataclasses import MISSING

import numpy as np

from open_rm.data.pairs import PreferenceData
from open_rm.errors import UserError
from open_rm.flags import Args

# Flags whose change leaves weights and losses as they would have been. Those of the data are in its mark; those of the batch
# decide the pairs of a step, which are compared apart.
FREE = {
    *("model_name_or_path", "model_revision", "trust_remote_code", "tokenizer_name", "tokenizer_revision"),
    *("use_slow_tokenizer", "chat_template_name", "attn_implementation", "gradient_checkpointing", "merge_adapter"),
    *("dataset_mixer_list", "dataset_mixer_list_splits", "dataset_mixer_eval_list", "dataset_mixer_eval_list_splits"),
    *("dataset_format", "column_map", "label_values", "lower_is_better", "ignore_columns", "margin_from", "parse_hh"),
    *(
        "as_messages",
        "skip_bad_rows",
        "max_token_length",
        "max_prompt_token_length",
        "overlength",
        "num_proc",
        "strict",
    ),
    *(
        "dataset_local_cache_dir",
        "cache_dataset_only",
        "exp_name",
        "run_name",
        "output_dir",
        "push_to_hub",
        "hf_entity",
    ),
    *("hf_repo_id", "hf_repo_revision", "hf_repo_private", "num_evals", "eval_steps", "per_device_train_batch_size"),
    *(
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "batching",
        "max_tokens_per_micro_batch",
        "deepspeed",
    ),
    *("num_sample_pairs", "with_tracking", "wandb_project_name", "wandb_entity", "checkpointing_steps"),
    *("checkpointing_minutes", "keep_last_n_checkpoints", "resume_from_checkpoint", "load_best_model_at_end"),
    *("stall_timeout", "max_skipped_steps", "benchmark", "benchmark_rows", "benchmark_max_token_length"),
    *("sequence_parallel_size", "find_batch_size", "dry_run", "world_size", "device_memory_gib", "tokens_per_second"),
}
# Where the best evaluation decides what is saved, or when to stop, these decide too.
DECIDE_THE_BEST = {"num_evals", "eval_steps", "load_best_model_at_end"}
NOT_WORTH_SAYING = {"resume_from_checkpoint", "run_name"}


def plain(flags: object) -> dict:
    """Flags by name as JSON knows them, so that those of a file can be compared: from Python, a path may be one."""
    return json.loads(json.dumps(dataclasses.asdict(flags), default=str))


def changed(saved: dict, now: dict, *, where: str) -> list[str]:
    """Flags that differ and may, as `--name old -> new`.

    Args:
        saved: flags of the run that was begun; what it does not have is at its default.  now: those given.
        where: the run, for the sentence.

    Raises:
        UserError: one differs that changes the mathematics.
    """
    free = FREE - DECIDE_THE_BEST if now["metric_for_best_model"] else FREE
    differ = {}
    for name, value in now.items():
        before = saved.get(name, _default(name))
        if before != value and str(before) != str(value):  # a switch may have become a word: True, "True"
            differ[name] = f"--{name} {_shown(before)} -> {_shown(value)}"
    forbidden = [text for name, text in differ.items() if name not in free]
    if forbidden:
        raise UserError(
            f"{where} cannot be gone on with by this command, which would train another model: {', '.join(forbidden)}; give "
            "the flags that it was begun with, or choose another --output_dir"
        )
    return [text for name, text in differ.items() if name not in NOT_WORTH_SAYING]


def _default(name: str) -> object:
    field = Args.__dataclass_fields__[name]
    return field.default if field.default is not MISSING else field.default_factory()


def _shown(value: object) -> str:
    text = (" ".join(map(str, value)) or "nothing") if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def data_mark(data: PreferenceData | None, *, margins: bool = False) -> str | None:
    """The pairs' content in a hash: tokens, prompts, sources, labels, lists, attributes where there are any, and margins where they
    enter the loss; in their order."""
    if data is None:
        return None
    digest = hashlib.sha256()
    table = data.table
    for column in (table.chosen_id, table.rejected_id, table.prompt_id, table.prompt_length, data.source_ids()):
        digest.update(np.ascontiguousarray(column).tobytes())
    _, first, of_pair = np.unique(table.list_id, return_index=True, return_inverse=True)
    # ids of lists follow from places, which may change
    for column in (data.label_probs(), *data.levels(), first[of_pair]):
        digest.update(np.ascontiguousarray(column).tobytes())
    attributes = data.attributes()
    if attributes.size:
        digest.update(np.ascontiguousarray(attributes).tobytes())
    if margins:
        digest.update(np.ascontiguousarray(data.margins()).tobytes())
    return digest.hexdigest()


def differing(saved: dict, now: dict, *, where: str, evaluations_decide: bool) -> list[str]:
    """Marks of data and frozen weights ("training data", "held-out data", "frozen weights"): what differs and may.

    Raises:
        UserError: something differs that changes the mathematics.
    """
    lines = []
    for name, mark in now.items():
        if saved.get(name) == mark:
            continue
        if name == "held-out data" and not evaluations_decide:
            lines.append(
                "the held-out data are others than before, so evaluations cannot be compared with earlier ones"
            )
        else:
            raise UserError(
                f"{where}: {name} differ from those that it was begun with; give those, or choose another --output_dir"
            )
    return lines
