"""Read the text of a file: plain text in any encoding, PDF, DOCX, and what pandoc reads.

A DOCX file is read as Word shows it with all tracked changes accepted. Its XML is parsed element by
element. Whatever wraps a paragraph or a run (content controls, insertions, smart tags, links) is
passed through, so that no wrapper hides its text.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from xml.parsers import expat

from aiflux.converters.cells import BadRowError
from aiflux.converters.docx_numbering import Numbering, is_on, symbol, whole
from aiflux.converters.email_text import email_text
from aiflux.converters.encoding import Encoding, UnclearEncodingError, decoded, marked_encoding
from aiflux.converters.pandoc import FORMATS, PACKED, pandoc_text, refuse_bomb
from aiflux.errors import InputError
from aiflux.util.compression import PlainFile, plain_name
from aiflux.util.extras import need
from aiflux.util.text import size_text

_OLE = b"\xd0\xcf\x11\xe0"
_WORD = (
    "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    "http://purl.oclc.org/ooxml/wordprocessingml/main",  # Strict documents
)
_MATH = (
    "http://schemas.openxmlformats.org/officeDocument/2006/math",
    "http://purl.oclc.org/ooxml/officeDocument/math",
)
_COMPATIBILITY = "http://schemas.openxmlformats.org/markup-compatibility/2006"
# Deleted text, field codes, and phonetic guides above words.
_LEFT_OUT = ("del", "moveFrom", "instrText", "delInstrText", "delText", "rt")
_SIGNS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "\u2011"}
_NOTES = {"footnoteReference": "footnotes", "endnoteReference": "endnotes"}

Attributes = dict[str, str]
# pypdf's output for glyphs that the font does not map to letters.
_UNREADABLE = re.compile(
    r"[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f]|\(cid:\d+\)|/(?:[gGcCa]|cid|glyph|index)\d+"
)
_MAX_UNREADABLE = 0.2  # share of unreadable characters above which the text is useless


def docx_text(file: BinaryIO) -> str:
    """Return a document's text: one line per paragraph, table cells separated by tabs.

    Text boxes follow their paragraph. Footnotes and endnotes come last, with their numbers in the
    text. Headers, footers and comments are skipped.

    Raises:
        BadRowError: the file is encrypted, or decompresses to too much.
        Exception: the file is damaged; zipfile, zlib and expat raise their own errors.
    """
    start = file.read(len(_OLE))
    if start == _OLE:
        raise BadRowError("encrypted DOCX or old Word file; save it as DOCX without a password")
    with zipfile.ZipFile(file) as package:
        refuse_bomb(package, "the DOCX")
        return _text_of(package)


def _text_of(package: zipfile.ZipFile) -> str:
    main = _related(package, "").get("officeDocument", "word/document.xml")
    parts = _related(package, main)
    numbering = _read_numbering(package, parts)
    body = _Body(numbering)
    _parse(package, main, body.start, body.end, body.data)
    lines = body.lines
    for kind, first in (("footnotes", body.footnotes), ("endnotes", body.endnotes)):
        if first and kind in parts:
            notes = _Body(numbering)
            _parse(package, parts[kind], notes.start, notes.end, notes.data)
            for number, name in enumerate(first, start=1):
                lines.append(f"[{_numeral(kind, number)}] {' '.join(notes.notes.get(name, []))}")
    return "\n".join(lines)


def _read_numbering(package: zipfile.ZipFile, parts: dict[str, str]) -> Numbering:
    numbering = Numbering()
    for kind, define in (("numbering", numbering.define), ("styles", numbering.define_style)):

        def start(
            tag: str,
            attributes: Attributes,
            define: Callable[[str, Attributes], None] = define,
        ) -> None:
            space, _, name = tag.rpartition(" ")
            if space in _WORD:
                define(name, _local(attributes))

        if parts.get(kind) in package.namelist():
            _parse(package, parts[kind], start)
    return numbering


def _local(attributes: Attributes) -> Attributes:
    """Return attributes by their names without namespace."""
    return {key.rpartition(" ")[2]: value for key, value in attributes.items()}


def _numeral(kind: str, number: int) -> str:
    return str(number) if kind == "footnotes" else f"e{number}"


def _parse(
    package: zipfile.ZipFile,
    part: str,
    start: Callable[[str, Attributes], None],
    end: Callable[[str], None] | None = None,
    data: Callable[[str], None] | None = None,
) -> None:
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    with package.open(part) as file:
        parser.ParseFile(file)


def _refuse_doctype(*_: object) -> None:
    """Reject a document type: Office never writes one, and entities can expand to gigabytes."""
    raise BadRowError("the DOCX has a document type declaration, which word processors never write")


def _related(package: zipfile.ZipFile, part: str) -> dict[str, str]:
    """Return the parts related to a part ("" is the package), by relationship type."""
    folder, name = posixpath.split(part)
    listing = posixpath.join(folder, "_rels", f"{name}.rels")
    found: dict[str, str] = {}

    def start(tag: str, attributes: Attributes) -> None:
        if tag.endswith(" Relationship") and attributes.get("TargetMode") != "External":
            target = posixpath.join("/", folder, attributes.get("Target", ""))
            kind = attributes.get("Type", "").rpartition("/")[2]
            found.setdefault(kind, posixpath.normpath(target).lstrip("/"))

    if listing in package.namelist():
        _parse(package, listing, start)
    return found


@dataclass
class _Paragraph:
    text: list[str] = field(default_factory=list)
    boxes: list[str] = field(default_factory=list)
    joined: bool = False  # its end was deleted, so the next paragraph continues it
    style: str = ""
    number: str | None = None  # of its list; None for that of its style
    level: int | None = None


@dataclass
class _Row:
    cells: list[str] = field(default_factory=list)
    deleted: bool = False


class _Body:
    """Collects the text of one part while expat reads it.

    Attributes:
        lines: the finished text.
        footnotes, endnotes: names of the notes that the text refers to, in order.
        notes: lines of the notes by name, if the part consists of notes.
    """

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self.lines: list[str] = []
        self.footnotes: list[str] = []
        self.endnotes: list[str] = []
        self.notes: dict[str, list[str]] = {}
        self._places = [self.lines]  # stack of targets for lines; the last is the innermost
        self._paragraphs: list[_Paragraph] = []
        self._rows: list[_Row] = []
        self._fields: list[bool] = []  # for each open field, whether its code is being read
        self._choices: list[bool] = []  # for each mc:AlternateContent, whether a branch was used
        self._path: list[str] = []
        self._hidden = 0  # depth inside skipped elements
        self._vanished = self._in_text = False
        self._carried = ""

    def start(self, tag: str, attributes: Attributes) -> None:
        space, _, name = tag.rpartition(" ")
        self._path.append(name)
        if self._hidden or self._left_out(space, name):
            self._hidden += 1
            return
        if space in _MATH and name == "t":
            self._in_text = True
        elif space in _WORD:
            self._start(name, _local(attributes))

    def _left_out(self, space: str, name: str) -> bool:
        if space == _COMPATIBILITY:
            if name == "AlternateContent":
                self._choices.append(False)
            elif name in ("Choice", "Fallback") and self._choices:
                taken, self._choices[-1] = self._choices[-1], True
                return taken
            return False
        return space in _WORD and name in _LEFT_OUT and not self._is_property()

    def _is_property(self) -> bool:
        """Return whether the current element is part of another element's properties."""
        return any(name.endswith("Pr") for name in self._path[-4:-1])

    def _start(self, name: str, values: Attributes) -> None:
        if self._is_property():
            self._property(name, values)
        elif name == "t":
            self._in_text = True
        elif name == "p":
            self._paragraphs.append(_Paragraph([self._carried]))
            self._carried = ""
        elif name == "r":
            self._vanished = False
        elif name == "tr":
            self._rows.append(_Row())
        elif name in ("tc", "txbxContent"):
            self._places.append([])
        elif name in ("footnote", "endnote"):
            self._places.append(self.notes.setdefault(values.get("id", ""), []))
        elif name == "fldChar":
            self._field(values.get("fldCharType", ""))
        elif name == "sym":
            self._symbol(values.get("char", ""), values.get("font", ""))
        elif name in _NOTES:
            self._note(name, values.get("id", ""))
        elif name in _SIGNS:
            self._add(_SIGNS[name])

    def _property(self, name: str, values: Attributes) -> None:
        if name == "vanish" and self._path[-2:-1] == ["rPr"] and self._path[-3] == "r":
            self._vanished = is_on(values)
        elif name in ("del", "moveFrom") and self._path[-3:-1] == ["pPr", "rPr"]:
            if self._paragraphs:
                self._paragraphs[-1].joined = True
        elif name == "del" and self._path[-2] == "trPr" and self._rows:
            self._rows[-1].deleted = True
        elif self._paragraphs and "pPrChange" not in self._path[-5:]:
            self._list_item(self._paragraphs[-1], name, values.get("val", ""))

    def _list_item(self, paragraph: _Paragraph, name: str, value: str) -> None:
        if name == "pStyle":
            paragraph.style = value
        elif name == "numId":
            paragraph.number = value
        elif name == "ilvl":
            paragraph.level = whole(value)

    def _field(self, kind: str) -> None:
        if kind == "begin":
            self._fields.append(True)
        elif self._fields and kind == "separate":
            self._fields[-1] = False
        elif self._fields and kind == "end":
            self._fields.pop()

    def _symbol(self, code: str, font: str) -> None:
        try:
            number = int(code, 16)
        except ValueError:
            number = 0
        self._add(symbol(number, font))

    def _note(self, name: str, note: str) -> None:
        kind = _NOTES[name]
        known = self.footnotes if kind == "footnotes" else self.endnotes
        known.append(note)
        self._add(f"[{_numeral(kind, len(known))}]")

    def data(self, text: str) -> None:
        if self._in_text:
            self._add(text)

    def _add(self, text: str) -> None:
        if self._paragraphs and not self._vanished and not any(self._fields):
            self._paragraphs[-1].text.append(text)

    def end(self, tag: str) -> None:
        space, _, name = tag.rpartition(" ")
        if self._hidden:
            self._hidden -= 1
        elif space == _COMPATIBILITY and name == "AlternateContent":
            self._choices.pop()
        elif name == "t":
            self._in_text = False
        elif space in _WORD and not self._is_property():
            self._end(name)
        self._path.pop()

    def _end(self, name: str) -> None:
        if name == "p" and self._paragraphs:
            self._end_paragraph(self._paragraphs.pop())
        elif name == "r":
            self._vanished = False
        elif name == "txbxContent":
            box = self._close()
            (self._paragraphs[-1].boxes if self._paragraphs else self._places[-1]).extend(box)
        elif name == "tc":
            cell = "\n".join(self._close())
            if self._rows:
                self._rows[-1].cells.append(cell)
        elif name == "tr" and self._rows:
            row = self._rows.pop()
            if not row.deleted:
                self._places[-1].append("\t".join(row.cells))
        elif name in ("footnote", "endnote", "body"):
            self._close()

    def _close(self) -> list[str]:
        """Close the innermost target and return its lines."""
        if self._carried:
            self._places[-1].append(self._carried)
            self._carried = ""
        return self._places.pop() if len(self._places) > 1 else self._places[-1]

    def _end_paragraph(self, paragraph: _Paragraph) -> None:
        text = "".join(paragraph.text)
        if paragraph.joined:
            self._carried = text
            self._places[-1].extend(paragraph.boxes)
        else:
            label = self._numbering.label(paragraph.style, paragraph.number, paragraph.level)
            self._places[-1].extend([label + text if text else label.rstrip(), *paragraph.boxes])


class NoTextError(ValueError):
    """A file has no readable text; the message says why."""


@dataclass(frozen=True)
class Document:
    """The text of a file.

    Attributes:
        encoding: of plain text and HTML.
        blank: number of pages of a PDF without text, which may be scanned.
    """

    text: str
    encoding: Encoding | None = None
    blank: int = 0


def read_document(path: Path, encoding: str | None = None, max_size: int | None = None) -> Document:
    """Return a file's text.

    Args:
        encoding: encoding of plain text that is not UTF-8; by default declared or guessed.
        max_size: bytes that a compressed text may decompress to.

    Raises:
        NoTextError: the file is binary, contains no text, or cannot be read.
        BadRowError: the document is damaged or encrypted.
        ConfigError: the library for this file type is not installed.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".pdf":
            document = _read_pdf(path)
        elif kind == ".docx":
            document = Document(_read_docx(path))
        elif FORMATS.get(kind) in PACKED:
            document = Document(pandoc_text(path, FORMATS[kind]))
        else:
            document = _read_text(plain_name(path).suffix.lower(), path, encoding, max_size)
    except InputError as error:
        raise BadRowError(error.message) from None
    except OSError as error:
        raise NoTextError(f"cannot be read: {error.strerror or error}") from None
    if document.text.strip():
        return document
    if not document.blank:
        raise NoTextError("contains no text")
    raise NoTextError(
        f"contains no text: its pages seem to be scanned ({document.blank}); use OCR, or "
        "--pdf-pages images"
    )


def _read_text(kind: str, path: Path, encoding: str | None, max_size: int | None) -> Document:
    content = _content(path, max_size)
    if kind == ".eml":
        return Document(email_text(content))
    if FORMATS.get(kind) == "rtf":
        return Document(pandoc_text(content, "rtf"))
    document = _decode(content, encoding)
    if kind in FORMATS:
        text = pandoc_text(document.text.encode("utf-8", "replace"), FORMATS[kind])
        return replace(document, text=text)
    return document


def _content(path: Path, max_size: int | None) -> bytes:
    with PlainFile(path) as file:
        content = file.read(-1 if max_size is None else max_size + 1)
        if file.compression is not None and max_size is not None and len(content) > max_size:
            raise NoTextError(f"decompresses to more than {size_text(max_size)}; --max-file-size")
        return content


def _read_pdf(path: Path) -> Document:
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
            pages = [page.extract_text(visitor_text=readable.note) for page in reader.pages]
    except (OSError, MemoryError, BadRowError):
        raise
    except library.errors.DependencyError:
        need("cryptography", "documents", f"reading {path.name!r}, which is encrypted,")
        raise
    except Exception as error:  # noqa: BLE001 - pypdf raises many types for damaged files
        raise BadRowError(
            f"the PDF is damaged ({_words(error)}); open it in a PDF reader and save it again"
        ) from None
    readable.check()
    blank = sum(not page.strip() for page in pages)
    return Document("\n\n".join(pages), blank=blank)


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
    except (OSError, MemoryError, BadRowError):
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
