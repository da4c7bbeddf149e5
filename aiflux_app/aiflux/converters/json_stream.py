"""Read JSON values from a file one by one, in bounded memory: array elements or lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

from aiflux.converters.encoding import checked_start
from aiflux.converters.writer import Progress, Skipped, reading
from aiflux.core.batch.request import MAX_DEPTH, TOO_DEEP, depth, not_json, parse_json
from aiflux.errors import InputError
from aiflux.util.lines import read_lines

_BLOCK = 1 << 16
_MAX_ELEMENT = 64 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class LocatedValue:
    """A value and its position: the number of its line or array element."""

    number: int
    value: Any


@dataclass(frozen=True)
class JsonFile:
    """A file of JSON values.

    Attributes:
        unit: ``line`` for JSON Lines, ``entry`` for an array.
    """

    path: Path
    unit: str

    @classmethod
    def of(cls, path: Path) -> JsonFile:
        """Detect JSON Lines or an array by the file's name, else by its first character.

        Raises:
            InputError: the file cannot be read.
        """
        start = checked_start(path, "JSON").removeprefix(codecs.BOM_UTF8).lstrip()
        lines = path.suffix.lower() in _LINES
        return cls(path, "line" if lines or not start.startswith((b"[", b"{")) else "entry")

    def values(self, progress: Progress | None = None) -> Iterator[LocatedValue | Skipped]:
        """Yield all values; invalid ones are yielded as ``Skipped``.

        Raises:
            InputError: an array is malformed, so the following elements cannot be separated.
        """
        return self._lines(progress) if self.unit == "line" else self._elements(progress)

    def _lines(self, progress: Progress | None) -> Iterator[LocatedValue | Skipped]:
        size = self.path.stat().st_size
        for number, offset, raw in read_lines(self.path):
            if progress is not None and number % 1000 == 1:
                progress(offset, size)
            try:
                yield LocatedValue(number, parse_json(raw.decode("utf-8")))
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
                yield Skipped(number, f"line {number}", reason)
            except ValueError as error:
                yield Skipped(number, f"line {number}", not_json(error))
        if progress is not None:
            progress(size, size)

    def _elements(self, progress: Progress | None) -> Iterator[LocatedValue | Skipped]:
        size = self.path.stat().st_size
        with reading(self.path), open(self.path, "rb") as file:
            window = _Window(self.path, file)
            for number, value in enumerate(window.elements(), start=1):
                if progress is not None and number % 100 == 1:
                    progress(min(file.tell(), size), size)
                reason = window.refused
                if not reason and depth(value) > MAX_DEPTH:
                    reason = TOO_DEEP
                if reason:
                    yield Skipped(number, f"entry {number}", reason)
                else:
                    yield LocatedValue(number, value)
        if progress is not None:
            progress(size, size)


class _Window:
    """A sliding window of decoded text around the value that is being read.

    Attributes:
        refused: why the last value is invalid, or "": it contains a constant such as NaN that
            Python accepts but JSON does not, or a number out of range.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(
            parse_constant=self._note_constant, parse_float=self._note_float
        )
        self.refused = ""
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._number = 0

    def elements(self) -> Iterator[Any]:
        """Yield the elements of an array, or consecutive values."""
        array = self._peek() == "["
        if array:
            self._at += 1
        while True:
            char = self._peek()
            if array and char == "]":
                self._at += 1
                break
            if not char:
                break
            self._number += 1
            yield self._value()
            if self._peek() == "," and array:
                self._at += 1
            elif array and self._peek() != "]":
                raise self._broken("a comma or ] is missing after it")
        if array and self._ended and self._text[self._at - 1 : self._at] != "]":
            raise self._broken("the file ends inside the array")
        if self._peek():
            raise self._broken("unexpected content after the array")

    def _peek(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = self._at if found is None else found.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _value(self) -> Any:
        while True:
            self.refused = ""
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except ValueError as error:
                if not self._more():
                    raise self._broken(str(error)) from None
                continue
            except RecursionError:
                raise self._broken("nested too deeply") from None
            # A number may continue in the next block.
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue
            self._at = end
            return value

    def _note_constant(self, name: str) -> None:
        self.refused = f"it contains {name}, which is not JSON; use null"

    def _note_float(self, text: str) -> float:
        value = float(text)
        if isinf(value):
            self.refused = f"the number {text} is too large"
        return value

    def _more(self) -> bool:
        """Read a block twice as large as the last, and drop consumed text. False at the end."""
        if self._ended:
            return False
        kept = len(self._text) - self._at
        if kept > _MAX_ELEMENT:
            raise self._broken(f"not JSON, or longer than {_MAX_ELEMENT >> 20} MiB")
        block = self._file.read(max(_BLOCK, kept))
        self._line += self._text.count("\n", 0, self._at)
        try:
            self._text = self._text[self._at :] + self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise self._broken(f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
        self._at = 0
        self._ended = not block
        return bool(block)

    def _broken(self, reason: str) -> InputError:
        line = self._line + self._text.count("\n", 0, self._at)
        place = f"entry {self._number} (line {line})" if self._number else f"line {line}"
        return InputError(
            f"{str(self._path)!r} is not valid JSON at {place}: {reason}",
            "correct it; the rest of the array cannot be parsed",
        )
