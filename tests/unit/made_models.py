"""Create small models in a models directory, with correct digests, and change their archives."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from aiflux.models.name import ModelName, parse_model_name

CONFIG = b'{"model_format": "gguf"}'
KIND = "application/vnd.ollama.image."


def put_blob(models: Path, content: bytes) -> tuple[str, int]:
    """Write a blob; return its digest and size."""
    digest = hashlib.sha256(content).hexdigest()
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    (models / "blobs" / f"sha256-{digest}").write_bytes(content)
    return f"sha256:{digest}", len(content)


def put_model(models: Path, name: str, *blobs: bytes) -> ModelName:
    """Write a model with these blobs."""
    parsed = parse_model_name(name)
    kinds = [KIND + kind for kind in ("model", "license", "template", "params")]
    layers = [
        {"mediaType": kind, "digest": digest, "size": size}
        for kind, (digest, size) in zip(
            kinds, (put_blob(models, blob) for blob in blobs), strict=False
        )
    ]
    digest, size = put_blob(models, CONFIG)
    config = {"mediaType": "application/json", "digest": digest, "size": size}
    path = models / parsed.manifest_path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}))
    return parsed


def blob_files(models: Path) -> list[Path]:
    """Return the blobs of a models directory."""
    return sorted((models / "blobs").iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def changed_tar(source: Path, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    """Rewrite an archive after a change of its members: their names and contents."""
    with tarfile.open(source) as tar:
        members = [(each.name, tar.extractfile(each)) for each in tar]
        parts = [(name, file.read()) for name, file in members if file]
    change(parts)
    with tarfile.open(source, "w") as tar:
        for name, content in parts:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
