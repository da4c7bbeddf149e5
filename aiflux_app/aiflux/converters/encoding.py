"""Which encoding a text file has: told by a byte order mark, by UTF-8's rules, else a guess."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress
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


# In most cases, a text that is not UTF-8 was saved by Windows in Western Europe or America.
_COMMON = "cp1252"
# What tables and texts are saved in; not those of DOS, old Macs and mainframes.
_CANDIDATES = [
    *(f"cp125{number}" for number in range(9)),
    *("cp932", "cp949", "big5", "gb18030", "euc_jp", "euc_kr", "iso2022_jp"),
    *("iso8859_2", "iso8859_5", "iso8859_7", "iso8859_9", "iso8859_15", "koi8_r", "koi8_u"),
]
_ESCAPED = re.compile("[\udc80-\udcff]")
_CLEAR, _MARGIN = 0.4, 0.2


class UnclearEncodingError(ValueError):
    """No encoding is clearly the right one; the text says which ones come into question."""


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
        marked = marked_encoding(block)
        if marked is not None:
            return Encoding(marked, "detected")
        wide = _without_mark(block)
        if wide is not None:
            return Encoding(wide, "guessed")
        while block:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return _guess(path, file.tell() - len(block) + error.start)
            block = file.read(_BLOCK)
        return Encoding("utf-8-sig", "detected")


def marked_encoding(content: bytes) -> str | None:
    """Return the encoding that a byte order mark at the beginning tells, or None."""
    return next((name for mark, name in _BOMS if content.startswith(mark)), None)


def _without_mark(block: bytes) -> str | None:
    """Return UTF-16's name where every other byte of a text is mostly 0, as in Western texts."""
    even, odd = block[::2], block[1::2]
    some = len(odd) // 4
    if odd.count(0) > some and not even.count(0):
        return "utf-16-le"
    if even.count(0) > some and not odd.count(0):
        return "utf-16-be"
    return None


def _guess(path: Path, bad: int) -> Encoding:
    """Guess from what lies around the first byte that UTF-8 does not have."""
    with reading(path), open(path, "rb") as file:
        file.seek(max(0, bad - _SAMPLE // 2))
        sample = file.read(_SAMPLE)
    text = sample.decode("utf-8", "surrogateescape")
    broken = sum("\udc80" <= char <= "\udcff" for char in text)
    if sum(not char.isascii() for char in text) > 2 * broken:
        return Encoding("utf-8-sig", "detected")
    try:
        return Encoding(guess_encoding(sample), "guessed")
    except UnclearEncodingError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 (from byte {bad} on), and {error}",
            "say which with --encoding, or save it as UTF-8",
        ) from None


def guess_encoding(sample: bytes) -> str:
    """Return the encoding of a text that is not UTF-8, where it is clear enough.

    It is clear where all that come into question read the text alike, or where one reads as a known
    language and the others do not. A wrong guess would change letters without a word.

    Raises:
        UnclearEncodingError: tells what comes into question, and how a word would read.
    """
    if b"\0" in sample:
        raise UnclearEncodingError("it is binary, not text")
    matches = list(from_bytes(sample, cp_isolation=_CANDIDATES))
    readings = {match.encoding: str(match) for match in matches}
    with suppress(UnicodeDecodeError):
        readings.setdefault(_COMMON, sample.decode(_COMMON))
    if matches and len(set(readings.values())) == 1:
        return _COMMON if _COMMON in readings else matches[0].encoding
    best, others = matches[:1], matches[1:]
    alike = bool(best) and readings.get(_COMMON) == str(best[0])
    if (
        best
        and best[0].coherence >= _CLEAR
        and all(
            best[0].coherence - other.coherence >= _MARGIN or str(other) == str(best[0])
            for other in others
        )
    ):
        return _COMMON if alike else best[0].encoding
    names = list(dict.fromkeys([*(name for name in readings if name == _COMMON), *readings]))[:4]
    shown = ", ".join(f"{name} ({_word(readings[name])!r})" for name in names)
    raise UnclearEncodingError(
        f"its encoding is not clear: it may be {shown}" if shown else "its encoding is not known"
    )


def _word(text: str) -> str:
    found = re.search(r"\w*[^\x00-\x7f]\w*", text)
    return found[0][:30] if found else text[:30]


def bad_byte(text: str) -> int | None:
    """Return the first byte that did not fit the encoding (see ``Encoding.errors``), or None."""
    found = None if text.isascii() else _ESCAPED.search(text)
    return None if found is None else ord(found[0]) - 0xDC00
