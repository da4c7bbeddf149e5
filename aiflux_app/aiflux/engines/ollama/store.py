"""Read a models directory: its models, missing parts, the state of blobs, and figures of models.

The layout is Ollama's: ``manifests/HOST/NAMESPACE/MODEL/TAG`` names blobs in ``blobs/sha256-...``.
A model's digest, as Ollama lists it, is the SHA-256 of its manifest file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from aiflux.errors import ModelError
from aiflux.models.catalog import Catalog, CatalogModel
from aiflux.models.figures import FILE_TYPES, Figures, figures_of
from aiflux.models.gguf import read_gguf
from aiflux.models.name import ModelName
from aiflux.models.tokenizer import ModelTokenizer, gguf_tokenizer
from aiflux.util.files import storage_error
from aiflux.util.text import error_text

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MODEL = "application/vnd.ollama.image.model"
PARAMETERS = "application/vnd.ollama.image.params"


_PROJECTOR = "application/vnd.ollama.image.projector"


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
    """A parsed manifest.

    Attributes:
        digest: the model's digest: 64 hexadecimal digits, computed from the manifest file.
        layers: the configuration comes first.
        raw: the file.
    """

    digest: str
    layers: tuple[Layer, ...]
    raw: bytes = field(repr=False)

    @property
    def blobs(self) -> dict[str, int]:
        """Sizes by digest; duplicates count once."""
        return {layer.digest: layer.size for layer in self.layers}

    @property
    def size(self) -> int:
        """Total bytes of all blobs."""
        return sum(self.blobs.values())


def parse_manifest(raw: bytes) -> Manifest:
    """Parse a manifest.

    Raises:
        ValueError: the bytes are not a manifest.
    """
    try:
        content = json.loads(raw)
        layers = tuple(
            Layer(str(item.get("mediaType", "")), str(item["digest"]), item["size"])
            for item in [content["config"], *(content["layers"] or [])]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a manifest: {error_text(error)}") from None
    for layer in layers:
        if not _DIGEST.match(layer.digest):
            raise ValueError(f"{layer.digest!r} is not a digest")
        if type(layer.size) is not int or not 0 <= layer.size < 1 << 60:
            raise ValueError(f"{layer.size!r} is not a size")
    return Manifest(hashlib.sha256(raw).hexdigest(), layers, raw)


def read_manifest(models_dir: Path, name: ModelName) -> Manifest:
    """Return a model's manifest.

    Raises:
        ModelError: the model does not exist, or the manifest cannot be read.
    """
    path = models_dir / name.manifest_path
    try:
        return parse_manifest(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{name.served} is not in {models_dir}",
            f"see aiflux models list; to pull it: aiflux models pull {name.served}",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the manifest {path} cannot be read: {error_text(error)}",
            f"pull the model again: aiflux models pull {name.served}",
        ) from None


def model_digest(models_dir: Path, name: ModelName) -> str | None:
    """Return the digest of a stored model, or None."""
    try:
        return read_manifest(models_dir, name).digest
    except ModelError:
        return None


def refuse_other_digest(name: ModelName, found: str, place: str) -> None:
    """Raise an error if a model has another digest than its name requires.

    Args:
        found: the digest of the stored model.
        place: its location, for the message.

    Raises:
        ModelError: the digests differ; names both.
    """
    if not found.startswith(name.digest):
        raise ModelError(
            f"{name.served} in {place} has the digest sha256:{found}, but sha256:{name.digest} "
            "is required",
            "pull the model again if its tag was moved, use a models directory with the required "
            "model, or remove the digest from the name",
        )


def blob_path(models_dir: Path, digest: str) -> Path:
    """Return the path of a blob."""
    return models_dir / "blobs" / digest.replace(":", "-")


def missing_parts(models_dir: Path, name: ModelName) -> list[str]:
    """Return the missing parts of a stored model; empty if it is complete.

    All blobs named in the manifest must exist with their sizes; digests are not computed.
    """
    try:
        manifest = parse_manifest((models_dir / name.manifest_path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ["manifest"]
    except (OSError, ValueError) as error:
        return [f"manifest (unreadable: {error_text(error)})"]
    return [digest for digest, size in manifest.blobs.items() if _size(models_dir, digest) != size]


def listed_models(models_dir: Path) -> list[ModelName]:
    """Return the models with a manifest in a models directory, sorted by name."""
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
    """State of one blob."""

    layer: Layer
    state: State


def check_blobs(models_dir: Path, manifest: Manifest, on_bytes: OnBytes) -> Iterator[BlobCheck]:
    """Read all blobs of a model and yield their states.

    Args:
        on_bytes: called with the number of bytes read since the last call.
    """
    for layer in {layer.digest: layer for layer in manifest.layers}.values():
        yield BlobCheck(layer, _state(blob_path(models_dir, layer.digest), layer, on_bytes))


def refuse_damaged(name: ModelName, models_dir: Path, verdicts: list[BlobCheck]) -> None:
    """Raise an error if a model is damaged.

    Raises:
        ModelError: names the damaged blobs and their state.
    """
    bad = [verdict for verdict in verdicts if verdict.state != "ok"]
    if bad:
        named = ", ".join(f"{each.layer.digest[:19]}... is {each.state}" for each in bad)
        raise ModelError(
            f"{name.served} in {models_dir} is damaged: {named}",
            f"pull it again: aiflux models pull --again {name.served}",
        )


def remove_damaged(models_dir: Path) -> int:
    """Remove blobs that do not match their digest; return their number.

    Raises:
        StorageError: a blob cannot be read or removed.
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
    """Return a file's digest (``sha256:...``); ``into`` receives a copy."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        if into is not None:
            into.write(chunk)
        on_bytes(len(chunk))
    return "sha256:" + digest.hexdigest()


class HashedReader:
    """A file that is hashed while it is read, for example by tarfile."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file, self._on_bytes, self._digest = file, on_bytes, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        """Read like a file."""
        chunk = self._file.read(count)
        self._digest.update(chunk)
        self._on_bytes(len(chunk))
        return chunk

    @property
    def digest(self) -> str:
        """The digest (``sha256:...``) of the data read so far."""
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


def known_figures(
    models_dir: Path | None, name: ModelName, catalog: Catalog | None
) -> Figures | None:
    """Return a model's figures from its file or the catalog, or None."""
    stored = None if models_dir is None else readable_model(models_dir, name)
    return best_figures(stored, catalog.find(name.served) if catalog else None)


def best_figures(stored: StoredModel | None, catalog_model: CatalogModel | None) -> Figures | None:
    """Return a model's figures: from its own file, else from the catalog."""
    if stored is not None:
        return stored.figures
    return catalog_model.figures if catalog_model else None


@dataclass(frozen=True)
class StoredModel:
    """Figures from a model's own file.

    Attributes:
        parameters: number of parameters.
        quantisation: for example ``Q4_K_M``; "" if unknown.
    """

    figures: Figures
    parameters: int
    quantisation: str


def stored_model(models_dir: Path, name: ModelName) -> StoredModel:
    """Read the file of a stored model.

    Raises:
        ModelError: the model is not stored, or its file is not a complete GGUF file.
    """
    models, projectors = model_files(models_dir, name)
    header = read_gguf(models[0])
    projector = sum(read_gguf(path).data_size for path in projectors)
    kind = header.metadata.get("general.file_type")
    quantisation = FILE_TYPES.get(kind, "") if isinstance(kind, int) else ""
    return StoredModel(figures_of(header, projector), header.parameters, quantisation)


def model_files(models_dir: Path, name: ModelName) -> tuple[list[Path], list[Path]]:
    """Return the GGUF files of a model (at least one), and those of its projector.

    Raises:
        ModelError: the model is not stored, or has no GGUF file.
    """
    files: dict[str, list[Path]] = {_MODEL: [], _PROJECTOR: []}
    for layer in read_manifest(models_dir, name).layers:
        if layer.kind in files:
            files[layer.kind].append(blob_path(models_dir, layer.digest))
    if not files[_MODEL]:
        raise ModelError(f"{name.served} has no GGUF file", "pull it again")
    return files[_MODEL], files[_PROJECTOR]


def own_context(models_dir: Path | None, name: ModelName) -> int:
    """Return the context that a model itself sets (``PARAMETER num_ctx``); 0 for none."""
    try:
        layers = read_manifest(models_dir, name).layers if models_dir else ()
        blobs = [
            blob_path(models_dir, layer.digest)
            for layer in layers
            if models_dir and layer.kind == PARAMETERS
        ]
        values = [json.loads(path.read_bytes()).get("num_ctx") for path in blobs]
    except (ModelError, OSError, ValueError, AttributeError, RecursionError):
        return 0  # the engine reports a damaged model
    return next((value for value in values if type(value) is int and value > 0), 0)


def stored_tokenizer(
    models_dir: Path | None, name: ModelName, *, templated: bool
) -> ModelTokenizer:
    """Return the tokenizer of a stored model; see ``gguf_tokenizer``.

    Raises:
        ModelError: the model is not stored, or its tokenizer is not known.
        ConfigError: the library is not installed.
    """
    if models_dir is None:
        raise ModelError("no models directory is named", "name one: --models-dir PATH")
    return gguf_tokenizer(model_files(models_dir, name)[0][0], templated=templated)


def readable_model(models_dir: Path, name: ModelName) -> StoredModel | None:
    """Return the same, or None if the model is not stored or its file is unreadable."""
    try:
        return stored_model(models_dir, name)
    except ModelError:
        return None
