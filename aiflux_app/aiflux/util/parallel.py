"""Distribute work to forked processes if that is safe and useful.

A fork copies only one thread, so locks held by other threads would stay locked forever. Therefore
only a process with a single thread distributes work; others do the work themselves.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, Generic, NoReturn, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# This process and its children; login nodes are shared with other users.
MOST_PROCESSES = 4
# The parent handles these signals; a child only checks that the parent still exists.
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LOOK_SECONDS = 0.2


def helpers() -> int:
    """Return the number of children that can share the work; 0 if forking is not safe."""
    try:
        cores = len(os.sched_getaffinity(0))
        threads = len(os.listdir("/proc/self/task"))
    except (AttributeError, OSError):  # not Linux
        return 0
    return min(cores, MOST_PROCESSES - 1) if cores > 1 and threads == 1 else 0


def share_out(
    work: Callable[[Item], Result], items: Sequence[Item], children: int
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` for each item, in order. Close the iterator if it is not exhausted.

    ``work`` runs in forked children, one per item. If a child dies, its item is processed here, so
    that errors are raised here. So is a single item, or all items if there are no children.

    Args:
        children: number of children that run at once.
    """
    children = children if len(items) > 1 else 0
    waiting = deque(items)
    jobs: deque[_Job[Item, Result]] = deque()
    try:
        while waiting or jobs:
            running = sum(job.pipe is not None for job in jobs)
            if waiting and running < children and len(jobs) < 2 * children:
                jobs.append(_start(work, waiting.popleft()))
            elif not jobs:
                yield work(waiting.popleft())
            elif jobs[0].pipe is not None:
                _receive(jobs)
            else:
                job = jobs.popleft()
                yield job.results[0] if job.results else work(job.item)
    finally:
        for job in jobs:
            job.end()


@dataclass
class _Job(Generic[Item, Result]):
    """An item and the child that works on it.

    Attributes:
        pipe: source of the child's result; None once the child has ended.
        results: the result; empty if the child died.
    """

    item: Item
    pid: int = 0
    pipe: IO[bytes] | None = None
    results: tuple[Result, ...] = ()

    def receive(self, pipe: IO[bytes]) -> None:
        """Receive the result; the child has started to send it, or died."""
        content = pipe.read()
        if self._reap(pipe):
            self.results = (pickle.loads(content),)  # noqa: S301 - from our own child

    def end(self) -> None:
        """Kill the child."""
        if self.pipe is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._reap(self.pipe)

    def _reap(self, pipe: IO[bytes]) -> bool:
        """Wait for the child's end; return whether it sent its complete result."""
        pipe.close()
        self.pipe = None
        with suppress(ChildProcessError):
            return os.waitpid(self.pid, 0)[1] == 0
        return False


def _receive(jobs: Iterable[_Job[Item, Result]]) -> None:
    """Wait for results and receive them."""
    running = {job.pipe: job for job in jobs if job.pipe is not None}
    ready = select.select(running, (), ())[0]
    for pipe in ready:
        running[pipe].receive(pipe)


def _start(work: Callable[[Item], Result], item: Item) -> _Job[Item, Result]:
    parent = os.getpid()
    receiver, sender = os.pipe()
    with _signals_held() as mask:
        try:
            pid = os.fork()
        except OSError:  # process limit reached
            os.close(receiver)
            os.close(sender)
            return _Job(item)
        if pid == 0:
            _serve(lambda: work(item), sender, parent, mask)
        os.close(sender)
        return _Job(item, pid, open(receiver, "rb"))


@contextmanager
def _signals_held() -> Iterator[set[Any]]:
    """Block signals until a fork is recorded; yield the previous mask."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(work: Callable[[], object], sender: int, parent: int, mask: set[Any]) -> NoReturn:
    """Work in a child and send the result; exit 0 if it was sent completely."""
    status = 1
    try:
        with suppress(BaseException), open(sender, "wb") as pipe:
            for number in _LEFT_TO_PARENT:
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, lambda *_: _end_without(parent))
            signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            pickle.dump(work(), pipe, pickle.HIGHEST_PROTOCOL)
            pipe.flush()
            status = 0
    finally:
        os._exit(status)


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)
