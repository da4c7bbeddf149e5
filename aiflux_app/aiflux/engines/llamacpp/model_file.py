"""The GGUF files of a model: pulled by Ollama under its name, or named by a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiflux.engines.ollama.store import (
    known_figures,
    missing_parts,
    model_digest,
    model_files,
    refuse_other_digest,
)
from aiflux.errors import ConfigError, ModelError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures, figures_of
from aiflux.models.gguf import read_gguf, refuse_truncated
from aiflux.models.name import parse_model_name

_SUFFIX = ".gguf"


@dataclass(frozen=True)
class ModelFiles:
    """The files that the server loads.

    Attributes:
        model: the GGUF file.
        projector: a second file that processes images, or None.
        digest: the model's digest as listed by Ollama; None for a file named by a path.
    """

    model: Path
    projector: Path | None
    digest: str | None


def is_path(model: str) -> bool:
    """Return whether a model is named by the path of its file."""
    return model.lower().endswith(_SUFFIX)


def absolute_name(model: str) -> str:
    """Return a model's name, with an absolute path, because a job runs in another directory.

    Raises:
        ConfigError: the server cannot serve the model under this name.
    """
    if not is_path(model):
        return model
    path = str(Path(model).expanduser().absolute())
    if "," in path or not path.isprintable():
        raise ConfigError(
            f"llama.cpp cannot serve a model of the path {path!r}",
            "rename the file, without a comma and control characters",
        )
    return path


def model_names(path: str) -> set[str]:
    """Return the names that requests can use for a model named by a path."""
    file = Path(path)
    return {path, file.name, file.stem}


def is_stored(models_dir: Path, model: str) -> bool:
    """Return whether all files of a model exist."""
    if is_path(model):
        return Path(model).is_file()
    return not missing_parts(models_dir, parse_model_name(model))


def find_files(models_dir: Path, model: str) -> ModelFiles:
    """Return the files of a model.

    Raises:
        ModelError: they do not exist, or llama.cpp cannot read them.
    """
    if is_path(model):
        return ModelFiles(Path(model), None, None)
    name = parse_model_name(model)
    models, projectors = model_files(models_dir, name)
    digest = model_digest(models_dir, name)
    return ModelFiles(models[0], projectors[0] if projectors else None, digest)


def refuse_model(models_dir: Path, model: str) -> None:
    """Reject a stored model that cannot be used.

    Raises:
        ModelError: its digest differs from the required one, or llama.cpp cannot read it.
    """
    if not is_path(model):
        name = parse_model_name(model)
        found = model_digest(models_dir, name)
        if found is not None:
            refuse_other_digest(name, found, str(models_dir))
    if not is_stored(models_dir, model):
        return
    file = find_files(models_dir, model).model
    header = read_gguf(file)
    refuse_truncated(file, header)
    if header.number("vision.block_count") and header.size_of("v."):
        raise ModelError(
            f"llama.cpp cannot read {model}: Ollama stores the part of a {header.architecture} "
            "that processes images in the model's own file",
            "use --engine ollama, or a GGUF file of it with a separate mmproj file",
        )


def figures_of_model(
    models_dir: Path | None, model: str, catalog: Catalog | None
) -> Figures | None:
    """Return the figures that determine a model's memory, or None if unknown."""
    if not is_path(model):
        return known_figures(models_dir, parse_model_name(model), catalog)
    try:
        return figures_of(read_gguf(Path(model)))
    except ModelError:
        return None
