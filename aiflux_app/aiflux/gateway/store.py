"""The gateway's directory: uploaded files and batches, each in a directory of its own.

Whatever is written gets its place by one rename, after its content was synced to disk. So a gateway
that is killed leaves nothing half done that is visible; what it left in ``.incoming`` is removed at
the next start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from shlex import quote
from typing import Any, TypeVar

from aiflux.core.batch.results_file import errors_path
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import ConfigError, RunConflictError
from aiflux.gateway.objects import ApiError, BatchError, wrong
from aiflux.util.files import (
    FORBIDDEN,
    fsync_directory,
    open_private,
    storage_error,
    user_name,
    write_json,
)
from aiflux.util.lease import acquire
from aiflux.util.records import read_record, to_json

T = TypeVar("T")
Key = tuple[int, str]
"""When something was created (nanoseconds), and its id: the order of lists."""
BATCH, BATCH_OUTPUT = "batch", "batch_output"
"""The purposes of files: what a client uploads, and what a batch writes."""
# 16 digits of the time, so that a list is sorted by the names alone, and 96 bits that nobody can
# guess. Only ids of this form ever become a part of a path.
_DIGITS = 40
_FORM = rf"[0-9a-f]{{{_DIGITS}}}"
_FILE_ID = re.compile(rf"file-(?P<key>{_FORM})(?:-(?P<part>output|errors))?", re.ASCII)
_BATCH_ID = re.compile(rf"batch_(?P<key>{_FORM})", re.ASCII)
_ENTRY = re.compile(rf"(?:file-|batch_){_FORM}", re.ASCII)


@dataclass(frozen=True)
class UploadRecord:
    """What is stored of an uploaded file in addition to its content."""

    filename: str
    purpose: str
    created_at: int
    bytes: int


@dataclass(frozen=True)
class StoredFile:
    """A file that clients can download."""

    id: str
    path: Path
    filename: str
    purpose: str
    created_at: int
    bytes: int


@dataclass(frozen=True)
class BatchRecord:
    """Everything that was decided when a batch was created; never changed.

    Attributes:
        settings: of its run: those of the gateway's command line, and those of the request.
        local: whether the engine is started on the gateway's machine.
        workspace: directory whose ``aiflux.yaml`` applies.
        preflight: check Slurm, image and disk space before a job is submitted.
    """

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    created_at: int
    settings: dict[str, Any]
    local: bool
    workspace: Path
    preflight: bool = True


@dataclass(frozen=True)
class BatchFailure:
    """Why a batch was not started."""

    errors: tuple[BatchError, ...]
    at: int


@dataclass(frozen=True)
class Moment:
    """A file that only holds when something happened (Unix time)."""

    at: int


@dataclass(frozen=True)
class BatchFiles:
    """The files of one batch; ``path`` is its directory.

    A batch has no state of its own: the run's files show how far it is. Further files hold what no
    run knows: that it was submitted, could not be submitted, or is to be cancelled.
    """

    path: Path

    @property
    def id(self) -> str:
        """The id of the batch."""
        return self.path.name

    @property
    def record_file(self) -> Path:
        """The record of its creation."""
        return self.path / "batch.json"

    @property
    def submitted_file(self) -> Path:
        """Written when its run was started or submitted."""
        return self.path / "submitted.json"

    @property
    def failed_file(self) -> Path:
        """Why its run could not be started."""
        return self.path / "failed.json"

    @property
    def cancelling_file(self) -> Path:
        """Written when a client asks to cancel it."""
        return self.path / "cancelling.json"

    @property
    def cancelled_file(self) -> Path:
        """Written when its run has ended after that."""
        return self.path / "cancelled.json"

    @property
    def lease(self) -> Path:
        """Held by the process that submits or cancels the run."""
        return self.path / ".submission.lease"

    @property
    def log(self) -> Path:
        """What that process prints."""
        return self.path / "submission.log"

    @property
    def output(self) -> Path:
        """The run's output, in OpenAI's form."""
        return self.path / f"{self.id}.jsonl"

    @property
    def run(self) -> RunDirectory:
        """The run's directory."""
        return RunDirectory.of_output(self.output)

    def part(self, part: str) -> Path | None:
        """Return the file of the answers or the errors; None if there are none.

        Args:
            part: ``output`` or ``errors``.
        """
        outputs = [self.output]
        if self.cancelled_file.exists():
            outputs.append(self.output.with_name(f"{self.output.stem}.partial.jsonl"))
        paths = (path if part == "output" else errors_path(path) for path in outputs)
        return next((path for path in paths if _size(path)), None)

    @property
    def written(self) -> int:
        """When its outputs were written (nanoseconds); known even after they were deleted."""
        last = (self.run.run_status, self.cancelled_file)
        return max(map(_modified, last))

    def part_id(self, part: str) -> str:
        """Return the id of the file of the answers or the errors."""
        return f"file-{self.id.removeprefix('batch_')}-{part}"

    def input(self, record: BatchRecord) -> Path:
        """Return the file of its requests."""
        return self.path.parents[1] / "files" / record.input_file_id / "content"

    def record(self) -> BatchRecord:
        """Return the record of its creation.

        Raises:
            RunConflictError: it is damaged.
        """
        return _required(BatchRecord, self.record_file)

    def failure(self) -> BatchFailure | None:
        """Return why its run could not be started."""
        return _read(BatchFailure, self.failed_file)

    def moment(self, file: Path) -> int | None:
        """Return when one of the files that hold a moment was written."""
        found = _read(Moment, file)
        return None if found is None else found.at

    def note(self, file: Path) -> None:
        """Write a file that holds this moment, unless it exists."""
        if not file.exists():
            write_json(file, to_json(Moment(int(time.time()))))

    def fail(self, errors: tuple[BatchError, ...]) -> None:
        """Record why its run could not be started."""
        write_json(self.failed_file, to_json(BatchFailure(errors, int(time.time()))))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _read(kind: type[T], path: Path) -> T | None:
    try:
        return read_record(kind, path)
    except ValueError as error:
        raise RunConflictError(
            f"{path} is damaged: {error}",
            f"move its directory away: mv {quote(str(path.parent))} ELSEWHERE",
        ) from error


def _required(kind: type[T], path: Path) -> T:
    found = _read(kind, path)
    if found is None:
        raise RunConflictError(f"{path} does not exist", f"remove {quote(str(path.parent))}")
    return found


class GatewayStore:
    """The gateway's directory, while this process holds it. Thread-safe.

    Args:
        root: the directory; created if it does not exist.

    Raises:
        ConfigError: it belongs to another user, or others can enter it.
        RunConflictError: another gateway uses it.
        StorageError: it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        _make_private(self.root)
        self._lease = acquire(
            self.root / ".gateway.lease", f"the directory {self.root}", on_lost=_stop_this_process
        )
        self._lock = threading.RLock()
        self._last = 0
        for folder in (self.files, self.batches, self.incoming):
            _make_private(folder)
        for left in self.incoming.iterdir():
            if _ENTRY.fullmatch(left.name):
                shutil.rmtree(left)

    @property
    def files(self) -> Path:
        """Directory of the uploaded files."""
        return self.root / "files"

    @property
    def batches(self) -> Path:
        """Directory of the batches."""
        return self.root / "batches"

    @property
    def incoming(self) -> Path:
        """Directory of what is being written or removed."""
        return self.root / ".incoming"

    def close(self) -> None:
        """Leave the directory to another process."""
        self._lease.release()

    def begin_upload(self) -> PendingUpload:
        """Return a new upload, which nothing shows until it is complete."""
        return PendingUpload(self, self._new_folder("file-"))

    def add(self, folder: Path, target: Path) -> None:
        """Make a written directory visible."""
        fsync_directory(folder)
        folder.rename(target / folder.name)
        fsync_directory(target)

    def file(self, id_: str) -> StoredFile:
        """Return a file.

        Raises:
            ApiError: there is none with this id.
        """
        found = _FILE_ID.fullmatch(id_)
        if found is None:
            raise no_file(id_)
        if found["part"] is not None:
            return self._part(id_, found["key"], found["part"])
        folder = self.files / id_
        record = _read(UploadRecord, folder / "file.json")
        if record is None:
            raise no_file(id_)
        return StoredFile(
            id_, folder / "content", record.filename, record.purpose, record.created_at,
            record.bytes,
        )  # fmt: skip

    def _part(self, id_: str, key: str, part: str) -> StoredFile:
        batch = BatchFiles(self.batches / f"batch_{key}")
        path = batch.part(part)
        size = 0 if path is None else _size(path)  # it may be deleted in this moment
        if path is None or not size:
            raise no_file(id_)
        name = f"{batch.id}_{'output' if part == 'output' else 'error'}.jsonl"
        return StoredFile(id_, path, name, BATCH_OUTPUT, batch.written // 10**9, size)

    def file_keys(self, purpose: str | None = None) -> list[Key]:
        """Return the keys of all files, in the order of their creation."""
        keys: list[Key] = []
        if purpose in (None, BATCH):
            keys += [id_key(name) for name in os.listdir(self.files) if _ENTRY.fullmatch(name)]
        if purpose in (None, BATCH_OUTPUT):
            keys += self._outputs()
        return sorted(keys)

    def _outputs(self) -> Iterator[Key]:
        for id_ in self.batch_ids():
            batch = BatchFiles(self.batches / id_)
            for part in ("output", "errors"):
                if batch.part(part) is not None:
                    yield batch.written, batch.part_id(part)

    def place(self, id_: str) -> Key:
        """Return the key of a file, also of one that was deleted.

        Raises:
            ApiError: it has not the form of an id.
        """
        found = _FILE_ID.fullmatch(id_)
        if found is None or found["part"] is None:
            return id_key(id_)
        return BatchFiles(self.batches / f"batch_{found['key']}").written, id_

    def delete(self, id_: str, in_use: Callable[[BatchFiles], bool]) -> None:
        """Delete a file.

        Args:
            in_use: returns whether a batch still needs its input.

        Raises:
            ApiError: there is none with this id, or a batch needs it.
        """
        with self._lock:
            stored = self.file(id_)
            if stored.purpose == BATCH_OUTPUT:
                stored.path.unlink(missing_ok=True)
                return
            for batch in map(self.batch, self.batch_ids()):
                if batch.record().input_file_id == id_ and in_use(batch):
                    raise ApiError(
                        409,
                        f"File {id_} is in use by batch {batch.id}: cancel the batch, or wait "
                        "until it has ended.",
                        param="file_id",
                        code="file_in_use",
                    )
            gone = self.incoming / id_
            (self.files / id_).rename(gone)
            fsync_directory(self.files)
        shutil.rmtree(gone, ignore_errors=True)  # what is left goes at the next start

    def create(self, record: BatchRecord) -> BatchFiles:
        """Store a new batch.

        Raises:
            ApiError: its input does not exist.
            StorageError: writing failed.
        """
        with self._lock:
            try:
                self.file(record.input_file_id)
            except ApiError as error:
                raise wrong("input_file_id", error.message, "file_not_found") from None
            folder = self._new_folder("batch_")
            try:
                write_json(BatchFiles(folder).record_file, to_json(record))
                self.add(folder, self.batches)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return BatchFiles(self.batches / folder.name)

    def batch(self, id_: str) -> BatchFiles:
        """Return a batch.

        Raises:
            ApiError: there is none with this id.
        """
        files = BatchFiles(self.batches / id_)
        if not _BATCH_ID.fullmatch(id_) or not files.record_file.exists():
            raise ApiError(404, f"No batch found with id '{id_}'.", param="batch_id")
        return files

    def batch_ids(self) -> list[str]:
        """Return the ids of all batches, in the order of their creation."""
        return sorted(name for name in os.listdir(self.batches) if _BATCH_ID.fullmatch(name))

    def cancel(self, batch: BatchFiles, may_cancel: Callable[[BatchFiles], None]) -> bool:
        """Record that a batch is to be cancelled; return False if that was recorded before.

        Args:
            may_cancel: raises ApiError if it has ended.
        """
        with self._lock:
            may_cancel(batch)
            if batch.cancelling_file.exists():
                return False
            batch.note(batch.cancelling_file)
        return True

    def _new_folder(self, prefix: str) -> Path:
        with self._lock:
            self._last = max(time.time_ns(), self._last + 1)
            folder = self.incoming / f"{prefix}{self._last:016x}{token_hex(12)}"
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise storage_error(error, folder) from error
        return folder


def _stop_this_process() -> None:
    """Leave the directory to the process that took it over while this one was suspended."""
    os.kill(os.getpid(), signal.SIGTERM)


class PendingUpload:
    """A file that is being uploaded. Use it in one thread at a time.

    Raises:
        StorageError: it cannot be created.
    """

    def __init__(self, store: GatewayStore, folder: Path) -> None:
        self.size = 0
        self._store = store
        self._folder = folder
        self._content = folder / "content"
        try:
            self._file = open(self._content, "xb", opener=open_private)  # noqa: SIM115 - see discard
        except OSError as error:
            raise storage_error(error, self._content) from error

    def write(self, data: bytes) -> None:
        """Add to the content.

        Raises:
            StorageError: writing failed.
        """
        try:
            self._file.write(data)
        except OSError as error:
            raise storage_error(error, self._content) from error
        self.size += len(data)

    def publish(self, filename: str, purpose: str) -> StoredFile:
        """Make the file visible.

        Raises:
            StorageError: writing failed.
        """
        record = UploadRecord(filename, purpose, int(time.time()), self.size)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            write_json(self._folder / "file.json", to_json(record))
            self._store.add(self._folder, self._store.files)
        except OSError as error:
            raise storage_error(error, self._content) from error
        return self._store.file(self._folder.name)

    def discard(self) -> None:
        """Remove what was written, unless it was published."""
        with suppress(OSError):  # the disk is full: what was buffered is not wanted any more
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def no_file(id_: str) -> ApiError:
    """Return the error of an unknown file."""
    return ApiError(404, f"No such File object: {id_}", param="id")


def id_key(id_: str) -> Key:
    """Return the key of a file or a batch, by its id alone.

    Raises:
        ApiError: it has not the form of an id.
    """
    if not _ENTRY.fullmatch(id_):
        raise wrong("after", f"Invalid value: {id_!r} is not an id of this list.", "invalid_value")
    return int(id_[-_DIGITS:][:16], 16), id_


def _make_private(folder: Path) -> None:
    """Create a directory of mode 0700; refuse one that other users can enter.

    Raises:
        ConfigError: it belongs to another user, or others can enter it.
        StorageError: it cannot be created.
    """
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        found = folder.lstat()
    except OSError as error:
        if error.errno in FORBIDDEN:
            raise ConfigError(
                f"cannot create {folder}: {error.strerror}", "choose another directory: --dir"
            ) from error
        raise storage_error(error, folder) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is not a directory", "choose another directory: --dir")
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"the directory {folder} belongs to another user ({user_name(found.st_uid)})",
            "choose another directory: --dir",
        )
    if found.st_mode & 0o077:
        raise ConfigError(
            f"other users can enter the directory {folder} "
            f"(mode {stat.S_IMODE(found.st_mode):04o})",
            f"chmod 700 {quote(str(folder))}",
        )
