"""Write requests: streamed, all or nothing, with unique custom_ids and a summary."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import IO, Any, NamedTuple

from aiflux.converters.cells import BadRowError
from aiflux.converters.request_form import WITH_MESSAGES, RequestDraft, RequestForm
from aiflux.errors import InputError, UsageError
from aiflux.util.compression import plain_name
from aiflux.util.files import atomic_write, refuse_special, same_file
from aiflux.util.lines import MAX_LINE_BYTES
from aiflux.util.text import terminal_line

SHOWN = 20
_KEPT = 1000
_PLACES = 5
SKIP_REMEDY = "correct the input, or skip these {units} with --skip-bad"

Progress = Callable[[int, int], None]
"""Called with the amount done and the total (0 if unknown)."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input item that becomes no request.

    Attributes:
        number: as in ``RequestDraft``.
        place: its position, in words.
        bad: it is invalid, and skipped only with ``skip_bad``. Otherwise it was not meant to become
            a request, such as a binary or too large file.
    """

    number: int
    place: str
    reason: str
    bad: bool = True

    def __str__(self) -> str:
        return terminal_line(f"{self.place}: {self.reason}")


class RequestLines(NamedTuple):
    """Requests of consecutive rows, written by ``RequestForm`` already.

    Attributes:
        numbers, ids: of each request; see ``RequestDraft``.
        lines: each with its line ending.
        content: all lines.
    """

    numbers: Sequence[int]
    ids: Sequence[str]
    lines: Sequence[str]
    content: bytes


EMPTY = "with nothing filled in: the template's fields are empty"
ANSWERED = (
    "that end with an assistant's turn, which the model continues or answers; to generate it "
    "again: --drop-last-assistant"
)
SHOWN_BEFORE = "with the prompt of an example, so that the answer is in the request"


@dataclass(frozen=True)
class Summary:
    """Result of a conversion.

    Attributes:
        source: the input.
        output: the file written; None for a preview.
        unit: what ``rows`` counts: row, entry, file or image.
        rows: number of rows read. Each became a request (several, if files are split into chunks)
            or was skipped.
        requests: number of requests written.
        skipped: number of rows skipped.
        examples: the first thousand skipped rows.
        skipped_path: the file that lists all skipped rows, if any.
        notes: what was detected, and warnings.
        first: the requests of a preview.
    """

    source: Path
    output: Path | None
    unit: str
    rows: int
    requests: int
    skipped: int = 0
    examples: tuple[Skipped, ...] = ()
    skipped_path: Path | None = None
    notes: tuple[str, ...] = ()
    first: tuple[dict[str, Any], ...] = ()


Item = RequestDraft | RequestLines | Skipped


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    Attributes:
        place: unit of a position, such as ``line`` in ``line 7``.
        limit: stop after this number of requests and write nothing (a preview).
        notes: called at the end.
        nothing: returns the remedy if the source is empty.
        numbered: custom_ids are row numbers, so they need no check for duplicates.
    """

    source: Path
    output: Path | None
    form: RequestForm
    unit: str = "row"
    place: str = "line"
    skip_bad: bool = False
    limit: int | None = None
    notes: Callable[[], tuple[str, ...]] = tuple
    numbered: bool = False
    nothing: Callable[[], str] = lambda: "check its content"

    def run(self, items: Iterable[Item]) -> Summary:
        """Write a request for each draft, and requests that are lines already.

        Raises:
            InputError: rows are invalid and may not be skipped, or none is left.
            StorageError: the output cannot be written.
        """
        self._check_paths()
        with ExitStack() as stack:
            tally = _Tally(self, stack)
            for item in items:
                tally.take(item)
                if self.limit is not None and len(tally.first) >= self.limit:
                    break
            tally.refuse()
            summary = tally.summary()
        if summary.output is not None and not summary.skipped:
            skipped_path(summary.output).unlink(missing_ok=True)
        return summary

    def _check_paths(self) -> None:
        if self.limit is None and self.output is None:
            raise UsageError("no output file was given", "--output FILE")
        if self.output is None:
            return
        if same_file(self.output, self.source):
            raise InputError("input and output are the same file", "use another output")
        listing = skipped_path(self.output)
        if same_file(listing, self.source):
            raise InputError(
                f"{str(listing)!r} is the input, but the skipped rows would be listed there",
                "use another output",
            )
        refuse_other_form(self.output, "requests are JSON Lines", REQUESTS)
        refuse_special(self.output)
        refuse_special(listing)
        if not os.path.isdir(self.output.parent):
            raise InputError(
                f"the output directory {str(self.output.parent)!r} does not exist",
                f"mkdir -p {quote(str(self.output.parent))}",
            )


REQUESTS = (".jsonl", ".ndjson", ".json")
"""Suffixes of files of requests; `aiflux run` reads JSON Lines under each of these names."""
_FORMS = (
    ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xlsx", ".xls",
    ".xlsm", ".xlsb", ".ods", ".duckdb", ".sqlite", ".sqlite3", ".npy", ".npz", ".html", ".pdf",
    ".docx", ".bz2", ".xz", ".zip",
)  # fmt: skip


def refuse_other_form(
    target: Path, written: str, own: Sequence[str], commands: Mapping[str, str] = {}
) -> None:
    """Refuse a name whose suffix promises another form than that of the content.

    An unknown suffix promises nothing.

    Args:
        written: what is written, and its form.
        own: suffixes of that form; the remedy names the first.
        commands: which command writes the form of another suffix.

    Raises:
        UsageError: the name ends in another known suffix, or in that of a compressed file.
    """
    plain, suffix = plain_name(target), target.suffix.lower()
    if plain != target:
        named = plain if plain.suffix.lower() in own else plain.with_suffix(own[0])
        raise UsageError(
            f"the output {target.name!r} is named as a compressed file, but AI-Flux does not "
            "compress what it writes",
            f"--output {quote(named.name)}, and compress it afterwards",
        )
    if suffix in own or suffix not in _FORMS:
        return
    other = f", or use `{commands[suffix]}` for {suffix}" if suffix in commands else ""
    raise UsageError(
        f"the output {target.name!r} ends in {suffix}, but {written}",
        f"--output {quote(target.with_suffix(own[0]).name)}{other}",
    )


def skipped_path(output: Path) -> Path:
    """Return the path of the file that lists skipped rows, one JSON object per line."""
    return output.with_name(f"{output.stem}.skipped.jsonl")


class _Tally:
    """Counters and open files of one conversion."""

    def __init__(self, job: Conversion, stack: ExitStack) -> None:
        self.job = job
        self.stack = stack
        self.rows = self.requests = self.bad = 0
        self.skipped: list[Skipped] = []
        self.skips = 0
        self.reason: str | None = None  # of the first row that was skipped, and whether of all
        self.alike = True
        self.first: list[dict[str, Any]] = []
        self.remarks: dict[str, list[int]] = {}
        self.seen = SeenIds()
        self._skip_file: IO[bytes] | None = None
        self._file = None if job.limit is not None else self._open(job.output)

    def _open(self, path: Path | None) -> IO[bytes] | None:
        return None if path is None else self.stack.enter_context(atomic_write(path))

    def take(self, item: Item) -> None:
        if isinstance(item, RequestLines):
            self._write_lines(item)
        elif isinstance(item, RequestDraft):
            self.rows += item.part == 0
            try:
                self._write(item)
            except BadRowError as error:
                place = f"{self.job.place} {item.number}"
                self._skip(Skipped(item.number, place, str(error)))
        else:
            self.rows += 1
            self._skip(item)

    def _write(self, draft: RequestDraft) -> None:
        if not draft.custom_id:
            raise BadRowError("the custom_id is empty; every request needs a unique one")
        earlier = None
        if not self.job.numbered:
            earlier = self.seen.first_use(draft.custom_id, draft.number)
        if earlier is not None:
            raise BadRowError(self._used_before(draft.custom_id, earlier))
        if draft.messages and self.job.form.drop_last_assistant:
            draft = replace(draft, content=_without_last_answer(draft.content))
        if draft.messages:
            self._check_messages(draft)
        remark = draft.remark or self._remark(draft)
        if remark:
            self.remarks.setdefault(remark, []).append(draft.number)
        if self.job.form.documents and not draft.documents:
            raise BadRowError(f"it has no documents for --endpoint {self.job.form.endpoint}")
        line = self.job.form.line(draft)
        if len(line) > MAX_LINE_BYTES:
            raise BadRowError(f"the request is longer than {MAX_LINE_BYTES >> 20} MiB")
        self.requests += 1
        if self._file is None:
            self.first.append(json.loads(line))
        elif not self._failing:
            self._file.write(line)

    def _used_before(self, custom_id: str, earlier: int) -> str:
        return (
            f"custom_id {custom_id!r} was already used at {self.job.place} {earlier}; "
            "every request needs a unique one"
        )

    def _write_lines(self, block: RequestLines) -> None:
        """Write what needs no other check than that of the custom_ids."""
        self.rows += len(block.lines)
        repeated = {} if self.job.numbered else self.seen.repeats(block.ids, block.numbers)
        for at, earlier in repeated.items():
            reason = self._used_before(block.ids[at], earlier)
            number = block.numbers[at]
            self._skip(Skipped(number, f"{self.job.place} {number}", reason))
        self.requests += len(block.lines) - len(repeated)
        content = block.content
        if repeated:
            left = (line for at, line in enumerate(block.lines) if at not in repeated)
            content = "".join(left).encode()
        if self._file is not None and not self._failing:
            self._file.write(content)

    def _remark(self, draft: RequestDraft) -> str:
        if _answered(draft):
            return ANSWERED
        if self.job.form.shots and isinstance(draft.content, str):
            return SHOWN_BEFORE if draft.content in self.job.form.example_prompts else ""
        return ""

    def _check_messages(self, draft: RequestDraft) -> None:
        messages = draft.content
        if not messages:
            raise BadRowError("the list of messages is empty")
        if self.job.form.endpoint not in WITH_MESSAGES:
            needed = " or ".join(WITH_MESSAGES)
            raise BadRowError(f"a list of messages requires --endpoint {needed}")
        if self.job.form.system_of(draft) is not None and messages[0].get("role") == "system":
            raise BadRowError("it already has a system message; remove yours")

    def _notes(self) -> tuple[str, ...]:
        """Return the job's notes and the number of requests with each remark."""
        found = []
        for remark, numbers in self.remarks.items():
            requests = f"{len(numbers)} request" + ("" if len(numbers) == 1 else "s")
            places = ", ".join(map(str, numbers[:_PLACES])) + (", ..." * (len(numbers) > _PLACES))
            found.append(f"{requests} {remark} ({self.job.place} {places})")
        return (*self.job.notes(), *found)

    @property
    def _failing(self) -> bool:
        """Whether invalid rows prevent any output; further rows are only checked."""
        return bool(self.bad) and not self.job.skip_bad

    def _skip(self, item: Skipped) -> None:
        self.skips += 1
        self.bad += item.bad
        self.reason = item.reason if self.reason is None else self.reason
        self.alike = self.alike and item.bad and item.reason == self.reason
        if len(self.skipped) < _KEPT and (item.bad or not self._failing):
            self.skipped.append(item)
        if self.job.limit is not None or self._failing or self.job.output is None:
            return
        if self._skip_file is None:
            self._skip_file = self._open(skipped_path(self.job.output))
        if self._skip_file is not None:
            entry = {"place": item.place, "reason": item.reason}
            self._skip_file.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")

    def refuse(self) -> None:
        """Raise InputError if nothing may be written."""
        job, unit = self.job, self.job.unit
        nothing = "; nothing was written"
        if self.alike and self.skips == self.rows > _PLACES:
            raise NoRequestsError(
                f"all {self.rows} {plural(unit)} of {str(job.source)!r} are invalid for the same "
                f"reason{nothing}",
                "correct the template or option that causes it, or else the input; --skip-bad "
                f"would leave no {unit}",
                (f"{self.skipped[0]}, as in all others",),
            )
        if self._failing:
            bad = [item for item in self.skipped if item.bad]
            raise InputError(
                f"{self.bad} of {self.rows} {plural(unit)} of {str(job.source)!r} "
                f"{'is' if self.bad == 1 else 'are'} invalid"
                f"{nothing}",
                SKIP_REMEDY.format(units=plural(unit)),
                listed(bad, self.bad),
            )
        if not self.requests:
            found = f"no {unit}" if not self.rows else f"no valid {unit}"
            raise NoRequestsError(
                f"{str(job.source)!r} contains {found}{nothing}",
                job.nothing() if not self.rows else "see the reasons above",
                listed(self.skipped, self.skips),
            )

    def summary(self) -> Summary:
        job = self.job
        output = None if job.limit is not None else job.output
        listed_in = skipped_path(output) if output is not None and self.skips else None
        return Summary(
            source=job.source,
            output=output,
            unit=job.unit,
            rows=self.rows,
            requests=self.requests,
            skipped=self.skips,
            examples=tuple(self.skipped),
            skipped_path=listed_in,
            notes=self._notes(),
            first=tuple(self.first),
        )


def _without_last_answer(messages: list[Any]) -> list[Any]:
    end = len(messages)
    while end and messages[end - 1].get("role") == "assistant":
        end -= 1
    if messages and not end:
        raise BadRowError("it has only turns of the assistant, which --drop-last-assistant removes")
    return messages[:end]


def _answered(draft: RequestDraft) -> bool:
    return draft.messages and bool(draft.content) and draft.content[-1].get("role") == "assistant"


def plural(unit: str) -> str:
    """Return the plural of what a conversion counts."""
    return "entries" if unit == "entry" else f"{unit}s"


def listed(items: Iterable[Skipped], count: int) -> tuple[str, ...]:
    """Return the first ``SHOWN`` of ``count`` items as texts, and the number of others."""
    texts = [str(item) for item in islice(items, SHOWN)]
    if count > len(texts):
        texts.append(f"... and {count - len(texts)} more")
    return tuple(texts)


def every(items: Iterator[Any], step: int, report: Callable[[], None]) -> Iterator[Any]:
    """Pass items on, and call ``report`` after every ``step`` items and at the end."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if number % step == 0:
            report()
    if number % step:
        report()


class NoRequestsError(InputError):
    """No row of a source that was read to its end can become a request."""


@contextmanager
def reading(path: Path, what: str = "the input") -> Iterator[None]:
    """Convert an OSError raised while reading ``path`` to an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what} {str(path)!r} cannot be read: {error.strerror or error}",
            "check the path and its permissions",
        ) from error


_PARTS = 64
_FIRST_SIZE = 1 << 6
_MAX_NUMBER = (1 << 32) - 1


class SeenIds:
    """Compact hash table from a name's 64-bit hash to the number where it was first used.

    Names themselves are not stored. Among ten million names, the probability that two different
    ones collide is about three in a million. The table has parts that grow one after another, so
    that it never needs twice its memory: 12 bytes for each of at most three slots per name.
    """

    def __init__(self) -> None:
        self._parts = [_Slots(_FIRST_SIZE) for _ in range(_PARTS)]

    def first_use(self, name: str, number: int) -> int | None:
        """Return the number where ``name`` was used before; else store it and return None.

        Numbers beyond 32 bits are returned as the largest one.
        """
        return self.repeats((name,), (number,)).get(0)

    def repeats(self, names: Iterable[str], numbers: Sequence[int]) -> dict[int, int]:
        """Store names; return the place of each that was used before, and the number of that use.

        This is the whole work of a conversion on most ids, so it is one loop.
        """
        if max(numbers, default=0) > _MAX_NUMBER:
            numbers = [min(number, _MAX_NUMBER) for number in numbers]
        found = {}
        parts = self._parts
        for at, name in enumerate(names):
            key = hash(name) or 1
            part = parts[key % _PARTS]
            hashes, mask = part.hashes, part.mask
            slot = key // _PARTS & mask
            while (used := hashes[slot]) and used != key:
                slot = slot + 1 & mask
            if used:
                found[at] = part.numbers[slot]
                continue
            hashes[slot], part.numbers[slot] = key, numbers[at]
            part.free -= 1
            if not part.free:
                parts[key % _PARTS] = part.grown()
        return found


class _Slots:
    """Slots of a part: an array of hashes, with 0 for a free slot, and one of numbers.

    Attributes:
        free: how many slots may be filled before it grows: it is never fuller than two thirds.
    """

    __slots__ = ("free", "hashes", "mask", "numbers")

    def __init__(self, size: int) -> None:
        self.hashes, self.numbers = array("q", [0]) * size, array("I", [0]) * size
        self.mask, self.free = size - 1, 2 * size // 3

    def grown(self) -> _Slots:
        """Return a part of twice the size."""
        more = _Slots(2 * len(self.hashes))
        hashes, numbers, mask = more.hashes, more.numbers, more.mask
        for key, number in zip(self.hashes, self.numbers, strict=True):
            if key:
                slot = key // _PARTS & mask
                while hashes[slot]:
                    slot = slot + 1 & mask
                hashes[slot], numbers[slot] = key, number
                more.free -= 1
        return more
