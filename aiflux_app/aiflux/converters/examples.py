"""Read examples (few-shot prompts) from a table."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from aiflux.converters.cells import as_json
from aiflux.converters.request_form import MAX_EXAMPLES
from aiflux.converters.source import SUFFIXES, kind_of, open_source, readable_again
from aiflux.converters.writer import Skipped
from aiflux.errors import InputError
from aiflux.util.files import expanded


def read_examples(path: Path | str) -> list[dict[str, Any]]:
    """Return the rows of a table, for the option ``examples`` of a converter.

    Args:
        path: a CSV, JSON, JSON Lines or Parquet file, a workbook or a database with one table.

    Raises:
        ConfigError: a library is not installed.
        InputError: the file cannot be read, has an invalid row, or none, or too many.
    """
    path = expanded(path)
    kind = kind_of(path)
    if kind is None or not readable_again(kind):
        known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise InputError(
            f"the examples {str(path)!r} are not a table", f"use a file that ends in {known}"
        )
    with ExitStack() as stack:
        rows = [*islice(open_source(path, kind, {}, stack).rows(), MAX_EXAMPLES + 1)]
    for row in rows:
        if isinstance(row, Skipped):
            raise InputError(f"the examples {str(path)!r} are invalid at {row}", "correct them")
    if not 0 < len(rows) <= MAX_EXAMPLES:
        raise InputError(
            f"the examples {str(path)!r} have {len(rows) and f'more than {MAX_EXAMPLES}'} rows",
            "use a file with a few rows, each with its answer: each request has all of them",
        )
    return [as_json(dict(row.cells)) for row in rows if not isinstance(row, Skipped)]
