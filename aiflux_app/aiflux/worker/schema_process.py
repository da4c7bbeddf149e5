"""A child process that checks answers against JSON Schemas, and its client in the worker.

A pattern such as ``^(a+)+$`` can block Python's ``re`` forever, and with it all threads of the
process. So a check that may take long runs in a child: it reads one JSON line ``[schema, answer]``
and writes one line ``[finding, words]``. A child that takes too long is killed and replaced.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from aiflux.core.batch.schema import SchemaError, answer_problem, compile_schema
from aiflux.errors import StoppedError

SECONDS = 10.0
FITS, UNFIT, WRONG, FAILED = "fits", "unfit", "wrong", "failed"
"""Findings: the last two concern the schema, and the check itself."""
_START_SECONDS = 120.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_BLOCK = 65536


class CheckAbortedError(Exception):
    """The worker aborted the check; the answer may be valid or not."""


class SchemaProcess:
    """Checks one answer at a time; the child is started on demand.

    Args:
        seconds: time limit of one check.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._aborted = False

    def check(self, schema: str, text: str) -> tuple[str, str]:
        """Return the finding on an answer, and its explanation.

        Args:
            schema: the schema as JSON.

        Raises:
            CheckAbortedError: ``abort`` was called.
            StoppedError: the child cannot be started.
        """
        line = json.dumps([schema, text]).encode() + b"\n"
        # The first child may have been killed for a reason other than the answer.
        for _ in range(2):
            try:
                return self._ask(line)
            except BlockingIOError:
                self._kill()
                self._refuse_aborted()
                return FAILED, f"took more than {self._seconds:g} s"
            except OSError:
                ended = self._kill()
                self._refuse_aborted()
        return FAILED, f"ended its process ({ended})"

    def abort(self) -> None:
        """Abort the running check and refuse further ones. Can be called from any thread."""
        self._aborted = True
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End the child."""
        self._kill()

    def _refuse_aborted(self) -> None:
        if self._aborted:
            raise CheckAbortedError

    def _ask(self, line: bytes) -> tuple[str, str]:
        connection = self._socket or self._start()
        self._refuse_aborted()
        connection.sendall(line)
        finding, words = json.loads(_line(connection))
        return finding, words

    def _start(self) -> socket.socket:
        self._refuse_aborted()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(self._seconds)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    # -m searches the working directory first, which must not be the user's.
                    cwd="/",
                    env={**os.environ, "PYTHONPATH": _python_path()},
                    # Ctrl-C must only reach the worker.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        try:
            _limit(ours, _START_SECONDS)
            _line(ours)
            _limit(ours, self._seconds)
        except OSError as error:
            ended = self._kill()
            self._refuse_aborted()
            raise StoppedError(
                f"the process that checks answers against schemas did not start ({ended})",
                "it may lack memory (ulimit -v, the job's --mem): raise the limit and run the same "
                "command again",
            ) from error
        return ours

    def _kill(self) -> str:
        """End the child; return how it ended."""
        child, self._child = self._child, None
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()
        if child is None:
            return "not started"
        # A child that died reports its own end, which may take a moment.
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
        child.kill()
        code = child.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _python_path() -> str:
    """Return the import path of this process for the child."""
    return os.pathsep.join(os.path.abspath(path) for path in sys.path)


def _limit(connection: socket.socket, seconds: float) -> None:
    """Set the time limit of a socket in the kernel, which needs no extra system calls."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for name in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, name, value)


def _line(connection: socket.socket) -> bytes:
    """Receive one line.

    Raises:
        BlockingIOError: nothing came in time.
        OSError: the other end is gone.
    """
    blocks: list[bytes] = []
    while not (blocks and blocks[-1].endswith(b"\n")):
        block = connection.recv(_BLOCK)
        if not block:
            raise ConnectionResetError
        blocks.append(block)
    return b"".join(blocks)


@lru_cache(maxsize=256)
def _compiled(schema: str) -> Callable[[str], str | None] | SchemaError:
    try:
        check = compile_schema(json.loads(schema))
    except SchemaError as error:
        return error
    return lambda text: answer_problem(text, check)


def find(schema: str, text: str) -> tuple[str, str]:
    """Return the finding on an answer; exceptions become findings. Not thread-safe."""
    try:
        check = _compiled(schema)
        problem = None if isinstance(check, SchemaError) else check(text)
    except SchemaError as error:
        return WRONG, str(error)
    except Exception as error:  # noqa: BLE001 - the answer that raised it is the one that fails
        return FAILED, f"failed with {type(error).__name__}: {error}"[:500]
    if isinstance(check, SchemaError):
        return WRONG, str(check)
    return (FITS, "") if problem is None else (UNFIT, problem)


def main() -> None:
    """Run the child until stdin ends; the argument is the time limit of a check."""
    seconds = float(sys.argv[1])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    compile_schema({})  # imports jsonschema
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        # If no parent is left to kill this process, the alarm does.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        sys.stdout.write(json.dumps(find(*json.loads(line))) + "\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
