"""Open a table of any kind, recognized by its content, and convert its rows to requests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from aiflux.converters.database import DatabaseTable, database_kind
from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.parquet import ParquetTable, is_columnar
from aiflux.converters.prompt import prompt_and_form
from aiflux.converters.request_form import make_form
from aiflux.converters.table import SourceTable, TableOptions, names, requests_of_table
from aiflux.converters.template import PromptTemplate
from aiflux.converters.workbook import WorkbookTable
from aiflux.converters.writer import Progress, Summary, reading
from aiflux.errors import InputError, UsageError
from aiflux.util.compression import plain_name
from aiflux.util.files import is_pattern

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_START = 16
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
_JSON = (".json", ".jsonl", ".ndjson")


def table_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | Path | PromptTemplate | None = None,
    table: str | None = None,
    query: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each row of a table to a request; the content decides how it is read.

    A table is a sheet of a workbook, a table or query of a SQLite or DuckDB database, a Parquet,
    Arrow or Feather file, a directory or pattern of such files, a dataset saved by Hugging Face's
    ``save_to_disk``, or a CSV file.

    Args:
        table: name of the sheet, or of the table in a database.
        query: a SELECT statement for a database, instead of ``table``.

    The other arguments are the same as for ``csv_to_jsonl``.

    Raises:
        ConfigError: a library is not installed.
        UsageError: ``table`` or ``query`` do not apply.
        InputError: the file, a column or some rows are invalid.
        StorageError: the output cannot be written.
    """
    prompt, form = prompt_and_form(template, make_form(**request))
    with ExitStack() as stack:
        source = open_table(Path(input_path), stack, table, query)
        options = TableOptions(prompt, id_column, names(keep), skip_bad, limit)
        output = None if output_path is None else Path(output_path)
        return requests_of_table(source, output, form, options, progress)


def open_table(
    path: Path, stack: ExitStack, table: str | None = None, query: str | None = None
) -> SourceTable:
    """Open a table of any kind; see ``table_to_jsonl``.

    Args:
        stack: closes the table.

    Raises:
        ConfigError, UsageError, InputError: see ``table_to_jsonl``.
    """
    if table is not None and query is not None:
        raise UsageError("--table and --query cannot be combined", "use one of them")
    start = _start(path)
    kind = database_kind(start)
    if kind is not None:
        return stack.enter_context(DatabaseTable(path, kind, table, query))
    if query is not None:
        raise UsageError(f"{str(path)!r} is not a database", "remove --query")
    if start.startswith(_WORKBOOKS):
        return stack.enter_context(WorkbookTable(path, table))
    if table is not None:
        raise UsageError(f"{str(path)!r} has only one table", "remove --table")
    if start == b"" or is_columnar(start):
        return ParquetTable(path)
    if plain_name(path).suffix.lower() in _JSON:
        raise InputError(f"{str(path)!r} is a JSON file", "use `aiflux convert json`")
    return DelimitedTable.of(path, None, None)


def _start(path: Path) -> bytes:
    """Return the first bytes of a file; nothing for a directory or a pattern."""
    with reading(path):
        if path.is_dir() or is_pattern(path):
            return b""
        with open(path, "rb") as file:
            start = file.read(_START)
    if not start:
        raise InputError(f"the input {str(path)!r} is empty", "check the path")
    return start
