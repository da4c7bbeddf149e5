"""Figures, times and sentences as the report's page writes them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiflux.cli.markup import Markup, element
from aiflux.cli.views import duration
from aiflux.core.clock import utc_text


def number(count: int) -> str:
    """Return a count with its thousands set apart."""
    return f"{count:,}"


def percent(part: int, whole: int) -> str:
    """Return a share in percent."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.1f} %"


def rate(per_second: float) -> str:
    """Return so many a second."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def seconds_text(seconds: float) -> str:
    """Return a time that one request takes."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else duration(seconds)


def moment_text(text: str | None) -> str:
    """Return a UTC time as people write it."""
    return "" if text is None else f"{text[:10]} {text[11:19]} UTC"


def moment_of(seconds: float) -> str:
    """Return a Unix time as people write it, in UTC."""
    return utc_text(seconds)[:19].replace("T", " ")


def sentence(text: str) -> str:
    """Return words as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


def share_bar(share: float, kind: str = "bar") -> Markup:
    """Return a bar as long as a share (0 to 1) of the longest."""
    return element("span", class_=kind, style=f"--share: {share:.4f}")


UNITS: Mapping[str, Callable[[float], str]] = {
    "count": lambda count: f"{round(count):,}",
    "seconds": lambda seconds: duration(round(seconds)),
    "hours": lambda hours: f"{hours:.2f}",
}
