"""Libraries that only some uses need: imported then, or an error that says how to get them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from aiflux.errors import ConfigError
from aiflux.util.process_limits import exhausted

EXTRAS: Mapping[str, str] = {
    "documents": "PDF and DOCX in aiflux convert dir",
    "images": "aiflux convert images",
    "parquet": "Parquet tables, read and written",
    "report": "the plots of a report",
    "schema": "--validate",
}
"""The package's extras that users choose from, and what each is for."""

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "documents": ("pypdf>=5.0", "cryptography>=41"),
    "images": ("Pillow>=10.0",),
    "parquet": ("pyarrow>=14.0",),
    "report": ("matplotlib>=3.8",),
    "schema": ("jsonschema>=4.17",),
}
"""What each extra brings, as in ``pyproject.toml``."""


def need(module: str, extra: str, purpose: str) -> Any:
    """Return a module that one of the package's extras brings.

    Args:
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        ConfigError: it is not installed; the remedy is what installs it.
        StoppedError: it could not be loaded for lack of memory or files.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise exhausted(error) or ConfigError(
            f"{purpose} needs the Python package {module.partition('.')[0]}, which cannot be "
            f"imported: {error}",
            remedy(extra, has_pip=find_spec("pip") is not None),
        ) from error


def remedy(extra: str, *, has_pip: bool) -> str:
    """Return what brings an extra; an installation from a bundle has no pip.

    The libraries are named themselves: that is right wherever AI-Flux came from.
    """
    if has_pip:
        command = [sys.executable, "-m", "pip", "install", *LIBRARIES[extra]]
        return " ".join(map(shlex.quote, command))
    return f"install a bundle that was made with it: aiflux bundle create --extra {extra}"
