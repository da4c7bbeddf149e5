"""Import optional libraries on use; if one is missing, raise an error with the remedy."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from aiflux.errors import ConfigError
from aiflux.util.process_limits import exhausted, require_memory

EXTRAS: Mapping[str, str] = {
    "documents": "PDF in aiflux convert dir",
    "duckdb": "DuckDB databases, read and written",
    "gateway": "aiflux gateway",
    "hub": "pulling models of Hugging Face, for the engine vllm",
    "images": "aiflux convert images",
    "pandoc": "ODT, PPTX, EPUB, RTF and HTML in aiflux convert dir",
    "parquet": "Parquet tables, read and written",
    "report": "the plots of a report",
    "spreadsheets": "Excel and OpenDocument workbooks, read and written (.xlsx)",
    "schema": "--validate",
    "tokens": "the lengths of prompts, by the model's own tokenizer",
    "zstd": "input compressed with Zstandard (.zst)",
}
"""The package's extras and their purpose."""

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "documents": ("pypdf>=5.0", "cryptography>=41", "pypdfium2>=5.0", "Pillow>=10.0"),
    "duckdb": ("duckdb>=1.0",),
    "gateway": ("starlette>=0.45", "uvicorn>=0.30", "python-multipart>=0.0.20"),
    "hub": ("huggingface_hub>=2.0",),
    "images": ("Pillow>=10.0",),
    "pandoc": ("pypandoc_binary>=1.17",),
    "parquet": ("pyarrow>=14.0",),
    "report": ("matplotlib>=3.8",),
    "schema": ("jsonschema>=4.17",),
    "tokens": ("tokenizers>=0.21",),
    "spreadsheets": ("python-calamine>=0.5", "XlsxWriter>=3.1"),
    "zstd": ("backports.zstd>=1.0; python_version < '3.14'",),
}
"""Requirements of each extra, as in ``pyproject.toml``."""

# Address space of libraries that load numpy. With less, its OpenBLAS ends the process or hangs.
_LOADED_BYTES = {"matplotlib": 192 << 20, "pyarrow": 384 << 20}
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def need(module: str, extra: str, purpose: str) -> Any:
    """Return a module from one of the package's extras.

    Args:
        purpose: what needs the module, as the subject of a sentence.

    Raises:
        ConfigError: the module is not installed; the remedy installs it.
        StoppedError: the module cannot be loaded for lack of memory or files.
    """
    package = module.partition(".")[0]
    if package in _LOADED_BYTES and package not in sys.modules:
        require_memory(_LOADED_BYTES[package])
    try:
        # numpy without threads for linear algebra, which nothing here uses
        with variable_set(_BLAS_THREADS, "1"):
            return import_module(module)
    except ImportError as error:
        raise exhausted(error) or ConfigError(
            f"{purpose} needs the Python package {package}, which cannot be imported: {error}",
            remedy(extra, has_pip=find_spec("pip") is not None),
        ) from error


@contextmanager
def variable_set(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process, which libraries read, and restore it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def remedy(extra: str, *, has_pip: bool) -> str:
    """Return the remedy that installs an extra; an installation from a bundle has no pip.

    Libraries are named directly, which works wherever AI-Flux came from.
    """
    if has_pip:
        command = [sys.executable, "-m", "pip", "install", *LIBRARIES[extra]]
        return " ".join(map(shlex.quote, command))
    return f"install a bundle that includes it: aiflux bundle create --extra {extra}"
