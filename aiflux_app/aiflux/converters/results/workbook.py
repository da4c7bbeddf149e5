"""Write results as an Excel workbook, with the types of the values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import IO, Any

from aiflux.converters.cells import as_json, as_text
from aiflux.converters.results.table import BackTable, Record
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.text import REPLACEMENT, counted, whole_text

_ROWS, _COLUMNS, _CHARACTERS = 1_048_576, 16_384, 32_767  # of a sheet and of a cell
_EXACT = 2**53  # Excel has doubles only
_FIRST_YEAR = 1900
_FORMATS = {datetime: "yyyy-mm-dd hh:mm:ss", date: "yyyy-mm-dd", time: "hh:mm:ss"}
# A file with the time in it would differ each time.
_CREATED = datetime(2000, 1, 1)


def workbook_library() -> Any:
    """Return XlsxWriter.

    Raises:
        ConfigError: it is not installed.
    """
    return need("xlsxwriter", "spreadsheets", "writing workbooks")


def write_xlsx(file: IO[bytes], table: BackTable, records: Iterator[Record]) -> None:
    """Write rows as the only sheet of a workbook. Texts stay texts, also if they begin with ``=``.

    Raises:
        ConfigError: XlsxWriter is not installed.
        InputError: a sheet has no room for the table.
    """
    library = workbook_library()
    options = {
        "constant_memory": True,
        "strings_to_formulas": False,
        "strings_to_numbers": False,
        "strings_to_urls": False,
    }
    header = table.header
    if len(header) > _COLUMNS:
        raise _no_room(f"{len(header):,} columns", f"{_COLUMNS:,}")
    with library.Workbook(file, options) as book:
        book.set_properties({"created": _CREATED})
        sheet = _Sheet(book, book.add_worksheet("answers"))
        sheet.write(0, header)
        for number, record in enumerate(records, start=1):
            if number == _ROWS:
                raise _no_room("more rows", f"{_ROWS - 1:,}")
            sheet.write(number, [record.get(name) for name in header])
    if sheet.cut:
        table.summary.notes += (
            f"{counted(sheet.cut, 'cell')} cut at {_CHARACTERS:,} characters, Excel's limit: "
            "other forms have the whole texts",
        )


def _no_room(found: str, most: str) -> InputError:
    return InputError(
        f"the table has {found} than an Excel sheet can have ({most})"
        if found.startswith("more")
        else f"the table has {found}, and an Excel sheet at most {most}",
        "write CSV or Parquet instead",
    )


class _Sheet:
    """A sheet that is written row by row.

    Attributes:
        cut: number of texts that were too long.
    """

    def __init__(self, book: Any, sheet: Any) -> None:
        self.cut = 0
        self._sheet = sheet
        self._formats = {
            kind: book.add_format({"num_format": shown}) for kind, shown in _FORMATS.items()
        }
        sheet.freeze_panes(1, 0)

    def write(self, row: int, values: list[Any]) -> None:
        for column, value in enumerate(values):
            if value is not None:
                self._cell(row, column, value)

    def _cell(self, row: int, column: int, value: Any) -> None:
        number = _number(value)
        if isinstance(value, bool):
            self._sheet.write_boolean(row, column, value)
        elif number is not None:
            self._sheet.write_number(row, column, number)
        elif type(value) in _FORMATS and _has_date(value):
            self._sheet.write_datetime(row, column, value, self._formats[type(value)])
        else:
            self._sheet.write_string(row, column, self._text(value))

    def _text(self, value: Any) -> str:
        text = as_text(as_json(value) if isinstance(value, bytes) else value)
        text = whole_text(text).replace("\0", REPLACEMENT)
        self.cut += len(text) > _CHARACTERS
        return text[:_CHARACTERS]


def _number(value: Any) -> float | int | None:
    """Return a number that a double holds exactly; None for any other value."""
    if isinstance(value, int):
        return value if abs(value) <= _EXACT else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal) and value.is_finite() and Decimal(repr(float(value))) == value:
        return float(value)
    return None


def _has_date(value: datetime | date | time) -> bool:
    """Return whether Excel can have it: without a time zone, and not before 1900."""
    if isinstance(value, datetime | time) and value.tzinfo is not None:
        return False
    return isinstance(value, time) or value.year >= _FIRST_YEAR
