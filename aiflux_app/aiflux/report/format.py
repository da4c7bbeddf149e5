"""Figures, times and sentences in the notation of the report's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from aiflux.estimates.energy import kwh_text
from aiflux.util.text import counted, size_text
from aiflux.util.times import duration, utc_text

_LONGEST_ID = 120


def number(count: int) -> str:
    """Return a count with thousands separators."""
    return f"{count:,}"


def percent(part: int, whole: int) -> str:
    """Return a share in percent."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2g} %" if 0 < share < 1 else f"{share:.1f} %"


def rate(per_second: float) -> str:
    """Return a number per second."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def seconds_text(seconds: float) -> str:
    """Return the time of one request."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else duration(seconds)


def duration_text(seconds: float) -> str:
    """Return a duration as H:MM:SS, or in seconds if it is less than a minute."""
    return seconds_text(seconds) if 0 < seconds < 60 else duration(seconds)


def shortened(text: str) -> str:
    """Return a text, or its beginning and its length if it is long."""
    if len(text) <= _LONGEST_ID:
        return text
    return f"{text[:_LONGEST_ID]}... ({number(len(text))} characters)"


def moment_text(text: str | None) -> str:
    """Return a UTC time such as 2026-01-02 03:04:05 UTC; "" for None."""
    return "" if text is None else f"{text[:10]} {text[11:19]} UTC"


def moment_of(seconds: float) -> str:
    """Return a Unix time such as 2026-01-02 03:04:05, in UTC."""
    return utc_text(seconds)[:19].replace("T", " ")


def sentence(text: str) -> str:
    """Return words as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


def multiples(counts: Mapping[str, int]) -> str:
    """Return names with their counts, such as ``2 x NVIDIA H100``."""
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def setting_text(value: Any) -> str:
    """Return the value of a setting."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def pauses_text(pauses: Sequence[tuple[float, float]]) -> str:
    """Return a sentence about the times without results."""
    seconds = duration_text(sum(end - begin for begin, end in pauses))
    noun = "One pause" if len(pauses) == 1 else f"{len(pauses)} pauses"
    return f"{noun} without results ({seconds} in total) omitted."


UNITS: Mapping[str, Callable[[float], str]] = {
    "count": lambda count: f"{round(count):,}",
    "seconds": lambda seconds: duration(round(seconds)),
    "hours": lambda hours: f"{hours:.2f}",
    "kwh": kwh_text,
}
FILTERS: Mapping[str, Callable[..., str]] = {
    "counted": counted,
    "duration": duration_text,
    "file_name": lambda path: PurePath(path).name,
    "moment": moment_text,
    "multiples": multiples,
    "number": number,
    "pauses": pauses_text,
    "percent": percent,
    "sentence": sentence,
    "setting": setting_text,
    "shortened": shortened,
    "size": lambda size: size_text(float(size)),
}
