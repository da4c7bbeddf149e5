"""Pack one model into a tar file, to copy it to clusters without internet. Needs no Ollama.

Members, in this order: ``aiflux-model.json`` (version, name, digest of the manifest),
``manifest``, and the blobs as ``blobs/sha256-...``. Nothing is compressed, as weights do not
shrink. Every digest is verified on export and import. Models with a store of their own, such as
those of Hugging Face, describe their files in a manifest of the same form.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.bundle.installer import is_newer, json_object, open_archive, plain
from aiflux.engines.base import PackedModel
from aiflux.engines.kinds import storing_kind
from aiflux.engines.ollama.staging import begin_staging, changing, move_into_place
from aiflux.engines.ollama.store import (
    HashedReader,
    Manifest,
    OnBytes,
    blob_path,
    digest_of,
    parse_manifest,
    read_manifest,
    refuse_other_digest,
)
from aiflux.errors import ConfigError, ModelError
from aiflux.models.name import parse_model_name
from aiflux.util.files import atomic_write, named_file, storage_error
from aiflux.util.text import size_text

VERSION = 1
LABEL = "aiflux-model.json"
MANIFEST = "manifest"
_SMALL = 16 << 20
"""Maximum size of the label and the manifest in bytes."""


@dataclass(frozen=True)
class Archive:
    """Contents of an archive.

    Attributes:
        name: as commands take it.
        digest: what identifies the model, such as ``sha256:...`` or a commit.
        raw: the manifest's bytes, from which its digest is computed.
    """

    name: str
    digest: str
    manifest: Manifest
    raw: bytes


def pack_model(models_dir: Path, name: str) -> PackedModel:
    """Return a stored model for an archive or a bundle.

    Raises:
        ModelError: the model is missing, damaged, or has another digest than requested.
    """
    store = storing_kind(name).store
    if store is not None:
        return store.pack(models_dir, name)
    model = parse_model_name(name)
    manifest = read_manifest(models_dir, model)
    refuse_other_digest(model, manifest.digest, str(models_dir))
    blobs = {digest: blob_path(models_dir, digest) for digest in manifest.blobs}
    raw = (models_dir / model.manifest_path).read_bytes()
    return PackedModel(model.served, f"sha256:{manifest.digest}", raw, blobs)


def packed_size(packed: PackedModel) -> int:
    """Return the total bytes of a packed model's blobs."""
    return parse_manifest(packed.manifest).size


def export_model(packed: PackedModel, target: Path, on_bytes: OnBytes) -> None:
    """Write a model to a tar file, completely or not at all.

    Raises:
        ModelError: a file is missing or damaged.
        StorageError: the file cannot be written.
    """
    manifest = parse_manifest(packed.manifest)
    label = {"version": VERSION, "name": packed.name, "digest": f"sha256:{manifest.digest}"}
    with atomic_write(target) as file, tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, LABEL, json.dumps(label, indent=2).encode() + b"\n")
        _add(tar, MANIFEST, packed.manifest)
        for digest, size in manifest.blobs.items():
            _add_blob(tar, packed, digest, size, on_bytes)


def import_model(
    models_dir: Path, source: Path, *, say: Callable[[str], None], on_bytes: OnBytes
) -> Archive:
    """Add the model of an archive to a models directory once it is verified.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        ModelError: the file is not a model archive, is truncated, or was modified.
        StorageError: the models directory cannot be written.
    """
    with _opened(source) as tar:
        archive = _head(tar, source)
        with changing(models_dir, f"importing {archive.name}", say):
            folder = _begin(models_dir, archive)
            try:
                _refuse_full(models_dir, archive)
                _unpack(tar, source, archive, folder, on_bytes)
                _place(models_dir, source, archive, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return archive


def read_archive(source: Path) -> Archive:
    """Read an archive's table of contents.

    Raises:
        ModelError: the file is not a model archive.
    """
    with _opened(source) as tar:
        return _head(tar, source)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(_member(name, len(content)), io.BytesIO(content))


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _add_blob(
    tar: tarfile.TarFile, packed: PackedModel, digest: str, size: int, on_bytes: OnBytes
) -> None:
    try:
        with open(packed.blobs[digest], "rb") as file:
            hashing: Any = HashedReader(file, on_bytes)
            tar.addfile(_member(_blob_member(digest), size), hashing)
            whole = hashing.digest == digest and not file.read(1)
    except FileNotFoundError:
        whole = False
    except OSError as error:
        if error.errno is not None:
            raise
        whole = False  # raised by tarfile: "unexpected end of data"
    if not whole:
        raise ModelError(
            f"the blob {digest[:19]}... of {packed.name} is missing or damaged; nothing was "
            "exported",
            f"for details: aiflux models verify {packed.name}; to pull it again: aiflux models "
            f"pull --again {packed.name}",
        )


def _blob_member(digest: str) -> str:
    return f"blobs/{digest.replace(':', '-')}"


@contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    named_file(source, "use a file written by aiflux models export")
    try:
        with open(source, "rb", 0) as file, open_archive(file) as tar:
            yield tar
    except tarfile.TarError as error:
        raise _broken(source, str(error)) from error


def _broken(source: Path, what: str) -> ModelError:
    return ModelError(
        f"{source} is not a complete model archive: {what}",
        "create it again where the model is (aiflux models export MODEL FILE), and compare the "
        "file sizes",
    )


def _newer(source: Path, version: int) -> ModelError:
    return ModelError(
        f"{source} has version {version} of the format of model archives ({LABEL}), and this "
        f"AI-Flux reads version {VERSION}; nothing was imported",
        "update AI-Flux, or export the model again with this version of it",
    )


def _head(tar: tarfile.TarFile, source: Path) -> Archive:
    try:
        label = json_object(_small(tar, LABEL), LABEL)
        if is_newer(label, VERSION):
            raise _newer(source, label["version"])
        if type(label.get("version")) is not int or label["version"] != VERSION:
            raise ValueError(f"{LABEL} has no valid version")
        if not isinstance(label.get("name"), str):
            raise ValueError(f"{LABEL} names no model")
        raw = _small(tar, MANIFEST)
        manifest = parse_manifest(raw)
        name, digest = _identity(label["name"], manifest, raw)
    except ValueError as error:
        raise _broken(source, str(error)) from error
    except ConfigError as error:
        raise _broken(source, error.message) from error
    if f"sha256:{manifest.digest}" != label.get("digest"):
        raise _broken(source, "its manifest was modified")
    return Archive(name, digest, manifest, raw)


def _identity(named: str, manifest: Manifest, raw: bytes) -> tuple[str, str]:
    """Return the name and the digest of the model in an archive.

    Raises:
        ConfigError: it is not the name of a model.
        ValueError: the manifest is not valid, or is that of another model.
    """
    store = storing_kind(named).store
    if store is not None:
        return named, store.packed_digest(named, raw)
    return parse_model_name(named).served, f"sha256:{manifest.digest}"


def _begin(models_dir: Path, archive: Archive) -> Path:
    """Create the directory where the model is assembled."""
    store = storing_kind(archive.name).store
    if store is None:
        return begin_staging(models_dir, parse_model_name(archive.name), "import")
    folder = store.arrival_folder(models_dir, archive.raw)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "blobs").mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    return folder


def _place(models_dir: Path, source: Path, archive: Archive, folder: Path) -> None:
    """Move a model that is unpacked and verified into place."""
    store = storing_kind(archive.name).store
    try:
        if store is None:
            name = parse_model_name(archive.name)
            manifest = folder / name.manifest_path
            manifest.parent.mkdir(parents=True)
            manifest.write_bytes(archive.raw)
            move_into_place(folder, models_dir, name)
        else:
            store.place(models_dir, archive.raw, folder)
    except ModelError as error:
        raise _broken(source, error.message) from error
    except OSError as error:
        raise storage_error(error, models_dir) from error


def _small(tar: tarfile.TarFile, wanted: str) -> bytes:
    member = tar.next()
    if member is None or member.name != wanted or not plain(member) or member.size > _SMALL:
        raise ValueError(f"{wanted} is not at the expected position")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _refuse_full(models_dir: Path, archive: Archive) -> None:
    free = shutil.disk_usage(models_dir).free
    if free < archive.manifest.size:
        error = OSError(
            28,
            f"{size_text(free)} are free, but {archive.name} needs "
            f"{size_text(archive.manifest.size)}",
        )
        raise storage_error(error, models_dir)


def _unpack(
    tar: tarfile.TarFile, source: Path, archive: Archive, folder: Path, on_bytes: OnBytes
) -> None:
    wanted = {_blob_member(digest): digest for digest in archive.manifest.blobs}
    try:
        while (member := tar.next()) is not None:
            digest = wanted.pop(member.name, None)
            content = tar.extractfile(member) if digest and plain(member) else None
            if digest is None or content is None:
                raise _broken(source, f"{member.name!r} is unexpected")
            if member.size != archive.manifest.blobs[digest]:
                raise _broken(source, f"{member.name} does not have the size given in the manifest")
            with open(blob_path(folder, digest), "xb") as file:
                if digest_of(content, on_bytes, file) != digest:
                    raise _broken(source, f"{member.name} was modified or truncated")
                file.flush()
                os.fsync(file.fileno())
        if wanted:
            raise _broken(source, f"{', '.join(wanted)} is missing")
    except OSError as error:
        if error.errno is None:  # raised by tarfile: "unexpected end of data"
            raise _broken(source, str(error)) from error
        raise storage_error(error, folder) from error
