"""Write a random Llama of half a megabyte: ``python make_tiny_gguf.py OUT.gguf [embeddings]``.

Ollama treats it as a real model (chat, completions and embeddings, or embeddings only). For tests
where the generated text does not matter. The output is always the same.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "container" / "demo-model"))

from ggufwriter import (
    ALIGNMENT,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    entry,
    gguf,
    list_entry,
    string,
)

__all__ = [
    "ALIGNMENT",
    "BOOL",
    "FLOAT32",
    "INT32",
    "STRING",
    "TOKENS",
    "UINT32",
    "entry",
    "gguf",
    "list_entry",
    "string",
    "tiny",
]

LAYERS, HEADS, HEAD_SIZE, FEED_FORWARD, CONTEXT = 2, 4, 16, 128, 8192
WIDTH = HEADS * HEAD_SIZE
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Token types of ``tokenizer.ggml.token_type``."""

PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *PRINTABLE]
TYPES = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * (1 + len(PRINTABLE)))]


def metadata(architecture: str) -> list[bytes]:
    """Return the metadata that Ollama reads before it loads the tensors."""
    return [
        entry("general.architecture", STRING, architecture),
        entry("general.name", STRING, "tiny"),
        entry("general.alignment", UINT32, ALIGNMENT),
        entry("general.file_type", UINT32, 0),
        entry(f"{architecture}.block_count", UINT32, LAYERS),
        entry(f"{architecture}.context_length", UINT32, CONTEXT),
        entry(f"{architecture}.embedding_length", UINT32, WIDTH),
        entry(f"{architecture}.feed_forward_length", UINT32, FEED_FORWARD),
        entry(f"{architecture}.attention.head_count", UINT32, HEADS),
        entry(f"{architecture}.attention.head_count_kv", UINT32, HEADS),
        entry(f"{architecture}.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        entry(f"{architecture}.rope.dimension_count", UINT32, HEAD_SIZE),
        entry(f"{architecture}.vocab_size", UINT32, len(TOKENS)),
        entry("tokenizer.ggml.model", STRING, "llama"),
        list_entry("tokenizer.ggml.tokens", STRING, [*TOKENS]),
        list_entry("tokenizer.ggml.scores", FLOAT32, [0.0] * len(TOKENS)),
        list_entry("tokenizer.ggml.token_type", INT32, [*TYPES]),
        entry("tokenizer.ggml.bos_token_id", UINT32, 1),
        entry("tokenizer.ggml.eos_token_id", UINT32, 2),
        entry("tokenizer.ggml.unknown_token_id", UINT32, 0),
        entry("tokenizer.ggml.add_bos_token", BOOL, True),
    ]


def shapes() -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape, fastest dimension first."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WIDTH, len(TOKENS)),
        "output_norm.weight": (WIDTH,),
        "output.weight": (WIDTH, len(TOKENS)),
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        found |= {
            block + "attn_norm.weight": (WIDTH,),
            block + "ffn_norm.weight": (WIDTH,),
            block + "ffn_gate.weight": (WIDTH, FEED_FORWARD),
            block + "ffn_up.weight": (WIDTH, FEED_FORWARD),
            block + "ffn_down.weight": (FEED_FORWARD, WIDTH),
        }
        found |= {f"{block}attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v")}
        found[block + "attn_output.weight"] = (WIDTH, WIDTH)
    return found


def values(name: str, shape: tuple[int, ...], rng: random.Random) -> array[float]:
    """Return a tensor's values: norms are 1, and only printable tokens (not EOS) get a logit."""
    if len(shape) == 1:
        return array("f", [1.0] * shape[0])
    rows = [[rng.gauss(0.0, 0.2) for _ in range(shape[0])] for _ in range(shape[1])]
    if name == "output.weight":
        rows = [row if TYPES[i] == NORMAL else [0.0] * shape[0] for i, row in enumerate(rows)]
    return array("f", [value for row in rows for value in row])


def tiny(architecture: str = "llama", more: Sequence[bytes] = ()) -> bytes:
    """Return the complete file.

    Args:
        architecture: the declared architecture; only a llama can be loaded.
        more: additional metadata entries.
    """
    rng = random.Random(20240101)
    tensors = {name: (shape, values(name, shape, rng)) for name, shape in shapes().items()}
    return gguf([*metadata(architecture), *more], tensors)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["embeddings"]):
        raise SystemExit(__doc__)
    pooling = [entry("llama.pooling_type", UINT32, 1)] if sys.argv[2:] else []
    Path(sys.argv[1]).write_bytes(tiny(more=pooling))
