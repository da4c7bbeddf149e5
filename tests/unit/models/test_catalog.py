"""The catalog of models: its own figures, and the files that add to it and override it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aiflux.core.config.engine_kinds import KINDS
from aiflux.engines.ollama.memory import estimate
from aiflux.engines.vllm.memory import divides, memory_needed
from aiflux.errors import ConfigError
from aiflux.models.catalog import (
    DEFAULTS,
    ENGINES,
    OWN,
    CatalogModel,
    catalog_files,
    read_catalog,
)
from aiflux.models.figures import FIXED, NONE
from aiflux.models.name import is_hub_name, split_hub_name

OWN_MODELS = read_catalog().models
OLLAMA_MODELS = [name for name in sorted(OWN_MODELS) if not is_hub_name(name)]
HUB_MODELS = sorted((repo, model.name) for repo, model in read_catalog().hub.items())
TABLE = {"name": "llama", "layers": 2, "embedding": 64, "heads": 4, "vocabulary": 100}


def write(path: Path, models: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"models": models}), encoding="utf-8")
    return path


UNCOUNTED = {"hf:nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": "the experts' input is compressed",
             "llama4:maverick": "every second layer has experts",
             "gemma4:e4b": "each layer has token embeddings of its own"}  # fmt: skip


def counted(model: CatalogModel) -> int:
    """Return the number of parameters of an architecture, without norms and biases.

    Nothing is counted for Mamba and linear attention. In Nemotron, other layers have the experts.
    """
    a = model.architecture
    tables = a.vocabulary * a.embedding * (1 if model.tied else 2)
    attention = a.embedding * (a.heads * (a.key_size + a.value_size) + 2 * a.kv_heads * a.key_size)
    nemotron = a.name == "nemotron_h_moe"
    matrices = 2 if nemotron or a.name == "bert" else 3
    feed = matrices * a.embedding * a.feed_forward * max(a.experts, 1)
    cached = sum(a.cached_values(layer) > 0 for layer in range(a.layers))
    return (
        tables + cached * attention + (a.layer_types.count(NONE) if nemotron else a.layers) * feed
    )


def test_the_package_has_the_common_models() -> None:
    assert len(OWN_MODELS) >= 120
    assert sum(model.endpoints == ("rerank",) for model in OWN_MODELS.values()) >= 5
    assert len({model.family for model in OWN_MODELS.values()}) >= 30
    assert any(model.endpoints == ("embeddings",) for model in OWN_MODELS.values())
    assert any(model.vision for model in OWN_MODELS.values())


@pytest.mark.parametrize("name", sorted(OWN_MODELS))
def test_shape_and_parameters_of_a_model_agree(name: str) -> None:
    model, shape = OWN_MODELS[name], OWN_MODELS[name].architecture
    assert model.licence != "unknown"
    assert {*model.defaults} <= {*DEFAULTS}
    if name in UNCOUNTED or not shape.feed_forward or not shape.value_size:
        return  # a figure without a source, or latent attention
    # Position tables, biases and norms make up the rest, and encoders of images.
    hybrid = FIXED in shape.layer_types
    rest = 0.35 if model.vision and not model.projector_size else 0.2 if hybrid else 0.03
    assert counted(model) == pytest.approx(model.parameters, rel=rest)
    assert counted(model) <= model.parameters * 1.001


@pytest.mark.parametrize("name", OLLAMA_MODELS)
def test_size_and_parameters_of_a_model_agree(name: str) -> None:
    model = OWN_MODELS[name]
    bits = {"Q4_K_M": (4.6, 7), "Q4_0": (4.5, 5.1), "Q8_0": (8.4, 8.7), "F16": (15.9, 17),
            "BF16": (15.9, 17), "MXFP4": (4.2, 5.5)}[model.quantisation]  # fmt: skip
    high = 10 if name in ("gemma4:e4b", "qwen3.5:2b") else bits[1]  # tables or vision in F16
    assert not model.parameters or bits[0] <= 8 * model.size / model.parameters <= high


@pytest.mark.parametrize("name", sorted(OWN_MODELS))
def test_an_entry_names_its_sources_and_has_a_possible_shape(name: str) -> None:
    model, shape = OWN_MODELS[name], OWN_MODELS[name].architecture
    assert model.sources
    assert all(len(source) > 20 for source in model.sources)
    assert {*model.engines} <= {*KINDS}
    assert shape.heads % max(shape.kv_heads, 1) == 0
    assert shape.heads % max(shape.full_kv_heads, 1) == 0
    assert shape.heads or is_hub_name(name)
    assert model.context <= 2**24
    assert shape.experts_used <= shape.experts
    sliding = [each for each in shape.layer_types if "sliding" in each]
    assert not sliding or 0 < shape.sliding_window < model.context
    assert len(shape.layer_types) in (0, shape.layers)


@pytest.mark.parametrize(("repo", "name"), HUB_MODELS)
def test_weights_on_the_hub_agree_with_the_number_of_parameters(repo: str, name: str) -> None:
    model = OWN_MODELS[name]
    assert split_hub_name(repo) == (repo, None)
    assert ("vllm" in model.engines) or name == "llama3.2-vision:11b"
    figures = model.hub_figures(repo)
    if not model.parameters:
        assert figures is None
        return
    assert figures is not None
    bits = 8 * figures.weights / model.parameters
    low, high = {"BF16": (15.9, 16.1), "F16": (15.9, 16.1), "F32": (15.9, 16.1), "FP8": (8, 10),
                 "MXFP4": (4.25, 6), "NVFP4": (4.5, 8)}[model.hub[repo]]  # fmt: skip
    assert low <= bits <= high
    small, large = (memory_needed(figures, 2048, slots, 1) for slots in (1, 64))
    assert figures.weights < small <= large
    assert divides(figures.architecture, 1)


def test_a_name_on_the_hub_means_one_model() -> None:
    repos = [repo.lower() for model in OWN_MODELS.values() for repo in model.hub]
    assert len(repos) == len({*repos})
    assert len(repos) >= 120


@pytest.mark.parametrize("name", OLLAMA_MODELS)
def test_memory_is_never_less_than_the_weights(name: str) -> None:
    model = OWN_MODELS[name]
    assert model.figures is not None
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


def test_a_model_is_found_by_its_name_on_the_hub(tmp_path: Path) -> None:
    catalog = read_catalog()
    for name in ("hf:Qwen/Qwen3-8B", "HF:qwen/qwen3-8b", "Hf:Qwen/Qwen3-8B@main"):
        found = catalog.find(name)
        assert found is not None
        assert (found.name, found.hub_name) == ("qwen3:8b", "hf:Qwen/Qwen3-8B")
    assert catalog.find("hf:Qwen/Qwen3-9B") is None
    assert catalog.find("hf:no name") is None
    assert catalog.find("qwen/qwen3-8b") is None, "a namespace in Ollama's registry"
    for asked, near in (
        ("hf:Qwen/Qwen3_8B", "hf:Qwen/Qwen3-8B"),
        ("hf:qwen/Qwen3-8B", "hf:Qwen/Qwen3-8B"),
        ("hf:Qwen/Qwen3-8B", None),
        ("hf:Qwen/Qwen3-9B", None),
        ("hf:Qwen/Qwen3-8B-Base", None),
        ("hf:lab/mine", None),
        ("hf:Qwen", None),
    ):
        assert catalog.nearest(asked) == near, asked
    own = {"hf:Lab/Mine-7B": {"context": 512, "parameters": 10**6, "quantisation": "FP8",
                              "architecture": TABLE, "endpoints": ["rerank"]}}  # fmt: skip
    mine = read_catalog([write(tmp_path / "models.yaml", own)]).find("hf:lab/mine-7b")
    assert mine is not None
    assert (mine.family, mine.size, mine.figures, mine.engines) == ("Mine-7B", 0, None, ("vllm",))
    figures = mine.hub_figures("Lab/Mine-7B")
    assert figures is not None
    assert figures.weights == 2 * 12800 + (10**6 - 12800) // 2 * 2
    assert mine.architecture.embeds


def test_engines_follow_from_the_names_and_the_file() -> None:
    def engines(name: str) -> tuple[str, ...]:
        return OWN_MODELS[name].engines

    assert engines("qwen3:8b") == ENGINES
    assert engines("gemma3:4b") == ("ollama", "vllm"), "llama.cpp cannot read its file"
    assert engines("llava:13b") == ("ollama", "llamacpp"), "no name on the hub"
    assert engines("llama3.2-vision:11b") == ("ollama",), "vLLM removed it"


def test_a_pattern_gives_the_type_of_each_layer(tmp_path: Path) -> None:
    shape = {**TABLE, "layers": 5, "layer_pattern": "sf-l", "sliding_window": 100}
    own = write(tmp_path / "models.yaml", {"m": {"size": 1, "context": 1, "architecture": shape}})
    model = read_catalog([own]).find("m")
    assert model is not None
    assert model.architecture.layer_types == (
        "sliding_attention",
        "full_attention",
        "mlp",
        "linear_attention",
        "sliding_attention",
    )


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
        ("models: {'phi4:14b': {hub: {phi-4: BF16}}}", "hub: 'phi-4' is invalid", "ORG/NAME"),
        ("models: {'phi4:14b': {hub: {hf:a/b: BF16}}}", "'hf:a/b' is invalid", "ORG/NAME"),
        ("models: {'phi4:14b': {hub: {a/b: Q4}}}", "a/b: 'Q4' is invalid", "BF16, F16"),
        ("models: {'phi4:14b': {hub: [a/b]}}", "hub: expected KEY: VALUE", "correct"),
        ("models: {'phi4:14b': {engines: [vlm]}}", "engines = ['vlm']", "ollama, llamacpp, vllm"),
        ("models: {'phi4:14b': {sources: here}}", "sources = 'here'", "a list of strings"),
        (
            "models: {m: {size: 1, context: 1, architecture: {name: m, layers: 1, heads: 1, "
            "embedding: 1, vocabulary: 1, layer_pattern: x}}}",
            "layer_pattern = 'x'",
            "letters of fsl-",
        ),
        ("models: {'hf:a b': {}}", "'hf:a b' is not a model name", "NAME:TAG"),
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
