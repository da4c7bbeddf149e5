"""The Ollama server as a child process: on a loopback port of its own, and surely ours.

The kernel picks the port (``OLLAMA_HOST=127.0.0.1:0``), and which one it is, is read from the
sockets that the child itself holds (/proc/PID/fd against /proc/net/tcp). No port can be lost to
somebody else between choosing and binding it, and the server that answers on it is our child.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from aiflux.errors import EngineError
from aiflux.util.streams import FULL

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


def engine_environment(
    environ: Mapping[str, str],
    models_dir: Path,
    home: Path,
    settings: Mapping[str, str],
    *,
    network: bool = False,
) -> dict[str, str]:
    """Return the server's whole environment; nothing of the caller's gets in unnamed. Pure.

    Args:
        home: writable folder for HOME and TMPDIR.
        settings: further variables, which win.
        network: pass the site's proxies on.
    """
    kept = (*_KEPT, *PROXIES) if network else _KEPT
    # An empty ROCR_VISIBLE_DEVICES hides every GPU, NVIDIA's included.
    environment = {name: environ[name] for name in kept if environ.get(name)}
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment.pop("ROCR_VISIBLE_DEVICES", None)
    return {
        **environment,
        "HOME": str(home),
        "TMPDIR": str(home),
        "OLLAMA_HOST": "127.0.0.1:0",
        "OLLAMA_MODELS": str(models_dir),
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        **settings,
    }


def find_program(environ: Mapping[str, str]) -> str | None:
    """Return the ``ollama`` executable to start; None where there is none.

    AIFLUX_OLLAMA names it; else it is the one on PATH; else the CPU build that ``make demo`` put
    into the user's cache.
    """
    named = environ.get("AIFLUX_OLLAMA") or shutil.which("ollama", path=environ.get("PATH"))
    if named:
        return named
    home = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME') or ''}/.cache"
    demo = Path(environ.get("AIFLUX_CACHE_DIR") or f"{home}/aiflux") / "ollama-cpu/bin/ollama"
    return str(demo) if os.access(demo, os.X_OK) else None


class Server:
    """One ``ollama serve``.

    Args:
        program: the ``ollama`` executable.
        environment: its whole environment (see ``engine_environment``).
        log: file that its output is appended to.
    """

    def __init__(self, program: str, environment: Mapping[str, str], log: Path) -> None:
        self._command = [*_die_with_parent(), program, "serve"]
        self._environment = dict(environment)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process's id, once started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start and wait until it listens.

        Must be called from a thread that lives as long as the server is to live: the kernel ends
        the server with the thread that started it.

        Raises:
            EngineError: it did not start, or ended; or its log cannot be opened.
        """
        with self._open_log() as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise EngineError(
                    f"cannot start {self._command[-2]}: {error.strerror}", "check the installation"
                ) from error
        self.url = f"http://127.0.0.1:{self._await_port(self._process)}"

    def stop(self) -> None:
        """End the server and every process of its session; harmless when it is gone."""
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        self._signal(signal.SIGKILL)
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
        """Open the log. A full disk costs the log, not the engine; the journal reports the disk."""
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

    def _signal(self, number: int) -> None:
        """Signal the whole process group: a runner whose server was killed is in it, too."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _await_port(self, process: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise EngineError(
                    f"ollama serve ended with status {process.returncode} as it started:\n"
                    f"{self.log_tail()}",
                    f"see its log: {self.log}",
                )
            port = listening_port(process.pid)
            if port is not None:
                return port
            time.sleep(_POLL)
        self.stop()
        raise EngineError(
            f"ollama serve did not listen within {START_TIMEOUT:g} s", f"see its log: {self.log}"
        )


def _die_with_parent() -> list[str]:
    """Return the prefix that has the kernel end the server when this process is killed."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", "TERM", "--"] if program else []


def listening_port(pid: int) -> int | None:
    """Return the loopback TCP port that a process listens on; None where it does not (yet).

    Source: proc(5): /proc/PID/net/tcp has local address, state and inode in fields 2, 4 and 10.
    """
    inodes = _socket_inodes(pid)
    if not inodes:
        return None
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        address, _, port = fields[1].partition(":")
        if fields[3] == _LISTEN and address == _LOOPBACK and fields[9] in inodes:
            return int(port, 16)
    return None


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
