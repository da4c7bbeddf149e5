"""Write requests: streamed, complete or not at all, with a summary and unique custom_ids."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from aiflux.converters.request_form import RequestDraft, RequestForm
from aiflux.errors import InputError, UsageError
from aiflux.util.files import atomic_write, refuse_special
from aiflux.util.lines import MAX_LINE_BYTES
from aiflux.util.unicode import terminal_line

SHOWN = 20
_KEPT = 1000
_PLACES = 5
SKIP_REMEDY = "correct the input; or leave such {units} out with --skip-bad"

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much (0 where that is not known)."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that becomes no request.

    Attributes:
        number: as in ``Draft``.
        place: where it stands, in words.
        bad: it is wrong, and only left out where the user said so; else it is not meant to become
            a request (a binary file, one that is too large).
    """

    number: int
    place: str
    reason: str
    bad: bool = True

    def __str__(self) -> str:
        return terminal_line(f"{self.place}: {self.reason}")


EMPTY = "with nothing filled in: what the template names is empty"
ANSWERED = (
    "that end with an assistant's turn, which the model continues or answers; remove the last turn "
    "where it is to be written anew"
)


class BadRowError(ValueError):
    """A row that cannot become a request; the text says why."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes:
        source: what was read.
        output: what was written; None for a trial.
        unit: what ``rows`` counts: row, entry, file or image.
        rows: rows read; every one became a request (several, where files are cut into chunks) or
            was skipped.
        requests: requests written.
        skipped: number of rows left out.
        examples: the first thousand of them.
        skipped_path: the file that lists all of them, where there are any.
        notes: what was detected or is worth knowing.
        first: a trial's requests.
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


Items = Iterable[RequestDraft | Skipped]


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    Attributes:
        place: how a number is told, such as ``line`` in ``line 7``.
        limit: stop after so many requests and write nothing: a trial.
        notes: asked at the end.
        nothing: asked what to do where the source holds none.
        numbered: custom_ids count the rows, so that none can come twice.
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
    nothing: Callable[[], str] = lambda: "check what it holds"

    def run(self, items: Items) -> Summary:
        """Write a request for every draft.

        Raises:
            InputError: rows are bad and may not be skipped, or nothing is left; nothing is written.
            StorageError: the disk refused.
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
            raise UsageError("no output was named", "--output FILE")
        if self.output is None:
            return
        if same_file(self.output, self.source):
            raise InputError("input and output are the same file", "name another output")
        listing = skipped_path(self.output)
        if same_file(listing, self.source):
            raise InputError(
                f"{str(listing)!r} is the input, and would be the list of what is skipped",
                "name another output",
            )
        refuse_special(self.output)
        if not os.path.isdir(self.output.parent):
            raise InputError(
                f"the output's folder {str(self.output.parent)!r} is not there",
                f"mkdir -p {str(self.output.parent)!r}",
            )


def same_file(one: Path, other: Path) -> bool:
    """Tell whether both names lead to the same file; what cannot be looked at is none."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def skipped_path(output: Path) -> Path:
    """Return the file that lists what was skipped: one JSON object a line."""
    return output.with_name(f"{output.stem}.skipped.jsonl")


class _Tally:
    """What accumulates over one conversion."""

    def __init__(self, job: Conversion, stack: ExitStack) -> None:
        self.job = job
        self.stack = stack
        self.rows = self.requests = self.bad = 0
        self.skipped: list[Skipped] = []
        self.skips = 0
        self.first: list[dict[str, Any]] = []
        self.remarks: dict[str, list[int]] = {}
        self.seen = SeenIds()
        self._skip_file: IO[bytes] | None = None
        self._file = None if job.limit is not None else self._open(job.output)

    def _open(self, path: Path | None) -> IO[bytes] | None:
        return None if path is None else self.stack.enter_context(atomic_write(path))

    def take(self, item: RequestDraft | Skipped) -> None:
        if isinstance(item, RequestDraft):
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
            raise BadRowError("its custom_id is empty; every request needs a name of its own")
        earlier = None
        if not self.job.numbered:
            earlier = self.seen.first_use(draft.custom_id, draft.number)
        if earlier is not None:
            raise BadRowError(
                f"custom_id {draft.custom_id!r} was used at {self.job.place} {earlier} already; "
                "every request needs a name of its own"
            )
        if draft.messages:
            self._check_messages(draft.content)
        remark = draft.remark or (ANSWERED if _answered(draft) else "")
        if remark:
            self.remarks.setdefault(remark, []).append(draft.number)
        line = self.job.form.line(draft)
        if len(line) > MAX_LINE_BYTES:
            raise BadRowError(f"the request is longer than {MAX_LINE_BYTES >> 20} MiB")
        self.requests += 1
        if self._file is None:
            self.first.append(json.loads(line))
        elif not self._failing:
            self._file.write(line)

    def _check_messages(self, messages: list[Any]) -> None:
        if not messages:
            raise BadRowError("its list of messages is empty")
        if self.job.form.endpoint != "chat":
            raise BadRowError("a list of messages is for --endpoint chat only")
        if self.job.form.system is not None and messages[0].get("role") == "system":
            raise BadRowError("it has a system message of its own; leave out --system")

    def _notes(self) -> tuple[str, ...]:
        """Return the job's notes, and the counts of what is worth a warning."""
        found = []
        for remark, numbers in self.remarks.items():
            requests = f"{len(numbers)} request" + ("" if len(numbers) == 1 else "s")
            places = ", ".join(map(str, numbers[:_PLACES])) + (", ..." * (len(numbers) > _PLACES))
            found.append(f"{requests} {remark} ({self.job.place} {places})")
        return (*self.job.notes(), *found)

    @property
    def _failing(self) -> bool:
        """Nothing will be written: what still matters is which rows are bad."""
        return bool(self.bad) and not self.job.skip_bad

    def _skip(self, item: Skipped) -> None:
        self.skips += 1
        self.bad += item.bad
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
        """Raise InputError where nothing may be written."""
        job, unit = self.job, self.job.unit
        nothing = "; nothing was written"
        if self._failing:
            bad = [item for item in self.skipped if item.bad]
            raise InputError(
                f"{self.bad} of {self.rows} {plural(unit)} of {str(job.source)!r} cannot be used"
                f"{nothing}",
                SKIP_REMEDY.format(units=plural(unit)),
                listed(bad, self.bad),
            )
        if not self.requests:
            seen = f"no {unit}" if not self.rows else f"no {unit} that can be used"
            raise InputError(
                f"{str(job.source)!r} holds {seen}{nothing}",
                job.nothing() if not self.rows else "the lines above say why",
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


def _answered(draft: RequestDraft) -> bool:
    return draft.messages and bool(draft.content) and draft.content[-1].get("role") == "assistant"


def plural(unit: str) -> str:
    """Return the plural of what a conversion counts."""
    return "entries" if unit == "entry" else f"{unit}s"


def listed(items: Iterable[Skipped], count: int) -> tuple[str, ...]:
    """Return the first ``SHOWN`` of ``count`` items as texts, and how many more there are."""
    texts = [str(item) for item in islice(items, SHOWN)]
    if count > len(texts):
        texts.append(f"... and {count - len(texts)} more")
    return tuple(texts)


def every(items: Iterator[Any], step: int, tell: Callable[[], None]) -> Iterator[Any]:
    """Pass items on, and call ``tell`` after every ``step`` of them and at the end."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if number % step == 0:
            tell()
    if number % step:
        tell()


@contextmanager
def reading(path: Path, what: str = "the input") -> Iterator[None]:
    """Turn an OSError met in reading ``path`` into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what} {str(path)!r} cannot be read: {error.strerror or error}",
            "check the path and its permissions",
        ) from error


_FIRST_SIZE = 1 << 12


class SeenIds:
    """An open-addressing table from a name's 64-bit hash to the number it was first used at.

    Names themselves are not kept: of ten million names, two different ones are taken for the same
    with a probability of about three in a million.
    """

    def __init__(self) -> None:
        self._used = 0
        self._hashes, self._numbers = _table(_FIRST_SIZE)

    def first_use(self, name: str, number: int) -> int | None:
        """Return the number that ``name`` was used at before; else note it and return None."""
        key = hash(name) or 1
        slot = self._slot(key)
        if self._hashes[slot]:
            return self._numbers[slot]
        self._hashes[slot], self._numbers[slot] = key, number
        self._used += 1
        if 2 * self._used > len(self._hashes):
            self._grow()
        return None

    def _slot(self, key: int) -> int:
        """Return the slot that holds a hash, or the free one where it belongs."""
        mask = len(self._hashes) - 1
        slot = key & mask
        while self._hashes[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        hashes, numbers = self._hashes, self._numbers
        self._hashes, self._numbers = _table(2 * len(hashes))
        for key, number in zip(hashes, numbers, strict=True):
            if key:
                slot = self._slot(key)
                self._hashes[slot], self._numbers[slot] = key, number


def _table(size: int) -> tuple[array[int], array[int]]:
    empty = bytes(8 * size)
    return array("q", empty), array("q", empty)
