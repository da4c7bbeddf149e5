"""Which encoding a text file has: told by a byte order mark, by UTF-8's rules, else a guess."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from charset_normalizer import from_bytes

from aiflux.converters.writing import reading
from aiflux.errors import InputError

_BLOCK = 1 << 20
_SAMPLE = 1 << 18
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Encoding:
    """An encoding and how it came to be known: ``given``, ``detected`` or ``guessed``."""

    name: str
    origin: str = "given"

    @property
    def errors(self) -> str:
        """How to decode so that bytes which do not fit can be found: see ``bad_byte``."""
        return "strict" if self.name.startswith(("utf-16", "utf-32")) else "surrogateescape"


def checked_encoding(name: str) -> Encoding:
    """Return an encoding that the user named.

    Raises:
        InputError: Python does not know it.
    """
    try:
        codecs.lookup(name)
        "".encode(name)
    except (LookupError, ValueError):
        raise InputError(
            f"the encoding {name!r} is unknown", "name one such as utf-8, cp1252 or utf-16"
        ) from None
    return Encoding("utf-8-sig" if codecs.lookup(name).name == "utf-8" else name)


def detect_encoding(path: Path) -> Encoding:
    """Read a file once and tell its encoding, in bounded memory.

    A file that is UTF-8 but for a few bytes is UTF-8; its readers find those bytes.

    Raises:
        InputError: the file cannot be read, or nothing fits.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with reading(path), open(path, "rb") as file:
        block = file.read(_BLOCK)
        for bom, name in _BOMS:
            if block.startswith(bom):
                return Encoding(name, "detected")
        while block:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return _guess(path, file.tell() - len(block) + error.start)
            block = file.read(_BLOCK)
        return Encoding("utf-8-sig", "detected")


def _guess(path: Path, bad: int) -> Encoding:
    """Guess from what lies around the first byte that UTF-8 does not have."""
    with reading(path), open(path, "rb") as file:
        file.seek(max(0, bad - _SAMPLE // 2))
        sample = file.read(_SAMPLE)
    text = sample.decode("utf-8", "surrogateescape")
    broken = sum("\udc80" <= char <= "\udcff" for char in text)
    if sum(not char.isascii() for char in text) > 2 * broken:
        return Encoding("utf-8-sig", "detected")
    best = None if b"\0" in sample else from_bytes(sample).best()
    if best is None:
        byte = sample[min(bad, _SAMPLE // 2)]
        raise InputError(
            f"{str(path)!r} is neither UTF-8 (byte 0x{byte:02x} at offset {bad}) nor any other "
            "text that is recognised",
            "name its encoding with --encoding, or save it as UTF-8",
        )
    return Encoding(best.encoding, "guessed")


def bad_byte(text: str) -> int | None:
    """Return the first byte that did not fit the encoding (see ``Encoding.errors``), or None."""
    if text.isascii():
        return None
    return next((ord(char) - 0xDC00 for char in text if "\udc80" <= char <= "\udcff"), None)
