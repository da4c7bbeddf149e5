"""A GGUF file on its way to become a model: copied into the staging folder under its digest.

Ollama then makes the model of it, in the image or here; ``gguf.json`` tells it of what.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from aiflux.core.files import storage_error, write_json
from aiflux.core.gguf import read_gguf
from aiflux.core.modelcheck import OnBytes, digest_of
from aiflux.core.modelname import ModelName
from aiflux.core.modelstore import blob_path
from aiflux.core.staging import staged_folder
from aiflux.errors import ModelError

_NOTE = "gguf.json"


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
        ModelError: it is no GGUF file.
        StorageError: the models directory cannot be written.
    """
    header = read_gguf(source)
    size = source.stat().st_size
    if header.data_start + header.data_size > size:
        raise ModelError(
            f"{source} is cut short: its header tells of {header.data_start + header.data_size} "
            f"bytes, it has {size}",
            "fetch it again",
        )
    folder = staged_folder(models_dir, name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / "blobs").mkdir(parents=True)
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
    write_json(folder / _NOTE, asdict(staged))
    return staged


def read_staged_gguf(models_dir: Path, name: ModelName) -> StagedGguf:
    """Return what ``stage_gguf`` put there.

    Raises:
        ModelError: nothing was.
    """
    try:
        content = json.loads((staged_folder(models_dir, name) / _NOTE).read_text(encoding="utf-8"))
        return StagedGguf(str(content["digest"]), content["template"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no GGUF file is staged for {name.served}: {error}",
            "aiflux models import --gguf FILE --name NAME",
        ) from error
