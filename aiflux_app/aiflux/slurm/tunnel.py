"""An ssh tunnel to a port of a compute node."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping

from aiflux.errors import SlurmError

_TIMEOUT = 20.0
_POLL = 0.1


class Tunnel:
    """Forwards a port of this machine's loopback; a context manager that closes it.

    Args:
        node: as ssh knows it.
        host, port: where the node's server listens.
        local: the port here.

    Raises:
        SlurmError: there is no ssh, or the node refused.
    """

    def __init__(
        self, node: str, host: str, port: int, local: int, environ: Mapping[str, str]
    ) -> None:
        program = shutil.which("ssh", path=environ.get("PATH"))
        if program is None:
            raise SlurmError("there is no ssh on PATH", "install the package openssh-client")
        _refuse_taken(local)
        self._node, self._local = node, local
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        options = ("BatchMode=yes", "ExitOnForwardFailure=yes", "ConnectTimeout=10",
                   "ServerAliveInterval=15", "ControlPath=none")  # fmt: skip
        # The remote cat ends with this process, and the tunnel with it, even after a SIGKILL.
        self._process = subprocess.Popen(
            [program, "-T", *(word for each in options for word in ("-o", each)),
             "-L", f"127.0.0.1:{local}:{host}:{port}", "--", node, "cat"],
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
        )  # fmt: skip
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def open(self) -> bool:
        """Whether ssh still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End ssh."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._messages.close()

    def _await(self) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while self.open and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._local)) == 0 and self.open:
                    return
            time.sleep(_POLL)
        self._messages.seek(0)
        words = self._messages.read().decode("utf-8", "replace").strip().splitlines()
        why = words[-1].strip() if words else "it did not connect in time"
        raise SlurmError(
            f"ssh to {self._node} failed: {why}",
            f"try it: ssh {self._node}; the site may not allow it, or only while your job runs",
        )


def _refuse_taken(port: int) -> None:
    """Refuse a port at which a program listens: a connection would not show that ssh is ready.

    Raises:
        SlurmError: one does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # allows the last tunnel's
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SlurmError(
                f"the port {port} of this machine: {error.strerror}", "choose another with --port"
            ) from error
