"""Change a models directory safely: staging folders, GGUF imports, moves into place, removal.

What is to come in is put together in ``<models>/.staging/<name>``, in the same layout. A run that
reads the directory meanwhile sees a model whole or not at all.
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
from aiflux.models.gguf import GgufHeader, read_gguf
from aiflux.models.name import ModelName
from aiflux.util.files import fsync_directory, may_write, storage_error, write_json
from aiflux.util.lease import Lease, acquire, holder_lives

STAGING = ".staging"
_NOTE = "note"  # says in words what is done, and the model's name


def changing(models_dir: Path, what: str, say: Callable[[str], None]) -> Lease:
    """Return the lease of a models directory; waits for whoever holds it.

    Args:
        what: what is going to be done, for those who wait.
        say: told one line when there is something to wait for.

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
    """Return where a model is put together."""
    return models_dir / STAGING / name.served.replace("/", "_").replace(":", "_")


def begin_staging(models_dir: Path, name: ModelName, what: str) -> Path:
    """Make the folder that a model is put together in, with a note for those who list models.

    Args:
        what: ``pull``, which goes on with what is there, or ``import``, which begins anew.

    Raises:
        StorageError: it cannot be written.
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
    """Remove a staging folder into which no byte of a model came."""
    if not any(folder.glob("blobs/*")):
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(folder: Path, models_dir: Path, name: ModelName) -> None:
    """Move a whole model out of its staging folder: blobs first, the manifest last.

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
    """Return the lease for what frees space; nothing where the disk is too full for a lease.

    Then nobody else holds one (it would be waited for), or could take one.

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
    """Remove a model; blobs that other models use stay. Return the bytes that are free now.

    Raises:
        ModelError: it is not there, is not the one insisted on, or it cannot be told which blobs
            other models use.
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
    """Remove what is left of a pull that broke off; return whether there was something."""
    folder = staged_folder(models_dir, name)
    if not folder.is_dir():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


@dataclass(frozen=True)
class Staged:
    """A model that is being put together, or was when it broke off.

    Attributes:
        name: as it is written to have it pulled; "" where only its folder is known.
        what: ``pull`` or ``import``.
        size: bytes that are on the disk.
        going_on: somebody is at it; None where that cannot be told from here.
    """

    folder: str
    name: str
    what: str
    size: int
    going_on: bool | None


def staged_models(models_dir: Path) -> list[Staged]:
    """Return the models that are on their way into a models directory."""
    staging = models_dir / STAGING
    folders = sorted(folder for folder in staging.glob("*/") if folder.is_dir())
    going_on = _going_on(staging / "lease") if folders else False
    return [_staged(folder, going_on) for folder in folders]


def _going_on(lease: Path) -> bool | None:
    try:
        return holder_lives(lease)
    except StorageError:  # only its owner may read it
        return None


def _staged(folder: Path, going_on: bool | None) -> Staged:
    files = [file for file in folder.glob("blobs/*") if file.is_file()]
    try:
        what, _, name = (folder / _NOTE).read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        what, name = "pull", ""
    # A partial blob is made at its whole length; what is on the disk of it is what came.
    size = sum(file.stat().st_blocks * 512 for file in files)
    return Staged(folder.name, name, what, size, going_on)


def _blobs_of(models_dir: Path, name: ModelName) -> dict[str, int]:
    try:
        return read_manifest(models_dir, name).blobs
    except ModelError as error:
        raise ModelError(
            f"{error.message}; so it cannot be told which blobs it shares, and nothing was removed",
            f"mend that first: aiflux models pull {name.served}, or remove its manifest",
        ) from error


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def refuse_read_only(models_dir: Path) -> None:
    """Let a change pass where the models directory may be written.

    Raises:
        UsageError: it may not.
    """
    if not may_write(models_dir):
        raise UsageError(
            f"you may not write into the models directory {models_dir}",
            "ask its owner, or name one of your own: --models-dir PATH",
        )


_GGUF_NOTE = "gguf.json"


@dataclass(frozen=True)
class StagedGguf:
    """What a model is to be made of.

    Attributes:
        template: of prompts, in Ollama's language; None leaves the file's own.
    """

    digest: str
    template: str | None


def stage_gguf(
    models_dir: Path, name: ModelName, source: Path, template: str | None, on_bytes: OnBytes
) -> StagedGguf:
    """Copy a GGUF file into a model's staging folder.

    Raises:
        ModelError: it is no GGUF file of a whole model.
        StorageError: the models directory cannot be written.
    """
    header = read_gguf(source)
    _refuse_part(source, header)
    size = source.stat().st_size
    if header.data_start + header.data_size > size:
        raise ModelError(
            f"{source} is cut short: its header tells of {header.data_start + header.data_size} "
            f"bytes, it has {size}",
            "fetch it again",
        )
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
    """Let a file pass that holds a whole language model.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (``general.type``) and
    llama.cpp's ``tools/gguf-split``.
    """
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{source} is one of {parts} parts of a model, and Ollama takes whole ones only",
            "join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{source} is of the type {kind!r}, not a model that can run by itself",
            "name the model's own file; an adapter has to be merged with its model first "
            "(llama-export-lora)",
        )
    shape_of(header)


def read_staged_gguf(models_dir: Path, name: ModelName) -> StagedGguf:
    """Return what ``stage_gguf`` put there.

    Raises:
        ModelError: nothing was.
    """
    try:
        content = json.loads(
            (staged_folder(models_dir, name) / _GGUF_NOTE).read_text(encoding="utf-8")
        )
        return StagedGguf(str(content["digest"]), content["template"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"no GGUF file is staged for {name.served}: {error}",
            "aiflux models import --gguf FILE --name NAME",
        ) from error
