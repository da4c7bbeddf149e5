"""What is known of a model's memory: from its own file where it is there, else the catalogue."""

from __future__ import annotations

from pathlib import Path

from aiflux.core.catalogue import Catalogue
from aiflux.core.gguf import GgufHeader, Length, read_gguf
from aiflux.core.memory import Architecture, Figures, Vision
from aiflux.core.modelname import ModelName
from aiflux.core.modelstore import blob_path, read_manifest
from aiflux.errors import ModelError

_MODEL = "application/vnd.ollama.image.model"
_PROJECTOR = "application/vnd.ollama.image.projector"


def known_figures(
    models_dir: Path | None, name: ModelName, catalogue: Catalogue | None
) -> Figures | None:
    """Return a model's figures; None where neither its file nor the catalogue tells them."""
    if models_dir is not None:
        try:
            return stored_figures(models_dir, name)
        except ModelError:
            pass
    model = catalogue.find(name.served) if catalogue else None
    return model.figures if model else None


def stored_figures(models_dir: Path, name: ModelName) -> Figures:
    """Return the figures of a model that is in a models directory.

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
    return figures_of(header, projector)


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
