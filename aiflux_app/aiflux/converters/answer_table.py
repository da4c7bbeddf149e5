"""A table of answers (`aiflux ask`): its requests, its run, and how it is written.

The run is an ordinary one. Its input and output are in ``TABLE.aiflux`` next to the table::

    answers.csv.aiflux/ask.json             what the requests were made from; the table as written
    answers.csv.aiflux/requests.jsonl       the input of the run
    answers.csv.aiflux/results.json         its output
    answers.csv.aiflux/results.json.aiflux  its run directory
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from aiflux.converters.results import BackOptions, BackSummary, results_to_table, table_form
from aiflux.converters.results.table import COLUMNS, FIRST
from aiflux.converters.source import (
    DIRECTORY,
    open_source,
    readable_again,
    size_and_time,
    write_ahead_log,
)
from aiflux.converters.template import PromptTemplate
from aiflux.converters.writer import Summary
from aiflux.core.batch.input_file import quick_change_of
from aiflux.core.batch.request import custom_id_of
from aiflux.core.runs.directory import TABLE_RESULTS, RunDirectory
from aiflux.core.runs.local_process import refuse_process
from aiflux.core.runs.open import ChangedSettingsError
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import (
    StatusFile,
    WrittenFile,
    file_change,
    read_run_status,
    written_file,
)
from aiflux.errors import InputError, OutputExistsError, RunConflictError, UsageError
from aiflux.util.files import (
    absolute,
    checksum,
    is_pattern,
    refuse_existing,
    refuse_special,
    remove_leftovers,
    same_file,
    storage_error,
    write_json,
)
from aiflux.util.lease import acquire, refuse_living
from aiflux.util.lines import read_lines
from aiflux.util.records import read_record, to_json

ANSWER = "answer"
Started = TypeVar("Started")


@dataclass(frozen=True)
class Question:
    """What is asked of each row of a source.

    Attributes:
        source: absolute path.
        kind: of the source; see ``aiflux.converters.source``.
        asked: everything that the requests depend on, as JSON types: the template and other options
            of the converter.
        answer_column: name of the column with the answers.
        fields: fields of JSON answers that become columns.
    """

    source: Path
    kind: str
    asked: dict[str, Any]
    answer_column: str = ANSWER
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrittenTable:
    """A table as it was written, and what it was made of.

    Attributes:
        results: the checksum of the results.
        source: the file with the rows; None if it is a directory.
    """

    file: WrittenFile
    results: int
    source: WrittenFile | None


@dataclass(frozen=True)
class AskRecord:
    """The content of ``ask.json``.

    Attributes:
        size, modified: of the source when the requests were made; None for a directory.
        rows, requests, skipped: of the conversion.
        writing: the table is being written, or the process that wrote it was killed.
    """

    question: Question
    size: int | None
    modified: int | None
    rows: int
    requests: int
    skipped: int
    writing: bool = False
    table: WrittenTable | None = None


Convert = Callable[[Path], Summary]
"""Makes the requests of a question, and writes them to a file."""


@dataclass(frozen=True)
class AnswerTable:
    """The files of a table of answers; ``path`` is absolute."""

    path: Path

    @classmethod
    def of(cls, name: str) -> AnswerTable:
        """Return the table that the user names.

        Raises:
            UsageError: it cannot be written.
        """
        path = absolute(name)
        if not name or name.endswith(("/", "/.")):
            raise UsageError(f"the output {name!r} is a directory", "name a file: answers.csv")
        table_form(path)
        refuse_special(path)
        if not path.parent.is_dir():
            raise UsageError(
                f"the output's directory {str(path.parent)!r} does not exist",
                f"mkdir -p {quote(str(path.parent))}",
            )
        return cls(path)

    @property
    def folder(self) -> RunDirectory:
        """The directory of everything but the table; as private as that of a run."""
        return RunDirectory.of_output(self.path)

    @property
    def requests(self) -> Path:
        """The input of the run."""
        return self.folder.path / "requests.jsonl"

    @property
    def results(self) -> Path:
        """The output of the run."""
        return self.folder.path / TABLE_RESULTS

    @property
    def run(self) -> RunDirectory:
        """The run directory."""
        return RunDirectory.of_output(self.results)

    @property
    def _record(self) -> Path:
        return self.folder.path / "ask.json"

    def record(self) -> AskRecord | None:
        """Return what the requests were made from; None before there are any.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            return read_record(AskRecord, self._record)
        except ValueError:
            return None

    @property
    def begun(self) -> bool:
        """Whether requests were submitted, or have results."""
        journals = self.run.path.glob("journal*/*.jsonl")
        return self.run.submissions.exists() or any(path.stat().st_size for path in journals)

    # --- the requests -----------------------------------------------------------------------

    def prepare(
        self, question: Question, convert: Convert, *, force: bool = False, active: bool = False
    ) -> tuple[AskRecord, bool]:
        """Make the requests, unless that was done before.

        Args:
            force: overwrite the table; replace the requests of a run that has begun.
            active: a process or a job works on the run, so its requests must not be replaced.

        Returns:
            The record of the requests, and whether they are to replace others of the run.

        Raises:
            InputError: the source or the template is wrong.
            OutputExistsError: the table exists, was not written by the same command, or was
                changed since.
            RunConflictError: the requests of a run that has begun would be others, because the
                source, the template or another option changed.
            StorageError: the requests cannot be written.
        """
        self._check(question)
        earlier = self.record()
        if not force:
            same = earlier is not None and _same_columns(earlier.question, question)
            self._refuse_foreign_table(earlier if same else None)
        self.folder.make()
        try:
            with acquire(self.folder.plan_lease, f"the table {self.path}"):
                remove_leftovers(self._fresh, self._record, self.path)
                known = earlier is not None and earlier.question == question
                if known and earlier is not None and self._unchanged(earlier):
                    return earlier, is_outdated(self.run)
                fixed = self.begun and (active or not force)
                return self._made(question, convert, earlier, fixed=fixed, active=active)
        except UsageError:
            with suppress(OSError):  # it has files
                self.folder.path.rmdir()
            raise

    def _made(
        self,
        question: Question,
        convert: Convert,
        earlier: AskRecord | None,
        *,
        fixed: bool,
        active: bool,
    ) -> tuple[AskRecord, bool]:
        """Make the requests; see ``prepare`` and ``_settle``."""
        if fixed and earlier is not None:
            self._refuse_other_question(earlier.question, question, active=active)
        summary, stat = self._converted(question, convert)
        self._settle(question, fixed=fixed, active=active)
        record = AskRecord(question, *stat, summary.rows, summary.requests, summary.skipped)
        if earlier is not None and _same_columns(earlier.question, question):
            record = replace(record, writing=earlier.writing, table=earlier.table)
        self._write_record(record)
        return record, is_outdated(self.run)

    def _check(self, question: Question) -> None:
        source = question.source
        if same_file(self.path, source):
            raise InputError("input and output are the same file", "use another --output")
        if question.kind == DIRECTORY and self.path.parent.resolve().is_relative_to(
            source.resolve()
        ):
            raise InputError(
                f"the output {str(self.path)!r} is in the directory that is the input",
                "write it to another directory",
            )
        if self.folder.plan.exists():
            raise RunConflictError(
                f"{self.folder.path} is the run directory of `aiflux run`",
                "use another --output",
            )

    def _unchanged(self, earlier: AskRecord) -> bool:
        """Return whether the source looks as it did when the existing requests were made."""
        known = (earlier.size, earlier.modified)
        return self.requests.exists() and None not in known and _stat(earlier.question) == known

    def _refuse_other_question(self, before: Question, now: Question, *, active: bool) -> None:
        for what, old, new in (
            ("source", str(before.source), str(_again(before.source, now.source))),
            *(
                (name, before.asked.get(name), now.asked.get(name))
                for name in dict.fromkeys((*before.asked, *now.asked))
            ),
        ):
            if old != new:
                before_it = f"without {what}" if old is None else f"with the {what} {_shown(old)}"
                raise RunConflictError(
                    f"{self.path.name} was begun {before_it}; this command has "
                    f"{'none' if new is None else _shown(new)}",
                    self._remedy(active=active),
                )

    def _remedy(self, *, active: bool) -> str:
        if active:
            name = quote(str(self.path))
            return f"cancel its jobs first (aiflux cancel {name}), or use another --output"
        return (
            "use another --output, or --force to answer the rows again whose requests changed; "
            "the other answers are kept"
        )

    def confirm(self, record: AskRecord, convert: Convert) -> AskRecord:
        """Check that the source is still that of the requests; return the current record.

        Raises:
            RunConflictError: the source changed.
        """
        question = record.question
        if not readable_again(question.kind) or self._unchanged(record):
            return record
        with acquire(self.folder.plan_lease, f"the table {self.path}", wait=True):
            return self._made(question, convert, record, fixed=True, active=False)[0]

    @property
    def _fresh(self) -> Path:
        return self.folder.path / "new-requests.jsonl"

    def _converted(
        self, question: Question, convert: Convert
    ) -> tuple[Summary, tuple[int | None, int | None]]:
        """Make the requests in a file of their own; return the state of the source, too."""
        before = _stat(question)
        summary = convert(self._fresh)
        if _stat(question) != before:
            raise InputError(
                f"the source {str(question.source)!r} changed while it was read",
                "run the same command again when it is complete",
            )
        return summary, before

    def _settle(self, question: Question, *, fixed: bool, active: bool) -> None:
        """Put the new requests in their place.

        Args:
            fixed: the requests must stay as they are.
        """
        made, known = self._fresh, self.requests
        if known.exists() and filecmp.cmp(made, known, shallow=False):
            made.unlink()
            return
        if not fixed:
            made.replace(known)
            return
        first = first_difference(known, made)
        made.unlink()
        raise RunConflictError(
            f"the source {str(question.source)!r} changed since {self.path.name} was begun; "
            f"the first request that differs is {first!r}",
            f"restore the source, {self._remedy(active=active)}",
        )

    def _write_record(self, record: AskRecord) -> None:
        write_json(self._record, to_json(record))

    # --- the run ----------------------------------------------------------------------------

    def start(self, begin: Callable[[bool], Started], *, replaced: bool, force: bool) -> Started:
        """Start the run, or resume it; return what ``begin`` returns.

        Args:
            begin: starts the run; its argument is the run's ``force``.
            replaced: the requests are to replace others of the run.
            force: discard answers that other settings gave.

        Raises:
            RunConflictError: there are such answers, and ``force`` is not given.
        """
        try:
            return begin(replaced)
        except ChangedSettingsError as error:
            if not force:
                raise RunConflictError(
                    f"{self.path.name}: {error.difference}",
                    "use another --output, or --force to answer all rows again",
                ) from error
        with self._run_set_aside():
            return begin(True)

    def refuse_other_settings(self, change: str) -> None:
        """Refuse other settings while something works on the run."""
        raise RunConflictError(f"{self.path.name}: {change}", self._remedy(active=True))

    @contextmanager
    def _run_set_aside(self) -> Iterator[None]:
        """Discard the run; it comes back if the block begins no other one."""
        run = self.run
        refuse_living(run.path.glob(".*.lease"), f"the run of {self.path}")
        refuse_process(run)
        aside = run.path.with_name(f"{run.path.name}.discarded")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            run.path.rename(aside)
        except OSError as error:
            raise storage_error(error, run.path) from error
        try:
            yield
        except BaseException:
            if not (self.begun or run.process.exists()):
                shutil.rmtree(run.path, ignore_errors=True)
                aside.rename(run.path)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    # --- the table --------------------------------------------------------------------------

    def _refuse_foreign_table(self, record: AskRecord | None) -> None:
        """Refuse to replace a table that was not written from the run, or was changed since."""
        if record is None or (record.table is None and not record.writing):
            refuse_existing(self.path)
        elif record.table is not None:
            change = file_change(self.path, record.table.file)
            if change is not None:
                raise OutputExistsError(
                    f"{self.path} {change}",
                    "move it away to write it again from the results, or overwrite it with --force",
                )

    def write(self, record: AskRecord, *, force: bool = False) -> BackSummary | None:
        """Write the table from the results of the finished run; None if that was done before.

        Raises:
            InputError: the source changed since the requests were made.
            OutputExistsError: a table exists that was not written from the run.
            StorageError: the table cannot be written.
        """
        with acquire(self.folder.plan_lease, f"the table {self.path}", wait=True):
            # Another process may have waited for the same run, and have written the table.
            record = self.record() or record
            if not force:
                self._refuse_foreign_table(record)
            status = read_run_status(self.run, read_plan(self.run))
            results = _checksum(self.results, status)
            source = record.question.source
            if self._up_to_date(record.table, results, source):
                return None
            read = None if _several(source) else written_file(source, checksum(source))
            # A kill right after the table appears must not make it somebody else's.
            self._write_record(replace(record, writing=True, table=None))
            failed = 0 if status is None else status.counts.failed
            summary = results_to_table(self.results, self.path, self.options(record, failed))
            table = WrittenTable(written_file(self.path, checksum(self.path)), results, read)
            self._write_record(replace(record, writing=False, table=table))
        return summary

    def _up_to_date(self, table: WrittenTable | None, results: int, source: Path) -> bool:
        """Return whether the table was written from these results and this source."""
        return (
            table is not None
            and table.results == results
            and self.path.exists()
            and file_change(self.path, table.file) is None
            and (_several(source) or file_change(source, table.source) is None)
        )

    def options(self, record: AskRecord, failed: int) -> BackOptions:
        """Return how the results are joined with the source.

        Several answers to each row (``--samples``, ``n``) have a column each.

        Args:
            failed: number of failed requests: if there are any, the table has a column for them.
        """
        question = record.question
        again = readable_again(question.kind)
        samples = read_plan(self.run).options.samples or 1
        several = samples > 1 or "n" in (question.asked.get("params") or {})
        return BackOptions(
            source=question.source if again else None,
            kind=question.kind,
            reader=question.asked,
            answer_column=question.answer_column,
            json_fields=question.fields or None,
            choices=COLUMNS if several else FIRST,
            custom_ids=False,
            in_order=True,
            errors=failed > 0 or (again and record.skipped > 0),
        )


def as_asked(value: Any) -> Any:
    """Return an option of a converter as JSON: of a template, its content."""
    return value.content if isinstance(value, PromptTemplate) else value


def refuse_column(question: Question) -> None:
    """Refuse a source that already has a column with the name of the answers.

    Raises:
        InputError: it has one, or cannot be read.
    """
    if not readable_again(question.kind):
        return
    with ExitStack() as stack:
        table = open_source(question.source, question.kind, question.asked, stack)
        if question.answer_column in table.columns:
            raise InputError(
                f"{str(question.source)!r} already has a column {question.answer_column!r}",
                "name the column of the answers: --answer-column NAME",
            )


def schema_fields(schema: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the fields of the objects that a JSON Schema describes."""
    properties = (schema or {}).get("properties")
    return tuple(properties) if isinstance(properties, dict) else ()


def _stat(question: Question) -> tuple[int | None, int | None]:
    source = question.source
    if question.kind == DIRECTORY or _several(source) or write_ahead_log(source):
        return None, None
    return size_and_time(source)


def _several(source: Path) -> bool:
    """Return whether a source is several files, whose content is compared as a whole."""
    return source.is_dir() or is_pattern(source)


def is_outdated(run: RunDirectory) -> bool:
    """Return whether a run was planned for other requests than those that its input has by now.

    A command that replaced them can have been killed before it planned the run again.

    Raises:
        RunConflictError: the run has no plan that can be read.
    """
    return run.plan.is_file() and quick_change_of(read_plan(run).input) is not None


def first_difference(known: Path, made: Path) -> str | None:
    """Return the custom_id of the first request in which two inputs differ."""
    before = (raw for _, _, raw in read_lines(known))
    for pair in zip_longest(before, (raw for _, _, raw in read_lines(made))):
        if pair[0] != pair[1]:
            return custom_id_of(pair[0] or pair[1])
    return None


def _again(before: Path, now: Path) -> Path:
    """Return a path as it was named before if it is the same file or directory."""
    return before if same_file(before, now) else now


def _same_columns(one: Question, other: Question) -> bool:
    return (one.answer_column, one.fields) == (other.answer_column, other.fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checksum(results: Path, status: StatusFile | None) -> int:
    """Return the checksum of the results, from the status of the run if that has it."""
    merge = None if status is None else status.details.merge
    known = {} if merge is None else merge.files
    return known[results.name].crc32 if results.name in known else checksum(results)
