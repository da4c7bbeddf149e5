"""Convert table rows to requests; shared by all kinds of tables."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from aiflux.converters.cells import BadRowError, as_json, as_text, as_words, cell
from aiflux.converters.prompt import Prompt
from aiflux.converters.request_form import RequestDraft, RequestForm
from aiflux.converters.template import check_columns, value_text
from aiflux.converters.writer import Conversion, Progress, Skipped, Summary
from aiflux.errors import InputError
from aiflux.util.text import nearest


@dataclass(frozen=True, slots=True)
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
    return job.run(_drafts(rows, table, options))


def _drafts(
    rows: Iterable[Row | Skipped], table: SourceTable, options: TableOptions
) -> Iterator[RequestDraft | Skipped]:
    kept = options.kept(table.columns)
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            yield _draft(row, options.prompt, kept, options.id_column)
        except BadRowError as error:
            yield Skipped(row.number, f"{table.unit} {row.number}", str(error))
        except KeyError as error:  # entries of JSON need not have the same fields
            near = nearest(error.args[0], row.cells)
            meant = "" if near is None else f"; did you mean {near!r}?"
            reason = f"no field {error.args[0]!r}{meant}"
            yield Skipped(row.number, f"{table.unit} {row.number}", reason)


def _draft(row: Row, prompt: Prompt, kept: Sequence[str], id_column: str | None) -> RequestDraft:
    cells = prompt.with_fields(row.cells)
    name = row.name if id_column is None else value_text(cells, id_column)
    metadata: dict[str, Any] = {}
    draft = prompt.draft(row.number, name, cells, metadata)
    metadata[CELL_DIGESTS] = digests(row.cells, prompt.used(row.cells))
    if kept:
        metadata["columns"] = {column: as_json(row.cells[column]) for column in kept}
        types = _types({column: row.cells[column] for column in kept})
        metadata |= {COLUMN_TYPES: types} if types else {}
    return draft


COLUMN_TYPES = "column_types"
"""Metadata key of a request: the types of kept columns that JSON does not have."""
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
    text = as_text(value).encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=6).hexdigest()


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
