"""The one form in which times are written."""

from __future__ import annotations

from datetime import datetime, timezone


def utc_text(seconds: float) -> str:
    """Return Unix time as UTC ISO-8601 with milliseconds and ``Z``."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_now() -> str:
    """Return the present time as UTC ISO-8601 with ``Z``."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def unix_seconds(text: str) -> float:
    """Return Unix time of what ``utc_text`` wrote; 0 where the text is none."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0
