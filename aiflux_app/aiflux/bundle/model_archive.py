"""Pack one model into a tar file, to copy it to clusters without internet. Needs no Ollama.

Members, in this order: ``aiflux-model.json`` (version, name, digest), ``manifest``, and the blobs
as ``blobs/sha256-...``. Nothing is compressed, as weights do not shrink. Every digest is verified
on export and import.
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

from aiflux.bundle.installer import open_archive, plain
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
from aiflux.models.name import ModelName, parse_model_name
from aiflux.util.files import atomic_write, storage_error
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
        raw: the manifest's bytes, from which its digest is computed.
    """

    name: ModelName
    manifest: Manifest
    raw: bytes


def export_model(models_dir: Path, name: ModelName, target: Path, on_bytes: OnBytes) -> Manifest:
    """Write a model to a tar file, completely or not at all.

    Raises:
        ModelError: the model is missing, damaged, or has another digest than requested.
        StorageError: the file cannot be written.
    """
    manifest = read_manifest(models_dir, name)
    refuse_other_digest(name, manifest.digest, str(models_dir))
    label = {"version": VERSION, "name": name.served, "digest": f"sha256:{manifest.digest}"}
    with atomic_write(target) as file, tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, LABEL, json.dumps(label, indent=2).encode() + b"\n")
        _add(tar, MANIFEST, (models_dir / name.manifest_path).read_bytes())
        for digest, size in manifest.blobs.items():
            _add_blob(tar, models_dir, name, digest, size, on_bytes)
    return manifest


def import_model(
    models_dir: Path, source: Path, *, say: Callable[[str], None], on_bytes: OnBytes
) -> Archive:
    """Add the model of an archive to a models directory once it is verified.

    Raises:
        ModelError: the file is not a model archive, is truncated, or was modified.
        StorageError: the models directory cannot be written.
    """
    with _opened(source) as tar:
        archive = _head(tar, source)
        with changing(models_dir, f"importing {archive.name.served}", say):
            folder = begin_staging(models_dir, archive.name, "import")
            try:
                _refuse_full(models_dir, archive)
                _unpack(tar, source, archive, folder, on_bytes)
                move_into_place(folder, models_dir, archive.name)
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
    tar: tarfile.TarFile,
    models_dir: Path,
    name: ModelName,
    digest: str,
    size: int,
    on_bytes: OnBytes,
) -> None:
    path = blob_path(models_dir, digest)
    try:
        with open(path, "rb") as file:
            hashing: Any = HashedReader(file, on_bytes)
            tar.addfile(_member(f"blobs/{path.name}", size), hashing)
            whole = hashing.digest == digest and not file.read(1)
    except FileNotFoundError:
        whole = False
    except OSError as error:
        if error.errno is not None:
            raise
        whole = False  # raised by tarfile: "unexpected end of data"
    if not whole:
        raise ModelError(
            f"the blob {digest[:19]}... of {name.served} is missing or damaged; nothing was "
            "exported",
            f"for details: aiflux models verify {name.served}; to pull it again: aiflux models "
            f"pull --again {name.served}",
        )


@contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    if source.exists() and not source.is_file():
        raise ModelError(
            f"{source} is not a regular file", "use a file written by aiflux models export"
        )
    try:
        with open(source, "rb", 0) as file, open_archive(file) as tar:
            yield tar
    except tarfile.TarError as error:
        raise _broken(source, str(error)) from error
    except FileNotFoundError as error:
        raise ModelError(f"file not found: {source}", "check the path") from error
    except PermissionError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror}", "ask its owner") from error


def _broken(source: Path, what: str) -> ModelError:
    return ModelError(
        f"{source} is not a complete model archive: {what}",
        "create it again where the model is (aiflux models export NAME:TAG FILE), and compare the "
        "file sizes",
    )


def _head(tar: tarfile.TarFile, source: Path) -> Archive:
    try:
        label = json.loads(_small(tar, LABEL))
        if label["version"] != VERSION:
            raise ValueError(f"its version is {label['version']}, but AI-Flux reads {VERSION}")
        if not isinstance(label["name"], str):
            raise ValueError(f"{LABEL} names no model")
        name = parse_model_name(label["name"])
        raw = _small(tar, MANIFEST)
        manifest = parse_manifest(raw)
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise _broken(source, str(error)) from error
    if f"sha256:{manifest.digest}" != label.get("digest"):
        raise _broken(source, "its manifest was modified")
    return Archive(name, manifest, raw)


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
            f"{size_text(free)} are free, but {archive.name.served} needs "
            f"{size_text(archive.manifest.size)}",
        )
        raise storage_error(error, models_dir)


def _unpack(
    tar: tarfile.TarFile, source: Path, archive: Archive, folder: Path, on_bytes: OnBytes
) -> None:
    wanted = {f"blobs/{digest.replace(':', '-')}": digest for digest in archive.manifest.blobs}
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
        manifest = folder / archive.name.manifest_path
        manifest.parent.mkdir(parents=True)
        manifest.write_bytes(archive.raw)
    except OSError as error:
        if error.errno is None:  # raised by tarfile: "unexpected end of data"
            raise _broken(source, str(error)) from error
        raise storage_error(error, folder) from error
