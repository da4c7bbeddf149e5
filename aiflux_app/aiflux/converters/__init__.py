"""Convert tables, folders, JSON and images to requests, and results back to tables.

Each function is imported on first use, so importing this package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiflux.converters.delimited import csv_to_jsonl
    from aiflux.converters.directory import directory_to_jsonl
    from aiflux.converters.examples import read_examples
    from aiflux.converters.images import images_to_jsonl
    from aiflux.converters.json_records import json_to_jsonl
    from aiflux.converters.parquet import parquet_to_jsonl
    from aiflux.converters.results import (
        results_to_arrow,
        results_to_csv,
        results_to_duckdb,
        results_to_jsonl,
        results_to_npy,
        results_to_parquet,
        results_to_table,
        results_to_xlsx,
    )
    from aiflux.converters.table_file import table_to_jsonl

_HOMES = {
    "csv_to_jsonl": "delimited",
    "directory_to_jsonl": "directory",
    "images_to_jsonl": "images",
    "json_to_jsonl": "json_records",
    "parquet_to_jsonl": "parquet",
    "read_examples": "examples",
    "results_to_arrow": "results",
    "results_to_csv": "results",
    "results_to_duckdb": "results",
    "results_to_jsonl": "results",
    "results_to_npy": "results",
    "results_to_parquet": "results",
    "results_to_table": "results",
    "results_to_xlsx": "results",
    "table_to_jsonl": "table_file",
}

__all__ = [
    "csv_to_jsonl",
    "directory_to_jsonl",
    "images_to_jsonl",
    "json_to_jsonl",
    "parquet_to_jsonl",
    "read_examples",
    "results_to_arrow",
    "results_to_csv",
    "results_to_duckdb",
    "results_to_jsonl",
    "results_to_npy",
    "results_to_parquet",
    "results_to_table",
    "results_to_xlsx",
    "table_to_jsonl",
]


def __getattr__(name: str) -> Any:
    """Import a converter on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
