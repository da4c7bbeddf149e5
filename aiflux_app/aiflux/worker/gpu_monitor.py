"""How busy the job's GPUs are: a sample of nvidia-smi now and then, kept as mean and maximum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aiflux.engines.gpus import nvidia_smi
from aiflux.util.process_limits import start_thread

INTERVAL = 30.0
_QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"


@dataclass(frozen=True)
class GpuUse:
    """Samples of all GPUs of a shard, added up over all its starts.

    Attributes:
        samples: one for each GPU each time.
        utilization_mean, utilization_max: percent of the time in which a kernel ran.
        memory_mib_mean, memory_mib_max: in use.
        memory_mib_total: what a GPU has.
    """

    samples: int = 0
    utilization_mean: float = 0.0
    utilization_max: float = 0.0
    memory_mib_mean: float = 0.0
    memory_mib_max: float = 0.0
    memory_mib_total: float = 0.0

    @classmethod
    def of(cls, plan_id: str, earlier: Mapping[str, Any] | None) -> GpuUse:
        """Go on from a status that an earlier start of the same plan left."""
        details = (earlier or {}).get("aiflux", {})
        told = details.get("gpu_use") if details.get("plan") == plan_id else None
        return (
            cls(**{name: told[name] for name in asdict(cls()) if name in told}) if told else cls()
        )

    def with_sample(self, utilization: float, used: float, total: float) -> GpuUse:
        """Return the sum with one sample more."""
        count = self.samples + 1
        return GpuUse(
            count,
            self.utilization_mean + (utilization - self.utilization_mean) / count,
            max(self.utilization_max, utilization),
            self.memory_mib_mean + (used - self.memory_mib_mean) / count,
            max(self.memory_mib_max, used),
            max(self.memory_mib_total, total),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the status shows."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


def samples(devices: Sequence[str]) -> list[tuple[float, float, float]]:
    """Return percent busy, MiB used and MiB in all of each GPU; none where that cannot be told."""
    if not devices:
        return []
    told = nvidia_smi(f"--id={','.join(devices)}", _QUERY, "--format=csv,noheader,nounits")
    found = []
    for line in told:
        try:
            utilization, used, total = (float(cell) for cell in line.split(","))
        except ValueError:
            continue  # "[N/A]": parts of a GPU (MIG) do not tell
        found.append((utilization, used, total))
    return found


class GpuWatch:
    """Takes samples in a thread of its own while the ``with`` block runs.

    Args:
        note: told the sum after each round of samples; not called where there are none.
    """

    def __init__(
        self,
        devices: Sequence[str],
        before: GpuUse,
        note: Callable[[dict[str, Any]], None],
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
                self._use = self._use.with_sample(*sample)
            if not found:
                return
            if not self._ended.is_set():
                self._note(self._use.to_json())
