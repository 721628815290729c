"""Steps with headers and without, in turn, in one process: what looking for them costs where prompts begin with none.

That is less than two runs differ from each other on a machine whose speed drifts. So each step is planned, laid out, computed and
applied twice, once each way, the first way another one step by step. The recipe plans in a thread beside the computation; here
nothing runs beside it, so that all of the planning counts.
"""

import copy
import time
from pathlib import Path

from benchmarks import contestant, switching
from benchmarks.measuring import How, Setting, steps_of
from benchmarks.recipe_loop import OurTraining
from benchmarks.workloads import read_pairs
from open_rm import ranks
from open_rm.batching import feeding
from open_rm.data.tokenizer import load_tokenizer


def steps_in_turn(settings: dict) -> list[dict[str, dict]]:
    """For each timed step, with -> and without -> what a contestant brings back.

    settings: those of a contestant, and `with`, `without`: their names; `steps`: how many are timed.
    """
    names = {settings["with"]: True, settings["without"]: False}
    pairs = settings["batch"] * settings["accumulation"]
    how = How(
        shape="",
        model=settings["model"],
        rows={"": (settings["data"], settings["group_by_prompt"])},
        cache=str(Path(settings["scratch"]) / "cache"),
        dtype=settings["dtype"],
        max_token_length=settings["max_token_length"],
        pairs_per_forward=settings["batch"],
        warm=contestant.WARM_UP_STEPS,
        rounds=1,
    )
    tokenizer = load_tokenizer(how.model)
    data = read_pairs(Path(settings["data"]), tokenizer, Path(how.cache), max_token_length=how.max_token_length)
    plain = copy.copy(data)
    plain.__dict__["table"] = switching.without_order(data.table)
    setting = Setting("", pairs, recompute=False, steps=settings["steps"])
    drawn = steps_of(data, setting, how.warm, by_prompt=settings["group_by_prompt"])
    rounds = []
    with ranks.joined_ranks() as here:
        training = OurTraining(how, {"layout": settings["layout"]}, tokenizer, here)
        training.fit(data, recomputes=False)
        for number, indices in enumerate(drawn):
            times = {}
            for name in list(names) if number % 2 == 0 else list(names)[::-1]:
                looks = names[name]
                switching.look_for_headers(looks)
                switching.compute_apart(looks)
                started = time.perf_counter()
                [step] = feeding.training_steps([indices], data if looks else plain, training.rules, here)
                training.step(step)
                seconds = time.perf_counter() - started
                computed, tokens = (
                    sum(getattr(micro.batch, what) for micro in step.micro_batches) for what in ("computed", "tokens")
                )
                times[name] = {"pairs_per_second": pairs / seconds, "distinct": computed / tokens}
                times[name]["peak_gib"] = contestant.peak_gib()
            rounds.append(times)
    return rounds[how.warm :]
