"""Distribute work to child processes, for tests whose own process may have threads.

``summaries``: for each line ``PATH PART_BYTES`` of standard input, print the summaries computed by
one process and by several children. ``kill``, ``leave``, ``fail``: see the functions.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import scan_input
from aiflux.errors import InputError
from aiflux.util.parallel import share_out

_PARENT = os.getpid()


def summaries() -> None:
    """Print two summaries for each line of standard input."""
    for line in sys.stdin:
        part_bytes, path = line.rstrip("\n").split(" ", 1)
        both = [
            checked(Path(path), part_bytes=1 << 40, children=0),
            checked(Path(path), part_bytes=int(part_bytes), children=3),
        ]
        print(json.dumps(both), flush=True)


def checked(path: Path, **how: int) -> Any:
    """Return everything that an input check reports."""
    try:
        return asdict(scan_input(path, **how)) | {"path": ""}
    except InputError as error:
        return [error.message, error.remedy, error.problems]


def kill() -> None:
    """Distribute ten numbers; some children are killed during their work."""

    def work(number: int) -> tuple[int, bool]:
        here = os.getpid() == _PARENT
        if number in (0, 4, 9) and not here:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number, here

    print(json.dumps(list(share_out(work, range(10), 3))))


def leave() -> None:
    """Distribute long work, print the children's ids, and wait."""

    def work(number: int) -> int:
        print(os.getpid(), flush=True)
        time.sleep(60)
        return number

    with closing(share_out(work, range(3), 3)) as found:
        for _ in found:
            pass


def fail() -> None:
    """Distribute work that fails in the middle."""

    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    found = []
    try:
        with closing(share_out(work, range(100), 2)) as numbers:
            for number in numbers:
                found.append(number)
    except ValueError as error:
        print(json.dumps([found, str(error), children_left()]))


def children_left() -> bool:
    """Return whether this process has a child, alive or not reaped."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    {"summaries": summaries, "kill": kill, "leave": leave, "fail": fail}[sys.argv[1]]()
