"""Whether this process is sealed: what it was told, held to the routes that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

ROUTES = (Path("/proc/net/route"), Path("/proc/net/ipv6_route"))
"""IPv4's table has the interface first and a heading, IPv6's has it last (Linux, proc(5))."""


def unsealed_reason(
    environ: Mapping[str, str], *, engine_here: bool, tables: tuple[Path, Path] = ROUTES
) -> str:
    """Return why this process has a network; "" where it has loopback only.

    Args:
        engine_here: whether the engine runs beside this process.
        tables: of the kernel's routes, IPv4's and IPv6's.
    """
    if environ.get("AIFLUX_SEALED") == "1":
        out = sorted({*_interfaces(tables)} - {"lo"})
        if not out:
            return ""
        return f"the container has a network all the same ({', '.join(out)})"
    unknown = "started by hand" if engine_here else "the engine is elsewhere"
    why = environ.get("AIFLUX_UNSEALED") or unknown
    return why.encode(errors="replace").decode()


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
