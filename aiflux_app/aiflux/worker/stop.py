"""Signals: the first asks to stop in good order, the second to stop at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from aiflux.errors import StoppedError

# At a job's end the same signal can come more than once: from Slurm to the whole job, and forwarded
# by the batch script and by the container runtime.
_SAME_SIGNAL_SECONDS = 2.0


class Stopper:
    """Whether, why and how urgently the worker is to stop.

    Attributes:
        reason: a few words for the user; empty until it is to stop.
        at_once: do not wait for requests in flight.
        time_is_up: it is the job's time that ends, so that another start may go on.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._heed_usr1_from = 0.0
        self.reason = ""
        self.at_once = False
        self.time_is_up = False
        self.since = 0.0
        self._raises = False
        self._event = threading.Event()

    @property
    def stopping(self) -> bool:
        """Whether the worker is to stop."""
        return self._event.is_set()

    def stop(self, reason: str, *, time_is_up: bool = False) -> None:
        """Ask to stop in good order."""
        if not self._event.is_set():
            self.reason = reason
            self.time_is_up = time_is_up
            self.since = time.monotonic()
            self._event.set()

    def ignore_usr1_until(self, moment: float) -> None:
        """Let SIGUSR1, which Slurm may send a minute early, mean nothing before a Unix time."""
        self._heed_usr1_from = moment

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Have SIGTERM, SIGINT and SIGHUP raise StoppedError: while there is nothing to wait for.

        Main thread only. It is raised once; what cleans up after it is left alone.
        """
        self._raises = True
        try:
            if self.stopping and not self.time_is_up:
                raise self._stopped()
            yield
        finally:
            self._raises = False

    def install(self) -> None:
        """Listen to SIGTERM, SIGINT, SIGUSR1 and SIGHUP. Main thread only.

        SIGHUP stays ignored where it is, as under nohup.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1 and self._clock() < self._heed_usr1_from:
            return
        name = signal.Signals(number).name
        first = not self._event.is_set()
        self.stop(f"signal {name}", time_is_up=number == signal.SIGUSR1)
        if self._raises and number != signal.SIGUSR1:
            self._raises = False
            raise self._stopped()
        if not first and time.monotonic() - self.since > _SAME_SIGNAL_SECONDS:
            self.at_once = True

    def _stopped(self) -> StoppedError:
        return StoppedError(
            f"stopped ({self.reason}); what was done is kept", "the same command goes on"
        )
