"""Moving results to other journals, where a run is cut anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from aiflux.core.batch.request import request_key
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import ResultIndex, journal_lines
from aiflux.core.runs.plan import Plan
from aiflux.util.files import fsync_directory, storage_error
from aiflux.util.lines import read_lines

# File descriptors are few on login nodes (1024): journals are written in groups.
_OPEN_AT_ONCE = 256


def recut_journals(plan: Plan, run: RunDirectory) -> None:
    """Bring every result into the journal of the shard that holds its request now.

    Results of lines that the input no longer holds go to the first shard: should the line come
    back, they count again. A crash at any moment leaves the old journals or the new ones, whole.

    Raises:
        StorageError: the disk refused; the old journals are as they were.
    """
    journals = run.path / "journal"
    fresh, old = run.path / "journal.new", run.path / "journal.old"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        places = _places(plan)
        for start in range(0, len(plan.shards), _OPEN_AT_ONCE):
            _write_group(journals, fresh, places, range(start, start + _OPEN_AT_ONCE))
        fsync_directory(fresh)
        shutil.rmtree(run.path / "status", ignore_errors=True)
        (run.path / "status").mkdir(mode=0o700)
        journals.rename(old)
        fresh.rename(journals)
        fsync_directory(run.path)
        shutil.rmtree(old)
    except OSError as error:
        raise storage_error(error, run.path) from error


def mend_journals(run: RunDirectory) -> None:
    """Finish or undo what a crash in ``recut_journals`` left."""
    journals = run.path / "journal"
    fresh, old = run.path / "journal.new", run.path / "journal.old"
    try:
        if old.exists() and not journals.exists():
            fresh.rename(journals)
        for path in (fresh, old):
            if path.exists():
                shutil.rmtree(path)
    except OSError as error:
        raise storage_error(error, run.path) from error


def _places(plan: Plan) -> ResultIndex:
    """Return an index that finds a request's shard in the place of an offset."""
    places = ResultIndex()
    for shard in plan.shards:
        for _, _, raw in read_lines(plan.input_path, shard.start, shard.end):
            places.add(request_key(raw), shard.index, 0, False)
    places.seal()
    return places


def _write_group(source: Path, target: Path, places: ResultIndex, shards: range) -> None:
    with ExitStack() as stack:
        files: dict[int, IO[bytes]] = {}
        for key, line in _all_lines(source):
            found = places.find(key)
            shard = 0 if found is None else found[0]
            if shard not in shards:
                continue
            if shard not in files:
                path = target / f"shard-{shard:04d}.jsonl"
                files[shard] = stack.enter_context(open(path, "ab"))
            files[shard].write(line)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _all_lines(source: Path) -> Iterator[tuple[bytes, bytes]]:
    for path in sorted(source.glob("shard-*.jsonl")):
        yield from journal_lines(path)
