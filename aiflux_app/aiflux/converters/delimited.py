"""CSV and TSV: tables of text, read row by row."""

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

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_DELIMITERS = (",", "\t", ";", "|")
_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
_SAMPLE = 1 << 16
_ROW_NAMES = "row.names"
_DECLARATION = re.compile(r"sep=(.)\r?\n")  # which Excel writes and reads
# A quote that is never closed takes in the rest of the file: this much is too much for a cell.
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
    """Make a request of every row of a CSV or TSV file whose first row names the columns.

    Args:
        output_path: replaced whole or not at all; None with ``limit``.
        template: the prompt; ``{column}`` is filled in, a literal brace is doubled.
        id_column: its cells become the custom_ids; else these are ``row-1``, ``row-2``, ...
        keep: columns that go into the request's metadata (``*`` stands for all).
        delimiter: detected where it is not given.
        encoding: detected where it is not given.
        skip_bad: leave out rows that cannot be used, instead of refusing the file.
        limit: a trial: the first so many requests are in the summary, nothing is written.
        progress: told how many bytes are read, and of how many.
        request: what every request has: see ``aiflux.converters.request_form.RequestOptions``.

    Raises:
        InputError: the file or some rows cannot be used; names their lines.
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
    """A CSV file: its columns, and how to read it.

    Attributes:
        declares: its first line is Excel's ``sep=;``, and the header the second.
        row_names: its first column has no name in the header: R's row names.
    """

    path: Path
    columns: tuple[str, ...]
    delimiter: str
    encoding: Encoding
    declares: bool = False
    row_names: bool = False

    @classmethod
    def of(cls, path: Path, delimiter: str | None, encoding: str | None) -> DelimitedTable:
        """Look at a file's beginning.

        Raises:
            InputError: it cannot be read, or has no proper header.
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
        if _has_row_names(sample, rows if whole else rows[:-1], columns):
            return replace(draft, columns=(_ROW_NAMES, *columns), row_names=True)
        return replace(draft, columns=columns)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found out about the file."""
        name = self.encoding.name.removesuffix("-sig")
        note = f"encoding {name}, delimiter {self.delimiter!r}"
        if self.encoding.origin == "declared":
            note += f" ({name} is what the file declares)"
        if self.encoding.origin == "guessed":
            note += f" ({name} is a guess: look at a --dry-run, or give --encoding)"
        if not self.row_names:
            return (note,)
        named = f"the first cell of each row has no column in the header: {_ROW_NAMES!r}, as in R"
        return (note, named)

    def rows(self, progress: Progress | None = None) -> Iterator[Row | Skipped]:
        """Yield every row under the header, and what is none."""
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
        """Yield a row's first and last line, and its cells; rows without any are left out."""
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
        """Return what no text has: a byte of another encoding, or a 0, at which engines stop."""
        byte = bad_byte(cell)
        if byte is not None:
            name = self.encoding.name.removesuffix("-sig")
            return f"the byte 0x{byte:02x}, which is not {name}; give the right --encoding"
        return "a NUL character: the file is damaged, or no text" if "\0" in cell else None

    def _ragged(self, cells: Sequence[str]) -> str:
        some = f"{len(cells)} cell" + ("" if len(cells) == 1 else "s")
        shown = self.delimiter.join(cells)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        seen = f"{some} where the header has {len(self.columns)}: {shown!r}"
        if len(self.columns) == 1:
            seen += f' (write a cell that holds {self.delimiter!r} in quotes: "...")'
        return seen


def _not_in(path: Path, encoding: Encoding, place: str, error: UnicodeError) -> InputError:
    """Return the error for UTF-16 and UTF-32, where nothing can be read behind a broken place."""
    return InputError(
        f"{str(path)!r} is not {encoding.name} {place}: {error}",
        "name its encoding with --encoding; without a byte order mark: utf-16-le or utf-16-be",
    )


def _malformed(error: csv.Error) -> str:
    if "field larger" in str(error):
        return f'a cell of more than {_MAX_CELL >> 20} MiB: a quote (") is not closed'
    if "unexpected end" in str(error):
        return 'a quote (") is not closed before the end of the file'
    return f'not CSV: {error} (a quote inside a quoted cell is written "")'


def _beginning(path: Path, encoding: Encoding) -> tuple[str, bool]:
    """Return the first of a file's text, and whether that is all of it."""
    with (
        reading(path),
        open(path, encoding=encoding.name, errors="replace", newline="") as file,
    ):
        try:
            return file.read(_SAMPLE), not file.read(1)
        except UnicodeError as error:
            raise _not_in(path, encoding, "from its beginning", error) from None


def _detect(sample: str, whole: bool) -> str:
    """Return the delimiter that cuts the first rows into the most equal and most numerous cells."""
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
    with suppress(csv.Error):  # what was read up to there tells enough
        rows.extend(row for row in csv.reader(io.StringIO(sample, ""), delimiter=delimiter) if row)
    return rows


def _header(draft: DelimitedTable) -> tuple[str, ...]:
    path = draft.path
    with reading(path), open(path, "rb") as file:
        first = next(draft._cells(file), None)
    if first is None:
        raise InputError(f"the input {str(path)!r} has no header line", "name its columns there")
    line, _, cells = first
    if isinstance(cells, csv.Error):
        raise InputError(f"the header of {str(path)!r} (line {line}) is {_malformed(cells)}")
    for cell in cells:
        reason = draft._damage(cell)
        if reason is not None:
            raise InputError(
                f"the header of {str(path)!r} has {reason}", "see that it is a table of text"
            )
    return unique_columns([name or f"column_{at}" for at, name in enumerate(cells, 1)], path)


def _has_row_names(sample: str, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> bool:
    """Return whether every row has one cell more than the header: a name, as R writes it.

    R puts header and names in quotes, or numbers the rows. A delimiter at the end of each row, or a
    comma in a text without quotes, also makes one cell more.
    """
    first = [row[0] for row in rows]
    quoted = re.match(r'"[^\n]*"\r?\n"', sample) is not None
    return (
        bool(rows)
        and _ROW_NAMES not in columns
        and all(len(row) == len(columns) + 1 for row in rows)
        and any(row[-1] for row in rows)
        and (first == [str(number) for number in range(1, len(rows) + 1)] or quoted)
        and len(set(first)) == len(rows)
    )


def unique_columns(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Return the names of columns; raise InputError where two are the same."""
    columns = tuple(names)
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(
            f"{str(path)!r} has several columns of the same name: {', '.join(map(repr, twice))}",
            "give every column a name of its own",
        )
    return columns


def csv_writer(file: Any) -> Any:
    """Return a writer whose every cell comes back as it was; CRLF makes it quote both."""
    return csv.writer(file, lineterminator="\r\n")
