"""The GPUs that this process can use, and how they are divided among engines.

Which variables name them:

- NVIDIA: Slurm sets CUDA_VISIBLE_DEVICES, to indexes or, for slices (MIG), to UUIDs.
- AMD: Slurm sets ROCR_VISIBLE_DEVICES. Where its configuration names no vendor, it sets
  CUDA_VISIBLE_DEVICES and GPU_DEVICE_ORDINAL to the same list (gres.conf(5): ``amd_gpu_env``).
  The HIP runtime is above ROCr and numbers only what ROCr left: with 2,3 in both variables there
  is no GPU. It reads CUDA_VISIBLE_DEVICES as another name of HIP_VISIBLE_DEVICES. So an engine gets
  one of these variables only, ROCR_VISIBLE_DEVICES if possible, which AMD recommends on Linux and
  which Ollama, llama.cpp and vLLM obey, as they use the ROCr runtime. vLLM ends if
  HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES differ.

Sources: https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html,
https://github.com/ROCm/ROCR-Runtime/issues/155, https://github.com/Parsl/parsl/issues/3858,
https://docs.ollama.com/gpu, vLLM 0.32.0 (``vllm/platforms/rocm.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from aiflux.core.config.settings import AMD, NVIDIA
from aiflux.engines.gpu_readings import (
    GpuReading,
    PowerReading,
    amd_power,
    amd_readings,
    nvidia_devices,
    nvidia_readings,
)
from aiflux.engines.nvml import nvidia_power
from aiflux.errors import EngineError
from aiflux.util.text import counted

CUDA, ROCR, HIP = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
DEVICE_VARIABLES = (CUDA, ROCR, HIP)
VENDOR_VARIABLE = "AIFLUX_GPU_VENDOR"
TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
_NONE = ("", "-1", "NoDevFiles", "none", "void")


def gpu_vendor(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> str:
    """Return whose GPUs this process can use: as set, or else by the device files.

    A machine with an NVIDIA GPU can have ``/dev/kfd`` too, of the graphics of an AMD processor.
    """
    chosen = environ.get(VENDOR_VARIABLE, "").lower()
    if chosen in (AMD, NVIDIA):
        return chosen
    return AMD if (dev / "kfd").exists() and not (dev / "nvidiactl").exists() else NVIDIA


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs as the job names them; all of them if it names none."""
    if gpu_vendor(environ) == AMD:
        return _amd_devices(environ)
    listed = _listed(environ, CUDA)
    return nvidia_devices() if listed is None else listed


def device_settings(environ: Mapping[str, str], devices: tuple[str, ...]) -> dict[str, str]:
    """Return the variable that limits an engine to some of ``visible_devices``; {} for none."""
    if not devices:
        return {}
    name = CUDA
    if gpu_vendor(environ) == AMD:
        only_hip = ROCR not in environ and (HIP in environ or CUDA in environ)
        name = HIP if only_hip else ROCR
    return {name: ",".join(devices)}


def own_devices(environ: Mapping[str, str], devices: tuple[str, ...]) -> dict[str, str]:
    """Return an environment in which a program sees some of the job's GPUs."""
    if not devices:
        return dict(environ)
    others = (*DEVICE_VARIABLES, "GPU_DEVICE_ORDINAL")
    kept = {name: value for name, value in environ.items() if name not in others}
    return {**kept, **device_settings(environ, devices)}


def _amd_devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    below, above = _listed(environ, ROCR), _listed(environ, HIP)
    if below is None:
        named = _listed(environ, CUDA) if above is None else above
        return kfd_devices() if named is None else named
    if above is None or above == below:
        return below
    numbered = [int(item) for item in above if item.isdigit() and int(item) < len(below)]
    return tuple(below[number] for number in numbered)


def kfd_devices(nodes: Path = TOPOLOGY) -> tuple[str, ...]:
    """Return the indexes of the GPUs that ROCr can use on this machine.

    The driver lists a processor as a node with gpu_id 0. The files of a GPU that the job may not
    use cannot be read (``kfd_topology.c`` in Linux).
    """
    count = 0
    for file in sorted(nodes.glob("*/gpu_id")):
        try:
            count += file.read_text(encoding="ascii").strip() not in ("", "0")
        except OSError:
            continue
    return tuple(map(str, range(count)))


def _listed(environ: Mapping[str, str], name: str) -> tuple[str, ...] | None:
    """Return the devices in a variable; None if it is not set."""
    value = environ.get(name)
    if value is None:
        return None
    return () if value in _NONE else tuple(part.strip() for part in value.split(","))


def readings(
    devices: tuple[str, ...], environ: Mapping[str, str] = os.environ
) -> tuple[GpuReading, ...]:
    """Return what the driver's program reports about each of these GPUs."""
    if not devices:
        return ()
    read = amd_readings if gpu_vendor(environ) == AMD else nvidia_readings
    return read(devices)


def power_readings(
    devices: tuple[str, ...], environ: Mapping[str, str] = os.environ
) -> tuple[PowerReading, ...]:
    """Return the energy and the power of each of these GPUs."""
    if not devices:
        return ()
    read = amd_power if gpu_vendor(environ) == AMD else nvidia_power
    return read(devices)


def gpu_names(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the models of the visible GPUs; empty if they are unknown."""
    found = readings(visible_devices(environ), environ)
    return tuple(reading.name for reading in found if reading.name)


def free_memory(
    devices: tuple[str, ...], environ: Mapping[str, str] = os.environ
) -> tuple[int, ...]:
    """Return the free bytes of each of these GPUs; empty if unknown."""
    sizes = [reading.free for reading in readings(devices, environ)]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(devices) else ()


def group(devices: tuple[str, ...], per_engine: int) -> tuple[tuple[str, ...], ...]:
    """Divide GPUs among engines; without GPUs there is one engine, on the CPU.

    Remaining GPUs are not used.

    Raises:
        EngineError: there are too few, or an engine cannot use several of them.
    """
    if not devices:
        return ((),)
    if per_engine > len(devices):
        raise EngineError(
            f"--gpus-per-engine {per_engine}, but the job has {counted(len(devices), 'GPU')}",
            f"request more with --gpus-per-node {per_engine}",
        )
    # CUDA shows a process one slice only.
    if per_engine > 1 and any(device.startswith("MIG-") for device in devices):
        raise EngineError(
            f"--gpus-per-engine {per_engine}, but the job has slices of GPUs (MIG), of which an "
            "engine can use one only",
            "leave it out; for a larger model, request a larger slice or whole GPUs",
        )
    count = len(devices) // per_engine
    return tuple(devices[i * per_engine : (i + 1) * per_engine] for i in range(count))
