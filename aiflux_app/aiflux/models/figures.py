"""Figures that determine a model's memory, read from a GGUF header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiflux.errors import ModelError
from aiflux.models.gguf import GgufHeader, Length

# Source: llama.cpp, include/llama.h (llama_ftype); 4 is defined by Ollama (fs/ggml/type.go).
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "MXFP4", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1",
    10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M",
    16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S",
    22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 38: "MXFP4",
}  # fmt: skip


FULL, SLIDING, FIXED, NONE = "full_attention", "sliding_attention", "linear_attention", "mlp"
"""Types of layers, as in Hugging Face's ``config.json``."""
_WINDOWED = ("sliding", "chunked")
# Layers with a state of fixed size, and without one: nothing is cached for each token.
_UNCACHED = ("linear_attention", "mamba", "recurrent", "conv", "mlp", "moe")


@dataclass(frozen=True)
class Architecture:
    """A model's shape, from its config or GGUF header.

    Attributes:
        name: the GGUF's ``general.architecture``.
        embedding: width of the model.
        key_size, value_size: size of one head's key and value.
        context: tokens of the training context; 0 if unknown.
        sliding_window: tokens in the window of a sliding layer; 0 if there are none.
        cross_layers: layers that only process the image (llama3.2-vision).
        layer_types: of each layer, as in Hugging Face's ``config.json``; empty if all are alike. A
            layer that uses the cache of another one has the type "mlp".
        full_kv_heads, full_head_size: of layers without a window, if they differ from the others.
        embeds: the model only creates embeddings.
    """

    name: str
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    vocabulary: int
    context: int = 0
    feed_forward: int = 0
    sliding_window: int = 0
    experts: int = 0
    experts_used: int = 0
    cross_layers: tuple[int, ...] = ()
    layer_types: tuple[str, ...] = ()
    full_kv_heads: int = 0
    full_head_size: int = 0
    embeds: bool = False

    def has_window(self, layer: int) -> bool:
        """Return whether the type of a layer says that it only looks back a window."""
        return bool(self.layer_types) and any(word in self.layer_types[layer] for word in _WINDOWED)

    def cached_values(self, layer: int) -> int:
        """Return how many values a token adds to the cache of a layer."""
        if self.layer_types and any(word in self.layer_types[layer] for word in _UNCACHED):
            return 0
        if self.full_head_size and not self.has_window(layer):
            return 2 * self.full_head_size * (self.full_kv_heads or self.kv_heads)
        return (self.key_size + self.value_size) * self.kv_heads

    @property
    def expert_parameters(self) -> int:
        """Number of parameters of all experts, each with three matrices."""
        return 3 * self.layers * self.experts * self.embedding * self.feed_forward


@dataclass(frozen=True)
class Vision:
    """The vision part in the model's own file.

    Attributes:
        weights: bytes of its tensors.
        image, patch: width of an image and of a patch in pixels.
        max_pixels: maximum size of an image, if it is variable; else 0.
    """

    weights: int
    image: int
    patch: int
    heads: int
    embedding: int
    channels: int = 3
    max_pixels: int = 0


@dataclass(frozen=True)
class Figures:
    """All figures that determine a model's memory.

    Attributes:
        layers: bytes of each layer's weights, in order.
        output: bytes of the last norm and the output layer.
        projector: bytes of a second file that processes images.
        measured: whether the figures come from the model's own file.
    """

    architecture: Architecture
    layers: tuple[int, ...]
    output: int
    projector: int = 0
    vision: Vision | None = None
    measured: bool = False

    @property
    def weights(self) -> int:
        """Bytes of weights on GPUs."""
        seeing = self.vision.weights if self.vision else 0
        return sum(self.layers) + self.output + self.projector + seeing


def figures_of(header: GgufHeader, projector: int = 0) -> Figures:
    """Return the figures from a GGUF header.

    Raises:
        ModelError: the header lacks a required value.
    """
    shape = shape_of(header)
    output = header.size_of("output.", "output_norm.")
    if "output.weight" not in header.tensors:
        output += header.size_of("token_embd.")
    layers = tuple(header.size_of(f"blk.{layer}.") for layer in range(shape.layers))
    return Figures(shape, layers, output, projector, _vision_of(header), measured=True)


def shape_of(header: GgufHeader) -> Architecture:
    """Return the architecture from a GGUF header.

    Raises:
        ModelError: the header lacks a required value.
    """
    heads = header.number("attention.head_count", 1)
    embedding, layers = header.number("embedding_length"), header.number("block_count")
    if not layers or not embedding:
        raise ModelError(
            f"a GGUF file of the architecture {header.architecture!r} has no layer count",
            "it is not a language model, or uses another convention",
        )
    head = embedding // max(heads, 1)
    kinds = _layer_types(header, layers)
    key = header.number("attention.key_length", head)
    small = header.number("attention.key_length_swa", key)  # key_length is that of full layers
    cross = header.metadata.get(f"{header.architecture}.attention.cross_attention_layers")
    return Architecture(
        name=header.architecture,
        layers=layers,
        embedding=embedding,
        heads=heads,
        kv_heads=header.number("attention.head_count_kv", 1),
        key_size=small,
        value_size=header.number(
            "attention.value_length_swa", header.number("attention.value_length", head)
        ),
        vocabulary=_vocabulary(header),
        context=header.number("context_length"),
        feed_forward=header.number("feed_forward_length"),
        sliding_window=header.number("attention.sliding_window"),
        experts=header.number("expert_count"),
        experts_used=header.number("expert_used_count"),
        cross_layers=tuple(cross) if isinstance(cross, list) else (),
        layer_types=kinds,
        full_kv_heads=_full_kv_heads(header, kinds) if small != key else 0,
        full_head_size=key if small != key else 0,
        # Ollama's own criterion (server/images.go, ggufCapabilities).
        embeds=f"{header.architecture}.pooling_type" in header.metadata,
    )


def _layer_types(header: GgufHeader, layers: int) -> tuple[str, ...]:
    """Return the type of each layer; empty if they are alike, or of an architecture without types.

    Source of the keys: llama.cpp, gguf-py/gguf/constants.py.
    """
    heads = _per_layer(header, "attention.head_count_kv")
    windows = _per_layer(header, "attention.sliding_window_pattern")
    fixed = _per_layer(header, "attention.recurrent_layers")
    every, shared = (
        header.number(key) for key in ("full_attention_interval", "attention.shared_kv_layers")
    )

    def kind(layer: int) -> str:
        if layer >= layers - shared:
            return NONE
        if fixed.get(layer, every and (layer + 1) % every) or heads.get(layer, 1) == 0:
            return FIXED
        return SLIDING if windows.get(layer) else FULL

    kinds = tuple(kind(layer) for layer in range(layers))
    return () if {*kinds} == {FULL} else kinds


def _full_kv_heads(header: GgufHeader, kinds: Sequence[str]) -> int:
    heads = _per_layer(header, "attention.head_count_kv")
    return next((int(heads.get(at, 0)) for at, kind in enumerate(kinds) if kind == FULL), 0)


def _per_layer(header: GgufHeader, key: str) -> dict[int, float]:
    """Return the values of an array with one item for each layer, by layer."""
    values = header.metadata.get(f"{header.architecture}.{key}")
    if not isinstance(values, list):
        return {}
    return {at: each for at, each in enumerate(values) if isinstance(each, int | float)}


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
