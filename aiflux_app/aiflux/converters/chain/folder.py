"""A chain on disk: the runs of its steps, what they were made from, and the final table.

Each step is an ordinary run. Everything is in ``TABLE.aiflux`` next to the table::

    final.csv.aiflux/chain.json                  what each step was made from; the table as written
    final.csv.aiflux/outcomes.json               what became of each row; the table is made of it
    final.csv.aiflux/steps/judge.requests.jsonl  the input of the run of the step `judge`
    final.csv.aiflux/steps/judge.json            its output
    final.csv.aiflux/steps/judge.json.aiflux     its run directory
    final.csv.aiflux/steps/judge.later.json      how its job plans it
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from shlex import quote
from typing import Any
from zlib import crc32

from aiflux.converters.answer_table import AnswerTable, first_difference, is_outdated
from aiflux.converters.chain.rows import (
    StepCounts,
    Unusable,
    make_requests,
    table_options,
    too_many_filter_failures,
    write_outcomes,
)
from aiflux.converters.chain.steps_file import KEPT, Chain, Step, recorded_step
from aiflux.converters.results import BackSummary, results_to_table
from aiflux.converters.source import size_and_time, write_ahead_log
from aiflux.converters.writer import Summary
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import CHAIN_STEPS, RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import WrittenFile, file_change, read_run_status, written_file
from aiflux.errors import (
    InputError,
    OutputExistsError,
    RunConflictError,
    StorageError,
    TooManyFailuresError,
)
from aiflux.util.files import (
    atomic_write,
    checksum,
    is_pattern,
    refuse_existing,
    remove_leftovers,
    same_file,
    storage_error,
    write_json,
)
from aiflux.util.lease import Lease, acquire
from aiflux.util.records import read_record, to_json
from aiflux.util.text import counted, without_secrets

CHAIN_RECORD = "chain.json"
_DISCARDED = ".discarded"


@dataclass(frozen=True)
class StepRecord:
    """What a step was made from.

    Attributes:
        asked: what its requests depend on, in addition to the rows.
        answering: what its answers depend on, in addition to the requests.
        best, majority: the expression by which a sample is chosen.
        made_from: digest, sizes and times of what its requests were made from; () before.
        samples, stopped: samples that reached the step, and those that its filter stopped.
        failed, reason: samples for which its filter failed, and why it did for the first of them.
        requests: their number; None before they are made.
        unusable, unusable_reason: samples that ended without a usable answer of the step although
            no request failed, and why for the first of them.
        unusable_allowed: how many of them are allowed.
    """

    name: str
    asked: dict[str, Any]
    answering: dict[str, Any]
    best: str | None = None
    majority: str | None = None
    made_from: tuple[int, ...] = ()
    samples: int = 0
    stopped: int = 0
    requests: int | None = None
    failed: int = 0
    reason: str = ""
    unusable: int = 0
    unusable_reason: str = ""
    unusable_allowed: int = 0

    def with_unusable(self, found: Unusable) -> StepRecord:
        """Return the record with the samples that have no usable answer by now."""
        count, reason = found.get(self.name, (0, ""))
        return replace(self, unusable=count, unusable_reason=reason.removeprefix(f"{self.name}: "))

    @property
    def unusable_text(self) -> str:
        """How many rows ended without a usable answer, and why; "" if none did."""
        rows = counted(self.unusable, "row")
        return f"{rows} without a usable answer: {self.unusable_reason}" if self.unusable else ""

    @property
    def refused(self) -> bool:
        """Whether its filter failed for more samples than are allowed, so it has no requests."""
        return self.failed > 0 and not self.made_from

    @property
    def filter_text(self) -> str:
        """What its filter did, in words; "" if it only let samples pass."""
        stopped = f"the filter stopped {self.stopped} of {self.samples}" if self.stopped else ""
        failed = f"the filter failed for {self.failed} of {self.samples}" if self.failed else ""
        return "; ".join(text for text in (stopped, failed) if text)


@dataclass(frozen=True)
class ChainRecord:
    """The content of ``chain.json``.

    Attributes:
        file: the `steps.yaml`.
        writing: the table is being written, or the process that wrote it was killed.
        table: the table as it was written.
        made_from: what it was made from, as for a step.
        removed: steps that the file does not have any more, in case it gets them again.
        options: of the last command, as words; without those that say what to do again.
        place: directory in which it was given.

    The others are those of ``Chain``.
    """

    file: Path
    source: Path
    kind: str
    output: Path
    steps: tuple[StepRecord, ...]
    reader: dict[str, Any] = field(default_factory=dict)
    filtered: str = KEPT
    skip_bad: bool = False
    only: tuple[str, ...] = ()
    writing: bool = False
    table: WrittenFile | None = None
    made_from: tuple[int, ...] = ()
    removed: tuple[StepRecord, ...] = ()
    options: tuple[str, ...] = ()
    place: Path | None = None

    def chain(self) -> Chain:
        """Return the chain as it was begun, without the settings of its steps."""
        steps = tuple(
            recorded_step(
                each.name,
                f"{self.file} (steps.{each.name})",
                each.asked,
                each.best,
                each.majority,
            )
            for each in self.steps
        )
        return Chain(
            self.file,
            self.source,
            self.kind,
            self.output,
            steps,
            self.reader,
            self.filtered,
            self.skip_bad,
            self.only,
        )


@dataclass(frozen=True)
class LaterStep:
    """How the job of a step plans its run, once the earlier steps have ended.

    Attributes:
        shards: the largest number of shards.
    """

    options: RunOptions
    models_dir: Path | None
    shards: int


@dataclass(frozen=True)
class ChainFolder:
    """The files of a chain; ``output`` is the absolute path of its table."""

    output: Path

    @property
    def directory(self) -> RunDirectory:
        """The directory of everything but the table; as private as that of a run."""
        return RunDirectory.of_output(self.output)

    @property
    def record_path(self) -> Path:
        """What the steps were made from."""
        return self.directory.path / CHAIN_RECORD

    @property
    def outcomes(self) -> Path:
        """What became of each row."""
        return self.directory.path / "outcomes.json"

    @property
    def report(self) -> Path:
        """The page that ``aiflux report`` writes."""
        return self.directory.path / "report.html"

    def requests(self, step: str) -> Path:
        """The input of a step's run."""
        return self.directory.path / CHAIN_STEPS / f"{step}.requests.jsonl"

    def results(self, step: str) -> Path:
        """The output of a step's run."""
        return self.directory.path / CHAIN_STEPS / f"{step}.json"

    def later(self, step: str) -> Path:
        """How the job of a step plans its run."""
        return self.directory.path / CHAIN_STEPS / f"{step}.later.json"

    def lease(self, step: str) -> Path:
        """Held while the run of a step is planned in its job."""
        return self.directory.path / CHAIN_STEPS / f".{step}.lease"

    def run(self, step: str) -> RunDirectory:
        """The run directory of a step."""
        return RunDirectory.of_output(self.results(step))

    def record(self) -> ChainRecord | None:
        """Return what the chain was made from; None before it was begun.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            return read_record(ChainRecord, self.record_path)
        except ValueError as error:
            raise StorageError(
                f"{self.record_path} is damaged: {error}",
                f"move the directory away and start again: {quote(str(self.directory.path))}",
            ) from error

    def asks_nothing(self, step: str) -> bool:
        """Return whether the requests of a step were made, and there are none."""
        path = self.requests(step)
        return path.is_file() and path.stat().st_size == 0

    def finished(self, step: str) -> bool:
        """Return whether a step has all its answers, or nothing to ask."""
        if self.asks_nothing(step):
            return True
        run = self.run(step)
        if not run.plan.is_file():
            return False
        status = read_run_status(run, read_plan(run))
        return status is not None and status.completed and self.results(step).is_file()

    def begun(self, step: str) -> bool:
        """Return whether requests of a step were submitted, or have results."""
        run = self.run(step)
        if not run.plan.is_file():
            return False
        journals = run.path.glob("journal*/*.jsonl")
        return run.submissions.exists() or any(path.stat().st_size for path in journals)


@dataclass(frozen=True)
class ChainRuns:
    """The steps of a chain, from its file to its table."""

    chain: Chain
    folder: ChainFolder

    @classmethod
    def of(cls, chain: Chain) -> ChainRuns:
        """Return the runs of a chain.

        Raises:
            UsageError: its output cannot be written.
        """
        output = AnswerTable.of(str(chain.output)).path
        if same_file(output, chain.source):
            raise InputError("source and output are the same file", "name another output")
        folder = ChainFolder(output)
        for name, command in (("plan.json", "aiflux run"), ("ask.json", "aiflux ask")):
            if (folder.directory.path / name).exists():
                raise RunConflictError(
                    f"{folder.directory.path} belongs to `{command}`", "name another output"
                )
        return cls(chain, folder)

    @property
    def names(self) -> tuple[str, ...]:
        """The steps of the file, and those that it had when the chain was begun."""
        record = self.folder.record()
        recorded = () if record is None else tuple(each.name for each in record.steps)
        return tuple(dict.fromkeys((*(step.name for step in self.chain.steps), *recorded)))

    def _lease(self) -> Lease:
        what = f"the chain {self.folder.output}"
        return acquire(self.folder.directory.plan_lease, what, wait=True)

    def begin(
        self,
        answering: Sequence[Mapping[str, Any]],
        *,
        force: bool = False,
        active: Collection[str] = (),
        options: Sequence[str] = (),
        place: Path | None = None,
    ) -> None:
        """Compare the steps with those of earlier starts, and record them.

        Args:
            answering: what the answers of each step depend on.
            options, place: see ``ChainRecord``.
            force: overwrite the table; run changed steps again.
            active: those of ``names`` that a process or a job works on.

        Raises:
            RunConflictError: a step changed since it was begun, or was removed during its work.
            OutputExistsError: the table exists and was not written by the chain, or was changed.
            StorageError: a file cannot be written.
        """
        self.folder.directory.make()
        try:
            (self.folder.directory.path / CHAIN_STEPS).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder.directory.path) from error
        with self._lease():
            earlier = self.folder.record()
            record = self._compared_record(earlier, answering, force=force, active=active)
            self._remove_discarded()
            before = {} if earlier is None else {each.name: each for each in _all_steps(earlier)}
            for now in record.steps:
                known = before.get(now.name)
                if known is not None and known.answering != now.answering:
                    self._discard(now.name)
            self._write(replace(record, options=tuple(options), place=place))

    def refuse(
        self,
        answering: Sequence[Mapping[str, Any]],
        *,
        force: bool = False,
        active: Collection[str] = (),
    ) -> None:
        """Refuse what ``begin`` refuses; nothing is written.

        Raises:
            RunConflictError, OutputExistsError: see ``begin``.
            StorageError: the record of earlier starts cannot be read.
        """
        self.folder.directory.refuse_foreign()
        self._compared_record(self.folder.record(), answering, force=force, active=active)

    def _compared_record(
        self,
        earlier: ChainRecord | None,
        answering: Sequence[Mapping[str, Any]],
        *,
        force: bool,
        active: Collection[str],
    ) -> ChainRecord:
        """Return the record of the steps, compared with that of earlier starts."""
        if not force:
            self._refuse_foreign_table(earlier)
        known = {} if earlier is None else {each.name: each for each in _all_steps(earlier)}
        self._refuse_removed(active)
        steps = []
        for at, (step, given) in enumerate(zip(self.chain.steps, answering, strict=True)):
            best, majority = step.chosen_by
            now = StepRecord(step.name, _plain(step.asked), _plain(given), best, majority)
            before = known.pop(step.name, None)
            if before is not None:
                after = [each.name for each in self.chain.steps[at + 1 :]]
                now = self._compared(before, now, after, force=force, active=active)
            steps.append(now)
        chain = self.chain
        record = ChainRecord(
            chain.path,
            chain.source,
            chain.kind,
            self.folder.output,
            tuple(steps),
            dict(chain.reader),
            chain.filtered,
            chain.skip_bad,
            chain.only,
            removed=tuple(known.values()),
        )
        if earlier is None:
            return record
        return replace(
            record, writing=earlier.writing, table=earlier.table, made_from=earlier.made_from
        )

    def _compared(
        self,
        before: StepRecord,
        now: StepRecord,
        after: Sequence[str],
        *,
        force: bool,
        active: Collection[str],
    ) -> StepRecord:
        """Return the record of a step that has one.

        Args:
            after: the steps after it, which ask about the samples that it chooses.
        """
        change = _change(before, now)
        if change is not None:
            self._refuse_change(now.name, [now.name], change, force=force, active=active)
            return now
        choice = _choice_change(before, now)
        if choice is not None:
            self._refuse_change(now.name, after, choice, force=force, active=active)
        return replace(before, best=now.best, majority=now.majority)

    def _refuse_change(
        self,
        step: str,
        asking: Sequence[str],
        change: str,
        *,
        force: bool,
        active: Collection[str],
    ) -> None:
        """Refuse a change of a step if steps that depend on it have begun.

        Raises:
            RunConflictError: one has, and the change is not forced; or something works on one.
        """
        busy = any(name in active for name in asking)
        if busy or (not force and any(map(self.folder.begun, asking))):
            again = "it and the steps after it" if step in asking else "the steps after it"
            remedy = f"run {again} again: --force"
            if busy:
                remedy = f"stop it first: aiflux cancel {quote(str(self.folder.output))}"
            raise RunConflictError(
                f"step {step} changed since it was begun: {change}",
                f"undo the change, or {remedy}; or name another output",
            )

    def _refuse_removed(self, active: Collection[str]) -> None:
        here = {step.name for step in self.chain.steps}
        for name in active:
            if name not in here:
                raise RunConflictError(
                    f"{self.chain.path} has no step {name!r} any more, but its work goes on",
                    f"stop it first: aiflux cancel {quote(str(self.folder.output))}",
                )

    def _discard(self, step: str) -> None:
        """Remove the answers of a step, if it was begun."""
        if not self.folder.begun(step):
            return
        run = self.folder.run(step).path
        try:
            self.folder.results(step).unlink(missing_ok=True)
            # Renamed first: what a kill leaves of a directory must not be resumed.
            run.rename(run.with_name(f"{run.name}{_DISCARDED}"))
        except OSError as error:
            raise storage_error(error, run) from error
        self._remove_discarded()

    def _remove_discarded(self) -> None:
        steps = self.folder.directory.path / CHAIN_STEPS
        try:
            for path in steps.glob(f"*{_DISCARDED}"):
                shutil.rmtree(path)
        except OSError as error:
            raise storage_error(error, steps) from error

    def _write(self, record: ChainRecord) -> None:
        write_json(self.folder.record_path, to_json(record))

    # --- the requests of a step -------------------------------------------------------------

    def _results(self, count: int) -> list[Path | None]:
        """Return the results of the first steps; None for one that asked nothing."""
        names = [step.name for step in self.chain.steps[:count]]
        return [
            None if self.folder.asks_nothing(name) else self.folder.results(name) for name in names
        ]

    def _state(self, count: int) -> tuple[int, ...]:
        """Return a digest of the source and the first steps, and their results' sizes and times."""
        chain = self.chain
        read = [str(chain.source), chain.kind, dict(chain.reader), chain.skip_bad]
        files = [(str(path), *size_and_time(path)) for path in _files(chain.source)]
        # What a later step sees of the same answers: the samples that are left, texts or lists.
        steps = [[step.name, step.asked, step.chosen_by] for step in chain.steps[:count]]
        state = [count, crc32(json.dumps([read, files, steps], sort_keys=True).encode())]
        for path in self._results(count):
            state += (0, 0) if path is None else size_and_time(path)
        return tuple(state)

    @property
    def source_state(self) -> tuple[int, ...]:
        """What changes with the source, and with the way in which it is read."""
        return self._state(0)

    def prepare(
        self, step: Step, allowed: Callable[[int], int], *, force: bool = False
    ) -> tuple[Summary | None, bool]:
        """Make the requests of a step whose earlier steps are finished, unless they are made.

        Args:
            allowed: returns for how many of some samples the filter may fail.
            force: replace the requests of a run that has begun.

        Returns:
            A summary of the conversion, if there was one with requests; and whether the requests
            are to replace others of the run.

        Raises:
            InputError: the source is wrong.
            RunConflictError: the requests of a run that has begun would be others.
            TooManyFailuresError: the filter fails for more samples than are allowed.
            StorageError: the requests cannot be written.
        """
        at = self.chain.steps.index(step)
        fresh, made = self.folder.requests(f"{step.name}.new"), self.folder.requests(step.name)
        with self._lease():
            remove_leftovers(fresh, self.folder.record_path)
            record = self._known()
            state = self._state(at)
            if record.steps[at].made_from == state and made.is_file():
                return None, is_outdated(self.folder.run(step.name))
            counts, summary = make_requests(self.chain, step, self._results(at), fresh)
            if self._state(at) != state:
                raise InputError(
                    f"the source {str(self.chain.source)!r} changed while it was read",
                    "run the same command again when it is complete",
                )
            refused = counts.failed > allowed(counts.samples)
            if refused:
                fresh.unlink()
            else:
                self._settle(step.name, fresh, made, force=force)
            now = replace(
                record.steps[at],
                made_from=() if refused else state,
                samples=counts.samples,
                stopped=counts.stopped,
                requests=None if refused else 0 if summary is None else summary.requests,
                failed=counts.failed,
                reason=counts.reason,
            )
            earlier = (each.with_unusable(counts.unusable) for each in record.steps[:at])
            self._write(replace(record, steps=(*earlier, now, *record.steps[at + 1 :])))
            self._refuse_filter(step, counts, allowed)
        return summary, is_outdated(self.folder.run(step.name))

    def draft(self, step: Step, allowed: Callable[[int], int], target: Path) -> int:
        """Write the requests of a step whose earlier steps are finished; return their number.

        Args:
            allowed: see ``prepare``.
            target: a file elsewhere, which may be empty afterwards.

        Raises:
            InputError, RunConflictError, TooManyFailuresError: see ``prepare``.
        """
        at = self.chain.steps.index(step)
        counts, summary = make_requests(self.chain, step, self._results(at), target)
        self._refuse_filter(step, counts, allowed)
        return 0 if summary is None else summary.requests

    def _refuse_filter(self, step: Step, counts: StepCounts, allowed: Callable[[int], int]) -> None:
        if counts.failed > allowed(counts.samples):
            raise too_many_filter_failures(
                self.chain, step.name, counts.failed, counts.samples, counts.reason
            )

    def _known(self) -> ChainRecord:
        record = self.folder.record()
        if record is None or [each.name for each in record.steps] != [
            step.name for step in self.chain.steps
        ]:
            raise RunConflictError(
                f"another command changed the chain {self.folder.output} at the same time",
                "run the same command again",
            )
        return record

    def _settle(self, step: str, fresh: Path, made: Path, *, force: bool) -> None:
        """Put new requests in their place."""
        earlier = made.is_file()
        if earlier and filecmp.cmp(fresh, made, shallow=False):
            fresh.unlink()
            return
        if self.folder.begun(step) and not force:
            first = first_difference(made, fresh) if earlier else None
            fresh.unlink()
            raise RunConflictError(
                f"step {step} was begun with other requests: the source or an earlier step "
                f"changed since; the first request that differs is {first!r}",
                "undo the change, or answer again what changed: --force; or name another output",
            )
        fresh.replace(made)

    # --- the table --------------------------------------------------------------------------

    def _refuse_foreign_table(self, record: ChainRecord | None) -> None:
        """Refuse to replace a table that was not written by the chain, or was changed since."""
        if record is None or (record.table is None and not record.writing):
            refuse_existing(self.folder.output)
        elif record.table is not None:
            change = file_change(self.folder.output, record.table)
            if change is not None:
                raise OutputExistsError(
                    f"{self.folder.output} {change}",
                    "move it away to write it again from the results, or overwrite it with --force",
                )

    def write(
        self, allowed: Mapping[str, Callable[[int], int]], *, force: bool = False
    ) -> tuple[BackSummary, int] | None:
        """Write the table of a chain whose steps are finished; None if that was done before.

        Args:
            allowed: by step, returns how many of some samples may have no usable answer; see
                ``refuse_unusable``.

        Returns:
            A summary of the table, and the number of rows or samples with an error.

        Raises:
            InputError, RunConflictError: the source changed since the requests were made.
            OutputExistsError: a table exists that the chain did not write.
            StorageError: the table cannot be written.
        """
        output = self.folder.output
        with self._lease():
            record = self._known()
            limits = [replace(each, unusable_allowed=allowed[each.name](each.samples))
                      for each in record.steps]  # fmt: skip
            record = replace(record, steps=tuple(limits))
            if not force:
                self._refuse_foreign_table(record)
            made_from = (*self._state(len(self.chain.steps)), self._digest())
            if (record.made_from == made_from and record.table and output.exists()) and (
                file_change(output, record.table) is None
            ):
                self._write(record)
                return None
            remove_leftovers(self.folder.outcomes, output)
            with atomic_write(self.folder.outcomes, 0o600) as file:
                found = write_outcomes(self.chain, self._results(len(self.chain.steps)), file)
            steps = tuple(each.with_unusable(found.unusable) for each in record.steps)
            record = replace(record, steps=steps)
            # A kill right after the table appears must not make it somebody else's.
            self._write(replace(record, writing=True, table=None))
            options = table_options(self.chain, found)
            summary = results_to_table(self.folder.outcomes, output, options)
            table = written_file(output, checksum(output))
            self._write(replace(record, writing=False, table=table, made_from=made_from))
        return summary, found.errors

    def refuse_unusable(self) -> None:
        """Refuse a table with more rows than are allowed that lack a usable answer of a step.

        Raises:
            TooManyFailuresError: there are too many.
        """
        for step in self._known().steps:
            if step.unusable > step.unusable_allowed:
                raise TooManyFailuresError(
                    f"step {step.name}: {step.unusable_text}",
                    f"see the column error of {self.folder.output}; correct the step, or make the "
                    "fields of its schema required and add validate: true, and run it again with "
                    "--force; or allow such rows with max_failures",
                )

    def _digest(self) -> int:
        """Return a number that changes with everything that the table depends on in the file."""
        best = [step.chosen_by for step in self.chain.steps]
        asked = [step.asked for step in self.chain.steps]
        content = [self.chain.filtered, best, asked]
        return crc32(json.dumps(content, sort_keys=True).encode())


def _all_steps(record: ChainRecord) -> tuple[StepRecord, ...]:
    """Return the steps of a record, and those that were removed before, which come first."""
    return (*record.removed, *record.steps)


def _files(source: Path) -> list[Path]:
    """Return the files of a source: those in a directory, or a database and what is new in it."""
    if is_pattern(source):
        return sorted(map(Path, glob(str(source), recursive=True)))
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.is_file())
    log = write_ahead_log(source)
    return [source] if log is None else [source, log]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _change(before: StepRecord, now: StepRecord) -> str | None:
    """Return what changed in a step, in words."""
    for old, new in ((before.asked, now.asked), (before.answering, now.answering)):
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                return changed_text(name, old.get(name), new.get(name))
    return None


def _choice_change(before: StepRecord, now: StepRecord) -> str | None:
    """Return how the choice of a sample changed, in words."""
    for name, old, new in (
        ("best", before.best, now.best),
        ("majority", before.majority, now.majority),
    ):
        if old != new:
            return changed_text(name, old, new)
    return None


def changed_text(name: str, old: Any, new: Any) -> str:
    """Return how a setting or an option changed, in words."""
    key = "samples" if name == "n" else name
    before, after = _shown(old), _shown(new)
    if before == after:
        return f"{key} was another one, which differs where it is not shown or cut: {after}"
    return f"{key} was {before}, and is now {after}"


def _shown(value: Any) -> str:
    text = "not given" if value is None else repr(without_secrets(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
