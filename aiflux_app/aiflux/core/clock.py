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
