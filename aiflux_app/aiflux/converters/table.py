"""Rows of a table become requests: what CSV and Parquet share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.converters.cells import as_json, as_messages, as_text
from aiflux.converters.request_form import RequestDraft, RequestForm
from aiflux.converters.template import Template, check_columns
from aiflux.converters.writer import EMPTY, BadRowError, Conversion, Skipped, Summary


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        number: its line, or its place in the table from 1.
        name: the custom_id that it has without an id column.
        cells: its values by column.
    """

    number: int
    name: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class TableOptions:
    """What is made of a row; ``place`` says what a row's number counts."""

    template: str
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    skip_bad: bool = False
    limit: int | None = None
    place: str = "row"

    def kept(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Return the columns that go into the metadata."""
        return tuple(columns) if "*" in self.keep else self.keep

    def needed(self, columns: Sequence[str]) -> list[str]:
        """Return the columns that have to be read, in the table's order.

        Raises:
            InputError: one is named that is not there.
        """
        template, where = Template(self.template), "the input"
        template.check(columns, where)
        check_columns(self.kept(columns), columns, "--keep", where)
        named = () if self.id_column is None else (self.id_column,)
        check_columns(named, columns, "--id-column", where)
        wanted = {*template.names, *self.kept(columns), *named}
        return [name for name in columns if name in wanted]


def convert_table(
    source: Path,
    output: Path | None,
    columns: Sequence[str],
    rows: Iterable[Row | Skipped],
    form: RequestForm,
    options: TableOptions,
    notes: tuple[str, ...] = (),
) -> Summary:
    """Write a request for every row.

    Raises:
        InputError: columns that are named are not there, or rows cannot be used.
    """
    options.needed(columns)
    job = Conversion(
        source,
        output,
        form,
        place=options.place,
        skip_bad=options.skip_bad,
        limit=options.limit,
        notes=lambda: notes,
        numbered=options.id_column is None,
    )
    return job.run(_drafts(rows, columns, options))


def _drafts(
    rows: Iterable[Row | Skipped], columns: Sequence[str], options: TableOptions
) -> Iterator[RequestDraft | Skipped]:
    template, kept = Template(options.template), options.kept(columns)
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            yield _draft(row, template, kept, options.id_column)
        except BadRowError as error:
            yield Skipped(row.number, f"{options.place} {row.number}", str(error))


def _draft(
    row: Row, template: Template, kept: Sequence[str], id_column: str | None
) -> RequestDraft:
    whole = template.only
    messages = None if whole is None else as_messages(row.cells[whole])
    values = {} if messages else {name: _text(row, name) for name in template.names}
    name = row.name if id_column is None else _text(row, id_column)
    metadata: dict[str, Any] = {}
    if kept:
        metadata["columns"] = {column: as_json(row.cells[column]) for column in kept}
    if messages:
        return RequestDraft(row.number, name, as_json(messages), metadata, messages=True)
    remark = "" if any(map(str.strip, values.values())) else EMPTY
    return RequestDraft(row.number, name, template.render(values), metadata, remark=remark)


def _text(row: Row, column: str) -> str:
    try:
        return as_text(row.cells[column])
    except ValueError as error:
        raise BadRowError(f"column {column!r} {error}") from None
