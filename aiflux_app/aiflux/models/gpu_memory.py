"""GPU memory, derived from the names that clusters give to GPUs.

A name used for several sizes counts as the largest: a model is only refused if it certainly does
not fit. Sources: the manufacturers' data sheets.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

GIGABYTE = 2**30
"""A GB of GPU memory, as manufacturers count it."""

# GB of the largest GPU with a name; a longer name comes before a name that is part of it.
_KNOWN = {
    "gb300": 288, "gb200": 192, "gh200": 144, "b300": 288, "b200": 192, "b100": 192, "h200": 141,
    "h100": 96, "h800": 80, "h20": 141, "a100": 80, "a800": 80, "a40": 48, "a30": 24, "a16": 16,
    "a10g": 24, "a10": 24, "a2": 16, "a6000": 48, "a5500": 24, "a5000": 32, "a4500": 20,
    "a4000": 20, "l40s": 48, "l40": 48, "l4": 24, "v100s": 32, "v100": 32, "p100": 16, "p40": 24,
    "p4": 8, "t4": 16, "k80": 12, "m40": 24, "rtx8000": 48, "rtx6000": 96, "rtx5000": 32,
    "rtx4000": 20, "rtxpro6000": 96, "5090": 32, "5080": 16, "4090": 24, "4080": 16, "3090": 24,
    "3080": 12, "2080ti": 11, "1080ti": 11, "2080": 11, "1080": 11, "titanv": 12, "titanrtx": 24,
    "mi100": 32, "mi210": 64, "mi250x": 128, "mi250": 128, "mi300a": 128, "mi300x": 192,
    "mi300": 192, "mi325x": 256, "mi350x": 288, "mi355x": 288,
}  # fmt: skip
_NAMED_SIZE = re.compile(r"(?<![0-9.])(\d{1,3})\s*gi?b?(?![a-z0-9.])")
_SLICE = re.compile(r"\dg[._](\d+)gb")


@dataclass(frozen=True)
class Room:
    """The largest GPUs that a job can get.

    Attributes:
        kind: name of the GPUs.
        size: bytes per GPU.
        count: number of GPUs that the job requests.
        most: number of GPUs in one node.
        option: the option that requests another number, which replaces its ``{}``.
    """

    kind: str
    size: int
    count: int
    most: int
    option: str = "--gpus-per-node {}"


def is_slice(name: str) -> bool:
    """Return whether a GPU is a slice (MIG); a process can only use one slice."""
    return _SLICE.search(name.lower()) is not None


def gpu_bytes(name: str) -> int | None:
    """Return the memory of a GPU by its name, or None if it is unknown.

    Names are Slurm's GPU types and node features, such as ``a100``, ``nvidia_a100_80gb``,
    ``h100.1g.10gb`` or ``rtx_2080_ti``.
    """
    text = name.lower().strip()
    part = _SLICE.search(text)
    if part:
        return int(part[1]) * GIGABYTE
    known = _by_model(text)
    sized = _NAMED_SIZE.search(text)
    if sized and known is not None:
        return int(sized[1]) * GIGABYTE
    return known


def gpu_bytes_of_features(features: Iterable[str]) -> int | None:
    """Return the GPU memory of a node with these features; the largest if several match."""
    sizes = [size for size in map(gpu_bytes, features) if size is not None]
    return max(sizes, default=None)


def _by_model(text: str) -> int | None:
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    # Spellings such as rtx_2080_ti, titan_rtx and gtx1080ti vary, so adjacent parts are joined.
    tries = [*words, *(a + b for a, b in itertools.pairwise(words))]
    tries += [re.sub(r"^(rtx|gtx|geforce|tesla|nvidia|amd|gpu)(?=[a-z]?\d)", "", w) for w in tries]
    sizes = [_KNOWN[word] for word in tries if word in _KNOWN]
    return max(sizes) * GIGABYTE if sizes else None
