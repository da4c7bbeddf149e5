"""Sample nvidia-smi during a measurement."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

_QUERY = "utilization.gpu,power.draw,memory.used"
_OPTIONS = ("--id=0", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Sample:
    """One reading: percent, watts, MiB."""

    at: float
    busy: float
    power: float
    memory: float


def parse(line: str, at: float) -> Sample | None:
    """Return the reading in a line of nvidia-smi, if it is one."""
    try:
        busy, power, memory = (float(part) for part in line.split(","))
    except ValueError:
        return None
    return Sample(at, busy, power, memory)


@dataclass
class Sampler:
    """Reads the first GPU twice a second; does nothing without nvidia-smi."""

    samples: list[Sample] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Sampler:
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={_QUERY}", *_OPTIONS, "--loop-ms=500"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout is not None
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            sample = parse(line, time.monotonic())
            if sample is not None:
                self.samples.append(sample)

    def mean(self, began: float, seconds: float) -> dict[str, float]:
        """Return the means over a time span; empty without readings."""
        found = [sample for sample in self.samples if began <= sample.at <= began + seconds]
        if not found:
            return {}
        return {
            name: round(statistics.fmean(getattr(sample, name) for sample in found), 1)
            for name in ("busy", "power", "memory")
        }


def gpu_name() -> str:
    """Return the card and the driver."""
    if not shutil.which("nvidia-smi"):
        return "no NVIDIA GPU"
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", *_OPTIONS[:1]]
    done = subprocess.run(
        [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() or done.stderr.strip()
