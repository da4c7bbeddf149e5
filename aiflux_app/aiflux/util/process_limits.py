"""Limits of this process: CPUs, and threads, memory and open files (``ulimit``)."""

from __future__ import annotations

import errno
import hashlib  # noqa: F401 - loaded early: without memory for it, it prints tracebacks
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from aiflux.errors import AifluxError, StoppedError
from aiflux.util.text import context

# Open files in addition to connections: logs, the journal, probes, pipes of children.
_OTHER_FILES = 32
SPARE_BYTES = 32 << 20
"""Bytes that all threads need after the last one was started."""
THREAD_BYTES = 8 << 20
_LAST_WORDS_BYTES = 4 << 20
_M_ARENA_MAX = -8  # malloc.h
_NO_FILES = {errno.EMFILE, errno.ENFILE}
# Messages of the dynamic loader in an ImportError, which has no errno.
_LOADER_NO_MEMORY = ("failed to map", "cannot allocate memory", "out of memory")
_LOADER_NO_FILES = ("too many open files",)
_NO_THREAD = ("can't start new thread", "can't allocate", "failed to launch worker thread")
_AGAIN = "then run the same command again"


def usable_cpus(environ: Mapping[str, str]) -> int:
    """Return the number of CPUs that a job, or else this process, may use.

    Not every site binds jobs to their CPUs, so those that Slurm allotted count, too.
    """
    cpus = len(os.sched_getaffinity(0))
    allotted = environ.get("SLURM_CPUS_ON_NODE", "")
    return min(cpus, int(allotted)) if allotted.isdecimal() and int(allotted) else cpus


def usable_cores(system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of cores of this process: two CPUs are often one core (SMT)."""

    def core(cpu: int) -> str:
        try:
            return (system / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            return str(cpu)

    return len(set(map(core, os.sched_getaffinity(0))))


def engine_cpus(environ: Mapping[str, str], engines: int) -> int:
    """Return an engine's share of the CPUs that a job may use."""
    return max(1, usable_cpus(environ) // engines)


def engine_threads(environ: Mapping[str, str], engines: int = 1) -> int | None:
    """Return the threads of an engine, one for each core; None for its own choice.

    Engines choose by the cores of the node. If the job may use only some of them, the threads
    mostly wait for each other, and the engine is many times slower:
    https://github.com/ollama/ollama/issues/17916

    Args:
        engines: those that share the CPUs.
    """
    cpus = engine_cpus(environ, engines)
    if cpus >= (os.cpu_count() or 1):
        return None
    return max(1, min(cpus, usable_cores() // engines))


def start_thread(
    target: Callable[[], None], name: str, spare: int = THREAD_BYTES
) -> threading.Thread:
    """Start a daemon thread and return it.

    Args:
        spare: bytes of memory that must be free in addition to the thread's stack.

    Raises:
        StoppedError: no more threads are allowed.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    require_thread_memory(spare)
    try:
        thread.start()
    except (MemoryError, RuntimeError) as error:
        raise exhausted(error) or error from error
    return thread


def require_thread_memory(spare: int = THREAD_BYTES) -> None:
    """Check that a thread can be started now, also by a library.

    Python waits forever for a thread that has no memory to start:
    https://github.com/python/cpython/issues/140746

    Raises:
        StoppedError: too little memory is left.
    """
    _share_one_arena()
    require_memory(_stack_bytes() + spare)


@cache
def _share_one_arena() -> None:
    """Let all threads allocate from one arena if the address space is limited.

    Otherwise glibc reserves 64 MiB for another thread's arena, maybe between the check of the
    memory and the start of a thread: M_ARENA_MAX in mallopt(3).

    Raises:
        StoppedError: too little memory is left.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    try:
        import ctypes  # noqa: PLC0415 - needed only with a limit

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    except (ImportError, OSError, MemoryError) as error:
        raise exhausted(error) or error from error
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def _stack_bytes() -> int:
    """Return the size of a new thread's stack, which glibc derives from the stack limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return threading.stack_size() or (THREAD_BYTES if soft == resource.RLIM_INFINITY else soft)


@contextmanager
def exhaustion_stops() -> Iterator[None]:
    """Convert errors raised at process limits to a StoppedError with the remedy."""
    # Released on an error, because showing one needs memory too.
    with _reserve(_LAST_WORDS_BYTES) as reserve:
        try:
            yield
        except StoppedError:
            raise
        except Exception as error:
            reserve.close()
            stop = exhausted(error)
            if stop is None:
                raise
            raise stop from error


def exhausted(error: BaseException) -> StoppedError | None:
    """Return the meaning of an error raised at a process limit; None for other errors.

    Also examines the causes of the error, such as a library that could not be loaded.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        stop = _meaning(cause)
        if stop is not None:
            return stop
        cause = cause.__cause__ or (None if cause.__suppress_context__ else context(cause))
    return None


def _meaning(error: BaseException) -> StoppedError | None:
    number = error.errno if isinstance(error, OSError) else None
    words = str(error).lower() if isinstance(error, ImportError) else ""
    if number in _NO_FILES or any(text in words for text in _LOADER_NO_FILES):
        return StoppedError("the limit on open files is too low", f"raise it (ulimit -n), {_AGAIN}")
    if (
        isinstance(error, MemoryError)
        or number == errno.ENOMEM
        or any(text in words for text in _LOADER_NO_MEMORY)
        # Raised by Python in place of a lost MemoryError.
        or (isinstance(error, SystemError) and _memory_is_short())
    ):
        return StoppedError(
            "there is not enough memory", f"allow more (ulimit -v, the job's --mem), {_AGAIN}"
        )
    # pyarrow raises a subclass of Exception of its own.
    no_thread = not isinstance(error, AifluxError) and any(
        text in str(error).lower() for text in _NO_THREAD
    )
    if no_thread or number == errno.EAGAIN:
        return StoppedError(
            f"the system allows this process no more threads or processes: {error}",
            "allow more processes (ulimit -u) or more memory (ulimit -v, the job's --mem), "
            f"{_AGAIN}",
        )
    return None


def _memory_is_short() -> bool:
    try:
        mmap.mmap(-1, SPARE_BYTES).close()
    except OSError:
        return True
    return False


def _reserve(size: int) -> mmap.mmap:
    """Reserve memory that nothing uses.

    Raises:
        StoppedError: too little memory is left.
    """
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        raise exhausted(error) or error from error


def require_memory(size: int) -> None:
    """Check that this much memory can still be allocated.

    Raises:
        StoppedError: it cannot.
    """
    _reserve(size).close()


def raise_file_limit() -> None:
    """Raise the limit on open files to the hard limit, also for child processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spare_files() -> int:
    """Return the number of connections that can still be opened, at least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft - len(os.listdir("/proc/self/fd")) - _OTHER_FILES)
