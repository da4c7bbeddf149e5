"""Read the text of documents with pandoc: OpenDocument, PowerPoint, EPUB, HTML, RTF."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from shutil import which

from aiflux.converters.cells import BadRowError
from aiflux.errors import ConfigError
from aiflux.util.extras import need

FORMATS: Mapping[str, str] = {
    ".odt": "odt",
    ".pptx": "pptx",
    ".epub": "epub",
    ".rtf": "rtf",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}
"""pandoc's name of each format, by the suffix of a file."""
PACKED = ("odt", "pptx", "epub")
"""Formats that are ZIP files."""
_SECONDS = 300
_MEMORY = "1G"
# A file of a few kilobytes can decompress to gigabytes.
_MAX_UNPACKED = 256 << 20


def pandoc_text(content: bytes | Path, form: str) -> str:
    """Return the text of a document.

    pandoc runs in its sandbox, in which a document cannot refer to other files or addresses, and
    with limits of memory and time.

    Args:
        content: the document, UTF-8 if it is text; or the path of its file.

    Raises:
        BadRowError: it is damaged, or too large.
        ConfigError: pandoc is not installed, or too old for this format.
    """
    if isinstance(content, Path) and form in PACKED:
        _check_package(content)
    source = [os.path.abspath(content)] if isinstance(content, Path) else []
    command = [_program(), "+RTS", f"-M{_MEMORY}", "-RTS", "--sandbox", f"--from={form}"]
    try:
        done = subprocess.run(
            [*command, "--to=plain", "--wrap=none", "--quiet", *source],
            input=b"" if isinstance(content, Path) else content,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadRowError(f"pandoc needs more than {_SECONDS} seconds for it") from None
    except OSError as error:
        raise ConfigError(
            f"pandoc cannot be started: {error.strerror}", "install it again"
        ) from error
    if done.returncode:
        raise _failure(form, done.stderr.decode("utf-8", "replace"))
    return done.stdout.decode("utf-8", "replace")


def _failure(form: str, printed: str) -> Exception:
    words = " ".join(printed.split())
    if "Unknown input format" in printed or "--sandbox" in printed:
        return ConfigError(
            f"this version of pandoc cannot read {form}: {words[:200]}",
            "install a newer pandoc (3.9 reads all formats)",
        )
    return BadRowError(
        f"the document is damaged, or not {form} ({words[:200]}); open it and save it again"
    )


def _program() -> str:
    found = which("pandoc")
    if found is None:
        library = need("pypandoc", "pandoc", "reading ODT, PPTX, EPUB, RTF and HTML")
        found = str(library.get_pandoc_path())
    return found


def _check_package(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as package:
            refuse_bomb(package, "it")
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise BadRowError(f"the document is damaged ({error}); open it and save it again") from None


def refuse_bomb(package: zipfile.ZipFile, name: str) -> None:
    """Raise BadRowError for a package that decompresses to more than a document has."""
    size = sum(part.file_size for part in package.infolist())
    if size > _MAX_UNPACKED:
        raise BadRowError(f"{name} decompresses to {size >> 20} MiB, too much for a document")
