"""Read a models directory: which models it holds, what is missing, and whether blobs are intact.

The layout is Ollama's: ``manifests/HOST/NAMESPACE/MODEL/TAG`` names blobs, ``blobs/sha256-...``.
A model's digest, as Ollama lists it, is the SHA-256 of its manifest file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from aiflux.errors import ModelError
from aiflux.models.name import ModelName
from aiflux.util.files import storage_error

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Layer:
    """One blob of a model.

    Attributes:
        kind: media type, such as ``application/vnd.ollama.image.model``.
        digest: ``sha256:`` and 64 hexadecimal digits.
    """

    kind: str
    digest: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        digest: of the manifest file itself: 64 hexadecimal digits, the model's digest.
        layers: its configuration first.
    """

    digest: str
    layers: tuple[Layer, ...]

    @property
    def blobs(self) -> dict[str, int]:
        """Sizes by digest; a blob that stands twice is one."""
        return {layer.digest: layer.size for layer in self.layers}

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(self.blobs.values())


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest's bytes.

    Raises:
        ValueError: they are no manifest.
    """
    try:
        content = json.loads(raw)
        layers = tuple(
            Layer(str(item.get("mediaType", "")), str(item["digest"]), item["size"])
            for item in [content["config"], *(content["layers"] or [])]
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it lacks {error}") from None
    for layer in layers:
        if not _DIGEST.match(layer.digest):
            raise ValueError(f"{layer.digest!r} is no digest")
        if type(layer.size) is not int or not 0 <= layer.size < 1 << 60:
            raise ValueError(f"{layer.size!r} is no size")
    return Manifest(hashlib.sha256(raw).hexdigest(), layers)


def read_manifest(models_dir: Path, name: ModelName) -> Manifest:
    """Return a model's manifest.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = models_dir / name.manifest_path
    try:
        return parse_manifest(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{name.served} is not in {models_dir}",
            f"aiflux models list shows what is; pull it: aiflux models pull {name.served}",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the manifest {path} cannot be read: {error}",
            f"pull the model again: aiflux models pull {name.served}",
        ) from None


def model_digest(models_dir: Path, name: ModelName) -> str | None:
    """Return the digest of a model that is there; None where it is not."""
    try:
        return read_manifest(models_dir, name).digest
    except ModelError:
        return None


def refuse_other_digest(name: ModelName, found: str, place: str) -> None:
    """Let a model pass that is the one that was insisted on, or where none was.

    Args:
        found: the digest of the model that is there.
        place: where it is, for the message.

    Raises:
        ModelError: its digest is another; names both.
    """
    if not found.startswith(name.digest):
        raise ModelError(
            f"{name.served} in {place} has the digest sha256:{found}, and the name that was given "
            f"insists on sha256:{name.digest}",
            "pull the model again where its tag was moved, use a models directory that holds that "
            "model, or insist on no digest",
        )


def blob_path(models_dir: Path, digest: str) -> Path:
    """Return where a blob lies."""
    return models_dir / "blobs" / digest.replace(":", "-")


def missing_parts(models_dir: Path, name: ModelName) -> list[str]:
    """Return what is missing of a model in a models directory; empty when it is whole.

    Every blob that the manifest names is there with its size (digests are not computed).
    """
    try:
        manifest = parse_manifest((models_dir / name.manifest_path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ["manifest"]
    except (OSError, ValueError) as error:
        return [f"manifest (unreadable: {error})"]
    return [digest for digest, size in manifest.blobs.items() if _size(models_dir, digest) != size]


def listed_models(models_dir: Path) -> list[ModelName]:
    """Return the models that a models directory has manifests of, sorted by name."""
    manifests = models_dir / "manifests"
    found = [file.relative_to(manifests).parts for file in manifests.glob("*/*/*/*")]
    names = (
        ModelName(host, namespace, model, tag)
        for host, namespace, model, tag in found
        if not tag.startswith(".")
    )
    return sorted(names, key=lambda name: name.served)


def _size(models_dir: Path, digest: str) -> int | None:
    try:
        return blob_path(models_dir, digest).stat().st_size
    except OSError:
        return None


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
