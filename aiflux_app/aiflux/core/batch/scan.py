"""One pass over a part of the input, and putting together what the parts tell."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from aiflux.core.batch.ignored_fields import IgnoredFields
from aiflux.core.batch.input_errors import Problems
from aiflux.core.batch.request import LineError, request_entry
from aiflux.core.batch.schema import schema_problem
from aiflux.core.batch.tokens import estimate_tokens
from aiflux.util.lines import MAX_LINE_BYTES, ends_line, read_lines

# Lengths are counted in steps of so many tokens.
LENGTH_STEP = 64
_BUCKETS = 256
_MAX_MARKS = 65536


@dataclass(frozen=True, slots=True)
class Mark:
    """A place where the input can be cut: ``index`` requests lie before byte ``offset``."""

    index: int
    offset: int


class Names:
    """The custom_ids seen, as 64-bit hashes in 8 bytes each.

    The hashes are those of this process and of what it forks.
    """

    def __init__(self) -> None:
        self._buckets: list[array[int]] = [array("q") for _ in range(_BUCKETS)]

    def add(self, hashes: Iterable[int]) -> None:
        """Note names by their hashes."""
        buckets = self._buckets
        for name in hashes:
            buckets[name % _BUCKETS].append(name)

    def merge(self, other: Names) -> None:
        """Add the names of another part."""
        for mine, more in zip(self._buckets, other._buckets, strict=True):
            mine.extend(more)

    def repeated(self) -> set[int]:
        """Return the hashes that were added more than once."""
        repeated: set[int] = set()
        for bucket in self._buckets:
            if len(set(bucket)) < len(bucket):
                repeated.update(name for name, count in Counter(bucket).items() if count > 1)
        return repeated


@dataclass
class Part:
    """What one pass over a part of the input tells.

    Attributes:
        start, end: of the part, in bytes.
        plain: nothing stands in it but lines that are not blank and end with one line feed.
        offsets: of every request.
        models: in order of first appearance.
        unnamed: number of requests whose body names no model.
        endpoints: number of requests for each url.
        lengths: number of requests for each length in steps of ``LENGTH_STEP`` tokens.
        ignored: fields that Ollama ignores.
    """

    start: int
    end: int
    plain: bool = True
    offsets: array[int] = field(default_factory=lambda: array("q"))
    models: dict[str, None] = field(default_factory=dict)
    unnamed: int = 0
    endpoints: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    names: Names = field(default_factory=Names)
    problems: Problems = field(default_factory=Problems)
    ignored: IgnoredFields = field(default_factory=IgnoredFields)


def scan_part(
    path: Path, start: int, end: int, model: str | None, *, schemas: bool = False
) -> Part:
    """Check the lines from byte ``start``, where one begins, to byte ``end``.

    Args:
        model: the run's model, if it is named outside the input.
        schemas: check the JSON Schemas that requests ask for, too.

    Raises:
        InputError: the file cannot be read.
    """
    part = Part(start, end)
    endpoints, lengths, models = part.endpoints, part.lengths, part.models
    names = array("q")
    following = start
    for _, offset, raw in read_lines(path, start, end):
        if offset != following:
            part.plain = False
        following = offset + len(raw) + 1
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise LineError(f"longer than {MAX_LINE_BYTES >> 20} MiB; split the request")
            entry = request_entry(raw, model, exact=False)
            if schemas and (problem := schema_problem(entry["body"])):
                raise LineError(problem)
        except LineError as error:
            part.problems.add(offset, str(error))
            continue
        part.offsets.append(offset)
        names.append(hash(entry["custom_id"]))
        body = entry["body"]
        part.ignored.add(body, offset)
        lengths[-(-estimate_tokens(body) // LENGTH_STEP)] += 1
        endpoints[entry["url"]] += 1
        named = body.get("model")
        if named is None:
            part.unnamed += 1
        elif named not in models:
            models[named] = None
    part.plain = part.plain and following == end and ends_line(path, end)
    part.names.add(names)
    return part


@dataclass
class Whole:
    """What the parts tell together; they are added in the order of the input.

    The other attributes are those of ``Part``.
    """

    requests: int = 0
    models: dict[str, None] = field(default_factory=dict)
    unnamed: int = 0
    endpoints: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    names: Names = field(default_factory=Names)
    problems: Problems = field(default_factory=Problems)
    ignored: IgnoredFields = field(default_factory=IgnoredFields)
    _cuts: array[int] = field(default_factory=lambda: array("q"))
    _stride: int = 1

    def add(self, part: Part) -> None:
        """Add the part that follows."""
        self._add_cuts(part.offsets)
        self.models.update(part.models)
        self.unnamed += part.unnamed
        self.endpoints.update(part.endpoints)
        self.lengths.update(part.lengths)
        self.names.merge(part.names)
        self.problems.merge(part.problems)
        self.ignored.merge(part.ignored)

    def percentile(self, share: float) -> int:
        """Return the fewest tokens that at least ``share`` of the requests stay at or under."""
        rest = share * self.requests
        for length in sorted(self.lengths):
            rest -= self.lengths[length]
            if rest <= 0:
                return length * LENGTH_STEP
        return 0

    @property
    def mean_tokens(self) -> int:
        """Mean tokens of a request."""
        total = sum(length * count for length, count in self.lengths.items())
        return total // max(1, self.requests) * LENGTH_STEP

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Places to cut at: where requests begin, only every n-th where there are many."""
        return tuple(Mark(at * self._stride, offset) for at, offset in enumerate(self._cuts))

    def _add_cuts(self, offsets: array[int]) -> None:
        first, self.requests = self.requests, self.requests + len(offsets)
        while self.requests > self._stride * _MAX_MARKS:
            self._stride *= 2
            self._cuts = self._cuts[::2]
        self._cuts.extend(offsets[-first % self._stride :: self._stride])
