"""Read from a server's log why it ended during its start."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MEMORY = (
    "use fewer --slots or a shorter --context-length, or request more memory: --mem, or more GPUs "
    "with --gpus-per-engine"
)
KILLED = "memory may have run out: request more with --mem"
"""Remedy for a process that the kernel killed."""
# Lines about a lack of memory, each with the remedy: those of vLLM (v1/worker/utils.py,
# v1/worker/cpu_worker.py, v1/core/kv_cache_utils.py, v1/engine/utils.py and
# distributed/device_communicators/shm_broadcast.py of 0.32.0), PyTorch, Python, and llama.cpp
# (ggml.c, ggml-backend.cpp, ggml-cuda.cu).
_KNOWN = tuple(
    (re.compile(pattern), remedy)
    for pattern, remedy in (
        (
            r"Insufficient space in /dev/shm .*",
            "run in the image, whose container has a /dev/shm of its own; or ask the site to "
            "enlarge that of the node",
        ),
        (
            r"(?:Free|Available) memory on .* is less than desired .*",
            "use a GPU or node that is free, or let the engine use less of it: --engine-arg "
            "gpu-memory-utilization=0.8",
        ),
        (r"Available memory on .* is less than requested .*", _MEMORY),
        (r"No available memory for the cache blocks.*", _MEMORY),
        (r"To serve at least one request with the model.*", _MEMORY),
        (r"(?:CUDA|HIP) out of memory.*", _MEMORY),
        (r"DefaultCPUAllocator: .*", _MEMORY),
        (r"insufficient memory \(attempted .*", _MEMORY),
        (r"cudaMalloc failed: out of memory.*", _MEMORY),
        (r"failed to allocate (?:\w+ )?buffer.*", _MEMORY),
        (r"Cannot allocate memory.*", _MEMORY),
        (r"(?:^|(?<=\] ))MemoryError\b.*", _MEMORY),
        (r"std::bad_alloc.*", _MEMORY),
        (r"(?:died unexpectedly \(exit code|Failed core proc\(s\): \{'\w+'): -9\b.*", KILLED),
    )
)
# The line with which a process of vLLM ends its traceback; the first one is the cause.
_EXCEPTION = re.compile(
    r"^\([\w-]+ pid=\d+\) ERROR [^]]*\] ([A-Za-z_][\w.]*(?:Error|Exception): .*)"
)
# Lines with which servers refuse their command line: those of argparse, of vLLM
# (vllm/entrypoints/launchers/launcher.py) and of llama.cpp (common/arg.cpp).
_REFUSAL = re.compile(
    r"(?:unrecognized arguments: |error: argument |error: ambiguous option: "
    r"|invalid (?:tool call|reasoning) parser: |error: invalid argument: "
    r"|error while handling argument ).*"
)


@dataclass(frozen=True)
class Cause:
    """Why a server ended, in its own words.

    Attributes:
        remedy: "" if unknown.
    """

    line: str
    remedy: str


def find_cause(log: str) -> Cause | None:
    """Return the reason for a server's end; None if its log names none that is known."""
    lines = log.splitlines()
    for line in lines:
        for pattern, remedy in _KNOWN:
            found = pattern.search(line)
            if found:
                return Cause(found[0].strip(), remedy)
    first = next(filter(None, map(_EXCEPTION.match, lines)), None)
    return Cause(first[1].strip(), "") if first else None


def refused_option(log: str) -> str | None:
    """Return the line of a server's log that refuses its command line; None without one."""
    found = [match[0] for match in map(_REFUSAL.search, log.splitlines()) if match]
    return found[-1].removeprefix("error: ") if found else None
