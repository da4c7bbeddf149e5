"""An inference server as a child process, on its own loopback port, verified to be ours.

The server is started on port 0, so the kernel chooses the port. The port is then read from
the sockets of the child's session (/proc/PID/fd and /proc/net/tcp). So no other process can take
the port between choosing and binding it, and the server that answers on it is our child.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from aiflux.engines.base import EngineKind
from aiflux.errors import EngineError
from aiflux.util.streams import FULL

PROGRAM_VARIABLE = "AIFLUX_ENGINE_PROGRAM"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0
_POLL = 0.02
_LISTEN = "0A"
_LOOPBACK = "0100007F"
_KEPT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
)
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LOG_TAIL = 2000
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
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment.pop("ROCR_VISIBLE_DEVICES", None)
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


class ServerProcess:
    """A server. It can be started once, and stopped from any thread.

    Args:
        command: its command line.
        environment: its complete environment (see ``engine_environment``).
        log: file to which its output is appended.
        port: the port in the command; None if the kernel chooses one.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        port: int | None = None,
    ) -> None:
        self._port = port
        self._command = [*_die_with_parent(), *command]
        self._name = " ".join([Path(command[0]).name, *command[1:2]])
        self._program = command[0]
        self._environment = dict(environment)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self.url = ""

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        process = self._process
        return process is not None and process.poll() is None

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
            if self._stopped:
                raise EngineError(_STOPPED)
            try:
                self._process = process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise EngineError(
                    f"cannot start {self._program}: {error.strerror}", "check the installation"
                ) from error
        port = self._await_port(process) if self._port is None else self._port
        self.url = f"http://127.0.0.1:{port}"

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

    def owns_port(self) -> bool:
        """Return whether the server that listens at ``url`` is this one."""
        process = self._process
        return process is not None and any(
            self.url == f"http://127.0.0.1:{port}"
            for each in _family(process.pid)
            for port in _ports_of(each)
        )

    def stop(self) -> None:
        """Stop the server and all processes of its session; does nothing if it has ended.

        A server that was not started cannot be started afterwards.
        """
        with self._lock:
            self._stopped = True
            process = self._process
        if process is None:
            return
        _signal(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None

    def log_tail(self) -> str:
        """Return the end of the log."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL))
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

    def _ended(self, status: int) -> EngineError:
        return EngineError(
            f"{self._name} exited with status {status} during its start:\n{self.log_tail()}",
            f"see its log: {self.log}",
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


def listening_port(pid: int) -> int | None:
    """Return the loopback TCP port on which a session listens, or None (yet).

    Some servers listen in a child of the started process. The session's leader, ``pid``, is checked
    first, then its other processes, oldest first.

    Source: proc(5): /proc/PID/net/tcp has local address, state and inode in fields 2, 4 and 10.
    """
    return next((port for each in _family(pid) for port in _ports_of(each)), None)


def free_port() -> int:
    """Return a free loopback port, for servers that need a port number.

    Another process may bind it first; see ``ServerProcess.owns_port``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _family(leader: int) -> Iterator[int]:
    yield leader
    yield from _session(leader)


def _session(leader: int) -> Iterator[int]:
    """Yield the other processes of a session (proc(5): the fourth field after the name)."""
    for name in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        if int(name) == leader:
            continue
        with suppress(OSError):
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
            if int(stat.rpartition(")")[2].split()[3]) == leader:
                yield int(name)


def _ports_of(pid: int) -> Iterator[int]:
    inodes = _socket_inodes(pid)
    if not inodes:
        return
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        fields = line.split()
        address, _, port = fields[1].partition(":")
        if fields[3] == _LISTEN and address == _LOOPBACK and fields[9] in inodes:
            yield int(port, 16)


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
