"""Read sheets of Excel and OpenDocument workbooks: .xlsx, .xlsm, .xlsb, .xls and .ods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aiflux.converters.delimited import unique_columns
from aiflux.converters.table import Row
from aiflux.converters.writer import Progress, Skipped, reading
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.text import error_text, suggestion

# Excel stores every number as a double: beyond this, a whole one has lost digits.
_EXACT = 2**53


class WorkbookTable:
    """One sheet; its first row that is not empty names the columns.

    Formulas have the values that the program stored. A merged cell's value is in its first cell.

    Args:
        sheet: its name (default: the first visible one).

    Raises:
        ConfigError: python-calamine is not installed.
        InputError: the workbook cannot be read, is encrypted, or has no such sheet or no header.
    """

    unit = "row"

    def __init__(self, path: Path, sheet: str | None = None) -> None:
        self.path = path
        library = need("python_calamine", "spreadsheets", "reading workbooks")
        with reading(path):
            open(path, "rb").close()
        try:
            book = library.CalamineWorkbook.from_path(str(path))
            shown = [
                each.name
                for each in book.sheets_metadata
                if each.visible == library.SheetVisibleEnum.Visible
                and each.typ == library.SheetTypeEnum.WorkSheet
            ]
            self.sheet = self._chosen(sheet, book.sheet_names, shown)
            self.part = f"the sheet {self.sheet!r}"
            self.others = tuple(name for name in shown if name != self.sheet)
            self._sheet = book.get_sheet_by_name(self.sheet)
        except library.PasswordError as error:
            raise InputError(
                f"{str(path)!r} is encrypted", "save a copy without a password"
            ) from error
        except (library.CalamineError, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{str(path)!r} cannot be read as a workbook: {error_text(error)}",
                "open it in a spreadsheet program and save it again as .xlsx, .ods or CSV",
            ) from error
        _, names = next(self._filled(), (0, None))
        if names is None:
            raise InputError(
                f"the sheet {self.sheet!r} of {str(path)!r} is empty",
                "choose another one with --table NAME",
            )
        self._width = self._widest()
        texts = [_name(names, at) for at in range(self._width)]
        self.columns, self._renamed = unique_columns(texts)

    def __enter__(self) -> WorkbookTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._sheet = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read."""
        note = f"sheet {self.sheet!r}"
        if self.others:
            note += f" (also: {', '.join(map(repr, self.others))}; choose with --table)"
        return (note, *self._renamed)

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row | Skipped]:
        """Yield the rows below the header with all columns; empty rows are skipped."""
        size = self._sheet.total_height
        for count, (number, cells) in enumerate(self._filled()):
            if progress is not None and count % 1000 == 0:
                progress(min(count, size), size)
            if not count:
                continue
            padded = [*cells, *[None] * (self._width - len(cells))]
            values = dict(zip(self.columns, padded, strict=False))
            bad = next((name for name, cell in values.items() if _has_nul(cell)), None)
            if bad is None:
                yield Row(number, f"row-{count}", values)
            else:
                yield Skipped(number, f"row {number}", f"column {bad!r} has a NUL character")
        if progress is not None:
            progress(size, size)

    def _chosen(self, sheet: str | None, known: Sequence[str], shown: Sequence[str]) -> str:
        if sheet is not None and sheet not in known:
            raise InputError(
                f"{str(self.path)!r} has no sheet {sheet!r}", suggestion(sheet, [*known])
            )
        if sheet is None and not known:
            raise InputError(f"{str(self.path)!r} has no sheet", "check the file")
        return sheet or (shown or known)[0]

    def _filled(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the rows that are not empty, with their numbers in the sheet."""
        for number, cells in enumerate(self._sheet.iter_rows(), start=1):
            values = [_value(cell) for cell in cells]
            if any(value is not None for value in values):
                yield number, values

    def _widest(self) -> int:
        """Return the number of columns up to the last one with a value."""
        width = 0
        for _, cells in self._filled():
            if len(cells) > width and any(cell is not None for cell in cells[width:]):
                width = max(at for at, cell in enumerate(cells, 1) if cell is not None)
        return width


def _value(cell: Any) -> Any:
    if cell == "" and isinstance(cell, str):
        return None
    if isinstance(cell, float) and cell.is_integer() and abs(cell) <= _EXACT:
        return int(cell)
    return cell


def _name(names: Sequence[Any], at: int) -> str:
    name = names[at] if at < len(names) else None
    return f"column_{at + 1}" if name is None else str(name)


def _has_nul(cell: Any) -> bool:
    return isinstance(cell, str) and "\0" in cell
