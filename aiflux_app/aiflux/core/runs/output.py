"""Write the output from the journals; the worker that finishes the last shard does it, once."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import IO
from zlib import crc32

from aiflux.core.batch.input_file import LineDigest, change_of
from aiflux.core.batch.request import custom_id_of, parse_json, request_key
from aiflux.core.batch.results_file import answered_words, errors_path, output_paths
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import (
    MISSING,
    JournalReader,
    RawResult,
    ResultIndex,
    ResultOffsets,
    find_places,
    missing_results,
    scan_journal,
)
from aiflux.core.runs.plan import Plan, changed_input
from aiflux.core.runs.status_file import (
    Counts,
    MergeFacts,
    Status,
    WrittenFile,
    finished_counts,
    keep_sums,
    may_replace,
    open_shards,
    read_run_status,
    read_status,
    run_left_out,
    run_status,
    written_file,
)
from aiflux.errors import (
    AifluxError,
    InputError,
    MissingResultsError,
    StoppedError,
    StorageError,
)
from aiflux.util.files import (
    atomic_write,
    is_there,
    read_error,
    read_file,
    remove_leftovers,
    storage_error,
)
from aiflux.util.lease import acquire
from aiflux.util.lines import read_lines
from aiflux.util.text import counted

Results = Generator[tuple[bytes, RawResult], None, None]
# Results between two requests to the kernel to start writing.
_FLUSH_EVERY = 4096


@dataclass
class ResultCounts:
    """Results of a run.

    Attributes:
        failed: requests without an answer, with those that were left out.
        left_out: of them, those that were not sent because their prompts are too long.
        empty: answers without a text, by their reason.
        files: the written files by name.
    """

    total: int = 0
    failed: int = 0
    left_out: int = 0
    empty: Counter[str] = field(default_factory=Counter)
    files: dict[str, WrittenFile] = field(default_factory=dict)

    @property
    def completed(self) -> int:
        """Requests that succeeded."""
        return self.total - self.failed

    def add(self, result: RawResult) -> None:
        """Count one result."""
        self.total += 1
        self.failed += result.failed
        self.left_out += result.left_out
        reason = result.empty
        if reason is not None:
            self.empty[reason] += 1


def iterate_results(plan: Plan, run: RunDirectory, *, partial: bool = False) -> Results:
    """Yield ``(request line, result)`` in input order.

    A caller must discard what it wrote if this ends with an error: only the end confirms that the
    lines were the planned ones, complete and in order.

    Args:
        partial: leave out requests that have no result yet.

    Raises:
        StoppedError: a request has no result yet, or the input is no longer the planned one.
        StorageError: a journal cannot be read.
    """
    seen = LineDigest()
    try:
        with closing(_paired(plan, run)) as pairs:
            for raw, result in pairs:
                seen.add(raw)
                if result is not None:
                    yield raw, result
                elif not partial:
                    refuse_changed_input(plan, run)
                    raise _without_result(plan, run, raw)
        size = os.stat(plan.input_path).st_size
    except (InputError, OSError) as error:
        seen_at = error.__cause__ if isinstance(error, InputError) else error
        if isinstance(seen_at, FileNotFoundError):
            raise changed_input(plan, "no longer exists") from None
        raise changed_input(plan, f"can no longer be read: {seen_at}") from error
    planned = (plan.requests, plan.input.digest, plan.input.size)
    if (seen.lines, seen.hexdigest(), size) != planned:
        refuse_changed_input(plan, run, partial=partial)
        raise changed_input(plan, "changed while the output was written")


def _paired(plan: Plan, run: RunDirectory) -> Generator[tuple[bytes, RawResult | None], None, None]:
    with closing(find_places(plan, run)) as found, ExitStack() as stack:
        opened: Path | None = None
        for places in found:
            if places.journal != opened:
                stack.close()
                reader = JournalReader(places.journal)
                stack.callback(reader.close)
                opened = places.journal
            yield from _read(plan, reader, places)


def _read(
    plan: Plan, reader: JournalReader, places: ResultOffsets
) -> Iterator[tuple[bytes, RawResult | None]]:
    """Yield the requests of some lines with their results."""
    lines = read_lines(plan.input_path, places.start, places.end)
    try:
        for (_, _, raw), offset, size in zip(lines, places.offsets, places.sizes, strict=True):
            yield raw, None if offset == MISSING else _result_of(raw, reader.read(offset, size))
    except ValueError:
        raise changed_input(plan, "or a journal changed while the output was written") from None
    except OSError as error:
        raise read_error(error, places.journal) from error


def _result_of(raw: bytes, result: RawResult) -> RawResult:
    """Return the result after checking that it answers this line."""
    if result.key != request_key(raw):
        raise ValueError("the result of another request")
    return result


def refuse_changed_input(plan: Plan, run: RunDirectory, *, partial: bool = False) -> None:
    """Raise StoppedError with the change if the input is no longer the planned one."""
    change = change_of(plan.input)
    if change is None:
        return
    first = None if partial else _first_without_result(plan, run)
    if first is not None:
        number, raw = first
        change += f"; line {number} ({custom_id_of(raw)}) is the first that differs"
    raise changed_input(plan, change)


def _first_without_result(plan: Plan, run: RunDirectory) -> tuple[int, bytes] | None:
    """Return the first line of the current input for which no journal has a result."""
    index = ResultIndex()
    for shard in plan.shards:
        index.merge(scan_journal(run.journal(shard.index), children=0))
    index.seal()
    for number, _, raw in read_lines(plan.input_path):
        if index.find(request_key(raw)) is None:
            return number, raw
    return None


def _without_result(plan: Plan, run: RunDirectory, raw: bytes) -> MissingResultsError:
    shards = missing_results(plan, run)
    left = sum(shards.values())
    verb = "has" if left == 1 else "have"
    resume = f" (or: aiflux resume {quote(str(plan.output))})" if is_there(run.submissions) else ""
    return MissingResultsError(
        f"{left} of {counted(plan.requests, 'request')} {verb} no result in "
        f"{run.path / 'journal'}; the first is {custom_id_of(raw)!r}",
        f"run the same `aiflux run` command again: it sends only what is missing{resume}",
        shards,
    )


def finalise(plan: Plan, run: RunDirectory, partial: Path | None = None) -> ResultCounts:
    """Write the output (and the errors file of a ``.jsonl`` output) from the journals.

    Args:
        partial: file for the results so far, instead of the output.

    Raises:
        StoppedError: a request has no result yet; nothing is written.
        StorageError: writing failed; an existing output is unchanged.
    """
    target = partial or plan.output
    write = _write_batch_form if target.suffix == ".jsonl" else _write_array
    with closing(iterate_results(plan, run, partial=partial is not None)) as results:
        return write(results, target)


def _write_array(results: Results, target: Path) -> ResultCounts:
    counts = ResultCounts()
    with atomic_write(target) as opened:
        file = _SummedFile(opened)
        separator = b"[\n"
        for raw, result in results:
            file.write(separator)
            file.write(array_entry(raw, result))
            separator = b",\n"
            counts.add(result)
            if not counts.total % _FLUSH_EVERY:
                begin_writeback(opened)
        file.write(b"\n]\n" if counts.total else b"[]\n")
    counts.files[target.name] = written_file(target, file.crc)
    return counts


class _SummedFile:
    """A file being written, with the checksum of its content."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.crc = 0

    def write(self, data: bytes) -> None:
        self.crc = crc32(data, self.crc)
        self.file.write(data)


def begin_writeback(file: IO[bytes]) -> None:
    """Start writing to disk now, so that the sync at the end takes less time.

    Linux starts to write pages that are advised as not needed; this call does not wait.
    """
    file.flush()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def array_entry(raw: bytes, result: RawResult) -> bytes:
    """Return one entry of the ``.json`` output, with request and answer byte for byte."""
    metadata = _merged_metadata(raw, result.metadata)
    if result.failed:
        outcome = (b',"output":null,"error":', result.error)
    else:
        outcome = (b',"output":', result.body)
    return b"".join((b'{"input":', raw.strip(), *outcome, b',"metadata":', metadata, b"}"))


def _merged_metadata(raw: bytes, metadata: bytes) -> bytes:
    """Add the request's own metadata under its keys; the product's own keys win."""
    if b'"metadata"' not in raw:
        return metadata
    own = parse_json(raw.decode("utf-8")).get("metadata")
    if not own:
        return metadata
    return json.dumps({**own, **json.loads(metadata)}).encode()


def _write_batch_form(results: Results, target: Path) -> ResultCounts:
    counts = ResultCounts()
    errors = errors_path(target)
    with ExitStack() as stack:
        answered = _SummedFile(stack.enter_context(atomic_write(target)))
        failed = _SummedFile(stack.enter_context(atomic_write(errors)))
        for _, result in results:
            (failed if result.failed else answered).write(batch_line(result))
            counts.add(result)
            if not counts.total % _FLUSH_EVERY:
                begin_writeback(answered.file)
    counts.files[target.name] = written_file(target, answered.crc)
    if counts.failed:
        counts.files[errors.name] = written_file(errors, failed.crc)
    else:
        errors.unlink()
    return counts


def batch_line(result: RawResult) -> bytes:
    """Return one line in OpenAI's Batch output form."""
    name = result.key.hex().encode()
    response = b"null"
    if result.status != b"null":
        response = b'{"status_code":%b,"request_id":"%b","body":%b}' % (
            result.status,
            name,
            result.body,
        )
    return b'{"id":"batch_req_%b","custom_id":%b,"response":%b,"error":%b}\n' % (
        name,
        result.custom_id,
        response,
        result.error,
    )


_DONE = b"done\n"


def merge_when_last(
    plan: Plan, run: RunDirectory, shard: int, status: Status, say: Callable[[str], None]
) -> ResultCounts | None:
    """Mark a shard as done, and write the output if all shards are; return None if one is not.

    Shards can end at the same time, on nodes that see each other's status late: for a minute, an
    NFS client can show a file as missing or with old content. If each shard waited for the status
    of the other, none would write the output. So only the server decides the order, with
    ``O_EXCL``, on which the lease of the merge is based: one shard after the other creates its mark
    under that lease, and then looks for the marks of the others by trying to create them. The last
    one finds them all, whatever its client has cached.

    Args:
        status: the shard's; it becomes "completed".

    Raises:
        StoppedError: a request has no result; nothing is written.
        StorageError: writing failed.
    """
    with acquire(run.merge_lease, f"writing {plan.output}", wait=True, on_wait=say):
        _make_mark(run.done_mark(shard, plan.id))
        status.enter("completed")
        if not all(_marked(run.done_mark(each, plan.id)) for each in open_shards(plan, run)):
            return None
        return _merge(plan, run, say)


def _make_mark(mark: Path) -> None:
    try:
        mark.write_bytes(_DONE)
    except OSError as error:
        raise storage_error(error, mark) from error


def _marked(mark: Path) -> bool:
    """Return whether a shard has its mark. Only for the holder of the merge's lease.

    An empty mark is from a process that was killed here before it removed the mark.
    """
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if read_file(mark) == _DONE:
            return True
    except OSError as error:
        raise storage_error(error, mark) from error
    mark.unlink(missing_ok=True)
    return False


def merge(
    plan: Plan, run: RunDirectory, say: Callable[[str], None], *, again: bool = False
) -> ResultCounts:
    """Write the output from the journals, unless that was done before.

    Args:
        again: write it although it exists.

    Raises:
        RunConflictError: another process is writing it.
        OutputExistsError: it was written and then changed, and is not to be written ``again``.
        StoppedError: a request has no result yet; nothing is written.
        StorageError: writing failed.
    """
    run.refuse_foreign()
    with acquire(run.merge_lease, f"writing {plan.output}"):
        return _merge(plan, run, say, again=again)


def _merge(
    plan: Plan, run: RunDirectory, say: Callable[[str], None], *, again: bool = False
) -> ResultCounts:
    counts = finished_counts(plan, run, changed_ok=again)
    if counts is not None and not again:
        return ResultCounts(counts.total, counts.failed, run_left_out(plan, run))
    remove_leftovers(*output_paths(plan.output))
    if counts is None and not again:
        _refuse_strangers(plan, run)
    status = _begun(plan, run, own=counts is not None)
    began = time.monotonic()
    try:
        written = finalise(plan, run)
    except AifluxError as error:
        with suppress(StorageError):
            status.enter("in_progress")
            if isinstance(error, MissingResultsError):
                reopen(plan, run, error.shards)
        raise
    status.completed, status.failed = written.completed, written.failed
    status.details.left_out = written.left_out
    status.details.empty_answers = dict(written.empty)
    status.details.merge = MergeFacts(
        seconds=round(time.monotonic() - began, 3),
        bytes=written.files[plan.output.name].bytes,
        files=written.files,
        by=f"process {os.getpid()} on {socket.gethostname()}",
    )
    status.enter("completed")
    say(f"wrote {plan.output}")
    if written.empty:
        say(answered_words(written.completed, written.empty))
    return written


def _refuse_strangers(plan: Plan, run: RunDirectory) -> None:
    """Keep an output that was created by others since the run was planned.

    Raises:
        StoppedError: there is one.
    """
    there = next((path for path in output_paths(plan.output) if os.path.lexists(path)), None)
    if there is not None and not may_replace(plan, run):
        raise StoppedError(
            f"the output {there} was created by others during the run; nothing was written",
            "every answer is kept: move that file away and run the same command again, or "
            "replace it with --force",
        )


def shards_left(plan: Plan, run: RunDirectory) -> tuple[int, ...]:
    """Return the shards that a start has to look at; none where only the output is missing.

    The journals are read to verify that: a status can be older than they are.

    Raises:
        StoppedError: the input is no longer the planned one.
        StorageError: a status or a journal cannot be read.
    """
    left = open_shards(plan, run)
    if left:
        return left
    missing = missing_results(plan, run)
    if missing:
        refuse_changed_input(plan, run)
        reopen(plan, run, missing)
    return tuple(missing)


def reopen(plan: Plan, run: RunDirectory, missing: Mapping[int, int]) -> None:
    """Mark shards as not done, so that the next start works on them.

    Args:
        missing: number of requests without a result, by shard.
    """
    already_open = open_shards(plan, run)
    for shard, count in missing.items():
        # Also for a shard without a status: with its mark, another shard would write the output.
        forget_done(plan, run, shard)
        status = None if shard in already_open else read_status(run, shard, plan)
        if status is not None:
            requests, failed = plan.shards[shard].requests, status.counts.failed
            kept = Counts(requests, max(0, requests - count - failed), failed)
            keep_sums(plan, run, kept, min(status.details.left_out, failed), shard, [status])


def forget_done(plan: Plan, run: RunDirectory, shard: int) -> None:
    """Remove the done mark of a shard."""
    mark = run.done_mark(shard, plan.id)
    try:
        mark.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, mark) from error


def merge_partial(plan: Plan, run: RunDirectory) -> tuple[Path, ResultCounts]:
    """Write the results so far next to the output; return the file and the counts.

    Raises:
        RunConflictError: another process writes the output.
        StoppedError: the input is no longer the planned one.
        StorageError: writing failed.
    """
    run.refuse_foreign()
    target = plan.output.with_name(f"{plan.output.stem}.partial{plan.output.suffix}")
    with acquire(run.merge_lease, f"writing {plan.output}"):
        remove_leftovers(*output_paths(target))
        return target, finalise(plan, run, partial=target)


def _begun(plan: Plan, run: RunDirectory, *, own: bool) -> Status:
    earlier = read_run_status(run)
    status = run_status(plan, run)
    status.details.replace = own or bool(earlier is not None and earlier.details.replace)
    status.enter("finalizing")
    return status
