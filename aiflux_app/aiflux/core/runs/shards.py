"""Cutting an input into shards. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from aiflux.core.batch.input_file import InputSummary

# What one modern GPU does with a model of a few billion parameters and 16 slots; a pilot
# (`aiflux estimate`) knows better.
TOKENS_PER_SECOND = 1000
_SHARE_OF_WALLTIME = 0.5


@dataclass(frozen=True)
class Shard:
    """A contiguous part of the input.

    Attributes:
        start, end: byte offsets in the input, end excluded.
        first: index of its first request.
        requests: number of requests.
    """

    index: int
    start: int
    end: int
    first: int
    requests: int


def cut(summary: InputSummary, shards: int) -> tuple[Shard, ...]:
    """Cut the input into at most ``shards`` contiguous shards of about equal request counts."""
    marks = summary.marks
    wanted = max(1, min(shards, len(marks)))
    targets = [summary.requests * number // wanted for number in range(wanted)]
    starts = []
    position = 0
    for target in targets:
        while position + 1 < len(marks) and marks[position + 1].index <= target:
            position += 1
        starts.append(marks[position])
    starts = [mark for i, mark in enumerate(starts) if i == 0 or mark.index > starts[i - 1].index]
    ends = [*((mark.offset, mark.index) for mark in starts[1:]), (summary.size, summary.requests)]
    return tuple(
        Shard(index, mark.offset, end, mark.index, last - mark.index)
        for index, (mark, (end, last)) in enumerate(zip(starts, ends, strict=True))
    )


def auto_shards(summary: InputSummary, walltime: float) -> int:
    """Return a number of shards that each fit half of a job's time.

    Args:
        walltime: seconds that one job may take.
    """
    tokens = summary.requests * summary.mean_tokens
    seconds = tokens / TOKENS_PER_SECOND
    wanted = -(-seconds // (walltime * _SHARE_OF_WALLTIME))
    return max(1, min(int(wanted), summary.requests))
