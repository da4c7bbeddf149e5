"""The kinds of input: which kind a path is, and how its rows are read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.json_records import JsonTable
from aiflux.converters.parquet import ParquetTable
from aiflux.converters.table import SourceTable
from aiflux.converters.table_file import open_table
from aiflux.converters.writer import reading
from aiflux.util.compression import plain_name

DIRECTORY = "dir"
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "csv": (".csv", ".tsv", ".tab", ".txt"),
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq", ".arrow", ".feather"),
    "table": (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".db", ".sqlite", ".sqlite3", ".duckdb"),
}
"""The suffixes of each kind of file; a kind has the name of its `aiflux convert` command."""
Options = Mapping[str, Any]
"""Options of a kind's reader, such as ``delimiter`` and ``encoding``, by name."""


def _delimited(path: Path, options: Options, _: ExitStack) -> SourceTable:
    return DelimitedTable.of(
        path,
        options.get("delimiter"),
        options.get("encoding"),
        header=not options.get("no_header"),
        skip_lines=options.get("skip_lines") or 0,
        comment=options.get("comment"),
    )


def _parquet(path: Path, _options: Options, _stack: ExitStack) -> SourceTable:
    return ParquetTable(path)


def _table(path: Path, options: Options, stack: ExitStack) -> SourceTable:
    return open_table(path, stack, options.get("table"), options.get("query"))


def _json(path: Path, _options: Options, _stack: ExitStack) -> SourceTable:
    return JsonTable(path)


_READERS: Mapping[str, Callable[[Path, Options, ExitStack], SourceTable]] = {
    "csv": _delimited,
    "json": _json,
    "parquet": _parquet,
    "table": _table,
}

READER_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "csv": ("delimiter", "encoding"),
    "table": ("table", "query"),
}
"""The options of a kind's reader that a file of steps can have."""


def write_ahead_log(path: Path) -> Path | None:
    """Return the file with what SQLite has not written to a database yet; None if there is none."""
    log = path.with_name(f"{path.name}-wal")
    return log if log.is_file() and log.stat().st_size else None


def size_and_time(path: Path) -> tuple[int, int]:
    """Return size and modification time of an input, by which a change is seen.

    Raises:
        InputError: it cannot be examined.
    """
    with reading(path):
        found = path.stat()
    return found.st_size, found.st_mtime_ns


def kind_of(path: Path) -> str | None:
    """Return the kind of an input by its name; None if it is unknown."""
    if path.is_dir():
        return DIRECTORY
    suffix = plain_name(path).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def readable_again(kind: str) -> bool:
    """Return whether a kind of input is a table whose rows can be read again."""
    return kind in _READERS


def open_source(path: Path, kind: str, options: Options, stack: ExitStack) -> SourceTable:
    """Open a table from which requests were made.

    Args:
        kind: one that is ``readable_again``.
        stack: closes the table.

    Raises:
        ConfigError: a library is missing.
        InputError: the file cannot be read.
    """
    return _READERS[kind](path, options, stack)
