"""Build the table of results: its columns and rows, joined with those of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime, time
from pathlib import Path
from typing import Any

from aiflux.converters.cells import as_text
from aiflux.converters.delimited import DelimitedTable
from aiflux.converters.json_records import JsonTable
from aiflux.converters.results.answers import (
    Answers,
    entries,
    json_fields,
    kept_columns,
    request_text,
    requests_metadata,
)
from aiflux.converters.source import kind_of, open_source, readable_again
from aiflux.converters.table import CELL_DIGESTS, Row, SourceTable, changed_cell, known_digests
from aiflux.converters.template import check_columns
from aiflux.core.batch.prompt_lengths import NOT_SENT, TOO_LONG
from aiflux.core.batch.results_file import (
    ChoiceText,
    Result,
    Score,
    choice_texts,
    choices,
    score_value,
    scores,
    vectors,
)
from aiflux.core.runs.journal import CUT
from aiflux.errors import InputError
from aiflux.util.text import whole_text

_NAMED = 5
_INT64 = range(-(1 << 63), 1 << 63)
FIRST, ROWS, COLUMNS = CHOICES = ("first", "rows", "columns")
"""What becomes of the choices of an answer."""
_NOT_ASKED = "no result: it was not requested"
_REPEATED = "no result: an earlier row of the source has this custom_id"
Record = dict[str, Any]


def _tool_calls(_: ChoiceText, choice: dict[str, Any]) -> Any:
    message = choice.get("message")
    return (message.get("tool_calls") or None) if isinstance(message, dict) else None


_DETAILS: Mapping[str, Callable[[ChoiceText, dict[str, Any]], Any]] = {
    "reasoning": lambda text, _: text.reasoning or None,
    "tool_calls": _tool_calls,
    "logprobs": lambda _, choice: choice.get("logprobs"),
}
"""Columns of a choice on request, by the name of their option."""


@dataclass
class BackSummary:
    """Counts of a results table.

    Attributes:
        rows: rows written.
        answered, failed: rows with an answer, and with an error.
        left_out: rows whose requests were not sent, because their prompts are too long.
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
        notes: what else is worth knowing.
    """

    output: Path | None
    rows: int = 0
    answered: int = 0
    failed: int = 0
    left_out: int = 0
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
    notes: tuple[str, ...] = ()

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
        source: the table that the requests were made from (CSV, TSV, Parquet, JSON or JSON Lines);
            None uses the columns kept in the requests' metadata.
        kind: of the source, as in ``aiflux.converters.source``; None: by its name.
        id_column: the source column with the custom_ids.
        json_fields: fields of JSON answers to use as columns; () for all, None for none.
        choices: what becomes of further choices of an answer: only the ``first`` is in the table,
            or all of them as ``rows`` or ``columns``.
        reasoning: add a column with the reasoning, if the engine returns it separately.
        tool_calls, logprobs: add a column with these, as JSON.
        answer_column: name of the column with the answers; "" for none, only JSON fields.
        only_asked: leave out rows of the source without a result.
        custom_ids, errors: whether to add columns with these.
        in_order: the results are in the order of the rows, so little memory is needed.
        reader: further options of the source's reader, by name.
        delimiter, encoding: format of a CSV source.
        unicode: write a CSV in UTF-8, although its source has another encoding.
        excel: write CSV for Excel: with a byte order mark, and ``'`` before cells that Excel would
            treat as formulas.
    """

    source: Path | str | None = None
    kind: str | None = None
    id_column: str | None = None
    json_fields: tuple[str, ...] | None = None
    delimiter: str | None = None
    encoding: str | None = None
    excel: bool = False
    unicode: bool = False
    choices: str = "first"
    reasoning: bool = False
    tool_calls: bool = False
    logprobs: bool = False
    answer_column: str = "answer"
    only_asked: bool = False
    custom_ids: bool = True
    in_order: bool = False
    errors: bool = True
    reader: Mapping[str, Any] = field(default_factory=dict)


class BackTable:
    """The columns and rows of the results table.

    Attributes:
        columns: source columns, by the name they have in the table.
        fields: JSON fields, by the name they have in the table.
        met: JSON fields that at least one answer has.
    """

    def __init__(
        self, output: Path, options: BackOptions, stack: ExitStack, *, verbatim: bool = False
    ) -> None:
        self.output = output
        self.options = options
        self.summary = BackSummary(None)
        self.seen = _Seen()
        self.met: set[str] = set()
        self.source = None if options.source is None else _Source.of(options, stack, verbatim)
        names: Sequence[str] = () if self.source is None else self.source.columns
        if self.source is None or options.json_fields == ():
            self._look()
        self._columns = tuple(names or self.seen.columns)
        self._fields = options.json_fields or tuple(self.seen.fields)
        taken: set[str] = set()
        self.columns = {name: _free(whole_text(name), taken) for name in self._columns}
        self.id = _free("custom_id", taken) if options.custom_ids else None
        self.answer = options.answer_column and _free(options.answer_column, taken)
        self.error = _free("error", taken) if options.errors else None
        self.further = [_free(f"{self.answer}_{at}", taken) for at in range(2, self._most() + 1)]
        self.choice = _free("choice", taken) if options.choices == ROWS else None
        first = self._first_answer()
        ranks = isinstance(first, dict) and "results" in first and bool(scores(first))
        self.document = _free("document", taken) if ranks else None
        wanted = (name for name in _DETAILS if getattr(options, name))
        self.details = {name: _free(name, taken) for name in wanted}
        self.fields = {name: _free(whole_text(name), taken) for name in self._fields}

    def _look(self) -> None:
        """Note the columns and fields of all entries, with their types."""
        if not self.seen.complete:
            for entry in entries(self.output):
                self.seen.note(entry, self.options)
            self.seen.complete = True

    def _most(self) -> int:
        """Return the largest number of choices for columns of their own, else 1."""
        if self.options.choices != COLUMNS:
            return 1
        return max((len(choices(entry.output)) for entry in entries(self.output)), default=1)

    def _first_answer(self) -> Any:
        """Return the first answer; None if every request failed."""
        return next((each.output for each in entries(self.output) if each.error is None), None)

    @property
    def source_table(self) -> SourceTable | None:
        """The table that the requests were made from, if it is known."""
        return None if self.source is None else self.source.table

    def column_types(self) -> dict[str, set[type]]:
        """Return the types of the values of each source column; reads all rows once more."""
        if self.source is None:
            return self.seen.columns
        found: dict[str, set[type]] = {name: set() for name in self.columns}
        for row in self.source.rows(BackSummary(None)):
            for name, value in row.cells.items():
                found[name].add(_type(value))
        return found

    @property
    def dimension(self) -> int | None:
        """Numbers of the first embedding; None if the answers are no single embeddings."""
        found = vectors(self._first_answer())
        single = len(found) == 1 and isinstance(found[0], list)
        return (len(found[0]) or None) if single else None

    def complete(self) -> bool:
        """Return whether every row has an answer; reads all rows once more."""
        failed = [each.error is not None for each in entries(self.output)]
        if self.source is None or self.options.only_asked:
            return not any(failed)
        rows = sum(1 for _ in self.source.rows(BackSummary(None)))
        return not any(failed) and len(failed) == rows

    def score_type(self) -> type | None:
        """Return the type of all answers if they are scores: float, or list; else None.

        Reads all answers once more.
        """
        if not scores(self._first_answer()):
            return None
        kinds = {
            self._score_type(each.output) for each in entries(self.output) if each.error is None
        }
        return kinds.pop() if len(kinds) == 1 else None

    def _score_type(self, output: Any) -> type | None:
        found = scores(output)
        if not found:
            return None
        several = self.choice is None and isinstance(score_value(output, found), list)
        return list if several else float

    def field_types(self) -> dict[str, set[type]]:
        """Return the types of the values of each JSON field; reads all answers once more."""
        if self.fields:
            self._look()
        return self.seen.fields

    @property
    def added(self) -> list[str]:
        """The columns after those of the source, in order."""
        choice = () if self.choice is None else (self.choice,)
        error = () if self.error is None else (self.error,)
        document = () if self.document is None else (self.document,)
        answer = (self.answer,) if self.answer else ()
        ours = (*choice, *document, *answer, *self.further, *self.details.values(), *error)
        return [*ours, *self.fields.values()]

    @property
    def header(self) -> list[str]:
        """All columns, in order."""
        first = [] if self.id is None else [self.id]
        return [*first, *self.columns.values(), *self.added]

    def records(self, target: Path | None) -> Iterator[Record]:
        """Yield all rows and update the summary.

        Args:
            target: the file that they are written to, if any.
        """
        for row, added in self.rows(target):
            record: Record = {} if self.id is None else {self.id: row.name}
            record |= {shown: row.cells.get(name) for name, shown in self.columns.items()}
            yield record | added

    def rows(self, target: Path | None) -> Iterator[tuple[Row, Record]]:
        """Yield each row of the source with the values that are added; update the summary."""
        self.summary.output = target
        if self.source is None:
            for number, entry in enumerate(entries(self.output), start=1):
                row = Row(number, entry.custom_id, kept_columns(entry))
                for added in self._added(entry.custom_id, entry):
                    yield row, added
            return
        in_order = self.options.in_order and self.source.id_column is None
        with closing(Answers(self.output, in_order=in_order)) as answers:
            found = 0
            for row in self.source.rows(self.summary):
                answer, changed = self._answer(row, answers)
                if answer is None and self.options.only_asked:
                    self.summary.unasked += 1
                    continue
                repeated = answer is not None and not answers.take(row.name)
                self.summary.repeated += repeated
                found += answer is not None and not repeated
                if answer is not None and not repeated:
                    self._check(self.source, row, answer, changed)
                for added in self._added(row.name, None if repeated else answer):
                    if repeated and self.error is not None:
                        added[self.error] = _REPEATED
                    yield row, added
            self.summary.unused = answers.count - found
            if not found and not self.options.only_asked:
                raise self.source.foreign(self.output)

    def _answer(self, row: Row, answers: Answers) -> tuple[Result | None, str | None]:
        """Return the result of the request made from a row, if any, and which cell has changed."""
        answer = answers.get(row.name)
        digests = {} if answer is None else _digests(answer) or {}
        try:
            changed = changed_cell(row.cells, known_digests(row.cells, digests))
        except ValueError:  # not text: the row was skipped
            return None, None
        return answer, changed

    def _check(self, source: _Source, row: Row, answer: Result, changed: str | None) -> None:
        """Raise InputError unless the request of an answer was made from this row.

        By an id column a row can also be joined from another table, which lacks what was asked.
        """
        digests = _digests(answer)
        known = known_digests(row.cells, digests or {})
        if changed is not None:
            raise source.changed(row, changed)
        if source.id_column is None and (digests is None or len(known) < len(digests)):
            raise source.unknown(row, answer, digests or {})
        if digests != {} and not known and _changed(answer, row.cells):
            self.summary.note("changed", row.name)

    def _added(self, custom_id: str, entry: Result | None) -> Iterator[Record]:
        """Yield the values that are added to a row: once, or for each choice of the answer."""
        failed = entry is not None and entry.error is not None
        # Finding the texts takes a large part of the time of a join.
        texts = [] if entry is None or failed else choice_texts(entry.output)
        if entry is None:
            self.summary.unasked += 1
            whole = None
        else:
            self._count(entry, texts)
            whole = None if texts or failed else entry.text  # embeddings
        scored = [] if entry is None or failed or texts else scores(entry.output)
        error = _NOT_ASKED if entry is None else entry.failure if failed else None
        details = choices(entry.output) if entry is not None and self.details else []
        for at in range(max(1, len(texts or scored)) if self.choice is not None else 1):
            self.summary.rows += 1
            choice = texts[at] if texts else None
            text = whole if choice is None else choice.text
            added: Record = {}  # in the order of the columns
            if self.choice is not None:
                added[self.choice] = at if choice is not None or scored else None
            if self.document is not None:
                added[self.document] = None
            if self.answer:
                added[self.answer] = text
            if scored and entry is not None:
                added |= self._scored(entry.output, scored, at)
            for name, further in zip(self.further, texts[1:], strict=False):
                added[name] = further.text
            for what, name in self.details.items():
                added[name] = _DETAILS[what](choice, details[at]) if details and choice else None
            if self.error is not None:
                added[self.error] = error
            if self.options.json_fields is not None:
                added |= self._unpacked(custom_id, text)
            yield added

    def _scored(self, output: Any, found: Sequence[Score], at: int) -> Record:
        """Return the scores of an answer: all, or in a row for each of them the one at ``at``."""
        rows = self.choice is not None
        added: Record = {self.answer: found[at].score if rows else score_value(output, found)}
        if self.document is not None:
            added[self.document] = found[at].document if rows else [each.document for each in found]
        return added

    def _count(self, entry: Result, texts: Sequence[ChoiceText]) -> None:
        summary = self.summary
        left_out = entry.failure.startswith(f"{TOO_LONG}: {NOT_SENT}")
        summary.left_out += left_out
        summary.failed += entry.error is not None and not left_out
        summary.answered += entry.error is None
        empty = texts[0].empty if texts else None
        if empty is not None:
            summary.empty[empty] = summary.empty.get(empty, 0) + 1
        summary.several += len(texts) > 1 and self.options.choices == FIRST
        all_choices = choices(entry.output)
        finish = all_choices[0].get("finish_reason") if all_choices else None
        summary.cut += finish == "length" or bool(entry.metadata.get(CUT["length"]))
        summary.filtered += finish == "content_filter"

    def _unpacked(self, custom_id: str, text: str | None) -> Record:
        content = None if text is None else json_fields(text)
        if text is not None and content is None:
            self.summary.note("unfit", custom_id)
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


def _digests(entry: Result) -> dict[str, str] | None:
    """Return the digests of the cells from which a request was made; None if it has no list."""
    found = requests_metadata(entry).get(CELL_DIGESTS)
    return found if isinstance(found, dict) else None


def _changed(entry: Result, cells: Mapping[str, Any]) -> bool:
    """Return whether the request contains none of a row's cells.

    A row with an empty cell is not judged: that cell may be the only one in the prompt.
    """
    if entry.input is None:
        return False
    asked = request_text(entry.input.get("body") or {})
    texts = [as_text(cell) for cell in cells.values() if not isinstance(cell, bytes)]
    return bool(texts) and all(texts) and not any(text in asked for text in texts)


@dataclass
class _Seen:
    """Columns and JSON fields that occur in entries, with the types of their values."""

    columns: dict[str, set[type]] = field(default_factory=dict)
    fields: dict[str, set[type]] = field(default_factory=dict)
    complete: bool = False

    def note(self, entry: Result, options: BackOptions) -> None:
        for name, value in kept_columns(entry).items():
            self.columns.setdefault(name, set()).add(_type(value))
        if options.json_fields is not None:
            for name, value in (json_fields(entry.text) or {}).items():
                self.fields.setdefault(name, set()).add(_type(value))


def _type(value: Any) -> type:
    """Return a value's type; ``str`` where Arrow's has no room for it, or no time zone."""
    beyond = isinstance(value, int) and value not in _INT64
    zoned = isinstance(value, datetime | time) and value.tzinfo is not None
    return str if beyond or zoned else type(value)


@dataclass(frozen=True)
class _Source:
    """The table that the requests were made from."""

    table: SourceTable
    id_column: str | None

    @classmethod
    def of(cls, options: BackOptions, stack: ExitStack, verbatim: bool) -> _Source:
        path = Path(options.source or "")
        kind = options.kind or kind_of(path)
        kind = kind if kind is not None and readable_again(kind) else "csv"
        given = {"delimiter": options.delimiter, "encoding": options.encoding, **options.reader}
        table = open_source(path, kind, given, stack)
        if verbatim and isinstance(table, DelimitedTable):
            table = replace(table, verbatim=True)
        # A field of JSON can be inside others.
        if options.id_column is not None and not isinstance(table, JsonTable):
            check_columns([options.id_column], table.columns, "--id-column", repr(str(path)))
        return cls(table, options.id_column)

    @property
    def columns(self) -> Sequence[str]:
        return self.table.columns

    def rows(self, summary: BackSummary) -> Iterator[Row]:
        """Yield each row, named by its custom_id.

        Rows that cannot be read are counted and skipped.
        """
        for row in self.table.rows():
            if not isinstance(row, Row):
                summary.unread += 1
                continue
            if self.id_column is not None:
                row.name = self._id(row)
            yield row

    def _id(self, row: Row) -> str:
        """Return the custom_id in a row's id column; "" (used by no request) if it is not text."""
        try:
            return as_text(row.cells[self.id_column or ""])
        except (KeyError, ValueError):
            return ""

    def _place(self, row: Row) -> str:
        return f"{self.table.unit} {row.number} of {str(self.table.path)!r}"

    def changed(self, row: Row, column: str) -> InputError:
        return InputError(
            f"{self._place(row)} differs from the row that became {row.name!r}: column {column!r} "
            "has changed; no table was written",
            "use the file as it was converted, with the same --delimiter and "
            "--encoding; without --source, the table has the columns of --keep",
        )

    def unknown(self, row: Row, answer: Result, digests: Mapping[str, str]) -> InputError:
        """Return the error for a row that could only be matched by its number."""
        missing = [name for name in digests if name not in self.columns]
        if missing:
            reason = f"because column {missing[0]!r} is missing"
        elif answer.input is None:
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
