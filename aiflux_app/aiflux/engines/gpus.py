"""The GPUs that this process can use."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_NONE = ("", "-1", "NoDevFiles", "none", "void")
_TIMEOUT = 60
_MIB = 2**20


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs as the job names them, from the environment or ``nvidia-smi -L``."""
    for name in _VARIABLES:
        value = environ.get(name)
        if value is not None:
            return () if value in _NONE else tuple(part.strip() for part in value.split(","))
    return tuple(str(index) for index in range(len(nvidia_smi("-L"))))


def own_devices(environ: Mapping[str, str], devices: tuple[str, ...]) -> dict[str, str]:
    """Return an environment in which a program sees some of the job's GPUs.

    The variable that names the job's GPUs is set, and the others are left out: they number the GPUs
    that the first one leaves.
    """
    if not devices:
        return dict(environ)
    name = next((each for each in _VARIABLES if each in environ), _VARIABLES[0])
    others = {key: value for key, value in environ.items() if key not in _VARIABLES}
    return {**others, name: ",".join(devices)}


def gpu_names() -> tuple[str, ...]:
    """Return the models of the visible GPUs; empty without NVIDIA driver."""
    return tuple(nvidia_smi("--query-gpu=name", "--format=csv,noheader"))


def free_memory(devices: tuple[str, ...]) -> tuple[int, ...]:
    """Return the free bytes of each of these GPUs; empty if unknown."""
    query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    lines = nvidia_smi(f"--id={','.join(devices)}", *query) if devices else []
    numbers = [int(line) * _MIB for line in lines if line.strip().isdigit()]
    return tuple(numbers) if len(numbers) == len(devices) else ()


def nvidia_smi(*arguments: str) -> list[str]:
    """Return the output lines of nvidia-smi; empty if it is missing, hangs or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def group(devices: tuple[str, ...], per_engine: int) -> tuple[tuple[str, ...], ...]:
    """Divide GPUs among engines; without GPUs there is one engine, on the CPU.

    Remaining GPUs are not used.
    """
    if not devices:
        return ((),)
    count = max(1, len(devices) // per_engine)
    return tuple(devices[i * per_engine : (i + 1) * per_engine] for i in range(count))
