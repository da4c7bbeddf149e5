"""Estimate a model's GPU memory from its architecture; the formula was checked against Ollama.

The formula is that of Ollama 0.9.3 (``llm/memory.go`` EstimateGPULayers, ``fs/ggml/ggml.go``
GraphSize): weights on the GPU + cache of keys and values + buffers of the graph + overhead of each
GPU (CUDA's context, and one more layer as a buffer). Later versions of Ollama (from 0.12) measure
instead, and compute attention without storing the matrix of scores ("flash attention"): for them
the graph only depends on the vocabulary. ``flash`` selects between the two; with it, the figures
are the minimum for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aiflux.models.figures import Architecture, Figures, Vision

BATCH = 512
"""Tokens of a prompt that Ollama processes at once (``num_batch``)."""
GPU_OVERHEAD = 457 * 2**20
"""Bytes that CUDA uses on each GPU (``cudaMinimumMemory``; the same for ROCm)."""
CACHE_BYTES = {"f16": 2.0, "q8_0": 1.0, "q4_0": 0.5}
"""Bytes per value in the cache, by ``OLLAMA_KV_CACHE_TYPE`` (Ollama's figures)."""
_SCORE_BYTES = 4

# Architectures whose sliding layers have a short cache in Ollama; every Nth layer has all.
_WHOLE_EVERY = {"gemma3": 6, "gptoss": 2, "gpt-oss": 2}
# Newer architectures, which also have a short cache (llama.cpp, src/llama-model.cpp,
# set_swa_pattern).
_WHOLE_EVERY_LATER = {**_WHOLE_EVERY, "gemma2": 2}
# Minimum tokens of such a layer per slot, according to Ollama 0.11.
_LEAST_WINDOW = {"gptoss": 4096, "gpt-oss": 4096}
# Ollama runs these with one slot, whatever its settings (server/sched.go, Scheduler.load, the same
# in v0.33.0-rc2 and on its main branch of 2026-08-21), and all models that cannot generate text.
ONE_SLOT = (
    "mllama",
    "qwen3vl",
    "qwen3vlmoe",
    "qwen35",
    "qwen35moe",
    "qwen3next",
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "nemotron_h_moe",
    "nemotron_h_omni",
)
_MLLAMA_PATCHES, _MLLAMA_TILES = 1601, 4


def has_one_slot(shape: Architecture) -> bool:
    """Return whether Ollama runs a model with one slot only."""
    return shape.embeds or shape.name in ONE_SLOT


@dataclass(frozen=True)
class Memory:
    """Memory of a model in bytes, on all GPUs together.

    Attributes:
        graph: buffers of the computation.
        overhead: fixed use of each GPU, and Ollama's buffer of one layer each.
    """

    weights: int
    cache: int
    graph: int
    overhead: int
    gpus: int = 1

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.cache + self.graph + self.overhead


def estimate(
    figures: Figures,
    context: int,
    slots: int,
    *,
    gpus: int = 1,
    flash: bool = False,
    cache_type: str = "f16",
    gpu_overhead: int = GPU_OVERHEAD,
    one_slot: bool | None = None,
) -> Memory:
    """Return the memory that a model needs on GPUs.

    Args:
        context: tokens of context per slot, limited to the model's training context.
        slots: sequences decoded in parallel.
        gpus: GPUs that share the model.
        flash: the minimum reached by newer versions; otherwise the estimate of Ollama 0.9.3.
        one_slot: whether the engine uses only one slot for this model; None for Ollama's rule.
        cache_type: ``f16``, ``q8_0`` or ``q4_0``; unknown types count as f16.
    """
    shape = figures.architecture
    single = has_one_slot(shape) if one_slot is None else one_slot
    slots = 1 if single else slots
    context = min(context, shape.context or context)
    # Minimum context in Ollama for models that accept images.
    total = max(context * slots, 2048)
    batch = min(total, BATCH)
    bytes_each = CACHE_BYTES.get(cache_type.lower(), 2.0)
    caches = [
        int(numbers * bytes_each) for numbers in layer_caches(shape, total, slots, batch, flash)
    ]
    full, partial = graph_sizes(figures, total, batch, sum(caches))
    if flash:
        graph = min(_vocabulary_graph(shape, batch), full)
        buffer = 0
    else:
        graph = full if gpus == 1 else partial
        buffer = figures.layers[0] + caches[0]
    seeing = 0 if flash or figures.vision is None else _vision_graph(shape, figures.vision)
    return Memory(
        weights=figures.weights,
        cache=sum(caches),
        graph=gpus * graph + seeing,
        overhead=gpus * (gpu_overhead + buffer),
        gpus=gpus,
    )


def layer_caches(
    shape: Architecture, total: int, slots: int, batch: int, flash: bool = False
) -> tuple[int, ...]:
    """Return the number of values in each layer's cache for ``total`` tokens in all slots."""
    every = (_WHOLE_EVERY_LATER if flash else _WHOLE_EVERY).get(shape.name)
    least = 0 if flash else _LEAST_WINDOW.get(shape.name, 0)
    window = max(shape.sliding_window, least)
    short = slots * window + batch
    if flash:
        short = min(short, total)
    caches = []
    for layer in range(shape.layers):
        token = shape.cached_values(layer)
        # Ollama 0.9.3 shortened the caches of no other architectures.
        short_one = (layer + 1) % every != 0 if every else flash and shape.has_window(layer)
        if layer in shape.cross_layers:
            # These are f32, and their number does not depend on the context.
            caches.append(2 * token * _MLLAMA_PATCHES * _MLLAMA_TILES)
        elif window and short_one:
            caches.append(short * token)
        else:
            caches.append(total * token)
    return tuple(caches)


def graph_sizes(figures: Figures, total: int, batch: int, cache: int) -> tuple[int, int]:
    """Return the bytes of the graph on a single GPU, and if it is divided."""
    shape = figures.architecture
    formula = _GRAPHS.get(shape.name)
    if formula is None:
        groups = shape.heads // max(shape.kv_heads, 1)
        size = groups * cache // 6
        return size, size
    return formula(figures, total, batch)


def _vocabulary_graph(shape: Architecture, batch: int) -> int:
    return _SCORE_BYTES * batch * (shape.embedding + shape.vocabulary)


def _vision_graph(shape: Architecture, vision: Vision) -> int:
    if vision.patch == 0:
        return 0
    if vision.max_pixels:
        patches = vision.max_pixels // vision.patch**2
        pixels = 2 * vision.max_pixels * vision.channels
        pixels += patches * vision.channels * vision.patch**2
        return 4 * (pixels + patches**2 * vision.heads + vision.embedding * patches)
    if shape.name not in ("gemma3", "mistral3"):
        return 0
    patches = (vision.image // vision.patch) ** 2
    pixels = vision.image**2 * vision.channels
    return 4 * (pixels + vision.embedding * vision.patch + patches**2 * vision.heads)


Graph = Callable[[Figures, int, int], tuple[int, int]]


def _divided_vocabulary(shape: Architecture, batch: int) -> int:
    return _vocabulary_graph(shape, batch) + shape.embedding * shape.vocabulary * 105 // 128


def _llama(figures: Figures, total: int, batch: int) -> tuple[int, int]:
    a = figures.architecture
    wide, head = a.embedding, a.embedding // max(a.heads, 1)
    full = max(
        4 * batch * (1 + 4 * wide + total * (1 + a.heads)),
        _vocabulary_graph(a, batch),
    )
    partial = 4 * batch * wide + max(
        4 * batch * (1 + wide + max(total, wide))
        + wide * wide * 9 // 16
        + 4 * total * (batch * a.heads + head * a.kv_heads),
        _divided_vocabulary(a, batch),
    )
    if a.experts:
        gates = figures.layers[0]  # three times one of an expert's three parts
        partial = max(
            gates + 4 * batch * (2 * a.feed_forward + a.kv_heads + wide + total)
            + 4 * batch * head * a.kv_heads,
            4 * (total * batch * a.heads + total * head * a.kv_heads)
            + 4 * (batch * 1024 + head * a.kv_heads * batch),
        )  # fmt: skip
    return full, partial


def _mllama(figures: Figures, total: int, batch: int) -> tuple[int, int]:
    a = figures.architecture
    keys = a.key_size * a.heads
    full = max(
        4 * batch * (2 + 3 * a.embedding + keys + total * (1 + a.heads)),
        _vocabulary_graph(a, batch),
    )
    partial = max(
        4 * (batch * (2 * a.embedding + 1 + total * (1 + a.heads) + keys))
        + 4 * a.key_size * total * a.kv_heads,
        _divided_vocabulary(a, batch),
    )
    return full, partial


def _gemma(figures: Figures, total: int, batch: int) -> tuple[int, int]:
    a = figures.architecture
    keys = a.key_size * a.heads
    full = max(
        _vocabulary_graph(a, batch),
        4 * batch * (2 + total + total * a.heads + 2 * a.embedding + 2 * keys),
    )
    partial = max(
        _divided_vocabulary(a, batch),
        4 * batch * (2 * a.embedding + 1 + 2 * keys + total + total * a.heads)
        + 4 * a.key_size * total * 8
        + a.embedding * keys * 9 // 16,
    )
    return (4 * full, 4 * partial) if a.name == "gemma3n" else (full, partial)


def _command_r(figures: Figures, total: int, batch: int) -> tuple[int, int]:
    a = figures.architecture
    full = max(
        _vocabulary_graph(a, batch),
        4 * batch * (2 + 4 * a.embedding + total * (1 + a.heads)),
    )
    partial = max(
        _divided_vocabulary(a, batch),
        4 * batch * (1 + 2 * a.embedding + total * (1 + a.heads))
        + 4 * a.embedding * total
        + a.embedding * a.embedding * 9 // 16,
    )
    return full, partial


def _qwen2(figures: Figures, total: int, batch: int) -> tuple[int, int]:
    a = figures.architecture
    full = max(
        _vocabulary_graph(a, batch),
        4 * batch * (1 + 2 * a.embedding + total + total * a.heads),
    )
    partial = max(
        _divided_vocabulary(a, batch),
        4 * (batch * (1 + 2 * a.embedding + total * (1 + a.heads)) + a.embedding * (1 + total)),
    )
    return full, partial


_GRAPHS: dict[str, Graph] = {
    "llama": _llama,
    "llama4": _llama,
    "mllama": _mllama,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3n": _gemma,
    "command-r": _command_r,
    "qwen2": _qwen2,
}
