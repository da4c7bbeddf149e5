"""Read headers of safetensors files, and the figures for a model's memory.

Source of the format: https://github.com/huggingface/safetensors#format: eight bytes with the
header's length, little-endian, then the header as JSON, then the data.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiflux.errors import ModelError
from aiflux.models.figures import FIXED, FULL, NONE, SLIDING, Architecture, Figures
from aiflux.util.text import counted, error_text

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100 << 20  # the format's own limit
_MAX_LAYERS = 10_000
_PATTERNS = {"mistral": 0, "mixtral": 0, "phi3": 0, "gemma2": 2, "gemma3_text": 6, "cohere2": 4}
"""Every how many layers one has no sliding window, as transformers' configurations fill it in;
0 where all have one."""
_BLOCKS = {"M": FIXED, "*": FULL, "-": NONE, "E": NONE}
"""Letters of ``hybrid_override_pattern``: transformers, models/nemotron_h."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# Of PyTorch, under the names that transformers looks up.
_DTYPES = {
    "auto", "half", "float", "double", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    "int8", "uint8", "int16", "int32", "int64", "bool",
}  # fmt: skip
_SHRUNK = {"F64": 4, "F32": 2}
DAMAGED = "pull or copy the model again"


def read_header(path: Path) -> dict[str, Any]:
    """Return a file's tensors by name: ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        ModelError: the file is not a complete safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size < _LENGTH.size:
                raise ModelError(f"{path} is incomplete: it has {counted(size, 'byte')}", DAMAGED)
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > _MAX_HEADER:
                raise ModelError(f"{path} is not a safetensors file", DAMAGED)
            text = file.read(length)
        if len(text) < length:
            raise ModelError(f"{path} is incomplete: it ends in its header", DAMAGED)
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((_end(each) for each in header.values()), default=0)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", DAMAGED) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"the header of {path} is damaged: {_wrong(error)}", DAMAGED) from error
    if size < end:
        raise ModelError(f"{path} is incomplete: it has {size} bytes of {end}", DAMAGED)
    if size > end:
        raise ModelError(f"{path} has {size} bytes, but its header describes {end}", DAMAGED)
    return header


def _wrong(error: Exception) -> str:
    """Return what is wrong with JSON, or with its content."""
    if isinstance(error, json.JSONDecodeError):
        # Python names the beginning of a text or value that does not end.
        if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
            return "it ends too early"
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return error_text(error)


def _end(tensor: Mapping[str, Any]) -> int:
    """Return the end of a tensor's data; ValueError if it has no type or position."""
    start, end = tensor["data_offsets"]
    if not (type(start) is type(end) is int and 0 <= start <= end) or tensor["dtype"] == "":
        raise ValueError(f"it has a tensor at {start!r} to {end!r}")
    return int(end)


def problem_with(path: Path) -> str | None:
    """Return the problem of a file, or None. The weights are not read."""
    try:
        read_header(path)
    except ModelError as error:
        return error.message
    return None


def read_config(snapshot: Path) -> dict[str, Any]:
    """Return a model's ``config.json``; ModelError if it cannot be read, or is not an object."""
    return read_json(snapshot / "config.json", DAMAGED)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        remedy: for a file that is missing or damaged.

    Raises:
        ModelError: the file cannot be read, or is not an object.
    """
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error_text(error)}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {_wrong(error)}", remedy) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", remedy)
    return config


def refuse_unknown_dtype(snapshot: Path) -> None:
    """Refuse a configuration whose type of numbers PyTorch does not have; vLLM fails with it.

    Raises:
        ModelError: it has such a type, or cannot be read.
    """
    config = read_config(snapshot)
    for part in (config, _text_part(config)):
        for name in ("dtype", "torch_dtype"):
            dtype = part.get(name)
            if isinstance(dtype, str) and dtype.removeprefix("torch.") not in _DTYPES:
                raise ModelError(
                    f"{snapshot / 'config.json'} names the unknown {name} {dtype!r}; PyTorch's "
                    "names are float16, bfloat16 and float32",
                    DAMAGED,
                )


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return a model's shape from its ``config.json``; of several parts, that of the text.

    Multi-head latent attention (DeepSeek) caches one compressed row per token and layer instead of
    keys and values (``kv_lora_rank`` and ``qk_rope_head_dim``).

    Raises:
        ModelError: the shape is not in it.
    """
    part = _text_part(config)

    def number(*names: str, default: int = 0) -> int:
        found = (part.get(name) for name in names)
        return next((value for value in found if type(value) is int and value > 0), default)

    layers, width = number("num_hidden_layers", "n_layer"), number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    if not width or not heads or not 0 < layers <= _MAX_LAYERS:
        raise ModelError(
            "config.json does not have num_hidden_layers, hidden_size and num_attention_heads",
            "it is not a language model of Hugging Face's transformers",
        )
    kv_heads = number("num_key_value_heads", "num_kv_heads", default=heads)
    key = width // heads
    key = value = number("head_dim", default=key)
    if number("kv_lora_rank"):
        kv_heads, key, value = 1, number("kv_lora_rank") + number("qk_rope_head_dim"), 0
    names = config.get("architectures")
    return Architecture(
        name=str(names[0]) if isinstance(names, list) and names else str(config.get("model_type")),
        layers=layers,
        embedding=width,
        heads=heads,
        kv_heads=kv_heads,
        key_size=key,
        value_size=value,
        vocabulary=number("vocab_size"),
        context=number("max_position_embeddings", "n_positions"),
        feed_forward=number("intermediate_size"),
        sliding_window=number("sliding_window", "attention_chunk_size"),
        experts=number("num_local_experts", "num_experts", "n_routed_experts"),
        experts_used=number("num_experts_per_tok"),
        layer_types=_without_shared(_layer_types(part, layers), number("num_kv_shared_layers")),
        full_kv_heads=number("num_global_key_value_heads"),
        full_head_size=number("global_head_dim"),
    )


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the part that makes text; models of several parts nest them."""
    for name in ("thinker_config", "text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, dict):
            return {**config, **_text_part(part)}
    return config


def _layer_types(part: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Return the type of each layer; empty where all look back without limit.

    Configurations without ``layer_types`` are older than it. Where the rule is not known, layers
    count as unlimited, which need more memory.
    """
    for name in ("layer_types", "layers_block_type"):
        types = part.get(name)
        if isinstance(types, list) and len(types) >= layers:
            return tuple(str(each) for each in types[:layers])
    pattern = part.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) >= layers:
        return tuple(_BLOCKS.get(letter, FULL) for letter in pattern[:layers])
    if not part.get("sliding_window") or not part.get("use_sliding_window", True):
        return ()
    pattern = part.get("sliding_window_pattern", _PATTERNS.get(str(part.get("model_type"))))
    if type(pattern) is not int or pattern < 0:
        return ()
    return tuple(
        FULL if pattern and (layer + 1) % pattern == 0 else SLIDING for layer in range(layers)
    )


def _without_shared(kinds: tuple[str, ...], shared: int) -> tuple[str, ...]:
    """Mark the last layers, which use the caches of earlier ones (Gemma 3n and 4)."""
    return kinds[: len(kinds) - shared] + (NONE,) * min(shared, len(kinds))


def figures_of_files(snapshot: Path, files: list[str]) -> Figures:
    """Return the figures of a model from its configuration and the headers of its weights.

    Raises:
        ModelError: a file is damaged, or the configuration has no shape.
    """
    config = read_config(snapshot)
    shape = architecture_of(config)
    layers, rest = [0] * shape.layers, 0
    for file in files:
        for name, tensor in read_header(snapshot / file).items():
            size = _loaded_size(tensor, "quantization_config" in config)
            found = _LAYER.search(name)
            if found and int(found[1]) < shape.layers:
                layers[int(found[1])] += size
            else:
                rest += size
    return Figures(shape, tuple(layers), rest, measured=True)


def _loaded_size(tensor: Mapping[str, Any], quantized: bool) -> int:
    """Return a tensor's bytes on the GPU: vLLM loads F32 weights in half precision."""
    start, end = tensor["data_offsets"]
    size: int = end - start
    return size // _SHRUNK.get(str(tensor["dtype"]), 1) if not quantized else size
