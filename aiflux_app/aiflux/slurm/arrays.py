"""Job arrays: shards as task numbers, within what a cluster allows, and back again.

Source of the forms: the man pages of sbatch (``--array``) and slurm.conf (``MaxArraySize``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aiflux.errors import ConfigError

_PART = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?\Z")


def array_ranges(tasks: Sequence[int]) -> str:
    """Return task numbers as ``--array`` takes them: ``3,7,9-12``."""
    ranges: list[list[int]] = []
    for task in sorted(set(tasks)):
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def split_arrays(shards: Sequence[int], max_array_size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Cut shards into as few arrays as the cluster needs.

    Args:
        max_array_size: one more than the highest task number that the cluster takes.

    Returns:
        for each array the shard of its task 0, and its task numbers: shard = first + task.

    Raises:
        ConfigError: the cluster takes no arrays at all.
    """
    if max_array_size < 1:
        raise ConfigError(
            "this cluster takes no job arrays (MaxArraySize is 0)", "leave --shards at 1"
        )
    arrays: list[tuple[int, list[int]]] = []
    for shard in sorted(set(shards)):
        if not arrays or shard - arrays[-1][0] >= max_array_size:
            arrays.append((shard, []))
        arrays[-1][1].append(shard - arrays[-1][0])
    return [(first, tuple(tasks)) for first, tasks in arrays]


def parse_ranges(text: str) -> Iterator[int]:
    """Yield the task numbers of what Slurm prints: ``4-9%2``, ``1,3``, ``0-8:2``.

    What Slurm has cut short (``1,3,...``) and what is no number is passed over.
    """
    for part in text.strip("[]").partition("%")[0].split(","):
        match = _PART.match(part)
        if match:
            start, end, step = (int(group or 0) for group in match.groups())
            yield from range(start, max(start, end) + 1, step or 1)
