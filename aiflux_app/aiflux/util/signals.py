"""Signals as exceptions: SIGTERM and SIGHUP end a command as Ctrl-C does, and none is lost.

Programs import this before all else, to handle signals that arrive during their imports.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SOON = 0.01  # seconds


@contextmanager
def unwinding() -> Iterator[None]:
    """Raise KeyboardInterrupt with the signal's name on SIGTERM and SIGHUP.

    Under nohup SIGHUP stays ignored. In a thread, signals are left to the caller.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _unwind) for number in numbers}
    try:
        with raised_again(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwind(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the handlers of the signals that end a worker, for commands that work repeatedly."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raised_again(kind: type[BaseException]) -> Iterator[None]:
    """Raise an exception of a signal handler again if Python printed and dropped it.

    Python does so in callbacks of weak references and in finalizers. Each import ends with such a
    callback (``importlib._bootstrap._get_module_lock``). Main thread only.

    Args:
        kind: the exception that signal handlers raise.
    """
    dropped: list[BaseException] = []
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGALRM)

    def again(number: int, frame: FrameType | None) -> None:
        if dropped:
            raise dropped.pop()
        if callable(handler):  # of an outer call
            handler(number, frame)

    def catch(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, kind):
            hook(unraisable)
            return
        dropped[:] = [unraisable.exc_value]
        # Not from here, where it would be dropped again.
        signal.setitimer(signal.ITIMER_REAL, _SOON)

    signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = catch
    try:
        yield
        if dropped:
            raise dropped.pop()
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
