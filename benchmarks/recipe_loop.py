"""Our recipe's training loop with a clock around it, for the GPU profile.

`build` and `measure` are `build` and `train` of open_rm/reward_modeling.py, room by room: load_reward_model, use_fastest, Engine, the
fit to the device's memory, training_steps, Meter, loss_terms, backward, step. Left out is what is not training: checkpoints,
evaluation, tracking, saving, the watchdog, and what a run that goes on needs.
"""

import dataclasses
import math
import time

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.measuring import How, Setting, Timed, free_memory, wait_for_device
from open_rm.batching import feeding
from open_rm.data.pairs import PreferenceData
from open_rm.flags import Args
from open_rm.model import recompute
from open_rm.model.kernels import use_fastest
from open_rm.model.loading import compute_dtype, load_reward_model
from open_rm.model.reward_model import model_shape
from open_rm.ranks import Ranks
from open_rm.training import ds_config, fitting
from open_rm.training.engine import Engine
from open_rm.training.losses import loss_terms
from open_rm.training.metrics import Meter


class OurTraining:
    """A model and its engine, built once; `measure` takes one setting after another and goes on training."""

    def __init__(self, how: How, contestant: dict, tokenizer, ranks: Ranks):
        """contestant: an entry of contestants.CONTESTANTS."""
        self.how, self.contestant, self.tokenizer, self.ranks = how, contestant, tokenizer, ranks
        self.build()

    def build(self) -> None:
        """Model and engine. Again, where a forward ran out of memory in the middle of a step."""
        self.model = self.engine = self.meter = None
        free_memory()  # the old ones go first
        ranks = self.ranks
        self.args = args = Args(
            model_name_or_path=self.how.model,
            dtype=self.how.dtype,
            max_token_length=self.how.max_token_length,
            per_device_train_batch_size=self.how.pairs_per_forward,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            float8=self.contestant.get("float8", False),
        )
        dtype, layout = compute_dtype(args.dtype, ranks.device), self.contestant["layout"]
        width, bf16 = AutoConfig.from_pretrained(args.model_name_or_path).hidden_size, dtype == torch.bfloat16
        how = {"width": width, "bf16": bf16, "max_grad_norm": args.max_grad_norm, "world_size": ranks.world_size}
        self.deepspeed_config = ds_config.fill_config(args, **how)
        how = {"layout": layout, "dtype": dtype, "seed": args.seed, "deepspeed_config": self.deepspeed_config}
        self.model, lines = load_reward_model(args, self.tokenizer, adapter=args, **how)
        lines += use_fastest(self.model, ranks.device, layout, float8=args.float8)
        self.engine = Engine(self.model, args, self.deepspeed_config, ranks)
        self.meter = Meter(ranks, model_shape(self.model), self.engine.dtype)
        print(*lines, sep="\n", flush=True)

    def fit(self, data: PreferenceData, *, recomputes: bool) -> None:
        """How many positions a forward has, as the recipe finds it; recomputation as the setting says, not by need."""
        recompute.recompute(self.model.classifier, 0)  # what a forward keeps is measured with all of it kept
        args, on_gpu = self.args, self.ranks.on_gpu
        args = dataclasses.replace(args, gradient_checkpointing="on" if recomputes else "off")
        where = {"max_token_length": args.max_token_length, "on_gpu": on_gpu, "table": data.table}
        rules = feeding.rules_of(args, self.contestant["layout"], self.tokenizer.pad_token_id, **where)
        rules, lines = fitting.fit(args, self.model, self.engine, rules, optim=args.optim, table=data.table)
        self.rules = feeding.with_attention_cost(rules, model_shape(self.model), on_gpu=on_gpu)
        if lines:
            print(*lines, sep="\n", flush=True)

    def measure(self, setting: Setting, steps: list[np.ndarray], data: PreferenceData, *, warm: int) -> Timed:
        """Train on the steps; the clock runs over all but the first `warm`."""
        self.fit(data, recomputes=setting.recompute)
        losses, positions, computed, started = [], 0, 0, 0.0
        for step in feeding.training_steps(steps, data, self.rules, self.ranks):
            losses.append(self.step(step))
            if step.number == warm:
                wait_for_device()
                started = time.perf_counter()
            elif step.number > warm:
                positions += sum(micro.batch.positions for micro in step.micro_batches)
                computed += sum(micro.batch.computed for micro in step.micro_batches)
        wait_for_device()
        return Timed(time.perf_counter() - started, losses, positions, computed)

    def step(self, step: feeding.Step) -> float:
        """What the recipe's loop does with a step; returns its loss."""
        self.forward_backward(step)
        return self.update(step)

    def forward_backward(self, step: feeding.Step) -> None:
        for micro in step.micro_batches:
            rewards = self.engine(**micro.batch.inputs(self.ranks.device))
            chosen, rejected, predicted = micro.sides(rewards)
            terms = loss_terms(chosen, rejected, micro.targets, self.args, predicted)
            self.engine.backward(sum(terms.values()).sum() / step.pairs, last=micro.last)
            self.meter.add(chosen, rejected, terms, micro.batch, micro.targets)

    def update(self, step: feeding.Step) -> float:
        means = self.meter.reduce(step.pairs)
        self.engine.step(drop=not math.isfinite(means["loss"]))
        return means["loss"]
