"""Create models of realistic shape with random weights, as GGUF or Hugging Face directory.

Speed depends on shapes, not on the values of weights. The end-of-text token and all tokens that
are not whole words have a zero row in the output matrix. They are never chosen, so an answer has
the requested length.

Every word of the vocabulary is a single token in both tokenizers: a prompt of N words has N tokens.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bench.children import ROOT

sys.path.insert(0, str(ROOT / "container" / "demo-model"))

from ggufwriter import (
    ALIGNMENT,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    entry,
    list_entry,
    padded,
    string,
)

_BYTES = 256
_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
_NORMAL, _CONTROL = 1, 3
_GGUF_F32, _GGUF_Q8_0 = 0, 8
_MOSTLY_Q8_0 = 7
_ROPE_BASE, _EPSILON = 500000.0, 1e-5
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"
_CHUNK = 1 << 25
WriteTo = Callable[[BinaryIO], None]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int = 128256
    context: int = 8192

    @property
    def kv_width(self) -> int:
        """Width of keys and values."""
        return self.width // self.heads * self.kv_heads

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors, in file order."""
        width, feed = self.width, self.feed_forward
        found = [
            Tensor("token_embd", "model.embed_tokens", self.vocabulary, width),
            Tensor("output_norm", "model.norm", 0, width),
            Tensor("output", "lm_head", self.vocabulary, width),
        ]
        parts = (
            ("attn_norm", "input_layernorm", 0, width),
            ("attn_q", "self_attn.q_proj", width, width),
            ("attn_k", "self_attn.k_proj", self.kv_width, width),
            ("attn_v", "self_attn.v_proj", self.kv_width, width),
            ("attn_output", "self_attn.o_proj", width, width),
            ("ffn_norm", "post_attention_layernorm", 0, width),
            ("ffn_gate", "mlp.gate_proj", feed, width),
            ("ffn_up", "mlp.up_proj", feed, width),
            ("ffn_down", "mlp.down_proj", width, feed),
        )
        for layer in range(self.layers):
            found += [
                Tensor(f"blk.{layer}.{gguf}", f"model.layers.{layer}.{hf}", rows, columns)
                for gguf, hf, rows, columns in parts
            ]
        return found


@dataclass(frozen=True)
class Tensor:
    """One tensor under its two names; a norm has 0 rows."""

    gguf: str
    hf: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return max(1, self.rows) * self.columns


SHAPES = {
    "8b": Shape(layers=32, width=4096, heads=32, kv_heads=8, feed_forward=14336),
    "7b": Shape(32, width=4096, heads=32, kv_heads=8, feed_forward=14336, vocabulary=32768),
    "1b": Shape(16, width=2048, heads=32, kv_heads=8, feed_forward=8192, vocabulary=32768),
    "135m": Shape(30, width=576, heads=9, kv_heads=3, feed_forward=1536, vocabulary=16384),
    "tiny": Shape(layers=2, width=256, heads=4, kv_heads=2, feed_forward=512, vocabulary=2048),
}
"""Llama 3 8B, Mistral 7B v0.3, Llama 3.2 1B and SmolLM2 135M with smaller vocabularies, and one for
tests."""


def word(number: int) -> str:
    """Return the word of a number: four letters."""
    letters = ""
    for _ in range(4):
        number, letter = divmod(number, 26)
        letters = chr(ord("a") + letter) + letters
    return letters


def words(shape: Shape) -> int:
    """Return how many words the vocabulary has."""
    return shape.vocabulary - _BYTES - len(_SPECIAL)


def _vocabulary(shape: Shape) -> list[str]:
    """Return all tokens: the 256 bytes as GPT-2 writes them, words after a blank, specials."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(_BYTES) if byte not in plain]
    letters = dict(zip(plain, map(chr, plain), strict=True))
    letters |= {byte: chr(_BYTES + place) for place, byte in enumerate(rest)}
    return [
        *(letters[byte] for byte in range(_BYTES)),
        *(f"Ġ{word(number)}" for number in range(words(shape))),
        *_SPECIAL,
    ]


def _never_chosen(tensor: Tensor, first: int, count: int) -> np.ndarray:
    """Return for ``count`` rows from ``first`` whether they are zero."""
    rows = np.arange(first, first + count)
    outside = (rows < _BYTES) | (rows >= tensor.rows - len(_SPECIAL))
    return outside if tensor.hf == "lm_head" else np.zeros(count, bool)


def _row_chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // tensor.columns)
    for first in range(0, tensor.rows, step):
        yield first, min(step, tensor.rows - first)


def _write_whole(path: Path, write: WriteTo) -> None:
    """Write a temporary file and rename it, so that a file with this name is complete."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def make_gguf(path: Path, shape: Shape) -> None:
    """Write a GGUF file in Q8_0: blocks of 32 bytes with a 16-bit scale."""
    rng = np.random.default_rng(0)

    def write(file: BinaryIO) -> None:
        file.write(_gguf_head(shape))
        for tensor in shape.tensors:
            if tensor.rows == 0:
                file.write(padded(np.ones(tensor.columns, "<f4").tobytes()))
                continue
            for first, count in _row_chunks(tensor):
                file.write(_q8_0(rng, tensor, first, count))

    _write_whole(path, write)


def _q8_0(rng: np.random.Generator, tensor: Tensor, first: int, count: int) -> bytes:
    per_row = tensor.columns // 32
    blocks = np.empty((count * per_row, 34), np.uint8)
    scales = np.full((count, per_row), 0.02 / 73, "<f2")
    scales[_never_chosen(tensor, first, count)] = 0
    blocks[:, :2] = scales.reshape(-1, 1).view(np.uint8)
    blocks[:, 2:] = np.frombuffer(rng.bytes(len(blocks) * 32), np.uint8).reshape(-1, 32)
    return blocks.tobytes()


def _gguf_head(shape: Shape) -> bytes:
    entries = _gguf_metadata(shape)
    infos, offset = [], 0
    for tensor in shape.tensors:
        kind = _GGUF_Q8_0 if tensor.rows else _GGUF_F32
        sizes = (tensor.columns, tensor.rows) if tensor.rows else (tensor.columns,)
        form = f"<I{len(sizes)}QIQ"
        infos.append(
            string(tensor.gguf + ".weight") + struct.pack(form, len(sizes), *sizes, kind, offset)
        )
        offset += tensor.size // 32 * 34 if tensor.rows else tensor.size * 4
        offset += -offset % ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries))
    return padded(head + b"".join(entries) + b"".join(infos))


def _gguf_metadata(shape: Shape) -> list[bytes]:
    tokens = _vocabulary(shape)
    kinds = [_NORMAL] * (len(tokens) - len(_SPECIAL)) + [_CONTROL] * len(_SPECIAL)
    return [
        entry("general.architecture", STRING, "llama"),
        entry("general.name", STRING, "random"),
        entry("general.alignment", UINT32, ALIGNMENT),
        entry("general.file_type", UINT32, _MOSTLY_Q8_0),
        entry("llama.block_count", UINT32, shape.layers),
        entry("llama.context_length", UINT32, shape.context),
        entry("llama.embedding_length", UINT32, shape.width),
        entry("llama.feed_forward_length", UINT32, shape.feed_forward),
        entry("llama.attention.head_count", UINT32, shape.heads),
        entry("llama.attention.head_count_kv", UINT32, shape.kv_heads),
        entry("llama.attention.layer_norm_rms_epsilon", FLOAT32, _EPSILON),
        entry("llama.rope.dimension_count", UINT32, shape.width // shape.heads),
        entry("llama.rope.freq_base", FLOAT32, _ROPE_BASE),
        entry("llama.vocab_size", UINT32, shape.vocabulary),
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, "llama-bpe"),  # does not split words that are tokens
        list_entry("tokenizer.ggml.tokens", STRING, [*tokens]),
        list_entry("tokenizer.ggml.token_type", INT32, [*kinds]),
        list_entry("tokenizer.ggml.merges", STRING, ["a a"]),  # at least one is required
        entry("tokenizer.ggml.bos_token_id", UINT32, shape.vocabulary - 2),
        entry("tokenizer.ggml.eos_token_id", UINT32, shape.vocabulary - 1),
        entry("tokenizer.ggml.add_bos_token", BOOL, True),
        entry("tokenizer.chat_template", STRING, _TEMPLATE),
    ]


def make_hf(folder: Path, shape: Shape) -> None:
    """Write a Hugging Face directory in bfloat16; config.json comes last and marks it complete."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def write(file: BinaryIO) -> None:
        file.write(_safetensors_head(shape))
        for tensor in shape.tensors:
            if tensor.rows == 0:
                file.write(np.full(tensor.columns, 0x3F80, "<u2").tobytes())
                continue
            for first, count in _row_chunks(tensor):
                file.write(_bfloat16(rng, tensor, first, count))

    _write_whole(folder / "model.safetensors", write)
    for name, content in _hf_files(shape).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _bfloat16(rng: np.random.Generator, tensor: Tensor, first: int, count: int) -> bytes:
    """Return random signs and mantissas with one exponent: from 1/64 to 1/32."""
    bits = np.frombuffer(rng.bytes(count * tensor.columns * 2), "<u2") & 0x807F | 0x3C80
    bits = bits.reshape(count, tensor.columns)
    bits[_never_chosen(tensor, first, count)] = 0
    return bits.tobytes()


def _safetensors_head(shape: Shape) -> bytes:
    infos, offset = {}, 0
    for tensor in shape.tensors:
        end = offset + tensor.size * 2
        sizes = [tensor.rows, tensor.columns] if tensor.rows else [tensor.columns]
        infos[tensor.hf + ".weight"] = {
            "dtype": "BF16",
            "shape": sizes,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | infos).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _hf_files(shape: Shape) -> Mapping[str, object]:
    """Return the JSON files; no end-of-text token is declared, so nothing ends an answer early."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": _EPSILON,
        "rope_theta": _ROPE_BASE,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": shape.vocabulary - 2,
        "eos_token_id": None,
    }
    names = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]}
    return {
        "tokenizer.json": _hf_tokenizer(shape),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.context,
            "chat_template": _TEMPLATE,
            **names,
        },
        "generation_config.json": {"bos_token_id": shape.vocabulary - 2, "do_sample": False},
        "config.json": config,
    }


def _hf_tokenizer(shape: Shape) -> dict[str, object]:
    tokens = _vocabulary(shape)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": _SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    special = [
        {
            "id": tokens.index(name),
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name in _SPECIAL
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [],
        },
    }
