"""The text of a file: plain text in any encoding, PDF and DOCX."""

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

# What pypdf makes of glyphs whose letters a font does not name.
_UNREADABLE = re.compile(
    r"[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f]|\(cid:\d+\)|/(?:[gGcCa]|cid|glyph|index)\d+"
)
_MAX_UNREADABLE = 0.2  # of a document's characters; with more of them, the text is useless


class NoTextError(ValueError):
    """A file has no text that could be read; says why."""


@dataclass(frozen=True)
class Document:
    """The text of a file, and the encoding of plain text."""

    text: str
    encoding: Encoding | None = None


def read_document(path: Path, encoding: str | None = None) -> Document:
    """Return a file's text.

    Args:
        encoding: of plain text that is not UTF-8; else what the text declares, or a guess.

    Raises:
        NoTextError: it is binary, holds no text, or may not be read.
        BadRowError: it is a broken or encrypted document.
        ConfigError: the library for its kind is not installed.
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
        note = " (scanned pages? OCR makes text of them)" if kind == ".pdf" else ""
        raise NoTextError(f"it holds no text{note}")
    return document


def _read_pdf(path: Path) -> str:
    library = need("pypdf", "documents", f"reading {path.name!r}")
    # Without a handler its warnings would come to stderr, where nothing tells which file they mean.
    logging.getLogger("pypdf").addHandler(logging.NullHandler())
    try:
        with open(path, "rb") as file:
            reader = library.PdfReader(file)
            # A PDF with only an owner's password opens with an empty one, as in every viewer.
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
    except Exception as error:  # noqa: BLE001 - pypdf meets damage with errors of many types
        raise BadRowError(
            f"the PDF is broken ({_words(error)}); open it in a PDF reader and save it again"
        ) from None
    readable.check()
    return text


@dataclass
class _Readable:
    """Counts the characters of a PDF, and those whose fonts do not say which letters they show."""

    signs: int = 0
    unreadable: int = 0

    def note(self, text: str, _current: Any, _matrix: Any, font: Any, _size: Any) -> None:
        """Count a piece of text; pypdf calls this for each."""
        size = len("".join(text.split()))
        self.signs += size
        if _without_letters(font):
            self.unreadable += size
        else:
            self.unreadable += sum(len(found) for found in _UNREADABLE.findall(text))

    def check(self) -> None:
        """Raise NoTextError where too much cannot be read."""
        if self.unreadable > _MAX_UNREADABLE * self.signs:
            raise NoTextError(
                f"{self.unreadable} of its {self.signs} characters cannot be read: the PDF's fonts "
                "do not say which letters they show (OCR makes text of it)"
            )


def _without_letters(font: Any) -> bool:
    """Return whether a font shows glyphs by their numbers, without a map to letters."""
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
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and expat each have their errors
        raise BadRowError(
            f"the DOCX is broken ({_words(error)}); open it in a word processor and save it again"
        ) from None


def _decode(content: bytes, named: str | None) -> Document:
    try:
        text, encoding = decoded(content, named)
    except UnclearEncodingError as error:
        if b"\0" in content:
            raise NoTextError("binary") from None
        raise BadRowError(f"not UTF-8, and {error}; name its encoding with --encoding") from None
    except UnicodeDecodeError as error:
        marked = marked_encoding(content)
        if marked not in (None, "utf-8-sig"):
            raise BadRowError(f"it begins as {marked}, and is none") from None
        if marked is None and b"\0" in content:
            raise NoTextError("binary") from None
        byte = content[error.start]
        raise BadRowError(
            f"byte 0x{byte:02x} at offset {error.start} is neither UTF-8 nor {error.encoding}"
        ) from None
    if "\0" in text:
        raise NoTextError("binary")
    return Document(text.replace("\r\n", "\n"), encoding)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 100 else text[:97] + "...") or type(error).__name__
