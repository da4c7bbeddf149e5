"""Read tables and queries of SQLite and DuckDB databases, read-only and row by row."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiflux.converters.delimited import unique_columns
from aiflux.converters.encoding import bad_byte
from aiflux.converters.table import Row
from aiflux.converters.writer import Progress, Skipped, reading
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.text import error_text, suggestion

SQLITE = b"SQLite format 3\0"
_DUCK_AT, _DUCK = 8, b"DUCK"
_DUCK_MEMORY = "512MB"
_ROWS = 1024
_SQLITE_ERRORS = (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError)
_TABLES = {
    "SQLite": "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') "
    "AND name NOT LIKE 'sqlite^_%' ESCAPE '^' ORDER BY name",
    "DuckDB": "SELECT CASE table_schema WHEN 'main' THEN table_name "
    "ELSE table_schema || '.' || table_name END FROM information_schema.tables ORDER BY 1",
}


def database_kind(start: bytes) -> str | None:
    """Return ``SQLite`` or ``DuckDB`` if a file starts with these bytes, else None."""
    if start.startswith(SQLITE):
        return "SQLite"
    return "DuckDB" if start[_DUCK_AT:].startswith(_DUCK) else None


class DatabaseTable:
    """A table, a view or the result of a query; a context manager. Nothing is ever written.

    Args:
        table: its name; may be omitted if the database has only one.
        query: one SELECT statement, instead of a table.

    Raises:
        ConfigError: DuckDB is not installed.
        InputError: the database cannot be read, has no such table, or rejects the query.
    """

    unit = "row"

    def __init__(
        self, path: Path, kind: str, table: str | None = None, query: str | None = None
    ) -> None:
        self.path = path
        self._kind = kind
        self.part = "the query"
        self.others: tuple[str, ...] = ()
        # UnicodeDecodeError: of names in a damaged file.
        self._errors: tuple[type[Exception], ...] = _SQLITE_ERRORS
        with reading(path):
            open(path, "rb").close()
        self._connection = self._sqlite() if kind == "SQLite" else self._duckdb()
        try:
            self._sql = query if query is not None else self._select(table)
            self._cursor = self._execute(self._sql, query is not None)
            names = [each[0] for each in self._cursor.description or ()]
            if not names:
                raise InputError(
                    f"the query for {str(path)!r} returns no rows by its kind: {self._sql!r}",
                    "use one SELECT statement",
                )
            self.columns, self._renamed = unique_columns(names)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> DatabaseTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read."""
        return (f"{self._kind}: {self._sql}", *self._renamed)

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row | Skipped]:
        """Yield the rows, each with all columns; a second call executes the query again.

        Raises:
            InputError: the database is damaged, or the query fails.
        """
        first, self._cursor = self._cursor, None
        cursor = self._execute(self._sql, query=True) if first is None else first
        number = 0
        while block := self._fetch(cursor, number):
            for cells in block:
                number += 1
                yield self._row(number, dict(zip(self.columns, cells, strict=True)))
            if progress is not None:
                progress(number, 0)

    def _row(self, number: int, cells: Mapping[str, Any]) -> Row | Skipped:
        for name, value in cells.items():
            if isinstance(value, str) and (reason := _damage(value)):
                return Skipped(number, f"row {number}", f"column {name!r} has {reason}")
        return Row(number, f"row-{number}", cells)

    def _fetch(self, cursor: Any, done: int) -> list[tuple[Any, ...]]:
        try:
            block: list[tuple[Any, ...]] = cursor.fetchmany(_ROWS)
            return block
        except self._errors as error:
            raise InputError(
                f"{str(self.path)!r} cannot be read after row {done}: {_first_line(error)}",
                "check the database and the query",
            ) from error

    def _sqlite(self) -> Any:
        name = f"file:{quote(str(self.path.absolute()))}?mode=ro"
        connection = None
        try:
            connection = sqlite3.connect(name, uri=True)
            connection.text_factory = _decoded
            connection.set_authorizer(_only_read)
            connection.execute("SELECT count(*) FROM sqlite_master")
        except _SQLITE_ERRORS as error:
            if connection is not None:
                connection.close()
            raise self._unreadable(error) from error
        return connection

    def _duckdb(self) -> Any:
        library = need("duckdb", "duckdb", "reading DuckDB databases")
        self._errors = (library.Error, UnicodeDecodeError)
        # Without external access, a query can neither read nor write other files, except in the
        # temporary directory; so that stays where it is, next to the database.
        # By default, its cache would take most of the machine's memory.
        config = {
            "enable_external_access": "false",
            "lock_configuration": "true",
            "memory_limit": _DUCK_MEMORY,
        }
        try:
            return library.connect(str(self.path), read_only=True, config=config)
        except self._errors as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(
            f"{str(self.path)!r} cannot be read as {self._kind}: {_first_line(error)}",
            "check that no program is writing it, or copy it and convert the copy",
        )

    def _select(self, table: str | None) -> str:
        known = [name for (name,) in self._execute(_TABLES[self._kind], query=False).fetchall()]
        if table is None and len(known) != 1:
            listed = ", ".join(known) or "none"
            raise InputError(
                f"{str(self.path)!r} has {len(known)} tables: {listed}",
                "choose one with --table NAME, or use --query 'SELECT ...'",
            )
        name = known[0] if table is None else table
        if name not in known:
            raise InputError(f"{str(self.path)!r} has no table {name!r}", suggestion(name, known))
        self.part = f"the table {name!r}"
        self.others = tuple(each for each in known if each != name)
        parts = name.split(".") if self._kind == "DuckDB" else [name]
        quoted = ".".join('"' + part.replace('"', '""') + '"' for part in parts)
        return f"SELECT * FROM {quoted}"  # noqa: S608 - the name is one of the database, quoted

    def _execute(self, sql: str, query: bool) -> Any:
        try:
            return self._connection.cursor().execute(sql)
        except self._errors as error:
            if not query:
                raise self._unreadable(error) from error
            raise InputError(
                f"the query for {str(self.path)!r} failed: {_first_line(error)}",
                "correct it; a query can only read this database",
            ) from error


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _damage(text: str) -> str | None:
    byte = bad_byte(text)
    if byte is not None:
        return f"the byte 0x{byte:02x}, which is not valid UTF-8"
    return "a NUL character" if "\0" in text else None


_READ = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}


def _only_read(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _READ else sqlite3.SQLITE_DENY


def _first_line(error: Exception) -> str:
    return (error_text(error).strip() or type(error).__name__).splitlines()[0]
