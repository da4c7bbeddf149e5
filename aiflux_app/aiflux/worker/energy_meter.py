"""The energy of the job's GPUs: differences of their counters, or else their power over time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from aiflux.core.runs.status_file import EnergyUse
from aiflux.engines.gpu_readings import PowerReading
from aiflux.engines.gpus import power_readings


class EnergyMeter:
    """Adds up the energy of GPUs from one reading to the next.

    Args:
        before: the energy of the earlier starts.
        note: called with the sum after each reading.
    """

    def __init__(
        self,
        devices: tuple[str, ...],
        before: EnergyUse,
        note: Callable[[EnergyUse], None],
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices = devices
        self._sum = before
        self._note = note
        self._environ = environ
        self._clock = clock
        self._last: tuple[float, tuple[PowerReading, ...]] | None = None

    @property
    def works(self) -> bool:
        """Whether the last reading had any figure."""
        return self._last is not None and any(each != PowerReading() for each in self._last[1])

    def read(self) -> None:
        """Read all GPUs, and add the energy since the last reading."""
        found = self._clock(), power_readings(self._devices, self._environ)
        if self._last is not None:
            seconds = found[0] - self._last[0]
            for before, after in zip(self._last[1], found[1], strict=True):
                self._sum = self._sum.plus(energy_between(before, after, seconds))
        self._last = found
        if self.works:
            self._note(self._sum)


def energy_between(before: PowerReading, after: PowerReading, seconds: float) -> EnergyUse:
    """Return the energy of one GPU between two readings; nothing where it was not measured.

    A counter that went back was reset with the driver: that time is not measured.
    """
    if before.joules is not None and after.joules is not None:
        spent = after.joules - before.joules
        return EnergyUse(spent, seconds, 0.0) if spent >= 0 else EnergyUse()
    if before.watts is not None and after.watts is not None:
        return EnergyUse((before.watts + after.watts) / 2 * seconds, 0.0, seconds)
    return EnergyUse()
