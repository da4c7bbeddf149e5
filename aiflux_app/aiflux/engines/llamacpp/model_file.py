"""The GGUF files of a model: pulled by Ollama under its name, or named by a path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from aiflux.engines.ollama.store import (
    known_figures,
    missing_parts,
    model_digest,
    model_files,
    refuse_other_digest,
    stored_tokenizer,
)
from aiflux.errors import ConfigError, ModelError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures, figures_of
from aiflux.models.gguf import read_gguf, refuse_truncated
from aiflux.models.name import GGUF_SUFFIX, parse_model_name
from aiflux.models.name import is_path as is_named_path
from aiflux.models.tokenizer import ModelTokenizer, gguf_tokenizer
from aiflux.util.files import absolute

_CHECK = "check the path (--model)"


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
    return model.lower().endswith(GGUF_SUFFIX)


def absolute_name(model: str) -> str:
    """Return a model's name, with an absolute path, because a job runs in another directory.

    Raises:
        ConfigError: the server cannot serve the model under this name.
    """
    if not is_path(model):
        return model
    path = str(absolute(Path(model).expanduser()))
    if "," in path or not path.isprintable():
        raise ConfigError(
            f"llama.cpp cannot serve a model of the path {path!r}",
            "rename the file, without a comma and control characters",
        )
    return path


def absent_file(path: Path) -> ModelError:
    """Return the error of a path at which no file is."""
    if path.is_dir():
        found = "is a directory"
    elif path.is_symlink():
        found = f"is a link to {path.readlink()}, which does not exist"
    elif os.path.lexists(path):
        found = "is a device or a pipe"
    else:
        return ModelError(f"model file not found: {path}", _CHECK)
    return ModelError(f"the model is not a file: {path} {found}", _CHECK)


def refuse_other_name(name: str) -> None:
    """Refuse the path of another file than a GGUF file, and names that Ollama does not have.

    Raises:
        ConfigError: it is one of these.
    """
    if is_named_path(name):
        raise ConfigError(
            f"the model {name} is a path that does not end with {GGUF_SUFFIX}",
            f"rename or link the GGUF file: --model FILE{GGUF_SUFFIX}; a directory of Hugging "
            "Face: --engine vllm",
        )
    try:
        parse_model_name(name)
    except ConfigError as error:
        remedy = f"{error.remedy}; or name a GGUF file: --model FILE{GGUF_SUFFIX}"
        raise ConfigError(error.message, remedy) from error


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
            "use a GGUF file of it with a separate mmproj file, or --engine ollama (not in "
            "aiflux serve)",
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


def read_tokenizer(models_dir: Path | None, model: str, *, templated: bool) -> ModelTokenizer:
    """Return the tokenizer of a model; see ``gguf_tokenizer``.

    Raises:
        ModelError: the model is not stored, or its tokenizer is not known.
        ConfigError: the library is not installed.
    """
    if is_path(model):
        return gguf_tokenizer(Path(model), templated=templated)
    return stored_tokenizer(models_dir, parse_model_name(model), templated=templated)
