"""Convert results back to a table, joined with the columns that the requests came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from aiflux.converters.results.answers import refuse_unfit
from aiflux.converters.results.table import BackOptions, BackSummary, BackTable, Record
from aiflux.converters.results.writers import write_csv, write_jsonl, write_parquet
from aiflux.converters.writer import same_file
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.files import atomic_write

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
