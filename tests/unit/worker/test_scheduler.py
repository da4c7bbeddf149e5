"""The order in which requests are sent, and to which engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from aiflux.core.batch.request import Request
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.scheduler import Lane, Scheduler, Task


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tasks(count: int) -> Iterator[Task]:
    for index in range(count):
        request = Request(b"", f"r{index}", "/v1/completions", {}, None)
        yield Task(request, b"", b"")


def names(*jobs: tuple[Task, Lane] | None) -> list[str]:
    return [job[0].request.custom_id for job in jobs if job]


def scheduler(count: int, *limits: int, clock: Clock | None = None) -> Scheduler:
    lanes = [Lane(index, FixedLimit(limit)) for index, limit in enumerate(limits)]
    return Scheduler(tasks(count), lanes, clock=clock or Clock())


def take(queue: Scheduler) -> tuple[Task, Lane]:
    job = queue.next()
    assert job is not None
    return job


def test_the_least_loaded_engine_comes_first() -> None:
    queue = scheduler(8, 2, 4)
    assert [take(queue)[1].index for _ in range(6)] == [0, 1, 1, 0, 1, 1]


def test_a_closed_engine_gets_nothing_and_the_other_continues() -> None:
    queue = scheduler(8, 2, 4)
    queue.close_lane(queue.lanes[0])
    assert {take(queue)[1].index for _ in range(4)} == {1}
    queue.open_lane(queue.lanes[0])
    assert {take(queue)[1].index for _ in range(2)} == {0}


def test_a_waiting_retry_holds_no_slot() -> None:
    clock = Clock()
    queue = scheduler(3, 1, clock=clock)
    first = take(queue)
    queue.retry(*first, delay=10)
    second = take(queue)
    assert names(second) == ["r1"]
    clock.now = 11
    queue.done(*second)
    third = take(queue)
    assert names(third) == ["r0"], "a retry that is due comes before new requests"
    queue.done(*third)


def test_it_ends_only_when_all_requests_are_done() -> None:
    queue = scheduler(1, 2)
    job = take(queue)
    ends: list[object] = []
    thread = threading.Thread(target=lambda: ends.append(queue.next()))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "the request in flight may come back"
    queue.done(*job)
    thread.join(5)
    assert ends == [None]


def test_requests_that_were_not_attempted_go_first() -> None:
    queue = scheduler(3, 1)
    job = take(queue)
    queue.put_back(*job)
    assert names(take(queue)) == ["r0"]


def test_a_suspect_runs_alone_at_the_end() -> None:
    queue = scheduler(3, 4)
    first = take(queue)
    first[0].crashes = 2
    queue.crashed(*first)
    others = [take(queue), take(queue)]
    assert names(*others) == ["r1", "r2"]
    for job in others:
        queue.done(*job)
    alone = take(queue)
    assert names(alone) == ["r0"]
    queue.done(*alone)
    assert queue.next() is None


def test_a_stop_hands_out_no_more_requests() -> None:
    queue = scheduler(3, 4)
    take(queue)
    queue.stop()
    assert queue.next() is None
    assert queue.in_flight == 1


def test_it_ends_without_any_engine_left() -> None:
    queue = scheduler(3, 4)
    queue.close_lane(queue.lanes[0], gone=True)
    assert queue.next() is None
