"""Check whether this process is sealed, by its environment and the actual network routes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

ROUTES = (Path("/proc/net/route"), Path("/proc/net/ipv6_route"))
"""IPv4's table has a heading and the interface first, IPv6's has it last (Linux, proc(5))."""


def unsealed_reason(
    environ: Mapping[str, str], *, engine_here: bool, tables: tuple[Path, Path] = ROUTES
) -> str:
    """Return why this process has a network; "" if it only has loopback.

    Args:
        engine_here: whether the engine runs next to this process.
        tables: the kernel's routes for IPv4 and IPv6.
    """
    if environ.get("AIFLUX_SEALED") == "1":
        out = sorted({*_interfaces(tables)} - {"lo"})
        if not out:
            return ""
        return f"the container still has a network ({', '.join(out)})"
    unknown = "started directly" if engine_here else "the engine is elsewhere"
    why = environ.get("AIFLUX_UNSEALED") or unknown
    return why.encode(errors="replace").decode()


def _interfaces(tables: tuple[Path, Path]) -> Iterator[str]:
    """Yield the interfaces with outgoing routes."""
    fourth, sixth = (_rows(table) for table in tables)
    yield from (row[0] for row in fourth[1:])
    yield from (row[-1] for row in sixth)


def _rows(table: Path) -> list[list[str]]:
    try:
        lines = table.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []  # a kernel without this protocol has no table
    return [line.split() for line in lines if line.strip()]
