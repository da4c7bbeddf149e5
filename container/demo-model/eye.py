"""Write an untrained vision part for a Llama: ``python eye.py OUT.gguf WIDTH``.

A small projector like LLaVA's (a CLIP encoder and two layers to the language model's WIDTH) with
reproducible random weights. A model with it accepts images as real vision models do, but its
answers are unrelated to them. Keys and tensors: llama.cpp, tools/mtmd/clip.cpp.
"""

from __future__ import annotations

import math
import random
import sys
from array import array
from pathlib import Path

from ggufwriter import ALIGNMENT, BOOL, FLOAT32, STRING, UINT32, entry, gguf, list_entry

IMAGE, PATCH, CHANNELS = 56, 14, 3
"""Side length of an image and of a patch in pixels; every image becomes 16 tokens."""
LAYERS, HEADS, WIDTH, FEED_FORWARD = 2, 4, 64, 128

_MEAN, _STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def metadata(text_width: int) -> list[bytes]:
    """Return the metadata by which Ollama recognizes and loads a vision part."""
    vision = {
        "image_size": IMAGE, "patch_size": PATCH, "embedding_length": WIDTH,
        "feed_forward_length": FEED_FORWARD, "projection_dim": text_width,
        "block_count": LAYERS, "attention.head_count": HEADS,
    }  # fmt: skip
    return [
        entry("general.architecture", STRING, "clip"),
        entry("general.type", STRING, "projector"),
        entry("general.name", STRING, "untrained eye"),
        entry("general.alignment", UINT32, ALIGNMENT),
        entry("general.file_type", UINT32, 0),
        entry("clip.has_text_encoder", BOOL, False),
        entry("clip.has_vision_encoder", BOOL, True),
        entry("clip.has_llava_projector", BOOL, True),
        entry("clip.projector_type", STRING, "mlp"),
        entry("clip.use_gelu", BOOL, True),
        *(entry(f"clip.vision.{key}", UINT32, value) for key, value in vision.items()),
        entry("clip.vision.attention.layer_norm_epsilon", FLOAT32, 1e-5),
        list_entry("clip.vision.image_mean", FLOAT32, _MEAN),
        list_entry("clip.vision.image_std", FLOAT32, _STD),
    ]


def shapes(text_width: int) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape, fastest dimension first."""
    places = (IMAGE // PATCH) ** 2 + 1
    found: dict[str, tuple[int, ...]] = {
        "v.class_embd": (WIDTH,),
        "v.patch_embd.weight": (PATCH, PATCH, CHANNELS, WIDTH),
        "v.position_embd.weight": (WIDTH, places),
        **_pair("v.pre_ln", WIDTH),
    }
    for layer in range(LAYERS):
        block = f"v.blk.{layer}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            found |= _pair(block + part, WIDTH, WIDTH)
        found |= _pair(block + "ln1", WIDTH) | _pair(block + "ln2", WIDTH)
        # LLaVA's names: ffn_down is the first of the two.
        found |= _pair(block + "ffn_down", WIDTH, FEED_FORWARD)
        found |= _pair(block + "ffn_up", FEED_FORWARD, WIDTH)
    found |= _pair("mm.0", WIDTH, text_width) | _pair("mm.2", text_width, text_width)
    return found


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}


def numbers(name: str, shape: tuple[int, ...], rng: random.Random) -> array[float]:
    """Return a tensor's values: neutral norms, and noise of equal strength elsewhere."""
    count = math.prod(shape)
    if len(shape) == 1:
        return array("f", [1.0 if name.endswith(".weight") else 0.0]) * count
    # Word embeddings are about as small, so the image does not drown out the text.
    strength = 0.005 if name == "mm.2.weight" else 0.1
    return array("f", (rng.gauss(0.0, strength) for _ in range(count)))


def eye(text_width: int) -> bytes:
    """Return the complete file."""
    rng = random.Random(20240101)
    tensors = {
        name: (shape, numbers(name, shape, rng)) for name, shape in shapes(text_width).items()
    }
    return gguf(metadata(text_width), tensors)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        raise SystemExit(__doc__)
    Path(sys.argv[1]).write_bytes(eye(int(sys.argv[2])))
