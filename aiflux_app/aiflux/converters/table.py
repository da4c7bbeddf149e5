"""Convert table rows to requests; shared by CSV and Parquet."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from hashlib import blake2b
from pathlib import Path
from typing import Any

from aiflux.converters.request_form import RequestDraft, RequestForm, Template, check_columns
from aiflux.converters.writer import EMPTY, BadRowError, Conversion, Skipped, Summary


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        number: its line number, or its position in the table from 1.
        name: its default custom_id.
        cells: its values by column.
    """

    number: int
    name: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class TableOptions:
    """How rows are converted; ``place`` is the unit of a row's number."""

    template: str
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    skip_bad: bool = False
    limit: int | None = None
    place: str = "row"

    def kept(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Return the columns to copy to the metadata."""
        return tuple(columns) if "*" in self.keep else self.keep

    def needed(self, columns: Sequence[str]) -> list[str]:
        """Return the columns to read, in the table's order.

        Raises:
            InputError: a named column does not exist.
        """
        template, where = Template(self.template), "the input"
        template.check(columns, where)
        check_columns(self.kept(columns), columns, "--keep", where)
        named = () if self.id_column is None else (self.id_column,)
        check_columns(named, columns, "--id-column", where)
        wanted = {*template.names, *self.kept(columns), *named}
        return [name for name in columns if name in wanted]


def convert_table(
    source: Path,
    output: Path | None,
    columns: Sequence[str],
    rows: Iterable[Row | Skipped],
    form: RequestForm,
    options: TableOptions,
    notes: tuple[str, ...] = (),
) -> Summary:
    """Write a request for each row.

    Raises:
        InputError: named columns do not exist, or rows are invalid.
    """
    options.needed(columns)
    job = Conversion(
        source,
        output,
        form,
        place=options.place,
        skip_bad=options.skip_bad,
        limit=options.limit,
        notes=lambda: notes,
        numbered=options.id_column is None,
    )
    return job.run(_drafts(rows, columns, options))


def _drafts(
    rows: Iterable[Row | Skipped], columns: Sequence[str], options: TableOptions
) -> Iterator[RequestDraft | Skipped]:
    template, kept = Template(options.template), options.kept(columns)
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        try:
            yield _draft(row, template, kept, options.id_column)
        except BadRowError as error:
            yield Skipped(row.number, f"{options.place} {row.number}", str(error))


def _draft(
    row: Row, template: Template, kept: Sequence[str], id_column: str | None
) -> RequestDraft:
    whole = template.only
    messages = None if whole is None else as_messages(row.cells[whole])
    values = {} if messages else {name: _text(row, name) for name in template.names}
    name = row.name if id_column is None else _text(row, id_column)
    metadata: dict[str, Any] = {CELL_DIGESTS: _digests(row.cells, template.names)}
    if kept:
        metadata["columns"] = {column: as_json(row.cells[column]) for column in kept}
    if messages:
        return RequestDraft(row.number, name, as_json(messages), metadata, messages=True)
    remark = "" if any(map(str.strip, values.values())) else EMPTY
    return RequestDraft(row.number, name, template.render(values), metadata, remark=remark)


def _text(row: Row, column: str) -> str:
    try:
        return as_text(row.cells[column])
    except ValueError as error:
        raise BadRowError(f"column {column!r} {error}") from None


CELL_DIGESTS = "cell_digests"
"""Metadata key of a request: a digest of each cell used in its prompt."""


def _digests(cells: Mapping[str, Any], columns: Iterable[str]) -> dict[str, str]:
    return {column: _digest(cells[column]) for column in columns}


def _digest(cell: Any) -> str:
    text = as_text(cell).encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=6).hexdigest()


def changed_cell(cells: Mapping[str, Any], digests: Mapping[str, str]) -> str | None:
    """Return the first column whose cell differs from that of the request.

    Raises:
        ValueError: a cell is binary, so no request was made from it.
        KeyError: a column does not exist.
    """
    differing = (name for name, digest in digests.items() if _digest(cells[name]) != digest)
    return next(differing, None)


def names(given: Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; a single string counts as one name."""
    return (given,) if isinstance(given, str) else tuple(given)


_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant",
}  # fmt: skip


def as_messages(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of messages (role and content, or ShareGPT form), else None."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return None
    if all(isinstance(turn.get("role"), str) for turn in value):
        # In Parquet, every message has the union of all fields.
        return [
            {name: item for name, item in turn.items() if item is not None or name == "content"}
            for turn in value
        ]
    if all({"from", "value"} <= turn.keys() and turn["from"] in _SPEAKERS for turn in value):
        return [{"role": _SPEAKERS[turn["from"]], "content": turn["value"]} for turn in value]
    return None


def as_text(value: Any) -> str:
    """Return a value as prompt text: strings unchanged, null as "", the rest as JSON.

    Raises:
        ValueError: the value is binary.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"contains {len(value)} bytes of binary data") from None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    plain = as_json(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def as_json(value: Any) -> Any:
    """Return a value as JSON types: dates in ISO form, types without a JSON equivalent as text.

    Binary data becomes Base64, as in most JSON writers.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return _as_words(value)


def _as_words(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return b64encode(value).decode("ascii")
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)
