"""A lease, held by at most one process of the cluster, on any shared file system, without flock.

The lease is a file created with ``O_EXCL``, in which its holder rewrites a beat every few seconds.
A process that finds it held considers the holder dead if the beat does not change according to the
*finder's own* clock. It does so at once if the holder was a process of the same PID namespace that
has ended, or an earlier start of the same Slurm job (Slurm never runs two starts at a time).
"""

from __future__ import annotations

import json
import operator
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiflux.errors import RunConflictError, StoppedError
from aiflux.util.files import read_file, storage_error
from aiflux.util.process_limits import start_thread

BEAT_SECONDS = 3.0
STALE_SECONDS = 30.0
_BEAT_WIDTH = 12
_BREAK_SECONDS = 0.05
_FIRST_PAUSE = 0.02


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return _read("/proc/sys/kernel/random/boot_id") + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return a process's start time in ticks, "" if it has ended.

    Fields 3, 20 and 22 of /proc/PID/stat: state, threads, start time (proc(5)). A process that was
    killed stays as a zombie until its parent notices, which may take long in a job that was
    cancelled. While it has other threads, these may still be in the kernel, writing.
    """
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return ""
    state, threads, started = operator.itemgetter(0, 17, 19)(stat.rpartition(")")[2].split())
    return "" if state in ("Z", "X") and int(threads) <= 1 else started


def process_identity(pid: int) -> dict[str, Any]:
    """Return what identifies a process: ``host``, ``pid``, ``started`` and ``namespace``."""
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_time(pid),
        "namespace": _namespace(),
    }


def identity() -> dict[str, Any]:
    """Return this process's identity for a lease."""
    return {
        **process_identity(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "token": uuid.uuid4().hex,
    }


def process_lives(pid: int, started: str, namespace: str) -> bool | None:
    """Return whether a process is alive; None if it cannot be seen from here."""
    if namespace and namespace == _namespace():
        return bool(started) and _start_time(pid) == started
    return None


def _alive(holder: dict[str, Any]) -> bool | None:
    """Return whether a holder is alive; None if unknown from here."""
    if holder:
        lives = process_lives(holder["pid"], holder["started"], holder["namespace"])
        if lives is not None:
            return lives
    job = os.environ.get("SLURM_JOB_ID", "")
    return False if job and holder.get("job") == job else None


def holder_lives(path: Path) -> bool | None:
    """Return whether a lease's holder is alive; None if unknown from here.

    Raises:
        StorageError: the lease cannot be read.
    """
    content = _content(path)
    return False if content is None else _alive(_holder(content))


def holder_here(path: Path) -> int | None:
    """Return the pid of a lease's holder, if that is alive, seen from here, and in no Slurm job.

    Raises:
        StorageError: the lease cannot be read.
    """
    holder = _holder(_content(path) or b"")
    return int(holder["pid"]) if holder and not holder.get("job") and _alive(holder) else None


class Lease:
    """A held lease; a context manager that releases it.

    Attributes:
        lost: set when another process took over the lease.
    """

    def __init__(self, path: Path, descriptor: int, on_lost: Callable[[], None] | None) -> None:
        self.path = path
        self.lost = threading.Event()
        self._descriptor = descriptor
        self._inode = os.fstat(descriptor).st_ino
        self._on_lost = on_lost
        self._released = threading.Event()
        self._beat = 0
        try:
            self._thread = start_thread(self._beat_loop, "lease")
        except StoppedError:
            path.unlink()
            os.close(descriptor)
            raise

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lease; does nothing if it was lost or released before."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        if self._still_ours():
            with suppress(FileNotFoundError):
                self.path.unlink()
        os.close(self._descriptor)

    def _still_ours(self) -> bool:
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def _beat_loop(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            if not self._still_ours():
                self.lost.set()
                if self._on_lost is not None:
                    self._on_lost()
                return
            self._beat += 1
            # Overwriting in place needs no new block, so a full disk does not lose the lease.
            with suppress(OSError):
                os.pwrite(self._descriptor, b"%0*d" % (_BEAT_WIDTH, self._beat), 0)


def acquire(
    path: Path,
    what: str,
    *,
    wait: bool = False,
    on_wait: Callable[[str], None] | None = None,
    on_lost: Callable[[], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Lease:
    """Acquire a lease.

    Args:
        path: the lease file; its directory must exist.
        what: what is held, for messages, such as "the run results.json".
        wait: wait until a living holder releases it, instead of raising an error.
        on_wait: called once with a message when waiting starts.
        on_lost: called from a thread when another process takes over the lease.

    Raises:
        RunConflictError: a living process holds it (only without ``wait``).
        StorageError: the file cannot be created.
    """
    watch, break_watch = _Watch(clock), _Watch(clock)
    reported, pause = False, _FIRST_PAUSE
    while True:
        descriptor = _create(path)
        if descriptor is not None:
            return Lease(path, descriptor, on_lost)
        content = _content(path)
        if content is None:
            continue
        holder = _holder(content)
        alive = _alive(holder)
        if alive is False or watch.is_unchanged(content):
            if not _break(path, content, break_watch):
                sleep(_BREAK_SECONDS)
            continue
        if (alive or watch.moved) and not wait:
            raise _conflict(what, holder)
        if on_wait is not None and not reported:
            on_wait(f"{what} is in use on {holder.get('host')}; waiting")
            reported = True
        # Many processes wait when the shards of a run end together; random delays spread them.
        sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, BEAT_SECONDS / 2)


def refuse_living(
    paths: Iterable[Path],
    what: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Raise RunConflictError if a living process holds one of the leases.

    Leases of dead holders are not changed. If it is unknown from here whether a holder is alive,
    this takes as long as a beat, or ``STALE_SECONDS`` if all holders are dead.
    """
    began = clock()
    seen: dict[Path, bytes] = {}
    while True:
        watched = 0
        for path in paths:
            content = _content(path)
            if content is None or _alive(_holder(content)) is False:
                continue
            if _alive(_holder(content)) or seen.setdefault(path, content) != content:
                raise _conflict(what, _holder(content))
            watched += 1
        if not watched or clock() - began > STALE_SECONDS:
            return
        sleep(BEAT_SECONDS / 2)


def _conflict(what: str, holder: Mapping[str, Any]) -> RunConflictError:
    return RunConflictError(
        f"{what} is in use by process {holder.get('pid')} on {holder.get('host')}",
        "wait for it to end, or stop it",
    )


class _Watch:
    """Watches the beat of another process's lease with this process's clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._content: bytes | None = None
        self._since = 0.0
        self.moved = False

    def is_unchanged(self, content: bytes) -> bool:
        now = self._clock()
        if content != self._content:
            self.moved = self._content is not None
            self._content, self._since = content, now
        return now - self._since > STALE_SECONDS


def _create(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        raise storage_error(error, path) from error
    content = b"0" * _BEAT_WIDTH + b" " + json.dumps(identity()).encode() + b"\n"
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    except OSError as error:
        path.unlink()
        os.close(descriptor)
        raise storage_error(error, path) from error
    return descriptor


def _content(path: Path) -> bytes | None:
    return read_file(path)


def _holder(content: bytes) -> dict[str, Any]:
    """Return a lease's holder; {} if its creator died before writing it."""
    try:
        holder = json.loads(content[_BEAT_WIDTH:])
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(holder, dict) and type(holder.get("pid")) is int
    texts = ("host", "started", "namespace", "job")
    return holder if whole and all(isinstance(holder.get(each), str) for each in texts) else {}


def _break(path: Path, judged: bytes, watch: _Watch) -> bool:
    """Remove a dead holder's lease; return False if another process is doing so.

    Only one process may do this at a time, and only while the lease is still the one that was
    judged; otherwise the lease of the next holder could be removed instead. ``watch`` detects the
    mark of a process that died while doing this.
    """
    mark = path.with_name(path.name + ".break")
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        with suppress(FileNotFoundError):
            if watch.is_unchanged(b"%d" % mark.stat().st_ino):
                mark.unlink()
        return False
    except OSError as error:
        raise storage_error(error, mark) from error
    try:
        content = _content(path)
        if content is not None and _token(content) == _token(judged):
            path.unlink()
    finally:
        mark.unlink(missing_ok=True)
    return True


def _token(content: bytes) -> Any:
    return _holder(content).get("token", content)
