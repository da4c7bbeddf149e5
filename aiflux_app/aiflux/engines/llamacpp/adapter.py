"""LoRA adapters in GGUF files, as llama.cpp's ``convert_lora_to_gguf.py`` writes them."""

from __future__ import annotations

from pathlib import Path

from aiflux.core.runs.plan import Adapter
from aiflux.engines.llamacpp import model_file
from aiflux.errors import ModelError
from aiflux.models.gguf import read_gguf
from aiflux.util.files import file_digest


def read_adapter(name: str, path: str, architecture: str | None) -> Adapter:
    """Read the header of an adapter.

    Args:
        architecture: of the model; None if unknown.

    Raises:
        ModelError: it is missing, in another format, or for another model.
        ConfigError: llama-server cannot load a file of this path.
    """
    if not Path(path).is_file():
        raise ModelError(
            f"the adapter {name} is not a file: {path}",
            "name a GGUF file (convert_lora_to_gguf.py of llama.cpp makes one): --lora NAME=PATH",
        )
    if not model_file.is_path(path):
        raise ModelError(
            f"the adapter {path} is not a .gguf file",
            "convert it with convert_lora_to_gguf.py of llama.cpp",
        )
    model_file.absolute_name(path)
    header = read_gguf(Path(path))
    kind = header.metadata.get("general.type"), header.metadata.get("adapter.type")
    if kind != ("adapter", "lora"):
        raise ModelError(
            f"{path} is not a LoRA adapter: its types are {kind[0]!r} and {kind[1]!r}",
            "convert it with convert_lora_to_gguf.py of llama.cpp",
        )
    if architecture is not None and header.architecture != architecture:
        raise ModelError(
            f"the adapter {path} is for the architecture {header.architecture}, and the model's is "
            f"{architecture}",
            "use the adapter's base model: --model",
        )
    return Adapter(name, path, file_digest(Path(path)))
