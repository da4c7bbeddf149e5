"""Import optional libraries on use; if one is missing, raise an error with the remedy."""

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
    "hub": "pulling models of Hugging Face, for the engine vllm",
    "images": "aiflux convert images",
    "parquet": "Parquet tables, read and written",
    "report": "the plots of a report",
    "schema": "--validate",
}
"""The package's extras and their purpose."""

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "documents": ("pypdf>=5.0", "cryptography>=41"),
    "hub": ("huggingface_hub>=2.0",),
    "images": ("Pillow>=10.0",),
    "parquet": ("pyarrow>=14.0",),
    "report": ("matplotlib>=3.8",),
    "schema": ("jsonschema>=4.17",),
}
"""Requirements of each extra, as in ``pyproject.toml``."""


def need(module: str, extra: str, purpose: str) -> Any:
    """Return a module from one of the package's extras.

    Args:
        purpose: what needs the module, as the subject of a sentence.

    Raises:
        ConfigError: the module is not installed; the remedy installs it.
        StoppedError: the module cannot be loaded for lack of memory or files.
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
    """Return the remedy that installs an extra; an installation from a bundle has no pip.

    Libraries are named directly, which works wherever AI-Flux came from.
    """
    if has_pip:
        command = [sys.executable, "-m", "pip", "install", *LIBRARIES[extra]]
        return " ".join(map(shlex.quote, command))
    return f"install a bundle that includes it: aiflux bundle create --extra {extra}"
