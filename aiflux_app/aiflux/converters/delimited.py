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
from aiflux.converters.prompt import prompt_and_form
from aiflux.converters.request_form import make_form
from aiflux.converters.table import Row, TableOptions, names, requests_of_table
from aiflux.converters.template import PromptTemplate
from aiflux.converters.writer import Progress, Skipped, Summary, reading
from aiflux.errors import InputError
from aiflux.util.compression import PlainFile, plain_name
from aiflux.util.text import error_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_DELIMITERS = (",", "\t", ";", "|")
_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
BLANKS = "blanks"  # the delimiter is any run of spaces and tabs
# A quoted cell stays as it is; other runs become one space.
_RUNS = re.compile(r'("(?:[^"]|"")*(?:"|$))|[ \t]+')
# Quoted names with spaces between them, as R's write.table writes; or one name, and quoted rows.
_SPACED = re.compile(r'("[^"\n]*" )+"[^"\n]*"\r?\n|"[^"\n]*"\r?\n"[^"\n]*" \S')
_SAMPLE = 1 << 16
_ROW_NAMES = "row.names"
_DECLARATION = re.compile(r"sep=(.)\r?\n")  # written and read by Excel
# An unclosed quote swallows the rest of the file; no real cell is this large.
_NUL = "a NUL character: the file is damaged or not text"
_MAX_CELL = 64 << 20


def csv_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | Path | PromptTemplate | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
    header: bool = True,
    skip_lines: int = 0,
    comment: str | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each row of a CSV or TSV file to a request. The first row names the columns.

    Args:
        output_path: written completely or not at all; may be None with ``limit``.
        template: the prompt; ``{column}`` is replaced, and literal braces are doubled. Or the
            ``Path`` of a template, which is a Jinja2 template if its name ends in ``.j2``.
        id_column: the column with the custom_ids; by default they are ``row-1``, ``row-2``, ...
        keep: columns to copy to the request's metadata (``*`` for all).
        delimiter: detected by default; ``blanks`` for runs of spaces and tabs.
        encoding: detected by default.
        header: whether the first row names the columns; else they are ``column_1``, ...
        skip_lines: number of lines before the table.
        comment: lines that start with this text are skipped.
        skip_bad: skip invalid rows instead of rejecting the file.
        limit: preview: return this number of requests in the summary and write nothing.
        progress: called with the number of bytes read and the total.
        request: options shared by all requests; see
            ``aiflux.converters.request_form.RequestOptions``.

    Raises:
        InputError: the file or some rows are invalid; lists their lines.
        StorageError: the output cannot be written.
    """
    prompt, form = prompt_and_form(template, make_form(**request))
    table = DelimitedTable.of(
        Path(input_path),
        delimiter,
        encoding,
        header=header,
        skip_lines=skip_lines,
        comment=comment,
    )
    options = TableOptions(prompt, id_column, names(keep), skip_bad, limit)
    output = None if output_path is None else Path(output_path)
    return requests_of_table(table, output, form, options, progress)


@dataclass(frozen=True)
class DelimitedTable:
    """A CSV file: its columns and its format.

    Attributes:
        declares: the first line is Excel's ``sep=;`` and the second is the header.
        row_names: the first column has no name in the header, as with R's row names.
        verbatim: each row has its text in ``raw``, with the line ending and the blank lines before.
        header: whether the first row names the columns.
        skip_lines, comment: see ``csv_to_jsonl``.
        renamed: notes about columns that were renamed, because their names appear twice.
    """

    path: Path
    columns: tuple[str, ...]
    delimiter: str
    encoding: Encoding
    declares: bool = False
    row_names: bool = False
    verbatim: bool = False
    header: bool = True
    skip_lines: int = 0
    comment: str | None = None
    renamed: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        path: Path,
        delimiter: str | None,
        encoding: str | None,
        *,
        header: bool = True,
        skip_lines: int = 0,
        comment: str | None = None,
    ) -> DelimitedTable:
        """Detect a file's format from its beginning.

        Raises:
            InputError: the file cannot be read or has no valid header.
        """
        checked_start(path, "CSV")
        known = detect_encoding(path) if encoding is None else checked_encoding(encoding)
        sample, whole = _beginning(path, known)
        lines = _TableLines(sample.splitlines(keepends=True), skip_lines, comment)
        sample = "".join(lines.of_rows())
        declared = _DECLARATION.match(sample)
        if delimiter is not None:
            delimiter = _NAMES.get(delimiter, delimiter)
        elif declared is not None:
            delimiter = declared[1]
        elif plain_name(path).suffix.lower() in (".tsv", ".tab"):
            delimiter = "\t"
        else:
            delimiter = _detect(sample, whole)
        if delimiter != BLANKS and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise InputError(
                f"the delimiter {delimiter!r} is not one character",
                f"--delimiter ';', or --delimiter {BLANKS} for runs of spaces and tabs",
            )
        draft = cls(
            path,
            (),
            delimiter,
            known,
            declares=declared is not None,
            header=header,
            skip_lines=skip_lines,
            comment=comment,
        )
        columns = _header(draft)
        rows = _sample_rows(sample, delimiter)[1 + draft.declares :]
        row_names = header and _has_row_names(
            sample, rows if whole else rows[:-1], columns, delimiter
        )
        unique, renamed = unique_columns([_ROW_NAMES, *columns] if row_names else columns)
        return replace(draft, columns=unique, row_names=row_names, renamed=renamed)

    @property
    def part(self) -> str:
        """Nothing: the file is one table."""
        return ""

    @property
    def others(self) -> tuple[str, ...]:
        """No other table."""
        return ()

    @property
    def unit(self) -> str:
        """Unit of a row's number."""
        return "line"

    @property
    def filtered(self) -> bool:
        """Whether it has no header, runs of blanks, or lines before or between the rows."""
        return bool(self.skip_lines or self.comment or self.delimiter == BLANKS or not self.header)

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
            return (note, *self.renamed)
        named = f"the header does not name the first column, as in R; it is called {_ROW_NAMES!r}"
        return (note, named, *self.renamed)

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row | Skipped]:
        """Yield the rows, each with all columns; invalid rows are yielded as ``Skipped``."""
        size = self.path.stat().st_size
        names, width = self.columns, len(self.columns)
        with reading(self.path), PlainFile(self.path) as file:
            first = 0 if self.header else 1
            for number, (line, last, cells, raw) in enumerate(self._cells(file), start=first):
                if number % 1000 == 0 and progress is not None:
                    progress(min(file.consumed, size), size)
                if not number:
                    continue
                if isinstance(cells, list) and len(cells) == width and _sound("".join(cells)):
                    found = dict(zip(names, cells))  # noqa: B905 - equal, and a check takes time
                    yield Row(line, f"row-{number}", found, raw)
                else:
                    yield self._skipped(line, last, cells)
            if progress is not None:
                progress(size, size)

    def header_text(self) -> str:
        """Return the text of the header, with its line ending and the lines before it."""
        table = replace(self, verbatim=True)
        with reading(self.path), PlainFile(self.path) as file:
            return next((raw for _, _, _, raw in table._cells(file)), "")

    def _cells(self, file: BinaryIO) -> Iterator[tuple[int, int, list[str] | csv.Error, str]]:
        """Yield first line, last line, cells and, if asked for, text of each row but empty ones."""
        text = io.TextIOWrapper(
            file, encoding=self.encoding.name, errors=self.encoding.errors, newline=""
        )
        csv.field_size_limit(_MAX_CELL)
        # Python code for each line is slow: most files do not need it.
        plain = not self.filtered
        kept = _TableLines(text, self.skip_lines, self.comment, self.delimiter == BLANKS)
        lines: Iterable[str] = text if plain else kept
        read: list[str] = []  # the lines of the current row
        lines = _noting(lines, read) if self.verbatim else lines
        delimiter = " " if self.delimiter == BLANKS else self.delimiter
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            if self.declares:
                next(reader)
            while True:
                if not plain:
                    kept.begin_row()
                line = reader.line_num + 1
                try:
                    cells: list[str] | csv.Error = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    cells = error
                if cells:
                    first, last = (line, reader.line_num) if plain else (kept.first, kept.last)
                    yield first, last, cells, "".join(read) if self.verbatim else ""
                    read.clear()
        except UnicodeError as error:
            raise _not_in(
                self.path, self.encoding, f"after line {reader.line_num}", error
            ) from None
        finally:
            text.detach()

    def _skipped(self, line: int, last: int, cells: list[str] | csv.Error) -> Skipped:
        place = f"line {line}" if last <= line else f"lines {line} to {last}"
        if isinstance(cells, csv.Error):
            return Skipped(line, place, _malformed(cells))
        if len(cells) != len(self.columns):
            return Skipped(line, place, self._ragged(cells))
        found = zip(self.columns, map(self._damage, cells), strict=True)
        column, reason = next(pair for pair in found if pair[1] is not None)
        return Skipped(line, place, f"column {column!r} has {reason}")

    def _damage(self, cell: str) -> str | None:
        """Return what makes a cell invalid: a byte of another encoding, or NUL.

        Engines truncate a prompt at NUL.
        """
        byte = bad_byte(cell)
        if byte is not None:
            name = self.encoding.name.removesuffix("-sig")
            return f"the byte 0x{byte:02x}, which is not valid {name}; set --encoding"
        return _NUL if "\0" in cell else None

    def _ragged(self, cells: Sequence[str]) -> str:
        count = f"{len(cells)} cell" + ("" if len(cells) == 1 else "s")
        shown = self.delimiter.join(cells)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        problem = f"{count}, but the header has {len(self.columns)}: {shown!r}"
        if len(self.columns) == 1:
            problem += f' (quote a cell that contains {self.delimiter!r}: "...")'
        return problem


def _sound(text: str) -> bool:
    """Return whether the cells of a row are undamaged; one look is quicker than one for each."""
    return "\0" not in text and (text.isascii() or bad_byte(text) is None)


def _noting(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """Pass lines on, and add each to ``read``."""
    for line in lines:
        read.append(line)
        yield line


class _TableLines:
    """The lines of a table without those to skip; feeds csv.reader.

    Attributes:
        first, last: numbers of the first and last line of the current row.
    """

    def __init__(
        self, lines: Iterable[str], skip: int, comment: str | None, blanks: bool = False
    ) -> None:
        self._lines = enumerate(lines, start=1)
        self._skip = skip
        self._comment = comment
        self._blanks = blanks
        self._begins = True
        self.first = self.last = 0

    def begin_row(self) -> None:
        """Note that the next line begins a row: within a row, no line is a comment."""
        self._begins = True

    def __iter__(self) -> _TableLines:
        return self

    def __next__(self) -> str:
        for number, line in self._lines:
            self.last = number
            if not self._begins:
                return line
            if number <= self._skip or (self._comment and line.startswith(self._comment)):
                continue
            self.first, self._begins = number, False
            if self._blanks:
                return _RUNS.sub(lambda run: run[1] or " ", line.strip(" \t\r\n")) + "\n"
            return line
        raise StopIteration

    def of_rows(self) -> Iterator[str]:
        """Yield the lines, each of which begins a row."""
        for line in self:
            yield line
            self.begin_row()


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
    if "NUL" in str(error):  # Python 3.10 reads none
        return f"it has {_NUL}"
    return (
        f'not valid CSV: {error} (write a quote in a quoted cell as ""; in R: qmethod = "double")'
    )


def _beginning(path: Path, encoding: Encoding) -> tuple[str, bool]:
    """Return the beginning of a file's text, and whether it is the whole file."""
    with (
        reading(path),
        PlainFile(path) as plain,
        io.TextIOWrapper(plain, encoding.name, errors="replace", newline="") as file,
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
    if delimiter == BLANKS:
        return [row for line in sample.splitlines() if (row := line.split())]
    with suppress(csv.Error):  # the rows read so far are enough
        rows.extend(row for row in csv.reader(io.StringIO(sample, ""), delimiter=delimiter) if row)
    return rows


def _header(draft: DelimitedTable) -> tuple[str, ...]:
    path = draft.path
    with reading(path), PlainFile(path) as file:
        first = next(draft._cells(file), None)
    if first is None:
        raise InputError(
            f"the input {str(path)!r} has no header line", "add a line that names the columns"
        )
    line, _, cells, _ = first
    if not draft.header and not isinstance(cells, csv.Error):
        return tuple(f"column_{at}" for at in range(1, len(cells) + 1))
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
    return tuple(name or f"column_{at}" for at, name in enumerate(cells, 1))


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


def unique_columns(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return column names without duplicates, and a note about those that were renamed.

    The second column ``x`` becomes ``x_2``, unless the table has that name already.
    """
    given = [*names]
    taken, seen = {*given}, set[str]()
    columns, renamed = [], []
    for at, name in enumerate(given, start=1):
        free = name
        number = 1
        while free in seen or (number > 1 and free in taken):
            number += 1
            free = f"{name}_{number}"
        if free != name:
            renamed.append(f"column {at} is called {free!r}, as {name!r} exists")
        seen.add(free)
        columns.append(free)
    return tuple(columns), tuple(renamed)


def csv_writer(file: Any, delimiter: str = ",") -> Any:
    """Return a CSV writer that preserves cells; with CRLF it quotes both CR and LF."""
    return csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
