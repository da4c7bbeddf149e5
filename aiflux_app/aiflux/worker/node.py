"""The node of a job: whether it is sealed from the network, and its GPUs and their load."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path

from aiflux.core.config.settings import VENDOR_TITLES
from aiflux.core.runs.status_file import EnergyUse, GpuUse
from aiflux.engines.gpu_readings import GpuReading
from aiflux.engines.gpus import gpu_vendor, readings
from aiflux.errors import EngineError
from aiflux.util.process_limits import start_thread
from aiflux.worker.energy_meter import EnergyMeter

ROUTES = (Path("/proc/net/route"), Path("/proc/net/ipv6_route"))
"""IPv4's table has a heading and the interface first, IPv6's has it last (Linux, proc(5))."""
INTERVAL = 30.0
_LAST_SECONDS = 5.0
_MIB = 2**20


def unsealed_reason(
    environ: Mapping[str, str], *, engine_here: bool, tables: tuple[Path, Path] = ROUTES
) -> str:
    """Return why this process has a network; "" if it only has loopback.

    Args:
        engine_here: whether the engine runs next to this process.
        tables: the kernel's routes for IPv4 and IPv6.
    """
    if environ.get("AIFLUX_SEALED") == "1":
        out = sorted({*_interfaces(tables)} - {"lo"})
        if not out:
            return ""
        return f"the container still has a network ({', '.join(out)})"
    unknown = "started directly" if engine_here else "the engine is elsewhere"
    why = environ.get("AIFLUX_UNSEALED") or unknown
    return why.encode(errors="replace").decode()


def _interfaces(tables: tuple[Path, Path]) -> Iterator[str]:
    """Yield the interfaces with outgoing routes."""
    fourth, sixth = (_rows(table) for table in tables)
    yield from (row[0] for row in fourth[1:])
    yield from (row[-1] for row in sixth)


def _rows(table: Path) -> list[list[str]]:
    try:
        lines = table.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []  # a kernel without this protocol has no table
    return [line.split() for line in lines if line.strip()]


def refuse_wrong_image(environ: Mapping[str, str], devices: tuple[str, ...]) -> None:
    """Refuse to run in an image whose engine cannot use the job's GPUs.

    Images of earlier versions do not name the vendor.

    Raises:
        EngineError: it is for CPUs, or for the GPUs of another vendor.
    """
    if environ.get("AIFLUX_IMAGE_CPU_ONLY") == "1":
        raise EngineError(
            f"this image runs on the CPU only, but the job has the GPUs {', '.join(devices)}",
            "use an image with GPU support (built with BASE=docker), or pass --allow-cpu",
        )
    vendors, own = environ.get("AIFLUX_IMAGE_GPU_VENDORS", "").split(), gpu_vendor(environ)
    if vendors and own not in vendors:
        raise EngineError(
            f"this image is for GPUs of {VENDOR_TITLES.get(vendors[0], vendors[0])}, but the job "
            f"has GPUs of {VENDOR_TITLES[own]}",
            f"use an image built with GPU={own}, request other GPUs, or pass --allow-cpu",
        )


def with_sample(use: GpuUse, utilization: float | None, used: float, total: float) -> GpuUse:
    """Return the usage with one more sample; a mean is known if every sample is."""
    count = use.samples + 1
    mean = highest = None
    if utilization is not None and use.utilization_mean is not None:
        mean = use.utilization_mean + (utilization - use.utilization_mean) / count
        highest = max(use.utilization_max or 0.0, utilization)
    return GpuUse(
        count,
        mean,
        highest,
        use.memory_mib_mean + (used - use.memory_mib_mean) / count,
        max(use.memory_mib_max, used),
        max(use.memory_mib_total, total),
    )


def rounded(use: GpuUse) -> GpuUse:
    """Return the usage, rounded for the status."""
    figures: list[float] = [figure and round(figure, 2) for figure in astuple(use)[1:]]
    return GpuUse(use.samples, *figures)


def _add(use: GpuUse, reading: GpuReading) -> GpuUse:
    """Return the usage with a reading, if that has figures of memory."""
    if reading.used is None or reading.total is None:
        return use
    return with_sample(use, reading.utilization, reading.used / _MIB, reading.total / _MIB)


class GpuWatch:
    """Takes samples in a separate thread during the ``with`` block.

    Args:
        note: called with the sums after each round of samples.
        meter: of the energy; it is read at the beginning, with the samples and at the end.
    """

    def __init__(
        self,
        devices: tuple[str, ...],
        before: GpuUse,
        note: Callable[[GpuUse], None],
        interval: float = INTERVAL,
        environ: Mapping[str, str] = os.environ,
        meter: EnergyMeter | None = None,
    ) -> None:
        self._devices = devices
        self._environ = environ
        self._use = before
        self._note = note
        self._interval = interval
        self._meter = meter or EnergyMeter((), EnergyUse(), lambda _: None)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuWatch:
        if self._devices:
            self._thread = start_thread(self._watch, "gpu-use")
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)  # a driver that hangs must not hold up the end

    def _watch(self) -> None:
        self._meter.read()
        while not self._ended.wait(self._interval):
            before = self._use
            for reading in readings(self._devices, self._environ):
                self._use = _add(self._use, reading)
            self._meter.read()
            if self._use == before and not self._meter.works:
                return
            if not self._ended.is_set():
                self._note(rounded(self._use))
        self._meter.read()
