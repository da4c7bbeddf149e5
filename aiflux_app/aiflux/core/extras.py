"""Libraries that only some uses need: imported then, or an error that says how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from aiflux.errors import ConfigError


def need(module: str, extra: str, purpose: str) -> Any:
    """Return a module that one of the package's extras brings.

    Args:
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        ConfigError: it is not installed; the remedy is the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the Python package {module.partition('.')[0]}, which cannot be "
            f"imported: {error}",
            f"python -m pip install 'aiflux[{extra}]'",
        ) from error
