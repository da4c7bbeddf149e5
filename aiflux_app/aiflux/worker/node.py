"""The node of a job: whether this process is sealed from its network, and the load of its GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from aiflux.core.runs.status_file import GpuUse
from aiflux.engines.gpus import nvidia_smi
from aiflux.util.process_limits import start_thread

ROUTES = (Path("/proc/net/route"), Path("/proc/net/ipv6_route"))
"""IPv4's table has a heading and the interface first, IPv6's has it last (Linux, proc(5))."""
INTERVAL = 30.0
_QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"


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
