"""The process that starts or cancels the run of one batch: ``-m aiflux.gateway.submission DIR``.

It is a process of its own for three reasons: a large input is checked without slowing the gateway
down or filling its memory; it ends its work although the gateway is killed; and if it is killed
itself, the next one continues. For that, every step first looks at what earlier ones left: the run
directory shows whether the run was submitted.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from aiflux.api.run import Run, run
from aiflux.core.batch.input_file import InputSummary, scan_input
from aiflux.core.batch.request import endpoint_url, load_json
from aiflux.core.config.config import Config
from aiflux.core.runs.output import merge_partial
from aiflux.core.runs.plan import input_rules, read_plan
from aiflux.engines.kinds import engine_kind
from aiflux.errors import AifluxError, InputError, RunConflictError, StoppedError
from aiflux.gateway.objects import BatchError, line_error
from aiflux.gateway.store import BatchFiles, BatchRecord
from aiflux.slurm.monitor import gather
from aiflux.util.lease import acquire
from aiflux.util.lines import read_lines
from aiflux.util.text import counted

_log = logging.getLogger(__name__)
_SHOWN_ERRORS = 20
# How often a run is asked to end, which has requests in flight, and how long it has time for that.
_CANCEL_PAUSE, _CANCEL_SECONDS = 60.0, 900.0


def advance(batch: BatchFiles) -> None:
    """Start or cancel the run of a batch, as its files ask for, unless that was done before.

    Raises:
        AifluxError: nothing was recorded; it can be tried again.
    """
    with acquire(batch.lease, f"the batch {batch.id}", wait=True):
        if batch.failed_file.exists() or batch.cancelled_file.exists():
            return
        if batch.cancelling_file.exists():
            _cancel(batch)
        elif not batch.submitted_file.exists():
            _submit(batch)


def _submit(batch: BatchFiles) -> None:
    """Start the run; record why it cannot be started."""
    record = batch.record()
    source = batch.input(record)
    try:
        _check(source, record)
        if batch.cancelling_file.exists():
            return  # in the meantime; the next process records that
        _start(batch, source, record)
    except StoppedError:
        raise  # no space or no memory: another start may have it
    except InputError as error:
        batch.fail(tuple(_input_errors(source, error)))
    except AifluxError as error:
        batch.fail((BatchError("run_not_started", str(error)),))
    else:
        batch.note(batch.submitted_file)


def _check(source: Path, record: BatchRecord) -> None:
    """Check the lines of an input.

    Raises:
        InputError: lines are wrong.
    """
    config = Config(arguments=record.settings, directory=record.workspace)
    options = config.run_options()
    rules = input_rules(engine_kind(options), options)
    summary = scan_input(source, options.model, rules=rules)
    if set(summary.endpoints) != {record.endpoint}:
        raise _other_urls(source, summary, record.endpoint)


def _other_urls(source: Path, summary: InputSummary, endpoint: str) -> InputError:
    wrong = (
        (number, f"url is not that of the batch, {endpoint}")
        for number, _, raw in read_lines(source)
        if endpoint_url(load_json(raw)) != endpoint
    )
    return InputError(
        f"requests are for other endpoints than {endpoint}",
        lines=tuple(islice(wrong, _SHOWN_ERRORS)),
        count=summary.requests - summary.endpoints.get(endpoint, 0),
    )


def _start(batch: BatchFiles, source: Path, record: BatchRecord) -> None:
    """Start the run, unless an earlier process did.

    Raises:
        AifluxError: it cannot be started.
    """
    settings: dict[str, Any] = dict(record.settings)
    try:
        run(
            source,
            batch.output,
            local=record.local,
            preflight=record.preflight,
            workspace=record.workspace,
            **settings,
        )
    except RunConflictError:
        # Nothing else uses this output: an earlier process started the run, and was killed before
        # it recorded that.
        if not batch.run.plan.exists() or gather(batch.run).ended:
            raise


def _input_errors(source: Path, error: InputError) -> Iterator[BatchError]:
    """Yield the errors of a wrong input, line by line."""
    if not error.lines:
        empty = next(read_lines(source), None) is None if source.exists() else False
        # Clients know the file by its id, which is the name of its directory.
        text = str(error).replace(str(source), source.parent.name)
        yield BatchError("empty_file" if empty else "invalid_file", text)
    for line, problem in error.lines:
        yield line_error(line, problem)
    rest = error.count - len(error.lines)
    if error.lines and rest > 0:
        yield BatchError(
            "more_errors", f"{counted(rest, 'more line')} {'is' if rest == 1 else 'are'} wrong"
        )


def _cancel(batch: BatchFiles) -> None:
    """End the run and write the results so far; a run that has finished stays as it is.

    Raises:
        AifluxError: the run cannot be ended.
    """
    if batch.run.plan.exists():
        started = Run.open(batch.output)
        began = asked = time.monotonic() - _CANCEL_PAUSE
        while not (view := gather(batch.run)).ended:
            now = time.monotonic()
            if now - began > _CANCEL_SECONDS:
                raise StoppedError("the run has not ended", "it is tried again")
            if now - asked >= _CANCEL_PAUSE:
                started.cancel()
                asked = now
            time.sleep(1.0)
        if view.finished:
            return
        with suppress(StoppedError):  # the input was deleted by hand: there are no partial results
            merge_partial(read_plan(batch.run), batch.run)
    batch.note(batch.cancelled_file)


def main() -> int:
    """Advance the batch that the command line names; return the exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    batch = BatchFiles(Path(sys.argv[1]))
    try:
        advance(batch)
    except AifluxError as error:
        _log.error("%s", error)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
