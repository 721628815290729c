"""What is measured of a contestant, and how it is counted; the same for ours and for TRL's.

Every contestant of a setting takes the same pairs in the same steps. Their tokens are counted on the host, from the token ids,
so that counting takes nothing from the device and is equal for all:

    tokens     of all sides of the pairs
    distinct   that shared_prefix computes of them: the work that has to be done, whoever does it
    flops      that a layout needs for what it computes (metrics.training_flops): nothing for padding or recomputation
"""

import gc
import resource
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from open_rm.batching import feeding
from open_rm.batching.dealing import deal_step, micro_batch_budget
from open_rm.batching.rules import BatchRules
from open_rm.batching.steps import draw_steps
from open_rm.data.pairs import PreferenceData
from open_rm.model.reward_model import RewardModel, Shape, model_shape
from open_rm.training.metrics import training_flops


@dataclass(frozen=True)
class Setting:
    """One thing to measure: pairs_per_step pairs of a workload a step, with all activations recomputed or none.

    steps: how many are timed.
    """

    workload: str
    pairs_per_step: int
    recompute: bool
    steps: int

    def describe(self) -> str:
        return f"{self.workload}, {self.pairs_per_step} pairs a step{', recompute' if self.recompute else ''}"


@dataclass(frozen=True)
class How:
    """What is equal for all contestants of a shape.

    model: folder.  rows: file and whether prompts are kept together, by workload.  cache: folder for token ids.
    dtype: what ours computes in.  warm: steps before the clock in the first round; in later ones it is one.
    pairs_per_forward: of TRL, and what ours is asked for as --per_device_train_batch_size.
    """

    shape: str
    model: str
    rows: dict[str, tuple[str, bool]]
    cache: str
    dtype: str
    max_token_length: int
    pairs_per_forward: int
    warm: int
    rounds: int

    def rules(self, layout: str) -> BatchRules:
        """How ours cuts a step, for counting."""
        budget = micro_batch_budget(self.pairs_per_forward, self.max_token_length, on_gpu=torch.cuda.is_available())
        return BatchRules(layout, 0, budget, budget)


@dataclass(frozen=True)
class Timed:
    """What a contestant brings back. seconds: of the timed steps.  losses: of every step, the warm ones included.

    positions: that the timed steps computed, padding included.  computed: those of them that hold a token.
    """

    seconds: float
    losses: list[float]
    positions: int
    computed: int


def steps_of(data: PreferenceData, setting: Setting, warm: int, *, by_prompt: bool) -> list[np.ndarray]:
    """The pairs of each step, the warm ones first: [pairs_per_step] each, in the order in which the recipe draws them.

    by_prompt: pairs of a prompt follow each other. A step is filled to its full size, which may cut a prompt in two, since
    TRL's batches have one size.
    """
    wanted = (warm + setting.steps) * setting.pairs_per_step
    ids = data.table.prompt_id if by_prompt else None
    order = np.concatenate(list(draw_steps(len(data), setting.pairs_per_step, wanted, seed=1, prompt_ids=ids)))
    return np.split(order, warm + setting.steps)


def counted(steps: list[np.ndarray], data: PreferenceData, how: How, layout: str, shape: Shape) -> dict[str, float]:
    """tokens, distinct, and the flops of `layout`, of all steps together."""
    found = {"tokens": 0, "distinct": 0, "flops": 0.0}
    for name in dict.fromkeys(("shared_prefix", layout)):
        rules = how.rules(name)
        for indices in steps:
            [parts] = deal_step(indices, data.table, rules, world_size=1).ranks
            for micro in feeding.micro_batches(parts, data, rules):
                batch = micro.batch
                if name == "shared_prefix":
                    found["tokens"] += batch.tokens
                    found["distinct"] += batch.computed
                if name == layout:
                    read = len(batch.read_index)
                    found["flops"] += training_flops(batch.computed, batch.area, shape, read=read)
    return found


def shape_of(model: str) -> Shape:
    """Sizes of the model of a folder for counting FLOPs, without its weights."""
    config = AutoConfig.from_pretrained(model, num_labels=1)
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    return model_shape(RewardModel(classifier))


def start_of_memory() -> None:
    """Peaks are counted from here; on a CPU they are those of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float | None]:
    """GiB: allocated (on a CPU resident) and, on a GPU, reserved by the allocator."""
    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    return {"peak_gib": resident, "reserved_gib": None}


def free_memory() -> None:
    """What nobody holds any more goes back to the device, rings of references included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
