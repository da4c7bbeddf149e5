"""Write a random Llama as Hugging Face stores it: ``python make_tiny_snapshot.py FOLDER``.

vLLM serves it on a CPU. For tests in which the words of the answers do not matter. The output is
always the same.
"""

from __future__ import annotations

import json
import random
import sys
from array import array
from math import prod
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.tools.make_adapters import safetensors

LAYERS, WIDTH, FEED_FORWARD, CONTEXT = 2, 64, 128, 8192
HEAD_SIZE = 32  # the smallest of vLLM's CPU build
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies, as in GPT-2's."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(0x100)]


def tokenizer() -> dict[str, Any]:
    """Return a tokenizer with one token for each byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    special = [
        {"id": at, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for at, text in enumerate(SPECIAL)
    ]  # fmt: skip
    words = {text: at for at, text in enumerate([*SPECIAL, *byte_letters()])}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": words, "merges": []},
    }  # fmt: skip


def config(heads: int = 2, labels: int = 0) -> dict[str, Any]:
    """Return the content of ``config.json``; with labels, of a model that classifies a text."""
    names = {str(at): f"LABEL_{at}" for at in range(labels)}
    head = {"id2label": names, "label2id": {name: int(at) for at, name in names.items()}}
    use = "SequenceClassification" if labels else "CausalLM"
    return {
        **(head if labels else {}),
        "architectures": [f"LlamaFor{use}"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": WIDTH, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HEAD_SIZE,
        "vocab_size": len(SPECIAL) + 0x100, "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def shapes(heads: int = 2, labels: int = 0) -> dict[str, list[int]]:
    """Return the shape of each tensor."""
    attention = heads * HEAD_SIZE
    found = {"model.embed_tokens.weight": [len(SPECIAL) + 0x100, WIDTH]}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        found |= {
            f"{start}input_layernorm.weight": [WIDTH],
            f"{start}self_attn.q_proj.weight": [attention, WIDTH],
            f"{start}self_attn.k_proj.weight": [attention, WIDTH],
            f"{start}self_attn.v_proj.weight": [attention, WIDTH],
            f"{start}self_attn.o_proj.weight": [WIDTH, attention],
            f"{start}post_attention_layernorm.weight": [WIDTH],
            f"{start}mlp.gate_proj.weight": [FEED_FORWARD, WIDTH],
            f"{start}mlp.up_proj.weight": [FEED_FORWARD, WIDTH],
            f"{start}mlp.down_proj.weight": [WIDTH, FEED_FORWARD],
        }
    head = {"score.weight": [labels, WIDTH]} if labels else {}
    return {**found, "model.norm.weight": [WIDTH], **head}


def tiny_files(heads: int = 2, labels: int = 0) -> dict[str, bytes]:
    """Return the files of the model by their names."""
    rng = random.Random(1)
    tensors = {
        name: ("F32", shape, array("f", (
            1.0 if len(shape) == 1 else rng.gauss(0.0, 0.1) for _ in range(prod(shape))
        )).tobytes())
        for name, shape in shapes(heads, labels).items()
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE,
        "model_max_length": CONTEXT,
    }  # fmt: skip
    return {
        "config.json": json.dumps(config(heads, labels)).encode(),
        "model.safetensors": safetensors(tensors),
        "tokenizer.json": json.dumps(tokenizer()).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def put_tiny(folder: Path, heads: int = 2, labels: int = 0) -> Path:
    """Write the model's directory; one label is a score."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tiny_files(heads, labels).items():
        (folder / name).write_bytes(content)
    return folder


if __name__ == "__main__":
    put_tiny(Path(sys.argv[1]))
