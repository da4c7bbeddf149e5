"""A models directory, looked at: which models are in it, and what is missing of one.

The layout is Ollama's: ``manifests/HOST/NAMESPACE/MODEL/TAG`` names blobs, ``blobs/sha256-...``.
A model's digest, as Ollama lists it, is the SHA-256 of its manifest file.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from aiflux.errors import ModelError
from aiflux.models.name import ModelName

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
