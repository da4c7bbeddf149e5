"""The catalog of models: its own figures, and the files that add to it and override it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aiflux.engines.ollama.memory import estimate
from aiflux.errors import ConfigError
from aiflux.models.catalog import (
    DEFAULTS,
    OWN,
    CatalogModel,
    catalog_files,
    read_catalog,
)

OWN_MODELS = read_catalog().models
TABLE = {"name": "llama", "layers": 2, "embedding": 64, "heads": 4, "vocabulary": 100}


def write(path: Path, models: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"models": models}), encoding="utf-8")
    return path


def counted(model: CatalogModel) -> int:
    """Return the number of parameters of an architecture, without norms and biases."""
    a = model.architecture
    tables = a.vocabulary * a.embedding * (1 if model.tied else 2)
    attention = a.embedding * (a.heads * (a.key_size + a.value_size) + 2 * a.kv_heads * a.key_size)
    matrices = 2 if a.name == "bert" else 3
    feed = matrices * a.embedding * a.feed_forward * max(a.experts, 1)
    return tables + a.layers * (attention + feed)


def test_the_package_has_the_common_models() -> None:
    assert len(OWN_MODELS) >= 60
    assert len({model.family for model in OWN_MODELS.values()}) >= 30
    assert any(model.endpoints == ("embeddings",) for model in OWN_MODELS.values())
    assert any(model.vision for model in OWN_MODELS.values())


@pytest.mark.parametrize("name", sorted(OWN_MODELS))
def test_shape_parameters_and_size_of_a_model_agree(name: str) -> None:
    model = OWN_MODELS[name]
    # Position tables, biases and norms make up the rest, and encoders of images.
    seeing = 0.35 if model.vision and not model.projector_size else 0.03
    assert counted(model) == pytest.approx(model.parameters, rel=seeing)
    assert counted(model) <= model.parameters * 1.001
    bits = {"Q4_K_M": (4.6, 7), "Q4_0": (4.5, 5.1), "Q8_0": (8.4, 8.7), "F16": (15.9, 17),
            "BF16": (15.9, 17), "MXFP4": (4.2, 5.5)}[model.quantisation]  # fmt: skip
    assert bits[0] <= 8 * model.size / model.parameters <= bits[1]
    assert model.licence != "unknown"
    assert {*model.defaults} <= {*DEFAULTS}


@pytest.mark.parametrize("name", sorted(OWN_MODELS))
def test_memory_is_never_less_than_the_weights(name: str) -> None:
    model = OWN_MODELS[name]
    small = estimate(model.figures, 2048, 1, flash=True).total
    assert small > 0.75 * model.size
    assert estimate(model.figures, 2048, 1).total >= 0.95 * small
    assert estimate(model.figures, 2048, 8).total >= estimate(model.figures, 2048, 1).total


def test_a_users_file_adds_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path / "models.yaml",
        {
            "llama3.1:8b": {"defaults": {"temperature": 0}},
            "lab/mine": {"size": 10, "context": 512, "architecture": TABLE},
        },
    )
    catalog = read_catalog([path])
    changed, own = catalog.find("llama3.1:8b"), catalog.find("lab/mine:latest")
    assert changed is not None
    assert own is not None
    assert (changed.defaults, changed.size) == ({"temperature": 0}, 4920738944)
    assert (changed.place, own.place) == (path, path)
    assert own.architecture.kv_heads == 4
    assert own.architecture.key_size == 16
    assert catalog.defaults("LLAMA3.1:8B") == {"temperature": 0}
    assert catalog.defaults("nobody:1b") == {}


def test_a_name_without_a_tag_stands_for_one_model(tmp_path: Path) -> None:
    catalog = read_catalog()
    for name, model in (
        ("phi4", "phi4:14b"),
        ("gpt-oss:latest", "gpt-oss:20b"),
        ("BGE-M3", "bge-m3:567m"),
    ):
        found = catalog.find(name)
        assert found is not None
        assert found.name == model
    assert catalog.find("phi4:15b") is None
    assert catalog.find("elsewhere/phi4") is None
    assert catalog.all_defaults["qwen3:latest"] == catalog.defaults("qwen3:8b")
    families = [name.partition(":")[0] for name, each in catalog.models.items() if each.latest]
    assert len(families) == len(set(families)), "one model of a name"
    path = write(tmp_path / "models.yaml", {"qwen3": {"defaults": {"temperature": 0}}})
    own = read_catalog([path])
    assert own.defaults("qwen3") == {"temperature": 0}
    assert own.defaults("qwen3:8b") == catalog.defaults("qwen3:8b")


def test_the_precedence_of_files(tmp_path: Path) -> None:
    files = [
        write(tmp_path / name / "models.yaml", {"phi4:14b": {"context": number}})
        for number, name in enumerate(("site", "user", "named"), start=1)
    ]
    model = read_catalog(files).find("phi4:14b")
    assert model is not None
    assert (model.context, model.place) == (3, files[2])


def test_where_files_are_searched(tmp_path: Path) -> None:
    site = write(tmp_path / "site" / "models.yaml", {})
    user = write(tmp_path / "home" / ".config" / "aiflux" / "models.yaml", {})
    named = write(tmp_path / "group.yaml", {})
    environ = {"HOME": str(tmp_path / "home"), "AIFLUX_SITE_CONFIG": str(site.parent / "a.yaml")}
    assert catalog_files(named, environ) == (site, user, named)
    assert catalog_files(None, {"HOME": str(tmp_path)}) == ()
    with pytest.raises(ConfigError, match=r"models_file .*nowhere.yaml"):
        catalog_files(tmp_path / "nowhere.yaml", environ)


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("modles: {}", "unknown key 'modles'", "models"),
        ("models: {m: {sise: 3}}", "m: unknown key 'sise'", "architecture, context"),
        ("models: [m]", "expected KEY: VALUE", "correct"),
        ("models: {m: {size: 3, context: 2}}", "architecture is missing", "add architecture"),
        ("models: {m: {architecture: {layer: 3}}}", "architecture: unknown key 'layer'", "layers"),
        ("models: {'phi4:14b': {size: big}}", "size = 'big' is invalid", "a whole number"),
        ("models: {'phi4:14b': {size: 0}}", "size = 0 is invalid", "at least 1"),
        ("models: {'phi4:14b': {vision: 3}}", "vision = 3 is invalid", "true or false"),
        ("models: {'phi4:14b': {endpoints: [talk]}}", "endpoints = ['talk']", "chat, completions"),
        ("models: {'phi4:14b': {defaults: {top_k: 3}}}", "unknown key 'top_k'", "temperature"),
        ("models: {'phi4:14b': {defaults: {temperature: hot}}}", "temperature = 'hot'", "a number"),
        ("models: {'phi4:14b': {defaults: {temperature: -1}}}", "temperature = -1", "at least 0"),
        ("models: {'phi4:14b': {defaults: {top_p: 3}}}", "defaults: top_p = 3", "at most 1"),
        ("models: {'phi4:14b': {defaults: {stop: 3}}}", "defaults: stop = 3", "a text"),
        ("models: {'phi4:14b': {license: ours}}", "key 'license'", "did you mean 'licence'?"),
        ("models: {'phi4:14b': {}, 'phi4:14b': {}}", "phi4:14b is given twice", "remove one"),
        ("models: {'phi4:14b': {}, 'PHI4:14b': {}}", "PHI4:14b is given twice", "remove one"),
        ("models: {m: {}, 'm:latest': {}}", "m:latest is given twice", "remove one"),
        ("models: {'a b': {}}", "'a b' is not a model name", "NAME:TAG"),
        ("models: {", "is not YAML", "correct it"),
    ],
)
def test_errors_are_reported_with_their_place(
    tmp_path: Path, text: str, what: str, remedy: str
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_catalog([path])
    assert what in caught.value.message
    assert remedy in (caught.value.remedy or "")
    assert str(path) in caught.value.message


def test_the_packages_file_is_in_the_package() -> None:
    assert OWN.is_file()
