"""The GGUF files of a model: those that Ollama pulled under its name, or one that a path names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiflux.engines.ollama.store import missing_parts, model_digest, refuse_other_digest
from aiflux.engines.ollama.stored_model import known_figures, model_files
from aiflux.errors import ConfigError, ModelError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures, figures_of
from aiflux.models.gguf import read_gguf
from aiflux.models.name import parse_model_name

_SUFFIX = ".gguf"


@dataclass(frozen=True)
class ModelFiles:
    """What the server loads.

    Attributes:
        model: the GGUF file.
        projector: a second one that reads images; None where there is none.
        digest: of the model, as Ollama lists it; None for a file that a path names.
    """

    model: Path
    projector: Path | None
    digest: str | None


def is_path(model: str) -> bool:
    """Tell whether a model is named by the path of its file."""
    return model.lower().endswith(_SUFFIX)


def absolute_name(model: str) -> str:
    """Return a model's name, with a path made absolute: a job runs in another directory.

    Raises:
        ConfigError: the server could not serve it under that name.
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
    """Return the names by which requests may call a model that is named by a path."""
    file = Path(path)
    return {path, file.name, file.stem}


def is_stored(models_dir: Path, model: str) -> bool:
    """Tell whether all files of a model are there."""
    if is_path(model):
        return Path(model).is_file()
    return not missing_parts(models_dir, parse_model_name(model))


def find_files(models_dir: Path, model: str) -> ModelFiles:
    """Return the files of a model.

    Raises:
        ModelError: they are not there, or llama.cpp cannot read them.
    """
    if is_path(model):
        return ModelFiles(Path(model), None, None)
    name = parse_model_name(model)
    models, projectors = model_files(models_dir, name)
    digest = model_digest(models_dir, name)
    return ModelFiles(models[0], projectors[0] if projectors else None, digest)


def refuse_model(models_dir: Path, model: str) -> None:
    """Refuse a model that is stored, and cannot be used.

    Raises:
        ModelError: it has another digest than its name insists on, or llama.cpp cannot read it.
    """
    if not is_path(model):
        name = parse_model_name(model)
        found = model_digest(models_dir, name)
        if found is not None:
            refuse_other_digest(name, found, str(models_dir))
    if not is_stored(models_dir, model):
        return
    header = read_gguf(find_files(models_dir, model).model)
    if header.number("vision.block_count") and header.size_of("v."):
        raise ModelError(
            f"llama.cpp cannot read {model}: Ollama stores the part of a {header.architecture} "
            "that reads images in the model's own file",
            "use --engine ollama, or a GGUF file of it with a separate mmproj file",
        )


def figures_of_model(
    models_dir: Path | None, model: str, catalog: Catalog | None
) -> Figures | None:
    """Return what the memory of a model depends on; None where it is unknown."""
    if not is_path(model):
        return known_figures(models_dir, parse_model_name(model), catalog)
    try:
        return figures_of(read_gguf(Path(model)))
    except ModelError:
        return None
