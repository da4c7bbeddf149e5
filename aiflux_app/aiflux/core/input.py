"""Reading the input: line by line, and once as a whole before anything is queued."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from aiflux.core.request import LineError, Request, parse_json, parse_request
from aiflux.errors import InputError

BOM = b"\xef\xbb\xbf"
SHOWN_PROBLEMS = 20
MAX_LINE_BYTES = 256 * 1024 * 1024
_BUFFER = 1 << 20
_MAX_MARKS = 65536
_BUCKETS = 256
# English text has about 4 bytes a token, code 3, CJK text 3 bytes a character and token:
# 3 errs on the side of a context that is large enough.
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 16
_TOKENS_PER_IMAGE = 1024
_LENGTH_STEP = 64
_UNLIMITED_ANSWER = 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """A place where the input can be cut: ``index`` requests lie before byte ``offset``."""

    index: int
    offset: int
    line: int


@dataclass(frozen=True)
class InputSummary:
    """What one pass over the input tells.

    Attributes:
        path: absolute path.
        size: bytes.
        requests: number of requests.
        digest: BLAKE2b-128 of the request lines, hex; it ignores blank lines and line endings.
        models: models that bodies name, in order of first appearance.
        unnamed: number of requests whose body names no model.
        endpoints: number of requests for each url.
        context_tokens: estimated tokens (prompt + answer) that 99 % of the requests stay under.
        longest_tokens: the same for the longest request.
        mean_tokens: the same on average.
        marks: places to cut at, thinned out in large inputs.
    """

    path: Path
    size: int
    requests: int
    digest: str
    models: tuple[str, ...]
    unnamed: int
    endpoints: dict[str, int]
    context_tokens: int
    longest_tokens: int
    mean_tokens: int
    marks: tuple[Mark, ...]


def read_lines(
    path: Path, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """Yield ``(number, offset, line)`` of every line that is not blank; no line ending, no BOM.

    Args:
        path: the input.
        start: byte offset of the first line, which gets the number 1.
        end: byte offset to stop at; None reads to the end.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=_BUFFER) as file:
            file.seek(start)
            offset = start
            for number, line in enumerate(file, start=1):
                if end is not None and offset >= end:
                    return
                raw = line.rstrip(b"\r\n")
                if offset == 0 and raw.startswith(BOM):
                    raw = raw[len(BOM) :]
                if raw and not raw.isspace():
                    yield number, offset, raw
                offset += len(line)
    except OSError as error:
        raise InputError(
            f"cannot read the input {str(path)!r}: {error.strerror}",
            "check the path and its permissions",
        ) from error


def estimate_tokens(request: Request) -> int:
    """Estimate how many tokens of context a request needs, prompt and answer together."""
    body = request.body
    answer = body.get("max_tokens") or body.get("max_completion_tokens")
    payload = body.get("messages") or body.get("prompt") or body.get("input")
    return _prompt_tokens(payload) + (answer if isinstance(answer, int) else _UNLIMITED_ANSWER)


def _prompt_tokens(payload: Any) -> int:
    if isinstance(payload, str):
        size = len(payload) if payload.isascii() else len(payload.encode("utf-8", "surrogatepass"))
        return size // _BYTES_PER_TOKEN + 1
    tokens = 0
    if isinstance(payload, list):
        for part in payload:
            tokens += _part_tokens(part)
    return tokens


def _part_tokens(part: Any) -> int:
    if isinstance(part, dict):
        if "image_url" in part:
            return _TOKENS_PER_IMAGE
        text = part.get("content", part.get("text"))
        return _TOKENS_PER_MESSAGE + _prompt_tokens(text)
    return 1 if isinstance(part, int) else _prompt_tokens(part)


@dataclass
class _Marks:
    """Places to cut at; every second one is dropped when there are too many."""

    stride: int = 1
    marks: list[Mark] = field(default_factory=list)

    def add(self, index: int, offset: int, line: int) -> None:
        if index % self.stride:
            return
        self.marks.append(Mark(index, offset, line))
        if len(self.marks) > _MAX_MARKS:
            self.marks = self.marks[::2]
            self.stride *= 2


@dataclass
class _Names:
    """The custom_ids seen, as 64-bit hashes in 8 bytes each."""

    buckets: list[array[int]] = field(default_factory=lambda: [array("q") for _ in range(_BUCKETS)])

    def add(self, custom_id: str) -> None:
        name = hash(custom_id)
        self.buckets[name % _BUCKETS].append(name)

    def repeated(self) -> set[int]:
        """Return the hashes that were added more than once."""
        repeated: set[int] = set()
        for bucket in self.buckets:
            if len(set(bucket)) < len(bucket):
                repeated.update(name for name, count in Counter(bucket).items() if count > 1)
        return repeated


class _Digest:
    """BLAKE2b-128 of lines, computed beside the parsing: hashlib lets other threads run meanwhile.

    At most two blocks are in memory.
    """

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)
        self._lines: list[bytes] = []
        self._size = 0
        self._executor = ThreadPoolExecutor(1, "digest")
        self._pending: Future[None] | None = None

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size >= _BUFFER:
            self._flush()

    def hexdigest(self) -> str:
        """Return the digest of all lines added so far."""
        self._flush()
        self._wait()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()

    def _flush(self) -> None:
        self._wait()
        if not self._lines:
            return
        self._lines.append(b"")
        self._pending = self._executor.submit(self._hash.update, b"\n".join(self._lines))
        self._lines, self._size = [], 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


class _Problems:
    """Bad lines: the first ``SHOWN_PROBLEMS`` in full, the rest as a count."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, str]] = []
        self.lines = 0

    def add(self, line: int, problem: str) -> None:
        self.lines += 1
        self.shown.append((line, problem))
        if len(self.shown) > 8 * SHOWN_PROBLEMS:
            self.trim()

    def trim(self) -> None:
        self.shown = sorted(self.shown)[:SHOWN_PROBLEMS]

    def error(self, path: Path) -> InputError:
        self.trim()
        texts = [f"line {line}: {problem}" for line, problem in self.shown]
        if self.lines > len(texts):
            texts.append(f"... and {self.lines - len(texts)} more")
        noun = "line is" if self.lines == 1 else "lines are"
        return InputError(
            f"{self.lines} {noun} wrong in {str(path)!r}; nothing was sent",
            f"correct the input, then try it with: aiflux check {str(path)!r}",
            tuple(texts),
        )


class _Scan:
    """What accumulates over one pass."""

    def __init__(self, path: Path, model: str | None) -> None:
        self.path = path
        self.model = model
        self.requests = 0
        self.digest = _Digest()
        self.models: dict[str, None] = {}
        self.unnamed = 0
        self.endpoints: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.marks = _Marks()
        self.names = _Names()
        self.problems = _Problems()

    def feed(self, number: int, offset: int, raw: bytes) -> None:
        self.digest.add(raw)
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise LineError(f"longer than {MAX_LINE_BYTES >> 20} MiB; split the request")
            request = parse_request(raw, self.model, exact=False)
        except LineError as error:
            self.problems.add(number, str(error))
            return
        self.names.add(request.custom_id)
        self.marks.add(self.requests, offset, number)
        self.requests += 1
        self.endpoints[request.url] += 1
        self.lengths[-(-estimate_tokens(request) // _LENGTH_STEP)] += 1
        if request.model is None:
            self.unnamed += 1
        else:
            self.models.setdefault(request.model)

    def check_names(self) -> None:
        """Find the lines of repeated custom_ids in a second pass, only where there are any."""
        repeated = self.names.repeated()
        if not repeated:
            return
        first: dict[str, int] = {}
        for number, _, raw in read_lines(self.path):
            custom_id = _custom_id(raw)
            if custom_id is None or hash(custom_id) not in repeated:
                continue
            if custom_id in first:
                self.problems.add(
                    number,
                    f"custom_id {custom_id!r} was used on line {first[custom_id]} already; "
                    "give every request a unique name",
                )
            else:
                first[custom_id] = number

    def summary(self) -> InputSummary:
        return InputSummary(
            path=self.path,
            size=os.path.getsize(self.path),
            requests=self.requests,
            digest=self.digest.hexdigest(),
            models=tuple(self.models),
            unnamed=self.unnamed,
            endpoints=dict(self.endpoints),
            context_tokens=_percentile(self.lengths, 0.99) * _LENGTH_STEP,
            longest_tokens=max(self.lengths, default=0) * _LENGTH_STEP,
            mean_tokens=_mean(self.lengths) * _LENGTH_STEP,
            marks=tuple(self.marks.marks),
        )


def _custom_id(raw: bytes) -> str | None:
    try:
        entry = parse_json(raw.decode("utf-8"))
    except ValueError:
        return None
    custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
    return custom_id if isinstance(custom_id, str) and custom_id else None


def _percentile(counts: Counter[int], share: float) -> int:
    """Return the smallest value that at least ``share`` of the counted ones stay at or under."""
    rest = share * counts.total()
    for value in sorted(counts):
        rest -= counts[value]
        if rest <= 0:
            return value
    return 0


def _mean(counts: Counter[int]) -> int:
    return sum(value * count for value, count in counts.items()) // max(1, counts.total())


def scan_input(path: Path, model: str | None = None) -> InputSummary:
    """Check the whole input in one pass and bounded memory.

    Args:
        path: the input file.
        model: the run's model, if it is named outside the input.

    Raises:
        InputError: the file cannot be read, is empty, or has bad lines; ``problems`` lists them.
    """
    path = path.expanduser().absolute()
    check_readable(path)
    scan = _Scan(path, model)
    with closing(scan.digest):
        for number, offset, raw in read_lines(path):
            scan.feed(number, offset, raw)
        scan.check_names()
        if scan.problems.lines:
            raise scan.problems.error(path)
        if not scan.requests:
            raise InputError(
                f"the input {str(path)!r} holds no request", "give it one JSON object per line"
            )
        return scan.summary()


def check_readable(path: Path) -> None:
    """Raise InputError unless ``path`` is a file that can be read more than once."""
    if not path.exists():
        raise InputError(f"the input {str(path)!r} is not there", "check the path")
    if path.is_dir():
        raise InputError(
            f"the input {str(path)!r} is a directory",
            "give a .jsonl file; `aiflux convert dir` makes one from a directory",
        )
    if not path.is_file():
        raise InputError(
            f"the input {str(path)!r} is not a regular file",
            "save it to a file: it is read more than once",
        )
    if not os.access(path, os.R_OK):
        raise InputError(
            f"the input {str(path)!r} cannot be read: permission denied", f"chmod u+r {str(path)!r}"
        )


def describe(summary: InputSummary) -> dict[str, Any]:
    """Return the part of a summary that the plan keeps."""
    return {
        "path": str(summary.path),
        "size": summary.size,
        "requests": summary.requests,
        "digest": summary.digest,
        "endpoints": summary.endpoints,
        "context_tokens": summary.context_tokens,
        "longest_tokens": summary.longest_tokens,
        "mean_tokens": summary.mean_tokens,
    }
