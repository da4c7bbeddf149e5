"""SIGTERM unwinds as Ctrl-C does, for commands that have temporary files to remove."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwinding() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt; to be used in the main thread."""

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
