"""A GGUF file on its way to become a model: copied into the staging folder under its digest.

Ollama then makes the model of it, in the image or here; ``gguf.json`` tells it of what.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from aiflux.errors import ModelError
from aiflux.models.figures import shape_of
from aiflux.models.gguf import GgufHeader, read_gguf
from aiflux.models.integrity import OnBytes, digest_of
from aiflux.models.name import ModelName
from aiflux.models.staging import begin_staging, staged_folder
from aiflux.models.store import blob_path
from aiflux.util.files import storage_error, write_json

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
        ModelError: it is no GGUF file of a whole model.
        StorageError: the models directory cannot be written.
    """
    header = read_gguf(source)
    _refuse_part(source, header)
    size = source.stat().st_size
    if header.data_start + header.data_size > size:
        raise ModelError(
            f"{source} is cut short: its header tells of {header.data_start + header.data_size} "
            f"bytes, it has {size}",
            "fetch it again",
        )
    folder = begin_staging(models_dir, name, "import")
    try:
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


def _refuse_part(source: Path, header: GgufHeader) -> None:
    """Let a file pass that holds a whole language model.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (``general.type``) and
    llama.cpp's ``tools/gguf-split``.
    """
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{source} is one of {parts} parts of a model, and Ollama takes whole ones only",
            "join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{source} is of the type {kind!r}, not a model that can run by itself",
            "name the model's own file; an adapter has to be merged with its model first "
            "(llama-export-lora)",
        )
    shape_of(header)


def read_staged_gguf(models_dir: Path, name: ModelName) -> StagedGguf:
    """Return what ``stage_gguf`` put there.

    Raises:
        ModelError: nothing was.
    """
    try:
        content = json.loads((staged_folder(models_dir, name) / _NOTE).read_text(encoding="utf-8"))
        return StagedGguf(str(content["digest"]), content["template"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"no GGUF file is staged for {name.served}: {error}",
            "aiflux models import --gguf FILE --name NAME",
        ) from error
