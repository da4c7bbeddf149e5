"""Finalising: the journal becomes the output, streamed, in input order, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aiflux.core.files import atomic_write
from aiflux.core.journal import JournalReader, RawResult, scan_journal
from aiflux.core.lines import read_lines
from aiflux.core.plan import Plan
from aiflux.core.request import parse_json, request_key
from aiflux.core.rundir import RunDirectory, errors_path
from aiflux.errors import StoppedError


@dataclass
class Counts:
    """Results of a run."""

    total: int = 0
    failed: int = 0

    @property
    def completed(self) -> int:
        """Requests that succeeded."""
        return self.total - self.failed


def iterate_results(
    plan: Plan, run: RunDirectory, *, partial: bool = False
) -> Iterator[tuple[bytes, RawResult]]:
    """Yield ``(request line, result)`` in input order.

    Args:
        partial: leave out requests that have no result yet.

    Raises:
        StoppedError: a request has no result yet.
    """
    for shard in plan.shards:
        path = run.journal(shard.index)
        reader = JournalReader(path, scan_journal(path))
        try:
            for _, _, raw in read_lines(plan.input_path, shard.start, shard.end):
                result = reader.get(request_key(raw))
                if result is None and partial:
                    continue
                if result is None:
                    raise StoppedError(
                        f"a request of {plan.input_path} has no result in {path} yet",
                        "run the same command again: it goes on where it stopped",
                    )
                yield raw, result
        finally:
            reader.close()


def finalise(plan: Plan, run: RunDirectory, partial: Path | None = None) -> Counts:
    """Write the output (and the errors file of a ``.jsonl`` output) from the journals.

    Args:
        partial: write there what is done so far, instead of the output.

    Raises:
        StoppedError: a request has no result yet; nothing is written.
        StorageError: the disk refused; an output that was there stays as it was.
    """
    results = iterate_results(plan, run, partial=partial is not None)
    target = partial or plan.output
    if target.suffix == ".jsonl":
        return _write_batch_form(results, target)
    return _write_array(results, target)


Results = Iterator[tuple[bytes, RawResult]]


def _write_array(results: Results, target: Path) -> Counts:
    counts = Counts()
    with atomic_write(target) as file:
        separator = b"[\n"
        for raw, result in results:
            file.write(separator)
            file.write(array_entry(raw, result))
            separator = b",\n"
            counts.total += 1
            counts.failed += result.failed
        file.write(b"\n]\n" if counts.total else b"[]\n")
    return counts


def array_entry(raw: bytes, result: RawResult) -> bytes:
    """Return one entry of the ``.json`` output; request and answer stand in it byte for byte."""
    metadata = _merged_metadata(raw, result.metadata)
    if result.failed:
        return b'{"input":%b,"output":null,"error":%b,"metadata":%b}' % (
            raw.strip(),
            result.error,
            metadata,
        )
    return b'{"input":%b,"output":%b,"metadata":%b}' % (raw.strip(), result.body, metadata)


def _merged_metadata(raw: bytes, metadata: bytes) -> bytes:
    """Add the request's own metadata under its keys; the product's own keys win."""
    if b'"metadata"' not in raw:
        return metadata
    own = parse_json(raw.decode("utf-8")).get("metadata")
    if not own:
        return metadata
    return json.dumps({**own, **json.loads(metadata)}).encode()


def _write_batch_form(results: Results, target: Path) -> Counts:
    counts = Counts()
    errors = errors_path(target)
    with ExitStack() as stack:
        answered = stack.enter_context(atomic_write(target))
        failed: IO[bytes] = stack.enter_context(atomic_write(errors))
        for _, result in results:
            (failed if result.failed else answered).write(batch_line(result))
            counts.total += 1
            counts.failed += result.failed
    if not counts.failed:
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


def output_paths(output: Path) -> tuple[Path, ...]:
    """Return every file that finalising may write."""
    return (output, errors_path(output)) if output.suffix == ".jsonl" else (output,)
