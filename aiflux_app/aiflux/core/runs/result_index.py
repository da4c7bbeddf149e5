"""Locate the results of an input's requests, ahead of reading them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiflux.core.batch.request import request_key
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import PART_BYTES, ResultIndex, scan_journal
from aiflux.core.runs.plan import Plan, Shard
from aiflux.util.files import is_there, refuse_irregular
from aiflux.util.lines import cut_at_lines, read_lines, unreadable
from aiflux.util.parallel import helpers, share_out

# Instead of an offset: the request has no result.
MISSING = -1


@dataclass(frozen=True)
class ResultOffsets:
    """The locations of the results of some lines.

    Attributes:
        journal: the file that contains them.
        start, end: of the lines, in the input.
        offsets, sizes: of each request's result in the journal, in the order of the input.
    """

    journal: Path
    start: int
    end: int
    offsets: array[int]
    sizes: array[int]


def find_places(
    plan: Plan, run: RunDirectory, *, part_bytes: int = PART_BYTES, children: int | None = None
) -> Generator[ResultOffsets, None, None]:
    """Yield the locations of the results, one part of the input after the other.

    Args:
        part_bytes: size of a part: several shards, or a part of one.
        children: processes that share the work; None for as many as is safe.

    Raises:
        InputError: the input cannot be read.
        StorageError: a journal cannot be read.
    """
    children = helpers() if children is None else children
    groups = _groups(plan, run, part_bytes)
    if len(groups) < len(plan.shards):
        work = partial(_of_shards, plan, run)
        with closing(share_out(work, groups, children)) as found:
            for places in found:
                yield from places
    else:
        for shard in plan.shards:
            yield from _of_large(plan, run, shard, part_bytes, children)


def missing_results(plan: Plan, run: RunDirectory) -> dict[int, int]:
    """Return the number of requests without a result, for each shard that has any.

    Raises:
        InputError: the input cannot be read.
        StorageError: a journal cannot be read.
    """
    shards = {run.journal(shard.index): shard.index for shard in plan.shards}
    missing: Counter[int] = Counter()
    with closing(find_places(plan, run)) as found:
        for places in found:
            missing[shards[places.journal]] += places.offsets.count(MISSING)
    return {shard: count for shard, count in sorted(missing.items()) if count}


def _groups(plan: Plan, run: RunDirectory, part_bytes: int) -> list[list[Shard]]:
    """Return groups of neighbouring shards of at most ``part_bytes``, or single shards."""
    groups: list[list[Shard]] = []
    room = 0
    for shard in plan.shards:
        journal = run.journal(shard.index)
        refuse_irregular(journal)
        written = journal.stat().st_size if is_there(journal) else 0
        size = max(written, shard.end - shard.start)
        if size > room:
            groups.append([])
            room = part_bytes
        groups[-1].append(shard)
        room -= size
    return groups


def _of_shards(plan: Plan, run: RunDirectory, shards: Sequence[Shard]) -> list[ResultOffsets]:
    found = []
    for shard in shards:
        journal = run.journal(shard.index)
        index = scan_journal(journal, children=0)
        found.append(_of_lines(plan.input_path, journal, index, (shard.start, shard.end)))
    return found


def _of_large(
    plan: Plan, run: RunDirectory, shard: Shard, part_bytes: int, children: int
) -> Iterator[ResultOffsets]:
    journal = run.journal(shard.index)
    index = scan_journal(journal, part_bytes=part_bytes, children=children)
    work = partial(_of_lines, plan.input_path, journal, index)
    try:
        parts = cut_at_lines(plan.input_path, part_bytes, shard.start, shard.end)
    except OSError as error:
        raise unreadable(plan.input_path, error) from error
    with closing(share_out(work, parts, children)) as found:
        yield from found


def _of_lines(
    path: Path, journal: Path, index: ResultIndex, part: tuple[int, int]
) -> ResultOffsets:
    places = ResultOffsets(journal, *part, array("q"), array("q"))
    for _, _, raw in read_lines(path, *part):
        found = index.find(request_key(raw))
        places.offsets.append(MISSING if found is None else found[0])
        places.sizes.append(0 if found is None else found[1])
    return places
