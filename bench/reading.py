"""Times the product's passes over files, in a process of its own: ``python -m bench.reading``.

``check INPUT``; ``scan JOURNAL``; ``finalise INPUT OUTPUT``, which has its journal already. Prints
the seconds that the pass took, without the interpreter's start.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from aiflux.core.input import scan_input
from aiflux.core.journal import scan_journal
from aiflux.core.opening import open_run
from aiflux.core.options import RunOptions
from aiflux.core.results import finalise
from aiflux.core.rundir import RunDirectory
from bench.workload import write_journal

_OPTIONS = RunOptions(engine_url="http://127.0.0.1:9")


def prepare(source: Path, output: Path) -> Path:
    """Open a run and fill its journal; return the journal's path."""
    plan = open_run(source, output, _OPTIONS, None).plan
    path = RunDirectory.of_output(plan.output).journal(0)
    write_journal(path, source)
    return path


def main(action: str, *paths: str) -> None:
    """Do one pass and print its seconds."""
    source = Path(paths[0])
    if action == "prepare":
        prepare(source, Path(paths[1]))
        return
    run = None
    if action == "finalise":
        opened = open_run(source, Path(paths[1]), _OPTIONS, None, force=True)
        run = (opened.plan, opened.run)
    began = time.perf_counter()
    if action == "check":
        scan_input(source)
    elif action == "scan":
        scan_journal(source)
    elif run is not None:
        finalise(*run)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
