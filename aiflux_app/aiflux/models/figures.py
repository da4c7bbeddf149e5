"""What is known of a model's memory: from its own file where it is there, else the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiflux.errors import ModelError
from aiflux.models.catalog import Catalogue, CataloguedModel
from aiflux.models.gguf import GgufHeader, Length, read_gguf
from aiflux.models.memory import Architecture, Figures, Vision
from aiflux.models.name import ModelName
from aiflux.models.store import blob_path, read_manifest

_MODEL = "application/vnd.ollama.image.model"
_PROJECTOR = "application/vnd.ollama.image.projector"

# Source: llama.cpp, include/llama.h (llama_ftype); 4 is Ollama's own (fs/ggml/type.go).
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "MXFP4", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
    10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M",
    16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S",
    22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 38: "MXFP4",
}  # fmt: skip


def known_figures(
    models_dir: Path | None, name: ModelName, catalogue: Catalogue | None
) -> Figures | None:
    """Return a model's figures; None where neither its file nor the catalogue tells them."""
    stored = None if models_dir is None else readable_model(models_dir, name)
    return best_figures(stored, catalogue.find(name.served) if catalogue else None)


def best_figures(stored: StoredModel | None, catalogued: CataloguedModel | None) -> Figures | None:
    """Return a model's figures: from its own file, else from the catalogue."""
    if stored is not None:
        return stored.figures
    return catalogued.figures if catalogued else None


@dataclass(frozen=True)
class StoredModel:
    """What the own file of a model tells.

    Attributes:
        parameters: their number.
        quantisation: such as ``Q4_K_M``; "" where the file does not tell.
    """

    figures: Figures
    parameters: int
    quantisation: str


def stored_figures(models_dir: Path, name: ModelName) -> Figures:
    """Return the figures of a model that is in a models directory.

    Raises:
        ModelError: it is not there, or its file is no whole GGUF.
    """
    return stored_model(models_dir, name).figures


def stored_model(models_dir: Path, name: ModelName) -> StoredModel:
    """Return what the file of a model tells that is in a models directory.

    Raises:
        ModelError: it is not there, or its file is no whole GGUF.
    """
    files = {"model": [], "projector": []}  # type: dict[str, list[Path]]
    for layer in read_manifest(models_dir, name).layers:
        if layer.kind in (_MODEL, _PROJECTOR):
            part = layer.kind.rpartition(".")[2]
            files[part].append(blob_path(models_dir, layer.digest))
    if not files["model"]:
        raise ModelError(f"{name.served} has no GGUF file", "pull it again")
    header = read_gguf(files["model"][0])
    projector = sum(read_gguf(path).data_size for path in files["projector"])
    kind = header.metadata.get("general.file_type")
    quantisation = _FILE_TYPES.get(kind, "") if isinstance(kind, int) else ""
    return StoredModel(figures_of(header, projector), header.parameters, quantisation)


def readable_model(models_dir: Path, name: ModelName) -> StoredModel | None:
    """Return the same; None where the model is not there, or its file tells nothing."""
    try:
        return stored_model(models_dir, name)
    except ModelError:
        return None


def figures_of(header: GgufHeader, projector: int = 0) -> Figures:
    """Return the figures that a GGUF header tells.

    Raises:
        ModelError: the header lacks what they depend on.
    """
    shape = shape_of(header)
    output = header.size_of("output.", "output_norm.")
    if "output.weight" not in header.tensors:
        output += header.size_of("token_embd.")
    layers = tuple(header.size_of(f"blk.{layer}.") for layer in range(shape.layers))
    return Figures(shape, layers, output, projector, _vision_of(header), measured=True)


def shape_of(header: GgufHeader) -> Architecture:
    """Return the architecture that a GGUF header tells.

    Raises:
        ModelError: the header lacks it.
    """
    heads = header.number("attention.head_count", 1)
    embedding, layers = header.number("embedding_length"), header.number("block_count")
    if not layers or not embedding:
        raise ModelError(
            f"a GGUF file of the architecture {header.architecture!r} tells no layers",
            "it is not a language model, or is made by another convention",
        )
    head = embedding // max(heads, 1)
    cross = header.metadata.get(f"{header.architecture}.attention.cross_attention_layers")
    return Architecture(
        name=header.architecture,
        layers=layers,
        embedding=embedding,
        heads=heads,
        kv_heads=header.number("attention.head_count_kv", 1),
        key_size=header.number("attention.key_length", head),
        value_size=header.number("attention.value_length", head),
        vocabulary=_vocabulary(header),
        context=header.number("context_length"),
        feed_forward=header.number("feed_forward_length"),
        sliding_window=header.number("attention.sliding_window"),
        experts=header.number("expert_count"),
        experts_used=header.number("expert_used_count"),
        cross_layers=tuple(cross) if isinstance(cross, list) else (),
        # What Ollama goes by (server/images.go, ggufCapabilities).
        embeds=f"{header.architecture}.pooling_type" in header.metadata,
    )


def _vocabulary(header: GgufHeader) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Length):
        return tokens.items
    return len(tokens) if isinstance(tokens, list) else 0


def _vision_of(header: GgufHeader) -> Vision | None:
    if not header.number("vision.block_count"):
        return None
    free = header.architecture == "qwen25vl"
    return Vision(
        weights=header.size_of("v."),
        image=header.number("vision.image_size"),
        patch=header.number("vision.patch_size"),
        heads=header.number("vision.attention.head_count"),
        embedding=header.number("vision.embedding_length"),
        channels=header.number("vision.num_channels", 3),
        max_pixels=header.number("vision.max_pixels", 28 * 28 * 1280) if free else 0,
    )
