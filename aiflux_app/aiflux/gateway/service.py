"""What the routes work with: the store, the states of runs, and the processes that start them."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.config.config import Config
from aiflux.core.runs.local_process import read_process
from aiflux.engines.external.served import models_at
from aiflux.engines.kinds import kind_named
from aiflux.engines.ollama.store import listed_models
from aiflux.errors import AifluxError, ExitCode, StoppedError
from aiflux.gateway.batch_status import RunWatch, batch_states
from aiflux.gateway.objects import ApiError, BatchError, BatchRequest
from aiflux.gateway.store import BatchFiles, BatchRecord, GatewayStore
from aiflux.util.files import open_private
from aiflux.util.process_limits import start_thread

_log = logging.getLogger(__name__)
_AT_ONCE = 2
_CANCELLED_AT_ONCE = 8
_LATER = 60.0
_PLACE_PAUSE = 0.2
_PAUSES = (0.0, 0.5, 10.0)
"""Seconds before each try to start a run."""


class SubmissionQueue:
    """Starts a process for each batch that waits for one, a few at a time.

    The processes outlive the gateway. Their end is awaited only to start the next one. A batch that
    is cancelled takes as long as its requests in flight, so the others do not wait for it.

    Args:
        most: runs that are processed on this machine at once; None for any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._here: set[BatchFiles] = set()
        self._place = threading.Lock()
        self._starts: queue.SimpleQueue[BatchFiles] = queue.SimpleQueue()
        self._cancellations: queue.SimpleQueue[BatchFiles] = queue.SimpleQueue()
        for number in range(_AT_ONCE):
            start_thread(partial(self._work, self._starts), f"submission-{number}")
        for number in range(_CANCELLED_AT_ONCE):
            start_thread(partial(self._work, self._cancellations), f"cancellation-{number}")

    def add(self, batch: BatchFiles) -> None:
        """Start or cancel a batch's run as soon as there is room."""
        self._queue_of(batch).put(batch)

    def note_running(self, batches: Iterable[BatchFiles]) -> None:
        """Count batches that an earlier gateway started and whose runs are processed here.

        Call it before ``add``.
        """
        self._here.update(batches)

    def _queue_of(self, batch: BatchFiles) -> queue.SimpleQueue[BatchFiles]:
        return self._cancellations if batch.cancelling_file.exists() else self._starts

    def _work(self, waiting: queue.SimpleQueue[BatchFiles]) -> None:
        while True:
            batch = waiting.get()
            try:
                self._advance(batch, waiting)
            except (OSError, AifluxError) as error:
                _log.error("batch %s is tried again later: %s", batch.id, error)
                try:
                    start_thread(partial(self._add_later, batch), f"later-{batch.id}")
                except StoppedError:
                    self._add_later(batch)

    def _add_later(self, batch: BatchFiles) -> None:
        time.sleep(_LATER)
        self.add(batch)

    def _advance(self, batch: BatchFiles, waiting: queue.SimpleQueue[BatchFiles]) -> None:
        """Start or cancel a batch; wait for a place on this machine if it is to be started."""
        limited = self._most is not None and waiting is self._starts
        # The lock is held until the run has started: only then does its process count.
        with self._place if limited else nullcontext():
            while limited and self._queue_of(batch) is waiting and not self._has_place():
                time.sleep(_PLACE_PAUSE)
            if self._queue_of(batch) is not waiting:
                return  # cancelled before its start: whoever recorded that adds it again
            _advance(batch)
            if limited:
                self._here.add(batch)

    def _has_place(self) -> bool:
        self._here = {batch for batch in self._here if _is_processed_here(batch)}
        return len(self._here) < (self._most or 0)


def _is_processed_here(batch: BatchFiles) -> bool:
    process = read_process(batch.run)
    return process is not None and process.lives is True


def _advance(batch: BatchFiles) -> None:
    """Run the process of a batch; try again if it could not work, as on a full disk.

    Raises:
        OSError, AifluxError: not even its failure can be recorded, or its run does not end.
    """
    for pause in _PAUSES:
        time.sleep(pause)
        with open(batch.log, "ab", opener=open_private) as log:
            status = subprocess.call(
                [sys.executable, "-m", "aiflux.gateway.submission", str(batch.path)],
                cwd=batch.path,  # -m imports from the current directory, which is private here
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if status == ExitCode.OK:
            return
    if batch.cancelling_file.exists():
        raise StoppedError(f"its run cannot be cancelled (exit status {status}): see {batch.log}")
    text = f"the run could not be started (exit status {status}): see {batch.log}"
    batch.fail((BatchError("run_not_started", text),))


@dataclass
class Gateway:
    """Files and batches, and how their runs are started.

    Attributes:
        settings: of all runs, from the gateway's command line, in a form that JSON can hold.
        local: start engines on this machine instead of in Slurm jobs.
        workspace: directory whose ``aiflux.yaml`` and ``.env`` apply.
        preflight: check Slurm, image and disk space before a job is submitted.
        at_once: runs that are processed on this machine at once; None for any number.
    """

    store: GatewayStore
    settings: Mapping[str, Any]
    local: bool
    workspace: Path
    preflight: bool = True
    at_once: int | None = None
    watch: RunWatch = field(default_factory=RunWatch)
    submissions: SubmissionQueue = field(init=False)

    def __post_init__(self) -> None:
        self.submissions = SubmissionQueue(self.at_once)

    def recover(self) -> None:
        """Continue what an earlier gateway did not finish: submissions and cancellations.

        A run that was processed on this machine is resumed, too, if its process is gone. Slurm
        repeats its jobs itself.
        """
        batches = [
            batch
            for batch in map(self.store.batch, self.store.batch_ids())
            if not batch.failed_file.exists() and not batch.cancelled_file.exists()
        ]
        states = batch_states(batches, self.watch)
        self.submissions.note_running(
            batch for batch, state in zip(batches, states, strict=True) if not state.ended
        )
        for batch, state in zip(batches, states, strict=True):
            if state.may_resume:
                batch.submitted_file.unlink(missing_ok=True)
                self.watch.forget(batch)
            waits = not batch.submitted_file.exists() and not state.ended
            if state.may_resume or waits or state.status == "cancelling":
                self.submissions.add(batch)

    def create(self, asked: BatchRequest) -> BatchFiles:
        """Record a batch, and have it started.

        Raises:
            ApiError: its input does not exist.
            StorageError: it cannot be recorded.
        """
        batch = self.store.create(
            BatchRecord(
                asked.input_file_id,
                asked.endpoint,
                asked.completion_window,
                asked.metadata,
                int(time.time()),
                {**self.settings, **asked.settings},
                self.local,
                self.workspace,
                self.preflight,
            )
        )
        self.submissions.add(batch)
        return batch

    def cancel(self, id_: str) -> BatchFiles:
        """Have a batch cancelled.

        Raises:
            ApiError: there is none with this id, or it has ended.
            StorageError: that cannot be recorded.
        """
        batch = self.store.batch(id_)
        if self.store.cancel(batch, self._refuse_ended):
            self.submissions.add(batch)
        return batch

    def _refuse_ended(self, batch: BatchFiles) -> None:
        (state,) = batch_states([batch], self.watch)
        if state.ended:
            raise ApiError(409, f"Cannot cancel a batch with status '{state.status}'.")

    def needs_input(self, batch: BatchFiles) -> bool:
        """Return whether a batch still needs its input."""
        (state,) = batch_states([batch], self.watch)
        return not state.ended

    def models(self) -> tuple[str, ...]:
        """Return the models that batches can name.

        Raises:
            AifluxError: the configuration is wrong, or the engine does not answer.
        """
        config = Config(arguments=self.settings, directory=self.workspace)
        named = config.get("model")
        if named is not None:
            return (named,)
        options = config.run_options()
        if options.engine_url is not None:
            return models_at(options.engine_url, options.engine_ca).names
        if options.engine_command is not None:
            return ()  # only the command knows
        store = kind_named(options.engine).store
        if store is not None:
            return tuple(model.name for model in store.listed(config.models_dir))
        return tuple(model.served for model in listed_models(config.models_dir))
