"""The journal: the append-only file of a shard's results, and the only truth about what is done.

Each line is a result::

    {"crc":"<8 hex>","key":"<32 hex>","custom_id":"...","status":200,"metadata":{...},
     "error":null,"body":{...}}

``crc`` is the CRC-32 of the rest of the line; ``key`` binds the result to the request line that it
answers (``request_key``). The order of the fields is fixed, so that a line can be split at them
without decoding: a JSON string contains no unescaped quote, so the bytes ``,"body":`` first occur
where that field begins. ``body`` is the engine's answer, byte for byte.

If a request is answered in parts (several answers, or a long prompt in several requests), the
journal also has a line for each part that came before the last one (``part_result``). Its key is no
request's, so such a line is no result, and ``metadata`` begins with the request's key::

     "metadata":{"part":"<32 hex>", ...}
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from array import array
from binascii import unhexlify
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from aiflux.core.batch.prompt_lengths import TOO_LONG
from aiflux.core.batch.request import KEY_BYTES, request_key
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan, Shard
from aiflux.errors import StorageError
from aiflux.util.files import is_there, open_regular, read_error, refuse_irregular, storage_error
from aiflux.util.lines import cut_at_lines, read_lines, unreadable
from aiflux.util.parallel import helpers, share_out
from aiflux.util.process_limits import start_thread

_HEAD = b'{"crc":"'
_CRC_END = len(_HEAD) + 8
_SEPARATOR = b'",'
_REST = _CRC_END + len(_SEPARATOR)
_KEY = b'"key":"'
_KEY_START = _REST + len(_KEY)
_KEY_END = _KEY_START + 2 * KEY_BYTES
_METADATA = b',"metadata":'
_ERROR = b',"error":'
_BODY = b',"body":'
_END = b"}\n"
_STATUS = b',"status":'
_PART = b',"metadata":{"part":"'
CUT = {
    "length": "finish_reason_length",
    "content_filter": "finish_reason_content_filter",
}
"""Keys of a result's metadata, by the finish reason of an answer that is not whole."""
EMPTY = "empty_answer"
"""Key of a result's metadata; its value is one of ``EMPTY_REASONS``."""
_EMPTY = re.compile(rb'"empty_answer":"([a-z_]+)"')
_SUCCEEDED = b',"error":null,"body":'
_LEFT_OUT = b'{"code":"%b"' % TOO_LONG.encode()
_CUSTOM_ID = _KEY_END + len(b'","custom_id":')
_BUFFER = 1 << 20
_BUCKETS = 256
PART_BYTES = 32 << 20
# Results are nearly in the order of the requests: at most as far apart as requests in flight.
_WINDOW = 2 << 20
_BEHIND = _WINDOW // 4
_LEAST_USED = 8
# Instead of an offset: the request has no result.
MISSING = -1


@dataclass(frozen=True, slots=True)
class NewResult:
    """The result of one request, to be appended to a journal.

    Attributes:
        key: the request's key, 16 bytes.
        status: HTTP status of the last attempt; None if there was no answer.
        metadata: the output's ``metadata``, without the request's own.
        error: None, or an object with ``code``, ``message`` and ``status``.
        body: the engine's answer, JSON in UTF-8; ``b"null"`` if there is none.
    """

    key: bytes
    custom_id: str
    status: int | None
    metadata: dict[str, Any]
    error: dict[str, Any] | None
    body: bytes

    def to_line(self) -> bytes:
        """Return the journal's line, with its line ending."""
        rest = b'"key":"%b","custom_id":%b,"status":%b,"metadata":%b,"error":%b,"body":%b}' % (
            self.key.hex().encode(),
            json.dumps(self.custom_id).encode(),
            b"null" if self.status is None else b"%d" % self.status,
            _compact(self.metadata),
            b"null" if self.error is None else _compact(self.error),
            _one_line(self.body.strip()),
        )
        return b"%b%08x%b%b\n" % (_HEAD, crc32(rest), _SEPARATOR, rest)


_encoder = json.JSONEncoder(separators=(",", ":"))


def _compact(value: Any) -> bytes:
    return _encoder.encode(value).encode()


def _one_line(body: bytes) -> bytes:
    """Return JSON without raw line breaks, which occur only between tokens, never in strings."""
    if b"\n" in body or b"\r" in body:
        return body.replace(b"\r", b" ").replace(b"\n", b" ")
    return body


def part_key(key: bytes, name: str) -> bytes:
    """Return the key of one of the parts of a request.

    Args:
        name: what the part is, in addition to its request.
    """
    return request_key(b"%b %b" % (key, name.encode()))


def part_result(name: str, result: NewResult) -> NewResult:
    """Return the answer to one part of a request, in a form that is not the request's result."""
    metadata = {"part": result.key.hex(), **result.metadata}
    return replace(result, key=part_key(result.key, name), metadata=metadata)


def is_part(line: bytes) -> bool:
    """Return whether a valid line is one part of a request, and not a result."""
    return line.startswith(_PART, line.index(_METADATA, _CUSTOM_ID))


class RawResult(NamedTuple):
    """A journal line split at its fields; every part is JSON, as in the line."""

    key: bytes
    custom_id: bytes
    status: bytes
    metadata: bytes
    error: bytes
    body: bytes

    @property
    def failed(self) -> bool:
        """Whether the request failed."""
        return self.error != b"null"

    @property
    def left_out(self) -> bool:
        """Whether the request was not sent because its prompt is too long."""
        return self.status == b"null" and self.error.startswith(_LEFT_OUT)

    @property
    def empty(self) -> str | None:
        """Why the answer is empty; None if it is not."""
        found = _EMPTY.search(self.metadata)
        return None if self.failed or found is None else found[1].decode()


def split_line(line: bytes) -> RawResult:
    """Split a valid journal line at its fields."""
    status = line.index(_STATUS, _CUSTOM_ID)
    metadata = line.index(_METADATA, status)
    error = line.index(_ERROR, metadata)
    body = line.index(_BODY, error)
    return RawResult(
        unhexlify(line[_KEY_START:_KEY_END]),
        line[_CUSTOM_ID:status],
        line[status + len(_STATUS) : metadata],
        line[metadata + len(_METADATA) : error],
        line[error + len(_ERROR) : body],
        line[body + len(_BODY) : -len(_END)],
    )


def valid_line(line: bytes) -> bool:
    """Return whether a line is complete: its form, its end and its checksum."""
    head = b'{"crc":"%08x","key":"' % crc32(memoryview(line)[_REST:-1])
    return line.startswith(head) and line.endswith(_END)


@dataclass
class ResultIndex:
    """The offset of each request's result in a journal: 24 bytes of memory per result.

    Attributes:
        done: number of requests with a result, and of single parts (``part_result``).
        damaged: number of damaged lines; their requests count as not done.
    """

    done: int = 0
    damaged: int = 0
    _keys: list[array[int]] = field(default_factory=lambda: [array("Q") for _ in range(_BUCKETS)])
    _offsets: list[array[int]] = field(
        default_factory=lambda: [array("Q") for _ in range(_BUCKETS)]
    )
    _sizes: list[array[int]] = field(default_factory=lambda: [array("Q") for _ in range(_BUCKETS)])

    def add(self, key: bytes, offset: int, size: int, failed: bool) -> None:
        """Add a result; call ``seal`` before the first ``find``."""
        bucket = key[0]
        self._keys[bucket].append(int.from_bytes(key[1:9], "big"))
        self._offsets[bucket].append(offset)
        self._sizes[bucket].append(size << 1 | failed)

    def merge(self, other: ResultIndex) -> None:
        """Add the results of the part of the journal that follows."""
        self.damaged += other.damaged
        for mine, more in (
            (self._keys, other._keys),
            (self._offsets, other._offsets),
            (self._sizes, other._sizes),
        ):
            for bucket, addition in zip(mine, more, strict=True):
                bucket.extend(addition)

    def seal(self) -> None:
        """Sort the results for ``find``; of several results for one request, the last counts."""
        for bucket, keys in enumerate(self._keys):
            order = sorted(range(len(keys)), key=keys.__getitem__)
            last = [
                at
                for position, at in enumerate(order)
                if position + 1 == len(order) or keys[order[position + 1]] != keys[at]
            ]
            offsets, sizes = self._offsets[bucket], self._sizes[bucket]
            self._keys[bucket] = array("Q", (keys[at] for at in last))
            self._offsets[bucket] = array("Q", (offsets[at] for at in last))
            self._sizes[bucket] = array("Q", (sizes[at] for at in last))
        self.done = sum(len(keys) for keys in self._keys)

    def find(self, key: bytes) -> tuple[int, int, bool] | None:
        """Return ``(offset, size, failed)`` of a request's result line, or None."""
        keys = self._keys[key[0]]
        wanted = int.from_bytes(key[1:9], "big")
        at = bisect_right(keys, wanted) - 1
        if at < 0 or keys[at] != wanted:
            return None
        size = self._sizes[key[0]][at]
        return self._offsets[key[0]][at], size >> 1, bool(size & 1)


def scan_journal(
    path: Path, *, part_bytes: int = PART_BYTES, children: int | None = None
) -> ResultIndex:
    """Read a journal once and index its results; a missing journal is empty.

    Args:
        part_bytes: the journal is read in parts of about this size.
        children: processes that share the parts; None for as many as is safe.

    Raises:
        StorageError: the journal cannot be read.
    """
    index = ResultIndex()
    refuse_irregular(path)
    try:
        parts = cut_at_lines(path, part_bytes)
        children = helpers() if children is None else children
        with closing(share_out(partial(_scan_part, path), parts, children)) as found:
            for part in found:
                index.merge(part)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise read_error(error, path) from error
    index.seal()
    return index


def _scan_part(path: Path, part: tuple[int, int]) -> ResultIndex:
    index = ResultIndex()
    for offset, line in _lines(path, *part):
        if valid_line(line):
            key = unhexlify(line[_KEY_START:_KEY_END])
            index.add(key, offset, len(line), _SUCCEEDED not in line)
        else:
            index.damaged += 1
    return index


def journal_lines(
    path: Path, on_damaged: Callable[[int], None] = lambda offset: None
) -> Iterator[tuple[bytes, bytes]]:
    """Yield ``(key, line)`` of every complete line, in the order in which they were written.

    The key is that of the request, also for a line with one of its parts.

    Args:
        on_damaged: called with the offset of each other line.

    Raises:
        StorageError: the journal cannot be read.
    """
    refuse_irregular(path)
    try:
        for offset, line in _lines(path, 0, os.path.getsize(path)):
            if not valid_line(line):
                on_damaged(offset)
            else:
                at = _KEY_START
                if is_part(line):
                    at = line.index(_PART) + len(_PART)
                yield unhexlify(line[at : at + 2 * KEY_BYTES]), line
    except FileNotFoundError:
        return
    except OSError as error:
        raise read_error(error, path) from error


def _lines(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb", buffering=_BUFFER, opener=open_regular) as file:
        file.seek(start)
        offset = start
        for line in file:
            if offset >= end:
                return
            yield offset, line
            offset += len(line)


def cut_torn_tail(path: Path) -> int:
    """Cut off an incomplete last line after a crash; return the number of bytes removed.

    A missing journal counts as complete.
    """
    try:
        with open(path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            keep = _last_line_end(file.fileno(), end)
            if keep < end:
                file.truncate(keep)
                os.fsync(file.fileno())
            return end - keep
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise storage_error(error, path) from error


def _last_line_end(descriptor: int, end: int) -> int:
    """Return the offset after the last line break before ``end``; 0 if there is none."""
    position = end
    while position > 0:
        start = max(0, position - _BUFFER)
        block = os.pread(descriptor, position - start, start)
        found = block.rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


class JournalReader:
    """Reads the results of a journal; fast for results that are near each other."""

    def __init__(self, path: Path, index: ResultIndex | None = None) -> None:
        self._index = index or ResultIndex()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.exists() else -1
        self._window = b""
        self._start = 0
        self._unread = 0

    def get(self, key: bytes) -> RawResult | None:
        """Return the result of a request, or None if it has none."""
        place = self._index.find(key)
        if place is None:
            return None
        result = self.read(place[0], place[1])
        return result if result.key == key else None

    def read(self, offset: int, size: int) -> RawResult:
        """Return the result whose line starts at ``offset``."""
        start = offset - self._start
        if start < 0 or start + size > len(self._window):
            return split_line(self._read(offset, size))
        self._unread -= size
        return split_line(self._window[start : start + size])

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, offset: int, size: int) -> bytes:
        """Read a line, and the bytes around it if most of the last such block was used."""
        self._unread -= size
        if self._unread > 0 or size > _BEHIND:
            return os.pread(self._descriptor, size, offset)
        self._start = max(0, offset - _BEHIND)
        self._window = os.pread(self._descriptor, _WINDOW, self._start)
        self._unread = _WINDOW // _LEAST_USED
        return self._window[offset - self._start :][:size]


class JournalWriter:
    """Appends results. Thread-safe.

    Every line is handed to the kernel before ``append`` returns, so that killing the process loses
    none; a thread syncs to disk once a second, or after ``save_frequency`` results.

    Args:
        on_failure: called once, from any thread, if writing fails.
    """

    def __init__(
        self,
        path: Path,
        save_frequency: int = 64,
        on_failure: Callable[[StorageError], None] | None = None,
        interval: float = 1.0,
    ) -> None:
        self.path = path
        self.failure: StorageError | None = None
        self._save_frequency = save_frequency
        self._on_failure = on_failure
        self._interval = interval
        self._unsynced = 0
        self._closed = False
        self._condition = threading.Condition()
        cut_torn_tail(path)
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise storage_error(error, path) from error
        self._thread = start_thread(self._sync_loop, "journal-sync")

    def append(self, result: NewResult) -> None:
        """Write one result.

        Raises:
            StorageError: writing failed, now or before; no more results are accepted.
        """
        line = result.to_line()
        with self._condition:
            if self.failure is not None:
                raise self.failure
            try:
                _write_all(self._descriptor, line)
            except OSError as error:
                self._fail(error)
            self._unsynced += 1
            if self._unsynced in (1, self._save_frequency):
                self._condition.notify()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Sync and close.

        Raises:
            StorageError: writing failed.
        """
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
        os.close(self._descriptor)
        if self.failure is not None:
            raise self.failure

    def _fail(self, error: OSError) -> None:
        if self.failure is None:
            self.failure = storage_error(error, self.path)
            if self._on_failure is not None:
                self._on_failure(self.failure)

    def _sync_loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._unsynced or self._closed)
                deadline = time.monotonic() + self._interval
                self._condition.wait_for(
                    lambda: self._unsynced >= self._save_frequency or self._closed,
                    timeout=max(0.0, deadline - time.monotonic()),
                )
                pending, self._unsynced = self._unsynced, 0
                closed = self._closed
            if pending:
                self._sync()
            if closed:
                return

    def _sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            with self._condition:
                self._fail(error)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@dataclass(frozen=True)
class ResultOffsets:
    """The locations of the results of some lines.

    Attributes:
        journal: the file that contains them.
        start, end: of the lines, in the input.
        offsets, sizes: of each request's result in the journal, in the order of the input.
    """

    journal: Path
    start: int
    end: int
    offsets: array[int]
    sizes: array[int]


def find_places(
    plan: Plan, run: RunDirectory, *, part_bytes: int = PART_BYTES, children: int | None = None
) -> Generator[ResultOffsets, None, None]:
    """Yield the locations of the results, one part of the input after the other.

    Args:
        part_bytes: size of a part: several shards, or a part of one.
        children: processes that share the work; None for as many as is safe.

    Raises:
        InputError: the input cannot be read.
        StorageError: a journal cannot be read.
    """
    children = helpers() if children is None else children
    groups = _groups(plan, run, part_bytes)
    if len(groups) < len(plan.shards):
        work = partial(_of_shards, plan, run)
        with closing(share_out(work, groups, children)) as found:
            for places in found:
                yield from places
    else:
        for shard in plan.shards:
            yield from _of_large(plan, run, shard, part_bytes, children)


def missing_results(plan: Plan, run: RunDirectory) -> dict[int, int]:
    """Return the number of requests without a result, for each shard that has any.

    Raises:
        InputError: the input cannot be read.
        StorageError: a journal cannot be read.
    """
    shards = {run.journal(shard.index): shard.index for shard in plan.shards}
    missing: Counter[int] = Counter()
    with closing(find_places(plan, run)) as found:
        for places in found:
            missing[shards[places.journal]] += places.offsets.count(MISSING)
    return {shard: count for shard, count in sorted(missing.items()) if count}


def _groups(plan: Plan, run: RunDirectory, part_bytes: int) -> list[list[Shard]]:
    """Return groups of neighbouring shards of at most ``part_bytes``, or single shards."""
    groups: list[list[Shard]] = []
    room = 0
    for shard in plan.shards:
        journal = run.journal(shard.index)
        refuse_irregular(journal)
        written = journal.stat().st_size if is_there(journal) else 0
        size = max(written, shard.end - shard.start)
        if size > room:
            groups.append([])
            room = part_bytes
        groups[-1].append(shard)
        room -= size
    return groups


def _of_shards(plan: Plan, run: RunDirectory, shards: Sequence[Shard]) -> list[ResultOffsets]:
    found = []
    for shard in shards:
        journal = run.journal(shard.index)
        index = scan_journal(journal, children=0)
        found.append(_of_lines(plan.input_path, journal, index, (shard.start, shard.end)))
    return found


def _of_large(
    plan: Plan, run: RunDirectory, shard: Shard, part_bytes: int, children: int
) -> Iterator[ResultOffsets]:
    journal = run.journal(shard.index)
    index = scan_journal(journal, part_bytes=part_bytes, children=children)
    work = partial(_of_lines, plan.input_path, journal, index)
    try:
        parts = cut_at_lines(plan.input_path, part_bytes, shard.start, shard.end)
    except OSError as error:
        raise unreadable(plan.input_path, error) from error
    with closing(share_out(work, parts, children)) as found:
        yield from found


def _of_lines(
    path: Path, journal: Path, index: ResultIndex, part: tuple[int, int]
) -> ResultOffsets:
    places = ResultOffsets(journal, *part, array("q"), array("q"))
    for _, _, raw in read_lines(path, *part):
        found = index.find(request_key(raw))
        places.offsets.append(MISSING if found is None else found[0])
        places.sizes.append(0 if found is None else found[1])
    return places
