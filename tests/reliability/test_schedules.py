"""Whatever is killed and resumed on however many ranks, the steps are one and the same list of pairs."""

import json
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_of_ids import as_data

from open_rm.batching import feeding
from open_rm.batching.rules import BatchRules
from open_rm.flags import ScheduleFlags
from open_rm.ranks import Ranks
from open_rm.reliability.checkpoints import Checkpoint
from open_rm.reliability.resuming import pairs_per_step
from open_rm.training.plan import make_plan
from open_rm.training.progress import Progress

PER_DEVICE = 3
LENGTHS = np.random.default_rng(5).integers(3, 30, 50)
DATA = as_data(
    [([7, *range(10, 10 + n)], [7, *range(11, 9 + n)]) for n in LENGTHS.tolist()], prompt_lengths=[1] * len(LENGTHS)
)
RULES = BatchRules("packed", 0, 60, 60)


def life(begun: dict | None, world_size: int, steps: int, grouped: bool, epochs: float):
    """A process group that lives for `steps` steps: what it did, and the checkpoint after each of them as its JSON text."""
    ranks = [Ranks(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    found = None if begun is None else Checkpoint(Path("checkpoint"), begun)
    own = PER_DEVICE * world_size
    size = pairs_per_step(found, own, ranks[0], lambda *_: None)
    plan = make_plan(ScheduleFlags(num_train_epochs=epochs), DATA.table, size, seed=3, grouped=grouped)
    progress = Progress(len(DATA), plan.total_steps) if begun is None else Progress.continued(begun["progress"])
    feeds = [feeding.training_steps(plan.draw(DATA.table), DATA, RULES, rank, after=progress.step) for rank in ranks]
    done, saved = [], []
    for of_ranks in zip(*feeds, strict=True):
        computed = np.concatenate([micro.indices for step in of_ranks for micro in step.micro_batches])
        step = of_ranks[0]
        assert sorted(computed.tolist()) == sorted(step.indices.tolist())  # each pair once, whoever computes it
        progress.advance(step, {}, {"perf/step_seconds": 0.0, "perf/total_flops": 0.0})
        done.append((step.number, sorted(step.indices.tolist())))
        saved.append(
            json.dumps(
                {"progress": progress.saved(), "world_size": world_size, "pairs_per_step": size, "pairs_by_flags": own}
            )
        )
        if len(done) == steps:
            break
    for feed in feeds:
        feed.close()
    return done, saved, progress.step == plan.total_steps


@settings(max_examples=40, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 8]), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=6
    ),
    grouped=st.booleans(),
    epochs=st.sampled_from([1.0, 2.3]),
)
def test_kills_resumes_and_world_sizes_give_one_list_of_steps(lives, grouped, epochs):
    """lives: (ranks, steps until the kill, a checkpoint every so many steps)."""
    first_size = lives[0][0]
    whole, _, finished = life(None, first_size, 10**6, grouped, epochs)
    assert finished
    record, begun = {}, None
    for world_size, steps, every in [*lives, (2, 10**6, 1)]:
        world_size = first_size if begun is None else world_size
        done, saved, over = life(begun, world_size, steps, grouped, epochs)
        record.update(done)
        committed = [text for (number, _), text in zip(done, saved, strict=True) if number % every == 0]
        begun = json.loads(committed[-1]) if committed else begun
        if over:
            break
    assert sorted(record.items()) == whole
