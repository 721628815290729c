"""TRL's RewardTrainer with a clock around it, for the GPU profile.

The model is loaded once; each setting gets a trainer of its own, with the same pairs in the same steps as ours (TRL's rows lie in
the order in which they are drawn, and its sampler is the sequential one). TRL runs as it comes but for what is named here:

    Liger's kernels are on, as an option of TRL's own (ours has them too); of them the fused losses of language modelling
        are off, since they replace the classifier's forward by that of a language model
    gradient checkpointing, TRL's default, is on or off as the setting says
    the score head begins as ours does, so that the first losses are the same
    nothing is saved or reported; per-step logging is left at TRL's interval

weights float32 with bfloat16 autocast are what TRL's trainer makes of a model's name (trl/trainer/utils.py,
create_model_from_path); bfloat16 weights, moments included, are cheaper and less exact than ours, which keep float32 copies.
"""

import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from benchmarks.contestant import LIGER
from benchmarks.measuring import How, Setting, Timed, free_memory, wait_for_device
from open_rm.data.pairs import PreferenceData
from open_rm.model.loading import initialise_head
from open_rm.ranks import Ranks


class TheirTraining:
    """A model, loaded once; `measure` takes one setting after another and goes on training."""

    def __init__(self, how: How, contestant: dict, tokenizer, ranks: Ranks):
        """contestant: an entry of contestants.CONTESTANTS."""
        self.how, self.contestant, self.tokenizer, self.ranks = how, contestant, tokenizer, ranks
        self.build()

    def build(self) -> None:
        """The model. Again, where a forward ran out of memory in the middle of a step."""
        self.model = None
        free_memory()  # the old one goes first
        self.model = AutoModelForSequenceClassification.from_pretrained(
            self.how.model,
            num_labels=1,
            dtype=getattr(torch, self.contestant["weights"]),
            attn_implementation=self.contestant.get("attention"),
        ).to(self.ranks.device)
        initialise_head(self.model.score, seed=1, score_init="default")

    def measure(self, setting: Setting, steps: list[np.ndarray], data: PreferenceData, *, warm: int) -> Timed:
        """Train on the steps; the clock runs over all but the first `warm`."""
        clock, counter = _Clock(warm), _CountingCollator(self.tokenizer.pad_token_id)
        per_forward = min(self.how.pairs_per_forward, setting.pairs_per_step)
        forwards = setting.pairs_per_step // per_forward
        self.model.gradient_checkpointing_disable()
        on_gpu = self.ranks.on_gpu
        config = RewardConfig(
            output_dir=str(Path(self.how.cache) / "trl"),
            per_device_train_batch_size=per_forward,
            gradient_accumulation_steps=forwards,
            max_steps=len(steps),
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_length=None,
            train_sampling_strategy="sequential",
            gradient_checkpointing=setting.recompute,
            use_liger_kernel=on_gpu,
            liger_kernel_config=LIGER if on_gpu else None,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        if self.contestant.get("sorts"):
            steps = [by_length(indices, data) for indices in steps]
        pairs = data.pairs(np.concatenate(steps))
        rows = {
            "chosen_ids": [chosen.tolist() for chosen, _ in pairs],
            "rejected_ids": [rejected.tolist() for _, rejected in pairs],
        }
        trainer = _Trainer(
            model=self.model,
            args=config,
            train_dataset=Dataset.from_dict(rows),
            data_collator=counter,
            processing_class=self.tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        losses = torch.stack(trainer.losses).float().view(len(steps), forwards).mean(1).tolist()
        positions, computed = counter.after(warm * forwards, len(steps) * forwards)
        expected = sum(len(chosen) + len(rejected) for chosen, rejected in pairs[warm * setting.pairs_per_step :])
        if computed != expected:
            raise RuntimeError(f"TRL trained on {computed} tokens, the pairs that were drawn have {expected}")
        # the trainer's optimizer goes, and with it what accelerate put around the model's forward
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
        self.model.zero_grad(set_to_none=True)
        del trainer
        free_memory()
        return Timed(clock.seconds, losses, positions, computed)


def by_length(indices: np.ndarray, data: PreferenceData) -> np.ndarray:
    """A step's pairs, shortest first, so that its forwards hold similar lengths: what group_by_length does, within a step."""
    lengths = np.maximum(data.table.chosen_length[indices], data.table.rejected_length[indices])
    return indices[np.argsort(lengths, kind="stable")]


class _Trainer(RewardTrainer):
    """Keeps each forward's loss on the device, where reading it waits for nothing."""

    losses: list[torch.Tensor]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), (loss[0] if isinstance(loss, tuple) else loss).detach()]
        return loss


class _Clock(TrainerCallback):
    """Seconds from the end of the last warm step to the end of the last step."""

    def __init__(self, warm: int):
        self.warm, self.started, self.seconds = warm, 0.0, 0.0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.warm:
            wait_for_device()
            self.started = time.perf_counter()
        elif state.global_step == state.max_steps:
            wait_for_device()
            self.seconds = time.perf_counter() - self.started


class _CountingCollator:
    """TRL's own collator, counting on the host what it makes."""

    def __init__(self, pad_token_id: int):
        self.collate = DataCollatorForPreference(pad_token_id=pad_token_id)
        self.made: list[tuple[int, int]] = []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        self.made.append((batch["attention_mask"].numel(), int(batch["attention_mask"].sum())))
        return batch

    def after(self, first: int, end: int) -> tuple[int, int]:
        """(positions, tokens) of the forwards from `first` to `end`; a loader may have made one more."""
        positions, tokens = zip(*self.made[first:end], strict=True)
        return sum(positions), sum(tokens)
