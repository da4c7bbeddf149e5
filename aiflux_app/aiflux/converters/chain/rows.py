"""The rows of a chain: which of them a step asks about, and what became of each at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import isnan
from pathlib import Path
from typing import IO, Any, TypeVar

from aiflux.converters.cells import as_json, cell
from aiflux.converters.chain.steps_file import DROPPED, Chain, Step
from aiflux.converters.jinja_template import Expression
from aiflux.converters.results import BackOptions
from aiflux.converters.results.answers import Answers, json_fields, requests_metadata
from aiflux.converters.source import open_source
from aiflux.converters.table import (
    CELL_DIGESTS,
    Row,
    SourceTable,
    TableOptions,
    changed_cell,
    digests,
    requests_of_table,
)
from aiflux.converters.writer import NoRequestsError, Progress, Skipped, Summary
from aiflux.core.batch.results_file import Result, choice_texts
from aiflux.errors import InputError, RunConflictError, TooManyFailuresError
from aiflux.util.text import counted

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Sample:
    """A row on its way through the steps; a row has several once a step asked for samples.

    Attributes:
        name: the custom_id of its requests.
        cells: the columns of the source, and the answers of the steps so far by their names.
        stopped: the step whose filter stopped it; "" if none did.
        error: why a step has no answer for it, such as ``judge: timeout: ...``; "" if all have.
        unusable: the step whose answers are why, without a failed request; "" if none is.
        members: the samples that its lists hold, if they were compared.
    """

    name: str
    cells: Mapping[str, Any]
    stopped: str = ""
    error: str = ""
    unusable: str = ""
    members: tuple[Sample, ...] = ()

    @property
    def lives(self) -> bool:
        """Whether the next step asks about it."""
        return not (self.stopped or self.error)

    def lost(self, step: Step, why: str) -> Sample:
        """Return the sample without a usable answer of a step."""
        return replace(self, error=f"{step.name}: {why}", unusable=step.name)


class ChainRows:
    """The rows of the source, with the answers of the first steps.

    Args:
        results: the results of these steps; None for a step that had nothing to ask.
        stack: closes the files.
    """

    def __init__(self, chain: Chain, results: Sequence[Path | None], stack: ExitStack) -> None:
        self.chain = chain
        self.table = open_source(chain.source, chain.kind, chain.reader, stack)
        self._steps = chain.steps[: len(results)]
        self._answers = [
            None if path is None else stack.enter_context(closing(Answers(path, in_order=True)))
            for path in results
        ]

    def __iter__(self) -> Iterator[Skipped | tuple[Row, list[Sample]]]:
        """Yield each row of the source with its samples."""
        only = frozenset(self.chain.only)
        for row in self.table.rows():
            if isinstance(row, Skipped):
                if not only:
                    yield row
                continue
            if only and row.name not in only:
                continue
            samples = [Sample(row.name, row.cells)]
            for step, answers in zip(self._steps, self._answers, strict=True):
                samples = self._after(step, compared(step, row, samples), answers)
            yield row, samples

    def _after(self, step: Step, samples: list[Sample], answers: Answers | None) -> list[Sample]:
        """Return the samples of a row after a step."""
        found: list[Sample] = []
        for sample in (filtered(step, each) for each in samples):
            answer = answers.get(sample.name) if sample.lives and answers is not None else None
            if not sample.lives:
                found.append(sample)
            elif answer is None:
                found.append(self._unasked(step, sample))
            else:
                found += _answered(step, sample, answer)
        if step.majority is not None:
            return [_most_frequent(step, step.majority, found)]
        if step.best is not None:
            choose = _preferred if step.compare else _best
            return [choose(step, step.best, found)]
        return found

    def _unasked(self, step: Step, sample: Sample) -> Sample:
        """Return a sample that became no request."""
        prompt, _ = step.prompt_and_form
        why = "no request could be made from the row"
        missing = [name for name in prompt.names if not _has(sample.cells, name)]
        try:
            prompt.draft(0, "", prompt.with_fields(sample.cells), {})
        except KeyError as error:
            why += f": no field {error}"
        except ValueError as error:
            why += f": {error}"
        lost = sample.lost(step, why)
        of_source = any(name.partition(".")[0] in self.table.columns for name in missing)
        skipped = self.chain.skip_bad and (of_source or step is self.chain.steps[0])
        return replace(lost, unusable="") if skipped else lost


def _has(cells: Mapping[str, Any], name: str) -> bool:
    try:
        cell(cells, name)
    except KeyError:
        return False
    return True


def compared(step: Step, row: Row, samples: list[Sample]) -> list[Sample]:
    """Return what a step asks about: the samples of a row, or one with the answers of all."""
    if not step.compare:
        return samples
    alive = tuple(sample for sample in samples if sample.lives)
    if not alive:
        return [_ended(samples)]
    shown = [alive[at] for at in shown_order(alive)]
    lists = {name: [each.cells[name] for each in shown] for name in step.compare}
    return [Sample(row.name, {**alive[0].cells, **lists}, members=alive)]


def shown_order(members: Sequence[Sample]) -> list[int]:
    """Return the places of samples in the order in which a step that compares them sees them.

    Judges prefer answers for their position. An order by the hashes of the names differs from row
    to row, and is the same at each start.
    """
    digests = [sha256(each.name.encode("utf-8", "surrogatepass")).digest() for each in members]
    return sorted(range(len(members)), key=digests.__getitem__)


def filtered(step: Step, sample: Sample) -> Sample:
    """Return a sample after the filter of a step."""
    if step.filter is None or not sample.lives:
        return sample
    try:
        passed = step.filter.value(sample.cells)
    except ValueError as error:
        return replace(sample, error=f"{step.name}: the filter has no value: {error}")
    return sample if passed else replace(sample, stopped=step.name)


def _answered(step: Step, sample: Sample, answer: Result) -> Iterator[Sample]:
    """Yield a sample for each answer to its request."""
    _refuse_other_row(step, sample, answer)
    if answer.error is not None:
        yield replace(sample, error=f"{step.name}: {answer.failure}")
        return
    texts = [choice.text for choice in choice_texts(answer.output)]
    if not texts:
        yield sample.lost(step, "the answer has no choices")
    for number, text in enumerate(texts, start=1):
        name = sample.name if len(texts) == 1 else f"{sample.name}.{number}"
        value: Any = text
        if step.fields:
            value = json_fields(text)
        if value is None:
            yield replace(sample, name=name).lost(step, "the answer is no JSON object")
        else:
            yield replace(sample, name=name, cells={**sample.cells, step.name: value})


def _refuse_other_row(step: Step, sample: Sample, answer: Result) -> None:
    """Refuse an answer to a request that was made from other cells.

    Raises:
        RunConflictError: the source changed, or an earlier step has other answers by now.
    """
    known = requests_metadata(answer).get(CELL_DIGESTS) or {}
    try:
        changed = changed_cell(sample.cells, known)
    except (KeyError, ValueError) as error:
        changed = str(error).strip("'")
    if changed is not None:
        raise RunConflictError(
            f"step {step.name}: {changed!r} of {sample.name!r} changed since its request was made",
            "restore the source, or run the steps again whose rows changed: --force",
        )


# --- the choice of a sample -------------------------------------------------------------------


def _ended(samples: Sequence[Sample]) -> Sample:
    """Return what stands for a row without a living sample."""
    return next((sample for sample in samples if sample.error), samples[0])


def _best(step: Step, best: Expression, samples: Sequence[Sample]) -> Sample:
    """Return the sample with the largest value, the first of several."""

    def score(sample: Sample) -> int | float:
        return _number(best, best.value(sample.cells))

    found = _valued(step, "best", score, samples)
    return max(found, key=lambda pair: pair[1])[0] if isinstance(found, list) else found


def _most_frequent(step: Step, majority: Expression, samples: Sequence[Sample]) -> Sample:
    """Return the first sample with the most frequent value."""

    def value(sample: Sample) -> str:
        found = majority.value(sample.cells)
        if found is None:
            raise ValueError(f"{majority.text!r} is null")
        return json.dumps(as_json(found), sort_keys=True)

    found = _valued(step, "majority", value, samples)
    if not isinstance(found, list):
        return found
    # Of equal counts, the value that was found first.
    ((most, _),) = Counter(value for _, value in found).most_common(1)
    return next(sample for sample, value in found if value == most)


def _preferred(step: Step, best: Expression, verdicts: Sequence[Sample]) -> Sample:
    """Return the sample that most of the verdicts name, or that they score highest in all."""

    def scores(verdict: Sample) -> list[int | float]:
        shown = _scores(best, best.value(verdict.cells), len(verdict.members))
        found = zip(shown_order(verdict.members), shown, strict=True)
        return [score for _, score in sorted(found)]

    found = _valued(step, "best", scores, verdicts)
    if not isinstance(found, list):
        return found
    members = found[0][0].members
    sums = [sum(each) for each in zip(*(scores for _, scores in found), strict=True)]
    chosen = sums.index(max(sums))
    # The verdict in the table is one that agrees, if there is one.
    agreeing = (verdict for verdict, scores in found if scores.index(max(scores)) == chosen)
    verdict = next(agreeing, found[0][0])
    sample = members[chosen]
    return replace(sample, cells={**sample.cells, step.name: verdict.cells[step.name]})


def _scores(best: Expression, value: Any, count: int) -> list[int | float]:
    """Return the scores that a verdict, a list of them or a number, gives to shown samples."""
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ValueError(
                f"{best.text!r} has {counted(len(value), 'score')} for {counted(count, 'sample')}"
            )
        return [_number(best, each) for each in value]
    named = _number(best, value)
    if isinstance(value, bool) or named not in range(1, count + 1):
        raise ValueError(f"{best.text!r} is {value!r}, which is no sample from 1 to {count}")
    return [int(at == named) for at in range(1, count + 1)]


def _number(expression: Expression, value: Any) -> int | float:
    # A float cannot hold every whole number, which an answer can contain.
    number = value if isinstance(value, int) else float(value)
    if isinstance(number, float) and isnan(number):
        raise ValueError(f"{expression.text!r} is not a number")
    return number


def _valued(
    step: Step, key: str, value: Callable[[Sample], _Value], samples: Sequence[Sample]
) -> list[tuple[Sample, _Value]] | Sample:
    """Return the living samples that have a value; if there is none, what stands for the row."""
    found: list[tuple[Sample, _Value]] = []
    others: list[Sample] = []
    for sample in samples:
        try:
            if sample.lives:
                found.append((sample, value(sample)))
            else:
                others.append(sample)
        except (ValueError, TypeError) as error:
            others.append(sample.lost(step, f"{key} has no value: {error}"))
    return found or _ended(others)


# --- the requests of a step -------------------------------------------------------------------


Unusable = dict[str, tuple[int, str]]
"""Of steps, the samples without a usable answer: their number, and why for the first of them."""


def _count_unusable(samples: Sequence[Sample], found: Unusable) -> None:
    for sample in samples:
        if sample.unusable:
            count, reason = found.get(sample.unusable, (0, sample.error))
            found[sample.unusable] = (count + 1, reason)


@dataclass
class StepCounts:
    """What a step asks about.

    Attributes:
        samples: those that reached it.
        stopped: those that its filter stopped.
        failed: those for which its filter failed, and why it did for the first of them.
        asked: those that passed.
        unusable: of the earlier steps.
    """

    samples: int = 0
    stopped: int = 0
    failed: int = 0
    reason: str = ""
    asked: int = 0
    unusable: Unusable = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Count a sample after the filter."""
        self.samples += 1
        self.stopped += bool(sample.stopped)
        self.failed += bool(sample.error)
        self.reason = self.reason or sample.error
        self.asked += sample.lives


def too_many_filter_failures(
    chain: Chain, step: str, failed: int, samples: int, reason: str
) -> TooManyFailuresError:
    """Return the error for a filter that failed for more rows than are allowed."""
    cause = reason.removeprefix(f"{step}: the filter has no value: ")
    return TooManyFailuresError(
        f"step {step}: its filter failed for {failed} of {counted(samples, 'row')}: {cause}",
        f"correct the filter in {chain.path}, or allow failures with max_failures",
    )


class StepTable:
    """The samples that a step asks about, as the rows of a table."""

    def __init__(self, step: Step, rows: ChainRows, counts: StepCounts) -> None:
        self._step = step
        self._rows = rows
        self._counts = counts
        self.path = rows.chain.source
        self.unit = rows.table.unit
        self.part, self.others = rows.table.part, rows.table.others
        at = rows.chain.steps.index(step)
        known = {*rows.table.columns}
        self._later = [
            (later, StepCounts())
            for later in (rows.chain.steps[1:] if at == 0 else ())
            if later.filter is not None and known.issuperset(later.filter.names)
        ]
        self.columns = (*rows.table.columns, *(each.name for each in rows.chain.steps[:at]))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was detected in the source; shown with the first step."""
        return self._rows.table.notes if self._step is self._rows.chain.steps[0] else ()

    def rows(
        self, columns: Sequence[str] | None = None, progress: Progress | None = None
    ) -> Iterator[Row | Skipped]:
        """Yield the samples that pass the filter; skipped rows of the source only once."""
        counts = self._counts
        for item in self._rows:
            if isinstance(item, Skipped):
                if self._step is self._rows.chain.steps[0]:
                    yield item
                continue
            row, samples = item
            _count_unusable(samples, counts.unusable)
            samples = compared(self._step, row, samples)
            for before in (sample for sample in samples if sample.lives):
                sample = filtered(self._step, before)
                counts.add(sample)
                if sample.lives:
                    for later, found in self._later:
                        found.add(filtered(later, sample))
                    yield Row(row.number, sample.name, sample.cells)

    def refuse_later_filters(self) -> None:
        """Refuse a later filter that needs only the source, and fails for all of its rows.

        Raises:
            TooManyFailuresError: there is one.
        """
        for step, found in self._later:
            if found.failed and found.failed == found.samples:
                chain = self._rows.chain
                raise too_many_filter_failures(
                    chain, step.name, found.failed, found.samples, found.reason
                )


def first_requests(chain: Chain, limit: int) -> Summary:
    """Return the first requests of the first step; nothing is written.

    Raises:
        InputError: the source cannot be read, or rows cannot become requests.
    """
    step = chain.steps[0]
    prompt, form = step.prompt_and_form
    with ExitStack() as stack:
        table: SourceTable = StepTable(step, ChainRows(chain, [], stack), StepCounts())
        options = TableOptions(prompt, skip_bad=chain.skip_bad, limit=limit)
        with _remedied():
            return requests_of_table(table, None, form, options, None)


def make_requests(
    chain: Chain, step: Step, results: Sequence[Path | None], target: Path
) -> tuple[StepCounts, Summary | None]:
    """Write the requests of a step; an empty file if there is nothing to ask.

    Args:
        results: of all earlier steps.

    Raises:
        InputError: the source cannot be read, or rows cannot become requests.
        RunConflictError: the source does not fit the answers of earlier steps.
        TooManyFailuresError: the filter of a later step fails for all rows of the source.
    """
    counts = StepCounts()
    first = step is chain.steps[0]
    prompt, form = step.prompt_and_form
    with ExitStack() as stack:
        table = StepTable(step, ChainRows(chain, results, stack), counts)
        options = TableOptions(prompt, skip_bad=chain.skip_bad or not first)
        with _remedied():
            try:
                summary = requests_of_table(table, target, form, options, None)
            except NoRequestsError:
                # Of a later step, all rows can end without a usable answer, as some can.
                if first and (counts.asked or not counts.samples):
                    raise
                target.write_bytes(b"")
                return counts, None
        table.refuse_later_filters()
    return counts, summary


@contextmanager
def _remedied() -> Iterator[None]:
    """Name the key of the file in errors, instead of the option of `aiflux convert`."""
    try:
        yield
    except InputError as error:
        remedy = (error.remedy or "").replace("--skip-bad", "skip_bad: true")
        raise InputError(error.message, remedy, error.problems) from error


# --- the final table --------------------------------------------------------------------------


@dataclass
class Outcomes:
    """What became of the rows.

    Attributes:
        errors: samples with an error.
        several: a row has several samples.
        unusable: of the steps.
    """

    errors: int = 0
    several: bool = False
    unusable: Unusable = field(default_factory=dict)


def write_outcomes(chain: Chain, results: Sequence[Path | None], file: IO[bytes]) -> Outcomes:
    """Write what became of each row, in the form of a results file.

    The answers of all steps are one JSON object, so that a table of results has a column for each.
    """
    used = dict.fromkeys(name for step in chain.steps for name in step.prompt_and_form[0].names)
    found, separator = Outcomes(), b"[\n"
    with ExitStack() as stack:
        rows = ChainRows(chain, results, stack)
        named = [name for name in used if name.partition(".")[0] in rows.table.columns]
        for item in rows:
            if isinstance(item, Skipped):
                continue
            row, samples = item
            if chain.filtered == DROPPED:
                samples = [sample for sample in samples if not sample.stopped]
            known = _digests(row, named)
            if samples and known:
                found.errors += sum(bool(sample.error) for sample in samples)
                _count_unusable(samples, found.unusable)
                found.several |= len(samples) > 1
                file.write(separator + _outcome(chain, row, samples, known))
                separator = b",\n"
    file.write(b"\n]\n" if separator == b",\n" else b"[]\n")
    return found


def _digests(row: Row, names: Sequence[str]) -> dict[str, str]:
    """Return the digests of cells by which the row is recognized; none of binary or missing cells.

    A row has others only if no request could be made from it.
    """
    found: dict[str, str] = {}
    for name in (*names, *row.cells):
        if name not in names and found:
            break
        with suppress(KeyError, ValueError):
            found |= digests(row.cells, [name])
    return found


def _outcome(chain: Chain, row: Row, samples: Sequence[Sample], known: Mapping[str, str]) -> bytes:
    # A reader of JSON answers skips what comes before </think>, which a text can contain.
    contents = (json.dumps(_columns(chain, each)).replace("<", "\\u003c") for each in samples)
    choices = [
        {"index": at, "message": {"content": content}} for at, content in enumerate(contents)
    ]
    entry = {
        "input": {"custom_id": row.name, "metadata": {CELL_DIGESTS: known}},
        "output": {"choices": choices},
        "error": None,
        "metadata": {},
    }
    return json.dumps(entry).encode()


def _columns(chain: Chain, sample: Sample) -> dict[str, Any]:
    """Return the values of a sample by the columns that the steps add."""
    values: dict[str, Any] = {"error": sample.error} if sample.error else {}
    for step in chain.steps:
        if step.name in sample.cells:
            answer = as_json(sample.cells[step.name])
            found = {f"{step.name}.{each}": _field(answer, each) for each in step.fields}
            values |= found or {step.name: answer}
    return values


def _field(answer: Any, name: str) -> Any:
    """Return a field of an answer, or of each of those that were compared."""
    return [each.get(name) for each in answer] if isinstance(answer, list) else answer.get(name)


def table_options(chain: Chain, found: Outcomes) -> BackOptions:
    """Return how the outcomes are joined with the source."""
    columns = tuple(name for step in chain.steps for name in step.columns)
    return BackOptions(
        source=chain.source,
        kind=chain.kind,
        reader=chain.reader,
        answer_column="",
        json_fields=(*columns, *(("error",) if found.errors else ())),
        choices="rows" if found.several else "first",
        custom_ids=False,
        errors=False,
        in_order=True,
        only_asked=chain.filtered == DROPPED,
    )
