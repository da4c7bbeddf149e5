"""Write small random LoRA adapters: a directory in PEFT's format, and a GGUF file of llama.cpp."""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.tools import make_tiny_gguf as tiny

from ggufwriter import FLOAT32, gguf  # isort: skip  # make_tiny_gguf puts it on the path

PARTS = ("q", "v")


def safetensors(tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    """Return a file with tensors, by name: their dtype, shape and values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, data) in tensors.items():
        end = place + len(data)
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    values = b"".join(data for _, _, data in tensors.values())
    return struct.pack("<Q", len(text)) + text + values


def _noise(rng: random.Random, count: int) -> array[float]:
    return array("f", [rng.gauss(0.0, 0.5) for _ in range(count)])


def put_peft(
    folder: Path,
    model: Mapping[str, Any],
    rank: int = 4,
    *,
    seed: int = 1,
    width: int | None = None,
    layers: int | None = None,
    **config: Any,
) -> Path:
    """Write an adapter for a model with this ``config.json``.

    Args:
        width, layers: those of another model.
        config: settings of ``adapter_config.json`` to change.
    """
    rng = random.Random(seed)
    hidden = width or model["hidden_size"]
    head = model["hidden_size"] // model["num_attention_heads"]
    out = {"q": model["hidden_size"], "v": head * model["num_key_value_heads"]}
    tensors: dict[str, tuple[str, Sequence[int], bytes]] = {}
    for layer in range(layers or model["num_hidden_layers"]):
        for part in PARTS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            shapes = {"A": (rank, hidden), "B": (out[part], rank)}
            for letter, shape in shapes.items():
                noise = _noise(rng, shape[0] * shape[1]).tobytes()
                tensors[f"{name}.lora_{letter}.weight"] = "F32", shape, noise
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4 * rank,
        "target_modules": [f"{part}_proj" for part in PARTS], "lora_dropout": 0.0, "bias": "none",
        "base_model_name_or_path": "org/tiny", **config,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    return folder


def gguf_adapter(architecture: str = "llama", *, seed: int = 1) -> bytes:
    """Return an adapter for the model of ``make_tiny_gguf``."""
    rank = 4
    rng = random.Random(seed)
    entries = [
        tiny.entry("general.architecture", tiny.STRING, architecture),
        tiny.entry("general.type", tiny.STRING, "adapter"),
        tiny.entry("adapter.type", tiny.STRING, "lora"),
        tiny.entry("adapter.lora.alpha", FLOAT32, 4.0 * rank),
    ]
    tensors = {}
    for layer in range(tiny.LAYERS):
        name = f"blk.{layer}.attn_q.weight"
        for letter, shape in (("a", (tiny.WIDTH, rank)), ("b", (rank, tiny.WIDTH))):
            tensors[f"{name}.lora_{letter}"] = shape, _noise(rng, rank * tiny.WIDTH)
    return gguf(entries, tensors)
