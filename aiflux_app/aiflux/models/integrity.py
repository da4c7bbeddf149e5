"""Whether a model on the disk is what its digests say: every blob is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from aiflux.errors import ModelError
from aiflux.models.name import ModelName
from aiflux.models.store import Layer, Manifest, blob_path
from aiflux.util.files import storage_error

CHUNK = 4 << 20
_BLOB = re.compile(r"sha256-[0-9a-f]{64}\Z")
State = Literal["ok", "missing", "wrong size", "corrupted", "unreadable"]
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class BlobCheck:
    """What was found of one blob."""

    layer: Layer
    state: State


def check_blobs(models_dir: Path, manifest: Manifest, on_bytes: OnBytes) -> Iterator[BlobCheck]:
    """Read every blob of a model and yield what was found.

    Args:
        on_bytes: told how many bytes were read since it was last told.
    """
    for layer in {layer.digest: layer for layer in manifest.layers}.values():
        yield BlobCheck(layer, _state(blob_path(models_dir, layer.digest), layer, on_bytes))


def refuse_damaged(name: ModelName, models_dir: Path, verdicts: list[BlobCheck]) -> None:
    """Let a model pass that is whole.

    Raises:
        ModelError: naming what is wrong with which blobs.
    """
    bad = [verdict for verdict in verdicts if verdict.state != "ok"]
    if bad:
        named = ", ".join(f"{each.layer.digest[:19]}... is {each.state}" for each in bad)
        raise ModelError(
            f"{name.served} in {models_dir} is damaged: {named}",
            f"pull it anew: aiflux models pull --again {name.served}",
        )


def remove_damaged(models_dir: Path) -> int:
    """Remove the blobs whose bytes are not what their names say; return how many these were.

    Raises:
        StorageError: one cannot be read or removed.
    """
    removed = 0
    for path in sorted((models_dir / "blobs").glob("sha256-*")):
        if not _BLOB.match(path.name):
            continue
        try:
            with open(path, "rb") as file:
                whole = digest_of(file, lambda _: None) == path.name.replace("-", ":")
            if not whole:
                path.unlink()
                removed += 1
        except OSError as error:
            raise storage_error(error, path) from error
    return removed


def digest_of(file: IO[bytes], on_bytes: OnBytes, into: IO[bytes] | None = None) -> str:
    """Return a file's digest (``sha256:...``); ``into`` gets a copy of what is read."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        if into is not None:
            into.write(chunk)
        on_bytes(len(chunk))
    return "sha256:" + digest.hexdigest()


class HashedReader:
    """A file that is hashed as somebody else (tarfile, say) reads it."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file, self._on_bytes, self._digest = file, on_bytes, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        """Read as files do."""
        chunk = self._file.read(count)
        self._digest.update(chunk)
        self._on_bytes(len(chunk))
        return chunk

    @property
    def digest(self) -> str:
        """The digest (``sha256:...``) of what was read so far."""
        return "sha256:" + self._digest.hexdigest()


def _state(path: Path, layer: Layer, on_bytes: OnBytes) -> State:
    try:
        if path.stat().st_size != layer.size:
            return "wrong size"
        with open(path, "rb") as file:
            return "ok" if digest_of(file, on_bytes) == layer.digest else "corrupted"
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"
