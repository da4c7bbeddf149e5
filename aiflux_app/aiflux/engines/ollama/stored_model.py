"""Figures of a model: from its own file if it is stored, else from the catalog."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiflux.engines.ollama.store import blob_path, read_manifest
from aiflux.errors import ModelError
from aiflux.models.catalog import Catalog, CatalogModel
from aiflux.models.figures import FILE_TYPES, Figures, figures_of
from aiflux.models.gguf import read_gguf
from aiflux.models.name import ModelName

_MODEL = "application/vnd.ollama.image.model"


_PROJECTOR = "application/vnd.ollama.image.projector"


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


def stored_figures(models_dir: Path, name: ModelName) -> Figures:
    """Return the figures of a stored model.

    Raises:
        ModelError: the model is not stored, or its file is not a complete GGUF file.
    """
    return stored_model(models_dir, name).figures


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


def readable_model(models_dir: Path, name: ModelName) -> StoredModel | None:
    """Return the same, or None if the model is not stored or its file is unreadable."""
    try:
        return stored_model(models_dir, name)
    except ModelError:
        return None
