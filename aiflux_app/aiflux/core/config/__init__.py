"""The settings: one table of them, the layers that set them, and `Config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiflux.core.config.config import Config

__all__ = ["Config"]


def __getattr__(name: str) -> Any:
    """Import `Config` when it is used: the table of settings is needed without it, for --help."""
    if name != "Config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from aiflux.core.config.config import Config  # noqa: PLC0415 - see above

    return Config
