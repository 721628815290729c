"""Ranks that compute rows together, for test_sequence_parallel.py: one process imports all that they need and forks them.

`python ranks_of_a_sequence.py FOLDER`: FOLDER holds the toy. What is found is written there: <size>.pt, case -> values, and the
folders of whole runs with a log beside each.
"""

import functools
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from conftest import toy_flags
from forking import be_ready_to_fork, forked
from forking import become_a_rank as become_a_rank_of_a_run
from pairs_of_ids import as_data
from test_layouts_agree import CASES, CPU, FAMILIES, FAMILY_PAIRS, headed, ranked, tokens

from open_rm import reward_modeling
from open_rm.batching import feeding
from open_rm.batching.rules import LAYOUTS, BatchRules
from open_rm.batching.steps import draw_steps
from open_rm.data.tokenizer import load_tokenizer
from open_rm.evaluation import engine_scorer, held_out
from open_rm.flags import AdapterFlags, BatchFlags, ModelFlags, OptimizerFlags
from open_rm.model import sequence_parallel
from open_rm.model.loading import load_reward_model
from open_rm.model.recompute import recompute
from open_rm.ranks import Ranks, all_reduce_sum, joined_ranks
from open_rm.training import engine as engine_room
from open_rm.training.ds_config import fill_config
from open_rm.training.losses import ranking_loss

WORLDS = {1: (1,), 2: (2,), 4: (2, 4)}  # ranks -> sizes of their groups
SEVERAL = 150  # positions of a micro-batch on a device: several of them a step
P, Q = tokens(40, 1), tokens(12, 2)
PAIRS = ranked(P, [tokens(n, n) for n in (20, 14, 9, 25)]) + ranked(Q, [tokens(n, n) for n in (5, 80, 31)])
LENGTHS = [40] * 6 + [12] * 3
STAGES = {
    "ZeRO 0": {"stage": 0},
    "ZeRO 1": {"stage": 1},
    "ZeRO 2": {"stage": 2, "overlap_comm": True},
    "ZeRO 2 without reduce_scatter": {"stage": 2, "reduce_scatter": False},
    "ZeRO 3": {"stage": 3},
    "ZeRO 3 without reduce_scatter": {"stage": 3, "reduce_scatter": False},
}
ADAPTERS = {
    "adapter": AdapterFlags(use_peft=True, lora_r=4),
    "adapter beside 4 bits": AdapterFlags(use_peft=True, lora_r=4, load_in_4bit=True),
}
# Beside some of the layouts' cases: reads at the ends of stretches, where those of other ranks are moved to.
SHARING = {
    "sequences that end where stretches end": ([(tokens(32, 1), tokens(32, 2)), (tokens(32, 3), tokens(32, 4))], [0, 0])
}
HEADERS = "prompts of two headers"
SHARING[HEADERS] = headed(64, 40)
SHARING |= {
    name: CASES[name]
    for name in (
        "ranked lists of two prompts",
        "a response that begins another",
        "the same pair twice",
        "sequences of one token",
    )
}


def rules(layout: str) -> BatchRules:
    return BatchRules(layout, pad_token_id=2, max_tokens=SEVERAL, evaluation_tokens=SEVERAL)


def made(folder: Path, ranks: Ranks, layout: str, *, every: int = 0, adapter: AdapterFlags | None = None):
    """The folder's reward model, computed by the ranks' groups. every: how many layers one is recomputed."""
    flags, tokenizer = ModelFlags(model_name_or_path=str(folder)), load_tokenizer(str(folder))
    model, _ = load_reward_model(flags, tokenizer, layout=layout, adapter=adapter or AdapterFlags())
    recompute(model.classifier, every)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if "lora_B" in name:  # these begin as zeros, and those beside them would have no gradients
            weight.data.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    sequence_parallel.use(model, ranks)
    return model


# ---------------------------------------------------------------- cases: each is computed by all ranks, and gives values


def of_a_model(ranks: Ranks, folder: Path, layout: str, pairs, **how) -> dict:
    """Rewards of all pairs, and the gradient of their mean loss as the recipe computes it, added up over the ranks."""
    model = made(folder, ranks, layout, **how)
    rewards = held_out.score_pairs(model, pairs, np.arange(len(pairs)), rules(layout), ranks)
    [step] = feeding.training_steps([np.arange(len(pairs))], pairs, rules(layout), ranks)
    for micro in step.micro_batches:
        *sides, _ = micro.sides(model(**micro.batch.inputs(CPU)))
        (ranking_loss(*sides).sum() / step.pairs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return {"rewards": rewards, "gradients": gradients}


def an_engine(ranks: Ranks, folder: Path, layout: str, zero: dict, *, clip: float = 0.0, every: int = 0):
    model = made(folder, ranks, layout, every=every)
    config = fill_config(BatchFlags(), width=128, bf16=False, max_grad_norm=clip, world_size=ranks.world_size)
    flags = OptimizerFlags(learning_rate=2e-4, eps=1e-5, lr_scheduler_type="constant")
    return engine_room.Engine(model, flags, config | {"zero_optimization": zero}, ranks)


def losses_of(
    ranks: Ranks, folder: Path, layout: str, zero: dict, *, steps: int = 10, clip: float = 0.5, every: int = 1
):
    """Losses and gradient norms of some steps of 4 pairs, and the weights after them."""
    engine = an_engine(ranks, folder, layout, zero, clip=clip, every=every)
    pairs, found = as_data(PAIRS, LENGTHS), {"losses": [], "norms": []}
    draws = draw_steps(len(pairs), 4, 100, seed=5)
    for _, step in zip(range(steps), feeding.training_steps(draws, pairs, rules(layout), ranks), strict=False):
        total = torch.zeros(1, dtype=torch.float64)
        for micro in step.micro_batches:
            *sides, _ = micro.sides(engine(**micro.batch.inputs(CPU)))
            losses = ranking_loss(*sides)
            engine.backward(losses.sum() / step.pairs, last=micro.last)
            total += losses.detach().double().sum() / step.pairs * ranks.counts
        dist.all_reduce(total)
        found["losses"].append(total.item())
        found["norms"].append(engine.step())
    return found | {"weights": engine.gathered_state()}


def gradients_of(ranks: Ranks, folder: Path, zero: dict) -> dict:
    """What a ZeRO stage makes of the gradients of a step, and their norm: its step is the gradient itself, where AdamW would
    not notice its scale."""
    adamw, engine_room._optimizer = engine_room._optimizer, lambda model, _: torch.optim.SGD(model.parameters(), lr=1.0)
    try:
        before = {name: weight.clone() for name, weight in made(folder, ranks, "packed").state_dict().items()}
        found = losses_of(ranks, folder, "packed", zero, steps=1, clip=0.0, every=0)
    finally:
        engine_room._optimizer = adamw
    after = found.pop("weights")
    return found | {"gradients": after and {name: before[name] - after[name] for name in before}}


def summed_backward(ranks: Ranks, **how) -> dict:
    """The trap: a sum over the group, here all ranks, that also goes back as a sum."""
    honest = sequence_parallel._Sum.backward

    def backward(_, gradient):
        return all_reduce_sum(gradient), None

    sequence_parallel._Sum.backward = staticmethod(backward)
    try:
        return gradients_of(ranks, **how)
    finally:
        sequence_parallel._Sum.backward = honest


def judged(ranks: Ranks, folder: Path, layout: str) -> dict:
    """Rewards of conversations by the scorer that judges a model in training, and a probe in padded rows beside its own."""
    model, tokenizer, how = made(folder, ranks, layout), load_tokenizer(str(folder)), rules(layout)
    model.eval()
    known = engine_scorer.InTraining(model, tokenizer, None, how, ranks)  # the contract is not looked at
    computer = engine_scorer.EngineComputer(model, known, facts=None)
    batches = [
        engine_scorer.MicroBatch([np.array(side) for side in pair], [0, 0], "padded" if number == 1 else None)
        for number, pair in enumerate(PAIRS[:5])
    ]
    rewards = np.concatenate(computer.rewards(batches)).tolist()
    probe = held_out.probe(model, as_data(PAIRS, LENGTHS), how, ranks, padded_rows=model.padded_rows)
    return {"rewards": torch.tensor(rewards + probe.rewards, dtype=torch.float64), "noise": probe.noise}


def cases(folder: Path, world: int, size: int) -> dict:
    """name -> what gives its values, of ranks. The reference is padded, by transformers' attention."""
    toy, pairs, found = folder / "toy" / "model", as_data(PAIRS, LENGTHS), {}

    def add(name: str, compute, folder: Path = toy, **how) -> None:
        found[name] = functools.partial(compute, folder=folder, **how)

    reference, of_two, of_four = world == 1, world == size == 2, size == 4
    if reference or of_four:
        layout = "padded" if reference else "shared_prefix"
        for name, (some, lengths) in SHARING.items():
            add(name, of_a_model, layout=layout, pairs=as_data(some, lengths))
        for family in FAMILIES:
            add(f"family {family}", of_a_model, folder / family, layout=layout, pairs=as_data(*FAMILY_PAIRS))
    if reference or of_two:
        for name, adapter in ADAPTERS.items():
            add(name, of_a_model, layout="packed", pairs=pairs, adapter=adapter)
    if reference:
        add("all pairs", of_a_model, layout="padded", pairs=pairs)
        add("gradients", gradients_of, zero=STAGES["ZeRO 0"])
        add("losses", losses_of, layout="padded", zero=STAGES["ZeRO 0"], every=0)
    if of_two:
        add(HEADERS, of_a_model, layout="shared_prefix", pairs=as_data(*SHARING[HEADERS]))
    if of_two or of_four:
        for layout in LAYOUTS:
            add(f"all pairs, {layout}", of_a_model, layout=layout, pairs=pairs, every=int(of_four))
        for stage, layout in (
            (("ZeRO 2", "padded"), ("ZeRO 3", "packed")) if of_two else (("ZeRO 2", "packed"), ("ZeRO 3", "padded"))
        ):
            add(f"losses, {stage}, {layout}", losses_of, layout=layout, zero=STAGES[stage])
    if of_two:
        for stage, zero in STAGES.items():
            add(f"gradients, {stage}", gradients_of, zero=zero)
        add("summed backward", summed_backward, zero=STAGES["ZeRO 0"])
    if reference or not (of_two or of_four):
        add("judging", judged, layout="shared_prefix")
    return found


# ---------------------------------------------------------------- processes


def become_a_rank(folder: Path) -> None:
    with joined_ranks() as alone:
        for size in WORLDS[alone.world_size]:
            ranks = sequence_parallel.grouped(alone, size)
            of_size = cases(folder, alone.world_size, size)
            found = {name: compute(ranks=ranks) for name, compute in of_size.items()}
            if ranks.is_main:
                torch.save(found, folder / f"{ranks.world_size}_{size}.pt")


def compute_cases(folder: Path, group: dict) -> None:
    os.environ.update(group)
    become_a_rank(folder)


def run(folder: Path, name: str, world: int, **flags) -> None:
    """The recipe, on the toy."""
    own = {"total_episodes": 48, "per_device_train_batch_size": 8 // world, "checkpointing_steps": 3, "num_evals": 1}
    own |= {"keep_last_n_checkpoints": 9, "learning_rate": "2e-4"}
    given = [str(flag) for flag in toy_flags(folder / "toy", folder / name, **own | flags)]
    log = str(folder / f"{name}.log")
    forked(world, lambda group: become_a_rank_of_a_run(reward_modeling, given, group, log, log))


def main(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    importlib.import_module("deepspeed")
    be_ready_to_fork(reward_modeling)
    tokenizer = load_tokenizer(str(folder / "toy" / "model"))
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    for world in WORLDS:
        forked(world, functools.partial(compute_cases, folder))
    configs = Path(__file__).parents[2] / "configs" / "ds"
    run(folder, "one", 1)
    run(folder, "groups", 4, sequence_parallel_size=2, deepspeed=configs / "zero3.json", gradient_checkpointing="on")
    resumed = {"resume_from_checkpoint": folder / "groups" / "checkpoints" / "step_00000003"}
    run(folder, "resumed", 1, sequence_parallel_size=1, **resumed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
