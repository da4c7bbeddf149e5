"""An inference server as a child process, on its own loopback port, verified to be ours.

If the server supports it, it is started on port 0, so the kernel chooses the port. The port is then
read from the sockets of the child's session (/proc/PID/fd and /proc/net/tcp). So no other process
can take the port between choosing and binding it, and the server that answers on it is our child.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from aiflux.engines.base import EngineKind
from aiflux.engines.gpus import CUDA, DEVICE_VARIABLES, ROCR
from aiflux.engines.server_log import KILLED, Cause, find_cause
from aiflux.errors import EngineError
from aiflux.util.streams import FULL

PROGRAM_VARIABLE = "AIFLUX_ENGINE_PROGRAM"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0
_TRACKER_TIMEOUT = 1.0
_POLL = 0.02
_LISTEN = "0A"
LOOPBACK = "0100007F"
"""127.0.0.1, as the kernel writes it."""
# A variable of each server's environment. Its value is unique, so its processes can be found.
_MARK = "AIFLUX_SERVER"
_KEPT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    *DEVICE_VARIABLES,
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "HSA_OVERRIDE_GFX_VERSION",
)
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LOG_TAIL = 2000
LOG_SEARCHED = 256 * 1024  # in vLLM's log, tracebacks of all processes follow the cause
EMPTY_LOG = "its log is empty"
"""Stands for the end of a log in errors."""
_FOREGROUND = "the server must stay in the foreground until AI-Flux ends it"
_STOPPED = "the engine was stopped during its start"


def engine_environment(
    environ: Mapping[str, str],
    home: Path,
    settings: Mapping[str, str],
    *,
    network: bool = False,
) -> dict[str, str]:
    """Return a server's complete environment; only named variables of the caller are included.

    The worker's PYTHONPATH is excluded, as an engine may be written in Python and have its own.

    Args:
        home: writable folder for HOME and TMPDIR.
        settings: additional variables, which take precedence.
        network: pass the site's proxies on.
    """
    kept = (*_KEPT, *PROXIES) if network else _KEPT
    # An empty ROCR_VISIBLE_DEVICES hides every GPU, NVIDIA's included.
    environment = {name: environ[name] for name in kept if environ.get(name)}
    if settings.keys() & set(DEVICE_VARIABLES):
        # Two of them together can leave fewer GPUs, or none (see ``engines.gpus``).
        for name in DEVICE_VARIABLES:
            environment.pop(name, None)
    elif CUDA in environment:
        environment.pop(ROCR, None)
    return {**environment, "HOME": str(home), "TMPDIR": str(home), **settings}


def named_program(kind: EngineKind, environ: Mapping[str, str]) -> str | None:
    """Return the program that the environment names for a kind, or None.

    AIFLUX_ENGINE_PROGRAM belongs to the kind in AIFLUX_ENGINE, if that is set.
    """
    meant = environ.get("AIFLUX_ENGINE") or kind.name
    names = (*([PROGRAM_VARIABLE] if meant == kind.name else []), *kind.program_variables)
    return next((environ[name] for name in names if environ.get(name)), None)


def find_program(kind: EngineKind, environ: Mapping[str, str]) -> str | None:
    """Return a kind's executable, or None.

    It is named by AIFLUX_ENGINE_PROGRAM, found on PATH, or is the CPU build that ``make demo`` put
    into the user's cache.
    """
    named = named_program(kind, environ) or shutil.which(kind.program, path=environ.get("PATH"))
    if named or not kind.cached_program:
        return named
    home = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME') or ''}/.cache"
    demo = Path(environ.get("AIFLUX_CACHE_DIR") or f"{home}/aiflux") / kind.cached_program
    return str(demo) if os.access(demo, os.X_OK) else None


def engine_program(kind: EngineKind, environ: Mapping[str, str]) -> str:
    """Return a kind's executable; see ``find_program``.

    Raises:
        EngineError: there is no executable.
    """
    program = find_program(kind, environ)
    if program is None:
        raise EngineError(
            f"no {kind.program} on PATH",
            f"run in the image, install {kind.title}, or use a running server: --engine-url URL",
        )
    return program


class ServerEndedError(EngineError):
    """A server ended during its start; ``log`` is the end of what it wrote since then."""

    def __init__(self, message: str, remedy: str, log: str) -> None:
        super().__init__(message, remedy)
        self.log = log


class ServerProcess:
    """A server. It can be started once, and stopped from any thread.

    Args:
        command: its command line.
        environment: its complete environment (see ``engine_environment``).
        log: file to which its output is appended.
        url: address in the command; None if the kernel chooses the port.
        folder: where it starts (default: the current directory).
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        url: str | None = None,
        folder: str | None = None,
    ) -> None:
        self._folder = folder
        self._command = [*_die_with_parent(), *command]
        # With its subcommand, as in "ollama serve".
        words = [word for word in command[1:2] if not (word.isdigit() or word.startswith("-"))]
        self._name = " ".join([Path(command[0]).name, *words])
        self._program = command[0]
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        self._environment = {**environment, **dict([self._mark.split("=")])}
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._stopped = False
        self._lock = threading.Lock()
        self.url = url or ""

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """How the process ended, negative for a signal; None if it runs, or was not started."""
        process = self._process
        return None if process is None else process.poll()

    @property
    def pid(self) -> int | None:
        """The process's id, once started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the server; if the kernel chooses the port, wait until the server listens.

        Must be called from a thread that lives as long as the server should: the kernel ends the
            server together with the thread that started it.

        Raises:
            EngineError: the server did not start or has ended, or its log cannot be opened.
        """
        with self._open_log() as log, self._lock:
            self._log_start = log.tell()
            if self._stopped:
                raise EngineError(_STOPPED)
            try:
                self._process = process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise EngineError(
                    f"cannot start {self._program}: {error.strerror}", "check the installation"
                ) from error
        if not self.url:
            self.url = loopback_url(self._await_port(process))

    def check(self) -> None:
        """Check that a starting server is still running.

        Raises:
            EngineError: the server was stopped, or has ended (with the end of its log).
        """
        process = self._process
        status = None if process is None else process.poll()
        if self._stopped:
            raise EngineError(_STOPPED)
        if status is not None:
            raise self._ended(status)

    def listens_on(self) -> set[str]:
        """Return the addresses, in the kernel's form, on which this listens at ``url``'s port."""
        port = int(self.url.rpartition(":")[2])
        return {
            at for each in self._members() for at, number in _sockets_of(each.pid) if number == port
        }

    def owns_port(self) -> bool:
        """Return whether the server that listens at ``url`` is this one, there and only there."""
        host = socket.inet_aton(urlsplit(self.url).hostname or "")
        return self.listens_on() == {f"{int.from_bytes(host, sys.byteorder):08X}"}

    def stop(self) -> None:
        """Stop the server and all processes that it started; does nothing if it has ended.

        A server that was not started cannot be started afterwards. Two threads may stop it at once;
        servers take a second SIGTERM as a request to leave everything and end.
        """
        with self._lock:
            again, self._stopped = self._stopped, True
            process = self._process
        if process is None:
            return
        # A child of a child that has ended cannot be found later if it has another session and
        # another environment.
        members = {*self._members()}
        if not again:
            _signal(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        members |= {*self._members()}
        trackers = {each for each in members if each.tracks_resources}
        _kill(members - trackers)
        _wait(trackers, _TRACKER_TIMEOUT)
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        _kill(members | {*self._members()})
        self._process = None

    def kill(self) -> None:
        """Stop the server without a chance to answer the requests in flight."""
        process = self._process
        if process is not None:
            _signal(process.pid, signal.SIGKILL)
        self.stop()

    def _members(self) -> list[_Member]:
        """Return the server's processes, its leader first.

        These are its session, its descendants, and processes that inherited its environment, which
        remain when a server goes into the background.
        """
        process = self._process
        if process is None:
            return []
        everybody = [*_processes()]
        children: dict[int, list[_Member]] = {}
        for each in everybody:
            children.setdefault(each.parent, []).append(each)
        leader = process.pid
        waiting = [each for each in everybody if each.pid == leader]
        waiting += [each for each in everybody if each.belongs(leader, self._mark)]
        found: dict[_Member, None] = {}
        while waiting:
            each = waiting.pop(0)
            if each not in found:
                found[each] = None
                waiting += children.get(each.pid, [])
        return [*found]

    def log_tail(self, size: int = _LOG_TAIL) -> str:
        """Return the end of the log since the start, of at most ``size`` bytes."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - size))
                return log.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _open_log(self) -> BinaryIO:
        """Open the log. On a full disk, only the log is lost; the journal reports the disk."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            return open(self.log, "ab")
        except OSError as error:
            if error.errno in FULL:
                return open(os.devnull, "ab")
            raise EngineError(
                f"cannot open the engine's log {self.log}: {error.strerror}",
                "make its folder writable",
            ) from error

    def _ended(self, status: int) -> ServerEndedError:
        log = self.log_tail(LOG_SEARCHED)
        end = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        cause = find_cause(log) or Cause(self.log_tail() or EMPTY_LOG, "")
        remedy = cause.remedy or {-signal.SIGKILL: KILLED, 0: _FOREGROUND}.get(status, "")
        return ServerEndedError(
            f"{self._name} {end} during its start:\n{cause.line}",
            f"{remedy}; its log is {self.log}" if remedy else f"see its log: {self.log}",
            log,
        )

    def _await_port(self, process: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self._ended(process.returncode)
            port = listening_port(process.pid)
            if port is not None:
                return port
            time.sleep(_POLL)
        self.stop()
        raise EngineError(
            f"{self._name} did not listen within {START_TIMEOUT:g} s", f"see its log: {self.log}"
        )


def _signal(group: int, number: int) -> None:
    """Signal a process group, which includes runners of a killed server."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> list[str]:
    """Return a command prefix that makes the kernel end the server when this process is killed."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", "TERM", "--"] if program else []


def loopback_url(port: int) -> str:
    """Return the address of a server on this machine."""
    return f"http://127.0.0.1:{port}"


def listening_port(pid: int) -> int | None:
    """Return the loopback TCP port on which a session listens, or None (yet).

    Some servers listen in a child of the started process. The session's leader, ``pid``, is checked
    first, then its other processes, oldest first.
    """
    others = (each.pid for each in _processes() if each.session == pid and each.pid != pid)
    for each in itertools.chain([pid], others):
        for at, port in _sockets_of(each):
            if at == LOOPBACK:
                return port
    return None


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port, of loopback by default, for servers that need a port number.

    Another process may bind it first; see ``ServerProcess.owns_port``.

    Args:
        host: address on which it is free; "" for all of them.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class _Member:
    """A process; ``started`` distinguishes it from a later one with the same id."""

    pid: int
    parent: int
    session: int
    started: str
    zombie: bool

    def belongs(self, session: int, variable: str) -> bool:
        """Return whether it is in a session, or was started with a variable."""
        if self.session == session:
            return True
        try:
            environment = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError:
            return False  # it is another user's, or has ended
        return variable.encode() in environment.split(b"\0")

    @property
    def tracks_resources(self) -> bool:
        """Whether it is Python's resource tracker.

        When the processes that share memory and semaphores have ended, it removes these from
        /dev/shm, where they occupy the node's memory, and ends.
        """
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False
        return b"multiprocessing.resource_tracker" in command

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        found = _process(self.pid)
        return found is not None and (found.started, found.zombie) == (self.started, False)


def _kill(processes: Iterable[_Member]) -> None:
    """Kill processes that still run, and wait until they have freed their memory and GPUs."""
    living = [each for each in processes if each.running]
    for each in living:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(each.pid, signal.SIGKILL)
    _wait(living, STOP_TIMEOUT)


def _wait(processes: Iterable[_Member], seconds: float) -> None:
    """Wait until processes have ended, at most so long."""
    deadline = time.monotonic() + seconds
    while any(each.running for each in processes) and time.monotonic() < deadline:
        time.sleep(_POLL)


def _processes() -> Iterator[_Member]:
    """Yield all processes by their ids."""
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))):
        found = _process(pid)
        if found is not None:
            yield found


def _process(pid: int) -> _Member | None:
    """Return a process (proc(5): state, parent, session and start are fields 3, 4, 6 and 22)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return _Member(pid, int(fields[1]), int(fields[3]), fields[19], fields[0] == "Z")


def _sockets_of(pid: int) -> Iterator[tuple[str, int]]:
    """Yield address, as the kernel writes it, and port of each TCP socket that listens.

    Source: proc(5): /proc/PID/net/tcp has local address, state and inode in fields 2, 4 and 10.
    """
    inodes = _socket_inodes(pid)
    for table in ("tcp", "tcp6") if inodes else ():
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue  # the process has ended, or the kernel has no IPv6
        for line in lines:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == _LISTEN and fields[9] in inodes:
                yield address, int(port, 16)


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
    except OSError:
        return set()
    return inodes
