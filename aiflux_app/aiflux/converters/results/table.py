"""Build the table of results: its columns and rows, joined with those of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.parquet import ParquetTable
from aiflux.converters.request_form import check_columns
from aiflux.converters.results.answers import (
    AnswersById,
    choices,
    entries,
    json_fields,
    kept_columns,
    prompt_text,
    requests_metadata,
)
from aiflux.converters.table import CELL_DIGESTS, Row, as_text, changed_cell
from aiflux.converters.writer import SeenIds, Skipped
from aiflux.core.batch.results_file import ResultEntry
from aiflux.errors import InputError
from aiflux.util.text import whole_text

_NAMED = 5
_INT64 = range(-(1 << 63), 1 << 63)
_REPEATED = "no result: an earlier row of the source has this custom_id"
Record = dict[str, Any]


@dataclass
class BackSummary:
    """Counts of a results table.

    Attributes:
        rows: rows written.
        answered, failed: rows with an answer, and with an error.
        unasked: source rows without a result.
        unused: results without a source row.
        unread: source rows that cannot be read and are skipped.
        repeated: source rows with the custom_id of an earlier row; only that row was requested.
        changed: source rows none of whose cells occurs in the request with their custom_id. Only
            for requests not made by ``aiflux convert``, whose requests have digests.
        unfit: answers without a JSON object, if JSON fields were requested.
        several: answers with further choices; the table has the first.
        cut: answers that ended at the token limit.
        filtered: answers that a content filter stopped.
        empty: answers without text, by reason.
        absent: named fields that no answer has.
        examples: the first custom_ids counted by ``changed`` and ``unfit``.
    """

    output: Path | None
    rows: int = 0
    answered: int = 0
    failed: int = 0
    unasked: int = 0
    unused: int = 0
    unread: int = 0
    repeated: int = 0
    changed: int = 0
    unfit: int = 0
    several: int = 0
    cut: int = 0
    filtered: int = 0
    empty: dict[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, custom_id: str) -> None:
        """Add one to ``changed`` or ``unfit``."""
        setattr(self, what, getattr(self, what) + 1)
        named = self.examples.setdefault(what, [])
        if len(named) < _NAMED:
            named.append(custom_id)


@dataclass(frozen=True)
class BackOptions:
    """How results are joined with their source.

    Attributes:
        source: the CSV, TSV or Parquet file that the requests were made from; None uses the columns
            kept in the requests' metadata.
        id_column: the source column with the custom_ids.
        json_fields: fields of JSON answers to use as columns; () for all, None for none.
        reasoning: add a column with the reasoning, if the engine returns it separately.
        delimiter, encoding: format of a CSV source.
        excel: write CSV for Excel: with a byte order mark, and ``'`` before cells that Excel would
            treat as formulas.
    """

    source: Path | str | None = None
    id_column: str | None = None
    json_fields: tuple[str, ...] | None = None
    delimiter: str | None = None
    encoding: str | None = None
    excel: bool = False
    reasoning: bool = False


class BackTable:
    """The columns and rows of the results table.

    Attributes:
        columns: source columns, by the name they have in the table.
        fields: JSON fields, by the name they have in the table.
        met: JSON fields that at least one answer has.
    """

    def __init__(self, output: Path, options: BackOptions, stack: ExitStack) -> None:
        self.output = output
        self.options = options
        self.summary = BackSummary(None)
        self.seen = _Seen()
        self.met: set[str] = set()
        self.source = None if options.source is None else _Source.of(options, stack)
        names: Sequence[str] = () if self.source is None else self.source.columns
        if self.source is None or (options.json_fields == ()):
            for entry in entries(output):
                self.seen.note(entry, options)
        self._columns = tuple(names or self.seen.columns)
        self._fields = options.json_fields or tuple(self.seen.fields)
        taken: set[str] = set()
        self.columns = {name: _free(whole_text(name), taken) for name in self._columns}
        self.id, self.answer, self.error = (
            _free(name, taken) for name in ("custom_id", "answer", "error")
        )
        self.reasoning = _free("reasoning", taken) if options.reasoning else None
        self.fields = {name: _free(whole_text(name), taken) for name in self._fields}

    @property
    def header(self) -> list[str]:
        """All columns, in order."""
        more = [] if self.reasoning is None else [self.reasoning]
        ours = [self.answer, *more, self.error]
        return [self.id, *self.columns.values(), *ours, *self.fields.values()]

    def records(self, target: Path) -> Iterator[Record]:
        """Yield all rows and update the summary."""
        self.summary.output = target
        if self.source is None:
            for entry in entries(self.output):
                yield self._record(entry.custom_id, kept_columns(entry), entry)
            return
        with closing(AnswersById(self.output)) as answers:
            found = 0
            seen = SeenIds()
            for row in self.source.rows(self.summary):
                answer = self._answer(row, answers)
                repeated = answer is not None and seen.first_use(row.name, row.number) is not None
                self.summary.repeated += repeated
                found += answer is not None and not repeated
                if answer is not None and not repeated:
                    self._check(self.source, row, answer)
                record = self._record(row.name, dict(row.cells), None if repeated else answer)
                yield record | {self.error: _REPEATED} if repeated else record
            self.summary.unused = answers.count - found
            if not found:
                raise self.source.foreign(self.output)

    def _answer(self, row: Row, answers: AnswersById) -> ResultEntry | None:
        """Return the result of the request made from a row, if any."""
        answer = answers.get(row.name)
        digests = {} if answer is None else _digests(answer)
        try:
            changed_cell(row.cells, {name: digests[name] for name in digests if name in row.cells})
        except ValueError:  # not text: the row was skipped
            return None
        return answer

    def _check(self, source: _Source, row: Row, answer: ResultEntry) -> None:
        """Raise InputError unless the request of an answer was made from this row.

        By an id column a row can also be joined from another table, which lacks what was asked.
        """
        digests = _digests(answer)
        known = {name: digests[name] for name in digests if name in row.cells}
        changed = changed_cell(row.cells, known)
        if changed is not None:
            raise source.changed(row, changed)
        if source.id_column is None and (not digests or len(known) < len(digests)):
            raise source.unknown(row, answer, digests)
        if not known and _changed(answer, row.cells):
            self.summary.note("changed", row.name)

    def _record(self, custom_id: str, cells: dict[str, Any], entry: ResultEntry | None) -> Record:
        summary = self.summary
        summary.rows += 1
        record: Record = {self.id: custom_id}
        record |= {shown: cells.get(name) for name, shown in self.columns.items()}
        if entry is None:
            summary.unasked += 1
            record |= {self.answer: None, self.error: "no result: it was not requested"}
        else:
            failed = entry.error is not None
            summary.failed += failed
            summary.answered += not failed
            record[self.answer] = None if failed else entry.answer
            record[self.error] = entry.failure if failed else None
            choice = entry.choice
            if self.reasoning is not None:
                record[self.reasoning] = choice.reasoning or None
            if choice.empty is not None:
                summary.empty[choice.empty] = summary.empty.get(choice.empty, 0) + 1
            all_choices = choices(entry)
            summary.several += len(all_choices) > 1
            finish = all_choices[0].get("finish_reason") if all_choices else None
            summary.cut += finish == "length"
            summary.filtered += finish == "content_filter"
        if self.options.json_fields is not None:
            record |= self._unpacked(entry)
        return record

    def _unpacked(self, entry: ResultEntry | None) -> Record:
        answered = entry is not None and entry.error is None
        content = json_fields(entry) if entry is not None and answered else None
        if entry is not None and answered and content is None:
            self.summary.note("unfit", entry.custom_id)
        self.met.update(content or ())
        return {shown: (content or {}).get(name) for name, shown in self.fields.items()}


def _free(name: str, taken: set[str]) -> str:
    """Return a column name that is not yet taken, and add it to ``taken``."""
    found, number = name, 1
    while found in taken:
        found = f"aiflux_{name}" if number == 1 else f"aiflux_{name}_{number}"
        number += 1
    taken.add(found)
    return found


def _digests(entry: ResultEntry) -> dict[str, str]:
    """Return the digests of the cells from which a request was made; {} if there are none."""
    found = requests_metadata(entry).get(CELL_DIGESTS)
    return found if isinstance(found, dict) else {}


def _changed(entry: ResultEntry, cells: Mapping[str, Any]) -> bool:
    """Return whether the request contains none of a row's cells.

    A row with an empty cell is not judged: that cell may be the only one in the prompt.
    """
    if entry.request is None:
        return False
    asked = prompt_text(entry.request.get("body") or {}, ("system", "user", "assistant"))
    texts = [as_text(cell) for cell in cells.values() if not isinstance(cell, bytes)]
    return bool(texts) and all(texts) and not any(text in asked for text in texts)


@dataclass
class _Seen:
    """Columns and JSON fields that occur in entries, with the types of their values."""

    columns: dict[str, set[type]] = field(default_factory=dict)
    fields: dict[str, set[type]] = field(default_factory=dict)

    def note(self, entry: ResultEntry, options: BackOptions) -> None:
        for name, value in kept_columns(entry).items():
            self.columns.setdefault(name, set()).add(_type(value))
        if options.json_fields is not None:
            for name, value in (json_fields(entry) or {}).items():
                self.fields.setdefault(name, set()).add(_type(value))


def _type(value: Any) -> type:
    """Return a value's type; ``str`` for an integer that does not fit into 64 bits."""
    return str if isinstance(value, int) and value not in _INT64 else type(value)


@dataclass(frozen=True)
class _Source:
    """The table that the requests were made from."""

    table: DelimitedTable | ParquetTable
    id_column: str | None

    @classmethod
    def of(cls, options: BackOptions, stack: ExitStack) -> _Source:
        path = Path(options.source or "")
        table: DelimitedTable | ParquetTable
        if path.suffix.lower() in (".parquet", ".pq"):
            table = stack.enter_context(ParquetTable(path))
        else:
            table = DelimitedTable.of(path, options.delimiter, options.encoding)
        if options.id_column is not None:
            check_columns([options.id_column], table.columns, "--id-column", repr(str(path)))
        return cls(table, options.id_column)

    @property
    def columns(self) -> Sequence[str]:
        return self.table.columns

    def rows(self, summary: BackSummary) -> Iterator[Row]:
        """Yield each row, named by its custom_id.

        Rows that cannot be read are counted and skipped.
        """
        for row in self._rows():
            if not isinstance(row, Row):
                summary.unread += 1
                continue
            yield row if self.id_column is None else replace(row, name=self._id(row))

    def _id(self, row: Row) -> str:
        """Return the custom_id in a row's id column; "" (used by no request) if it is not text."""
        try:
            return as_text(row.cells[self.id_column or ""])
        except ValueError:
            return ""

    def _rows(self) -> Iterable[Row | Skipped]:
        if isinstance(self.table, ParquetTable):
            return self.table.rows(self.table.columns)
        return self.table.rows()

    def _place(self, row: Row) -> str:
        unit = "row" if isinstance(self.table, ParquetTable) else "line"
        return f"{unit} {row.number} of {str(self.table.path)!r}"

    def changed(self, row: Row, column: str) -> InputError:
        return InputError(
            f"{self._place(row)} differs from the row that became {row.name!r}: column {column!r} "
            "has changed; no table was written",
            "use the file as it was converted, with the same --delimiter and "
            "--encoding; without --source, the table has the columns of --keep",
        )

    def unknown(self, row: Row, answer: ResultEntry, digests: Mapping[str, str]) -> InputError:
        """Return the error for a row that could only be matched by its number."""
        missing = [name for name in digests if name not in self.columns]
        if missing:
            reason = f"because column {missing[0]!r} is missing"
        elif answer.request is None:
            reason = "because a .jsonl output requires its run directory and input for this"
        else:
            reason = "because `aiflux convert` did not create this request from a table"
        return InputError(
            f"{self._place(row)} cannot be matched with {row.name!r}, "
            f"{reason}; no table was written",
            "set --id-column to the column with the custom_ids; without --source, "
            "the table has the columns of --keep",
        )

    def foreign(self, output: Path) -> InputError:
        listed = ", ".join(repr(name) for name in self.columns)
        return InputError(
            f"no row of {str(self.table.path)!r} has a result in {str(output)!r}",
            "set --id-column to the column with the custom_ids "
            f"(columns: {listed}); by default, row 1 is 'row-1'",
        )
