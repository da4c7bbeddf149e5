"""Write results as a DuckDB database, by way of a Parquet file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from aiflux.errors import StorageError
from aiflux.util.extras import need
from aiflux.util.files import temporary_folder

TABLE = "answers"
# Ordinary rows need no more; by default, DuckDB takes what it can get. Each thread needs some, too.
_MEMORY = "32MB"


def database_library() -> Any:
    """Return DuckDB.

    Raises:
        ConfigError: it is not installed.
    """
    return need("duckdb", "duckdb", "writing DuckDB databases")


def write_database(file: IO[bytes], near: Path, write_parquet: Callable[[IO[bytes]], None]) -> None:
    """Write a database with the table ``answers``; its types are those of the Parquet file.

    Args:
        near: a directory for temporary files, on the disk of the result.

    Raises:
        ConfigError: DuckDB is not installed.
        StorageError: the database cannot be written.
    """
    library = database_library()
    with temporary_folder(near) as folder:
        parquet, database = folder / "table.parquet", folder / "table.duckdb"
        with open(parquet, "xb") as rows:
            write_parquet(rows)
        try:
            try:
                _fill(library, parquet, database, {"memory_limit": _MEMORY, "threads": "1"})
            except library.OutOfMemoryException:  # many long answers
                database = folder / "unlimited.duckdb"
                _fill(library, parquet, database, {})
        except library.Error as error:
            raise StorageError(
                f"the database cannot be written: {error}", "free some space, or write Parquet"
            ) from error
        with open(database, "rb") as content:
            shutil.copyfileobj(content, file, 1 << 20)


def _fill(library: Any, parquet: Path, database: Path, config: Mapping[str, str]) -> None:
    with library.connect(str(database), config=config) as connection:
        quoted = str(parquet).replace("'", "''")
        connection.execute(f"CREATE TABLE {TABLE} AS FROM read_parquet('{quoted}')")
