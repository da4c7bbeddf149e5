"""The memory of a model in vLLM, from its configuration and its weights' headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.core.config.settings import RunOptions
from aiflux.engines.vllm.kind import KIND
from aiflux.engines.vllm.memory import cache_size, divides, memory_needed
from aiflux.engines.vllm.safetensors import (
    architecture_of,
    figures_of_files,
    problem_with,
    read_header,
)
from aiflux.errors import ModelError
from aiflux.models.figures import Figures
from tests.unit.made_snapshots import LLAMA, WEIGHTS, put_folder, zeros

# Shapes of known models, from their public config.json.
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN2_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "sliding_window": 131072, "use_sliding_window": False,
    "max_window_layers": 28, "model_type": "qwen2",
}  # fmt: skip
QWEN3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
}  # fmt: skip
MISTRAL_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "sliding_window": 4096, "model_type": "mistral",
}  # fmt: skip
GEMMA3_27B = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 5376, "num_hidden_layers": 62,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
        "sliding_window": 1024, "sliding_window_pattern": 6,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16},
}  # fmt: skip
GPT_OSS_20B = {
    "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
DEEPSEEK_V3 = {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "n_routed_experts": 256, "num_experts_per_tok": 8,
}  # fmt: skip
QWEN3_NEXT_80B = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
}  # fmt: skip
GEMMA4_26B = {
    "text_config": {
        "hidden_size": 2816, "num_hidden_layers": 30, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
        "num_global_key_value_heads": 2, "global_head_dim": 512, "num_kv_shared_layers": 0,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    },
}  # fmt: skip
NEMOTRON3_NANO = {
    "hidden_size": 2688, "num_hidden_layers": 52, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 128,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}  # fmt: skip
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        (LLAMA_8B, 131_072),  # 32 layers * 8 heads * 128 * (key, value) * 2 bytes
        (QWEN2_7B, 57_344),
        (QWEN3_8B, 147_456),
        (GPT2, 36_864),
        (DEEPSEEK_V3, 70_272),  # 61 layers * (512 + 64) * 2 bytes
        (QWEN3_NEXT_80B, 24_576),  # 12 of 48 layers
        (NEMOTRON3_NANO, 6_144),  # 6 of 52 layers * 2 heads * 128 * (key, value) * 2 bytes
    ],
)
def test_bytes_of_cache_for_each_token(config: dict[str, Any], per_token: int) -> None:
    assert cache_size(architecture_of(config), 10_000) == 10_000 * per_token


@pytest.mark.parametrize(
    ("config", "unlimited", "sliding", "window"),
    [
        (MISTRAL_7B, 0, 131_072, 4096),
        (GEMMA3_27B, 10 * 8192, 52 * 8192, 1024),
        (GPT_OSS_20B, 12 * 2048, 12 * 2048, 128),
        (GEMMA4_26B, 5 * 4096, 25 * 8192, 1024),
        ({**MISTRAL_7B, "model_type": "gemma2"}, 65_536, 65_536, 4096),
        ({**MISTRAL_7B, "model_type": "unheard of"}, 131_072, 0, 4096),
    ],
)
def test_sliding_layers_need_cache_for_their_window(
    config: dict[str, Any], unlimited: int, sliding: int, window: int
) -> None:
    shape = architecture_of(config)
    kept = window + 2048  # and the tokens of a batch
    assert cache_size(shape, 100_000) == unlimited * 100_000 + sliding * kept
    assert cache_size(shape, 100) == (unlimited + sliding) * 100


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": QWEN3_8B},
        {"llm_config": QWEN3_8B, "vision_config": GPT2},
        {"thinker_config": {"text_config": QWEN3_8B, "audio_config": GPT2}},
        {"hidden_size": 1, "text_config": QWEN3_8B},
    ],
)
def test_the_text_part_of_a_model_is_used(config: dict[str, Any]) -> None:
    shape = architecture_of(config)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.key_size) == (36, 32, 8, 128)


def test_layers_that_share_a_cache_have_none() -> None:
    text = {**GEMMA4_26B["text_config"], "num_kv_shared_layers": 12}
    shape = architecture_of({"text_config": text})
    assert cache_size(shape, 100) == 100 * (3 * 4096 + 15 * 8192)


def test_experts() -> None:
    assert architecture_of(GPT_OSS_20B).experts == 32
    assert architecture_of(DEEPSEEK_V3).experts == 256
    assert architecture_of(QWEN3_NEXT_80B).experts_used == 10


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": None}, {"num_hidden_layers": 10**12}, {"num_hidden_layers": "32"},
        {"num_hidden_layers": True}, {"hidden_size": -1}, {"num_attention_heads": 0},
        {"hidden_size": 4096.0},
    ],
)  # fmt: skip
def test_a_configuration_without_an_architecture_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="num_hidden_layers"):
        architecture_of({**LLAMA_8B, **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([*LLAMA_8B, "head_dim", "layer_types", "sliding_window", "text_config",
                         "sliding_window_pattern", "architectures", "kv_lora_rank"]), JSON
    )
)  # fmt: skip
def test_no_configuration_is_a_bug(config: dict[str, Any]) -> None:
    """The result is an architecture or a ModelError."""
    try:
        shape = architecture_of({**LLAMA_8B, **config})
    except ModelError:
        return
    assert cache_size(shape, 1000) >= 0


def weights_of(tmp_path: Path, dtype: str, config: dict[str, Any] | None = None) -> Figures:
    content = zeros(
        {
            "model.embed_tokens.weight": (dtype, [32, 64]),
            "model.layers.0.mlp.weight": (dtype, [64, 64]),
            "model.layers.1.mlp.weight": (dtype, [64, 64]),
            "model.layers.7.mtp.weight": (dtype, [64, 1]),
        }
    )
    folder = put_folder(tmp_path / "m", {**LLAMA, **(config or {})}, content)
    return figures_of_files(folder, ["model.safetensors"])


@pytest.mark.parametrize(
    ("dtype", "bytes_each"),
    [("BF16", 2), ("F16", 2), ("F32", 2), ("F64", 2), ("F8_E4M3", 1), ("U8", 1)],
)
def test_weights_by_layer_as_vllm_loads_them(tmp_path: Path, dtype: str, bytes_each: int) -> None:
    """At most half precision, unless a quantised model has scales in single precision."""
    figures = weights_of(tmp_path, dtype)
    assert figures.layers == (4096 * bytes_each, 4096 * bytes_each)
    assert figures.output == (2048 + 64) * bytes_each
    assert figures.measured


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "compressed-tensors"])
def test_quantised_weights_keep_their_size(tmp_path: Path, method: str) -> None:
    figures = weights_of(tmp_path, "F32", {"quantization_config": {"quant_method": method}})
    assert figures.layers == (4096 * 4, 4096 * 4)


def test_the_memory_of_a_known_model() -> None:
    """Llama 3.1 8B in BF16: 16.06 GB of weights (model.safetensors.index.json), on 24 GB."""
    shape = architecture_of(LLAMA_8B)
    figures = Figures(shape, (16_060_522_496 // 32,) * 32, 0, measured=True)
    one = memory_needed(figures, 8192, 1, 1)
    assert one == int((16_060_522_496 + 8192 * 131_072 + (3 << 29)) / 0.92)
    assert one < 24e9
    assert memory_needed(figures, 8192, 2, 1) == one  # two usual requests are as one of the longest
    assert memory_needed(figures, 8192, 64, 1) > 50e9
    assert memory_needed(figures, 131_072, 1, 1) > 24e9
    # Keys and values are divided among up to eight GPUs, and then repeated.
    cache = 8192 * 131_072 / 0.92
    eight, sixteen = (memory_needed(figures, 8192, 1, gpus) for gpus in (8, 16))
    assert sixteen - eight == pytest.approx(cache + 8 * (3 << 29) / 0.92, abs=2)
    assert KIND.memory_needed(figures, 8192, 1, 1, RunOptions(model="m")) == one


@pytest.mark.parametrize(
    ("config", "possible"),
    [
        (LLAMA_8B, {1, 2, 4, 8, 16}),
        (QWEN2_7B, {1, 2, 4}),  # 28 heads, of which 7, 14 and 28 divide, but not 4 of keys
        ({**LLAMA_8B, "num_attention_heads": 9, "num_key_value_heads": 3}, {1, 3, 9}),
        (DEEPSEEK_V3, {1, 2, 4, 8, 16}),
    ],
)
def test_gpus_that_divide_a_model(config: dict[str, Any], possible: set[int]) -> None:
    shape = architecture_of(config)
    assert {gpus for gpus in range(1, 17) if divides(shape, gpus)} == possible


def header(content: object) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "incomplete: it has 0 bytes"),
        (b"\x05\x00", "incomplete: it has 2 bytes"),
        (struct.pack("<Q", 2**63), "not a safetensors file"),
        (struct.pack("<Q", 101 << 20), "not a safetensors file"),
        (struct.pack("<Q", 50) + b"{}", "it ends in its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "not a safetensors file"),
        (b"GGUF\x03\x00\x00\x00", "not a safetensors file"),
        (header([]), "damaged"),
        (header({"a": {"data_offsets": [0, 4]}}) + bytes(4), "damaged"),
        (header({"a": {"dtype": "F32", "data_offsets": [4, 0]}}), "damaged"),
        (header({"a": {"dtype": "F32", "data_offsets": [-4, 0]}}), "damaged"),
        (header({"a": {"dtype": "F32", "data_offsets": ["0", "4"]}}), "damaged"),
        (header({"a": {"dtype": "F32", "data_offsets": 4}}), "damaged"),
        (header({"a": {"dtype": "F32", "data_offsets": [0, 1e300]}}), "damaged"),
        (header({"a": {"dtype": "F32", "data_offsets": [0, 2**60]}}), f"bytes of {73 + 2**60}"),
        (WEIGHTS[:-1], "bytes of"),
        (WEIGHTS + b"\0", "its header describes"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"[" * 16, "damaged"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "damaged"),
    ],
    ids=range(19),
)
def test_incomplete_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_header(path)
    assert problem_with(path)


def test_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WEIGHTS)
    assert problem_with(path) is None
    assert len(read_header(path)) == 3
    path.write_bytes(header({"__metadata__": {"format": "pt"}}))
    assert read_header(path) == {}


@given(st.binary(max_size=64), st.integers(min_value=0, max_value=len(WEIGHTS)))
def test_no_damage_is_a_bug(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    """A file with changed bytes is accepted or a ModelError."""
    path = tmp_path_factory.mktemp("noise") / "model.safetensors"
    path.write_bytes(WEIGHTS[:at] + noise + WEIGHTS[at + len(noise) :])
    problem_with(path)
