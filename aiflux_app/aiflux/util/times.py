"""Points in time and durations as text, in UTC and in Slurm's format."""

from __future__ import annotations

import math
from datetime import datetime, timezone

_DAY = 86400
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0


def walltime_seconds(text: str | None) -> float:
    """Convert a ``--time`` to seconds; infinity for None, UNLIMITED and 0.

    Slurm takes a time of zero as no limit. The forms are minutes, minutes:seconds,
    hours:minutes:seconds, days-hours, days-hours:minutes and days-hours:minutes:seconds (source:
    man sbatch, ``--time``).
    """
    if text is None or text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], (*parts, 0)[1]
    return int(days or 0) * _DAY + hours * 3600 + minutes * 60 + seconds or math.inf


def walltime_given(text: str) -> str:
    """Return a ``--time`` for a message; a number that is no limit shows that."""
    unlimited = math.isinf(walltime_seconds(text)) and text[0].isdigit()
    return f"{text} (no limit)" if unlimited else text


def walltime_text(seconds: float) -> str:
    """Return seconds as ``[D-]HH:MM:SS``, rounded up to a whole minute."""
    minutes = math.ceil(seconds / 60)
    days, minutes = divmod(minutes, _DAY // 60)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}:00"
    return f"{days}-{clock}" if days else clock


def duration(seconds: float) -> str:
    """Return a duration as H:MM:SS, with days in front if needed."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hours}:{minutes:02d}:{rest:02d}"


def utc_text(seconds: float) -> str:
    """Return Unix time as UTC ISO-8601 with milliseconds and ``Z``."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_now() -> str:
    """Return the current time as UTC ISO-8601 with ``Z``."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def unix_seconds(text: str) -> float:
    """Convert the output of ``utc_text`` to Unix time; 0 if it is invalid."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def pause_after(waited: float) -> float:
    """Return the seconds until the next look at a job that was waited for: a tenth, 0.5 to 5."""
    return min(max(_SHORTEST_PAUSE, waited / 10), _LONGEST_PAUSE)
