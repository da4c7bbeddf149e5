"""Figures, times and sentences as the report's page writes them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiflux.report.html.markup import Markup, element
from aiflux.util.times import duration, utc_text


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


def duration_text(seconds: float) -> str:
    """Return how long something took: H:MM:SS, less than a minute in seconds."""
    return seconds_text(seconds) if 0 < seconds < 60 else duration(seconds)


def cut_text(text: str, most: int) -> str:
    """Return a text that is not longer than ``most``, or its beginning and how much follows."""
    return text if len(text) <= most else f"{text[:most]}... ({number(len(text))} characters)"


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
    """Return a bar as long as a share (0 to 1) of the longest; a figure stands beside it."""
    return element("span", class_=kind, style=f"--share: {share:.4f}", aria_hidden="true")


UNITS: Mapping[str, Callable[[float], str]] = {
    "count": lambda count: f"{round(count):,}",
    "seconds": lambda seconds: duration(round(seconds)),
    "hours": lambda hours: f"{hours:.2f}",
}
