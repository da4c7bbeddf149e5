"""The simulated engine accounts honestly; no test here is timed."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from bench.children import engine
from bench.decoding import Cost, Decoder, floor

COST = Cost(base=0.004, each=0.001)


def test_one_sequence_costs_its_steps():
    decoder = floor([5], 4, COST)
    assert decoder.makespan == pytest.approx(5 * 0.005)
    assert decoder.occupancy == pytest.approx(1 / 4)


def test_full_slots_are_fully_occupied():
    decoder = floor([7] * 12, 4, COST)
    assert decoder.steps == 21
    assert decoder.makespan == pytest.approx(21 * 0.008)
    assert decoder.occupancy == pytest.approx(1.0)


def test_a_slot_is_filled_as_soon_as_it_is_free():
    decoder = floor([2, 6, 4], 2, COST)
    assert decoder.steps == 6
    assert decoder.occupancy == pytest.approx(1.0)


def test_what_arrives_during_a_step_waits_for_the_next():
    decoder = Decoder(2, COST)
    decoder.submit("a", 2, at=10.0)
    assert decoder.begin() == pytest.approx(10.005)
    decoder.submit("b", 1, at=10.001)
    assert decoder.end() == []
    assert decoder.begin() == pytest.approx(10.005 + 0.006)
    assert sorted(decoder.end()) == ["a", "b"]
    assert decoder.begin() is None


def test_time_without_requests_counts_as_unused():
    decoder = Decoder(1, COST)
    for at in (0.0, 0.015):
        decoder.submit(None, 1, at)
        decoder.begin()
        decoder.end()
    assert decoder.makespan == pytest.approx(0.020)
    assert decoder.occupancy == pytest.approx(0.5)


def test_no_order_beats_the_floor_by_arriving_late():
    lengths = [3, 50, 4, 9, 30, 2]
    late = Decoder(2, COST)
    for number, tokens in enumerate(lengths):
        late.submit(number, tokens, at=0.02 * number)
    while late.begin() is not None:
        late.end()
    assert late.makespan >= floor(lengths, 2, COST).makespan


def post(url: str, tokens: int) -> int:
    body = {"messages": [], "max_tokens": tokens}
    answer = requests.post(url + "/v1/chat/completions", json=body, timeout=20)
    return int(answer.json()["usage"]["completion_tokens"])


def test_the_engine_over_http_agrees_with_the_account():
    lengths = [3, 8, 5, 2, 9, 4]
    with engine(2, COST) as running, ThreadPoolExecutor(6) as threads:
        answered = list(threads.map(lambda tokens: post(running.url, tokens), lengths))
        stats = running.stats()
    assert answered == lengths
    assert stats["done"] == len(lengths)
    # Every token costs its share of a step: between a whole step alone and half a step of two.
    assert sum(lengths) * 0.005 * 0.999 <= stats["busy"] <= sum(lengths) * 0.006 * 1.001
    assert stats["makespan"] >= floor(sorted(lengths), 2, COST).busy / 2 * 0.8
    assert 0.0 < stats["occupancy"] <= 1.0


def test_the_instant_engine_counts():
    with engine() as running:
        session = requests.Session()
        for _ in range(3):
            assert session.post(running.url + "/v1/chat/completions", data=b"{}", timeout=20).ok
        assert json.loads(session.get(running.url + "/stats", timeout=20).content)["done"] == 3
        session.close()
