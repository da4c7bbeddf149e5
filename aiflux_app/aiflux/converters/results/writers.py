"""Write the results table as CSV, JSON Lines or Parquet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from aiflux.converters.delimited import csv_writer
from aiflux.converters.parquet import ParquetTable
from aiflux.converters.results.table import BackTable, Record
from aiflux.converters.table import as_json, as_text
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.unicode import REPLACEMENT, json_text, whole, whole_text

_ROW_GROUP = 8192


def write_csv(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as CSV."""
    form = _for_excel if table.options.excel else _plain

    def shown(value: Any) -> str:
        return form(as_json(value) if isinstance(value, bytes) else value)

    encoding = "utf-8-sig" if table.options.excel else "utf-8"
    text = io.TextIOWrapper(file, encoding=encoding, newline="")
    writer = csv_writer(text)
    header = table.header
    writer.writerow(map(shown, header))
    for record in records:
        writer.writerow([shown(record.get(name)) for name in header])
    text.flush()
    text.detach()


def _plain(value: Any) -> str:
    """Return a cell as writable text. NUL is replaced: many CSV readers stop at it."""
    return whole_text(as_text(value)).replace("\0", REPLACEMENT)


def _for_excel(value: Any) -> str:
    """Return a cell that no spreadsheet treats as a formula; numbers stay unchanged."""
    text = _plain(value)
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def write_jsonl(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as JSON Lines."""
    for record in records:
        plain = {name: as_json(value) for name, value in record.items()}
        file.write(json_text(whole(plain)).encode() + b"\n")


def write_parquet(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as Parquet, one row group at a time."""
    arrow = need("pyarrow", "parquet", "writing Parquet")
    library = need("pyarrow.parquet", "parquet", "writing Parquet")
    schema = _arrow_schema(arrow, table)
    kinds = {item.name: item.type for item in schema}
    try:
        with library.ParquetWriter(file, schema) as writer:
            while batch := list(islice(records, _ROW_GROUP)):
                rows = [
                    {name: _cell(arrow, row[name], kinds[name]) for name in row} for row in batch
                ]
                writer.write_table(arrow.Table.from_pylist(rows, schema))
    except (arrow.ArrowException, OverflowError) as error:
        raise InputError(
            f"a value cannot be stored in Parquet: {error}", "use `aiflux results to-jsonl`"
        ) from error


def _cell(arrow: Any, value: Any, kind: Any) -> Any:
    """Return a value of its column's type; ``ParquetTable`` returns some times as text."""
    if arrow.types.is_string(kind) and value is not None:
        return whole_text(as_text(value))
    if arrow.types.is_timestamp(kind) and isinstance(value, str):
        return arrow.scalar(value).cast(kind)
    return value


def _arrow_schema(arrow: Any, table: BackTable) -> Any:
    """Return the table's schema: the source's types, else types that fit all values."""
    source = None if table.source is None else table.source.table
    own = source.schema if isinstance(source, ParquetTable) else None
    kinds = {name: arrow.string() for name in table.header}
    for name, shown in table.columns.items():
        if own is not None:
            kinds[shown] = own.field(name).type
        else:
            kinds[shown] = _arrow_type(arrow, table.seen.columns.get(name, set()))
    if table.options.json_fields == ():
        for name, shown in table.fields.items():
            kinds[shown] = _arrow_type(arrow, table.seen.fields.get(name, set()))
    return arrow.schema([arrow.field(name, kind) for name, kind in kinds.items()])


def _arrow_type(arrow: Any, seen: set[type]) -> Any:
    kinds = seen - {type(None)}
    if kinds == {bool}:
        return arrow.bool_()
    if kinds == {int}:
        return arrow.int64()
    if kinds and kinds <= {int, float}:
        return arrow.float64()
    return arrow.string()
