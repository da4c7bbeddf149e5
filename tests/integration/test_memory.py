"""The memory formula, compared with Ollama's own calculation for the same models.

Ollama calculates from a file's header before it loads the model. Real architectures are compared at
their real sizes, in files without weights (tests/tools/make_sparse_gguf.py). The actual memory of
SmolLM2 is compared as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from aiflux.engines.ollama.api import Ollama, ollama_environment
from aiflux.engines.ollama.memory import BATCH, estimate, graph_sizes, layer_caches
from aiflux.engines.ollama.store import stored_model
from aiflux.engines.process import ServerProcess
from aiflux.errors import EngineError
from aiflux.models.catalog import CatalogModel, read_catalog
from aiflux.models.figures import Figures
from aiflux.models.name import parse_model_name
from tests.integration.conftest import MODEL
from tests.tools.make_sparse_gguf import install

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TOO_LARGE = re.compile(r"requires more system memory \(([\d.]+) (\w+)\)")
ARCHITECTURES = [
    "llama3.1:8b", "llama3.3:70b", "qwen2.5:7b", "qwen3:8b", "qwen3:30b", "gemma2:9b",
    "gemma3:12b", "phi4:14b", "mixtral:8x7b", "granite3.3:8b", "olmo2:7b", "command-r:35b",
    "llama3.2-vision:11b",
]  # fmt: skip


@dataclass(frozen=True)
class PrintedSize:
    """A size printed by Ollama: bytes, and the precision of the last digit."""

    value: float
    step: float

    def means(self, size: float, tolerance: float = 0.001) -> bool:
        return abs(size - self.value) <= self.step / 2 + tolerance * self.value


def read_size(text: str) -> PrintedSize:
    number, unit = text.split()
    return PrintedSize(float(number) * UNITS[unit], UNITS[unit] * (0.1 if "." in number else 1))


@contextmanager
def serving(
    program: Path, models: Path, home: Path, slots: int, context: int
) -> Iterator[tuple[Ollama, Path]]:
    log = home / f"serve-{slots}-{context}.log"
    settings = {"OLLAMA_NUM_PARALLEL": str(slots), "OLLAMA_CONTEXT_LENGTH": str(context)}
    server = ServerProcess(
        [str(program), "serve"], ollama_environment(os.environ, models, home, settings), log
    )
    server.start()
    try:
        yield Ollama(server.url), log
    finally:
        server.stop()


def account_of(
    program: Path, models: Path, home: Path, name: str, context: int
) -> dict[str, PrintedSize]:
    with serving(program, models, home, 1, context) as (ollama, log):
        before = log.stat().st_size
        words = ""
        try:
            ollama.load(name, 1.5)
        except EngineError as error:
            words = error.message
        text = log.read_text(encoding="utf-8", errors="replace")[before:] + words
    refused = TOO_LARGE.search(text)
    if refused:
        return {"required.full": read_size(f"{refused[1]} {refused[2]}")}
    sizes = re.findall(r'memory\.([a-z.]+)="([\d.]+ \w+)"', text)
    return {key: read_size(text) for key, text in sizes}


def ours(figures: Figures, context: int) -> float:
    return estimate(figures, context, 1, gpu_overhead=0).total


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with real architectures without weights."""
    folder = tmp_path_factory.mktemp("sparse")
    catalog = read_catalog()
    for name in ARCHITECTURES:
        install(folder, known(catalog.find(name)), f"sparse-{name}")
    return folder


def known(model: CatalogModel | None) -> CatalogModel:
    assert model is not None
    return model


@pytest.mark.parametrize("context", [2048, 16384])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_formula_matches_ollama(
    name: str, context: int, sparse: Path, ollama: Path, tmp_path: Path
) -> None:
    account = account_of(ollama, sparse, tmp_path, f"sparse-{name}", context)
    figures = stored_model(sparse, parse_model_name(f"sparse-{name}")).figures
    estimated = estimate(figures, context, 1, gpu_overhead=0)
    parts = {
        "required.full": estimated.total,
        "required.kv": estimated.cache,
        "weights.total": estimated.weights,
        "graph.full": estimated.graph,
    }
    if "required.kv" not in account:
        # It does not fit this machine, so Ollama uses the graph of a split model.
        caches = layer_caches(figures.architecture, context, 1, BATCH)
        full, divided = graph_sizes(figures, context, BATCH, 2 * sum(caches))
        parts["required.full"] += divided - full
    assert "required.full" in account
    for key, size in parts.items():
        assert key not in account or account[key].means(size), (key, size, account[key])
    # The catalog's figures for a missing model, from its size and shape alone.
    catalog_model = known(read_catalog().find(name))
    if not catalog_model.vision:
        expected = pytest.approx(account["required.full"].value, rel=0.08)
        assert ours(catalog_model.figures, context) == expected


@pytest.mark.parametrize(("slots", "context"), [(1, 2048), (2, 4096), (4, 2048), (8, 1024)])
def test_the_formula_matches_the_memory_of_smollm2(
    slots: int, context: int, models: Path, ollama: Path, tmp_path: Path
) -> None:
    with serving(ollama, models, tmp_path, slots, context) as (server, log):
        server.load(MODEL, 120)
        (loaded,) = server.loaded()
        text = log.read_text(encoding="utf-8", errors="replace")
    buffers = {
        kind: float(number) * 2**20
        for kind, number in re.findall(r"CPU +(model|KV|compute) buffer size = +([\d.]+) MiB", text)
    }
    figures = stored_model(models, parse_model_name(MODEL)).figures
    least = estimate(figures, context, slots, flash=True, gpu_overhead=0)
    assert least.cache == buffers["KV"]
    assert least.weights == pytest.approx(buffers["model"], rel=0.001)
    assert least.graph == pytest.approx(buffers["compute"], rel=0.05)
    if slots == 1:
        assert ours(figures, context) == loaded.size
