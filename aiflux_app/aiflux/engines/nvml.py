"""The energy counters of NVIDIA's GPUs, read from the driver's library NVML.

NVML is part of the driver, and Apptainer binds it into the container with ``--nv``. GPUs since
Volta count their energy in millijoules from the moment the driver was loaded
(https://docs.nvidia.com/deploy/nvml-api, ``nvmlDeviceGetTotalEnergyConsumption``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from aiflux.engines.gpu_readings import PowerReading, nvidia_uuids, nvidia_watts

_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_Uuids = tuple[str | None, ...]


def nvidia_power(devices: Sequence[str]) -> tuple[PowerReading, ...]:
    """Return the energy of each device; the power of those that do not count it."""
    uuids = _uuids(tuple(devices))
    library = _library()
    counters = [None if uuid is None or library is None else _joules(library, uuid)
                for uuid in uuids]  # fmt: skip
    pairs = list(zip(uuids, counters, strict=True))
    watts = nvidia_watts([uuid for uuid, joules in pairs if uuid is not None and joules is None])
    return tuple(PowerReading(joules, watts.get(uuid or "")) for uuid, joules in pairs)


@cache
def _uuids(devices: tuple[str, ...]) -> _Uuids:
    return nvidia_uuids(devices)


@cache
def _library() -> ctypes.CDLL | None:
    """Return the initialized library; None if it is missing or has no driver."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        return library if library.nvmlInit_v2() == _SUCCESS else None
    except (OSError, AttributeError):
        return None


def _joules(library: ctypes.CDLL, uuid: str) -> float | None:
    """Return the counter of a card; None if it has none."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    try:
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        if found != _SUCCESS:
            return None
        read = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    except AttributeError:  # a driver from before 2018
        return None
    return millijoules.value / 1000 if read == _SUCCESS else None
