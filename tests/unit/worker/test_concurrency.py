"""The limits of requests in flight against continuous batching in simulated time."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from bench.decoding import Cost, Decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.worker.concurrency import CEILING, FEW, START, AdaptiveLimit, SlotLimit

COST = Cost()
VLLM = Cost(base=0.047, each=0.0033)
"""Like vLLM on two cores: each further sequence makes a step much longer."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def never(time: float) -> int:
    return 0


def endless(time: float) -> float:
    return float("inf")


def always(time: float) -> float:
    return 1.0


@dataclass
class Load:
    """An engine, its load, and the duration.

    Attributes:
        stretch: factor on the lengths of answers, by the time of the request.
        slowness: factor on the cost of a step, by time.
        others: requests that another user keeps in flight, by time.
        room: requests that may be queued, by time; more are refused.
        reports: the engine reports its queue, which is polled every half second.
    """

    slots: int
    seconds: float
    cost: Cost = COST
    reports: bool = False
    tokens_counted: bool = True
    equal: bool = False
    stretch: Callable[[float], float] = always
    slowness: Callable[[float], float] = always
    others: Callable[[float], int] = never
    room: Callable[[float], float] = endless
    seed: int = 7


@dataclass
class Outcome:
    """The result of a load: start, length and slots in use of each step."""

    slots: int
    value: int
    refused: int = 0
    steps: list[tuple[float, float, int]] = field(default_factory=list)

    def used(self, start: float, end: float = float("inf")) -> float:
        """Return the share of the slots' time that was used, by any user."""
        steps = [step for step in self.steps if start <= step[0] < end]
        return sum(seconds * active for _, seconds, active in steps) / (
            self.slots * sum(seconds for _, seconds, _ in steps)
        )

    def speed(self, cost: Cost, start: float) -> float:
        """Return the tokens per second, as a share of the maximum with all slots in use."""
        steps = [step for step in self.steps if step[0] >= start]
        made = sum(active for _, _, active in steps) / sum(seconds for _, seconds, _ in steps)
        return made * cost.step(self.slots) / self.slots


def lengths(source: random.Random, equal: bool) -> Iterator[int]:
    while True:
        yield 43 if equal else min(200, max(4, int(source.lognormvariate(3.5, 0.8))))


def process(load: Load, make: Callable[[Clock], AdaptiveLimit | SlotLimit]) -> Outcome:
    """Keep as many requests in flight as the limit allows, for the load's duration."""
    clock = Clock()
    limit, decoder = make(clock), Decoder(load.slots, load.cost)
    outcome = Outcome(load.slots, limit.value)
    own = lengths(random.Random(load.seed), load.equal)
    theirs = lengths(random.Random(load.seed + 1), load.equal)
    in_flight = {True: 0, False: 0}
    again: list[float] = []
    looked = 0.0

    def submit(mine: bool, length: int) -> None:
        decoder.submit((mine, length, clock.now), length, clock.now)
        in_flight[mine] += 1

    while clock.now < load.seconds:
        again = [time for time in again if time > clock.now]
        while in_flight[True] + len(again) < limit.value:
            if sum(in_flight.values()) >= load.slots + load.room(clock.now):
                limit.note(1, 0.01, True)
                again.append(clock.now + 0.5)
                outcome.refused += 1
            else:
                submit(True, max(1, int(next(own) * load.stretch(clock.now))))
        while in_flight[False] < load.others(clock.now):
            submit(False, next(theirs))
        factor = load.slowness(clock.now)
        decoder.cost = Cost(load.cost.base * factor, load.cost.each * factor)
        end = decoder.begin()
        if end is None:
            clock.now += 0.1
            continue
        if load.reports and clock.now - looked >= 0.5:
            looked = clock.now
            running = min(load.slots, sum(in_flight.values()))
            assert isinstance(limit, AdaptiveLimit)
            limit.note_load(running, sum(in_flight.values()) - running)
        outcome.steps.append((clock.now, end - clock.now, min(load.slots, sum(in_flight.values()))))
        clock.now = end
        for mine, length, sent in decoder.end():
            in_flight[mine] -= 1
            if mine:
                limit.note(length if load.tokens_counted else 1, clock.now - sent, False)
    outcome.value = limit.value
    return outcome


def adapt(load: Load) -> Outcome:
    return process(load, lambda clock: AdaptiveLimit(clock=clock))


def between(start: float, end: float, inside: float, outside: float) -> Callable[[float], float]:
    return lambda time: inside if start <= time < end else outside


@pytest.mark.parametrize("slots", [1, 4, 16, 32, 64, 256, 1024])
def test_the_slots_of_an_unknown_engine_are_filled(slots):
    outcome = adapt(Load(slots, 40.0))
    assert outcome.used(0, 20) > 0.92  # includes the climb
    assert outcome.used(15) > 0.97


@pytest.mark.parametrize("slots", [1, 32, 256])
def test_answers_without_token_counts(slots):
    assert adapt(Load(slots, 60.0, tokens_counted=False)).used(20) > 0.97


@pytest.mark.parametrize("slots", [32, 64, 256, 1024])
@pytest.mark.parametrize(("first", "then"), [(1.0, 10.0), (10.0, 1.0)])
def test_answer_lengths_that_change_tenfold(slots, first, then):
    change = 40.0 if slots < 1024 else 120.0
    outcome = adapt(Load(slots, change + 40, stretch=between(0, change, first, then)))
    assert outcome.used(20 if first == 1 else change - 10) > 0.97


@pytest.mark.parametrize("slots", [32, 64, 256, 1024])
def test_an_engine_that_becomes_slow_and_fast_again(slots):
    outcome = adapt(Load(slots, 200.0, slowness=between(30, 180, 10.0, 1.0)))
    assert outcome.used(20) > 0.97


def test_an_engine_that_stays_ten_times_slower():
    """The previous algorithm stayed at 1 here (256 slots, 0.25 s, and 2.5 s from 45 s on)."""
    load = Load(256, 240.0, Cost(0.25 / 43, 0), equal=True, slowness=between(45, 1e9, 10.0, 1.0))
    outcome = adapt(load)
    assert outcome.used(20) > 0.97
    assert outcome.value >= 256


@pytest.mark.parametrize("slots", [32, 64, 256, 1024])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_another_user_who_comes_and_goes(slots, share):
    theirs = between(30, 60, int(slots * share), 0)
    outcome = adapt(Load(slots, 90.0, others=lambda time: int(theirs(time))))
    assert outcome.used(20) > 0.97


@pytest.mark.parametrize("slots", [64, 256])
def test_another_user_who_started_earlier(slots):
    theirs = between(0, 30, slots, 0)
    outcome = adapt(Load(slots, 60.0, others=lambda time: int(theirs(time))))
    assert outcome.used(30) > 0.97


def test_an_engine_with_diminishing_returns():
    outcome = adapt(Load(64, 300.0, VLLM))
    assert outcome.speed(VLLM, 60) > 0.99


@pytest.mark.parametrize("room", [1, 16, 200])
def test_refusals(room):
    outcome = adapt(Load(64, 200.0, room=lambda time: room))
    assert outcome.used(20) > 0.93
    assert outcome.refused < 100


@settings(max_examples=10, deadline=None)
@given(
    slots=st.integers(1, 300),
    step=st.floats(0.002, 0.1),
    slower=st.floats(0.1, 10.0),
    stretch=st.floats(0.2, 5.0),
    seed=st.integers(0, 99),
)
def test_any_engine_and_any_change(slots, step, slower, stretch, seed):
    # Times are in engine steps, so that each example takes the same time to compute.
    change, seconds = 1000 * step, 2000 * step
    load = Load(
        slots,
        change + 1500 * step * slower,
        Cost(step, 0.0),
        stretch=between(change, seconds, stretch, 1.0),
        slowness=between(change, 1e9, slower, 1.0),
        seed=seed,
    )
    assert adapt(load).used(change * 0.8) > 0.9


def test_a_burst_of_refusals_lowers_the_limit_once():
    clock = Clock()
    limit = AdaptiveLimit(clock=clock)
    for _ in range(5):
        limit.note(1, 0.1, True)
    once = limit.value
    assert START / 2 <= once < START
    clock.now += 2.0
    limit.note(1, 0.1, True)
    assert limit.value < once


def test_refusals_are_forgotten():
    """A server that refuses everything for a while, such as behind a restarting gateway."""
    room = between(30, 60, -1e9, 1e9)
    outcome = adapt(Load(64, 200.0, room=room))
    assert outcome.refused > 30
    assert outcome.used(150) > 0.97


def test_many_timeouts_lower_the_limit_and_one_does_not():
    limit = AdaptiveLimit(clock=Clock())
    limit.note_timeout()
    assert limit.value == START
    limit.note_timeout()
    limit.note_timeout()
    assert limit.value < START


def test_the_limit_stays_within_its_bounds():
    clock, source = Clock(), random.Random(3)
    limit = AdaptiveLimit(clock=clock)
    for _ in range(20_000):
        clock.now += 0.05
        limit.note(source.randrange(1, 500), source.random() * 0.5, source.random() < 0.02)
        assert 1 <= limit.value <= CEILING


def report(limit: AdaptiveLimit, slots: int) -> None:
    limit.note_load(min(slots, limit.value), max(0, limit.value - slots))


def test_a_reported_queue_shortens_the_climb():
    limit = AdaptiveLimit(clock=Clock())
    for _ in range(7):
        report(limit, 256)
    assert 256 < limit.value < 1.3 * 256 + 3


@pytest.mark.parametrize("slots", [4, 64, 256, 1024])
@pytest.mark.parametrize("cost", [COST, VLLM])
def test_an_engine_that_reports_its_queue_is_full_within_seconds(slots, cost):
    outcome = adapt(Load(slots, 40.0, cost, reports=True))
    assert outcome.used(4) > 0.97
    assert outcome.value < 2 * slots + START


def test_a_long_queue_of_other_users_does_not_lower_the_limit():
    limit = AdaptiveLimit(clock=Clock())
    for _ in range(7):
        report(limit, 64)
    before = limit.value
    for _ in range(20):
        limit.note_load(64, 500)
    assert limit.value == before


SLOW = Cost(0.05, 0.0)


def slots_of(load: Load) -> tuple[Outcome, list[bool]]:
    """Process a load with in-flight requests for 32 slots; return the reports too."""
    found: list[bool] = []
    outcome = process(load, lambda clock: SlotLimit(40, found.append, clock))
    return outcome, found


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("equal", [False, True])
def test_an_engine_that_processes_one_request_at_a_time_gets_few(equal, seed):
    outcome, found = slots_of(Load(1, 1200.0, SLOW, equal=equal, seed=seed))
    assert found == [True]
    assert outcome.value == FEW
    assert outcome.used(0) > 0.999


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("slots", [2, 4, 32])
@pytest.mark.parametrize("kind", ["mixed", "equal", "not counted", "no gain"])
def test_real_slots_are_kept_busy(slots, kind, seed):
    load = Load(slots, 600.0, SLOW, equal=kind == "equal", seed=seed)
    load = replace(load, tokens_counted=kind != "not counted")
    if kind == "no gain":
        load = replace(load, cost=Cost(0.0, 0.05))
    outcome, found = slots_of(load)
    assert found == []
    assert outcome.value == 40
    assert outcome.used(0) > 0.99


def test_no_experiments_with_a_fast_engine():
    outcome, found = slots_of(Load(1, 20.0, Cost(0.0005, 0.0)))
    assert (outcome.value, found) == (40, [])
