"""Convert Parquet and Arrow files, read in small batches and only with the required columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from aiflux.converters.delimited import unique_columns
from aiflux.converters.prompt import prompt_and_form
from aiflux.converters.request_form import make_form
from aiflux.converters.table import Row, TableOptions, names, requests_of_table
from aiflux.converters.template import PromptTemplate
from aiflux.converters.writer import Progress, Summary, reading
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.files import is_pattern
from aiflux.util.process_limits import exhausted
from aiflux.util.text import counted, error_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_BATCH_ROWS = 1024
_PARQUET, _ARROW, _FEATHER_1, _STREAM = b"PAR1", b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"
_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather", ".ipc")
_EMPTY_PARTITION = "__HIVE_DEFAULT_PARTITION__"
# Written by datasets.Dataset.save_to_disk and DatasetDict.save_to_disk of Hugging Face.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def parquet_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str | Path | PromptTemplate | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each row of Parquet, Arrow or Feather files to a request, in small batches.

    The arguments are the same as for ``csv_to_jsonl``, but ``progress`` counts rows, and
    ``input_path`` can be a directory or a pattern (``*.parquet``) of files with the same columns.
    Lists and structs become JSON in a prompt; ``{column.field}`` is a field of a struct.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: a file, a column or some rows are invalid.
        StorageError: the output cannot be written.
    """
    prompt, form = prompt_and_form(template, make_form(**request))
    options = TableOptions(prompt, id_column, names(keep), skip_bad, limit)
    table = ParquetTable(Path(input_path))
    output = None if output_path is None else Path(output_path)
    return requests_of_table(table, output, form, options, progress)


def is_columnar(start: bytes) -> bool:
    """Return whether a file that starts with these bytes is a Parquet, Arrow or Feather file."""
    return start.startswith((_PARQUET, _ARROW, _FEATHER_1, _STREAM))


@dataclass(frozen=True)
class _Part:
    """An open file: its schema, its number of rows (0 if unknown) and row groups, its batches."""

    schema: Any
    size: int
    groups: int
    batches: Callable[[list[str]], Iterator[Any]]


@dataclass(frozen=True)
class _File:
    """One file of a table, with the values of the partitions that contain it."""

    path: Path
    partitions: dict[str, str | None]


class ParquetTable:
    """Parquet, Arrow or Feather files with the same columns; each is open only while it is read.

    Args:
        path: a file, a directory of such files (with ``key=value`` subdirectories, as Spark writes
            them), a directory of ``save_to_disk``, or a pattern.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: a file cannot be read, or has other columns than the first one.
    """

    unit = "row"
    part = ""
    others = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = need("pyarrow", "parquet", "reading Parquet")
        self._parquet = need("pyarrow.parquet", "parquet", "reading Parquet")
        self._files = _files_of(path)
        self.size = self.groups = 0
        sizes = []
        for file in self._files:
            with self._open(file.path) as part:
                self._check_columns(file, part.schema)
                sizes.append(part.size)
                self.groups += part.groups
        self.size = sum(sizes) if all(sizes) else 0
        _, twice = unique_columns(self.columns)
        if twice:
            raise InputError(
                f"{str(path)!r} has duplicate column names: {'; '.join(twice)}",
                "give each column a unique name",
            )

    @property
    def single(self) -> bool:
        """Whether it is one file, whose batches have all columns and one schema."""
        return len(self._files) == 1 and not self._files[0].partitions

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read."""
        files = f"{len(self._files)} files" if len(self._files) > 1 else ""
        groups = counted(self.groups, "row group")
        rows = f"{counted(self.size, 'row')} in {groups}" if self.groups > 1 else ""
        return tuple(note for note in (files, rows) if note)

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row]:
        """Yield the rows with the given columns (default: all).

        Raises:
            InputError: a file is damaged.
        """
        wanted = self.columns if columns is None else columns
        number = 0
        for file in self._files:
            stored = [name for name in wanted if name not in file.partitions]
            with self._open(file.path) as part:
                for cells, batch in self._cells(file.path, part, stored, number):
                    number += 1
                    yield Row(number, f"row-{number}", {**cells, **file.partitions}, batch)
                    if progress is not None and number % _BATCH_ROWS == 0:
                        progress(number, self.size)
        if progress is not None:
            progress(number, self.size)

    def _cells(
        self, path: Path, part: _Part, columns: list[str], done: int
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the cells of each row, and the batch that contains it."""
        try:
            for batch in part.batches(columns):
                present = batch.schema.names
                done += batch.num_rows
                if not present:
                    yield from (({}, batch) for _ in range(batch.num_rows))
                for cells in zip(*map(self._values, batch.columns), strict=True):
                    yield dict(zip(present, cells, strict=True)), batch
        except (self._arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise exhausted(error) or self._broken(path, error, done) from error

    @contextmanager
    def _open(self, path: Path) -> Iterator[_Part]:
        with reading(path), open(path, "rb") as file:
            start = file.read(len(_ARROW))
        if start.startswith(_FEATHER_1):
            raise InputError(
                f"{str(path)!r} is a Feather file of version 1",
                "read and write it again with pandas or R, which write version 2",
            )
        try:
            with ExitStack() as stack:
                yield self._part(path, start, stack)
        except (self._arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise exhausted(error) or self._broken(path, error) from error

    def _part(self, path: Path, start: bytes, stack: ExitStack) -> _Part:
        if not start.startswith((_ARROW, _STREAM)):
            file = stack.enter_context(self._parquet.ParquetFile(path))
            return _Part(
                file.schema_arrow,
                file.metadata.num_rows,
                file.metadata.num_row_groups,
                lambda columns: _row_groups(file, columns),
            )
        source = stack.enter_context(self._arrow.OSFile(str(path)))
        ipc = self._arrow.ipc
        if start.startswith(_STREAM):
            reader = stack.enter_context(ipc.open_stream(source))
            return _Part(reader.schema, 0, 0, lambda columns: _slices(reader, columns))
        reader = stack.enter_context(ipc.open_file(source))
        batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
        return _Part(reader.schema, 0, 0, lambda columns: _slices(batches, columns))

    def _check_columns(self, file: _File, schema: Any) -> None:
        for name in file.partitions:
            schema = schema.append(self._arrow.field(name, self._arrow.string()))
        names = tuple(schema.names)
        if file is self._files[0]:
            self.schema, self.columns = schema, names
        elif sorted(names) != sorted(self.columns):
            differing = sorted({*names} ^ {*self.columns})
            raise InputError(
                f"{str(file.path)!r} has other columns than {str(self._files[0].path)!r}: they "
                f"differ in {', '.join(map(repr, differing))}",
                "convert them separately",
            )

    def _values(self, column: Any) -> list[Any]:
        if self._arrow.types.is_float32(column.type):  # avoids 0.10000000149011612 for 0.1
            texts = column.cast(self._arrow.string()).to_pylist()
            return [None if text is None else float(text) for text in texts]
        kind = self._microseconds(column.type)
        try:
            values: list[Any] = (column if column.type == kind else column.cast(kind)).to_pylist()
        except (ValueError, OverflowError):
            values = [self._value(scalar, kind) for scalar in column]
        if self._arrow.types.is_map(column.type):
            return [None if pairs is None else dict(pairs) for pairs in values]
        return values

    def _microseconds(self, kind: Any) -> Any:
        """Return a type of times that Python has; other types are returned as they are.

        Of nanoseconds, pyarrow returns values of pandas if that is installed: other texts.
        """
        if getattr(kind, "unit", None) != "ns":
            return kind
        types = self._arrow.types
        if types.is_timestamp(kind):
            return self._arrow.timestamp("us", kind.tz)
        return self._arrow.duration("us") if types.is_duration(kind) else self._arrow.time64("us")

    def _value(self, scalar: Any, kind: Any) -> Any:
        """Return a Python value, or text if Python's type has less precision or range."""
        try:
            return (scalar if scalar.type == kind else scalar.cast(kind)).as_py()
        except UnicodeDecodeError:
            return scalar.as_buffer().to_pybytes()
        except (ValueError, OverflowError):
            return str(scalar.cast(self._arrow.string())).replace(" ", "T", 1)

    def _broken(self, path: Path, error: Exception, row: int | None = None) -> InputError:
        place = "" if row is None else f" after row {row}"
        return InputError(
            f"{str(path)!r} cannot be read as Parquet or Arrow{place}: "
            f"{error_text(error).splitlines()[0]}",
            "check that it is a complete file; for CSV, use `aiflux convert csv`",
        )


def _row_groups(file: Any, columns: list[str]) -> Iterator[Any]:
    # Asked for all row groups at once, pyarrow reads ahead and keeps most of the file in memory.
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)


def _slices(batches: Iterable[Any], columns: list[str]) -> Iterator[Any]:
    for batch in batches:
        chosen = batch.select(columns)
        # Arrow trusts the offsets in a file; wrong ones would end this process, not raise an error.
        chosen.validate(full=True)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield chosen.slice(start, _BATCH_ROWS)


def _files_of(path: Path) -> list[_File]:
    """Return the files of a table in order: that of their names, or that of ``save_to_disk``."""
    with reading(path):
        if path.is_dir():
            return _files_in(path)
        if not is_pattern(path):
            open(path, "rb").close()
            return [_File(path, {})]
    found = [Path(name) for name in sorted(glob(str(path), recursive=True))]
    if not found:
        raise InputError(f"no file matches {str(path)!r}", "check the pattern")
    return [_File(each, {}) for each in found if each.is_file()]


def _files_in(folder: Path) -> list[_File]:
    if (folder / _SPLITS).is_file():
        splits = _read_list(folder / _SPLITS, "splits")
        shown = ", ".join(splits)
        raise InputError(
            f"{str(folder)!r} is a dataset with the splits {shown}",
            f"choose one of them: {folder / (splits or ['train'])[0]}",
        )
    if (folder / _STATE).is_file():
        files = _read_list(folder / _STATE, "_data_files")
        return [_File(folder / str(each["filename"]), {}) for each in files]
    found = [
        each
        for each in sorted(folder.rglob("*"))
        if each.suffix.lower() in _SUFFIXES
        and each.is_file()
        and not any(part.startswith((".", "_")) for part in each.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(
            f"the directory {str(folder)!r} contains no file of {', '.join(_SUFFIXES)}",
            "check the path; for other files, use `aiflux convert dir`",
        )
    return [_File(each, _partitions(each.relative_to(folder))) for each in found]


def _partitions(path: Path) -> dict[str, str | None]:
    """Return the values in directories such as ``year=2024``, as Hive, Spark and pandas write."""
    pairs = (part.partition("=") for part in path.parts[:-1])
    values = {unquote(name): unquote(value) for name, equals, value in pairs if equals}
    return {name: None if value == _EMPTY_PARTITION else value for name, value in values.items()}


def _read_list(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        if isinstance(found, list):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{str(path)!r} is not a file of save_to_disk",
        "save the dataset again, or convert its files",
    )
