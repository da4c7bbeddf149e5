"""Signal handling: the first signal stops the worker gracefully, the second at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from aiflux.errors import StoppedError
from aiflux.util.signals import raised_again

# At a job's end, the same signal can arrive more than once: from Slurm for the whole job, and
# forwarded by the batch script and the container runtime.
_SAME_SIGNAL_SECONDS = 2.0


class Stopper:
    """Records whether, why and how urgently the worker should stop.

    Attributes:
        reason: a few words for the user; empty until a stop is requested.
        at_once: do not wait for requests in flight.
        time_is_up: the job's time has ended, so another start can continue.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._heed_usr1_from = 0.0
        self.reason = ""
        self.at_once = False
        self.time_is_up = False
        self.since = 0.0
        self._raises = False
        self._stopping = False
        # Reentrant: a signal's handler can run while its own thread is within `stop`.
        self._changed = threading.Condition(threading.RLock())

    @property
    def stopping(self) -> bool:
        """Whether the worker should stop."""
        return self._stopping

    def wait(self, seconds: float) -> bool:
        """Wait until the worker should stop; return False if it should not in this time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, seconds)

    def stop(self, reason: str, *, time_is_up: bool = False) -> None:
        """Request a graceful stop."""
        with self._changed:
            if not self._stopping:
                self.reason = reason
                self.time_is_up = time_is_up
                self.since = time.monotonic()
                self._stopping = True
                self._changed.notify_all()

    def ignore_usr1_until(self, moment: float) -> None:
        """Ignore SIGUSR1, which Slurm may send a minute early, until a Unix time."""
        self._heed_usr1_from = moment

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Make SIGTERM, SIGINT and SIGHUP raise StoppedError, while nothing waits for a stop.

        Main thread only. The error is raised once; cleanup after it is not interrupted.
        """
        self._raises = True
        try:
            if self.stopping and not self.time_is_up:
                raise self._stopped()
            with raised_again(StoppedError):
                yield
        finally:
            self._raises = False

    def install(self) -> None:
        """Handle SIGTERM, SIGINT, SIGUSR1 and SIGHUP. Main thread only.

        SIGHUP stays ignored if it is, as under nohup.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1 and self._clock() < self._heed_usr1_from:
            return
        name = signal.Signals(number).name
        first = not self._stopping
        self.stop(f"signal {name}", time_is_up=number == signal.SIGUSR1)
        if self._raises and number != signal.SIGUSR1:
            self._raises = False
            raise self._stopped()
        if not first and time.monotonic() - self.since > _SAME_SIGNAL_SECONDS:
            self.at_once = True

    def _stopped(self) -> StoppedError:
        return StoppedError(
            f"stopped ({self.reason}); finished results are kept",
            "run the same command to resume",
        )
