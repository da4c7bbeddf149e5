"""Write tables whose rows are those of the source byte for byte, with columns added at the end."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from aiflux.converters.cells import as_json, as_text
from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.json_records import JsonTable
from aiflux.converters.parquet import ParquetTable
from aiflux.converters.results.arrow import arrow_parquet, arrow_types, cell
from aiflux.converters.results.table import BackTable, Record
from aiflux.converters.table import Row, SourceTable
from aiflux.util.compression import PlainFile, plain_name
from aiflux.util.extras import need
from aiflux.util.text import REPLACEMENT, json_text, whole, whole_text

Pairs = Iterator[tuple[Row, Record]]
Writer = Callable[[IO[bytes], BackTable, Pairs], None]
_ROW_GROUP = 1 << 17
_UNICODE = "utf-8-sig"
_BIG_ENDIAN = {codecs.BOM_UTF16_BE: "utf-16-be", codecs.BOM_UTF32_BE: "utf-32-be"}


class UnfitEncodingError(Exception):
    """An answer has a character that the source's encoding lacks."""


def verbatim_writer(table: SourceTable | None, target: Path, *, once: bool) -> Writer | None:
    """Return the writer for a source and a target of the same form; None if these differ.

    Args:
        once: the table has each row of the source once.
    """
    suffix = target.suffix.lower()
    if isinstance(table, DelimitedTable) and not table.filtered:
        usual = {".csv": ",", ".tsv": "\t"}.get(suffix)
        fits = suffix == plain_name(table.path).suffix.lower() or table.delimiter == usual
        return write_delimited if fits else None
    if isinstance(table, JsonTable):
        return {".json": write_json, ".jsonl": write_lines}.get(suffix)
    if isinstance(table, ParquetTable) and table.single and suffix == ".parquet" and once:
        return write_parquet
    return None


# --- CSV --------------------------------------------------------------------------------------


def write_delimited(file: IO[bytes], table: BackTable, pairs: Pairs) -> None:
    """Write rows in the encoding, with the delimiter, quotes and line ends of the source.

    Raises:
        UnfitEncodingError: an answer has a character that the encoding lacks.
    """
    source = cast(DelimitedTable, table.source_table)
    header = source.header_text()
    quoted = header.lstrip("\n\r").partition("\n")[2 if source.declares else 0].startswith('"')
    cell = _Cells(source.delimiter, quoted)
    names = table.added
    try:
        encoder = _encoder(source, table.options.unicode)
        file.write(encoder(_extended(header, cell, dict(zip(names, names, strict=True)))))
        for row, added in pairs:
            file.write(encoder(_extended(row.raw, cell, added)))
    except UnicodeEncodeError as error:
        raise UnfitEncodingError(error.object[error.start]) from None


class _Cells:
    """Renders cells as the source does: always in quotes, or only where they are needed."""

    def __init__(self, delimiter: str, quoted: bool) -> None:
        self.delimiter = delimiter
        self._special = re.compile(f'[{re.escape(delimiter)}"\r\n]')
        self._quoted = quoted

    def render(self, value: Any) -> str:
        # A space at the end of a line is no sign of an empty cell.
        if value is None and self.delimiter != " ":
            return ""
        text = whole_text(as_text(as_json(value))).replace("\0", REPLACEMENT)
        if self._quoted or self._special.search(text) or (not text and self.delimiter == " "):
            return f'"{text.replace(chr(34), 2 * chr(34))}"'
        return text


def _extended(raw: str, cells: _Cells, added: Mapping[str, Any]) -> str:
    """Return the text of a row with further cells before its line ending."""
    body = raw.rstrip("\r\n")
    more = (f"{cells.delimiter}{cells.render(value)}" for value in added.values())
    return f"{body}{''.join(more)}{raw[len(body) :]}"


def _encoder(source: DelimitedTable, unicode: bool) -> Callable[[str], bytes]:
    """Return a function that encodes successive texts; the first gets the byte order mark."""
    if unicode:
        return codecs.getincrementalencoder(_UNICODE)().encode
    name = source.encoding.name
    with PlainFile(source.path) as file:
        start = file.read(4)
    marked = not name.startswith("utf-8") or start.startswith(codecs.BOM_UTF8)
    if name in ("utf-16", "utf-32"):
        width = 2 if name == "utf-16" else 4
        name = _BIG_ENDIAN.get(start[:width], name)
        if name.endswith("-be"):
            big = codecs.getincrementalencoder(name)()
            mark = ["\ufeff"]
            return lambda text: big.encode((mark.pop() if mark else "") + text)
    name = name if marked else "utf-8"
    # "surrogateescape" would write half of a character; such rows are not read.
    return codecs.getincrementalencoder(name)().encode


# --- JSON -------------------------------------------------------------------------------------


def write_lines(file: IO[bytes], table: BackTable, pairs: Pairs) -> None:
    """Write entries as JSON Lines."""
    for row, added in pairs:
        file.write(_entry(row, added).encode() + b"\n")


def write_json(file: IO[bytes], table: BackTable, pairs: Pairs) -> None:
    """Write entries as a JSON array, one a line."""
    write_array(file, (_entry(row, added) for row, added in pairs))


def write_array(file: IO[bytes], entries: Iterator[str]) -> None:
    """Write a JSON array, an entry a line."""
    separator = b"[\n"
    for entry in entries:
        file.write(separator + entry.encode())
        separator = b",\n"
    file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def json_object(record: Record) -> str:
    """Return a record as JSON."""
    return json_text(whole({name: as_json(value) for name, value in record.items()}))


def _entry(row: Row, added: Record) -> str:
    """Return an entry of the source with further fields; its text stays as it is."""
    text: str = row.raw.strip()
    if "\n" in text or "\r" in text:  # between tokens: a string has them as escapes
        text = text.replace("\r", " ").replace("\n", " ")
    more = json_object(added)[1:]
    if not text.startswith("{"):
        (name,) = row.cells
        text = f"{{{json_text(name)}: {text}}}"
    body = text[:-1].rstrip()
    return body + ("" if body == "{" else ", ") + more


# --- Parquet ----------------------------------------------------------------------------------


def write_parquet(file: IO[bytes], table: BackTable, pairs: Pairs) -> None:
    """Write the source's columns as Arrow has them, with its schema and metadata."""
    arrow, library = need("pyarrow", "parquet", "writing Parquet"), arrow_parquet()
    kinds = arrow_types(arrow, table)
    schema = cast(ParquetTable, table.source_table).schema
    for name in table.added:
        schema = schema.append(arrow.field(name, kinds[name]))
    with library.ParquetWriter(file, schema) as writer:
        waiting: list[Any] = []
        for batch in _batches(arrow, schema, table.added, pairs):
            waiting.append(batch)
            if sum(each.num_rows for each in waiting) >= _ROW_GROUP:
                _flush(arrow, writer, waiting)
        _flush(arrow, writer, waiting)


def _flush(arrow: Any, writer: Any, waiting: list[Any]) -> None:
    if waiting:
        # Batches can have dictionaries of their own, and a row group has only one.
        writer.write_table(arrow.Table.from_batches(waiting).unify_dictionaries())
        waiting.clear()


def _batches(arrow: Any, schema: Any, names: list[str], pairs: Pairs) -> Iterator[Any]:
    """Yield the batches that the rows are in, with the columns that are added."""
    current: Any = None
    rows: list[Record] = []
    for row, added in pairs:
        if row.raw is not current and current is not None:
            yield _batch(arrow, schema, names, current, rows)
            rows = []
        current = row.raw
        rows.append(added)
    if current is not None:
        yield _batch(arrow, schema, names, current, rows)


def _batch(arrow: Any, schema: Any, names: list[str], batch: Any, rows: list[Record]) -> Any:
    columns = [*batch.columns]
    for name in names:
        kind = schema.field(name).type
        columns.append(arrow.array([cell(arrow, row.get(name), kind) for row in rows], kind))
    return arrow.RecordBatch.from_arrays(columns, schema=schema)
