"""Add the GGUF header of a real model, without weights, to a models directory.

``python make_sparse_gguf.py MODELS_DIR NAME...``, with names from the catalog. The file has the
real size but is sparse: Ollama calculates the memory from the header before it loads the weights.
Tensor types are those that llama.cpp uses in a Q4_K_M file (``src/llama-quant.cpp``).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiflux.models.catalog import CatalogModel, read_catalog
from aiflux.models.gguf import TENSOR_TYPES
from aiflux.models.name import parse_model_name
from tests.tools.make_tiny_gguf import ALIGNMENT, STRING, UINT32, entry, list_entry, string

F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16, MXFP4 = 0, 1, 2, 8, 12, 14, 30, 39
_BULK = {"Q4_K_M": Q4_K, "Q4_0": Q4_0, "Q8_0": Q8_0, "F16": F16, "MXFP4": BF16}
_BETTER = {"Q4_K_M": Q6_K, "Q4_0": Q6_K, "Q8_0": Q8_0, "F16": F16, "MXFP4": BF16}
_I32 = 5


@dataclass(frozen=True)
class Tensor:
    """A tensor's name, shape (fastest dimension first) and type."""

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def size(self) -> int:
        block, size = TENSOR_TYPES[self.kind]
        values = 1
        for length in self.shape:
            values *= length
        return values * size // block


def better(layer: int, layers: int) -> bool:
    """Return whether llama.cpp uses more bits for this layer (``use_more_bits``)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensors(model: CatalogModel) -> Iterator[Tensor]:
    """Yield the tensors of a model."""
    a = model.architecture
    bulk, best = _BULK[model.quantisation], _BETTER[model.quantisation]
    yield Tensor("token_embd.weight", (a.embedding, a.vocabulary), best if model.tied else bulk)
    yield Tensor("output_norm.weight", (a.embedding,), F32)
    if not model.tied:
        yield Tensor("output.weight", (a.embedding, a.vocabulary), best)
    for layer in range(a.layers):
        more = model.quantisation == "Q4_K_M" and better(layer, a.layers)
        extra = Q6_K if more else bulk
        block = f"blk.{layer}."
        yield Tensor(block + "attn_norm.weight", (a.embedding,), F32)
        yield Tensor(block + "ffn_norm.weight", (a.embedding,), F32)
        yield Tensor(block + "attn_q.weight", (a.embedding, a.heads * a.key_size), bulk)
        yield Tensor(block + "attn_k.weight", (a.embedding, a.kv_heads * a.key_size), bulk)
        yield Tensor(block + "attn_v.weight", (a.embedding, a.kv_heads * a.value_size), extra)
        yield Tensor(block + "attn_output.weight", (a.heads * a.value_size, a.embedding), bulk)
        if a.experts:
            experts = (a.experts,)
            yield Tensor(block + "ffn_gate_inp.weight", (a.embedding, a.experts), F32)
            wide, narrow = (a.embedding, a.feed_forward), (a.feed_forward, a.embedding)
            kinds = (MXFP4,) * 3 if model.quantisation == "MXFP4" else (bulk, bulk, extra)
            yield Tensor(block + "ffn_gate_exps.weight", wide + experts, kinds[0])
            yield Tensor(block + "ffn_up_exps.weight", wide + experts, kinds[1])
            yield Tensor(block + "ffn_down_exps.weight", narrow + experts, kinds[2])
        else:
            yield Tensor(block + "ffn_gate.weight", (a.embedding, a.feed_forward), bulk)
            yield Tensor(block + "ffn_up.weight", (a.embedding, a.feed_forward), bulk)
            yield Tensor(block + "ffn_down.weight", (a.feed_forward, a.embedding), extra)


def metadata(model: CatalogModel) -> list[bytes]:
    """Return the metadata that Ollama reads before it loads the weights."""
    a = model.architecture
    numbers = {
        "block_count": a.layers,
        "context_length": a.context,
        "embedding_length": a.embedding,
        "feed_forward_length": a.feed_forward,
        "attention.head_count": a.heads,
        "attention.head_count_kv": a.kv_heads,
        "attention.key_length": a.key_size,
        "attention.value_length": a.value_size,
        "attention.sliding_window": a.sliding_window,
        "expert_count": a.experts,
        "expert_used_count": a.experts_used,
    }
    found = [
        entry("general.architecture", STRING, a.name),
        entry("general.alignment", UINT32, ALIGNMENT),
    ]
    found += [entry(f"{a.name}.{key}", UINT32, value) for key, value in numbers.items() if value]
    if a.cross_layers:
        key = f"{a.name}.attention.cross_attention_layers"
        found.append(list_entry(key, _I32, [*a.cross_layers]))
    found.append(entry("tokenizer.ggml.model", STRING, "llama"))
    found.append(list_entry("tokenizer.ggml.tokens", STRING, ["x"] * a.vocabulary))
    return found


def write_sparse(path: Path, model: CatalogModel) -> int:
    """Write the file; return its size."""
    infos, offset = [], 0
    for tensor in tensors(model):
        dims = struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape,
                           tensor.kind, offset)  # fmt: skip
        infos.append(string(tensor.name) + dims)
        offset += -(-tensor.size // ALIGNMENT) * ALIGNMENT
    entries = metadata(model)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(entries))
    head += b"".join(entries) + b"".join(infos)
    head += bytes(-len(head) % ALIGNMENT)
    path.write_bytes(head)
    os.truncate(path, len(head) + offset)
    return len(head) + offset


def install(models_dir: Path, model: CatalogModel, name: str) -> int:
    """Add such a model to a models directory; return its file size.

    Its digest is not that of the file, as nothing that only reads the header computes it.
    """
    blobs = models_dir / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(name.encode()).hexdigest()
    size = write_sparse(blobs / f"sha256-{digest}", model)
    config = {
        "model_format": "gguf", "model_family": model.architecture.name,
        "model_families": [model.architecture.name], "model_type": "", "file_type": "Q4_K_M",
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
    }  # fmt: skip
    raw = json.dumps(config).encode()
    config_digest = hashlib.sha256(raw).hexdigest()
    (blobs / f"sha256-{config_digest}").write_bytes(raw)
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json",
                   "digest": f"sha256:{config_digest}", "size": len(raw)},
        "layers": [{"mediaType": "application/vnd.ollama.image.model",
                    "digest": f"sha256:{digest}", "size": size}],
    }  # fmt: skip
    path = models_dir / parse_model_name(name).manifest_path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return size


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    catalog = read_catalog()
    for asked in sys.argv[2:]:
        found = catalog.find(asked)
        if found is None:
            raise SystemExit(f"{asked} is not in the catalog")
        print(asked, install(Path(sys.argv[1]), found, f"sparse-{asked}"))
