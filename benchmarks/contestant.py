"""One training run in a process of its own, so that its peak memory is its own. Started by throughput.py.

    python benchmarks/contestant.py SETTINGS.json      prints one JSON line: pairs/s, tokens/s, peak memory, seconds

The clock runs from the end of the second step (the first ones compile and allocate) to the end of the last, everything
between included: batches, logging, the optimizer. Both trainers get the same folder, the same token ids and the same
numbers of pairs a step.
"""

import contextlib
import functools
import json
import resource
import sys
import time
from pathlib import Path

WARM_UP_STEPS = 2
# Of Liger's kernels without its fused losses of language modelling, which replace a classifier's forward by one that asks for an
# lm_head. transformers passes this to _apply_liger_kernel_to_instance.
LIGER = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def peak_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def rates(tokens: list[float], seconds: float, pairs: int) -> dict[str, float]:
    """Rates from the tokens of each step of an epoch over `pairs` pairs, of which the first steps are not in `seconds`.

    A pair counts by its tokens: group_by_length begins with the longest pairs, and counting heads would call the rest fast.
    """
    per_second = sum(tokens[WARM_UP_STEPS:]) / seconds
    return {"pairs_per_second": per_second * pairs / sum(tokens), "tokens_per_second": per_second, "seconds": seconds}


def without_headers() -> None:
    """In this process prompts are shared by their answers alone, and what they have in common at their start is not."""
    from benchmarks import switching
    from open_rm.data.pairs import PreferenceData

    switching.look_for_headers(False)
    whole = PreferenceData.table.func
    PreferenceData.table = functools.cached_property(lambda data: switching.without_order(whole(data)))
    PreferenceData.table.__set_name__(PreferenceData, "table")


def train_ours(settings: dict) -> dict:
    """The recipe itself, without evaluation; rates come from its own metrics.jsonl."""
    from open_rm.flags import Args
    from open_rm.reward_modeling import main

    if not settings.get("headers", True):
        without_headers()
    if not settings.get("stretches", True):
        from benchmarks import switching

        switching.compute_apart(False)

    output = Path(settings["scratch"])
    with contextlib.redirect_stdout(sys.stderr):
        main(
            Args(
                model_name_or_path=settings["model"],
                dataset_mixer_list=[settings["data"], "1.0"],
                dataset_local_cache_dir=str(output / "cache"),
                output_dir=str(output / "out"),
                max_token_length=settings["max_token_length"],
                max_prompt_token_length=settings["max_token_length"],
                per_device_train_batch_size=settings["batch"],
                gradient_accumulation_steps=settings["accumulation"],
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                dtype=settings["dtype"],
                gradient_checkpointing="off",
                batching=settings["layout"],
                group_by_prompt=settings["group_by_prompt"],
                max_tokens_per_micro_batch=settings.get("positions"),
                num_evals=0,
            )
        )
    rows = [json.loads(line) for line in (output / "out" / "metrics.jsonl").open()]
    first, last = rows[WARM_UP_STEPS - 1], rows[-1]
    seconds = 3600 * (last["hours"] - first["hours"])
    tokens = [row["perf/tokens_per_second"] * row["perf/step_seconds"] for row in rows]
    return {
        **rates(tokens, seconds, pairs=last["episode"]),
        "peak_gib": last["perf/memory_gib"],
        "mfu": sum(row["perf/mfu"] for row in rows[WARM_UP_STEPS:]) / len(rows[WARM_UP_STEPS:]),
        "data_share": sum(row["perf/data_seconds"] for row in rows[WARM_UP_STEPS:]) / seconds,
        "distinct": sum(row["perf/distinct_token_fraction"] for row in rows) / len(rows),
        "loss": last["train/rm/loss"],
    }


def train_trl(settings: dict) -> dict:
    """TRL's RewardTrainer on the same token ids."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    from benchmarks import workloads
    from open_rm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(settings["model"])
    cache = Path(settings["scratch"]) / "cache"
    data = workloads.read_pairs(Path(settings["data"]), tokenizer, cache, max_token_length=settings["max_token_length"])
    pairs = data.pairs(range(len(data)))
    rows = {
        "chosen_ids": [chosen.tolist() for chosen, _ in pairs],
        "rejected_ids": [rejected.tolist() for _, rejected in pairs],
        "length": [max(len(chosen), len(rejected)) for chosen, rejected in pairs],
    }
    dtype = torch.bfloat16 if settings["dtype"] == "bfloat16" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(settings["model"], num_labels=1, dtype=dtype)

    ends: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), state.global_step))

    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    tokens: list[int] = []

    def counting(rows: list[dict]) -> dict:
        """TRL's own batches, their tokens counted here on the host."""
        batch = collate(rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    config = RewardConfig(
        output_dir=str(Path(settings["scratch"]) / "trl"),
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulation"],
        num_train_epochs=1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_length=None,
        train_sampling_strategy=settings["sampling"],
        length_column_name="length",
        remove_unused_columns=False,
        gradient_checkpointing=False,  # TRL's own default is True, slower and smaller
        bf16=settings["dtype"] == "bfloat16",
        use_liger_kernel=torch.cuda.is_available(),
        liger_kernel_config=LIGER,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        data_collator=counting,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    seconds = ends[-1][0] - ends[WARM_UP_STEPS - 1][0]
    accumulation = settings["accumulation"]
    per_step = [sum(tokens[start : start + accumulation]) for start in range(0, len(tokens), accumulation)]
    return {
        **rates(per_step, seconds, pairs=len(data)),
        "peak_gib": peak_gib(),
        "loss": trainer.state.log_history[-2].get("loss"),
    }


if __name__ == "__main__":
    chosen = json.loads(Path(sys.argv[1]).read_text())
    if chosen["trainer"] == "in turn":
        from benchmarks.in_turn import steps_in_turn

        found = {"rounds": steps_in_turn(chosen)}
    else:
        found = train_trl(chosen) if chosen["trainer"] == "trl" else train_ours(chosen)
    print("RESULT " + json.dumps(found))
