"""What a signal does to the worker: it asks to stop, or stops what has nothing to finish."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from aiflux.errors import ExitCode, StoppedError
from aiflux.worker.stopper import Stopper


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    stopper = Stopper()
    stopper.install()
    yield stopper
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_asks_to_stop(stopper: Stopper) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopper.stopping
    assert stopper.reason == "signal SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_nothing_in_flight_is_stopped_at_once(
    stopper: Stopper, number: signal.Signals
) -> None:
    cleaned = []

    def work() -> None:
        with stopper.raising():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)
                cleaned.append(True)

    with pytest.raises(StoppedError, match=number.name) as caught:
        work()
    assert cleaned, "a second signal does not break off what cleans up"
    assert caught.value.exit_code == ExitCode.STOPPED
    os.kill(os.getpid(), number)
    with pytest.raises(StoppedError), stopper.raising():
        pytest.fail("nothing is begun once somebody wants it to end")


def test_the_time_limits_early_warning_stops_nothing_at_once(stopper: Stopper) -> None:
    with stopper.raising():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopper.time_is_up
