"""DeepSpeed behind a few verbs, on one process or many.

What it adds to DeepSpeed is exactness: gradients are summed, not averaged, over ranks and micro-batches, so the loss
that the recipe divides by the pairs of the whole step is the loss that is stepped on.
What it holds between two steps is read and filled as flat tensors (engine_state.py), which checkpoints keep.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Callable

import torch
import transformers

from open_rm import alive
from open_rm.errors import UserError
from open_rm.flags import OptimizerFlags
from open_rm.ranks import Ranks  # before deepspeed: it says which device DeepSpeed is for
from open_rm.training.engine_state import Flat, flats_of, tensors_of, weights_changed

import deepspeed  # isort: skip
from deepspeed.runtime import bf16_optimizer  # isort: skip
from deepspeed.utils import logger  # isort: skip

bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it prints three lines for each group of parameters
MOST_8_BIT = 2**31 - 1  # bitsandbytes counts the weights of a tensor in 32 bits, and ZeRO makes one tensor of a group


class Engine:
    """A model being trained. Call it for rewards; `backward` each micro-batch, then `step`."""

    def __init__(
        self,
        model: torch.nn.Module,
        flags: OptimizerFlags,
        config: dict,
        ranks: Ranks,
        total_steps: int = 1,
        warmup_steps: int = 0,
    ):
        """Wrap `model`; `config` is from ds_config.fill_config. The learning rate follows its schedule over total_steps."""
        self.ranks, self.config = ranks, config
        self.stage = config["zero_optimization"].get("stage", 0)
        self.optimizer = _optimizer(model, flags)
        self._clip_to = config["gradient_clipping"] if self.stage == 0 else 0.0
        own = {"gradient_clipping": 0.0} if self.stage == 0 else {}
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config | own)
        if self.stage == 0 and ranks.world_size == 1:
            # One rank has nothing to sum, and DeepSpeed would copy all gradients into a buffer and back for it.
            self._engine.enable_backward_allreduce = False
        self._schedule = transformers.get_scheduler(
            flags.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._schedule.get_last_lr()[0]

    @property
    def module(self) -> torch.nn.Module:
        """The model inside."""
        return self._engine.module

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        alive.beat()
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss` to the step's. `last`: this is the step's last micro-batch.

        DeepSpeed averages gradients over ranks; multiplying by their number makes it the sum.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, *, drop: bool = False) -> float:
        """Clip, update the weights, clear the gradients, move the learning rate on.

        drop: leave weights and moments as they are; so it is, too, where the norm of the gradients is no number.

        Returns:
            the global gradient norm before clipping; inf or NaN where the step was dropped.
        """
        norm = self._plain_step(drop) if self.stage == 0 else self._zero_step(drop)
        self._schedule.step()
        return norm

    def forget_gradients(self, loss_of: Callable[[], torch.Tensor]) -> None:
        """Drop what `backward` added since the last step, also where a pass broke off in its middle; all else stays as it is.

        loss_of: computes the loss of a small micro-batch, since DeepSpeed puts its buffers in order at the end of a whole pass.
        """
        zero = self._engine.optimizer
        if self.stage in (1, 2) and hasattr(zero, "params_already_reduced"):
            zero.params_already_reduced = [False] * len(zero.params_already_reduced)
            zero._release_ipg_buffers()
            for bucket in zero.ipg_buckets.values():
                bucket.clear()
        if self.stage == 3:
            # DeepSpeed asserts that each weight is in its bucket once, and a pass that broke off left some there.
            for bucket in zero.ipg_buckets.values():
                bucket.clear_params()
            for weight in self.module.parameters():
                weight.grad = None
        self.backward(loss_of(), last=True)
        with _without_warnings():  # of a step that is dropped, as every try's is
            self._plain_step(drop=True) if self.stage == 0 else self._zero_step(drop=True)

    def _plain_step(self, drop: bool) -> float:
        # ZeRO's optimizers clip and report the norm; plain data-parallel training reports none, every rank has all
        # gradients, and the norm that is wanted anyway serves for clipping.
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if drop or not math.isfinite(norm):
            self._engine.zero_grad()
            return math.nan
        if 0 < self._clip_to < norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_to, norm)
        self._engine.step()
        return norm.item()

    def _zero_step(self, drop: bool) -> float:
        zero = self._engine.optimizer
        if not drop:
            self._engine.step()
        else:  # ZeRO drops a step, and clears its buffers, where it finds that its norm is no number
            infinite = torch.full((1,), math.inf, device=self.ranks.device)
            lies = {"_get_norm_groups": [infinite[0]], "get_grads_for_norm": ([infinite], {})}
            name = next((name for name in lies if hasattr(zero, name)), "scaled_global_norm")
            setattr(zero, name, lambda *_, **__: lies.get(name, infinite[0]))
            try:
                self._engine.step()
            finally:
                delattr(zero, name)
        if not zero.overflow:
            return float(self._engine.get_global_grad_norm())
        if self.stage in (1, 2) and hasattr(zero, "averaged_gradients"):
            # With offload DeepSpeed lets go of these sums after a good step alone: the next one would begin with them.
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        return math.inf

    @contextlib.contextmanager
    def evaluating(self):
        """Evaluation mode without gradients; back to training mode afterwards."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def flats(self) -> list[Flat]:
        """What this rank holds of the weights and moments that are trained."""
        return flats_of(self._engine, self.optimizer, self.stage)

    def fill(self, shards, *, moments: bool = True) -> bool:
        """Fill them from a checkpoint (reliability/shards.py); returns whether all was copied bit for bit.

        moments: false for the weights alone.  `weights_changed` has to follow on all ranks.
        """
        return all([shards.load(flat, self.optimizer if moments else None) for flat in self.flats()])

    def weights_changed(self) -> None:
        """After `fill`: the weights that the model computes with follow. A collective call."""
        weights_changed(self._engine, self.stage)

    def schedule_state(self) -> dict:
        """Where the learning rate stands, as plain numbers."""
        return {"last_epoch": self._schedule.last_epoch, "_last_lr": self._schedule.get_last_lr()}

    def set_schedule(self, state: dict) -> None:
        """Go on where `schedule_state` stood."""
        groups = self.optimizer.param_groups  # all have one learning rate; there may be more of them than there were
        state = state | {"_last_lr": state["_last_lr"][:1] * len(groups), "_step_count": state["last_epoch"] + 1}
        self._schedule.load_state_dict(self._schedule.state_dict() | state)
        for group in groups:
            group["lr"] = state["_last_lr"][0]

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """The complete weights on the main rank's CPU, None elsewhere. A collective call."""
        if self.stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict()
        else:
            state = self.module.state_dict()
        if not self.ranks.is_main:
            return None
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def release(self) -> None:
        """Give the memory back: weights, gradients, moments, and what the allocator keeps. Nothing can be computed after it,
        neither here nor with the model that was given."""
        held = tensors_of([self._engine, self.optimizer, *self.module.parameters()])
        self._engine.destroy()
        self._engine = self.optimizer = self._schedule = None
        for tensor in held:  # DeepSpeed's hooks on the module hold what they were made with: letting go is not enough
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0)
        held.clear()
        gc.collect()
        if self.ranks.on_gpu:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _without_warnings():
    """DeepSpeed says nothing but errors."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _optimizer(model: torch.nn.Module, flags: OptimizerFlags) -> torch.optim.Optimizer:
    """Biases and norms are not decayed (the field's convention, as in transformers).

    optim: adamw; adamw_8bit, bitsandbytes' with moments in blocks of 8 bits (https://arxiv.org/abs/2110.02861); adafactor,
        torch's with moments by rows and columns (https://arxiv.org/abs/1804.04235).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # ds_shape: under ZeRO-3 p itself is an empty stand-in
    decayed = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for _, p in named if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": flags.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if flags.optim == "adamw_8bit":
        import bitsandbytes

        groups = [part for group in groups for part in _parts(group, MOST_8_BIT)]
        return bitsandbytes.optim.AdamW8bit(groups, lr=flags.learning_rate, eps=flags.eps)
    if flags.optim == "adafactor":
        return torch.optim.Adafactor(groups, lr=flags.learning_rate)
    return torch.optim.AdamW(groups, lr=flags.learning_rate, eps=flags.eps, fused=True)


def _parts(group: dict, most: int) -> list[dict]:
    """A group of parameters as several of at most `most` weights each."""
    parts, room = [], 0
    for p in group["params"]:
        size = getattr(p, "ds_numel", p.numel())
        if size > most:
            raise UserError(
                f"--optim adamw_8bit: a tensor of {size} weights is more than bitsandbytes can count; pass --optim adamw"
            )
        if size > room:
            parts.append(group | {"params": []})
            room = most
        parts[-1]["params"].append(p)
        room -= size
    return parts
