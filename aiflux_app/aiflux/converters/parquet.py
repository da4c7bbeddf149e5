"""Convert Parquet files, read by row group and only with the required columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.converters.delimited import unique_columns
from aiflux.converters.request_form import Template, make_form
from aiflux.converters.table import Row, TableOptions, convert_table, names
from aiflux.converters.writer import Progress, Summary, reading
from aiflux.errors import InputError
from aiflux.util.extras import need
from aiflux.util.process_limits import exhausted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from aiflux.converters.request_form import RequestOptions

_BATCH_ROWS = 1024


def parquet_to_jsonl(
    input_path: Path | str,
    output_path: Path | str | None,
    *,
    template: str,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    skip_bad: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    **request: Unpack[RequestOptions],
) -> Summary:
    """Convert each row of a Parquet file to a request, one row group at a time.

    The arguments are the same as for ``csv_to_jsonl``, but ``progress`` counts rows. Lists, structs
    and maps can be kept as metadata, but not used in a template or as custom_ids.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: the file, a column or some rows are invalid.
        StorageError: the output cannot be written.
    """
    form = make_form(**request)
    source = Path(input_path)
    options = TableOptions(template, id_column, names(keep), skip_bad, limit)
    with ParquetTable(source) as table:
        needed = options.needed(table.columns)
        parsed = Template(template)
        named = [name for name in parsed.names if name != parsed.only or not table.is_chat(name)]
        table.refuse_nested([*named, *([id_column] if id_column else [])])
        return convert_table(
            source,
            None if output_path is None else Path(output_path),
            table.columns,
            table.rows(needed, progress),
            form,
            options,
            notes=(f"{table.size} rows in {table.groups} row groups",),
        )


class ParquetTable:
    """An open Parquet file; a context manager.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = need("pyarrow", "parquet", "reading Parquet")
        library = need("pyarrow.parquet", "parquet", "reading Parquet")
        with reading(path):
            if path.is_dir():
                raise InputError(
                    f"the input {str(path)!r} is a directory, not a single Parquet file",
                    "convert its files one by one, or combine them, for example with pandas: "
                    f"pd.read_parquet({str(path)!r}).to_parquet('one.parquet')",
                )
            open(path, "rb").close()
        try:
            self._file = library.ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as error:
            raise exhausted(error) or self._broken(error) from error
        self.columns = unique_columns(self._file.schema_arrow.names, path)
        self.size: int = self._file.metadata.num_rows
        self.groups: int = self._file.metadata.num_row_groups

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def schema(self) -> Any:
        """The Arrow schema."""
        return self._file.schema_arrow

    def is_chat(self, column: str) -> bool:
        """Return whether a column contains lists of messages, also in ShareGPT form."""
        if column not in self.columns:
            return False
        kind = self.schema.field(column).type
        types = self._arrow.types
        if not (types.is_list(kind) or types.is_large_list(kind)):
            return False
        if not types.is_struct(kind.value_type):
            return False
        fields = {item.name for item in kind.value_type}
        return {"role", "content"} <= fields or {"from", "value"} <= fields

    def refuse_nested(self, columns: Sequence[str]) -> None:
        """Raise InputError if one of the columns is a list, struct or map."""
        for name in columns:
            kind = self.schema.field(name).type
            if self._arrow.types.is_nested(kind):
                raise InputError(
                    f"column {name!r} of {str(self.path)!r} is nested ({kind}); a prompt or "
                    "custom_id needs a single value per row",
                    "use another column, use a chat column alone as the template, or flatten the "
                    "column first, for example with pandas: "
                    f"df[{name!r}] = df[{name!r}].map(str)",
                )

    def rows(self, columns: Sequence[str], progress: Progress | None = None) -> Iterator[Row]:
        """Yield the rows with the given columns.

        Raises:
            InputError: the file is damaged.
        """
        number = 0
        try:
            for batch in self._file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                present = batch.schema.names
                for cells in zip(*map(self._values, batch.columns), strict=True):
                    number += 1
                    yield Row(number, f"row-{number}", dict(zip(present, cells, strict=True)))
                if progress is not None:
                    progress(number, self.size)
        except (self._arrow.ArrowException, OSError) as error:
            raise exhausted(error) or self._broken(error, number) from error

    def _values(self, column: Any) -> list[Any]:
        if self._arrow.types.is_float32(column.type):  # avoids 0.10000000149011612 for 0.1
            texts = column.cast(self._arrow.string()).to_pylist()
            return [None if text is None else float(text) for text in texts]
        try:
            values: list[Any] = column.to_pylist()
        except (ValueError, OverflowError):
            values = [self._value(scalar) for scalar in column]
        return values

    def _value(self, scalar: Any) -> Any:
        """Return a Python value, or text if Python's type has less precision or range."""
        try:
            return scalar.as_py()
        except UnicodeDecodeError:
            return scalar.as_buffer().to_pybytes()
        except (ValueError, OverflowError):
            return str(scalar.cast(self._arrow.string())).replace(" ", "T", 1)

    def _broken(self, error: Exception, row: int | None = None) -> InputError:
        place = "" if row is None else f" after row {row}"
        return InputError(
            f"{str(self.path)!r} cannot be read as Parquet{place}: {str(error).splitlines()[0]}",
            "check that it is a complete Parquet file; for CSV, use `aiflux convert csv`",
        )
