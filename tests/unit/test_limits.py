"""The adaptive limit against continuous batching in simulated time."""

import random

import pytest
from bench.decoding import Cost, Decoder, floor

from aiflux.worker.limits import CEILING, AdaptiveLimit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lengths(count: int) -> list[int]:
    source = random.Random(7)
    return [min(200, max(4, int(source.lognormvariate(3.5, 0.8)))) for _ in range(count)]


def process(slots: int, count: int, *, tokens_counted: bool) -> tuple[AdaptiveLimit, Decoder]:
    """Process requests with as many in flight as the limit says."""
    clock, cost, waiting = Clock(), Cost(), iter(lengths(count))
    limit, decoder, in_flight = AdaptiveLimit(clock=clock), Decoder(slots, cost), 0
    while True:
        while in_flight < limit.value and (length := next(waiting, 0)):
            decoder.submit((length, clock.now), length, clock.now)
            in_flight += 1
        if decoder.begin() is None:
            return limit, decoder
        for length, sent in decoder.end():
            in_flight -= 1
            clock.now = decoder.now
            limit.note(length if tokens_counted else 1, clock.now - sent, False)
        clock.now = decoder.now


@pytest.mark.parametrize("tokens_counted", [True, False])
@pytest.mark.parametrize("slots", [1, 4, 16, 32, 64, 256])
def test_it_fills_the_slots_of_an_engine_it_knows_nothing_of(slots, tokens_counted):
    count = 70 * slots
    limit, decoder = process(slots, count, tokens_counted=tokens_counted)
    assert limit.value >= slots
    assert decoder.makespan < 1.05 * floor(lengths(count), slots, Cost()).makespan


def test_a_burst_of_refusals_lowers_it_once():
    clock = Clock()
    limit = AdaptiveLimit(clock=clock)
    before = limit.value
    for _ in range(5):
        limit.note(1, 0.1, True)
    assert limit.value == int(before * 0.7)
    clock.now += 2.0
    limit.note(1, 0.1, True)
    assert limit.value < int(before * 0.7)


def test_it_never_leaves_its_bounds():
    clock, source = Clock(), random.Random(3)
    limit = AdaptiveLimit(clock=clock)
    for _ in range(20_000):
        clock.now += 0.05
        limit.note(source.randrange(1, 500), source.random() * 0.5, source.random() < 0.02)
        assert 1 <= limit.value <= CEILING
