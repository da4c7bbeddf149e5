"""Convert CSV and TSV files, read row by row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from aiflux.converters.encoding import (
    Encoding,
    bad_byte,
    checked_encoding,
    checked_start,
    detect_encoding,
)
from aiflux.converters.request_form import make_form
from aiflux.converters.table import Row, TableOptions, convert_table, names
from aiflux.converters.writer import Progress, Skipped, Summary, reading
from aiflux.errors import InputError
from aiflux.util.text import error_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_DELIMITERS = (",", "\t", ";", "|")
_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
# Quoted names with spaces between them, as R's write.table writes; or one name, and quoted rows.
_SPACED = re.compile(r'("[^"\n]*" )+"[^"\n]*"\r?\n|"[^"\n]*"\r?\n"[^"\n]*" \S')
_SAMPLE = 1 << 16
_ROW_NAMES = "row.names"
_DECLARATION = re.compile(r"sep=(.)\r?\n")  # written and read by Excel
# An unclosed quote swallows the rest of the file; no real cell is this large.
_MAX_CELL = 64 << 20


def csv_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each row of a CSV or TSV file to a request. The first row names the columns.

    Args:
        output_path: written completely or not at all; may be None with ``limit``.
        template: the prompt; ``{column}`` is replaced, and literal braces are doubled.
        id_column: the column with the custom_ids; by default they are ``row-1``, ``row-2``, ...
        keep: columns to copy to the request's metadata (``*`` for all).
        delimiter: detected by default.
        encoding: detected by default.
        skip_bad: skip invalid rows instead of rejecting the file.
        limit: preview: return this number of requests in the summary and write nothing.
        progress: called with the number of bytes read and the total.
        request: options shared by all requests; see
            ``aiflux.converters.request_form.RequestOptions``.

    Raises:
        InputError: the file or some rows are invalid; lists their lines.
        StorageError: the output cannot be written.
    """
    form = make_form(**request)
    table = DelimitedTable.of(Path(input_path), delimiter, encoding)
    options = TableOptions(template, id_column, names(keep), skip_bad, limit, "line")
    return convert_table(
        Path(input_path),
        None if output_path is None else Path(output_path),
        table.columns,
        table.rows(progress),
        form,
        options,
        notes=table.notes,
    )


@dataclass(frozen=True)
class DelimitedTable:
    """A CSV file: its columns and its format.

    Attributes:
        declares: the first line is Excel's ``sep=;`` and the second is the header.
        row_names: the first column has no name in the header, as with R's row names.
    """

    path: Path
    columns: tuple[str, ...]
    delimiter: str
    encoding: Encoding
    declares: bool = False
    row_names: bool = False

    @classmethod
    def of(cls, path: Path, delimiter: str | None, encoding: str | None) -> DelimitedTable:
        """Detect a file's format from its beginning.

        Raises:
            InputError: the file cannot be read or has no valid header.
        """
        checked_start(path, "CSV")
        known = detect_encoding(path) if encoding is None else checked_encoding(encoding)
        sample, whole = _beginning(path, known)
        declared = _DECLARATION.match(sample)
        if delimiter is not None:
            delimiter = _NAMES.get(delimiter, delimiter)
        elif declared is not None:
            delimiter = declared[1]
        elif path.suffix.lower() in (".tsv", ".tab"):
            delimiter = "\t"
        else:
            delimiter = _detect(sample, whole)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise InputError(f"the delimiter {delimiter!r} is not one character", "--delimiter ';'")
        draft = cls(path, (), delimiter, known, declares=declared is not None)
        columns = _header(draft)
        rows = _sample_rows(sample, delimiter)[1 + draft.declares :]
        if _has_row_names(sample, rows if whole else rows[:-1], columns, delimiter):
            return replace(draft, columns=(_ROW_NAMES, *columns), row_names=True)
        return replace(draft, columns=columns)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was detected in the file."""
        name = self.encoding.name.removesuffix("-sig")
        note = f"encoding {name}, delimiter {self.delimiter!r}"
        if self.encoding.origin == "declared":
            note += " (encoding declared in the file)"
        if self.encoding.origin == "guessed":
            note += " (encoding guessed: check with --dry-run or set --encoding)"
        if not self.row_names:
            return (note,)
        named = f"the header does not name the first column, as in R; it is called {_ROW_NAMES!r}"
        return (note, named)

    def rows(self, progress: Progress | None = None) -> Iterator[Row | Skipped]:
        """Yield the rows below the header; invalid rows are yielded as ``Skipped``."""
        size = self.path.stat().st_size
        with reading(self.path), open(self.path, "rb") as file:
            for number, (line, last, cells) in enumerate(self._cells(file)):
                if number % 1000 == 0 and progress is not None:
                    progress(min(file.tell(), size), size)
                if number:
                    yield self._row(number, line, last, cells)
            if progress is not None:
                progress(size, size)

    def _cells(self, file: BinaryIO) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
        """Yield the first line, last line and cells of each row; empty rows are skipped."""
        text = io.TextIOWrapper(
            file, encoding=self.encoding.name, errors=self.encoding.errors, newline=""
        )
        csv.field_size_limit(_MAX_CELL)
        reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        try:
            if self.declares:
                next(reader)
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield line, reader.line_num, error
                    continue
                if cells:
                    yield line, reader.line_num, cells
        except UnicodeError as error:
            raise _not_in(
                self.path, self.encoding, f"after line {reader.line_num}", error
            ) from None
        finally:
            text.detach()

    def _row(
        self, number: int, line: int, last: int, cells: list[str] | csv.Error
    ) -> Row | Skipped:
        place = f"line {line}" if last <= line else f"lines {line} to {last}"
        if isinstance(cells, csv.Error):
            return Skipped(line, place, _malformed(cells))
        if len(cells) != len(self.columns):
            return Skipped(line, place, self._ragged(cells))
        for column, cell in zip(self.columns, cells, strict=True):
            reason = self._damage(cell)
            if reason is not None:
                return Skipped(line, place, f"column {column!r} has {reason}")
        return Row(line, f"row-{number}", dict(zip(self.columns, cells, strict=True)))

    def _damage(self, cell: str) -> str | None:
        """Return what makes a cell invalid: a byte of another encoding, or NUL.

        Engines truncate a prompt at NUL.
        """
        byte = bad_byte(cell)
        if byte is not None:
            name = self.encoding.name.removesuffix("-sig")
            return f"the byte 0x{byte:02x}, which is not valid {name}; set --encoding"
        return "a NUL character: the file is damaged or not text" if "\0" in cell else None

    def _ragged(self, cells: Sequence[str]) -> str:
        count = f"{len(cells)} cell" + ("" if len(cells) == 1 else "s")
        shown = self.delimiter.join(cells)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        problem = f"{count}, but the header has {len(self.columns)}: {shown!r}"
        if len(self.columns) == 1:
            problem += f' (quote a cell that contains {self.delimiter!r}: "...")'
        return problem


def _not_in(path: Path, encoding: Encoding, place: str, error: UnicodeError) -> InputError:
    """Return the error for UTF-16 and UTF-32, where nothing after an invalid byte can be read."""
    return InputError(
        f"{str(path)!r} is not valid {encoding.name} {place}: {error_text(error)}",
        "set --encoding; without a byte order mark, use utf-16-le or utf-16-be",
    )


def _malformed(error: csv.Error) -> str:
    if "field larger" in str(error):
        return f'a cell larger than {_MAX_CELL >> 20} MiB: a quote (") is not closed'
    if "unexpected end" in str(error):
        return 'a quote (") is not closed before the end of the file'
    return (
        f'not valid CSV: {error} (write a quote in a quoted cell as ""; in R: qmethod = "double")'
    )


def _beginning(path: Path, encoding: Encoding) -> tuple[str, bool]:
    """Return the beginning of a file's text, and whether it is the whole file."""
    with (
        reading(path),
        open(path, encoding=encoding.name, errors="replace", newline="") as file,
    ):
        try:
            return file.read(_SAMPLE), not file.read(1)
        except UnicodeError as error:
            raise _not_in(path, encoding, "at the beginning", error) from None


def _detect(sample: str, whole: bool) -> str:
    """Return the delimiter that splits the first rows most evenly and into most cells."""
    if _SPACED.match(sample):
        return " "
    scores = {item: _score(sample, item, whole) for item in _DELIMITERS}
    return max(_DELIMITERS, key=lambda item: scores[item])


def _score(sample: str, delimiter: str, whole: bool) -> tuple[float, int]:
    rows = _sample_rows(sample, delimiter)
    if not whole:
        rows = rows[:-1] or rows
    width = len(rows[0]) if rows else 0
    if width < 2:
        return 0.0, 0
    equal = sum(len(row) == width for row in rows) / len(rows)
    return round(equal, 1), width


def _sample_rows(sample: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    csv.field_size_limit(_MAX_CELL)
    with suppress(csv.Error):  # the rows read so far are enough
        rows.extend(row for row in csv.reader(io.StringIO(sample, ""), delimiter=delimiter) if row)
    return rows


def _header(draft: DelimitedTable) -> tuple[str, ...]:
    path = draft.path
    with reading(path), open(path, "rb") as file:
        first = next(draft._cells(file), None)
    if first is None:
        raise InputError(
            f"the input {str(path)!r} has no header line", "add a line that names the columns"
        )
    line, _, cells = first
    if isinstance(cells, csv.Error):
        raise InputError(
            f"the header of {str(path)!r} (line {line}) is invalid: {_malformed(cells)}"
        )
    for cell in cells:
        reason = draft._damage(cell)
        if reason is not None:
            raise InputError(
                f"the header of {str(path)!r} has {reason}", "check that the file is a text table"
            )
    return unique_columns([name or f"column_{at}" for at, name in enumerate(cells, 1)], path)


def _has_row_names(
    sample: str, rows: Sequence[Sequence[str]], columns: Sequence[str], delimiter: str
) -> bool:
    """Return whether every row starts with an extra cell, R's row name.

    R quotes the header and the names, or numbers the rows; some numbers are missing where rows were
    selected. A trailing delimiter in each row, or a comma in unquoted text, also results in one
    extra cell and must not count.
    """
    first = [row[0] for row in rows]
    numbers = [int(name) for name in first if name.isascii() and name.isdigit()]
    numbered = len(numbers) == len(first) and numbers == sorted(numbers)
    if delimiter == ",":
        numbered = numbered and numbers == list(range(1, len(rows) + 1))
    quoted = re.match(r'"[^\n]*"\r?\n"', sample) is not None
    return (
        bool(rows)
        and _ROW_NAMES not in columns
        and all(len(row) == len(columns) + 1 for row in rows)
        and any(row[-1] for row in rows)
        and (numbered or quoted)
        and len(set(first)) == len(rows)
    )


def unique_columns(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Return column names; raise InputError for duplicates."""
    columns = tuple(names)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(
            f"{str(path)!r} has duplicate column names: {', '.join(map(repr, twice))}",
            "give each column a unique name",
        )
    return columns


def csv_writer(file: Any) -> Any:
    """Return a CSV writer that preserves cells; with CRLF it quotes both CR and LF."""
    return csv.writer(file, lineterminator="\r\n")
