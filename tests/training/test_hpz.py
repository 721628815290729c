"""ZeRO++'s hierarchical partitioning: every node keeps a copy of the weights among its devices, and nothing else changes.

The trap is a copy that is older than the weights: an evaluation would judge, and a step would follow, a model that is gone.
Four ranks of two nodes of two train all cases, forked by a process that has imported all.
"""

import copy
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from transformers import LlamaConfig, LlamaForSequenceClassification

from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, BatchFlags, ModelFlags, OptimizerFlags
from open_rm.training.ds_config import describe, fill_config, read_config

RANKS, NODE, WIDTH, STEPS = 4, 2, 18, 10
# The step that is dropped since its gradient is no number; the one after which the weights are gathered, as a save in mid-run
# would, and kept, as a checkpoint would.
TORN, KEPT = 4, 6
GATHERED = Counter()
LORA, FROZEN = {"use_peft": True, "lora_r": 3}, {"freeze_backbone": True}
# name: DeepSpeed file, steps, whether as with a large model (layers are recomputed, what was gathered is let go after use),
# flags of the model and of the adapter
CASES = {
    "zero0": ("zero0", STEPS, False, {}, {}),
    "zero3": ("zero3", STEPS, False, {}, {}),
    "hpz": ("zero3_hpz", STEPS, True, {}, {}),
    "resumed": ("zero3_hpz", STEPS, False, {}, {}),  # from what zero3 kept
    "lora, zero0": ("zero0", 3, False, {}, LORA),
    "lora, hpz": ("zero3_hpz", 3, False, {}, LORA),
    "frozen, zero0": ("zero0", 3, False, FROZEN, {}),
    "frozen, hpz": ("zero3_hpz", 3, False, FROZEN, {}),
}


def shipped(name: str) -> str:
    return str(REPOSITORY / f"configs/ds/{name}.json")


# ---------------------------------------------------------------- what a rank does


def of_a_rank(folder: Path) -> None:
    """Train all cases, one after the other; the main rank writes what each gave to <folder>/<case>.pt."""
    from open_rm.data.tokenizer import load_tokenizer
    from open_rm.ranks import joined_ranks

    tokenizer = load_tokenizer(str(folder / "model"))
    count_gathers()
    for case in CASES:
        with joined_ranks() as ranks:
            found = train(folder, case, tokenizer, ranks)
        if ranks.is_main:
            torch.save(found, folder / f"{case}.pt")
    raise SystemExit(0)


def train(folder: Path, case: str, tokenizer, ranks) -> dict:
    """What each step gave, what evaluations between them, and the weights; then what the engine computes once it is filled with
    what was kept."""
    file, steps, large, of_model, of_adapter = CASES[case]
    engine = engine_of(str(folder / "model"), tokenizer, file, large, of_model, of_adapter, ranks)
    size, kept = len(tokenizer), min(KEPT, steps - 2)
    held_out = batch_of(2 + ranks.rank, 9, size, seed=ranks.rank)

    def evaluated() -> list[float]:
        with engine.evaluating():
            return [reward for rewards in ranks.gathered(engine(**held_out).tolist()) for reward in rewards]

    found = {"steps": {}, "rewards": {"before": evaluated()}}
    if case == "resumed":  # its copies are of the model that was loaded
        fill(engine, folder, "zero3", ranks)
        found["rewards"][kept] = evaluated()
    for step in range(kept + 1 if case == "resumed" else 0, steps):
        GATHERED.clear()
        found["steps"][step] = one_step(engine, ranks, step, size)
        if step == 1:  # whose copies no evaluation has made
            found["gathered in a step"] = dict(GATHERED)
        if step in (kept, TORN, steps - 1):
            found["rewards"][step] = evaluated()
        if step == kept:
            found["gathered"] = copy.deepcopy(engine.gathered_state())  # on a CPU, stage 0 gives its own
            keep(engine, folder, case, ranks)
    found["copies"] = numbers_of_copies(engine.module)
    found["weights"] = copy.deepcopy(engine.gathered_state())
    if case != "resumed":
        found["again"] = evaluated()  # gathering put an end to the copies of the last step; now there are some
        fill(engine, folder, case, ranks)
        found["filled"] = evaluated()
    model = engine.module
    engine.release()
    found["left"] = numbers_of_copies(model)
    return found


def engine_of(model: str, tokenizer, file: str, large: bool, of_model: dict, of_adapter: dict, ranks):
    from open_rm.model.loading import load_reward_model
    from open_rm.model.recompute import recompute
    from open_rm.training.engine import Engine

    flags = BatchFlags(deepspeed=shipped(file))
    config = fill_config(flags, width=WIDTH, bf16=False, max_grad_norm=1.0, world_size=RANKS)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 30  # else an adapter's matrices are not divided
    if large:
        config["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    how = {"adapter": AdapterFlags(**of_adapter), "deepspeed_config": config}
    reward_model, _ = load_reward_model(ModelFlags(model_name_or_path=model, **of_model), tokenizer, **how)
    recompute(reward_model.classifier, 1 if large else 0)
    own = OptimizerFlags(learning_rate=1e-2, eps=1e-5, lr_scheduler_type="constant")
    return Engine(reward_model, own, config, ranks)


def count_gathers() -> None:
    """From now on GATHERED tells how many weights DeepSpeed gathered among how many ranks."""
    from deepspeed.runtime.zero import partition_parameters

    gather = partition_parameters._dist_allgather_fn

    def counted(part, whole, group=None):
        GATHERED[torch.distributed.get_world_size(group)] += whole.numel()
        return gather(part, whole, group)

    partition_parameters._dist_allgather_fn = counted


def batch_of(rows: int, length: int, size: int, seed: int) -> dict[str, torch.Tensor]:
    from open_rm.batching.layouts import lay_out_sequences

    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, size, (rows, length), generator=drawn).tolist()
    return lay_out_sequences("padded", ids, pad_token_id=0, prompt_of=range(rows)).inputs(torch.device("cpu"))


def one_step(engine, ranks, step: int, size: int) -> tuple[float, float]:
    """Two micro-batches, another number of rows on each rank; the loss over all ranks, and the norm of its gradient."""
    loss = 0.0
    for number in range(2):
        rows = 1 + (ranks.rank + number) % 3
        rewards = engine(**batch_of(2 * rows, 7 + number, size, seed=100 * step + 10 * number + ranks.rank))
        term = torch.nn.functional.softplus(rewards[rows:] - rewards[:rows]).sum() / 16
        engine.backward(term, last=number == 1)
        loss += term.item()
    norm = engine.step(drop=step == TORN)
    return sum(ranks.gathered(loss)), norm if math.isfinite(norm) else math.nan  # stage 0 says NaN, the others inf


def keep(engine, folder: Path, case: str, ranks) -> None:
    from open_rm.reliability.shards import Snapshot

    snapshot = Snapshot(pinned=False)
    snapshot.take(engine.flats())
    snapshot.write(folder / f"{case}-{ranks.rank}.safetensors", {})
    ranks.gathered(None)  # all are written


def fill(engine, folder: Path, case: str, ranks) -> None:
    from open_rm.reliability.shards import Shards
    from open_rm.training.engine_state import trained_sizes

    files = [folder / f"{case}-{rank}.safetensors" for rank in range(ranks.world_size)]
    assert engine.fill(Shards(files, trained_sizes(engine.module)))
    engine.weights_changed()


def numbers_of_copies(module) -> int:
    """In this rank's parts of its node's copies."""
    copies = [getattr(p, "ds_secondary_tensor", None) for p in module.parameters()]
    return sum(part.numel() for part in copies if part is not None)


# ---------------------------------------------------------------- what came of it


@pytest.fixture(scope="module")
def trained(toy, nursery, tmp_path_factory) -> dict[str, dict]:
    """What each case gave."""
    folder = tmp_path_factory.mktemp("hpz")
    shutil.copytree(toy / "model", folder / "model")
    config = {"num_hidden_layers": 2, "num_attention_heads": 3, "pad_token_id": 0, "num_labels": 1}
    config["vocab_size"] = json.loads((folder / "model/config.json").read_text())["vocab_size"]
    torch.manual_seed(5)  # few of its matrices divide by four
    odd = LlamaForSequenceClassification(LlamaConfig(hidden_size=WIDTH, intermediate_size=37, **config))
    odd.save_pretrained(folder / "model")
    here = [str(Path(__file__).parent), str(REPOSITORY / "tests")]
    patch = f"""
import pathlib, sys
sys.path[:0] = {here}
import test_hpz
test_hpz.of_a_rank(pathlib.Path({str(folder)!r}))
"""
    env = {"TEST_PATCH": patch, "LOCAL_WORLD_SIZE": str(NODE)}
    nursery.start([], folder / "log", processes=RANKS, env=env).finish()
    return {case: torch.load(folder / f"{case}.pt") for case in CASES}


def same(one, other) -> None:
    """Within 1e-5: float32 in another order of additions, which AdamW's eps of 1e-5 keeps from being blown up."""
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "plain"),
    [("hpz", "zero0"), ("hpz", "zero3"), ("lora, hpz", "lora, zero0"), ("frozen, hpz", "frozen, zero0")],
)
def test_losses_gradients_rewards_between_steps_and_weights_are_those_of_plain_zero(trained, case, plain):
    ours, theirs = trained[case], trained[plain]
    for what in ("steps", "rewards", "gathered", "weights"):
        same(ours[what], theirs[what])
    assert all(math.isnan(ours["steps"][step][1]) == (step == TORN) for step in ours["steps"])
    moved = torch.tensor(ours["rewards"]["before"]) - torch.tensor(ours["rewards"][len(ours["steps"]) - 1])
    assert moved.abs().max() > 1e-2, "nothing was trained"


@pytest.mark.parametrize("case", ["hpz", "lora, hpz", "frozen, hpz"])
def test_weights_that_are_filled_in_are_computed_with_and_not_the_copies_of_before(trained, case):
    last = len(trained[case]["steps"]) - 1
    kept = min(KEPT, last - 1)
    assert trained[case]["again"] == trained[case]["rewards"][last]
    assert trained[case]["filled"] == trained[case]["rewards"][kept] != trained[case]["rewards"][last]


def test_a_run_of_plain_zero_3_goes_on_with_copies_to_the_weights_it_would_have_had(trained):
    """Bit for bit in what is filled in; the copies of a new engine are of the model that it was loaded with."""
    resumed, whole = trained["resumed"], trained["zero3"]
    assert resumed["rewards"]["before"] == whole["rewards"]["before"]
    assert resumed["rewards"][KEPT] == whole["rewards"][KEPT] != whole["rewards"]["before"]
    same(resumed["steps"], {step: whole["steps"][step] for step in range(KEPT + 1, STEPS)})
    same(resumed["weights"], whole["weights"])


def test_weights_cross_nodes_once_a_step_however_many_passes_it_has(trained):
    """Two micro-batches of a forward and a backward pass; with 3 % for what is padded, kept whole, or not let go between the two."""
    weights = sum(weight.numel() for weight in trained["zero3"]["weights"].values())
    ours = trained["hpz"]["gathered in a step"]
    assert ours[RANKS] == pytest.approx(weights, rel=0.03)
    assert ours[NODE] > 2 * weights


def test_copies_take_the_weights_divided_by_the_devices_of_a_node_and_are_given_back(trained):
    weights = sum(weight.numel() for weight in trained["hpz"]["weights"].values())
    assert trained["hpz"]["copies"] == pytest.approx(weights / NODE, rel=0.01)  # and at most three of padding each
    assert trained["zero3"]["copies"] == 0
    for case in CASES:
        assert trained[case]["left"] == 0


# ---------------------------------------------------------------- the file


def file_of(tmp_path: Path, zero: dict) -> str:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return str(tmp_path / "ds.json")


def filled(path: str, world_size: int) -> dict:
    return fill_config(BatchFlags(deepspeed=path), width=64, bf16=True, max_grad_norm=1.0, world_size=world_size)


@pytest.mark.parametrize(
    ("node", "world_size", "size"),
    [("8", 64, 8), ("4", 64, 4), ("8", 8, 1), ("1", 1, 1), (None, 64, 8), (None, 8, 1), (None, 4, 1), ("2", 4, 2)],
)
def test_auto_is_the_devices_of_a_node_and_nothing_where_there_is_one_node(monkeypatch, node, world_size, size):
    """Without a launcher, which says it, a node has eight or all: so does a dry run on a laptop count."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", node)
    config = filled(shipped("zero3_hpz"), world_size)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == size
    assert ("weights on every 8 devices" in describe(config, "cuda", world_size)) == (size == 8)


@pytest.mark.parametrize("size", [4, 16, 72])
def test_a_size_that_is_given_may_be_a_part_of_a_node_or_several(tmp_path, monkeypatch, size):
    """72: nodes of 4 devices in one NVLink domain."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4" if size == 72 else "8")
    path = file_of(tmp_path, {"stage": 3, "zero_hpz_partition_size": size})
    assert filled(path, 144)["zero_optimization"]["zero_hpz_partition_size"] == size


@pytest.mark.parametrize(
    ("zero", "world_size", "sentence"),
    [
        ({"stage": 3, "zero_hpz_partition_size": 8}, 4, "is 8, which does not divide the 4 devices of the run; give"),
        ({"stage": 3, "zero_hpz_partition_size": "auto"}, 12, "is 8, which does not divide the 12 devices"),
        ({"stage": 3, "zero_hpz_partition_size": 6}, 24, "is 6, and nodes have 8 devices: .* give 8"),
        ({"stage": 2, "zero_hpz_partition_size": 8}, 16, "is of ZeRO stage 3, and stage 2 divides no weights"),
        ({"zero_hpz_partition_size": "auto"}, 16, "is of ZeRO stage 3, and stage 0 divides no weights"),
        ({"stage": 3, "zero_hpz_partition_size": "8"}, 16, "is '8'; it must be a number of devices, or \"auto\""),
        ({"stage": 3, "zero_hpz_partition_size": -1}, 16, "is -1; it must be a number of devices"),
        ({"stage": 3, "zero_quantized_weights": True}, 16, '"zero_quantized_weights" rounds'),
        ({"stage": 3, "zero_quantized_gradients": True}, 16, '"zero_quantized_gradients" rounds'),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, 16, '"zero_quantized_nontrainable_weights" rounds'),
    ],
)
def test_what_cannot_be_or_would_change_the_mathematics_is_refused(tmp_path, monkeypatch, zero, world_size, sentence):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=sentence):
        filled(file_of(tmp_path, zero), world_size)


def test_a_file_that_divides_over_no_node_is_read_as_before(tmp_path):
    for zero in ({"stage": 2, "zero_hpz_partition_size": 1}, {"stage": 3, "zero_quantized_weights": False}):
        assert read_config(file_of(tmp_path, zero))["zero_optimization"] == zero
