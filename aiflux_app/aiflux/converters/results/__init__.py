"""Convert results back to a table, joined with the columns that the requests came from."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aiflux.converters.cells import as_json, as_text
from aiflux.converters.delimited import csv_writer
from aiflux.converters.results.answers import refuse_unfit
from aiflux.converters.results.arrow import arrow_parquet, arrow_types, cell
from aiflux.converters.results.database import database_library, write_database
from aiflux.converters.results.table import BackOptions, BackSummary, BackTable, Record
from aiflux.converters.results.vectors import write_npy
from aiflux.converters.results.verbatim import (
    UnfitEncodingError,
    json_object,
    verbatim_writer,
    write_array,
)
from aiflux.converters.results.workbook import workbook_library, write_xlsx
from aiflux.converters.writer import refuse_other_form
from aiflux.errors import InputError, UsageError
from aiflux.util.extras import need
from aiflux.util.files import atomic_write, same_file
from aiflux.util.process_limits import exhausted
from aiflux.util.text import REPLACEMENT, whole_text

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "BackOptions",
    "BackSummary",
    "results_to_arrow",
    "results_to_csv",
    "results_to_duckdb",
    "results_to_jsonl",
    "results_to_npy",
    "results_to_parquet",
    "results_to_table",
    "results_to_xlsx",
]  # fmt: skip

Writer = Callable[[IO[bytes], BackTable, Iterator[Record]], None]


def results_to_csv(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as CSV: custom_id, the source's columns, answer, error and JSON fields.

    Args:
        output: the run's output, ``.json`` or ``.jsonl``.
        target: written completely or not at all; with tabs if its name ends in ``.tsv``.

    Raises:
        InputError: the output or source cannot be read, or they share no custom_id.
        UsageError: the target's suffix names another form.
        StorageError: the target cannot be written.
    """
    tabs = Path(target).suffix.lower() == ".tsv"
    return _write(
        output, target, options, FORMS[".tsv"] if tabs else write_csv, suffixes=(".csv", ".tsv")
    )


def results_to_jsonl(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as JSON Lines; see ``results_to_csv``."""
    return _write(output, target, options, write_jsonl, suffixes=(".jsonl", ".ndjson"))


def results_to_parquet(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as Parquet, with the source's types; see ``results_to_csv``.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    refuse_missing(".parquet")
    return _write(output, target, options, write_parquet, suffixes=(".parquet",))


def results_to_xlsx(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as an Excel workbook; see ``results_to_csv``.

    Raises:
        ConfigError: XlsxWriter is not installed.
    """
    refuse_missing(".xlsx")
    return _write(output, target, options, write_xlsx, suffixes=(".xlsx",))


def results_to_duckdb(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results as the table ``answers`` of a DuckDB database; see ``results_to_csv``.

    Raises:
        ConfigError: duckdb or pyarrow is not installed.
    """
    refuse_missing(".duckdb")
    return _write(output, target, options, write_duckdb, suffixes=(".duckdb",))


def results_to_npy(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write embeddings as a NumPy array of 32-bit floats, a row for each; see ``results_to_csv``.

    A row whose request failed is NaN.
    """
    return _write(output, target, options, write_npy, suffixes=(".npy",))


def results_to_table(
    output: Path | str, target: Path | str, options: BackOptions | None = None
) -> BackSummary:
    """Write results in the form that the target's suffix names; see ``results_to_csv``.

    If the source has the same form, its rows are written as they are, with columns added at their
    end: CSV with the same quotes, delimiter, line ends and encoding, JSON with the same values,
    Parquet with the same schema. Without ``custom_ids``, no other column is added.

    Raises:
        UsageError: the suffix is unknown.
        ConfigError: a library is missing.
    """
    target = Path(target)
    writer = FORMS[table_form(target)]
    options = options or BackOptions()
    try:
        return _write(output, target, options, writer, verbatim=not options.custom_ids)
    except UnfitEncodingError as error:
        options = replace(options, unicode=True)
        summary = _write(output, target, options, writer, verbatim=True)
        summary.notes += (
            f"written in UTF-8 with a byte order mark: the source's encoding has no {str(error)!r}",
        )
        return summary


def results_to_arrow(output: Path | str, options: BackOptions | None = None) -> pyarrow.Table:
    """Return results as an Arrow table in memory, as ``results_to_parquet`` writes them.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: see ``results_to_csv``.
    """
    arrow = need("pyarrow", "parquet", "an Arrow table")
    output = Path(output)
    refuse_unfit(output)
    with ExitStack() as stack, _storable(arrow):
        table = BackTable(output, options or BackOptions(), stack)
        schema = _arrow_schema(arrow, table)
        parts = [*_arrow_tables(arrow, schema, table.records(None))]
        return arrow.concat_tables([schema.empty_table(), *parts])


def table_form(target: Path) -> str:
    """Return the suffix of a table, which names its form.

    Raises:
        UsageError: no such table can be written.
        ConfigError: a library that it needs is not installed.
    """
    suffix = target.suffix.lower()
    if suffix not in FORMS:
        raise UsageError(
            f"the output {str(target)!r} has no form that AI-Flux can write",
            f"end its name with one of {', '.join(FORMS)}",
        )
    refuse_missing(suffix)
    return suffix


_LIBRARIES: Mapping[str, tuple[Callable[[], Any], ...]] = {
    ".parquet": (arrow_parquet,),
    ".xlsx": (workbook_library,),
    ".duckdb": (database_library, arrow_parquet),
}


def refuse_missing(suffix: str) -> None:
    """Refuse a form of tables that cannot be written here; before any answer is asked for.

    Raises:
        ConfigError: a library that it needs is not installed.
    """
    for load in _LIBRARIES.get(suffix, ()):
        load()


def _write(
    output: Path | str,
    target: Path | str,
    options: BackOptions | None,
    writer: Writer,
    *,
    suffixes: Sequence[str] = (),
    verbatim: bool = False,
) -> BackSummary:
    """Write a table.

    Args:
        suffixes: those of its form; none if the form was chosen by the suffix.
    """
    output, target = Path(output), Path(target)
    refuse_unfit(output)
    _refuse_same(target, output, options.source if options else None)
    if suffixes:
        refuse_other_form(target, f"this writes {_NAMES[suffixes[0]]}", suffixes, _COMMANDS)
    with ExitStack() as stack:
        table = BackTable(output, options or BackOptions(), stack, verbatim=verbatim)
        once = table.choice is None and not table.options.only_asked
        own = verbatim_writer(table.source_table, target, once=once) if verbatim else None
        with atomic_write(target) as file:
            if own is None:
                writer(file, table, table.records(target))
            else:
                own(file, table, table.rows(target))
    table.summary.absent = tuple(name for name in table.fields if name not in table.met)
    return table.summary


_NAMES: Mapping[str, str] = {
    ".csv": "CSV",
    ".jsonl": "JSON Lines",
    ".parquet": "Parquet",
    ".xlsx": "an Excel workbook",
    ".duckdb": "a DuckDB database",
    ".npy": "a NumPy array",
}
_COMMANDS: Mapping[str, str] = {
    ".tsv": "aiflux results to-csv",
    ".ndjson": "aiflux results to-jsonl",
    **{suffix: f"aiflux results to-{suffix[1:]}" for suffix in _NAMES},
}


def _refuse_same(target: Path, *others: Path | str | None) -> None:
    for other in (Path(name) for name in others if name is not None):
        if same_file(target, other):
            raise InputError(f"{target} is also an input", "use another --output")


_ROW_GROUP = 8192


def write_csv(
    file: IO[bytes], table: BackTable, records: Iterator[Record], delimiter: str = ","
) -> None:
    """Write rows as CSV."""
    form = _for_excel if table.options.excel else _plain

    def shown(value: Any) -> str:
        if value is None:
            return ""
        return form(as_json(value) if isinstance(value, bytes) else value)

    encoding = "utf-8-sig" if table.options.excel else "utf-8"
    text = io.TextIOWrapper(file, encoding=encoding, newline="")
    writer = csv_writer(text, delimiter)
    header = table.header
    writer.writerow(map(shown, header))
    for record in records:
        writer.writerow([shown(record.get(name)) for name in header])
    text.flush()
    text.detach()


def _plain(value: Any) -> str:
    """Return a cell as writable text. NUL is replaced: many CSV readers stop at it."""
    text = value if isinstance(value, str) else as_text(value)
    if text.isascii() and "\0" not in text:
        return text
    return whole_text(text).replace("\0", REPLACEMENT)


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
    file.writelines(json_object(record).encode() + b"\n" for record in records)


def write_json(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as a JSON array, one a line."""
    write_array(file, map(json_object, records))


def write_parquet(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as Parquet, one row group at a time."""
    arrow, library = need("pyarrow", "parquet", "writing Parquet"), arrow_parquet()
    schema = _arrow_schema(arrow, table)
    with _storable(arrow), library.ParquetWriter(file, schema) as writer:
        for part in _arrow_tables(arrow, schema, records):
            writer.write_table(part)


def _arrow_schema(arrow: Any, table: BackTable) -> Any:
    kinds = arrow_types(arrow, table)
    return arrow.schema([arrow.field(name, kinds[name]) for name in table.header])


def _arrow_tables(arrow: Any, schema: Any, records: Iterator[Record]) -> Iterator[Any]:
    """Yield the rows as Arrow tables of one row group each."""
    kinds = {item.name: item.type for item in schema}
    while batch := list(islice(records, _ROW_GROUP)):
        rows = [{name: cell(arrow, row[name], kinds[name]) for name in row} for row in batch]
        yield arrow.Table.from_pylist(rows, schema)


@contextmanager
def _storable(arrow: Any) -> Iterator[None]:
    """Convert the errors of Arrow.

    Raises:
        InputError: a value cannot be stored.
        StoppedError: there is too little memory, or no thread.
    """
    try:
        yield
    except (arrow.ArrowException, OverflowError) as error:
        raise exhausted(error) or InputError(
            f"a value cannot be stored in Parquet: {error}", "use `aiflux results to-jsonl`"
        ) from error


def write_duckdb(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as the table ``answers`` of a DuckDB database."""
    near = Path(file.name).parent
    arrow = need("pyarrow", "parquet", "writing DuckDB databases")

    def write(parquet: IO[bytes]) -> None:
        write_parquet(parquet, table, records)
        arrow.default_memory_pool().release_unused()  # DuckDB needs it next

    write_database(file, near, write)


FORMS: Mapping[str, Writer] = {
    ".csv": write_csv,
    ".tsv": partial(write_csv, delimiter="\t"),
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".parquet": write_parquet,
    ".xlsx": write_xlsx,
    ".duckdb": write_duckdb,
}
"""How a table is written, by the suffix of its name."""
