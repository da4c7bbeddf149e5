"""Sample the load of the job's GPUs with nvidia-smi, and keep mean and maximum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple

from aiflux.core.runs.status_file import GpuUse
from aiflux.engines.gpus import nvidia_smi
from aiflux.util.process_limits import start_thread

INTERVAL = 30.0
_QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"


def with_sample(use: GpuUse, utilization: float, used: float, total: float) -> GpuUse:
    """Return the usage with one more sample."""
    count = use.samples + 1
    return GpuUse(
        count,
        use.utilization_mean + (utilization - use.utilization_mean) / count,
        max(use.utilization_max, utilization),
        use.memory_mib_mean + (used - use.memory_mib_mean) / count,
        max(use.memory_mib_max, used),
        max(use.memory_mib_total, total),
    )


def rounded(use: GpuUse) -> GpuUse:
    """Return the usage, rounded for the status."""
    return GpuUse(use.samples, *(round(figure, 2) for figure in astuple(use)[1:]))


def samples(devices: Sequence[str]) -> list[tuple[float, float, float]]:
    """Return load in percent, used MiB and total MiB of each GPU; empty if unknown."""
    if not devices:
        return []
    output = nvidia_smi(f"--id={','.join(devices)}", _QUERY, "--format=csv,noheader,nounits")
    found = []
    for line in output:
        try:
            utilization, used, total = (float(cell) for cell in line.split(","))
        except ValueError:
            continue  # "[N/A]" for parts of a GPU (MIG)
        found.append((utilization, used, total))
    return found


class GpuWatch:
    """Takes samples in a separate thread during the ``with`` block.

    Args:
        note: called with the sums after each round of samples.
    """

    def __init__(
        self,
        devices: Sequence[str],
        before: GpuUse,
        note: Callable[[GpuUse], None],
        interval: float = INTERVAL,
    ) -> None:
        self._devices = devices
        self._use = before
        self._note = note
        self._interval = interval
        self._ended = threading.Event()

    def __enter__(self) -> GpuWatch:
        if self._devices:
            start_thread(self._watch, "gpu-use")
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            found = samples(self._devices)
            for sample in found:
                self._use = with_sample(self._use, *sample)
            if not found:
                return
            if not self._ended.is_set():
                self._note(rounded(self._use))
