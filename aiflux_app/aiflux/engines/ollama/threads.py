"""A view of a models directory in which a model has a number of threads.

Ollama has no variable for it, only the parameter ``num_thread`` of a model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from aiflux.engines.ollama.store import PARAMETERS, blob_path, read_manifest
from aiflux.errors import ModelError
from aiflux.models.name import ModelName
from aiflux.util.files import storage_error
from aiflux.util.text import error_text


def store_with_threads(models_dir: Path, name: ModelName, threads: int, folder: Path) -> str:
    """Write a models directory with one model, whose large files are links.

    Args:
        threads: used unless the model sets ``num_thread`` itself.
        folder: where it is written; replaced if it exists.

    Returns:
        the digest of the model that it was made from.

    Raises:
        ModelError: the model is not stored, or its manifest or parameters cannot be read.
        StorageError: the folder cannot be written.
    """
    stored = read_manifest(models_dir, name)
    parameters: dict[str, Any] = {"num_thread": threads}
    try:
        for each in stored.layers:
            if each.kind == PARAMETERS:
                parameters |= json.loads(blob_path(models_dir, each.digest).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"the parameters of {name.served} cannot be read: {error_text(error)}",
            f"pull it again: aiflux models pull --again {name.served}",
        ) from None
    content = json.dumps(parameters).encode()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    manifest = json.loads(stored.raw)
    others = [each for each in manifest["layers"] or [] if each.get("mediaType") != PARAMETERS]
    layer = {"mediaType": PARAMETERS, "digest": digest, "size": len(content)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "blobs").mkdir(parents=True)
        for blob in stored.blobs:
            blob_path(folder, blob).symlink_to(blob_path(models_dir, blob))
        blob_path(folder, digest).unlink(missing_ok=True)
        blob_path(folder, digest).write_bytes(content)
        path = folder / name.manifest_path
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**manifest, "layers": [*others, layer]}), encoding="utf-8")
    except OSError as error:
        raise storage_error(error, folder) from error
    return stored.digest
