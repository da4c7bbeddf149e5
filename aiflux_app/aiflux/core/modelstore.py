"""A models directory, looked at: which models are in it, and what is missing of one.

The layout is Ollama's: ``manifests/HOST/NAMESPACE/MODEL/TAG`` names blobs, ``blobs/sha256-...``.
"""

from __future__ import annotations

import json
from pathlib import Path

from aiflux.core.modelname import ModelName


def missing_parts(models_dir: Path, name: ModelName) -> list[str]:
    """Return what is missing of a model in a models directory; empty when it is whole.

    Every blob that the manifest names is there with its size (digests are not computed).
    """
    manifest = models_dir / name.manifest_path
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        layers = [content["config"], *content["layers"]]
        wanted = {layer["digest"]: int(layer["size"]) for layer in layers}
    except FileNotFoundError:
        return ["manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"manifest (unreadable: {error})"]
    return [digest for digest, size in wanted.items() if _size(models_dir, digest) != size]


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
        return (models_dir / "blobs" / digest.replace(":", "-")).stat().st_size
    except OSError:
        return None
