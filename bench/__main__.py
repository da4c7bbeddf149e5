"""``python -m bench [NAME...] [--quick]``: run measurements and print a table."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.cases import CASES, Bench
from bench.row import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements; exit 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="shorter and less precise")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; use {', '.join(CASES)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))  # also ends the engines
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="aiflux-bench-") as folder:
            bench = Bench(arguments.quick, Path(folder))
            for name in arguments.names or CASES:
                rows += _measure(name, bench)
    finally:
        show(rows)  # also what was measured before Ctrl-C
    return int(any(row.good is False for row in rows))


def _measure(name: str, bench: Bench) -> list[Row]:
    try:
        return CASES[name](bench)
    except (RuntimeError, OSError) as error:
        return [Row(name, f"failed: {error}", good=False)]


def show(rows: Sequence[Row]) -> None:
    """Print the table and the machine it was measured on."""
    # Imported here to keep the measuring process small: a child's peak memory counts from the fork.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("case", "figure", "target", "", "plain loop", "llmflux 2.0.0"):
        table.add_column(title)
    marks = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}
    for row in rows:
        table.add_row(row.case, row.figure, row.wanted, marks[row.good], row.plain, row.peer)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    console.print(f"{len(os.sched_getaffinity(0))} cores, {_cpu()}, Python {_python()}")


def _python() -> str:
    return f"{platform.python_version()} ({platform.system()} {platform.release()})"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
