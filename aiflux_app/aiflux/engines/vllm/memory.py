"""GPU memory of a model in vLLM.

vLLM takes a share of each GPU (0.92 by default), loads the weights, runs one batch of the largest
size, and gives what is left to the key-value cache. The cache is paged: requests wait where it is
full, but one request of the full context must fit, or vLLM does not start.
Source: vllm/v1/worker/gpu_worker.py, vllm/v1/core/kv_cache_utils.py and kv_cache_interface.py of
0.32.0.
"""

from __future__ import annotations

from aiflux.models.figures import Architecture, Figures

UTILIZATION = 0.92
_CACHE_BYTES = 2
_OVERHEAD = 3 << 29
"""Bytes of each GPU for the CUDA context, the graphs and the activations of the largest batch. A
rule of thumb, to be measured: the activations depend on the model's width."""
_BATCH = 2048
"""Tokens of the smallest default batch: a sliding layer keeps them in addition to its window."""
_MEAN_SHARE = 0.5
"""Share of the context that a request uses on average: prompts differ, and answers grow."""


def cache_per_token(shape: Architecture) -> tuple[int, int]:
    """Return bytes of cache for one token: of layers that look back without limit, and of others.

    Layers with a fixed state (Mamba, linear attention) need none for each token.
    """
    values = [0, 0]
    for layer in range(shape.layers):
        values[shape.has_window(layer)] += shape.cached_values(layer)
    return values[0] * _CACHE_BYTES, values[1] * _CACHE_BYTES


def cache_size(shape: Architecture, tokens: int) -> int:
    """Return bytes of cache for one request of ``tokens``."""
    whole, sliding = cache_per_token(shape)
    window = shape.sliding_window + _BATCH if shape.sliding_window else tokens
    return whole * tokens + sliding * min(tokens, window)


def divides(shape: Architecture, gpus: int) -> bool:
    """Return whether tensor parallelism can divide a model among GPUs.

    Its heads are divided evenly; keys and values are divided, or repeated, evenly.
    Source: vllm/config/model.py and vllm/model_executor/models/llama.py of 0.32.0.
    """
    return shape.heads % gpus == 0 and (shape.kv_heads % gpus == 0 or gpus % shape.kv_heads == 0)


def memory_needed(figures: Figures, context: int, slots: int, gpus: int) -> int:
    """Return the bytes of GPU memory that a model needs, on all ``gpus`` together.

    Args:
        context: tokens of one request, at most.
        slots: requests at the same time.
    """
    shape = figures.architecture
    # Keys and values are divided among the GPUs by heads, and repeated where there are fewer heads.
    copies = max(1, gpus // max(1, shape.kv_heads))
    most = cache_size(shape, context)
    mean = cache_size(shape, int(context * _MEAN_SHARE))
    cache = copies * max(most, slots * mean)
    return int((figures.weights + cache + gpus * _OVERHEAD) / UTILIZATION)
