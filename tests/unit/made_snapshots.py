"""Create small models of Hugging Face: directories, and hub caches with snapshots of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from tests.tools.fake_hub import LARGE, git_hash
from tests.tools.make_adapters import safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4}


def zeros(tensors: Mapping[str, tuple[str, list[int]]]) -> bytes:
    """Return a file with tensors of zeros, by name: their dtype and shape."""
    return safetensors(
        {
            name: (dtype, shape, bytes(_BYTES[dtype] * prod(shape)))
            for name, (dtype, shape) in tensors.items()
        }
    )


WEIGHTS = zeros(
    {
        "model.embed_tokens.weight": ("BF16", [32, 64]),
        "model.layers.0.mlp.weight": ("BF16", [64, 64]),
        "model.layers.1.mlp.weight": ("BF16", [64, 64]),
    }
)


def put_folder(folder: Path, config: Mapping[str, Any] = LLAMA, weights: bytes = WEIGHTS) -> Path:
    """Write a model's directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_bytes(b"{}")
    return folder


def put_snapshot(cache: Path, repo: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """Write a snapshot into a hub cache; a branch or tag may name it."""
    return put_folder(_store(cache, repo, commit, ref) / "snapshots" / commit)


def put_pulled(cache: Path, repo: str, files: Mapping[str, bytes]) -> Path:
    """Write a snapshot as a pull leaves it: its files are links to blobs named by their hashes."""
    store = _store(cache, repo, COMMIT, "main")
    folder = store / "snapshots" / COMMIT
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        large = len(content) >= LARGE
        blob = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        (store / "blobs" / blob).write_bytes(content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to("../" * (name.count("/") + 2) + f"blobs/{blob}")
    return folder


def _store(cache: Path, repo: str, commit: str, ref: str | None) -> Path:
    """Return the folder of a repository in a hub cache; a branch or tag may name a commit."""
    store = cache / f"models--{repo.replace('/', '--')}"
    if ref is not None:
        path = store / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="ascii")
    return store
