"""Change a models directory safely: staging, GGUF imports, moves into place, removal.

A new model is assembled in ``<models>/.staging/<name>``, in the same layout. A run that reads the
directory meanwhile sees a complete model or none.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from aiflux.engines.ollama.store import (
    OnBytes,
    blob_path,
    digest_of,
    listed_models,
    read_manifest,
    refuse_other_digest,
)
from aiflux.errors import ModelError, StorageError, UsageError
from aiflux.models.figures import shape_of
from aiflux.models.gguf import GgufHeader, read_gguf, refuse_truncated
from aiflux.models.name import ModelName
from aiflux.util.files import fsync_directory, may_write, storage_error, write_json
from aiflux.util.lease import Lease, acquire, holder_lives
from aiflux.util.text import error_text

STAGING = ".staging"
_NOTE = "note"  # contains the action and the model's name


def changing(models_dir: Path, what: str, say: Callable[[str], None]) -> Lease:
    """Return the lease of a models directory; waits for the current holder.

    Args:
        what: the planned action, shown to waiting processes.
        say: called with a message before waiting.

    Raises:
        StorageError: the directory cannot be written.
    """
    staging = models_dir / STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, staging) from error
    return acquire(staging / "lease", f"{what} in {models_dir}", wait=True, on_wait=say)


def staged_folder(models_dir: Path, name: ModelName) -> Path:
    """Return the directory where a model is assembled."""
    return models_dir / STAGING / name.served.replace("/", "_").replace(":", "_")


def begin_staging(models_dir: Path, name: ModelName, what: str) -> Path:
    """Create the directory where a model is assembled, with a note for ``models list``.

    Args:
        what: ``pull``, which resumes with existing files, or ``import``, which starts over.

    Raises:
        StorageError: the directory cannot be written.
    """
    folder = staged_folder(models_dir, name)
    if what != "pull":
        shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / _NOTE).write_text(f"{what} {name.written}\n", encoding="utf-8")
    except OSError as error:
        if what != "pull":
            shutil.rmtree(folder, ignore_errors=True)
        raise storage_error(error, folder) from error
    return folder


def remove_if_empty(folder: Path) -> None:
    """Remove a staging directory without any data of a model."""
    if not any(folder.glob("blobs/*")):
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, models_dir: Path, name: ModelName) -> None:
    """Move a complete model out of its staging directory: blobs first, the manifest last.

    Raises:
        StorageError: the directory cannot be written.
    """
    try:
        blobs = models_dir / "blobs"
        blobs.mkdir(exist_ok=True)
        for digest in read_manifest(folder, name).blobs:
            blob_path(folder, digest).replace(blob_path(models_dir, digest))
        fsync_directory(blobs)
        manifest = models_dir / name.manifest_path
        manifest.parent.mkdir(parents=True, exist_ok=True)
        (folder / name.manifest_path).replace(manifest)
        fsync_directory(manifest.parent)
        shutil.rmtree(folder)
    except OSError as error:
        raise storage_error(error, models_dir) from error


def making_room(
    models_dir: Path, what: str, say: Callable[[str], None]
) -> AbstractContextManager[object]:
    """Return the lease for freeing space; a no-op if the disk is too full for a lease.

    In that case, no other process holds one (it would be waited for) or could acquire one.

    Raises:
        StorageError: the directory cannot be written, for another reason.
    """
    try:
        return changing(models_dir, what, say)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return nullcontext()
        raise


def remove_model(models_dir: Path, name: ModelName, say: Callable[[str], None]) -> int:
    """Remove a model; shared blobs stay. Return the number of freed bytes.

    Raises:
        ModelError: the model is missing, has another digest than required, or it is unknown which
            blobs other models use.
        StorageError: the directory cannot be written.
    """
    with making_room(models_dir, f"removing {name.served}", say):
        present = read_manifest(models_dir, name)
        refuse_other_digest(name, present.digest, str(models_dir))
        own = present.blobs
        others = [other for other in listed_models(models_dir) if other.served != name.served]
        used = {digest for other in others for digest in _blobs_of(models_dir, other)}
        manifest = models_dir / name.manifest_path
        try:
            manifest.unlink()
            fsync_directory(manifest.parent)
            for digest in own.keys() - used:
                blob_path(models_dir, digest).unlink(missing_ok=True)
            _remove_empty(manifest.parent, models_dir / "manifests")
        except OSError as error:
            raise storage_error(error, models_dir) from error
    return sum(size for digest, size in own.items() if digest not in used)


def remove_staged(models_dir: Path, name: ModelName) -> bool:
    """Remove the files of an interrupted pull; return whether there were any."""
    folder = staged_folder(models_dir, name)
    if not folder.is_dir():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


@dataclass(frozen=True)
class Staged:
    """A model that is being assembled, or whose assembly was interrupted.

    Attributes:
        name: the name to pull it; "" if only its directory is known.
        what: ``pull`` or ``import``.
        size: bytes on disk.
        active: whether a process is working on it; None if unknown from here.
    """

    folder: str
    name: str
    what: str
    size: int
    active: bool | None


def staged_models(models_dir: Path) -> list[Staged]:
    """Return the staged models of a models directory."""
    staging = models_dir / STAGING
    folders = sorted(folder for folder in staging.glob("*/") if folder.is_dir())
    active = _is_active(staging / "lease") if folders else False
    return [_staged(folder, active) for folder in folders]


def _is_active(lease: Path) -> bool | None:
    try:
        return holder_lives(lease)
    except StorageError:  # only readable for its owner
        return None


def _staged(folder: Path, active: bool | None) -> Staged:
    files = [file for file in folder.glob("blobs/*") if file.is_file()]
    try:
        what, _, name = (folder / _NOTE).read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        what, name = "pull", ""
    # A partial blob has its full length; its disk usage is the downloaded part.
    size = sum(file.stat().st_blocks * 512 for file in files)
    return Staged(folder.name, name, what, size, active)


def _blobs_of(models_dir: Path, name: ModelName) -> dict[str, int]:
    try:
        return read_manifest(models_dir, name).blobs
    except ModelError as error:
        raise ModelError(
            f"{error.message}; its shared blobs are unknown, so nothing was removed",
            f"fix this first: aiflux models pull {name.served}, or remove its manifest",
        ) from error


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def refuse_read_only(models_dir: Path) -> None:
    """Raise an error unless the models directory is writable.

    Raises:
        UsageError: it is read-only.
    """
    if not may_write(models_dir):
        raise UsageError(
            f"the models directory {models_dir} is read-only for you",
            "ask its owner, or use your own directory: --models-dir PATH",
        )


_GGUF_NOTE = "gguf.json"


@dataclass(frozen=True)
class StagedGguf:
    """Source of a model to create.

    Attributes:
        template: prompt template in Ollama's syntax; None uses that of the file.
    """

    digest: str
    template: str | None


def stage_gguf(
    models_dir: Path, name: ModelName, source: Path, template: str | None, on_bytes: OnBytes
) -> StagedGguf:
    """Copy a GGUF file into a model's staging folder.

    Raises:
        ModelError: the file is not a GGUF file with a complete model.
        StorageError: the models directory cannot be written.
    """
    header = read_gguf(source)
    _refuse_part(source, header)
    refuse_truncated(source, header)
    folder = begin_staging(models_dir, name, "import")
    try:
        part = folder / "blobs" / "incoming"
        with open(source, "rb") as file, open(part, "wb") as copy:
            digest = digest_of(file, on_bytes, copy)
            copy.flush()
            os.fsync(copy.fileno())
        part.replace(blob_path(folder, digest))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise storage_error(error, folder) from error
    staged = StagedGguf(digest, template)
    write_json(folder / _GGUF_NOTE, asdict(staged))
    return staged


def _refuse_part(source: Path, header: GgufHeader) -> None:
    """Raise an error unless a file contains a complete language model.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (``general.type``) and
    llama.cpp's ``tools/gguf-split``.
    """
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{source} is one of {parts} parts of a model, but Ollama only accepts complete ones",
            "join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{source} has the type {kind!r}, which cannot run by itself",
            "use the model's own file; merge an adapter with its model first (llama-export-lora)",
        )
    shape_of(header)


def read_staged_gguf(models_dir: Path, name: ModelName) -> StagedGguf:
    """Return the source staged by ``stage_gguf``.

    Raises:
        ModelError: nothing is staged.
    """
    try:
        content = json.loads(
            (staged_folder(models_dir, name) / _GGUF_NOTE).read_text(encoding="utf-8")
        )
        return StagedGguf(str(content["digest"]), content["template"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"no GGUF file is staged for {name.served}: {error_text(error)}",
            "aiflux models import --gguf FILE --name NAME",
        ) from error
