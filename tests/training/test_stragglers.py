"""One slow rank is named, with its host; even ranks, and one that was only dealt more, are not."""

import socket
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_a_process
from torch import nn
from torch.utils.checkpoint import checkpoint

from open_rm.ranks import Ranks
from open_rm.training import stragglers
from open_rm.training.stragglers import SOON, Stopwatch, Stragglers, median_of_others

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
OF_RANKS = f"import sys; sys.path[:0] = {FOLDERS}; import ranks_that_train; ranks_that_train.main(*sys.argv[1:])"


# ---------------------------------------------------------------- ranks that train


@pytest.fixture(scope="module")
def found(toy):
    """What two real ranks found."""
    return in_a_process(OF_RANKS, "stragglers", toy / "model")


def test_a_rank_that_computes_more_for_the_same_pairs_is_named(found):
    """Under ZeRO 2, and under ZeRO 3 in a sequence group, with layers that are recomputed."""
    for stage, of_main in found["2: slow"][0].items():
        [line] = of_main["report"]
        assert f"slow: rank 1 (host {socket.gethostname()}, local device 1) took " in line, stage
        # of single steps most, since other processes may be busy beside one
        assert statistics.median(row["perf/slowest_rank"] for row in of_main["rows"]) == 1


def test_every_rank_has_the_same_numbers(found):
    for of_main, of_other in zip(*(of_rank.values() for of_rank in found["2: slow"]), strict=True):
        for here, there in zip(of_main["rows"], of_other["rows"], strict=True):
            names = "perf/rank_seconds_max", "perf/slowest_rank"
            assert [here[name] for name in names] == [there[name] for name in names]


def test_what_is_timed_is_a_part_of_the_step_and_waiting_for_a_slow_rank_is_not_in_it(found):
    for of_main in found["2: slow"][0].values():
        assert all(0 < row["perf/rank_seconds_max"] < row["perf/step_seconds"] for row in of_main["rows"])


def test_even_ranks_name_none(found):
    for of_main in found["2: even"][0].values():
        [line] = of_main["report"]
        assert line.startswith("ranks: even over 11 steps")


def test_a_rank_that_was_dealt_more_is_the_slowest_of_the_step_and_no_slow_rank(found):
    [of_main] = found["2: uneven"][0].values()
    assert [row["perf/slowest_rank"] for row in of_main["rows"][1:]] == [0, 0]
    [line] = of_main["report"]
    assert line.startswith("ranks: even")


def test_an_evaluation_is_no_time_of_a_step(found):
    for of_stage in (of_stage for case in found.values() for of_rank in case for of_stage in of_rank.values()):
        assert all(row["perf/rank_seconds_max"] > 0 for row in of_stage["rows"])  # what belongs to a step is timed
        assert of_stage["left"] == 0


# ---------------------------------------------------------------- the stopwatch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(nn.Linear):
    """Takes two seconds by the clock, and its gather, a hook that was there before, three."""

    def __init__(self, clock: Clock):
        super().__init__(4, 4)
        self.clock = clock
        self.register_forward_pre_hook(lambda *_: self._passes(3.0))
        self.register_forward_hook(lambda *_: self._passes(5.0))

    def _passes(self, seconds: float) -> None:
        self.clock.now += seconds

    def forward(self, x):
        self._passes(2.0)
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(Stopwatch, "clock", clock)
    return clock


def test_what_stands_around_a_module_before_is_not_timed_and_recomputation_is(clock):
    model = nn.Sequential(Slow(clock), nn.Tanh(), nn.LayerNorm(4), Slow(clock), nn.Tanh())
    watch = Stopwatch(model, torch.device("cpu"))
    x = torch.ones(2, 4, requires_grad=True)
    model(x)
    assert watch.take() == 4.0 and watch.take() == 0.0
    with torch.no_grad():
        model(x)
    assert watch.take() == 0.0
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert watch.take() == 8.0
    watch.remove()
    model(x)
    assert watch.take() == 0.0


def test_a_gpu_is_asked_for_nothing_until_the_seconds_are_taken(monkeypatch):
    made, waited = [], []

    class Event:
        """One millisecond passes between any two."""

        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at = len(made)

        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, end):
            assert waited, "of an event that may not have happened"
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    watch = Stopwatch(model, torch.device("cuda"))
    for _ in range(3):
        model(torch.ones(2, 4))
    assert not waited and len(made) == 12
    assert watch.take() == pytest.approx(0.006)
    assert waited == [made[-1]]  # the last one; all before it have happened then
    model(torch.ones(2, 4))
    assert watch.take() == pytest.approx(0.002)
    assert len(made) == 12  # events are used again


# ---------------------------------------------------------------- who is slow


class Several(Ranks):
    """One of four ranks, two on each of two hosts."""

    def gathered(self, value):
        return [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def of_four(said: list) -> Stragglers:
    return Stragglers(nn.Linear(1, 1), Several(0, 0, 4, torch.device("cpu")), lambda *lines: said.extend(lines))


def test_a_rank_that_becomes_slow_is_said_once_while_the_run_goes_on_and_at_the_end_with_its_cost():
    said = []
    four = of_four(said)
    for number in range(4 * SOON):
        slow = 1.6 if number >= SOON else 1.0
        metrics = four.step([1.0, 1.01, 0.99, slow, 100, 100, 100, 100], step_seconds=36.0)
        assert metrics == {
            "perf/rank_seconds_max": max(1.01, slow),
            "perf/slowest_rank": 3.0 if number >= SOON else 1.0,
        }
    assert said == [
        "slow: rank 3 (host b, local device 1) took 1.60 times as long for a position as the median of the others for the last "
        "50 steps"
    ]
    [line] = four.report()
    assert line.startswith("slow: rank 3 (host b, local device 1) took 1.60 times as long")
    assert "1.2 times or more in 150 of 200 steps; that cost up to 0.56 of the 2 hours of steps" in line


def test_slow_is_who_takes_longer_in_all_and_for_a_position():
    four = of_four([])
    for _ in range(3):
        four.step([1.0, 3.0, 1.0, 1.0, 100, 300, 100, 100], step_seconds=1.0)
    assert four.report()[0].startswith("ranks: even over 3 steps; rank ")
    four = of_four([])
    for _ in range(3):
        four.step([1.0, 1.0, 0.5, 1.0, 100, 100, 20, 100], step_seconds=1.0)  # calls cost by themselves
    assert four.report()[0].startswith("ranks: even")
    four = of_four([])
    for _ in range(3):
        four.step([1.0, 1.0, 2.0, 1.0, 100, 100, 80, 100], step_seconds=1.0)
    assert four.report()[0].startswith("slow: rank 2 (host b, local device 0) took 2.00 times")


def test_one_bad_step_is_no_slow_rank():
    four = of_four([])
    for number in range(9):
        four.step([1.0, 1.0, 9.0 if number == 4 else 1.0, 1.0, 100, 100, 100, 100], step_seconds=1.0)
    assert four.report()[0].startswith("ranks: even over 9 steps")


def test_a_long_run_keeps_a_bounded_number_of_steps(monkeypatch):
    monkeypatch.setattr(stragglers, "KEPT", 8)
    four = of_four([])
    for number in range(1000):
        four.step([1.0, 1.0, 1.0, 1.0 + (number >= 400), 1, 1, 1, 1], step_seconds=1.0)
        assert len(four._ratios) <= 8
    assert "in 600 of 1000 steps" in four.report()[0]


def test_one_rank_alone_has_its_seconds_and_nothing_to_report():
    one = Stragglers(nn.Linear(1, 1), _Alone(0, 0, 1, torch.device("cpu")), print)
    assert one.own(0.5, 7) == [0.5, 7]
    assert one.step([0.5, 7], step_seconds=1.0) == {"perf/rank_seconds_max": 0.5, "perf/slowest_rank": 0.0}
    assert one.report() == []


class _Alone(Ranks):
    def gathered(self, value):
        return [value]


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_the_median_of_the_others_is_numpys(n):
    values = np.random.default_rng(n).random(n)
    expected = [np.median(np.delete(values, i)) for i in range(n)]
    assert median_of_others(values) == pytest.approx(expected)
    assert median_of_others(np.ones(n)).tolist() == [1.0] * n
