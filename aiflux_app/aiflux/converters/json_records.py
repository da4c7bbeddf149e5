"""Convert JSON and JSON Lines: each object, text or conversation becomes a request."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.encoding import checked_start
from aiflux.converters.request_form import RequestDraft, Template, make_form
from aiflux.converters.table import as_json, as_messages, as_text, names
from aiflux.converters.writer import (
    EMPTY,
    BadRowError,
    Conversion,
    Progress,
    Skipped,
    Summary,
    reading,
)
from aiflux.core.batch.request import MAX_DEPTH, TOO_DEEP, depth, not_json, parse_json
from aiflux.errors import InputError, UsageError
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


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_MISSING = object()


def json_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | None = None,
    field: str | None = None,
    id_field: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each entry of a JSON array, or each line of a JSON Lines file, to a request.

    An entry is one of: an object, with the prompt from ``template`` (``{field}``,
    ``{outer.inner}``, ``{list.0}``) or ``field``; an object with ``messages``, or a list of
    messages, sent unchanged; a string, used as the prompt (or as ``{text}`` in a template).

    Args:
        id_field: the field with the custom_ids; by default they are ``row-1``, ``row-2``, ...
        keep: fields to copy to the request's metadata (``*`` for all).
        progress: called with the number of bytes read and the total.

    The other arguments are the same as for ``csv_to_jsonl``.

    Raises:
        UsageError: both ``template`` and ``field`` are given.
        InputError: the file or some entries are invalid; lists their positions.
        StorageError: the output cannot be written.
    """
    if template is not None and field is not None:
        raise UsageError("--template and --field cannot be combined", "use one of them")
    form = make_form(**request)
    source = JsonFile.of(Path(input_path))
    maker = _RecordRequests(
        Template(template) if template is not None else None,
        field,
        id_field,
        names(keep),
        source.unit,
    )
    job = Conversion(
        source.path,
        None if output_path is None else Path(output_path),
        form,
        unit="entry" if source.unit == "entry" else "line",
        place=source.unit,
        skip_bad=skip_bad,
        limit=limit,
        numbered=id_field is None,
    )
    return job.run(maker.drafts(source.values(progress)))


@dataclass(frozen=True)
class _RecordRequests:
    """Creates the request for each entry."""

    template: Template | None
    field: str | None
    id_field: str | None
    keep: tuple[str, ...]
    place: str

    def drafts(self, values: Iterator[LocatedValue | Skipped]) -> Iterator[RequestDraft | Skipped]:
        for count, item in enumerate(values, start=1):
            if isinstance(item, Skipped):
                yield item
                continue
            try:
                yield self._draft(item, count)
            except BadRowError as error:
                yield Skipped(item.number, f"{self.place} {item.number}", str(error))

    def _draft(self, item: LocatedValue, count: int) -> RequestDraft:
        value = item.value
        name = f"row-{count}" if self.id_field is None else _text(value, self.id_field)
        metadata = self._metadata(value)
        content = self._content(value)
        if isinstance(content, list):
            return RequestDraft(item.number, name, content, metadata, messages=True)
        remark = EMPTY if self._blank(value, content) else ""
        return RequestDraft(item.number, name, content, metadata, remark=remark)

    def _content(self, value: Any) -> Any:
        if self.template is not None:
            fields = {"text": value} if isinstance(value, str) else value
            return self.template.render({name: _text(fields, name) for name in self.template.names})
        if self.field is not None:
            found = _find(value, self.field)
            return as_messages(found) or _text(value, self.field)
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and {"custom_id", "url", "body"} <= value.keys():
            raise BadRowError("already a request: pass the file to `aiflux run` unchanged")
        messages = value
        if isinstance(value, dict):
            messages = value.get("messages", value.get("conversations"))
        if isinstance(messages, list):
            found = as_messages(messages)
            if found is None:
                raise BadRowError(
                    'not a list of messages: expected {"role": ..., "content": ...}, or '
                    'ShareGPT form {"from": "human" or "gpt", "value": ...}'
                )
            return found
        if isinstance(value, dict):
            raise BadRowError(f"no prompt: set --field or --template ({_names(value)})")
        raise BadRowError(f"{_kind(value)} instead of an object, a string or a list of messages")

    def _blank(self, value: Any, content: str) -> bool:
        """Return whether all values filled into the template were empty."""
        if self.template is None:
            return not content.strip()
        fields = {"text": value} if isinstance(value, str) else value
        return not any(_text(fields, name).strip() for name in self.template.names)

    def _metadata(self, value: Any) -> dict[str, Any]:
        if not self.keep:
            return {}
        if not isinstance(value, dict):
            return {"columns": {"text": as_json(value)}} if "*" in self.keep else {}
        wanted = list(value) if "*" in self.keep else self.keep
        return {"columns": {name: as_json(_found(value, name)) for name in wanted}}


def _find(value: Any, name: str) -> Any:
    """Return a field by its full name, else by the path that its dots separate."""
    if isinstance(value, dict) and name in value:
        return value[name]
    for step in name.split("."):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return _MISSING
    return value


def _found(value: Any, name: str) -> Any:
    found = _find(value, name)
    if found is _MISSING:
        raise BadRowError(f"no field {name!r} ({_names(value)}{_inside(value, name)})")
    return found


def _text(value: Any, name: str) -> str:
    return as_text(_found(value, name))


def _names(value: Any) -> str:
    if not isinstance(value, dict):
        return f"it is {_kind(value)}"
    shown = ", ".join(repr(name) for name in list(value)[:20])
    return f"its fields are {shown}" if value else "it has no fields"


def _inside(value: Any, name: str) -> str:
    """Return a hint if the entries are a list inside the object."""
    for key, items in value.items() if isinstance(value, dict) else ():
        if isinstance(items, list) and items and _find(items[0], name) is not _MISSING:
            return f"; the entries of {key!r} have it: extract them with jq '.{key}'"
    return ""


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "null" if value is None else "a number")
