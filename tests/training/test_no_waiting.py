"""Forward and backward never ask the device for a value, so that a GPU is never waited for within a micro-batch.

A GPU itself says so under torch.cuda.set_sync_debug_mode (the test marked gpu). On the CPU every operation is looked at: those
that turn a tensor into a number or into a shape are the ones that wait.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import alone, in_a_process, on_gpu

from open_rm.batching.layouts import lay_out
from open_rm.training import metrics
from open_rm.training.metrics import Meter

MICRO_BATCHES = """
import contextlib, json, sys, numpy, torch
from torch.utils._python_dispatch import TorchDispatchMode
from open_rm.batching.layouts import lay_out
from open_rm.batching.targets import ListColumns, TargetColumns
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import BatchFlags, ModelFlags, ObjectiveFlags, OptimizerFlags
from open_rm.model.loading import load_reward_model
from open_rm.model.reward_model import model_shape
from open_rm.model.kernels import apply_fused_kernels
from open_rm.ranks import joined_ranks
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine
from open_rm.training.losses import loss_terms
from open_rm.training.metrics import Meter
from open_rm.training.stragglers import Stragglers

folder, layout, stage, dtype, waits = sys.argv[1], sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4]), sys.argv[5] == "waits"
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "allclose")

class Watch(TorchDispatchMode):
    asked = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith(ASKS):
            self.asked.append(name)
        return function(*args, **(kwargs or {}))

@contextlib.contextmanager
def watching():
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")
    else:
        with Watch():
            yield

tokenizer = load_tokenizer(folder)
with joined_ranks() as ranks:
    model, _ = load_reward_model(ModelFlags(model_name_or_path=folder), tokenizer, layout=layout, dtype=dtype)
    apply_fused_kernels(model, ranks.device)
    file = None if stage == "none" else stage
    config = fill_config(BatchFlags(deepspeed=file), width=model.width, bf16=dtype == torch.bfloat16, max_grad_norm=1.0)
    engine = Engine(model, OptimizerFlags(), config, ranks, total_steps=4)
    meter = Meter(ranks, model_shape(model), dtype, Stragglers(engine.module, ranks, print))
    margins, label_prob = numpy.float32([0.5, 1.0]), numpy.float32([0.5, 0.8])
    ids, levels = numpy.array([3, 1]), numpy.array([0, 1])
    lists = ListColumns(numpy.array([7, 7]), (ids, ids[::-1]), (levels, levels[::-1]), best_alone=False)
    # each of what the loss may be told, in one of the cases
    told = {"padded": TargetColumns(margins), "packed": TargetColumns(None, label_prob), "shared_prefix": TargetColumns(lists=lists)}
    objective = ObjectiveFlags(list_loss="plackett_luce" if layout == "shared_prefix" else "pairs")
    pairs = [([*range(5, 45), 7], [*range(5, 30), 9]), ([*range(50, 70)], [*range(50, 60), 3, 4])]
    for number in range(4):
        batch = lay_out(layout, pairs, pad_token_id=tokenizer.pad_token_id, prompt_ids=[0, 1])
        targets = told[layout].of_step(numpy.arange(2))(numpy.arange(2))
        if ranks.on_gpu:
            batch, targets = batch.pinned(), targets.pinned()
        with watching() if number == 2 else contextlib.nullcontext():
            chosen, rejected = engine(**batch.inputs(ranks.device)).chunk(2)
            terms = loss_terms(chosen, rejected, targets, objective)
            if waits and number == 2:
                float(chosen[0])
            engine.backward(sum(terms.values()).sum() / 4, last=number % 2 == 1)
            meter.add(chosen, rejected, terms, batch, targets)
        if number % 2 == 1:
            meter.reduce(4)
            engine.step()
    print(json.dumps(Watch.asked))
"""
CASES = [
    ("padded", "none", "float32"),
    ("shared_prefix", "none", "bfloat16"),
    ("packed", "configs/ds/zero2.json", "bfloat16"),
]


@pytest.mark.parametrize(("layout", "stage", "dtype"), CASES)
def test_no_value_is_asked_for_within_a_micro_batch(toy, layout, stage, dtype):
    asked = in_a_process(MICRO_BATCHES, toy / "model", layout, stage, dtype, "not")
    # Of padded rows transformers asks whether any has padding, and whether the mask is all ones: before the first layer.
    assert asked == (["_local_scalar_dense"] * 2 if layout == "padded" else [])


def test_a_value_that_is_asked_for_is_found(toy):
    assert in_a_process(MICRO_BATCHES, toy / "model", *CASES[1], "waits") == ["_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["none", "configs/ds/zero2.json"])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_gpu_is_never_waited_for_within_a_micro_batch(toy, layout, stage):
    on_gpu(MICRO_BATCHES, toy / "model", layout, stage, "bfloat16", "not")


def test_counts_of_a_micro_batch_are_plain_numbers_until_they_are_reduced(monkeypatch):
    monkeypatch.setattr(metrics, "matmul_flops", lambda ranks, dtype: 1000.0)
    shape = SimpleNamespace(body_parameters=10, read_parameters=3, layers=2, attention_width=4, passes=3)
    meter = Meter(alone(), shape, torch.float32)
    batch = SimpleNamespace(tokens=30, computed=24, per_prompt=27, positions=40, area=90, read_index=torch.arange(7))
    made = []
    monkeypatch.setattr(torch, "tensor", lambda *values, **how: made.append(values))
    meter.add(torch.ones(2), torch.zeros(2), {"ranking": torch.ones(2)}, batch)
    assert made == []


def test_pinned_is_every_tensor_of_a_batch(monkeypatch):
    """What a GPU is given from other memory it waits for, so not one may be left out."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    pairs = [(np.array([5, 6, 7, 8]), np.array([5, 6, 9]))]
    for layout, count in (("padded", 4), ("packed", 6), ("shared_prefix", 7)):
        batch = lay_out(layout, pairs, pad_token_id=0, prompt_ids=[0])
        pinned.clear()
        again = batch.pinned()
        given = [*batch.inputs(torch.device("cpu")).values()]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if batch.segments is not None:
            tensors += [value for value in vars(batch.segments).values() if isinstance(value, torch.Tensor)]
        assert len(pinned) == len(tensors) == count
        assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in pinned}
        assert torch.equal(again.input_ids, batch.input_ids) and again.positions == batch.positions
