"""The order in which requests are sent, and to which engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from aiflux.core.batch.request import Request
from aiflux.worker.concurrency import FixedLimit
from aiflux.worker.scheduler import Lane, Scheduler, Task, by_prefix


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
    changes: list[bool] = []
    queue.on_change = lambda: changes.append(True)
    assert queue.next() is None
    assert not queue.is_over(), "the request in flight may come back"
    queue.done(*job)
    assert changes
    assert queue.is_over()


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
    assert queue.is_over()


def test_a_stop_hands_out_no_more_requests() -> None:
    queue = scheduler(3, 4)
    take(queue)
    queue.stop()
    assert queue.next() is None
    assert queue.is_over()
    assert queue.in_flight == 1


def test_it_ends_without_any_engine_left() -> None:
    queue = scheduler(3, 4)
    queue.close_lane(queue.lanes[0], gone=True)
    assert queue.is_over()


def prompting(prompts: Sequence[str], read: list[int]) -> Iterator[Task]:
    """Yield tasks with prompts, and note the size of each."""
    for index, prompt in enumerate(prompts):
        request = Request(b"", f"r{index}", "/v1/chat/completions", {}, None)
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
        payload = json.dumps(body).encode()
        read.append(len(payload))
        yield Task(request, b"", payload)


@given(st.lists(st.sampled_from("abcdefgh"), max_size=60), st.integers(0, 4000))
def test_ordered_by_prefix_each_request_comes_once_and_few_are_held(
    prompts: list[str], most_bytes: int
) -> None:
    read: list[int] = []
    given_out, size = [], 0
    for task in by_prefix(prompting(prompts, read), most_bytes):
        given_out.append(task.request.custom_id)
        size += len(task.payload)
        assert len(read) <= 2 * len(given_out)  # the first is sent at once
        assert sum(read) - size <= most_bytes + max(read)
    assert sorted(given_out) == sorted(f"r{index}" for index in range(len(prompts)))


def test_requests_with_the_same_beginning_follow_each_other() -> None:
    """As when every question is asked about every document."""
    prompts = [f"document {at:02d}: {ask}" for ask in "abcdefgh" for at in range(20)]

    def changes(found: Sequence[str]) -> int:
        documents = [prompt.partition(":")[0] for prompt in found]
        return sum(one != other for one, other in itertools.pairwise(documents))

    assert changes(prompts) == 159
    ordered = [
        json.loads(task.payload)["messages"][0]["content"]
        for task in by_prefix(prompting(prompts, []))
    ]
    assert changes(ordered) < 60
    alone = list(by_prefix(prompting(prompts, []), most_bytes=0))
    assert [task.request.custom_id for task in alone[:3]] == ["r0", "r1", "r2"]
