"""What arrives together is scored together, and nobody gets another one's rewards."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from open_rm.serving import collector as rooms
from open_rm.serving.collector import Collector
from open_rm.serving.counters import Counters
from open_rm.serving.limits import Places, Refusal, ServingFlags


class Scores:
    """A reward is the sum of the ids; every call is noted. broken: what it does instead."""

    def __init__(self):
        self.calls, self.broken = [], None

    def __call__(self, sequences):
        self.calls.append(len(sequences))
        if self.broken is not None:
            return self.broken(sequences)
        return np.array([sum(ids) for ids in sequences], np.float32)


def run(test, *, wait: float = 0.05):
    """An async function of (collector, scores)."""

    async def main():
        scores, places = Scores(), Places(ServingFlags())
        with ThreadPoolExecutor(1) as executor:
            how = {"wait": wait, "counters": Counters(lambda: 0), "places": places}
            return await test(Collector(scores, executor, **how), scores)

    return asyncio.run(main())


def test_requests_that_come_together_are_one_call_and_each_gets_its_own():
    async def test(collector, scores):
        asked = [[[n], [n, 1], [n, 2, 3]][: 1 + n % 3] for n in range(60)]
        answers = await asyncio.gather(*(collector.rewards(sequences) for sequences in asked))
        assert answers == [[sum(ids) for ids in sequences] for sequences in asked]
        assert scores.calls == [120]

    run(test)


def test_a_batch_has_a_size(monkeypatch):
    monkeypatch.setattr(rooms, "MOST_TEXTS", 8)

    async def test(collector, scores):
        await asyncio.gather(*(collector.rewards([[1], [2], [3]]) for _ in range(7)))
        assert scores.calls == [9, 9, 3]

    run(test)


def test_who_left_is_not_scored():
    async def test(collector, scores):
        leaving = [asyncio.create_task(collector.rewards([[1]] * 10)) for _ in range(3)]
        staying = asyncio.create_task(collector.rewards([[5]]))
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        assert await staying == [5.0]
        assert scores.calls == [1]

    run(test)


def test_who_left_is_not_held_in_memory_while_others_are_scored():
    class Ids(list):
        """A list that can be asked whether it is still there."""

    async def test(collector, scores):
        going_on = threading.Event()
        scores.broken = lambda sequences: going_on.wait(60) and np.ones(len(sequences))
        first = asyncio.create_task(collector.rewards([[1]]))
        while not scores.calls:
            await asyncio.sleep(0)
        ids = [Ids([5]) for _ in range(3)]
        there = [weakref.ref(one) for one in ids]
        leaving = [asyncio.create_task(collector.rewards([one])) for one in ids]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        del ids, leaving, task
        await asyncio.sleep(0)  # what woke this up holds their exceptions, and these their frames
        gc.collect()
        left = [one() for one in there]
        going_on.set()
        assert left == [None] * 3
        await first

    run(test, wait=0)


def test_one_clients_text_fails_no_other_clients():
    async def test(collector, scores):
        def poisoned(sequences):
            if [13] in sequences:
                raise RuntimeError("a text of one client")
            return np.array([sum(ids) for ids in sequences], np.float32)

        scores.broken = poisoned
        asked = [[[1], [2]], [[3], [13]], [[4]]]
        answers = await asyncio.gather(*map(collector.rewards, asked), return_exceptions=True)
        assert answers[0] == [1.0, 2.0] and answers[2] == [4.0]
        assert isinstance(answers[1], Refusal) and answers[1].status == 500
        assert scores.calls == [5, 2, 2, 1] and collector.healthy

    run(test)


@pytest.mark.parametrize(
    "broken",
    [
        lambda sequences: np.array([np.nan] * len(sequences)),
        lambda sequences: np.array([1.0]),  # fewer than were asked for
        lambda sequences: None,
    ],
)
def test_what_is_no_reward_is_500_and_the_next_is_scored(broken):
    async def test(collector, scores):
        scores.broken = broken
        with pytest.raises(Refusal) as caught:
            await collector.rewards([[1], [2]])
        assert caught.value.status == 500
        scores.broken = None
        assert await collector.rewards([[1], [2]]) == [1.0, 2.0]
        assert collector.healthy

    run(test, wait=0)
