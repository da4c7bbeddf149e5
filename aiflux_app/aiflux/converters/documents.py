"""Read the text of a file: plain text in any encoding, PDF or DOCX."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.converters.docx import DocxError, docx_text
from aiflux.converters.encoding import Encoding, decoded, marked_encoding
from aiflux.converters.encoding_guess import UnclearEncodingError
from aiflux.converters.writer import BadRowError
from aiflux.util.extras import need

# pypdf's output for glyphs that the font does not map to letters.
_UNREADABLE = re.compile(
    r"[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f]|\(cid:\d+\)|/(?:[gGcCa]|cid|glyph|index)\d+"
)
_MAX_UNREADABLE = 0.2  # share of unreadable characters above which the text is useless


class NoTextError(ValueError):
    """A file has no readable text; the message says why."""


@dataclass(frozen=True)
class Document:
    """The text of a file, with its encoding if it is plain text."""

    text: str
    encoding: Encoding | None = None


def read_document(path: Path, encoding: str | None = None) -> Document:
    """Return a file's text.

    Args:
        encoding: encoding of plain text that is not UTF-8; by default declared or guessed.

    Raises:
        NoTextError: the file is binary, contains no text, or cannot be read.
        BadRowError: the document is damaged or encrypted.
        ConfigError: the library for this file type is not installed.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".pdf":
            document = Document(_read_pdf(path))
        elif kind == ".docx":
            document = Document(_read_docx(path))
        else:
            document = _decode(path.read_bytes(), encoding)
    except OSError as error:
        raise NoTextError(f"cannot be read: {error.strerror or error}") from None
    if not document.text.strip():
        note = " (scanned pages need OCR)" if kind == ".pdf" else ""
        raise NoTextError(f"contains no text{note}")
    return document


def _read_pdf(path: Path) -> str:
    library = need("pypdf", "documents", f"reading {path.name!r}")
    # Without a handler, pypdf's warnings go to stderr without the file's name.
    logging.getLogger("pypdf").addHandler(logging.NullHandler())
    try:
        with open(path, "rb") as file:
            reader = library.PdfReader(file)
            # A PDF with only an owner password opens with an empty user password, as in viewers.
            if reader.is_encrypted and not reader.decrypt(""):
                raise BadRowError("the PDF is encrypted; save a copy without a password")
            readable = _Readable()
            text = "\n\n".join(
                page.extract_text(visitor_text=readable.note) for page in reader.pages
            )
    except (OSError, BadRowError):
        raise
    except library.errors.DependencyError:
        need("cryptography", "documents", f"reading {path.name!r}, which is encrypted,")
        raise
    except Exception as error:  # noqa: BLE001 - pypdf raises many types for damaged files
        raise BadRowError(
            f"the PDF is damaged ({_words(error)}); open it in a PDF reader and save it again"
        ) from None
    readable.check()
    return text


@dataclass
class _Readable:
    """Counts a PDF's characters, and those that the fonts do not map to letters."""

    signs: int = 0
    unreadable: int = 0

    def note(self, text: str, _current: Any, _matrix: Any, font: Any, _size: Any) -> None:
        """Count a piece of text; called by pypdf."""
        size = len("".join(text.split()))
        self.signs += size
        if _without_letters(font):
            self.unreadable += size
        else:
            self.unreadable += sum(len(found) for found in _UNREADABLE.findall(text))

    def check(self) -> None:
        """Raise NoTextError if too many characters are unreadable."""
        if self.unreadable > _MAX_UNREADABLE * self.signs:
            raise NoTextError(
                f"{self.unreadable} of {self.signs} characters are unreadable: the PDF's fonts do "
                "not map glyphs to letters (use OCR)"
            )


def _without_letters(font: Any) -> bool:
    """Return whether a font shows glyphs by number, without a map to letters."""
    if not font or "/ToUnicode" in font or font.get("/Subtype") != "/Type0":
        return False
    return str(font.get("/Encoding", "")).startswith("/Identity") and any(
        (below.get_object().get("/CIDSystemInfo") or {}).get("/Ordering") == "Identity"
        for below in font.get("/DescendantFonts", ())
    )


def _read_docx(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return docx_text(file)
    except DocxError as error:
        raise BadRowError(str(error)) from None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and expat raise their own errors
        raise BadRowError(
            f"the DOCX is damaged ({_words(error)}); open and save it in a word processor"
        ) from None


def _decode(content: bytes, named: str | None) -> Document:
    try:
        text, encoding = decoded(content, named)
    except UnclearEncodingError as error:
        if b"\0" in content:
            raise NoTextError("binary") from None
        raise BadRowError(f"not UTF-8, and {error}; set --encoding") from None
    except UnicodeDecodeError as error:
        marked = marked_encoding(content)
        if marked not in (None, "utf-8-sig"):
            raise BadRowError(
                f"starts with a {marked} byte order mark, but is not valid {marked}"
            ) from None
        if marked is None and b"\0" in content:
            raise NoTextError("binary") from None
        byte = content[error.start]
        raise BadRowError(
            f"byte 0x{byte:02x} at offset {error.start} is invalid in UTF-8 and {error.encoding}"
        ) from None
    if "\0" in text:
        raise NoTextError("binary")
    return Document(text.replace("\r\n", "\n"), encoding)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 100 else text[:97] + "...") or type(error).__name__
