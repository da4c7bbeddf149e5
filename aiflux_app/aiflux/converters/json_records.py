"""Convert JSON and JSON Lines: each object, text or conversation becomes a request."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.cells import BadRowError, as_json, as_messages, as_text
from aiflux.converters.encoding import checked_start
from aiflux.converters.prompt import (
    Filled,
    Prompt,
    documents_of,
    literal_notes,
    own_system,
    prompt_of,
    with_shots,
)
from aiflux.converters.request_form import RequestDraft, make_form
from aiflux.converters.table import (
    CELL_DIGESTS,
    Row,
    digests,
    names,
)
from aiflux.converters.template import PromptTemplate
from aiflux.converters.writer import (
    EMPTY,
    Conversion,
    Progress,
    Skipped,
    Summary,
    reading,
)
from aiflux.core.batch.request import MAX_DEPTH, TOO_DEEP, depth, not_json, parse_json
from aiflux.errors import InputError, UsageError
from aiflux.util.compression import PlainFile, plain_name
from aiflux.util.lines import read_lines
from aiflux.util.text import nearest

_BLOCK = 1 << 16
_MAX_ELEMENT = 64 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class LocatedValue:
    """A value, its position (the number of its line or array element) and its text in the file."""

    number: int
    value: Any
    text: str = ""


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
        lines = plain_name(path).suffix.lower() in _LINES
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
                progress(min(offset, size), size)
            try:
                text = raw.decode("utf-8")
                yield LocatedValue(number, parse_json(text), text)
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
                yield Skipped(number, f"line {number}", reason)
            except ValueError as error:
                yield Skipped(number, f"line {number}", not_json(error))
        if progress is not None:
            progress(size, size)

    def _elements(self, progress: Progress | None) -> Iterator[LocatedValue | Skipped]:
        size = self.path.stat().st_size
        with reading(self.path), PlainFile(self.path) as file:
            window = _Window(self.path, file)
            for number, value in enumerate(window.elements(), start=1):
                if progress is not None and number % 100 == 1:
                    progress(min(file.consumed, size), size)
                reason = window.refused
                if not reason and depth(value) > MAX_DEPTH:
                    reason = TOO_DEEP
                if reason:
                    yield Skipped(number, f"entry {number}", reason)
                else:
                    yield LocatedValue(number, value, window.text)
        if progress is not None:
            progress(size, size)


class _Window:
    """A sliding window of decoded text around the value that is being read.

    Attributes:
        refused: why the last value is invalid, or "": it contains a constant such as NaN that
            Python accepts but JSON does not, or a number out of range.
        text: the last value as the file has it.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(
            parse_constant=self._note_constant, parse_float=self._note_float
        )
        self.refused = ""
        self.text = ""
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
            self.text = self._text[self._at : end]
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


class JsonCells(Mapping[str, Any]):
    """The fields of an entry, by their names or by paths such as ``meta.source``.

    A text is its own field ``text``, and a list of messages is its own field ``messages``.
    """

    def __init__(self, entry: Any) -> None:
        self._entry = entry
        own = "text" if isinstance(entry, str) else "messages"
        self._fields = entry if isinstance(entry, dict) else {own: entry}

    def __getitem__(self, name: str) -> Any:
        """Return a field; raise KeyError if the entry does not have it."""
        found = self._fields[name] if name in self._fields else _find(self._entry, name)
        if found is _MISSING:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names of the fields."""
        return iter(self._fields)

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self._fields)


class JsonTable:
    """The entries of a JSON file as rows.

    Attributes:
        unit: ``line`` or ``entry``.
    """

    part = ""
    others = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = JsonFile.of(path)
        self.unit = self._file.unit

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The fields of all entries, in the order in which they first appear."""
        names: dict[str, None] = {}
        for row in self.rows():
            if isinstance(row, Row):
                names.update(dict.fromkeys(row.cells))
        return tuple(names)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was detected: nothing."""
        return ()

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row | Skipped]:
        """Yield the entries, with all fields, and their text in ``raw``."""
        for count, item in enumerate(self._file.values(progress), start=1):
            if isinstance(item, Skipped):
                yield item
            else:
                yield Row(item.number, f"row-{count}", JsonCells(item.value), item.text)


def json_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | Path | PromptTemplate | None = None,
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
    if field is not None and form.turns:
        raise UsageError("--turn and --field cannot be combined", "use one of them")
    source = JsonFile.of(Path(input_path))
    asked = template is not None or form.turns
    maker = _RecordRequests(
        prompt_of(template, form) if asked else None,
        form.system_template,
        field,
        id_field,
        names(keep),
        form.documents,
        source.unit,
    )
    job = Conversion(
        source.path,
        None if output_path is None else Path(output_path),
        with_shots(form, maker.filled),
        unit="entry" if source.unit == "entry" else "line",
        place=source.unit,
        skip_bad=skip_bad,
        limit=limit,
        numbered=id_field is None,
        notes=maker.notes,
    )
    return job.run(maker.drafts(source.values(progress)))


@dataclass(frozen=True)
class _RecordRequests:
    """Creates the request for each entry."""

    prompt: Prompt | None
    system: PromptTemplate | None
    field: str | None
    id_field: str | None
    keep: tuple[str, ...]
    documents: tuple[str, ...]
    place: str
    literal: set[str] = dataclass_field(default_factory=set)

    @cached_property
    def _templates(self) -> tuple[PromptTemplate, ...]:
        if self.prompt is not None:
            return tuple(self.prompt.templates)
        return () if self.system is None else (self.system,)

    @cached_property
    def _literals(self) -> frozenset[str]:
        return frozenset(name for template in self._templates for name in template.literals)

    def notes(self) -> tuple[str, ...]:
        """Return warnings of fields whose names are sent instead of their values."""
        return literal_notes(self._templates, self.literal)

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
        if self._literals:
            cells = JsonCells(value)
            self.literal.update(name for name in self._literals if name in cells)
        name = f"row-{count}" if self.id_field is None else _text(value, self.id_field)
        cells = JsonCells(value)
        try:
            made = self.filled(value)
            documents = documents_of(cells, self.documents)
            system = None if self.system is None else own_system(self.system, cells)
        except KeyError as error:
            raise BadRowError(_without(value, error.args[0])) from None
        used = (*self._asked(value), *self.documents)
        metadata = {CELL_DIGESTS: digests(cells, used)} | self._metadata(value)
        return RequestDraft(
            item.number,
            name,
            made.content,
            metadata,
            messages=made.messages,
            remark=made.remark,
            system=system,
            documents=documents,
        )

    def filled(self, value: Any) -> Filled:
        """Return the prompt of an entry.

        Raises:
            KeyError: the template needs a field that is missing.
            BadRowError: it has none, or it cannot be used.
        """
        if self.prompt is not None:
            return self.prompt.filled(JsonCells(value))
        content = self._content(value)
        if isinstance(content, list):
            return Filled(content, messages=True)
        return Filled(content, remark="" if content.strip() else EMPTY)

    def _content(self, value: Any) -> Any:
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
            return _with_system(value, found)
        if isinstance(value, dict):
            raise BadRowError(f"no prompt: set --field or --template ({_names(value)})")
        raise BadRowError(f"{_kind(value)} instead of an object, a string or a list of messages")

    def _asked(self, value: Any) -> Sequence[str]:
        """Return the fields that the prompt is made of."""
        if self.prompt is not None:
            return self.prompt.used(JsonCells(value))
        if self.field is not None:
            return (self.field,)
        cells = JsonCells(value)
        return [name for name in ("messages", "conversations", "text") if name in cells][:1]

    def _metadata(self, value: Any) -> dict[str, Any]:
        if not self.keep:
            return {}
        if not isinstance(value, dict):
            return {"columns": {"text": as_json(value)}} if "*" in self.keep else {}
        wanted = list(value) if "*" in self.keep else self.keep
        return {"columns": {name: as_json(_found(value, name)) for name in wanted}}


def _with_system(value: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the system prompt that ShareGPT files have next to the conversation."""
    system = value.get("system") if isinstance(value, dict) else None
    if not (isinstance(system, str) and system) or messages[:1] == []:
        return messages
    if messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


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
        raise BadRowError(_without(value, name))
    return found


def _without(value: Any, name: str) -> str:
    near = nearest(name, value) if isinstance(value, dict) else None
    meant = "" if near is None else f"; did you mean {near!r}?"
    return f"no field {name!r}{meant} ({_names(value)}{_inside(value, name)})"


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
