"""The catalog of models: what is known about a model before it is downloaded.

Files are read in this order: the package's own ``catalog.yaml``, the site's ``models.yaml`` (next
to the file in AIFLUX_SITE_CONFIG), the user's (``~/.config/aiflux/models.yaml``), ``models_file``.
Each adds models, and overrides single keys of known models.

A model has Ollama's name and the names of the same model on Hugging Face, or only the latter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from aiflux.errors import ConfigError
from aiflux.models.endpoints import ENDPOINTS
from aiflux.models.figures import FIXED, FULL, NONE, SLIDING, Architecture, Figures, Vision
from aiflux.models.name import HUB_PREFIX, is_hub_name, parse_model_name, split_hub_name
from aiflux.util import value_parsers
from aiflux.util.text import nearest, suggestion
from aiflux.util.value_parsers import Parser
from aiflux.util.yaml_file import read_yaml

_MISSPELT = 0.8  # minimum similarity to a known family
_MISSPELT_HUB = 0.9  # the same for a name of Hugging Face, which is longer
OWN = Path(__file__).with_name("catalog.yaml")
FILE_NAME = "models.yaml"
DEFAULTS: Mapping[str, Parser] = {
    "temperature": value_parsers.number(0, 100),
    "top_p": value_parsers.number(0, 1),
    "max_tokens": value_parsers.integer(1),
    "seed": value_parsers.integer(0),
    "stop": value_parsers.texts,
    "frequency_penalty": value_parsers.number(-2, 2),
    "presence_penalty": value_parsers.number(-2, 2),
}
"""Parameters that can have defaults: those supported by Ollama's OpenAI endpoints."""

# Bytes per value in the token embeddings, and in the output layer, for each file type.
# Source: llama.cpp, src/llama-quant.cpp; in Q4_K_M and Q4_0, the output layer has Q6_K.
_TOKEN_BYTES = {"Q8_0": 1.0625, "F16": 2.0, "BF16": 2.0, "MXFP4": 2.0, "F32": 4.0}
_OUTPUT_BYTES = {"Q8_0": 1.0625, "F16": 2.0, "BF16": 2.0, "MXFP4": 2.0, "F32": 4.0}
_Q4, _Q6 = 0.5625, 0.8203125

# Bytes per quantised parameter of weights on Hugging Face, with their scales: one byte for 32
# values in MXFP4 (Open Compute Project, Microscaling Formats 1.0), for 16 in NVFP4 (NVIDIA,
# "Introducing NVFP4"). vLLM loads F32 in half precision.
HUB_FORMATS = {"BF16": 2.0, "F16": 2.0, "F32": 2.0, "FP8": 1.0, "MXFP4": 0.53125, "NVFP4": 0.5625}
_HALF = 2
ENGINES = ("ollama", "llamacpp", "vllm")
# Of each letter of ``layer_pattern``, the type of the layer in Hugging Face's ``config.json``.
_LAYER_TYPES = {"f": FULL, "s": SLIDING, "l": FIXED, "-": NONE}


@dataclass(frozen=True)
class CatalogModel:
    """One model of the catalog.

    Attributes:
        name: Ollama's name, or ``hf:ORG/NAME``.
        parameters: number of parameters; 0 if unknown.
        size: bytes of Ollama's file; 0 for ``hf:ORG/NAME``.
        projector_size: bytes of a second file for images.
        context: tokens of the training context.
        endpoints: keys of ``ENDPOINTS``.
        tied: the token embeddings also serve as output layer.
        latest: whether the name without a tag (or with ``latest``) means this model.
        defaults: parameters that apply if a request sets none.
        hub: ``ORG/NAME`` of the same model on Hugging Face, with the format of its weights; the
            first one is the one to advise.
        engines: the kinds that can run it.
        sources: where its figures come from.
        place: the file that defines it; the last one if there are several.
    """

    name: str
    family: str
    parameters: int
    quantisation: str
    size: int
    context: int
    endpoints: tuple[str, ...]
    licence: str
    architecture: Architecture
    place: Path
    projector_size: int = 0
    vision: bool = False
    vision_encoder: Vision | None = None
    tied: bool = False
    latest: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    engines: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def hub_name(self) -> str | None:
        """``hf:ORG/NAME``; None if it is not on Hugging Face, or the catalog does not know it."""
        return next((HUB_PREFIX + repo for repo in self.hub), None)

    def hub_figures(self, repo: str) -> Figures | None:
        """Return the figures of its weights on Hugging Face; None if their number is unknown.

        Token embeddings and output layer have half precision. MXFP4 is the format of experts only.
        """
        shape, style = self.architecture, self.hub.get(repo, "")
        if not self.parameters or style not in HUB_FORMATS:
            return None
        tables = shape.vocabulary * shape.embedding * (1 if self.tied else 2)
        tables = min(tables, self.parameters)
        small = self.parameters - tables
        if style == "MXFP4":
            small = min(small, shape.expert_parameters)
        whole = self.parameters - tables - small
        layer = int(small * HUB_FORMATS[style] + whole * _HALF) // shape.layers
        return Figures(shape, (layer,) * shape.layers, tables * _HALF)

    @property
    def figures(self) -> Figures | None:
        """The figures of Ollama's file; None if the model is not Ollama's.

        All layers are assumed to have equal weights.
        """
        if not self.size:
            return None
        shape = self.architecture
        table = shape.vocabulary * shape.embedding
        output = int(table * _OUTPUT_BYTES.get(self.quantisation, _Q6))
        on_host = 0 if self.tied else int(table * _TOKEN_BYTES.get(self.quantisation, _Q4))
        layer = max(0, self.size - output - on_host) // shape.layers
        return Figures(
            shape,
            (layer,) * shape.layers,
            output,
            self.projector_size,
            self.vision_encoder,
        )


@dataclass(frozen=True)
class Catalog:
    """Models by Ollama's name, or by ``hf:ORG/NAME`` if they are not Ollama's."""

    models: Mapping[str, CatalogModel]

    @cached_property
    def hub(self) -> Mapping[str, CatalogModel]:
        """Models by ``ORG/NAME``."""
        return {repo: model for model in self.models.values() for repo in model.hub}

    @cached_property
    def _hub_names(self) -> Mapping[str, str]:
        return {repo.lower(): repo for repo in self.hub}

    @cached_property
    def latest(self) -> Mapping[str, CatalogModel]:
        """Models by their ``...:latest`` name."""
        found = {_latest(name): model for name, model in self.models.items() if model.latest}
        return {name: model for name, model in found.items() if name not in self.models}

    def find(self, name: str) -> CatalogModel | None:
        """Return a model, or None if it is unknown."""
        if is_hub_name(name):
            repo = self.hub_repo(name)
            return None if repo is None else self.hub[repo]
        served = _served(name)
        return self.models.get(served) or self.latest.get(served)

    def hub_repo(self, name: str) -> str | None:
        """Return ``ORG/NAME`` as the catalog writes it, or None if it is unknown."""
        split = split_hub_name(name)
        return None if split is None else self._hub_names.get(split[0].lower())

    def nearest(self, name: str) -> str | None:
        """Return the known model that a name is probably a misspelling of, or None.

        Of Ollama's names, only the family (before the colon) is compared, as the catalog does not
        have every tag; names with a registry or namespace are accepted. On Hugging Face, models
        with other numbers are other models.
        """
        if is_hub_name(name):
            return self._nearest_hub(name)
        family, _, tag = _served(name).partition(":")
        families = {known.partition(":")[0] for known in self.models}
        if "/" in family or family in families:
            return None
        near = nearest(family, families, _MISSPELT)
        if near is None:
            return None
        known = [each for each in self.models if each.partition(":")[0] == near]
        same_tag = f"{near}:{tag}"
        return same_tag if same_tag in known else known[0]

    def _nearest_hub(self, name: str) -> str | None:
        split = split_hub_name(name)
        if split is None or split[0] in self.hub:
            return None
        asked = split[0].lower()
        alike = {repo for repo in self._hub_names if _numbers(repo) == _numbers(asked)}
        near = nearest(asked, alike, _MISSPELT_HUB)
        return None if near is None else HUB_PREFIX + self._hub_names[near]

    @property
    def all_defaults(self) -> dict[str, dict[str, Any]]:
        """The default parameters of all models that have any."""
        every = {**self.models, **self.latest}
        return {name: dict(model.defaults) for name, model in every.items() if model.defaults}

    def defaults(self, name: str) -> dict[str, Any]:
        """Return the parameters that apply if a request sets none."""
        model = self.find(name)
        return dict(model.defaults) if model else {}


def read_catalog(files: Iterable[Path] = ()) -> Catalog:
    """Read the package's own catalog and then ``files``, lowest precedence first.

    Raises:
        ConfigError: a file is invalid; names the file, the model and the key.
    """
    files = tuple(files)
    if not files:
        return _own_catalog()
    entries: dict[str, dict[str, Any]] = {}
    places: dict[str, Path] = {}
    for path in (OWN, *files):
        for name, entry in _read(path).items():
            entries[name] = {**_overridden(entries, name), **entry}
            places[name] = path
    return Catalog({name: _model(name, entry, places[name]) for name, entry in entries.items()})


def refuse_hub_name(name: str, engine: str, otherwise: str = "") -> None:
    """Refuse a model of Hugging Face; the error has Ollama's name of it, if the catalog knows it.

    Args:
        engine: title of the one that cannot run it.
        otherwise: another way to use the model with it.

    Raises:
        ConfigError: it is such a model.
    """
    if not is_hub_name(name):
        return
    known = read_catalog().find(name)
    ways = ["use --engine vllm"]
    if known is not None and not is_hub_name(known.name):
        ways.append(f"use Ollama's name of this model: --model {known.name}")
    raise ConfigError(
        f"{name} is a model of Hugging Face, which {engine} does not run",
        "; or ".join([*ways, *filter(None, [otherwise])]),
    )


def catalog_files(
    models_file: Path | None, environ: Mapping[str, str] = os.environ
) -> tuple[Path, ...]:
    """Return the additional catalogs that exist, lowest precedence first.

    Args:
        models_file: an explicitly named catalog, which must exist.

    Raises:
        ConfigError: ``models_file`` does not exist.
    """
    home = Path(environ.get("HOME") or "/")
    base = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    site = environ.get("AIFLUX_SITE_CONFIG")
    candidates = [Path(site).with_name(FILE_NAME)] if site else []
    candidates.append(base / "aiflux" / FILE_NAME)
    if models_file is not None and not models_file.is_file():
        raise ConfigError(
            f"models_file {models_file} is not a file", "correct or remove the setting"
        )
    found = [path for path in candidates if path.is_file()]
    return (*found, *([models_file] if models_file else []))


@cache
def _own_catalog() -> Catalog:
    return Catalog({name: _model(name, entry, OWN) for name, entry in _read(OWN).items()})


def _served(name: str) -> str:
    return parse_model_name(name).served.lower()


def _numbers(repo: str) -> list[str]:
    return re.findall(r"\d+", repo)


def _latest(name: str) -> str:
    return name.rpartition(":")[0] + ":latest"


def _overridden(entries: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Return a model's entry so far, also under its ``latest`` name."""
    if name in entries:
        return entries[name]
    for other, entry in entries.items():
        if entry.get("latest") is True and _latest(other) == name:
            return {**entry, "latest": False}
    return {}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if path != OWN:
        read_yaml(path)  # reports invalid YAML and duplicate keys with their line
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=loader)  # noqa: S506 - safe
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct it") from None
    content = _mapping(content or {}, f"{path}", {"models", "sources"})
    models = _mapping(content.get("models") or {}, f"{path}: models", None)
    found: dict[str, dict[str, Any]] = {}
    for name, entry in models.items():
        served = _named(str(name), path)
        if served in found:
            raise ConfigError(
                f"{path}: {name} is given twice: names ignore case, and a name without a tag "
                "equals :latest",
                "remove one of them",
            )
        found[served] = _mapping(entry, f"{path}: {name}", set(_KEYS))
    return found


def _named(name: str, path: Path) -> str:
    if is_hub_name(name) and (split := split_hub_name(name)):
        return HUB_PREFIX + split[0]
    try:
        return _served(name)
    except ConfigError as error:
        raise ConfigError(f"{path}: models: {error.message}", error.remedy) from None


def _mapping(value: Any, place: str, known: set[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: expected KEY: VALUE lines, not {value!r}", "correct it")
    unknown = sorted({str(key) for key in value} - (known or {str(key) for key in value}))
    if unknown:
        raise ConfigError(
            f"{place}: unknown key {unknown[0]!r}", suggestion(unknown[0], known or ())
        )
    return {str(key): item for key, item in value.items()}


_KEYS = {
    "family", "parameters", "quantisation", "size", "projector_size", "context", "endpoints",
    "vision", "licence", "architecture", "vision_encoder", "latest", "defaults", "hub", "engines",
    "sources",
}  # fmt: skip
_SHAPE_KEYS = {
    "name", "layers", "embedding", "heads", "kv_heads", "head_size", "value_size", "feed_forward",
    "vocabulary", "tied", "experts", "experts_used", "sliding_window", "cross_layers",
    "layer_pattern", "full_kv_heads", "full_head_size",
}  # fmt: skip
_VISION_KEYS = {"image", "patch", "heads", "embedding", "channels", "max_pixels"}


def _model(name: str, entry: Mapping[str, Any], path: Path) -> CatalogModel:
    values = _Values(entry, f"{path}: {name}")
    given = {} if is_hub_name(name) and "architecture" not in entry else values.need("architecture")
    place = f"{path}: {name}: architecture"
    shape = _Values(_mapping(given, place, _SHAPE_KEYS), place)
    context = values.whole("context")
    endpoints = values.words("endpoints", tuple(ENDPOINTS), tuple(ENDPOINTS))
    vision, quantisation = values.flag("vision"), values.text("quantisation", "unknown")
    projector = values.whole("projector_size", 0)
    hub = _hub(name, entry, f"{path}: {name}: hub", quantisation)
    # llama.cpp cannot read the part that processes images in the model's own file.
    own = () if is_hub_name(name) else ENGINES[: 1 if vision and not projector else 2]
    return CatalogModel(
        name=name,
        family=values.text("family", name.rpartition("/")[2].partition(":")[0]),
        parameters=values.whole("parameters", 0),
        quantisation=quantisation,
        size=0 if is_hub_name(name) else values.whole("size"),
        context=context,
        endpoints=endpoints,
        licence=values.text("licence", "unknown"),
        architecture=_shape(shape, context, embeds=not _generates(endpoints))
        if given
        else Architecture("unknown", 1, 0, 0, 0, 0, 0, 0, context),
        place=path,
        projector_size=projector,
        vision=vision,
        vision_encoder=_vision(entry, f"{path}: {name}: vision_encoder"),
        tied=shape.flag("tied"),
        latest=values.flag("latest"),
        defaults=_defaults(entry, f"{path}: {name}: defaults"),
        hub=hub,
        engines=values.words("engines", ENGINES, (*own, *(ENGINES[2:] if hub else ()))),
        sources=values.texts("sources"),
    )


def _generates(endpoints: Iterable[str]) -> bool:
    return any(ENDPOINTS[name].generates for name in endpoints)


def _hub(name: str, entry: Mapping[str, Any], place: str, quantisation: str) -> dict[str, str]:
    """Return the names on Hugging Face; an entry with such a name has that one."""
    if is_hub_name(name):
        return {name[len(HUB_PREFIX) :]: quantisation}
    given = _mapping(entry.get("hub") or {}, place, None)
    for repo, style in given.items():
        if is_hub_name(repo) or split_hub_name(repo) is None:
            raise ConfigError(f"{place}: {repo!r} is invalid", "write ORG/NAME: FORMAT")
        if style not in HUB_FORMATS:
            raise ConfigError(
                f"{place}: {repo}: {style!r} is invalid",
                f"the format must be one of: {', '.join(HUB_FORMATS)}",
            )
    return given


def _defaults(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    given = _mapping(entry.get("defaults") or {}, place, set(DEFAULTS))
    for key, value in given.items():
        try:
            DEFAULTS[key](value)
        except ValueError as error:
            raise ConfigError(
                f"{place}: {key} = {value!r} is invalid", f"{key} must be {error}"
            ) from None
    return given


def _shape(values: _Values, context: int, *, embeds: bool) -> Architecture:
    heads, embedding = values.whole("heads"), values.whole("embedding")
    layers = values.whole("layers")
    head_size = values.whole("head_size", embedding // max(heads, 1))
    return Architecture(
        name=values.text("name"),
        layers=layers,
        embedding=embedding,
        heads=heads,
        kv_heads=values.whole("kv_heads", heads),
        key_size=head_size,
        value_size=values.whole("value_size", head_size),
        vocabulary=values.whole("vocabulary"),
        context=context,
        feed_forward=values.whole("feed_forward", 0),
        sliding_window=values.whole("sliding_window", 0),
        experts=values.whole("experts", 0),
        experts_used=values.whole("experts_used", 0),
        cross_layers=values.numbers("cross_layers"),
        layer_types=values.pattern("layer_pattern", layers),
        full_kv_heads=values.whole("full_kv_heads", 0),
        full_head_size=values.whole("full_head_size", 0),
        embeds=embeds,
    )


def _vision(entry: Mapping[str, Any], place: str) -> Vision | None:
    given = entry.get("vision_encoder")
    if given is None:
        return None
    values = _Values(_mapping(given, place, _VISION_KEYS), place)
    return Vision(
        weights=0,  # included in the model's size
        image=values.whole("image"),
        patch=values.whole("patch"),
        heads=values.whole("heads"),
        embedding=values.whole("embedding"),
        channels=values.whole("channels", 3),
        max_pixels=values.whole("max_pixels", 0),
    )


@dataclass(frozen=True)
class _Values:
    """Typed values of a mapping; errors name the position."""

    entry: Mapping[str, Any]
    place: str

    def need(self, key: str) -> Any:
        if self.entry.get(key) is None:
            raise ConfigError(f"{self.place}: {key} is missing", f"add {key}: VALUE")
        return self.entry[key]

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.entry.get(key, default)
        value = self.need(key) if value is None else value
        low = 1 if default is None else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._wrong(key, value, f"a whole number of at least {low}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.entry.get(key, default)
        value = self.need(key) if value is None else value
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(key, value, "a string")
        return value

    def flag(self, key: str) -> bool:
        value = self.entry.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def words(self, key: str, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.entry.get(key, list(default))
        if not isinstance(value, list) or not value or not {*map(str, value)} <= {*known}:
            raise self._wrong(key, value, f"a list of: {', '.join(known)}")
        return tuple(str(word) for word in value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def pattern(self, key: str, layers: int) -> tuple[str, ...]:
        """Return the type of each layer: the pattern repeats."""
        value = self.entry.get(key)
        if value is None:
            return ()
        if not isinstance(value, str) or not value or not {*value} <= {*_LAYER_TYPES}:
            raise self._wrong(key, value, f"letters of {''.join(_LAYER_TYPES)}")
        return tuple(_LAYER_TYPES[value[layer % len(value)]] for layer in range(layers))

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self.entry.get(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._wrong(key, value, "a list of whole numbers")
        return tuple(value)

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(
            f"{self.place}: {key} = {value!r} is invalid", f"{key} must be {expected}"
        )
