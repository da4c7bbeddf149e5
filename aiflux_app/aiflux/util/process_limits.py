"""Limits of this process (``ulimit``): threads, memory and open files."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiflux.errors import StoppedError

# Open files besides connections to engines: logs, the journal, probes, pipes of children.
_OTHER_FILES = 32
_RESERVE_BYTES = 32 << 20
_NO_FILES = {errno.EMFILE, errno.ENFILE}


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread and return it.

    Raises:
        StoppedError: the system allows no further thread.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    with exhaustion_stops():
        thread.start()
    return thread


@contextmanager
def exhaustion_stops() -> Iterator[None]:
    """Turn what Python raises at the limits of the process into a StoppedError with the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        stop = exhausted(error)
        if stop is None:
            raise
        raise stop from error


def exhausted(error: Exception) -> StoppedError | None:
    """Return what an error at a limit of the process means; None for any other error."""
    again = "then run the same command again"
    if isinstance(error, OSError):
        if error.errno not in _NO_FILES:
            return None
        return StoppedError("the limit on open files is too low", f"raise it (ulimit -n), {again}")
    if isinstance(error, MemoryError):
        return StoppedError(
            "there is not enough memory", f"allow more (ulimit -v, the job's --mem), {again}"
        )
    if "can't start new thread" in str(error) or "can't allocate" in str(error):
        return StoppedError(
            f"the system allows this process no further thread: {error}",
            "allow more processes (ulimit -u) or more memory (ulimit -v, the job's --mem), "
            f"{again}",
        )
    return None


@contextmanager
def reserved_memory() -> Iterator[None]:
    """Hold some memory back while threads are started, for what all threads do afterwards.

    Raises:
        StoppedError: there is too little left.
    """
    try:
        reserve = mmap.mmap(-1, _RESERVE_BYTES)
    except OSError as error:
        raise StoppedError("there is not enough memory for another thread") from error
    with reserve:
        yield


def raise_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spare_files() -> int:
    """Return how many connections can still be opened, at least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft - len(os.listdir("/proc/self/fd")) - _OTHER_FILES)
