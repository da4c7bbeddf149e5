"""Whether this process is sealed: what it was told, held to the routes that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROUTES = (Path("/proc/net/route"), Path("/proc/net/ipv6_route"))
"""IPv4's table has the interface first and a heading, IPv6's has it last (Linux, proc(5))."""


def seal_facts(
    environ: Mapping[str, str], *, engine_here: bool, tables: tuple[Path, Path] = ROUTES
) -> dict[str, Any]:
    """Return whether this process has loopback only, and else why not.

    Args:
        engine_here: whether the engine runs beside this process.
        tables: of the kernel's routes, IPv4's and IPv6's.
    """
    if environ.get("AIFLUX_SEALED") == "1":
        out = sorted({*_interfaces(tables)} - {"lo"})
        if not out:
            return {"sealed": True}
        return _unsealed(f"the container has a network all the same ({', '.join(out)})")
    untold = "started by hand" if engine_here else "the engine is elsewhere"
    return _unsealed(environ.get("AIFLUX_UNSEALED") or untold)


def _unsealed(why: str) -> dict[str, Any]:
    return {"sealed": False, "unsealed": why.encode(errors="replace").decode()}


def _interfaces(tables: tuple[Path, Path]) -> Iterator[str]:
    """Yield the interfaces that packets may leave by."""
    fourth, sixth = (_rows(table) for table in tables)
    yield from (row[0] for row in fourth[1:])
    yield from (row[-1] for row in sixth)


def _rows(table: Path) -> list[list[str]]:
    try:
        lines = table.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []  # a kernel without that protocol has no table of it
    return [line.split() for line in lines if line.strip()]
