"""A command on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence
from typing import Any


def on_terminal(
    command: Sequence[str],
    *streams: str,
    columns: int = 80,
    lines: int = 24,
    environ: dict[str, str] | None = None,
    **more: Any,
) -> str:
    """Run a command that succeeds, and return what it writes to a terminal.

    Args:
        streams: those that are the terminal, such as ``stdout``.
        environ: variables in addition to those of this process.
        more: for ``subprocess.Popen``.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    more = {"env": {**os.environ, "TERM": "xterm-256color", **(environ or {})}, **more}
    with subprocess.Popen(command, **dict.fromkeys(streams, theirs), **more) as process:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 1 << 16):
                shown += block
        except OSError:  # so Linux says that the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()
