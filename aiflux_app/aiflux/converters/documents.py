"""The text of a file: plain text in any encoding, PDF and DOCX."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aiflux.converters.encoding import UnclearEncodingError, guess_encoding, marked_encoding
from aiflux.converters.writing import BadRowError
from aiflux.core.extras import need

# A DOCX of a few kilobytes can unpack to gigabytes, all of which would be held at once.
_MAX_UNPACKED = 256 << 20


class NoTextError(ValueError):
    """A file has no text that could be read; says why."""


def read_document(path: Path, encoding: str | None = None) -> str:
    """Return a file's text.

    Args:
        encoding: of plain text that is not UTF-8; guessed where it is not given.

    Raises:
        NoTextError: it is binary, holds no text, or may not be read.
        BadRowError: it is a broken or encrypted document.
        ConfigError: the library for its kind is not installed.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".pdf":
            text = _read_pdf(path)
        elif kind == ".docx":
            text = _read_docx(path)
        else:
            text = _decode(path.read_bytes(), encoding)
    except OSError as error:
        raise NoTextError(f"cannot be read: {error.strerror or error}") from None
    if not text.strip():
        note = " (scanned pages? OCR makes text of them)" if kind == ".pdf" else ""
        raise NoTextError(f"it holds no text{note}")
    return text


def _read_pdf(path: Path) -> str:
    library = need("pypdf", "documents", f"reading {path.name!r}")
    # Without a handler its warnings would come to stderr, where nothing tells which file they mean.
    logging.getLogger("pypdf").addHandler(logging.NullHandler())
    try:
        with open(path, "rb") as file:
            reader = library.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise BadRowError("the PDF is encrypted; save a copy without a password")
            return "\n\n".join(page.extract_text() for page in reader.pages)
    except (OSError, BadRowError):
        raise
    except Exception as error:  # noqa: BLE001 - pypdf meets damage with errors of many types
        raise BadRowError(
            f"the PDF is broken ({_words(error)}); open and save it anew in a PDF reader"
        ) from None


def _read_docx(path: Path) -> str:
    library = need("docx", "documents", f"reading {path.name!r}")
    try:
        with open(path, "rb") as file:
            _refuse_bomb(file)
            return "\n".join(_blocks(library.Document(file)))
    except (OSError, BadRowError):
        raise
    except Exception as error:  # noqa: BLE001 - zip, XML and python-docx each have their errors
        raise BadRowError(
            f"the DOCX is broken ({_words(error)}); open and save it anew in a word processor"
        ) from None


def _refuse_bomb(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as packed:
        size = sum(part.file_size for part in packed.infolist())
    if size > _MAX_UNPACKED:
        raise BadRowError(f"the DOCX unpacks to {size >> 20} MiB, more than a document has")
    file.seek(0)


def _blocks(document: Any) -> Iterator[str]:
    """Yield paragraphs and the rows of tables, in the order in which they stand.

    A cell that spans several columns is given once.
    """
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                cells = {id(cell._tc): cell.text for cell in row.cells}
                yield "\t".join(cells.values())
        else:
            yield block.text


def _decode(content: bytes, encoding: str | None) -> str:
    marked = marked_encoding(content)
    if marked is None and b"\0" in content:
        raise NoTextError("binary")
    try:
        text = content.decode(marked or "utf-8")
    except UnicodeDecodeError:
        if marked not in (None, "utf-8-sig"):
            raise BadRowError(f"it begins as {marked}, and is none") from None
        text = _decode_other(content, encoding)
    return text.replace("\r\n", "\n")


def _decode_other(content: bytes, encoding: str | None) -> str:
    try:
        return content.decode(encoding or guess_encoding(content))
    except UnclearEncodingError as error:
        raise BadRowError(f"not UTF-8, and {error}; say which with --encoding") from None
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise BadRowError(
            f"byte 0x{byte:02x} at offset {error.start} is neither UTF-8 nor {error.encoding}"
        ) from None


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 100 else text[:97] + "...") or type(error).__name__
