"""The concurrency that the worker finds by itself, against a model of an engine."""

from __future__ import annotations

import pytest

from aiflux.worker.limits import AdaptiveLimit


class Model:
    """An engine with slots: throughput grows with concurrency up to them, then latency does."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.now = 0.0
        self.limit = AdaptiveLimit(clock=lambda: self.now)

    def answer(self, count: int) -> None:
        for _ in range(count):
            concurrency = self.limit.value
            latency = max(1.0, concurrency / self.slots)
            self.now += latency / concurrency
            self.limit.note(10, latency, False)


@pytest.mark.parametrize("slots", [4, 16, 64, 200])
def test_it_rises_to_the_slots_and_stays_near(slots: int) -> None:
    model = Model(slots)
    model.answer(20_000)
    assert slots * 0.9 <= model.limit.value <= slots * 1.6 + 2


def test_a_refusal_lowers_it_once_for_a_burst() -> None:
    model = Model(64)
    model.answer(5000)
    before = model.limit.value
    for _ in range(20):
        model.limit.note(0, 0.1, True)
    assert before * 0.6 <= model.limit.value < before
    model.now += 2
    model.limit.note(0, 0.1, True)
    assert model.limit.value < before * 0.6


def test_it_never_falls_below_one() -> None:
    model = Model(4)
    for _ in range(50):
        model.now += 2
        model.limit.note(0, 0.1, True)
    assert model.limit.value == 1
