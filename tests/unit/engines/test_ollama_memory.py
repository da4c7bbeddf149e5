"""The memory formula, and the reader of the headers it uses.

The figures of SmolLM2 are those that Ollama 0.9.3 logged of it; tests/integration/test_memory.py
holds the formula to Ollama itself.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.settings import RunOptions
from aiflux.engines.ollama.kind import KIND
from aiflux.engines.ollama.memory import estimate, has_one_slot, layer_caches
from aiflux.engines.ollama.store import known_figures, stored_model
from aiflux.engines.sizing import gpus_needed
from aiflux.errors import ModelError
from aiflux.models.catalog import read_catalog
from aiflux.models.figures import Architecture, Figures, figures_of, shape_of
from aiflux.models.gguf import GgufHeader, read_gguf
from aiflux.models.name import parse_model_name
from tests.tools import make_tiny_gguf
from tests.tools.make_sparse_gguf import install, write_sparse

MIB = 2**20
GB = 10**9
SMOLLM2 = Figures(
    Architecture("llama", 30, 576, 9, 3, 64, 64, vocabulary=49152, context=8192),
    layers=(2217216,) * 30,
    output=30083328,
)


def known(name: str) -> Figures:
    model = read_catalog().find(name)
    assert model is not None
    return model.figures


@pytest.mark.parametrize(
    ("context", "slots", "total", "cache", "graph"),
    [(2048, 1, 237.8, 45, 97.1), (8192, 1, 444.7, 180, 164.5), (2048, 4, 444.7, 180, 164.5)],
)
def test_smollm2_as_ollama_logged_it(
    context: int, slots: int, total: float, cache: float, graph: float
) -> None:
    memory = estimate(SMOLLM2, context, slots, gpu_overhead=0)
    assert memory.total / MIB == pytest.approx(total, abs=0.1)
    assert memory.cache / MIB == cache
    assert memory.graph / MIB == pytest.approx(graph, abs=0.06)


def test_more_context_than_a_model_was_trained_for_needs_no_memory() -> None:
    assert estimate(SMOLLM2, 99999, 2) == estimate(SMOLLM2, 8192, 2)


@pytest.mark.parametrize("name", ["bge-m3:567m", "embeddinggemma:300m", "qwen3-vl:8b"])
def test_models_that_ollama_runs_with_one_slot_need_the_memory_of_one(name: str) -> None:
    figures = known(name)
    assert has_one_slot(figures.architecture)
    assert estimate(figures, 8192, 16) == estimate(figures, 8192, 1)


@pytest.mark.parametrize(
    ("architecture", "more", "single"),
    [
        ("llama", [], False),
        ("qwen3", [], False),
        ("qwen35", [], True),
        ("nemotron_h_omni", [], True),
        ("gemma3", [], False),
        ("gemma3", ["pooling_type"], True),
        ("qwen3", ["pooling_type"], True),
    ],
)
def test_a_models_own_file_shows_whether_it_gets_one_slot(
    tmp_path: Path, architecture: str, more: list[str], single: bool
) -> None:
    path = tmp_path / "model.gguf"
    entries = [
        make_tiny_gguf.entry(f"{architecture}.{key}", make_tiny_gguf.UINT32, 1) for key in more
    ]
    path.write_bytes(make_tiny_gguf.tiny(architecture, entries))
    assert has_one_slot(figures_of(read_gguf(path)).architecture) is single


def test_sliding_layers_need_less_cache() -> None:
    gemma = known("gemma3:27b")
    long, short = (estimate(gemma, context, 1).cache for context in (131072, 4096))
    token = 2 * 128 * 16 * 2
    assert long == (10 * 131072 + 52 * (1024 + 512)) * token
    assert short == (10 * 4096 + 52 * (1024 + 512)) * token


def test_a_smaller_cache_type_is_used() -> None:
    half = estimate(SMOLLM2, 2048, 4, cache_type="q8_0").cache
    assert half * 2 == estimate(SMOLLM2, 2048, 4).cache


def test_the_minimum_is_less() -> None:
    for name in ("llama3.1:8b", "gemma2:9b", "gpt-oss:20b", "qwen2.5:32b"):
        figures = known(name)
        least = estimate(figures, 16384, 4, flash=True)
        assert least.total < estimate(figures, 16384, 4).total


@pytest.mark.parametrize(
    ("name", "capacity", "gpus"),
    [
        ("llama3.1:8b", 24, 1),
        ("llama3.3:70b", 80, 1),
        ("llama3.3:70b", 40, 2),
        ("llama3.3:70b", 24, 2),
        ("llama3.3:70b", 16, 3),
        ("llama3.1:405b", 80, 4),
        ("gpt-oss:120b", 80, 1),
        ("llama3.1:405b", 8, None),
    ],
)
def test_the_number_of_gpus_for_a_model(name: str, capacity: int, gpus: int | None) -> None:
    figures = known(name)

    def needed(count: int) -> int:
        return KIND.memory_needed(figures, 4096, 1, count, RunOptions())

    assert gpus_needed(needed, figures, capacity * GB) == gpus


def test_the_header_of_a_real_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(make_tiny_gguf.tiny())
    header = read_gguf(path)
    shape = figures_of(header).architecture
    assert (shape.name, shape.layers, shape.heads, shape.key_size) == ("llama", 2, 4, 16)
    assert shape.vocabulary == len(make_tiny_gguf.TOKENS)
    assert header.data_start + header.data_size == path.stat().st_size
    assert header.parameters * 4 == header.data_size


BASE = {"block_count": 6, "embedding_length": 64, "attention.head_count": 8,
        "attention.key_length": 32, "attention.value_length": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "metadata", "values"),
    [
        ("qwen3", {"attention.head_count_kv": 2}, [128] * 6),
        ("qwen35", {"attention.head_count_kv": 2, "full_attention_interval": 3},
         [0, 0, 128, 0, 0, 128]),
        ("qwen35", {"attention.head_count_kv": 2,
                    "attention.recurrent_layers": [True, False] * 3}, [0, 128] * 3),
        ("granitehybrid", {"attention.head_count_kv": [0, 0, 4, 0, 0, 4]},
         [0, 0, 256, 0, 0, 256]),
        ("gemma4", {"attention.head_count_kv": [4, 4, 2] * 2, "attention.key_length": 64,
                    "attention.value_length": 64, "attention.key_length_swa": 32,
                    "attention.value_length_swa": 32, "attention.sliding_window": 16,
                    "attention.sliding_window_pattern": [True, True, False] * 2},
         [256] * 6),
        ("gemma4", {"attention.head_count_kv": 2, "attention.shared_kv_layers": 4},
         [128, 128, 0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_a_token_is_cached_only_in_layers_that_look_back(
    name: str, metadata: dict[str, Any], values: list[int]
) -> None:
    keys = {f"{name}.{key}": value for key, value in {**BASE, **metadata}.items()}
    shape = shape_of(GgufHeader({"general.architecture": name, **keys}, {}, 0, 0))
    assert [shape.cached_values(layer) for layer in range(6)] == values
    total = [each * 4096 for each in values]
    assert sum(layer_caches(shape, 4096, 1, 512, flash=True)) <= sum(total)
    if name == "gemma4" and shape.sliding_window:
        assert [shape.has_window(layer) for layer in range(6)] == [True, True, False] * 2
        assert layer_caches(shape, 4096, 1, 512, flash=True)[:3] == (528 * 256,) * 2 + (4096 * 256,)
    else:
        assert [*layer_caches(shape, 4096, 1, 512, flash=True)] == total


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ["gemma2:2b", "gemma3:1b", "gpt-oss:20b"])
def test_the_catalog_s_pattern_is_the_one_of_the_architecture_s_name(
    name: str, flash: bool
) -> None:
    model = read_catalog().find(name)
    assert model is not None
    shape = model.architecture
    by_name = layer_caches(replace(shape, layer_types=()), 65536, 4, 512, flash)
    assert layer_caches(shape, 65536, 4, 512, flash) == by_name


@pytest.mark.parametrize("name", ["llama3.2:3b", "qwen3:30b", "gemma3:1b", "qwen2.5:7b"])
def test_a_header_of_real_size_is_read_back(name: str, tmp_path: Path) -> None:
    model = read_catalog().find(name)
    assert model is not None
    path = tmp_path / "sparse.gguf"
    write_sparse(path, model)
    figures = figures_of(read_gguf(path))
    assert figures.architecture == replace(model.architecture, layer_types=()), "from the file"
    if name != "gemma3:1b":  # Ollama's own file has other types
        assert figures.weights == pytest.approx(model.figures.weights, rel=0.01)


def test_a_stored_file_has_precedence_over_the_catalog(tmp_path: Path) -> None:
    catalog = read_catalog()
    other = catalog.find("llama3.2:1b")
    assert other is not None
    name = parse_model_name("llama3.1:8b")
    assert known_figures(tmp_path, name, catalog) == known("llama3.1:8b")
    install(tmp_path, other, "llama3.1:8b")
    found = known_figures(tmp_path, name, catalog)
    assert found is not None
    assert found.measured
    assert found.architecture == other.architecture
    assert known_figures(tmp_path, parse_model_name("nobody:1b"), catalog) is None
    assert known_figures(None, parse_model_name("nobody:1b"), None) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a \\(complete\\) GGUF"),
        (b"PK\x03\x04zip", "does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 10**12, 1), "claims"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "version"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62), "does not end"),
        (make_tiny_gguf.tiny()[:3000], "does not end|ends too early"),
    ],
)
def test_a_file_in_another_format_is_reported(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_gguf(path)


def test_a_missing_model_has_no_figures(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not in"):
        stored_model(tmp_path, parse_model_name("nobody:1b"))
