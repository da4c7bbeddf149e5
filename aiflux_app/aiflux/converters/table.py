"""Convert table rows to requests; shared by all kinds of tables."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from hashlib import blake2b
from itertools import islice
from json.encoder import encode_basestring
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from aiflux.converters.cells import BadRowError, as_json, as_text, as_words, cell
from aiflux.converters.prompt import Prompt
from aiflux.converters.request_form import RequestDraft, RequestForm, encode_json
from aiflux.converters.template import Template, check_columns, value_text
from aiflux.converters.writer import Conversion, Item, Progress, RequestLines, Skipped, Summary
from aiflux.errors import InputError
from aiflux.util.lines import MAX_LINE_BYTES
from aiflux.util.text import is_whole, nearest


@dataclass(slots=True)  # to freeze it would take most of the time of reading a row
class Row:
    """One row.

    Attributes:
        number: its line number, or its position in the table from 1.
        name: its default custom_id.
        cells: its values by column.
        raw: the row as its file has it: text with its line ending (see ``DelimitedTable``), JSON
            text, or the Arrow batch that contains it; None if it is not kept.
    """

    number: int
    name: str
    cells: Mapping[str, Any]
    raw: Any = None


class SourceTable(Protocol):
    """An open table of any kind."""

    @property
    def path(self) -> Path:
        """The file or directory."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""

    @property
    def unit(self) -> str:
        """Unit of a row's number, such as ``line``."""

    @property
    def part(self) -> str:
        """What was read of a file with several tables, such as ``the sheet 'a'``; else ""."""

    @property
    def others(self) -> tuple[str, ...]:
        """The tables of the file that ``--table`` can choose instead."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was detected."""

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row | Skipped]:
        """Yield the rows with at least these columns (default: all), in their order.

        Raises:
            InputError: the rest of the table cannot be read.
        """


@dataclass(frozen=True)
class TableOptions:
    """How rows are converted."""

    prompt: Prompt
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    skip_bad: bool = False
    limit: int | None = None

    def kept(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Return the columns to copy to the metadata."""
        return tuple(columns) if "*" in self.keep else self.keep

    def needed(self, table: SourceTable) -> list[str]:
        """Return the columns to read, in the table's order.

        Raises:
            InputError: a named column does not exist.
        """
        try:
            return self._needed(table.columns, table.part or "the input")
        except InputError as error:
            if not table.others:
                raise
            others = ", ".join(map(repr, table.others))
            remedy = f"{error.remedy}; --table NAME chooses another one: {others}"
            raise InputError(error.message, remedy) from None

    def _needed(self, columns: Sequence[str], where: str) -> list[str]:
        prompt = self.prompt
        inside = [name for name in prompt.names if _column(name, columns) != name]
        prompt.check([*columns, *(name for name in inside if _column(name, columns))], where)
        check_columns(self.kept(columns), columns, "--keep", where)
        named = () if self.id_column is None else (self.id_column,)
        check_columns(named, columns, "--id-column", where)
        if prompt.whole:
            return list(columns)
        used = (_column(name, columns) for name in prompt.names)
        wanted = {*used, *self.kept(columns), *named}
        return [name for name in columns if name in wanted]


def _column(name: str, columns: Sequence[str]) -> str:
    """Return the column of a cell, or of a field inside it (``meta.source``); "" if unknown."""
    outer = name.partition(".")[0]
    return name if name in columns else outer if outer in columns else ""


def requests_of_table(
    table: SourceTable,
    output: Path | None,
    form: RequestForm,
    options: TableOptions,
    progress: Progress | None,
) -> Summary:
    """Write a request for each row of an open table.

    Raises:
        InputError: named columns do not exist, or rows are invalid.
    """
    rows = table.rows(options.needed(table), progress)
    literal = options.prompt.literal_notes(table.columns)
    job = Conversion(
        table.path,
        output,
        form,
        place=table.unit,
        skip_bad=options.skip_bad,
        limit=options.limit,
        notes=lambda: (*table.notes, *literal),
        numbered=options.id_column is None,
    )
    kept = options.kept(table.columns)
    pattern = _LinePattern.of(table, form, options, kept)
    if pattern is None:
        return job.run(_item(row, table, options, kept) for row in rows)
    return job.run(_items(rows, table, options, kept, pattern))


def _items(
    rows: Iterable[Row | Skipped],
    table: SourceTable,
    options: TableOptions,
    kept: Sequence[str],
    pattern: _LinePattern,
) -> Iterator[Item]:
    """Yield the requests of several rows at once, where these are usual ones."""
    size = 1

    def items(block: Sequence[Row | Skipped]) -> Iterator[Item]:
        nonlocal size
        lines = pattern.lines(block)
        if lines is not None:
            size = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES * len(block) // len(lines.content)))
            yield lines
        elif len(block) > 1:
            middle = len(block) // 2
            yield from items(block[:middle])
            yield from items(block[middle:])
        else:
            yield _item(block[0], table, options, kept)

    waiting = iter(rows)
    while block := list(islice(waiting, size)):
        yield from items(block)


def _item(
    row: Row | Skipped, table: SourceTable, options: TableOptions, kept: Sequence[str]
) -> Item:
    if isinstance(row, Skipped):
        return row
    try:
        return _draft(row, options.prompt, kept, options.id_column)
    except BadRowError as error:
        return Skipped(row.number, f"{table.unit} {row.number}", str(error))
    except KeyError as error:  # entries of JSON need not have the same fields
        near = nearest(error.args[0], row.cells)
        meant = "" if near is None else f"; did you mean {near!r}?"
        reason = f"no field {error.args[0]!r}{meant}"
        return Skipped(row.number, f"{table.unit} {row.number}", reason)


def _draft(row: Row, prompt: Prompt, kept: Sequence[str], id_column: str | None) -> RequestDraft:
    cells = prompt.with_fields(row.cells)
    name = row.name if id_column is None else value_text(cells, id_column)
    metadata: dict[str, Any] = {}
    draft = prompt.draft(row.number, name, cells, metadata)
    own = {column: row.cells[column] for column in kept}
    metadata |= _metadata(digests(row.cells, prompt.used(row.cells)), own)
    return draft


def _metadata(digests: Mapping[str, str], kept: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {CELL_DIGESTS: digests}
    if kept:
        metadata["columns"] = as_json(dict(kept))
        types = _types(kept)
        metadata |= {COLUMN_TYPES: types} if types else {}
    return metadata


_BLOCK_ROWS = 64
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class _LinePattern:
    """The line of a request, with places for the values of a row.

    It is made from the request of a row of marks, and fills in many rows at once in a fraction of
    the time of ``_draft``. Rows that need a closer look are left to that.

    Attributes:
        text: for the operator ``%``.
        order: the value at each place: first come the texts of the prompt's columns, then the
            custom_id, then the digests of the texts, then the kept columns.
        sent_before: see ``RequestForm.example_prompts``.
    """

    text: str
    order: Sequence[int]
    prompt: Prompt
    id_column: str | None
    kept: Sequence[str]
    sent_before: frozenset[str]

    @classmethod
    def of(
        cls, table: SourceTable, form: RequestForm, options: TableOptions, kept: Sequence[str]
    ) -> _LinePattern | None:
        """Return the pattern; None if requests differ in more than some texts, or are shown."""
        prompt, names = options.prompt, options.prompt.names
        if (
            options.limit is not None
            or form.documents
            or [role for role, _ in prompt.turns] != ["user"]
            or not all(isinstance(each, Template) for each in prompt.templates)
            or not {*names} <= {*table.columns}  # others are fields inside cells
        ):
            return None
        key = token_hex(16)
        marks = [f"{key}-{at}-" for at in range(2 * len(names) + 1 + len(kept))]
        texts, custom_id = marks[: len(names)], marks[len(names)]
        digests, values = marks[len(names) + 1 :][: len(names)], marks[2 * len(names) + 1 :]
        metadata = _metadata(
            dict(zip(names, digests, strict=True)), dict(zip(kept, values, strict=True))
        )
        draft = prompt.draft(0, custom_id, dict(zip(names, texts, strict=True)), metadata)
        line = encode_json(form.entry(draft)) + "\n"
        if not is_whole(line):
            return None
        for value in values:
            line = line.replace(encode_basestring(value), value)  # it need not be a string
        parts = re.split(f"{key}-([0-9]+)-", line)
        text = "%s".join(part.replace("%", "%%") for part in parts[::2])
        order = [int(at) for at in parts[1::2]]
        return cls(text, order, prompt, options.id_column, kept, form.example_prompts)

    def lines(self, rows: Sequence[Row | Skipped]) -> RequestLines | None:
        """Return the requests of rows; None if one of them needs a closer look."""
        found = [row for row in rows if isinstance(row, Row)]
        if len(found) < len(rows):
            return None
        cells = [row.cells for row in found]
        try:
            columns = {name: _texts(cells, name) for name in self.prompt.names}
            ids = [row.name for row in found]
            if self.id_column is not None:
                ids = _texts(cells, self.id_column)
            if not all(ids) or self._empty(columns) or self._sent_before(cells):
                return None
            texts = [*columns.values(), ids]
            values = [[encode_basestring(text)[1:-1] for text in column] for column in texts]
            values += [[_text_digest(text) for text in column] for column in columns.values()]
            values += [_json_values(cells, name) for name in self.kept]
            places = zip(*(values[at] for at in self.order), strict=True)
            lines = [self.text % place for place in places]
            content = "".join(lines).encode()
        except (KeyError, ValueError):
            return None
        if len(content) > MAX_LINE_BYTES:
            return None
        return RequestLines([row.number for row in found], ids, lines, content)

    def _empty(self, columns: Mapping[str, Sequence[str]]) -> bool:
        """Return whether nothing is filled into a template for one of the rows."""
        for template in self.prompt.templates:
            texts = zip(*(columns[name] for name in template.names), strict=True)
            if not all(map(str.strip, map("".join, texts))):
                return True
        return False

    def _sent_before(self, cells: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether one of the prompts is that of an example."""
        _, template = self.prompt.turns[0]
        return bool(self.sent_before) and not self.sent_before.isdisjoint(
            map(template.render, cells)
        )


def _texts(cells: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return a column as text.

    Raises:
        KeyError: a cell is missing.
        ValueError: a cell is binary, or may be a conversation.
    """
    values = [each[name] for each in cells]
    kinds = {*map(type, values)}
    if list in kinds:
        raise ValueError
    return values if kinds == {str} else [as_text(value) for value in values]


def _json_values(cells: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return a column as JSON.

    Raises:
        KeyError: a cell is missing.
        ValueError: JSON has no such type.
    """
    values = [each[name] for each in cells]
    if not {*map(type, values)} <= _JSON_TYPES:
        raise ValueError
    return [encode_json(as_json(value)) for value in values]


COLUMN_TYPES = "column_types"
"""Metadata key of a request: the types of kept columns that JSON does not have."""
_JSON_TYPES = {str, int, float, bool, type(None)}
_READ: Mapping[str, Callable[[str], Any]] = {
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "time": time.fromisoformat,
    "decimal": Decimal,
    "bytes": str.encode,
    "base64": b64decode,
}
_TYPES = {date: "date", datetime: "datetime", time: "time", Decimal: "decimal"}


def _types(cells: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the types that JSON does not have."""
    named = {
        name: "" if getattr(value, "tzinfo", None) else _TYPES.get(type(value), "")
        for name, value in cells.items()
    }
    for name, value in cells.items():
        if isinstance(value, bytes):
            named[name] = "bytes" if as_words(value).encode() == value else "base64"
    return {name: kind for name, kind in named.items() if kind}


def typed(columns: Mapping[str, Any], types: Any) -> dict[str, Any]:
    """Return kept columns with the values that they had before they became JSON.

    Args:
        types: as in a request's metadata; what does not fit is ignored.
    """
    found = dict(columns)
    for name, kind in types.items() if isinstance(types, dict) else ():
        if kind in _READ and isinstance(found.get(name), str):
            with suppress(ValueError, ArithmeticError):
                found[name] = _READ[kind](found[name])
    return found


CELL_DIGESTS = "cell_digests"
"""Metadata key of a request: a digest of each cell used in its prompt."""


def digests(cells: Mapping[str, Any], columns: Iterable[str]) -> dict[str, str]:
    """Return the digests of some cells, for the metadata of a request.

    Raises:
        BadRowError: a cell is binary.
    """
    found = {}
    for column in columns:
        try:
            found[column] = _digest(cell(cells, column))
        except KeyError:  # a template may have a default for a column
            continue
        except ValueError as error:
            raise BadRowError(f"column {column!r} {error}") from None
    return found


def _digest(value: Any) -> str:
    return _text_digest(as_text(value))


def _text_digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def known_digests(cells: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, str]:
    """Return those digests whose cells, or fields inside cells, exist."""
    known = {}
    for name, digest in digests.items():
        with suppress(KeyError):
            cell(cells, name)
            known[name] = digest
    return known


def changed_cell(cells: Mapping[str, Any], digests: Mapping[str, str]) -> str | None:
    """Return the first column whose cell differs from that of the request.

    Raises:
        ValueError: a cell is binary, so no request was made from it.
        KeyError: a column does not exist.
    """
    differing = (name for name, digest in digests.items() if _digest(cell(cells, name)) != digest)
    return next(differing, None)


def names(given: Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; a single string counts as one name."""
    return (given,) if isinstance(given, str) else tuple(given)
