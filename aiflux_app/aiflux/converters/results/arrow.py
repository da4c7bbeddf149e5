"""The Arrow types of a table of results, and values of these types."""

from __future__ import annotations

import json
from datetime import date, datetime, time
from typing import Any

from aiflux.converters.cells import as_text
from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.parquet import ParquetTable
from aiflux.converters.results.table import BackTable
from aiflux.util.extras import need
from aiflux.util.text import whole_text


def arrow_parquet() -> Any:
    """Return the module that writes Parquet.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    return need("pyarrow.parquet", "parquet", "writing Parquet")


def arrow_types(arrow: Any, table: BackTable) -> dict[str, Any]:
    """Return the type of each column: the source's types, else types that fit all values."""
    kinds = {name: arrow.string() for name in table.header}
    source = table.source_table
    if isinstance(source, ParquetTable):
        kinds |= {shown: source.schema.field(name).type for name, shown in table.columns.items()}
    elif not isinstance(source, DelimitedTable):  # whose values are texts
        seen = table.column_types()
        kinds |= {shown: _fitting(arrow, seen.get(name)) for name, shown in table.columns.items()}
    if table.choice is not None:
        kinds[table.choice] = arrow.int64()
    if table.document is not None:
        number = arrow.int64()
        kinds[table.document] = number if table.choice is not None else arrow.list_(number)
    scored = table.score_type()
    if scored is not None:
        kinds[table.answer] = arrow.float64() if scored is float else arrow.list_(arrow.float64())
    size = table.dimension
    if size is not None and table.answer:
        # pyarrow up to 25 cannot read a Parquet file with a null in a list of fixed size.
        kinds[table.answer] = arrow.list_(arrow.float32(), size if table.complete() else -1)
    seen = table.field_types()
    return kinds | {shown: _fitting(arrow, seen.get(name)) for name, shown in table.fields.items()}


def _fitting(arrow: Any, seen: set[type] | None) -> Any:
    """Return the type for values of some Python types; text where these have none in common."""
    kinds = (seen or set()) - {type(None)}
    single: dict[type, Any] = {
        bool: arrow.bool_(),
        int: arrow.int64(),
        float: arrow.float64(),
        bytes: arrow.binary(),
        date: arrow.date32(),
        datetime: arrow.timestamp("us"),
        time: arrow.time64("us"),
    }
    if len(kinds) == 1:
        return single.get(kinds.pop(), arrow.string())
    return arrow.float64() if kinds == {int, float} else arrow.string()


def cell(arrow: Any, value: Any, kind: Any) -> Any:
    """Return a value of its column's type; ``ParquetTable`` returns some times as text."""
    if arrow.types.is_string(kind) and value is not None:
        return whole_text(as_text(value))
    lists = arrow.types.is_fixed_size_list(kind) or arrow.types.is_list(kind)
    if lists and isinstance(value, str):  # an embedding
        return json.loads(value)
    if arrow.types.is_timestamp(kind) and isinstance(value, str):
        return arrow.scalar(value).cast(kind)
    return value
