"""LoRA adapters in GGUF files, as llama.cpp's ``convert_lora_to_gguf.py`` writes them."""

from __future__ import annotations

from pathlib import Path

from aiflux.core.runs.plan import Adapter
from aiflux.engines.llamacpp import model_file
from aiflux.errors import ModelError
from aiflux.models.gguf import read_gguf, refuse_truncated
from aiflux.util.files import file_digest

_CONVERT = "convert it with convert_lora_to_gguf.py of llama.cpp"


def read_adapter(name: str, path: str, architecture: str | None) -> Adapter:
    """Read the header of an adapter.

    Args:
        architecture: of the model; None if unknown.

    Raises:
        ModelError: it is missing, in another format, or for another model.
        ConfigError: llama-server cannot load a file of this path.
    """
    file = Path(path)
    if not file.is_file():
        found = "is a directory" if file.is_dir() else "does not exist"
        raise ModelError(
            f"the adapter {name} is not a file: {path} {found}",
            "name a GGUF file (convert_lora_to_gguf.py of llama.cpp makes one): --lora NAME=PATH",
        )
    if not model_file.is_path(path):
        raise ModelError(f"the adapter {name} is not a .gguf file: {path}", _CONVERT)
    model_file.absolute_name(path)
    try:
        header = read_gguf(file)
        refuse_truncated(file, header)
    except ModelError as error:
        raise ModelError(
            f"the adapter {name} is damaged: {error.message}", f"copy it again, or {_CONVERT}"
        ) from error
    kinds = ("general.type", "adapter"), ("adapter.type", "lora")
    for key, wanted in kinds:
        kind = header.metadata.get(key)
        if kind != wanted:
            has = f"no {key}" if kind is None else f"{key} {kind!r}"
            raise ModelError(
                f"the adapter {name} is not a LoRA adapter: {path} has {has}", _CONVERT
            )
    if architecture is not None and header.architecture != architecture:
        raise ModelError(
            f"the adapter {name} ({path}) is for the architecture {header.architecture}, and the "
            f"model's is {architecture}",
            "use the adapter's base model: --model",
        )
    return Adapter(name, path, file_digest(Path(path)))
