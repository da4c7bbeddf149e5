"""Convert results back to a table, joined with the columns that the requests came from."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

from aiflux.converters.delimited import csv_writer
from aiflux.converters.parquet import ParquetTable
from aiflux.converters.results.answers import refuse_unfit
from aiflux.converters.results.table import BackOptions, BackSummary, BackTable, Record
from aiflux.converters.table import as_json, as_text
from aiflux.converters.writer import same_file
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.files import atomic_write
from aiflux.util.process_limits import exhausted
from aiflux.util.text import REPLACEMENT, json_text, whole, whole_text

__all__ = [
    "BackOptions", "BackSummary", "results_to_csv", "results_to_jsonl", "results_to_parquet",
]  # fmt: skip

Writer = Callable[[IO[bytes], BackTable, Iterator[Record]], None]


def results_to_csv(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as CSV: custom_id, the source's columns, answer, error and JSON fields.

    Args:
        output: the run's output, ``.json`` or ``.jsonl``.
        target: written completely or not at all.

    Raises:
        InputError: the output or source cannot be read, or they share no custom_id.
        StorageError: the target cannot be written.
    """
    return _write(output, target, options, write_csv)


def results_to_jsonl(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as JSON Lines; see ``results_to_csv``."""
    return _write(output, target, options, write_jsonl)


def results_to_parquet(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as Parquet, with the source's types; see ``results_to_csv``.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    need("pyarrow.parquet", "parquet", "writing Parquet")
    return _write(output, target, options, write_parquet)


def _write(
    output: Path | str, target: Path | str, options: BackOptions | None, writer: Writer
) -> BackSummary:
    output, target = Path(output), Path(target)
    refuse_unfit(output)
    _refuse_same(target, output, options.source if options else None)
    with ExitStack() as stack:
        table = BackTable(output, options or BackOptions(), stack)
        with atomic_write(target) as file:
            writer(file, table, table.records(target))
    table.summary.absent = tuple(name for name in table.fields if name not in table.met)
    return table.summary


def _refuse_same(target: Path, *others: Path | str | None) -> None:
    for other in (Path(name) for name in others if name is not None):
        if same_file(target, other):
            raise InputError(f"{target} is also an input", "use another --output")


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
        raise exhausted(error) or InputError(
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
