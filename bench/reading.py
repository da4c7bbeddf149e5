"""Time the product's passes over files, in a separate process: ``python -m bench.reading``.

``plain FILE``; ``check INPUT CHILDREN``; ``plan INPUT OUTPUT SHARDS``; ``scan JOURNAL``;
``finalise INPUT OUTPUT``, after ``fill INPUT OUTPUT`` created journals for an existing plan.
Prints the seconds of the pass, without the interpreter's start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import scan_journal
from aiflux.core.runs.open import draft_run
from aiflux.core.runs.output import finalise
from aiflux.core.runs.plan import Plan, read_plan
from aiflux.engines.kinds import kind_named
from bench.workload import write_journal

_OPTIONS = RunOptions(engine_url="http://127.0.0.1:9")
_BLOCK = 1 << 20


def plain(path: str) -> None:
    """Read a file without processing it."""
    with open(path, "rb", buffering=0) as file:
        while file.read(_BLOCK):
            pass


def check(source: str, children: str) -> None:
    """Check an input in this process (0 children), or with children as the product does."""
    scan_input(Path(source), children=0 if children == "0" else None)


def plan(source: str, output: str, shards: str) -> None:
    """Check an input and plan a run of it."""
    draft_run(
        Path(source), Path(output), _OPTIONS, None, kind_named("external"), shards=int(shards)
    ).open()


def fill(source: str, output: str, size: str | None = None) -> None:
    """Write results for every shard of an existing plan, with answers of 1 KB or ``size`` bytes."""
    made, run = _there(output)
    bytes_each = None if size is None else int(size)
    for shard in made.shards:
        write_journal(run.journal(shard.index), Path(source), shard.start, shard.end, bytes_each)


def scan(journal: str) -> None:
    """Read a journal as a resuming worker does."""
    scan_journal(Path(journal))


def write(_: str, output: str) -> None:
    """Write the output."""
    finalise(*_there(output))


def _there(output: str) -> tuple[Plan, RunDirectory]:
    run = RunDirectory.of_output(Path(output))
    return read_plan(run), run


PASSES: dict[str, Callable[..., None]] = {
    "plain": plain,
    "check": check,
    "plan": plan,
    "fill": fill,
    "scan": scan,
    "finalise": write,
}


def main(action: str, *arguments: str) -> None:
    """Run one pass and print its seconds."""
    began = time.perf_counter()
    PASSES[action](*arguments)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
